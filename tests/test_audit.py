"""What lab.audit says of public programs and of single departures from the paper.

tests/data/public_mixes.safetensors holds final latents (1, 4, 16, 16), float32, scaled, as CASE/PROGRAM: what the
public programs themselves made of the embedded checkpoint, for `lab.audit`'s three cases. They were run unchanged but
for three things that would hide the loop. The mean of the VAE's posterior stands for its sample. The first draw of
torch.Generator().manual_seed(seed) stands for their noise; where a finished picture is noised again, that of seed +
1000. All use DDIM with the checkpoint's own betas. So no variant is held against numbers that it made.
"""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import LAYOUT, ROOT, contents, relative_error, with_unet
from PIL import Image
from safetensors.torch import load_file

import magicmix
import weights
from command import options, request
from lab.audit import __main__ as command
from lab.audit import table, variants
from lab.audit.scene import Scene
from magicmix import ImageLayout, Noise, mix
from scheduler import Schedule

PUBLIC = load_file(ROOT / "tests" / "data" / "public_mixes.safetensors")
CASES = dict(zip(("teapot-tiger", "mug-panda", "house-frog"), command.CASES, strict=True))
NAMES = {
    "diffusers_community": "diffusers",
    "nipunjindal": "nipunjindal",
    "cloneofsimo_steps_offset_0": "cloneofsimo 0",
    "cloneofsimo_steps_offset_1": "cloneofsimo 1",
}
VARIANTS = {variant.name: variant for variant in command.VARIANTS}


# ------------------------------------------------------------------------------------------------- the public programs


@pytest.mark.parametrize("key", PUBLIC)
def test_a_program_gives_what_it_gave(key):
    """Seen: 4.2e-6 at most. Timesteps of the other steps_offset, the smallest of these changes, move it by 8e-3."""
    case, program = key.split("/")
    scene = command.prepare(request.read(CASES[case], weights.TINY))
    assert relative_error(scene.run(VARIANTS[NAMES[program]]), PUBLIC[key]) <= 1e-3


# --------------------------------------------------------------------------------------------------- single departures

T = 50


class Spy:
    """A denoise that leaves the latents as they are and a layout, which keep what they were asked for."""

    def __init__(self, models):
        self.schedule, self.levels, self.steps = Schedule(models.schedule, T), [], []

    def __call__(self, x, k):
        self.steps.append(k)
        return x, x

    def layout(self, k):
        self.levels.append(k)
        return torch.full((1, 4, 2, 2), float(k))


def down(first, last):
    return list(range(first, last - 1, -1))


@pytest.mark.parametrize(
    ("name", "k_max", "k_min", "levels", "steps"),
    [
        ("this project", 0.6, 0.3, [30, *down(29, 15)], down(30, 1)),
        ("this project", 0.58, 0.0, [29, *down(28, 0)], down(29, 1)),
        ("K truncated", 0.58, 0.3, [28, *down(27, 15)], down(28, 1)),
        ("K truncated", 0.6, 0.3, [30, *down(29, 15)], down(30, 1)),
        ("one level off", 0.6, 0.3, [30, *down(30, 16)], down(30, 1)),
        ("unmixed carried", 0.6, 0.3, [30, *down(29, 15)], down(30, 1)),
        ("diffusers", 0.6, 0.3, [30, *down(29, 16)], down(30, 1)),
        ("diffusers", 0.58, 0.0, [28, *down(27, 1)], down(28, 1)),
        ("nipunjindal", 0.6, 0.3, [30, *down(29, 10)], down(30, 1)),
        ("cloneofsimo 0", 0.6, 0.3, [29, *down(29, 15)], down(30, 1)),
        ("cloneofsimo 0", 0.6, 0.0, [29, *down(29, 1), 50], down(30, 1)),
        ("cloneofsimo 1", 0.6, 0.3, [30, *down(30, 16)], down(30, 1)),
        ("cloneofsimo 1", 1.0, 0.9, [50, *down(50, 46)], down(49, 1)),
    ],
)
def test_levels_and_steps(models, name, k_max, k_min, levels, steps):
    """Which layouts a loop asks for, the start first, and at which k it calls the UNet."""
    spy = Spy(models)
    VARIANTS[name].run(spy, spy.layout, options.Options(steps=T, k_max=k_max, k_min=k_min))
    assert (spy.levels, spy.steps) == (levels, steps)


