"""The command itself, in a process of its own where that matters."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import magicmix

LAYOUT = str(ROOT / "docs" / "layouts" / "castle.png")
FAST = ["--steps", "8", "--quiet"]


def command(*arguments, cwd, **env):
    run = [sys.executable, str(ROOT / "magicmix.py"), *map(str, arguments)]
    return subprocess.run(run, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=300)


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


def test_one_thread_or_two(tmp_path):
    """Sums are split between threads, so they round differently: never by more than a grey level in a picture."""
    for threads in ("1", "2"):
        for name in (f"{threads}.png", f"{threads}-twice.png"):
            options = ("a tiger", "--layout", LAYOUT, "--quiet", "-o", name)
            assert command(*options, cwd=tmp_path, OMP_NUM_THREADS=threads).returncode == 0
        assert (tmp_path / f"{threads}.png").read_bytes() == (tmp_path / f"{threads}-twice.png").read_bytes()
    one, two = (np.asarray(Image.open(tmp_path / f"{threads}.png"), dtype=int) for threads in ("1", "2"))
    assert abs(one - two).max() <= 1


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


def test_a_changed_layout_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.open(LAYOUT).save("layout.png")
    assert magicmix.main(["a tiger", "--layout", "layout.png", *FAST]) == 0
    Image.new("RGB", (128, 128), "red").save("layout.png")
    assert magicmix.main(["--again", "mix.png", "-o", "b.png"]) == 2
    assert "has changed" in capsys.readouterr().err and not (tmp_path / "b.png").exists()
