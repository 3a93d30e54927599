"""The command itself: in a process of its own where that matters, and once as a user starts it."""

import dataclasses
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAYOUT, ROOT, TINY, change_config, forks, refused, run, with_unet, write_again
from PIL import Image

import magicmix
import weights
from command import machine, options
from command.machine import versions
from command.sheet import contact_sheet
from weights.memory import decoding_bytes

FAST = ["--steps", "8", "--size", "64", "--quiet"]


def parameters(path):
    return metadata(path)["parameters"]


def metadata(path):
    return json.loads(Image.open(path).info["magicmix"])


def grey(path):
    return np.asarray(Image.open(path), dtype=int)


# ------------------------------------------------------------------------------------------------ the same again


def test_twice_and_again_are_identical(tmp_path):
    shared = ["a red strawberry", "--layout", LAYOUT, "--token-weight", "red=1.5", "--negative", "a dog", "--seed", "3"]
    for name in ("one.png", "two.png"):
        done = run(*shared, "--steps", "10", "-o", name, cwd=tmp_path)
        assert done.code == 0 and done.out == f"{name}\n" and "content: 100%" in done.err
    again = run("--again", "one.png", "-o", "three.png", cwd=tmp_path)
    assert again.code == 0 and again.out.splitlines()[0] == f"layout: {LAYOUT}"
    one, two, three = ((tmp_path / f"{n}.png").read_bytes() for n in ("one", "two", "three"))
    assert one == two == three
    made = metadata(tmp_path / "one.png")
    assert made["parameters"]["seed"] == 3 and made["parameters"]["token_weights"] == {"red": 1.5}
    assert made["checkpoint"] == weights.load().identity and made["versions"] == versions()
    assert "torch" in made["versions"] and len(made["layout_sha256"]) == 64
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.png", "three.png", "two.png"], "temporary files stay"