def small(models, layout, **given):
    """A mix of 12 steps at 64 x 64 pixels, K_max = 7, K_min = 4."""
    o = options.Options(**{"steps": 12, "k_max": 0.6, "k_min": 0.3, "nu": 0.6, "guidance": 4.0, "size": 64} | given)
    if layout is None:
        layout = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5)) * 2 - 1
    eps, second = (Noise(seed, (8, 8), models.device)() for seed in (1, 2))
    return Scene(models, o, "a tiger", layout, eps, second)


def run(scene, name):
    return scene.run(VARIANTS[name])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_a_step_from_another_latent(models, prediction):
    """Against the sampler given the guided prediction for the one and the latent of the other."""
    models = dataclasses.replace(models, schedule=dataclasses.replace(models.schedule, prediction_type=prediction))
    scene, x = small(models, None), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    denoise, k, seen = scene.content, 6, x.flip(-1)
    t = torch.full((2,), scene.schedule.t[k])
    e_uncond, e_cond = models.unet(torch.cat([seen, seen]), t, denoise.context, None).chunk(2)
    expected, _ = scene.schedule.ddim(x, e_uncond + 4.0 * (e_cond - e_uncond), k)
    assert relative_error(variants.step_from(denoise, x, seen, k), expected) <= 1e-5


@pytest.mark.parametrize("layout", [None, "a house"])
@torch.no_grad()
def test_every_departure_shows_and_can_be_undone(models, layout, monkeypatch):
    """Each moves the result by far more than rounding does, and what is left when it is undone is mix, to the bit."""
    scene = small(models, layout)
    args = (scene.content, scene.layouts(variants.TRAJECTORY), 7, 4, 0.6)
    *_, last = mix(*args)
    assert (scene.options.K_max, scene.options.K_min) == (7, 4) and torch.equal(run(scene, "this project"), last.x)
    for name in ["unmixed carried", "one level off"] + ["renoised"] * (layout is not None):
        assert relative_error(run(scene, name), last.x) > 0.01, name
    assert torch.equal(variants.level_off(*args, off=0), last.x)
    monkeypatch.setattr(variants, "step_from", lambda denoise, x, seen, k: denoise(seen, k)[0])
    assert torch.equal(variants.unmixed_carried(*args), last.x)


@torch.no_grad()
def test_k_is_truncated_where_it_is_no_whole_number_of_steps(models):
    assert variants.truncated(0.58, 0.3, 50) == (28, 15) and variants.truncated(0.6, 0.0, 50) == (30, 0)
    scene = small(models, None, k_max=0.66, k_min=0.25)  # 7.92 and 3 steps
    *_, seven = mix(scene.content, scene.layouts(variants.TRAJECTORY), 7, 3, 0.6)
    assert torch.equal(run(scene, "K truncated"), seven.x)
    assert relative_error(run(scene, "this project"), seven.x) > 0.01
    scene = small(models, None, k_max=0.75, k_min=0.25)  # 9 and 3 steps
    assert torch.equal(run(scene, "K truncated"), run(scene, "this project"))


@torch.no_grad()
def test_the_unmixed_latents_never_meet_the_layout(models):
    """With a UNet that predicts the same whatever it is shown, nu changes nothing but in the paper's loop: elsewhere
    the mixture is shown and no more."""
    fixed = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    scenes = [small(with_unet(models, lambda *_: fixed), None, nu=nu) for nu in (0.1, 1.0)]
    for name in ("unmixed carried", "diffusers", "nipunjindal"):
        a, b = (run(scene, name) for scene in scenes)
        assert relative_error(a, b) <= 1e-5, name
        assert relative_error(a, run(scenes[0], "nu = 1")) <= 1e-5, name
    assert relative_error(*(run(scene, "this project") for scene in scenes)) > 0.1


