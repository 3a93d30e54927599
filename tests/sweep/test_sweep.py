"""Sweeps in one process: every cell is what magicmix.py makes, half done folders are continued, errors are told."""

import fcntl
import json
import os
import re
import shlex
import signal
import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from conftest import LAYOUT, ROOT, change_tensors, contents, forks, with_unet
from PIL import Image

import magicmix
import weights
from command import machine
from lab.sweep import grid, plan, run, show
from lab.sweep.__main__ import main
from lab.sweep.folder import open_folder

CAR = ROOT / "docs" / "layouts" / "boot.png"
FAST = ["--steps", "6", "--size", "32", "--quiet"]


def sweep(*arguments):
    return main([*map(str, arguments), "--quiet"])


def index(folder):
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.fixture(autouse=True)
def loaded_once(models, monkeypatch):
    """weights.load, which these tests call often, for the embedded checkpoint."""
    load = weights.load
    monkeypatch.setattr(weights, "load", lambda source=weights.TINY, **given: (
        models if source == weights.TINY and set(map(str, given.values())) <= SAME else load(source, **given)
    ))  # fmt: skip


SAME = {"cpu", "torch.float32", "None", "True", "False", "auto"}

# --------------------------------------------------------------------------------------------- as magicmix.py does it

CASES = {
    "image ddim": ["a tiger", "--layout", LAYOUT, CAR, "--k-min", "0,0.4,0.6", "--nu", "0.5,0.8"],
    "image ddpm": ["a tiger", "--layout", LAYOUT, "--k-min", "0.2..0.4/0.2", "--nu", "0.5,0.8", "--sampler", "ddpm"],
    "image eta": ["a tiger", "--layout", LAYOUT, "--k-min", "0,0.4", "--eta", "0.5", "--k-max", "0.5,1"],
    "text ddim": ["a tiger", "a panda", "--layout-prompt", "a car", "a house", "--k-min", "0.2,0.5"],
    "text ddpm": ["a tiger", "a panda", "--layout-prompt", "a car", "--k-min", "0.2,0.5", "--sampler", "ddpm"],
    "guidance 1": ["a tiger", "--layout", LAYOUT, "--guidance", "1,3", "--k-min", "0.2", "--negative", "a dog", ""],
    "token weights": ["a red tiger", "--layout", LAYOUT, "--token-weight", "red=-1,0.5", "--token-weight", "tiger=1..2",
                      "--k-min", "0.2"],
    "no step": ["a tiger", "--layout", LAYOUT, "--k-max", "0", "--k-min", "0"],
    "no step of text": ["a tiger", "--layout-prompt", "a car", "--k-max", "0", "--k-min", "0"],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_cell_is_what_magicmix_makes(case, tmp_path, monkeypatch):
    """With the same batch, which are the seeds of a cell: the same bytes of the whole file, metadata included."""
    monkeypatch.chdir(ROOT)
    assert sweep(*case, *FAST, "--seeds", "3..5", "-o", tmp_path / "grid") == 0
    lines = index(tmp_path / "grid")
    made = {}
    for line in lines:
        typed = shlex.split(line["command"])[2:]
        if line["options"]["seed"] == 3:
            assert magicmix.main([*typed[:-2], "--count", "3", "--quiet", "-o", str(tmp_path / "alone.png")]) == 0
        theirs = tmp_path / f"alone-{line['options']['seed']}.png"
        ours = tmp_path / "grid" / line["picture"]
        made[line["cell"]] = ours.read_bytes()
        assert ours.read_bytes() == theirs.read_bytes(), line["command"]
        assert [size for _, size in line["batch"]] in ([3], [])
        assert line["parameters"] == json.loads(Image.open(ours).info["magicmix"])["parameters"]
    differing = {data for data in made.values()}
    assert len(differing) == len(made), "the options do change the pictures, or what stands in them"


class Padded:
    """A UNet that runs every row in a batch of another size: what stands beside it is other noise."""

    def __init__(self, unet, sizes):
        self.unet, self.sizes, self.config = unet, iter(sizes), unet.config

    def __call__(self, x, t, context, s):
        halves, size = len(x), next(self.sizes)  # one picture
        at = torch.arange(halves).repeat_interleave(size)
        others = torch.randn(halves * size, *x.shape[1:], generator=torch.Generator().manual_seed(1))
        others[::size] = x
        out = self.unet(others, t[at], context[at], None if s is None else s[at])
        return out[::size]


def test_batches_of_any_cells(models, tmp_path, monkeypatch):
    """The record says how many pictures each call had; magicmix() with calls of those sizes gives the same bytes."""
    monkeypatch.chdir(ROOT)
    case = ["a tiger", "--layout", LAYOUT, CAR, "--k-min", "0,0.2,0.6", "--nu", "0.5,0.8", "--k-max", "0.6,0.8"]
    assert sweep(*case, *FAST, "--batch", "5", "-o", tmp_path / "grid") == 0
    seen = set()
    for line in index(tmp_path / "grid"):
        o, sizes = line["options"], [size for calls, size in line["batch"] for _ in range(calls)]
        seen |= set(sizes)
        assert len(sizes) == round(6 * o["k_max"])
        padded = run.replace(models, unet=Padded(models.unet, sizes))
        given = {name: o[name] for name in ("k_max", "k_min", "nu", "steps", "size")}
        layout = Image.open(o["layout"])
        *_, last = magicmix.magicmix(padded, o["prompt"], layout, seeds=o["seed"], **given)
        alone = np.asarray(magicmix.decode(models, last.x)[0])
        assert np.array_equal(alone, pixels(tmp_path / "grid" / line["picture"])), line
    assert max(seen) == 4 and len(seen) > 2


def test_again_makes_a_cell_again(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert (
        sweep("a tiger", "--layout", LAYOUT, "--nu", "0.5,0.8", *FAST, "--sampler", "ddpm", "-o", tmp_path / "g") == 0
    )
    for line in index(tmp_path / "g"):
        again = ["--again", str(tmp_path / "g" / line["picture"]), "--quiet", "-o", str(tmp_path / "again.png")]
        assert magicmix.main(again) == 0
        assert (tmp_path / "again.png").read_bytes() == (tmp_path / "g" / line["picture"]).read_bytes()


def test_noise_from_a_file(tmp_path, monkeypatch):
    """Rows of a noise file are an axis too, and the seeds that DDPM draws from."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).standard_normal((3, 4, 4, 4)).astype(np.float32)
    np.save("noise.npy", noise)
    shared = ["a tiger", "--layout", str(LAYOUT), "--noise", "noise.npy", *FAST, "--sampler", "ddpm", "--k-min", "0.2"]
    assert sweep(*shared, "--noise-row", "0..2", "--seeds", "0..1", "--batch", "1", "-o", "grid") == 0
    for line in index(tmp_path / "grid"):
        assert magicmix.main([*shlex.split(line["command"])[2:-2], "--quiet", "-o", "alone.png"]) == 0
        assert (tmp_path / "grid" / line["picture"]).read_bytes() == (tmp_path / "alone.png").read_bytes()


def test_several_checkpoints_and_precisions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["a tiger", "--layout", str(LAYOUT), *FAST, "--k-min", "0.2", "--weights", str(weights.TINY)]
    assert sweep(*given, "--dtype", "fp32,bf16", "-o", "grid") == 0
    for line in index(tmp_path / "grid"):
        assert magicmix.main([*shlex.split(line["command"])[2:-2], "--quiet", "-o", "alone.png"]) == 0
        assert (tmp_path / "grid" / line["picture"]).read_bytes() == (tmp_path / "alone.png").read_bytes()
        assert "checkpoint" in line


# ------------------------------------------------------------------------------------------------------- in Python


def test_latents_of_a_grid(models):
    """Without pictures on the disk, from PIL pictures that have names."""
    layout = Image.open(LAYOUT).convert("RGB")
    given = {"prompt": ["a tiger"], "layout": ["mine"], "nu": [0.5, 0.8], "steps": [5], "size": [64], "seed": range(2)}
    found = {cell.number: (cell, x) for cell, x in run.latents(models, given, layouts={"mine": layout})}
    assert sorted(found) == [0, 1, 2, 3]
    for nu in (0.5, 0.8):
        *_, last = magicmix.magicmix(models, "a tiger", layout, seeds=range(2), nu=nu, steps=5, size=64)
        ours = torch.stack([x for cell, x in found.values() if cell.values["nu"] == nu])
        assert torch.equal(ours, last.x)
    with pytest.raises(ValueError, match="cell 0: k_min 0.5 is above k_max 0.1"):
        list(run.latents(models, given | {"k_min": [0.5], "k_max": [0.1]}, layouts={"mine": layout}))
    with pytest.raises(ValueError, match="cell 0: layout 'mine' does not exist"):
        list(run.latents(models, given))


def test_prompts_and_pictures_are_encoded_once(models, monkeypatch):
    encoded = {"text": 0, "vae": 0}
    text, vae = models.text_encoder.forward, models.vae.encode

    def count(part, work, *arguments):
        encoded[part] += 1
        return work(*arguments)

    monkeypatch.setattr(models.text_encoder, "forward", lambda ids: count("text", text, ids))
    monkeypatch.setattr(models.vae, "encode", lambda y: count("vae", vae, y))
    given = {"prompt": ["a tiger", "a panda"], "layout": [str(LAYOUT), str(CAR)], "nu": [0.5, 0.8], "steps": [2],
             "size": [64], "guidance": [2, 4], "seed": range(5)}  # fmt: skip
    assert len(list(run.latents(models, given, batch=2))) == 80
    assert encoded == {"text": 2, "vae": 2}


# ------------------------------------------------------------------------------------------------------- continuing

GRID = ["a tiger", "--layout", LAYOUT, "--nu", "0.5,0.8", "--k-min", "0,0.4", "--seeds", "0..2", *FAST]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("whole") / "grid"
    assert sweep(*GRID, "-o", folder) == 0
    return folder


def picture_bytes(folder):
    return {path.name: path.read_bytes() for path in (folder / "pictures").iterdir()}


def test_a_half_done_folder_is_continued(whole, tmp_path, monkeypatch):
    """Cells that are there are not touched; those that are not are made with the batches that they would have had."""
    folder = tmp_path / "grid"
    calls = []
    original = run.advance
    monkeypatch.setattr(run, "advance", lambda denoise, tracks, report: original(denoise, tracks, calls.append))
    lines = index(whole)
    assert sweep(*GRID, "-o", folder) == 0
    assert picture_bytes(folder) == picture_bytes(whole) and index(folder) == lines
    first, calls[:] = sum(calls), []
    part = folder / "parts" / "0.jsonl"
    rows = part.read_text().splitlines(keepends=True)
    part.write_text("".join(rows[:7]) + rows[7][:20])  # a kill in the middle of a line
    made = json.loads(rows[2])["cell"]
    gone = folder / lines[made]["picture"]
    gone.unlink()
    (folder / "pictures" / ".magicmix-0.tmp").write_bytes(b"half")
    kept = {json.loads(row)["cell"] for row in rows[:7]} - {made}
    times = {n: (folder / lines[n]["picture"]).stat().st_mtime_ns for n in kept}
    assert sweep(*GRID, "-o", folder) == 0
    assert picture_bytes(folder) == picture_bytes(whole) and index(folder) == lines
    assert times == {n: (folder / lines[n]["picture"]).stat().st_mtime_ns for n in kept}
    assert 0 < sum(calls) < first, "what is there is not made again"
    part.write_bytes(part.read_bytes()[:-30])  # the line after it is not lost with it
    assert sweep(*GRID, "-o", folder) == 0 and index(folder) == lines
    calls.clear()
    assert sweep(*GRID, "-o", folder) == 0 and not calls


def in_a_process(arguments, folder):
    os.chdir(ROOT)
    machine.begin()
    os.dup2(os.open(folder.with_suffix(".err"), os.O_WRONLY | os.O_CREAT), 2)
    os._exit(main([*map(str, arguments), "-o", str(folder)]))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_killed_sweep_is_continued(number, code, whole, tmp_path):
    """At most the cells in flight are lost: the seeds of one cell."""
    folder = tmp_path / "grid"
    process = forks().Process(target=in_a_process, args=(GRID, folder))
    process.start()
    limit = time.monotonic() + 120
    while len(list(folder.glob("pictures/*.png"))) < 4:
        assert process.is_alive() and time.monotonic() < limit
        time.sleep(0.002)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    there, bytes_of = picture_bytes(folder), picture_bytes(whole)
    there = {name: data for name, data in there.items() if name.endswith(".png")}
    assert 4 <= len(there) < 12 and all(bytes_of[name] == data for name, data in there.items())
    lines = (folder / "parts" / "0.jsonl").read_text().splitlines()
    assert len(there) - 1 <= len(lines) <= len(there)
    assert not (folder / "index.jsonl").exists()
    assert sweep(*GRID, "-o", folder) == 0
    assert picture_bytes(folder) == bytes_of and index(folder) == index(whole)


# ------------------------------------------------------------------------------------------------------ what is told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a tiger", "--layout", "missing.png"], "layout 'missing.png' does not exist; give a picture file"),
        (["a tiger", "--layout", ROOT / "README.md"], "is not a readable picture"),
        (["a tiger", "--layout", LAYOUT, "--nu", "2"], "nu 2.0 is out of range; use 0 to 1"),
        (["a tiger", "--layout", LAYOUT, "--seeds", "0..9999", "--nu", "0..1/0.001"], "the grid has 10,010,000 cells"),
        (["a tiger"], "give one of --layout IMAGE... and --layout-prompt TEXT..."),
        (["a tiger", "--layout", LAYOUT, "-o", "here"], "output 'here' holds other files and no sweep"),
        (["a tiger", "--layout", LAYOUT, "-o", "here/file"], "output 'here/file' is not a folder"),
        (["a tiger", "--layout", LAYOUT, "-o", "no/where"], "output folder 'no' does not exist"),
        (["a tiger", "--layout", LAYOUT, "--batch", "0"], "batch 0 is out of range"),
        (["a tiger", "--layout", LAYOUT, "--device", "none"], "device 'none' cannot be used"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").write_text("mine")
    before = contents(tmp_path / "here")
    assert main([*map(str, arguments), *(["-o", "new"] if "-o" not in arguments else []), "--steps", "3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lab.sweep: ") and error.count("\n") == 1 and message in error
    assert contents(tmp_path / "here") == before


def test_a_folder_of_another_sweep_is_refused(whole, tmp_path, capsys):
    before = contents(whole)
    for other, name in ((["--nu", "0.6"], "nu"), (["--guidance", "2"], "guidance"), (["--seeds", "7"], "seed")):
        assert main([*map(str, GRID), *other, "-o", str(whole)]) == 2
        error = capsys.readouterr().err
        assert f"holds another sweep ({name} differs); give a new name" in error and error.count("\n") == 1
    assert contents(whole) == before
    layout = tmp_path / "layout.png"
    Image.open(LAYOUT).save(layout)
    given = ["a tiger", "--layout", layout, *FAST, "--k-min", "0.2", "-o", tmp_path / "grid"]
    assert sweep(*given) == 0
    Image.open(CAR).save(layout)
    assert sweep(*given) == 2
    assert "was begun with another" in capsys.readouterr().err
    (tmp_path / "grid" / "sweep.json").write_text("{}")
    assert sweep(*given) == 2
    assert "has no sweep.json that can be read" in capsys.readouterr().err


def test_a_folder_is_written_by_one_sweep_at_a_time(whole, capsys):
    lock = (whole / ".lock").open("a")
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert sweep(*GRID, "-o", whole) == 2
    assert "is being written by another sweep" in capsys.readouterr().err
    lock.close()


def test_another_checkpoint_under_the_same_name_is_refused(tmp_path, folder, capsys):
    given = ["a tiger", "--layout", LAYOUT, *FAST, "--k-min", "0.2", "--weights", folder, "-o", tmp_path / "grid"]
    assert sweep(*given) == 0
    change_tensors(folder, "vae", lambda state: state.update({"post_quant_conv.bias": torch.ones(4)}))
    assert sweep(*given) == 2
    assert "was begun with another checkpoint, other defaults or another dtype" in capsys.readouterr().err


def test_a_changed_checkpoint_among_several_is_refused(tmp_path, folder, capsys):
    given = ["a tiger", "--layout", LAYOUT, *FAST, "--k-min", "0.2", "--weights", folder, weights.TINY]
    given += ["-o", tmp_path / "grid"]
    assert sweep(*given) == 0
    before = index(tmp_path / "grid")
    change_tensors(folder, "vae", lambda state: state.update({"post_quant_conv.bias": torch.ones(4)}))
    assert sweep(*given) == 2
    assert "was begun with another checkpoint" in capsys.readouterr().err and index(tmp_path / "grid") == before


def test_other_defaults_are_another_checkpoint_where_they_count(tmp_path, folder, capsys):
    """nu of magicmix.json, which one sweep takes and the other has itself; and another dtype."""
    given = ["a tiger", "--layout", LAYOUT, *FAST, "--k-min", "0.2", "--weights", folder]
    own, own_nu = [*given, "-o", tmp_path / "own"], [*given, "--nu", "0.7", "-o", tmp_path / "own-nu"]
    assert sweep(*own) == sweep(*own_nu) == 0
    text = (folder / "magicmix.json").read_text()
    (folder / "magicmix.json").write_text(text.replace('"nu": 0.7', '"nu": 0.6'))
    capsys.readouterr()
    assert sweep(*own) == 2 and "other defaults" in capsys.readouterr().err
    assert sweep(*own_nu) == 0
    (folder / "magicmix.json").write_text(text)
    assert sweep(*own) == 0
    load = weights.load
    with pytest.MonkeyPatch.context() as patch:  # as a GPU chooses another dtype than the CPU before
        patch.setattr(weights, "load", lambda source, **given: load(source, **given | {"dtype": torch.bfloat16}))
        assert sweep(*own) == 2 and "another dtype" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_loaded_fails_alone(tmp_path, capsys):
    """Its cells are listed with the reason; those of the other are made, and the page is there. Alone it ends all."""
    given = ["a tiger", "--layout", LAYOUT, *FAST, "--k-min", "0.2", "--nu", "0.5,0.8"]
    assert sweep(*given, "--weights", "nowhere", weights.TINY, "-o", tmp_path / "grid") == 1
    lines = index(tmp_path / "grid")
    assert [line["status"] for line in lines] == ["failed", "failed", "made", "made"]
    assert "nowhere" in lines[0]["reason"] and (tmp_path / "grid" / "page.html").is_file()
    assert "cells 0, 1 failed" in capsys.readouterr().err
    assert sweep(*given, "--weights", "nowhere", weights.TINY, "--plan") == 0
    assert sweep(*given, "--weights", "nowhere", "-o", tmp_path / "other") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nowhere" in error


def test_cells_of_a_lane_fail_alone(tmp_path):
    """Rows that a noise file lacks: the rows that it has are made, with the pixels that each has alone."""
    eps = tmp_path / "eps.npy"
    np.save(eps, np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32))
    given = ["a tiger", "--layout", LAYOUT, *FAST, "--k-min", "0.2", "--noise", eps]
    assert sweep(*given, "--noise-row", "0..2", "-o", tmp_path / "grid") == 1
    lines = index(tmp_path / "grid")
    assert [line["status"] for line in lines] == ["made", "made", "failed"] and "row 2" in lines[2]["reason"]
    for row in (0, 1):
        assert sweep(*given, "--noise-row", row, "-o", tmp_path / f"row-{row}") == 0
        (alone,) = index(tmp_path / f"row-{row}")
        one, other = (pixels(folder / line["picture"]) for folder, line in
                      [(tmp_path / "grid", lines[row]), (tmp_path / f"row-{row}", alone)])  # fmt: skip
        assert np.array_equal(one, other) and lines[row]["batch"] == alone["batch"]


def test_pictures_that_cannot_be_decoded_together_are_decoded_alone(whole, tmp_path, monkeypatch):
    """Memory for two pictures, not for three; and a seed whose picture is not finite."""
    from lab.sweep import __main__ as command

    decode, sizes = command.decode, []

    def small(models, x):
        sizes.append(len(x))
        if len(x) > 2:
            raise MemoryError
        return decode(models, x)

    monkeypatch.setattr(command, "decode", small)
    assert sweep(*GRID, "-o", tmp_path / "grid") == 0
    assert {1, 3} <= set(sizes) and len(index(tmp_path / "grid")) == len(index(whole))
    for ours, theirs in zip(index(tmp_path / "grid"), index(whole)):
        a, b = pixels(tmp_path / "grid" / ours["picture"]), pixels(whole / theirs["picture"])
        assert np.abs(a.astype(int) - b).max() <= 1 and ours["batch"] == theirs["batch"]


def test_the_newest_record_counts(tmp_path):
    """Of a cell that was made twice, the later; of one whose picture is gone, the last failure; torn lines not."""
    g = grid.of({"prompt": ["a tiger"], "layout": ["a.png"], "nu": [0.1, 0.2, 0.3, 0.4]})
    this = open_folder(tmp_path / "grid", g, {})
    cells = list(g.cells())
    this.record(1, cell=0, status="made", batch=[[1, 4]])
    this.record(1, cell=1, status="made")
    this.record(0, cell=2, status="failed", reason="first")
    this.record(0, cell=0, status="made", batch=[[1, 1]])
    this.record(0, cell=1, status="failed", reason="later")
    this.record(1, cell=2, status="failed", reason="second")
    this.record(0, cell=99, status="made")
    for number in (0, 2):
        this.picture(cells[number]).touch()
    with (tmp_path / "grid" / "parts" / "2.jsonl").open("w") as file:
        file.write('{"cell": 3, "status": "made"}\n{"cell": 3, "sta')
    found = this.records()
    assert sorted(found) == [0, 1, 2] and found[0]["batch"] == [[1, 1]]
    assert [found[number]["reason"] for number in (1, 2)] == ["later", "second"]


def test_a_draw_that_does_not_fit_on_the_device_is_not_lost():
    draws = run.Draws([plan.Row(seed=3), plan.Row(seed=5)], (4, 4), torch.device("cpu"))
    noise = magicmix.Noise([3, 5], (4, 4), torch.device("cpu"))
    known = [noise() for _ in range(3)]
    draws.device = "nowhere"
    with pytest.raises(RuntimeError):
        draws(1)
    draws.device = "cpu"
    assert torch.equal(draws(1), known[1]) and torch.equal(draws(2), known[2]) and torch.equal(draws(0), known[0])


def test_texts_are_kept_up_to_a_number(monkeypatch):
    monkeypatch.setattr(run, "MOST_TEXTS", 2)
    kept = run.Kept()
    for key in "abc":
        kept[key] = key
    assert dict(kept) == {"b": "b", "c": "c"}


def test_failed_cells_are_listed_and_the_others_made(tmp_path, capsys):
    """A word that one prompt lacks, a K_min above K_max, a size that does not fit: each with its reason."""
    given = ["a tiger", "a panda", "--layout", LAYOUT, "--token-weight", "tiger=0.5", "--size", "32,31", "--k-min",
             "0.2,0.7", "--steps", "5", "--quiet", "-o", tmp_path / "grid"]  # fmt: skip
    assert sweep(*given) == 1
    lines = index(tmp_path / "grid")
    made = [line for line in lines if line["status"] == "made"]
    assert len(lines) == 8 and len(made) == 1 and made[0]["options"]["prompt"] == "a tiger"
    reasons = {line["reason"] for line in lines if line["status"] == "failed"}
    assert len(reasons) == 3 and all(
        any(text in reason for reason in reasons)
        for text in ("'tiger' is not in the prompt", "k_min 0.7 is above k_max 0.6", "size 31x31 does not fit")
    )
    error = capsys.readouterr().err
    assert all(line.startswith("lab.sweep: cell") for line in error.splitlines()) and "failed: " in error
    sheet = pixels(tmp_path / "grid" / "sheets" / "prompt-k-min.png")
    assert (sheet == [143, 42, 34]).all(axis=-1).any(), "a failed cell has a frame and its reason, and is no blank"


def test_where_tracks_fail_together_each_is_tried_alone(models):
    """A UNet that cannot take more than two pictures; one that overflows; one with a mistake, which is no cell's."""
    calls = []

    def answer(x, t, context, s):
        calls.append(len(x) // 2)
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return models.unet(x, t, context, s)

    given = {"prompt": ["a tiger"], "layout": [str(LAYOUT)], "nu": [0.2, 0.5, 0.8], "steps": [4], "size": [32],
             "k_min": [0.25]}  # fmt: skip
    small = with_unet(models, answer)
    lanes, _ = plan.lanes(grid.of(given).cells(), models.defaults, 8)
    ends = list(run.Walk(small, run.Batch(8, True)).run(lanes))
    assert [type(end) for end in ends] == [run.Done] * 3 and max(calls) == 3 and calls.count(3) == 1
    broken = with_unet(models, lambda x, *_: x * float("nan"))
    broken.unet.state_dict = dict
    (end, *_) = run.Walk(broken, run.Batch(8, True)).run(lanes)
    assert isinstance(end, run.Failed) and "hold NaN or Inf" in end.reason
    wrong = with_unet(models, lambda x, *_: (_ for _ in ()).throw(RuntimeError("a mistake in the code")))
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        list(run.Walk(wrong, run.Batch(8, True)).run(lanes))


def test_the_plan_is_told_first(tmp_path, capsys):
    arguments = [str(a) for a in GRID if a != "--quiet"] + ["-o", str(tmp_path / "grid")]
    assert main(arguments) == 0
    out, error = capsys.readouterr()
    assert out.splitlines()[0] == "2 x 2 cells, 3 seeds: 27 UNet calls instead of 48"
    assert out.splitlines()[1] == "up to 3 pictures in one call, the seeds of a cell"
    assert out.splitlines()[-1].endswith("page.html") and "27/27" in error
    (tmp_path / "grid" / "parts" / "0.jsonl").write_text("")
    assert main([*arguments, "--batch", "6"]) == 0
    out, _ = capsys.readouterr()
    assert "0 of 12 pictures are there" not in out.splitlines()[0]
    assert "up to 6 pictures in one call, of any cells" in out
    assert main(arguments) == 0
    out, _ = capsys.readouterr()
    assert "12 of 12 pictures are there; 0 UNet calls are left" in out


def test_a_plan_alone_writes_nothing(tmp_path, capsys):
    arguments = [str(a) for a in GRID if a != "--quiet"]
    assert main([*arguments, "--plan", "-o", str(tmp_path / "grid")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "2 x 2 cells, 3 seeds: 27 UNet calls instead of 48"
    assert list(tmp_path.iterdir()) == []


PAGE = (ROOT / "docs" / "sweep.md").read_text()


def test_the_pages_commands_are_read():
    blocks = re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line.partition("-m lab.sweep")[2]) for line in blocks[0].splitlines()]
    assert [len(grid.of(without_run(grid.parse(line, "", {})))) for line in lines] == [5 * 4 * 4, 2 * 2 * 2, 9]


def without_run(given):
    return {name: value for name, value in given.items() if name != "output"}


def test_the_pages_python_runs(models, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(weights, "load", lambda: models)
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(code.replace("[10]", "[2]"), {})
    assert capsys.readouterr().out.splitlines()[0] == "0 0.5 torch.Size([4, 16, 16])"


# ------------------------------------------------------------------------------------------- what other programs read


def test_what_galleries_and_editors_read(tmp_path, monkeypatch):
    """The A1111 text by the rules of its own reader, and the XMP packet as XML."""
    monkeypatch.chdir(ROOT)
    sources = {"--layout": (LAYOUT, "compositeWithTrainedAlgorithmicMedia"),
               "--layout-prompt": ("a car: red, fast", "trainedAlgorithmicMedia")}  # fmt: skip
    for option, (layout, kind) in sources.items():
        folder = tmp_path / option
        typed = ["a tiger, é", option, layout, *FAST, "--k-min", "0.2", "--negative", "a dog", "--seed", "5"]
        assert sweep(*typed, "-o", folder) == 0
        (line,) = index(folder)
        info = Image.open(folder / line["picture"]).info
        assert json.loads(info["magicmix"])["parameters"]["prompt"] == "a tiger, é"
        *prompt, last = info["parameters"].split("\n")
        assert prompt == ["a tiger, é", "Negative prompt: a dog"]
        pair = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # as the A1111 web UI has it
        fields = {name: json.loads(value) if value.startswith('"') else value for name, value in pair.findall(last)}
        assert {n: fields[n] for n in ("Steps", "Sampler", "CFG scale", "Seed", "Size", "MagicMix k_min")} == {
            "Steps": "6", "Sampler": "DDIM", "CFG scale": "4.0", "Seed": "5", "Size": "32x32", "MagicMix k_min": "0.2",
        }  # fmt: skip
        if option == "--layout-prompt":
            assert fields["MagicMix layout prompt"] == "a car: red, fast"
        packet = ElementTree.fromstring(info["XML:com.adobe.xmp"].split("?>", 1)[1].rsplit("<?xpacket", 1)[0])
        (described,) = packet.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
        source = described.attrib["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"]
        assert source == f"http://cv.iptc.org/newscodes/digitalsourcetype/{kind}"


def test_contact_sheets(tmp_path):
    """One per pair of axes, the outer one down, all others at their first value; and one for a single axis."""
    assert sweep(*GRID, "-o", tmp_path / "grid") == 0
    names = sorted(path.name for path in (tmp_path / "grid" / "sheets").iterdir())
    assert names == ["k-min-nu.png", "k-min-seed.png", "nu-seed.png"]
    lines = index(tmp_path / "grid")
    sheet = Image.open(tmp_path / "grid" / "sheets" / "k-min-seed.png")
    assert sheet.size == (4 + 3 * 36, 4 + 2 * 54)
    for row, k_min in enumerate((0.0, 0.4)):
        for seed in range(3):
            (line,) = [x for x in lines if x["options"] | {"k_min": k_min, "nu": 0.5, "seed": seed} == x["options"]]
            place = (4 + 36 * seed, 4 + 54 * row)
            shown = sheet.crop((*place, place[0] + 32, place[1] + 32))
            assert np.array_equal(np.asarray(shown), pixels(tmp_path / "grid" / line["picture"]))
    assert sweep("a tiger", "--layout", LAYOUT, *FAST, "--nu", "0.5,0.8", "--k-min", "0.2", "-o", tmp_path / "one") == 0
    assert [path.name for path in (tmp_path / "one" / "sheets").iterdir()] == ["nu.png"]


def test_sheets_of_any_words_and_numbers(tmp_path):
    """Words of token weights may be no names of files; 700 values of one axis lie in a square; a large table is made
    small."""
    pairs = [("s and/or", "nu"), ("s red fox", "nu"), ("s red-fox", "nu"), ("s " + "a" * 300, "k_min"), ("s ../x",)]
    names = list(show.sheet_names(pairs).values())
    assert names[:3] == ["s-and-or-nu", "s-red-fox-nu", "s-red-fox-nu-2"] and len(set(names)) == 5
    assert all(len(name) < 100 and "/" not in name for name in names)
    g = grid.of({"prompt": ["a tiger"], "layout": ["a.png"], "seed": range(700)})
    folder = open_folder(tmp_path / "grid", g, {})
    assert show.write_sheets(folder, show.entries(folder, {})) == []
    across = 4 + 256
    assert Image.open(tmp_path / "grid" / "sheets" / "seed.png").size == (4 + 27 * across, 4 + 26 * (across + 18))
