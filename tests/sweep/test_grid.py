"""The grid: what the command line means, the cells, and what is refused."""

import argparse
import shlex

import numpy as np
import pytest
from conftest import LAYOUT
from hypothesis import given
from hypothesis import strategies as st

from command import options
from lab.sweep import grid

NU = options.FACTS["nu"]["kind"]
SEED = options.FACTS["seed"]["kind"]
WEIGHTS = options.FACTS["token_weights"]["kind"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.5", [0.5]),
        ("0.5,0.6..0.9", [0.5, 0.6, 0.7, 0.8, 0.9]),
        ("0..0.3/0.05", [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]),
        ("0..0.3/0.2", [0.0, 0.2]),  # b is in it only where the steps lead there
        ("0.15..0.2", [0.15, 0.16, 0.17, 0.18, 0.19, 0.2]),  # the last place of either
        ("0.1..0.12", [0.1, 0.11, 0.12]),
        ("0..1", [0.0, 1.0]),
        ("0.5..0.5", [0.5]),
        ("1e-1..3e-1", [0.1, 0.2, 0.3]),
    ],
)
def test_ranges(text, values):
    assert grid.numbers(NU, text) == values


def test_ranges_of_whole_numbers():
    assert grid.numbers(SEED, "0..7") == list(range(8))
    assert grid.numbers(SEED, "3,10..30/10,3") == [3, 10, 20, 30, 3]
    assert grid.numbers(SEED, f"{2**64 - 2}..{2**64 - 1}") == [2**64 - 2, 2**64 - 1]
    assert all(type(value) is int for value in grid.numbers(SEED, "0..7"))


