"""What a checkpoint was not trained on is said: words that it does not know, and sizes."""

import json
import random
import re
import sys

import pytest
import torch
from conftest import LAYOUT, ROOT, TINY, refused, run
from PIL import Image

import magicmix
import weights
from lab.training import data, export
from weights import CheckpointError, __main__, concepts

KNOWN = json.loads((TINY / "concepts.json").read_text())
TABLE = [line.split("\t") for line in (ROOT / "lab/training/concepts.tsv").read_text().splitlines()[1:]]
FAST = ("--steps", "8")


def lines_of(error):
    """The command's own lines among what a progress bar leaves on stderr."""
    return re.findall(r"magicmix: [^\r\n]*", error)


def test_the_embedded_list_is_what_it_was_trained_on():
    """As the export writes it, as concepts.tsv has it, and as the captions of the training are worded."""
    assert KNOWN == export.known_words()
    assert KNOWN["concepts"] == [name for name, _, use in TABLE if use == "concept"] and len(KNOWN["concepts"]) == 138
    held_out = [name for name, _, use in TABLE if use == "layout"]
    assert concepts.unknown(KNOWN, held_out) == held_out and "trophy" in held_out
    rng, captions = random.Random(0), set()
    for name in KNOWN["concepts"]:
        for _ in range(40):
            colour, background = rng.choice([None, *data.COLOURS]), rng.choice([None, *data.COLOURS])
            captions.add(data.caption(name, rng.choice(data.STYLES), colour, background, rng))
    assert concepts.unknown(KNOWN, sorted(captions)) == []
    words = {word for caption in captions for word in caption.split()}
    assert words == {word for entries in KNOWN.values() for word in entries}, "nothing is listed that captions lack"


def test_the_readme_says_what_it_can_draw():
    text = " ".join((ROOT / "README.md").read_text().split())
    counts = {name: len(words) for name, words in KNOWN.items()}
    assert (counts["concepts"], counts["colours"], counts["styles"]) == (138, 10, 4)
    assert "one of 138 things, in ten colours and four styles, mostly on white, at 128 x 128 pixels" in text


def test_the_readme_asks_of_it_only_what_it_knows():
    """Every command and call in the README and docs/usage.md, unless it names another checkpoint."""
    lines = "\n".join((ROOT / page).read_text() for page in ("README.md", "docs/usage.md")).splitlines()
    commands = [line for line in lines if re.search(r'magicmix\.py "|magicmix\(models, "', line)]
    assert len(commands) >= 5 and 0 < sum("--weights" in line for line in commands) < len(commands)
    for line in commands:
        prompts = re.findall(r'"([^"-]+)"', line)
        assert bool(concepts.unknown(KNOWN, prompts)) == ("--weights" in line), line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a corgi", ["corgi"]),
        ("a Red TIGER, in the snow! (snow)", ["snow"]),
        ("", []),
        ("the tiger of a 3d picture", []),
        ("虎 🐯 тигр", ["虎", "🐯", "тигр"]),
        ("teddy-bear", []),
        ("a\x1b[31mtiger", ["a\x1b", "31mtiger"]),
    ],
)
def test_unknown_words(text, expected):
    assert concepts.unknown(KNOWN, [text, text]) == expected
    assert concepts.unknown({}, [text]) == [], "without a list nothing is unknown"


def test_a_line_names_unknown_words_and_the_nearest_known_ones(tmp_path):
    mix = ("a tigr", "--layout-prompt", "a zzzz car", "--negative", "a corgi", *FAST)
    code, out, error = run(*mix, cwd=tmp_path)
    line = (
        "magicmix: not among the words that this checkpoint knows: tigr (near: tiger), zzzz, corgi (near: corn); "
        "--concepts lists those, and a public checkpoint knows far more "
        "(--weights SOURCE, in Python weights.load(SOURCE))"
    )
    assert (code, out) == (0, "mix.png\n")
    said = lines_of(error)
    assert [text.rstrip() for text in said] == [line]
    assert run(*mix, "--quiet", "-o", "quiet.png", cwd=tmp_path) == (0, "", "")
    assert (tmp_path / "mix.png").read_bytes() == (tmp_path / "quiet.png").read_bytes()


