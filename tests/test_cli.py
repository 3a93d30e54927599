"""The command itself, in a process of its own where that matters."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, PngImagePlugin

import magicmix

LAYOUT = str(ROOT / "docs" / "layouts" / "castle.png")
FAST = ["--steps", "8", "--quiet"]


def command(*arguments, cwd):
    run = [sys.executable, str(ROOT / "magicmix.py"), *map(str, arguments)]
    return subprocess.run(run, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_twice_and_again_are_identical(tmp_path):
    options = ["a red strawberry", "--layout", LAYOUT, "--reweight", "red=1.5", "--negative", "a dog", "--seed", "3"]
    for name in ("one.png", "two.png"):
        done = command(*options, "--steps", "10", "-o", name, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout == f"{name}\n" and "content: 100%" in done.stderr
    again = command("--again", "one.png", "-o", "three.png", cwd=tmp_path)
    assert again.returncode == 0 and f"layout: {LAYOUT}" in again.stdout
    one, two, three = ((tmp_path / f"{n}.png").read_bytes() for n in ("one", "two", "three"))
    assert one == two == three
    text = json.loads(Image.open(tmp_path / "one.png").info["magicmix"])
    assert text["parameters"]["seed"] == 3 and text["parameters"]["reweight"] == {"red": 1.5}
    assert set(text["checkpoint"]) == {"text_encoder", "unet", "vae"} and "torch" in text["versions"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.png", "three.png", "two.png"], "temporary files stay"


def test_count_writes_one_picture_a_seed(tmp_path):
    shared = ["a tiger", "--layout-prompt", "a house", *FAST]
    assert magicmix.main([*shared, "--seed", "5", "--count", "3", "-o", str(tmp_path / "v.png")]) == 0
    for seed in (5, 6, 7):
        single = tmp_path / f"single{seed}.png"
        assert magicmix.main([*shared, "--seed", str(seed), "-o", str(single)]) == 0
        batch = np.asarray(Image.open(tmp_path / f"v-{seed}.png"), dtype=int)
        assert abs(batch - np.asarray(Image.open(single), dtype=int)).max() <= 1
        again = tmp_path / "again.png"  # a picture of a batch is made again alone
        assert magicmix.main(["--again", str(tmp_path / f"v-{seed}.png"), "-o", str(again), "--quiet"]) == 0
        assert again.read_bytes() == single.read_bytes()


@pytest.mark.parametrize("options", [["--sampler", "ddpm"], ["--eta", "1"], ["--dtype", "bf16"], ["--size", "96x64"],
                                     ["--vae-dtype", "bf16"], ["--k-max", "0", "--k-min", "0"],
                                     ["--k-max", "1", "--k-min", "0"]])  # fmt: skip
def test_options_that_change_the_run(tmp_path, options):
    path = tmp_path / "mix.png"
    assert magicmix.main(["a tiger", "--layout", LAYOUT, *FAST, *options, "-o", str(path)]) == 0
    assert Image.open(path).size == ((96, 64) if "--size" in options else (128, 128))


def test_help_explains_the_options_in_the_papers_terms(tmp_path):
    text = " ".join(command("--help", cwd=tmp_path).stdout.split())
    for term in ("K_max", "K_min", "nu, the content's share", "cross-attention", "2210.16056", "eps"):
        assert term in text


BAD = [
    (["a tiger"], "give one of --layout IMAGE and --layout-prompt TEXT"),
    (["a tiger", "--layout", LAYOUT, "--layout-prompt", "a house"], "give one of"),
    (["--layout", LAYOUT], "the content prompt is missing"),
    (["a tiger", "--layout", "nowhere.png"], "'nowhere.png' does not exist"),
    (["a tiger", "--layout", str(ROOT)], "cannot be read"),
    (["a tiger", "--layout", str(ROOT / "README.md")], "is not a readable picture"),
    (["a tiger", "--layout", LAYOUT, "--nu", "2"], "nu 2.0 is out of range; use 0 to 1"),
    (["a tiger", "--layout", LAYOUT, "--k-max", "0.1", "--k-min", "0.2"], "k-min 0.2 is above k-max 0.1"),
    (["a tiger", "--layout", LAYOUT, "--reweight", "tiger"], "'tiger' must be WORD=S"),
    (["a tiger", "--layout", LAYOUT, "--reweight", "lion=0"], "its words are: a, tiger"),
    (["a tiger", "--layout", LAYOUT, "--count", "0"], "use 1 or more"),
    (["a tiger", "--layout", LAYOUT, "--size", "100"], "both sides must be multiples of 8"),
    (["a tiger", "--layout", LAYOUT, "--size", "big"], "'big' is no size"),
    (["a tiger", "--layout", LAYOUT, "--device", "abacus"], "device 'abacus' cannot be used"),
    (["a tiger", "--layout", LAYOUT, "--weights", "nowhere"], "'nowhere' is no folder, no .safetensors file"),
    (["a tiger", "--layout", LAYOUT, "--weights", "model.ckpt"], "is a pickle, which runs code when it is opened"),
    (["a tiger", "--layout", LAYOUT, "-o", "no/such/folder/mix.png"], "make it first"),
    (["--again", LAYOUT], "has no magicmix parameters"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mix.png").write_bytes(b"precious")
    try:
        code = magicmix.main([*arguments, *([] if "--again" in arguments else FAST)])
    except SystemExit as stop:  # argparse's own way out
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1
    assert (tmp_path / "mix.png").read_bytes() == b"precious"


def write_metadata(path, **parameters):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("magicmix", json.dumps({"parameters": parameters}))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


@pytest.mark.parametrize("parameters", [{"output": "/tmp/x.png"}, {"prompt": 3}, {"device": "cuda"}, {"size": "64"},
                                        {"size": [64]}, {"reweight": {"a": "b"}}])  # fmt: skip
def test_metadata_may_set_parameters_only(tmp_path, parameters):
    write_metadata(tmp_path / "x.png", **parameters)
    with pytest.raises(ValueError, match="has a parameter that cannot be right"):
        magicmix.read_metadata(tmp_path / "x.png")


def test_an_unknown_dtype_in_the_metadata_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_metadata("x.png", prompt="a tiger", layout_prompt="a house", dtype="fp8")
    assert magicmix.main(["--again", "x.png"]) == 2
    assert "dtype 'fp8' is not known; use fp32, fp16, bf16" in capsys.readouterr().err


def test_a_changed_layout_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.open(LAYOUT).save("layout.png")
    assert magicmix.main(["a tiger", "--layout", "layout.png", *FAST]) == 0
    Image.new("RGB", (128, 128), "red").save("layout.png")
    assert magicmix.main(["--again", "mix.png", "-o", "b.png"]) == 2
    assert "has changed" in capsys.readouterr().err and not (tmp_path / "b.png").exists()


def test_layouts_are_composited_rotated_and_cropped(tmp_path):
    clear = Image.new("RGBA", (64, 32), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    picture, _ = magicmix.open_layout(tmp_path / "clear.png", (16, 16))
    assert picture.shape == (1, 3, 16, 16) and picture.eq(1).all(), "transparent is white"
    sides = Image.new("RGB", (64, 32), "black")
    sides.paste((255, 255, 255), (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show
    sides.save(tmp_path / "turned.png", exif=exif)
    picture, _ = magicmix.open_layout(tmp_path / "turned.png", (32, 16))
    assert picture[0, :, :8].mean() > 0.9 and picture[0, :, -8:].mean() < -0.9