@torch.no_grad()
def test_a_renoised_picture_is_the_trajectory_of_a_straight_one(models):
    """Where the UNet always predicts the noise that the trajectory began with, all its levels are one clean latent with
    that noise. Then renoising adds the noise of abar(0) that the finished picture still has, and that of the second
    draw, and nothing else; without them the result is that of mix."""
    scene = small(models, "a house")
    both = torch.cat([scene.eps, scene.eps])
    scene = small(with_unet(models, lambda *_: both), "a house")
    schedule, eps, second = scene.schedule, scene.eps, scene.second
    clean = schedule.predict(scene.trajectory[1], eps, 1)[0]
    same, again = scene.layouts(variants.RENOISED), scene.layouts(variants.RENOISED_ANEW)
    a_0, b_0 = schedule.abar(0) ** 0.5, (1 - schedule.abar(0)) ** 0.5
    for k in range(1, 12):
        a, b = schedule.abar(k) ** 0.5, (1 - schedule.abar(k)) ** 0.5
        rest = a * ((a_0 - 1) * clean + b_0 * eps)
        assert relative_error(same(k) - scene.trajectory[k], rest) <= 1e-3
        assert relative_error(again(k) - scene.trajectory[k], rest + b * (second - eps)) <= 1e-3
    *_, last = mix(scene.content, ImageLayout(schedule, clean, eps), 7, 4, 0.6)
    assert relative_error(last.x, run(scene, "this project")) <= 1e-3


# --------------------------------------------------------------------------------------------------------- the numbers


def test_differences_and_what_is_left():
    def flat(*colour):
        return Image.new("RGB", (4, 4), colour)

    a, b = flat(100, 100, 100), flat(100, 100, 100)
    b.putpixel((1, 2), (100, 90, 148))
    assert table.grey(a, b) == table.grey(b, a) == (58 / 48, 48)
    layout, start = flat(0, 0, 0), flat(200, 200, 200)
    assert [table.left(flat(v, v, v), layout, start) for v in (0, 50, 200, 250)] == [1, 0.75, 0, -0.25]
    assert [table.left(flat(v, v, v), start, layout) for v in (0, 50, 200)] == [0, 0.25, 1]
    assert table.left(a, layout, layout) is None


def test_averages():
    """Means of means, the largest of the largest, and how many pictures are named as their prompts."""
    one = table.Numbers((1.0, 9.0), (0.1, 0.4), 0.25, 0.5, ("frog", 0.75))
    two = table.Numbers((3.0, 7.0), (0.3, 0.6), -0.75, 1.0, ("sloth", 0.25))
    expected = table.Numbers((2.0, 9.0), (0.2, 0.6), -0.25, 0.75, ("1 of 2", 0.5))
    assert table.average([(one, "frog"), (two, "frog")]) == expected
    last = "| a | 2.00 | 9 | 0.200 | 0.60 | -0.25 | 0.75 | 1 of 2 | 0.50 |"
    assert table.lines({"a": expected})[-1] == last
    assert (
        table.lines({"a": expected._replace(layout=None, judged=None)})[-1]
        == "| a | 2.00 | 9 | 0.200 | 0.60 | - | 0.75 |"
    )


# --------------------------------------------------------------------------------------------------------- the command


def audit(*arguments):
    return command.main([*map(str, arguments), "--steps", "4", "--size", "64", "--device", "cpu", "--quiet"])


def cells(path):
    """The pictures of a sheet of one mix of 64 x 64 pixels."""
    sheet, columns = np.asarray(Image.open(path)), len(command.VARIANTS) + 2
    assert sheet.shape == (4 + 86, 4 + columns * 68, 3)
    return [sheet[4:68, 4 + i * 68 : 68 + i * 68] for i in range(columns)]


def rows_of(text):
    """loop -> the cells of its row, of the first table in a text."""
    lines = text[text.index("| ") :].partition("\n\n")[0].splitlines()
    return {row[0]: row[1:] for row in (line.strip("| ").split(" | ") for line in lines[2:] if line.startswith("| "))}


@pytest.mark.parametrize("layout", [["--layout", LAYOUT], ["--layout-prompt", "a house"]])
def test_any_mix(tmp_path, monkeypatch, capsys, layout):
    """The sheet has this project's picture as magicmix.py makes it, and white where a loop has no such layouts."""
    monkeypatch.chdir(tmp_path)
    mixed = ["a tiger", *layout, "--nu", 0.6, "--seed", 3]
    assert audit(*mixed, "-o", "sheet.png") == 0
    numbers = rows_of(capsys.readouterr().out)
    same = [*mixed, "--steps", 4, "--size", 64, "--device", "cpu", "--quiet", "-o", "mix.png"]
    assert magicmix.main(list(map(str, same))) == 0
    row = cells("sheet.png")
    assert np.array_equal(row[1], np.asarray(Image.open("mix.png")))
    names = ["layout", *VARIANTS, "content alone"]
    missing = {"renoised"} if layout[0] == "--layout" else {"diffusers", "nipunjindal"}
    assert numbers.keys() == set(names) - missing
    for name, picture in zip(names, row, strict=True):
        assert (picture.min() == 255) == (name in missing), name
    assert numbers["this project"][:4] == ["0.00", "0", "0.000", "0.00"]
    assert float(numbers["unmixed carried"][0]) > 0.5
    assert numbers["layout"][4:6] == ["1.00", "0.00"] and numbers["nu = 1"][4:6] == ["0.00", "1.00"]