def test_known_words_and_checkpoints_without_a_list_are_silent(tmp_path, folder):
    assert lines_of(run("a blue tiger", "--layout-prompt", "a 3d car", *FAST, cwd=tmp_path).err) == []
    (folder / "concepts.json").unlink()
    unknown = run("a corgi", "--layout-prompt", "a zebra", "--weights", "checkpoint", *FAST, cwd=tmp_path)
    assert unknown.code == 0 and lines_of(unknown.err) == []


def test_many_unknown_words_make_one_short_line():
    line = concepts.warning(KNOWN, [" ".join(f"word{i}" for i in range(70))])
    assert "word0, word1, word2, word3, word4 and 65 more" in re.sub(r" \(near: [^)]*\)", "", line)


def test_in_python_it_is_a_warning(models, recwarn):
    picture = torch.zeros(1, 3, 128, 128)
    for steps in (
        magicmix.magicmix(models, "a corgi", picture, steps=8),
        magicmix.magicmix(models, "a tiger", "a corgi", steps=8),
        magicmix.magicmix(models, "a tiger", picture, negative="corgi", steps=8),
        magicmix.text_to_image(models, "a corgi", steps=8),
    ):
        with pytest.warns(UserWarning, match="not among the words that this checkpoint knows: corgi"):
            next(steps)
    next(magicmix.magicmix(models, "a tiger", picture, steps=8))
    next(magicmix.text_to_image(models, "a tiger", steps=8))
    assert not recwarn.list


def test_the_list_can_be_shown(tmp_path, folder, capsys, monkeypatch):
    lists = [f"{name:<13}{len(words)}: {', '.join(words)}" for name, words in KNOWN.items()]
    assert run("--concepts", cwd=tmp_path) == (0, "\n".join(lists) + "\n", "")
    monkeypatch.setattr(sys, "argv", ["weights", str(folder)])
    assert __main__.main() == 0 and set(lists) <= set(capsys.readouterr().out.splitlines())
    (folder / "concepts.json").write_text('{"things": ["a \\u001b[31mcorgi"]}')
    assert run("--concepts", "--weights", "checkpoint", cwd=tmp_path).out == "things       1: a \\x1b[31mcorgi\n"
    (folder / "concepts.json").unlink()
    code, out, _ = run("--concepts", "--weights", "checkpoint", cwd=tmp_path)
    assert (code, out) == (0, "checkpoint does not say which words it was trained on\n")


@pytest.mark.parametrize("content", ['{"things": "corgi"}', '{"things": [3]}', '{"things": [""]}', '{"things": null}'])
def test_a_list_that_is_none(content, tmp_path, folder):
    (folder / "concepts.json").write_text(content)
    message = "concepts.json: things must be a list of words"
    refused("a tiger", "--layout-prompt", "a car", "--weights", "checkpoint", cwd=tmp_path, message=message)
    with pytest.raises(CheckpointError, match=message):
        weights.load(folder)


# --------------------------------------------------------------------------------------------------------- sizes


def test_another_size_than_the_checkpoints_is_said(tmp_path, folder):
    line = "magicmix: size 96x64: this checkpoint was trained at 128x128; expect worse pictures"
    for layout in (("--layout", LAYOUT), ("--layout-prompt", "a car")):
        mix = ("a tiger", *layout, *FAST, "--size")
        said = run(*mix, "96x64", cwd=tmp_path)
        assert said.code == 0 and [text.rstrip() for text in lines_of(said.err)] == [line]
        assert run(*mix, "96x64", "--quiet", cwd=tmp_path) == (0, "", "")
        assert lines_of(run(*mix, "128", cwd=tmp_path).err) == []
    (folder / "magicmix.json").write_text('{"size": [64, 96]}')  # the checkpoint's own choice
    mix = ("a tiger", "--layout-prompt", "a car", "--weights", "checkpoint", *FAST)
    assert lines_of(run(*mix, cwd=tmp_path).err) == []
    assert Image.open(tmp_path / "mix.png").size == (96, 64)


def test_another_size_in_python(models):
    for steps in (
        magicmix.magicmix(models, "a tiger", torch.zeros(1, 3, 64, 96), steps=8),
        magicmix.magicmix(models, "a tiger", "a car", size=(64, 96), steps=8),
        magicmix.text_to_image(models, "a tiger", size=(64, 96), steps=8),
    ):
        with pytest.warns(UserWarning, match="size 96x64: this checkpoint was trained at 128x128"):
            next(steps)