def as_a_user(*arguments, cwd, threads):
    line = [sys.executable, str(ROOT / "magicmix.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}  # other tests run beside it
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_one_thread_or_two(tmp_path):
    """`python magicmix.py`, in an interpreter of its own. Sums are split between threads, so they round differently:
    never by more than a grey level in a picture. The other tests' way of running the command gives the same bytes."""
    mix = ("a tiger", "--layout", LAYOUT, "--steps", "10", "--quiet")
    for name, threads in (("one.png", "1"), ("two.png", "2"), ("two-twice.png", "2")):
        done = as_a_user(*mix, "-o", name, cwd=tmp_path, threads=threads)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert run(*mix, "-o", "one-twice.png", cwd=tmp_path) == (0, "", "")
    for threads in ("one", "two"):
        assert (tmp_path / f"{threads}.png").read_bytes() == (tmp_path / f"{threads}-twice.png").read_bytes()
    assert abs(grey(tmp_path / "one.png") - grey(tmp_path / "two.png")).max() <= 1


def test_isolated(tmp_path):
    """`python -I` leaves the script's own folder out of the path, and what PYTHONPATH says."""
    line = [sys.executable, "-I", str(ROOT / "magicmix.py"), "a tiger", "--layout", str(LAYOUT), *FAST]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert Image.open(tmp_path / "mix.png").size == (64, 64)


SCRIPT = """import weights
from magicmix import decode, text_to_image

models = weights.load()
*_, last = text_to_image(models, "a tiger", steps=2, size=16)
decode(models, last.x)[0].save("made.png")
"""


def test_a_script_outside_the_clone(tmp_path):
    (tmp_path / "mine.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-W", "ignore", "mine.py"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert Image.open(tmp_path / "made.png").size == (16, 16)
    (tmp_path / "made.png").unlink()
    environment.pop("PYTHONPATH")
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "No module named 'weights'" in done.stderr, "the path makes the difference"


PYTHON = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_readmes_python_runs(models, tmp_path, monkeypatch, capsys):
    """With 8 steps: both kinds of layout, and a film of x0 with a picture per step."""
    quick = dataclasses.replace(models, own_options=models.own_options | {"steps": 8})
    monkeypatch.setattr(weights, "load", lambda: quick)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    assert len(PYTHON) == 1
    exec(PYTHON[0], {})
    said = capsys.readouterr().out.split()
    assert said == "layout 7 layout 6 layout 5 layout 4 layout 3 layout 2 layout 1".split() + (
        "mixing 4 mixing 3 mixing 2 mixing 1 content 0".split()
    )
    assert Image.open(tmp_path / "tiger-car.png").size == (128, 128)
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 5  # k_max = 0.6
    own = re.search(r"the checkpoint's own: size, (.*)", PYTHON[0])[1]
    assert (
        own
        == "guidance 4.0, k_min 0.08, nu 0.7"
        == ", ".join(f"{name} {models.defaults[name]}" for name in ("guidance", "k_min", "nu"))
    )


def test_count_writes_one_picture_a_seed(tmp_path):
    shared = ["a tiger", "--layout-prompt", "a house", *FAST]
    assert magicmix.main([*shared, "--seed", "5", "--count", "3", "-o", str(tmp_path / "v.png")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v-5.png", "v-6.png", "v-7.png"]
    for seed in (5, 6, 7):
        single = tmp_path / f"single{seed}.png"
        assert magicmix.main([*shared, "--seed", str(seed), "-o", str(single)]) == 0
        assert abs(grey(tmp_path / f"v-{seed}.png") - grey(single)).max() <= 1
        again = tmp_path / "again.png"  # a picture of a batch is made again alone
        assert magicmix.main(["--again", str(tmp_path / f"v-{seed}.png"), "-o", str(again), "--quiet"]) == 0
        assert again.read_bytes() == single.read_bytes()
    assert abs(grey(tmp_path / "v-5.png") - grey(tmp_path / "v-6.png")).max() > 50, "the seeds make a difference"


@pytest.mark.parametrize(("count", "size", "columns", "rows"), [(3, "64", 2, 2), (1, "64x40", 1, 1)])
def test_a_contact_sheet(count, size, columns, rows, tmp_path):
    """Each picture stands in it as it is, in the order of the seeds, with a line of text below; the rest is white."""
    mix = ("a tiger", "--layout-prompt", "a house", "--steps", "8", "--size", size, "--seed", "5", "--count", count)
    code, out, _ = run(*mix, "--sheet", "-o", "v.png", cwd=tmp_path)
    names = ["v.png"] if count == 1 else ["v-5.png", "v-6.png", "v-7.png"]
    assert code == 0 and out.splitlines() == [*names, "v-sheet.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "v-sheet.png"])
    sheet, (height, width) = grey(tmp_path / "v-sheet.png"), grey(tmp_path / names[0]).shape[:2]
    assert sheet.shape == (4 + rows * (height + 22), 4 + columns * (width + 4), 3)
    for i, name in enumerate(names):
        y, x = 4 + i // columns * (height + 22), 4 + i % columns * (width + 4)
        assert np.array_equal(sheet[y : y + height, x : x + width], grey(tmp_path / name))
        assert sheet[y + height : y + height + 18, x : x + width].min() < 100, "its seed"
        sheet[y : y + height + 18, x : x + width] = 255
    assert sheet.min() == 255
    assert "magicmix" not in Image.open(tmp_path / "v-sheet.png").info, "--again makes no sheet again"


def test_a_contact_sheet_of_large_pictures():
    """They are scaled down to 256 pixels; as many columns as rows, or one more."""
    made = [Image.new("RGB", (600, 300), colour) for colour in ("red", "lime", "blue", "red", "lime")]
    sheet = contact_sheet(made, ["label"] * 5)
    assert sheet.size == (4 + 3 * (256 + 4), 4 + 2 * (128 + 4 + 18))
    middle = [sheet.getpixel((4 + i % 3 * 260 + 128, 4 + i // 3 * 150 + 64)) for i in range(6)]
    assert middle == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 0), (0, 255, 0), (255, 255, 255)]
    assert made[0].size == (600, 300)


def test_a_changed_layout_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.open(LAYOUT).save("layout.png")
    assert magicmix.main(["a tiger", "--layout", "layout.png", *FAST]) == 0
    Image.new("RGB", (128, 128), "red").save("layout.png")
    assert magicmix.main(["--again", "mix.png", "-o", "b.png"]) == 2
    assert "has changed" in capsys.readouterr().err and not (tmp_path / "b.png").exists()
    assert magicmix.main(["--again", "mix.png", "--layout", "layout.png", "-o", "b.png", "--quiet"]) == 0


def test_the_former_names_still_work(tmp_path):
    """--reweight is --token-weight. A picture of an earlier version says "reweight", and its "checkpoint" has three
    parts; the rest is what such a picture carries, word for word."""
    shared = ["a red strawberry", "--layout-prompt", "a car", "--negative", "a dog", "--seed", "3", *FAST]
    for option in ("token-weight", "reweight"):
        assert run(*shared, f"--{option}", "red=1.5", "-o", f"{option}.png", cwd=tmp_path).code == 0
    today = (tmp_path / "token-weight.png").read_bytes()
    assert (tmp_path / "reweight.png").read_bytes() == today
    identity = weights.load().identity
    earlier = {
        "checkpoint": {part: identity[part] for part in ("text_encoder", "unet", "vae")},
        "parameters": {"dtype": "fp32", "eta": 0.0, "guidance": 4.0, "k_max": 0.6, "k_min": 0.08,
                       "layout_prompt": "a car", "negative": "a dog", "nu": 0.7, "prompt": "a red strawberry",
                       "reweight": {"red": 1.5}, "sampler": "ddim", "seed": 3, "size": [64, 64], "steps": 8},
        "versions": {"numpy": "2.4.6", "pillow": "13.0.0", "safetensors": "0.8.0", "torch": "2.13.0+cpu",
                     "transformers": "5.23.0"},
    }  # fmt: skip
    write_again(tmp_path / "earlier.png", earlier)
    assert run("--again", "earlier.png", "--quiet", cwd=tmp_path) == (0, "", "")
    assert (tmp_path / "mix.png").read_bytes() == today


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("scheduler", {"beta_end": 0.013}),
        ("scheduler", {"prediction_type": "v_prediction"}),
        ("unet", {"attention_head_dim": 8}),
    ],
)
def test_again_wants_the_same_configs(tmp_path, folder, part, fields):
    """Though the weights are the same; unless the picture is of an earlier version, which recorded no configs."""
    shared = ["a tiger", "--layout-prompt", "a car", "--weights", "checkpoint", *FAST]
    assert run(*shared, "-o", "one.png", cwd=tmp_path).code == 0
    change_config(folder, part, **fields)
    done = run("--again", "one.png", "-o", "two.png", cwd=tmp_path)
    assert done.code == 2 and "made with another checkpoint (" in done.err
    assert not (tmp_path / "two.png").exists()
    earlier = metadata(tmp_path / "one.png")
    del earlier["checkpoint"]["configs"]
    write_again(tmp_path / "earlier.png", earlier)
    assert run("--again", "earlier.png", "-o", "two.png", cwd=tmp_path).code == 0
    assert abs(grey(tmp_path / "one.png") - grey(tmp_path / "two.png")).max() > 1, "the config does change the picture"
    assert run("--again", "one.png", "--weights", TINY, "-o", "three.png", cwd=tmp_path).code == 0
    assert np.array_equal(grey(tmp_path / "one.png"), grey(tmp_path / "three.png"))


# ------------------------------------------------------------------------------------------------------- options

CHANGES = [
    ["--sampler", "ddpm"],
    ["--eta", "1"],
    ["--dtype", "bf16"],
    ["--vae-dtype", "bf16"],
    ["--size", "96x64"],
    ["--k-max", "1", "--k-min", "0"],
    ["--k-max", "0", "--k-min", "0"],
    ["--nu", "0.1"],
    ["--steps", "9"],
    ["--guidance", "1"],
    ["--negative", "a tiger"],
    ["--token-weight", "tiger=0"],
    ["--seed", "1"],
    ["--prediction", "v"],
]


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    path = tmp_path_factory.mktemp("unchanged") / "mix.png"
    assert magicmix.main(["a tiger", "--layout", str(LAYOUT), *FAST, "-o", str(path)]) == 0
    return path


@pytest.mark.parametrize("given", CHANGES, ids=" ".join)
def test_options_that_change_the_run(tmp_path, given, unchanged):
    """Each changes the picture, and in its parameters itself alone."""
    path = tmp_path / "mix.png"
    assert magicmix.main(["a tiger", "--layout", str(LAYOUT), *FAST, *given, "-o", str(path)]) == 0
    assert Image.open(path).size == ((96, 64) if "--size" in given else (64, 64))
    assert "--size" in given or abs(grey(path) - grey(unchanged)).max() >= 1
    before, after = parameters(unchanged), parameters(path)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    names = {option.removeprefix("--").replace("-", "_") for option in given if option.startswith("--")}
    assert changed == {{"token_weight": "token_weights"}.get(name, name) for name in names}


def test_a_mix_of_no_step_is_the_layout(tmp_path):
    """K_max = 0: through the autoencoder and back, which the embedded one does to some grey levels."""
    layout = np.asarray(Image.open(LAYOUT).convert("RGB"), dtype=int)
    for name, count in (("mix.png", "1"), ("mix-1.png", "2")):
        none = ["a tiger", "--layout", LAYOUT, "--k-max", "0", "--k-min", "0", "--count", count]
        done = run(*none, "--quiet", cwd=tmp_path)
        assert (done.code, done.err) == (0, "")
        assert abs(grey(tmp_path / name) - layout).mean() < 8


@pytest.fixture(scope="module")
def help_text(tmp_path_factory):
    done = run("--help", cwd=tmp_path_factory.mktemp("help"))
    assert (done.code, done.err) == (0, "")
    return done.out


def test_help_explains_the_options_in_the_papers_terms(help_text):
    text = " ".join(help_text.split())
    for term in (
        r"K_max / T",
        r"K_min / T",
        r"nu, the content's share",
        r"the sampler",
        r"noise eps",
        r"take eps",
        r"cross- ?attention",
        r"classifier-free guidance",
        r"arXiv 2210\.16056",
    ):
        assert re.search(rf"(?<!\w){term}(?!\w)", text), term


def test_help_lists_every_option_with_its_default(help_text):
    """Its help, its former name and its default, and that of the embedded checkpoint where that is another."""
    listed = help_text[help_text.index("\npositional arguments:") :]
    entries = re.split(r"\n  (?=\S)", listed)
    joined = lambda text: "".join(text.split())  # lines are wrapped, also at hyphens
    own = json.loads((TINY / "magicmix.json").read_text())
    literally = {
        "output": "[mix.png]", "k_max": "[0.6]", "k_min": "[0.08 with the embedded checkpoint, otherwise 0.3]",
        "nu": "[0.7 with the embedded checkpoint, otherwise 0.9]", "steps": "[50]", "sampler": "[ddim]", "eta": "[0.0]",
        "guidance": "[4.0 with the embedded checkpoint, otherwise 7.5]",
        "seed": "[0]", "count": "[1]", "noise_row": "[0]",
        "size": "[the checkpoint's own]", "dtype": "[fp32 on a CPU, fp16 on a GPU]", "vae_dtype": "[fp32]",
        "noise": "[drawn from the seed]", "keep_noise": "[not written]", "weights": "[the embedded one]",
        "device": "[auto]", "prediction": "[auto]", "token_weights": "[1 for all words]", "vae": "[the checkpoint's]",
        "unet": "[the checkpoint's]",
    }  # fmt: skip
    fields = dataclasses.fields(options.Options)
    assert len(fields) == 33
    for field in fields:
        name = "token_weight" if field.name == "token_weights" else field.name
        flag = name if name == "prompt" else f"--{name.replace('_', '-')}"
        (entry,) = [joined(e) for e in entries if re.match(rf"(?:-\w \w+, )?{flag}(?![\w-])", e)]
        assert joined(field.metadata["help"]) in entry
        assert joined(literally.get(field.name, "")) in entry
        if field.default not in (None, "", False):
            default = f"[{field.default}]"
            if own.get(field.name, field.default) != field.default:
                default = f"[{own[field.name]}withtheembeddedcheckpoint,otherwise{field.default}]"
            assert default in entry, entry
        elif field.name not in literally:
            assert "[" not in entry, entry
    assert "--reweight WORD=S" in listed


def test_help_ends_with_examples_that_can_be_parsed(help_text):
    lines = help_text[help_text.index("\nexamples:\n") :].splitlines()[2:]
    assert len(lines) == 5
    for line in lines:
        program, script, *typed = shlex.split(line)
        assert (program, script) == ("python", "magicmix.py")
        given = options.parse(typed, "", {})
        options.check(given)
        assert "layout" not in given or (ROOT / given["layout"]).is_file()


def test_version_names_the_commit_and_the_libraries(tmp_path):
    code, out, error = run("--version", cwd=tmp_path)
    assert (code, error) == (0, "")
    first, *rest = out.splitlines()
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    known = (ROOT / ".git").exists() and subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert first == f"magicmix {known or '(not a git clone)'}"
    assert rest == [f"Python {platform.python_version()}", *(f"{name} {v}" for name, v in versions().items())]


# ----------------------------------------------------------------------------------------------- too few steps


@pytest.fixture
def quick(models, monkeypatch):
    """The command in this process, with a UNet that answers at once."""
    still = with_unet(models, lambda x, *_: torch.zeros_like(x), sample_size=2)
    monkeypatch.setattr(weights, "load", lambda *_, **__: still)


FEW = [(1, 1, "1.00"), (2, 501, "0.52"), (6, 831, "0.17"), (334, 667, "0.32"), (501, 501, "0.52")]
ENOUGH = [8, 10, 20, 50, 333, 500, 999]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("steps", "t", "kept"), FEW)
def test_steps_whose_noise_is_none_are_warned_of(steps, t, kept, tmp_path, capsys):
    shared = ["a tiger", "--steps", str(steps), "-o", str(tmp_path / "mix.png")]
    line = (
        f"magicmix: steps {steps}: denoising from noise starts at timestep {t}, where {kept} of a picture should be "
        "left; 50 steps start at 0.08"
    )
    assert magicmix.main([*shared, "--layout-prompt", "a car"]) == 0
    said = capsys.readouterr().err.replace("\r", "\n").splitlines()  # a progress bar starts its line again
    assert [part for part in said if "magicmix" in part] == [line]
    for more in (["--layout-prompt", "a car", "--quiet"], ["--layout", str(LAYOUT)]):
        assert magicmix.main([*shared, *more]) == 0
        assert "magicmix" not in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("steps", ENOUGH)
def test_steps_that_start_from_noise_are_not_warned_of(steps, tmp_path, capsys):
    shared = ["a tiger", "--steps", str(steps), "-o", str(tmp_path / "mix.png")]
    assert magicmix.main([*shared, "--layout-prompt", "a car"]) == 0
    assert "magicmix" not in capsys.readouterr().err


def test_the_warning_in_the_real_command(tmp_path):
    few = ["a tiger", "--layout-prompt", "a car", "--steps", "1"]
    done = run(*few, cwd=tmp_path)
    lines = [line for line in done.err.splitlines() if "magicmix" in line]
    assert done.code == 0 and len(lines) == 1 and lines[0].startswith("magicmix: steps 1: denoising from noise")
    assert run(*few, "--quiet", cwd=tmp_path) == (0, "", "")


def test_the_warning_in_python(models, recwarn):
    for steps in (magicmix.magicmix(models, "a tiger", "a car", steps=1), magicmix.text_to_image(models, "a", steps=1)):
        with pytest.warns(UserWarning, match="steps 1: denoising from noise starts at timestep 1"):
            next(steps)
    next(magicmix.magicmix(models, "a tiger", torch.zeros(1, 3, 128, 128), steps=1, k_max=1.0))
    assert not recwarn.list


# ------------------------------------------------------------------------------------------------------- messages


def test_an_error_is_a_line_of_its_own(tmp_path):
    """Also one that only the first step finds, when a progress bar could be there already."""
    done = run("a tiger", "--layout-prompt", "a car", "--token-weight", "lion=2", cwd=tmp_path)
    assert done.code == 2 and done.err.startswith("magicmix: token weight: 'lion'") and done.err.count("\n") == 1


# ------------------------------------------------------------------------------------------- memory and time


def test_what_cannot_fit_is_refused_before_the_first_step(tmp_path):
    """By hand: a thousand pictures of 3 colours, 4096 x 4096, four bytes each, alone and joined in a batch."""
    needed = 1000 * 2 * 3 * 4096**2 * 4 / 1e9
    message = f"decoding the pictures needs at least {needed:,.1f} GB of memory, "
    large = ("a tiger", "--layout-prompt", "a car", "--count", "1000", "--size", "4096")
    error = refused(*large, cwd=tmp_path, message=message)
    assert re.search(r"GB of memory, [\d,]+\.\d GB are free; a smaller --size or --count needs less$", error)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads the peak of the memory from Linux")
@pytest.mark.parametrize(("count", "height", "width"), [(1, 40, 24), (2, 24, 32), (2, 80, 64)])
def test_the_estimate_is_below_the_truth(count, height, width, models):
    """So that nothing is refused that fits; and not far below, so that something is. The last is decoded in strips."""
    parent, child = forks().Pipe()
    process = forks().Process(target=decode_and_measure, args=(child, (count, 4, height, width)))
    process.start()
    peak = parent.recv()
    process.join()
    needed = decoding_bytes(models.vae, (height, width), count)
    assert peak / 4 < needed < peak, (needed, peak)


def decode_and_measure(pipe, shape):
    """Sends the peak of the memory that decoding takes beside what is there before."""
    status = lambda name: 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    models = weights.load()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    magicmix.decode(models, torch.zeros(shape))
    pipe.send(status("VmHWM") - before)


def test_what_is_free_is_what_linux_says(monkeypatch, tmp_path):
    free = machine.free_memory(torch.device("cpu"))
    assert 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 4  # with swap
    machine.check_memory(free // 2, torch.device("cpu"))
    with pytest.raises(ValueError, match="needs at least .* GB are free"):
        machine.check_memory(free * 2, torch.device("cpu"))
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2000 kB\nSwapFree:  500 kB\n"}
    monkeypatch.setattr(machine.Path, "read_text", lambda path: files[str(path)])
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert machine.free_memory(torch.device("cpu")) == 2500 * 1024
    files["/sys/fs/cgroup/memory.max"] = "1000000\n"
    assert machine.free_memory(torch.device("cpu")) == 1_000_000


def test_what_is_free_on_a_gpu(monkeypatch):
    """What the driver has, and what torch holds in reserve."""
    for name, value in {"mem_get_info": (50, 80), "memory_reserved": 20, "memory_allocated": 15}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert machine.free_memory(torch.device("cuda")) == 55


@pytest.mark.parametrize(
    ("seconds", "total", "line"),
    [
        (30, 21, "magicmix: the first step took 30 s; about 10 min for the 20 others"),
        (30, 2, None),
        (0.1, 50, None),
    ],
)
def test_a_long_run_says_after_its_first_step_how_long_it_is(seconds, total, line, monkeypatch, capsys):
    clock, steps = [0.0], []
    monkeypatch.setattr(machine.time, "monotonic", lambda: clock[0])

    def slow():
        for _ in range(total):
            clock[0] += seconds
            steps.append(magicmix.Step("mixing", 0, None, None, None, None))
            yield steps[-1]

    assert machine.follow(slow(), total, quiet=False) is steps[-1] and len(steps) == total
    said = re.findall("magicmix: .*", capsys.readouterr().err)
    assert said == ([line] if line else [])
    machine.follow(slow(), total, quiet=True)
    assert capsys.readouterr().err == ""


# ----------------------------------------------------------------------------------------------- busy machines


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch brings GNU's OpenMP runtime on Linux alone")
@pytest.mark.parametrize(
    ("program", "set_by_the_user", "spins"),  # spins: how often a thread then looks before it sleeps
    [
        ("magicmix.py --version", {}, "0"),  # the runtime's own default is 300000
        ("-c 'import lab, torch'", {}, "0"),
        ("magicmix.py --version", {"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000"),
        ("magicmix.py --version", {"GOMP_SPINCOUNT": "7"}, "7"),
    ],
)
def test_waiting_threads_sleep(program, set_by_the_user, spins):
    """As the OpenMP runtime itself reports, when torch's import starts it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= set_by_the_user | {"OMP_DISPLAY_ENV": "VERBOSE", "OMP_NUM_THREADS": "2"}
    line = [sys.executable, *shlex.split(program)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"GOMP_SPINCOUNT = '{spins}'" in done.stderr, done.stderr