def test_any_checkpoint(folder, tmp_path, monkeypatch, capsys):
    """Another checkpoint's pictures are not shown to the judge, who knows the embedded one's."""
    monkeypatch.chdir(tmp_path)
    assert audit("a tiger", "--layout", LAYOUT, "--weights", folder, "-o", "other.png") == 0
    assert {len(row) for row in rows_of(capsys.readouterr().out).values()} == {6}
    cells("other.png")


def test_the_cases(tmp_path, monkeypatch, capsys):
    """The mixes of the page and the averages, here of fewer and in four steps, go where they belong."""
    fast = {"steps": 4}
    monkeypatch.setattr(command, "CASES", [case | fast for case in command.CASES[1:2]])
    monkeypatch.setattr(command, "MORE", [case | fast for case in command.MORE[:2]])
    monkeypatch.setattr(command, "PAGE", tmp_path / "audit.md")
    (tmp_path / "audit.md").write_text("# Above\n\n<!-- audit -->\nold\n<!-- end of audit -->\n\nbelow\n")
    assert command.main(["-o", str(tmp_path / "sheet.png"), "--quiet"]) == 0
    text = (tmp_path / "audit.md").read_text()
    assert text.startswith("# Above\n\n<!-- audit -->\n'a panda' into 'mug.png': k_max 0.58,") and "old" not in text
    assert text.endswith("<!-- end of audit -->\n\nbelow\n") and capsys.readouterr().out.strip() in text
    one, average = (rows_of(text[text.index(word) :]) for word in ("'a panda'", "Averages of 2 mixes"))
    assert one["layout"][6] in command.Judge().names and one["layout"][7] != one["content alone"][7]
    assert average["layout"][6].endswith(" of 2") and average.keys() == one.keys()
    assert Image.open(tmp_path / "sheet.png").size == (4 + 132 * (len(VARIANTS) + 2), 4 + 150)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "2"], "count makes several mixes; an audit is of one, so give each --seed alone; leave it out"),
        (["--sheet"], "sheet would be a second one; the audit's output is a sheet; leave it out"),
        (["--keep-noise", "eps.npy"], "keep_noise is not written by an audit; magicmix.py writes it; leave it out"),
        (["--concepts"], "concepts makes no mix; ask magicmix.py for it; leave it out"),
        (["--sampler", "ddpm"], "sampler ddpm with eta 0.0 draws noise at each step; an audit needs ddim, eta 0"),
        (["--eta", "0.5"], "sampler ddim with eta 0.5 draws noise at each step; an audit needs ddim, eta 0"),
        (["--k-max", "0.35"], "k_max 0.35 and k_min 0.3 are both 1 of 4 steps, so nothing is mixed"),
        (["--seed", 2**64 - 1], "seed 18446744073709552615 is out of range"),
        (["--layout-prompt", "a car"], "give one of --layout IMAGE and --layout-prompt TEXT"),
        (["-o", "precious"], "output 'precious' is not a file"),
        (["--nu", "2"], "nu 2.0 is out of range; use 0 to 1"),
    ],
)
def test_what_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious").mkdir()
    (tmp_path / "audit.png").write_bytes(b"a sheet that was there before")
    before = contents(tmp_path)
    assert audit("a tiger", "--layout", LAYOUT, "--k-min", "0.3", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("lab.audit: ") and error.count("\n") == 1 and message in error, error
    assert contents(tmp_path) == before


def test_a_prompt_is_needed(tmp_path, monkeypatch, capsys):
    """Options alone are not taken for the mixes of the page."""
    monkeypatch.chdir(tmp_path)
    assert command.main(["--nu", "0.5"]) == 2
    assert capsys.readouterr().err == "lab.audit: the content prompt is missing; give it as the first argument\n"