@given(st.integers(0, 1000), st.integers(1, 50), st.integers(0, 300))
def test_a_range_is_what_numpy_counts(first, step, steps):
    """In thousandths: an independent way of counting, and each value is the decimal that one would type."""
    last = first + step * steps
    text = f"{first / 1000}..{last / 1000}/{step / 1000}"
    kind = options.Number(0, 1000)
    assert grid.numbers(kind, text) == [float(f"{i / 1000:.3f}") for i in np.arange(first, last + 1, step)]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (NU, "0.9..0.5", "range '0.9..0.5' is empty; ranges count upwards, from 0.5 to 0.9"),
        (NU, "0..1/0", "has the step 0; use one above 0"),
        (NU, "0..1/-0.5", "has the step -0.5; use one above 0"),
        (NU, "0..1/1e-9", "has more than 100,000 values; use a larger step"),
        (NU, "0e-9999999..0.5", "has more than 100,000 values; use a larger step"),
        (NU, "0..1/nan", "has the step nan"),
        (NU, "0..1/1e-999999", "more than 100,000 values"),
        (NU, "0..2", "2.0 is out of range; use 0 to 1"),
        (NU, "0..x", "'x' is no number"),
        (NU, "0.5,", "'' is no number"),
        (NU, "..", "'..' is no number"),
        (SEED, "0..7/0.5", "'0.5' is no whole number"),
        (SEED, "0..99999999", "more than 100,000 values"),
    ],
)
def test_ranges_that_are_refused(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        grid.numbers(kind, text)
    assert message in str(error.value)


def test_every_option_of_a_picture_can_have_many_values():
    """All that magicmix.py has is in the grid, or has one value, or is refused with what to do instead."""
    typed = {
        "prompt": ["a tiger", "a cat, asleep"], "layout": ["a.png", "b.png"], "layout_prompt": None,
        "k_max": "0.5..0.6", "k_min": "0,0.1", "nu": "0..1/0.5", "token_weights": "tiger=0.5,1..2", "steps": "5,10",
        "guidance": "4", "negative": ["a dog", ""], "sampler": "ddim,ddpm", "eta": "0,1", "size": "64,96x64",
        "seed": "0..7", "noise": ["n.npy"], "noise_row": "0..1", "weights": ["w1", "w2"], "unet": ["u"], "vae": ["v"],
        "no_ema": True, "prediction": "auto,v", "upcast_attention": "on,off", "dtype": "fp32,bf16",
        "vae_dtype": "fp32,bf16", "device": "cpu", "quiet": True, "debug": True, "output": "folder",
    }  # fmt: skip
    assert set(typed) | set(grid.INSTEAD) == set(options.FACTS)
    argv = list(typed["prompt"])
    for name, value in typed.items():
        if name != "prompt" and value is not None:
            argv += [options.flags(name)[0], *([] if value is True else value if isinstance(value, list) else [value])]
    given = grid.parse(argv, "", {})
    single = {name: given.pop(name) for name in ("device", "quiet", "debug", "output")}
    assert single == {"device": "cpu", "quiet": True, "debug": True, "output": "folder"}
    axes = grid.of(given | {name: given[name][:1] for name in grid.LOADING}).axes
    assert axes["size"] == [(64, 64), (64, 96)] and axes["s tiger"] == [0.5, 1.0, 2.0] and axes["no_ema"] == [True]
    assert axes["sampler"] == ["ddim", "ddpm"] and axes["negative"] == ["a dog", ""] and axes["nu"] == [0.0, 0.5, 1.0]
    assert list(axes)[:2] == ["weights", "unet"] and list(axes)[-3:] == ["noise", "noise_row", "seed"]


def test_cells_and_their_commands():
    """magicmix.py's own parser reads each command as the cell's options."""
    given = {
        "prompt": ["a tiger's \"eye\"", "-x"], "layout": [str(LAYOUT)], "nu": [0.5, 0.7], "size": [(64, 96)],
        "token_weights": [("red", [-1.5]), ("x", [0.5, 1.0])], "negative": ["--no"], "no_ema": [True], "seed": range(2),
    }  # fmt: skip
    g = grid.of(given)
    cells = list(g.cells())
    assert len(cells) == len(g) == 16 and [cell.number for cell in cells] == list(range(16))
    assert g.shape() == "2 x 2 x 2 cells, 2 seeds"
    assert [cell.values["seed"] for cell in cells] == [0, 1] * 8, "seeds are innermost"
    for cell in cells:
        program, script, *typed = shlex.split(cell.command("out.png"))
        assert (program, script) == ("python", "magicmix.py")
        assert options.parse(typed, "", {}) == cell.given | {"output": "out.png"}
    assert cells[0].given["token_weights"] == {"red": -1.5, "x": 0.5}


def test_values_that_stand_there_twice_count_once():
    given = grid.parse(["a", "a", "--layout", "x", "--nu", "0.5,0.5..0.7", "--seeds", "1", "--seed", "1..2"], "", {})
    assert grid.of(given).axes == {"layout": ["x"], "prompt": ["a"], "nu": [0.5, 0.6, 0.7], "seed": [1, 2]}


GOOD = {"prompt": ["a"], "layout": ["x.png"]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layout": ["x.png"]}, "the content prompt is missing"),
        ({"prompt": ["a"]}, "give one of --layout"),
        (GOOD | {"layout_prompt": ["b"]}, "give one of --layout"),
        (GOOD | {"layout": ["-"]}, "cannot be read twice"),
        (GOOD | {"seed": range(1000), "nu": [i / 9999 for i in range(10_000)]}, "has 10,000,000 cells; use at most"),
        (GOOD | {"nu": [0.5, 1.5]}, "nu 1.5 is out of range"),
        (GOOD | {"nu": []}, "nu has no value"),
        (GOOD | {"count": [3]}, "count is no option of a grid"),
        (GOOD | {"sampler": ["dpm"]}, "'dpm' is not known"),
        (GOOD | {"token_weights": [("a", [1e39])]}, "is out of range"),
    ],
)
def test_grids_that_are_refused(given, message):
    with pytest.raises(ValueError) as error:
        grid.of(given)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--count", "3"], "--count is not for a sweep; give --seeds, such as --seeds 0..7"),
        (["--sheet"], "--sheet is not for a sweep"),
        (["--again", "x.png"], "--again is not for a sweep"),
        (["--nu", "0.9..0.5"], "argument --nu: range '0.9..0.5' is empty"),
        (["--batch", "x"], "argument --batch: 'x' is no whole number"),
        (["--token-weight", "=2"], "must be WORD=S"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_options_that_are_refused(typed, message, capsys):
    with pytest.raises(SystemExit) as ended:
        grid.parse(["a", "--layout", "x", *typed], "", {})
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("lab.sweep: ") and error.count("\n") == 1 and message in error


def test_torchruns_dashes_are_passed_over():
    assert grid.parse(["--", "a", "--layout", "x"], "", {}) == {"prompt": ["a"], "layout": ["x"]}
