"""The grid: any option of magicmix.py that a picture depends on, with one value or many. A cell is one full set.

Numbers are written as lists of values and ranges, 0.5,0.6..0.9. A range a..b/step is a, a + step, ... up to b, which is
in it where a whole number of steps leads there. a..b counts in units of the last decimal place that is written in a or
b: 0.6..0.9 is 0.6, 0.7, 0.8, 0.9, and 0..7 is eight numbers. Ranges are decimal, so 0..0.3/0.05 holds 0.15 itself.
"""

import argparse
import decimal
import itertools
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial

from command import options
from command.machine import shown, version_lines
from command.options import FACTS, MIXING, PICTURE, Choice, Flag, Kind, Number, Place, Text, TokenWeights

MOST = 100_000  # cells of a grid, and values of a range
RANGE = re.compile(r"([^/]+?)\.\.([^/]+)(?:/(.+))?")
WORD = "s "  # an axis of one word's token weight is called "s WORD"

BATCH = Number(1, 1000, whole=True)  # pictures in one UNet call
SINGLE = ("device", "quiet", "debug")  # options of magicmix.py's run that a sweep has too, with one value
NOISE = ("noise", "noise_row", "seed")  # what a picture's noise comes from: the innermost axes
LOADING = ("weights", "unet", "vae", "no_ema", "prediction", "upcast_attention", "dtype", "vae_dtype")  # the outermost
INSTEAD = {
    "count": "give --seeds, such as --seeds 0..7",
    "sheet": "a sweep always writes contact sheets",
    "keep_noise": "eps follows from the seed; magicmix.py writes it",
    "concepts": "ask magicmix.py for them",
    "again": "the options of a sweep stand in its sweep.json",
}


# ------------------------------------------------------------------------------------------------- values and ranges


def numbers(kind: Number, text: str) -> list[float]:
    """A list of values and ranges -> the values. Raises ArgumentTypeError."""
    found = []
    for part in text.split(","):
        ends = RANGE.fullmatch(part)
        found += span(kind, part, *ends.groups()) if ends else [kind.parse(part)]
    return found


def span(kind: Number, text: str, first: str, last: str, step: str | None) -> list[float]:
    """The values of a range. Raises ArgumentTypeError for one that is empty, endless or too long."""
    for end in (first, last):
        try:
            kind.check(kind.parse(end))  # also keeps the numbers short enough for what follows
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    a, b = Decimal(first), Decimal(last)
    if step is None:
        by = Decimal(1).scaleb(max(-MOST, min(0, a.as_tuple().exponent, b.as_tuple().exponent)))  # -MOST is too small
    else:
        kind.parse(step)
        by = Decimal(step)
    if not by.is_finite() or by <= 0:
        raise argparse.ArgumentTypeError(f"range {shown(text)} has the step {step}; use one above 0")
    if a > b:
        raise argparse.ArgumentTypeError(f"range {shown(text)} is empty; ranges count upwards, from {last} to {first}")
    try:
        steps = (b - a) / by
    except decimal.DecimalException:
        steps = MOST
    if steps >= MOST:
        raise argparse.ArgumentTypeError(f"range {shown(text)} has more than {MOST:,} values; use a larger step")
    return [kind.parse(str(a + i * by)) for i in range(int(steps) + 1)]


def listed(kind: Kind, text: str) -> list:
    """A list of values of any other kind."""
    return [kind.parse(part) for part in text.split(",")]


def weighted(kind: TokenWeights, text: str) -> list[tuple[str, list[float]]]:
    """WORD=S, where S may be many -> the word and its values."""
    word, _, values = text.rpartition("=")
    word, _ = kind.parse(f"{word}=0")  # names what is wrong with the word
    return [(word, numbers(kind.number, values))]


def reader(kind: Kind):
    """The command line's text -> a list of values, for an option of that kind."""
    if isinstance(kind, Number):
        return partial(numbers, kind)
    return partial(weighted if isinstance(kind, TokenWeights) else listed, kind)


# ------------------------------------------------------------------------------------------------------- the command


class Refuse(argparse.Action):
    """An option of magicmix.py that a sweep does not have."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string} is not for a sweep; {INSTEAD[self.dest]}")


def parse(argv: Sequence[str], description: str, embedded: dict) -> dict:
    """The options that were given, by name: a list of values for each that a picture depends on, one value for the
    others. Ends the process with exit code 2 and one line for what cannot be parsed.

    Args:
        argv: without the program's name; a first "--", which torchrun needs before these options, is passed over.
        description: of the command, for --help.
        embedded: the embedded checkpoint's own defaults, for --help.
    """
    parser = options.Parser(
        "lab.sweep",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--version", action=options.ShowVersions, nargs=0, const=version_lines, help="show the versions and end"
    )
    folder = "the folder to write, or to continue where it lies half done [sweep]"
    parser.add_argument("-o", "--output", metavar="FOLDER", help=folder)
    many = "pictures in one UNet call, at most [as many seeds as fit, up to 8; on a GPU up to 64 of all cells]"
    parser.add_argument("--batch", type=BATCH.parse, metavar="N", help=many)
    parser.add_argument("--plan", action="store_true", help="tell how many UNet calls it takes, and make nothing")
    for name, facts in FACTS.items():
        kind, text = facts["kind"], facts["help"] + options.default_text(name, embedded)
        flags = options.flags(name) + (("--seeds",) if name == "seed" else ())
        if name in INSTEAD:
            nargs = 0 if isinstance(kind, Flag) else 1
            parser.add_argument(*flags, dest=name, action=Refuse, nargs=nargs, help=argparse.SUPPRESS)
        elif isinstance(kind, Flag):
            as_value = dict(const=True) if name in SINGLE else dict(const=[True])
            parser.add_argument(*flags, dest=name, action="store_const", help=text, **as_value)
        elif name in SINGLE:
            parser.add_argument(*flags, dest=name, type=kind.parse, metavar=facts["metavar"], help=text)
        elif name == "prompt":
            parser.add_argument(name, nargs="*", action="extend", help=f"{text}; one or more, before the options")
        elif isinstance(kind, Text | Place) and name != "output":
            parser.add_argument(
                *flags, dest=name, nargs="+", action="extend", metavar=facts["metavar"], help=f"{text}; one or more"
            )
        elif name != "output":
            values = "|".join(kind.values) if isinstance(kind, Choice) else facts["metavar"]
            parser.add_argument(*flags, dest=name, type=reader(kind), action="extend", metavar=values, help=text)
    argv = argv[1:] if list(argv[:1]) == ["--"] else argv
    given = vars(parser.parse_args(argv))
    return {name: value for name, value in given.items() if value != []}


# ---------------------------------------------------------------------------------------------------------- the grid


@dataclass(frozen=True, eq=False)
class Cell:
    """One full set of options.

    Attributes:
        number: its place in the grid, from 0.
        values: axis -> the cell's value, of every axis.
    """

    number: int
    values: dict

    @property
    def given(self) -> dict:
        """The options as they would be given to magicmix.py, by name."""
        weights = {axis.removeprefix(WORD): s for axis, s in self.values.items() if axis.startswith(WORD)}
        given = {name: value for name, value in self.values.items() if not name.startswith(WORD)}
        return given | ({"token_weights": weights} if weights else {})

    def command(self, output: str) -> str:
        """The command that makes this cell's picture alone."""
        typed, prompt = [], self.given.get("prompt", "")
        for name, value in self.given.items():
            flag, kind = options.flags(name)[0], FACTS[name]["kind"]
            if isinstance(kind, Flag):
                typed += [flag] * value
            elif isinstance(kind, TokenWeights):
                typed += [f"{flag}={word}={written(s)}" for word, s in value.items()]
            elif name != "prompt":
                text = written(value)
                typed += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
        typed += ["-o", output]
        typed = [*typed, "--", prompt] if prompt.startswith("-") else [prompt, *typed]
        return shlex.join(["python", "magicmix.py", *typed])


def written(value: object) -> str:
    """A value as it is typed."""
    if isinstance(value, list | tuple):  # a size, (height, width)
        return f"{value[1]}x{value[0]}"
    return str(value)


@dataclass(frozen=True)
class Grid:
    """Axes, the outermost first, each with its values: an option's name, or "s WORD" for a word's token weight."""

    axes: dict[str, list]

    @property
    def varied(self) -> dict[str, list]:
        """The axes that have more than one value."""
        return {axis: values for axis, values in self.axes.items() if len(values) > 1}

    def __len__(self) -> int:
        return math.prod(map(len, self.axes.values()))

    def cells(self) -> Iterator[Cell]:
        for number, values in enumerate(itertools.product(*self.axes.values())):
            yield Cell(number, dict(zip(self.axes, values)))

    def shape(self) -> str:
        """The grid in words: "9 x 9 cells, 8 seeds"."""
        sides = [f"{len(values):,}" for axis, values in self.varied.items() if axis != "seed"] or ["1"]
        seeds = len(self.axes["seed"])
        cells = " x ".join(sides) + (" cell" if sides == ["1"] else " cells")
        return f"{cells}, {seeds:,} seed{'s' * (seeds > 1)}"


def of(given: dict) -> Grid:
    """The grid of options with many values each, as `parse` returns them or as Python writes them:
    {"prompt": ["a tiger"], "layout": ["castle.png"], "nu": [0.5, 0.7], "seed": range(8)}. Token weights are
    [(word, values), ...]. Values that stand there twice count once.

    Raises ValueError for an unknown option, a value that cannot be right, no values, or more than MOST cells.
    """
    known, axes = options.names(MIXING, PICTURE), {}
    if unknown := sorted(given.keys() - set(known)):
        raise ValueError(f"{unknown[0]} is no option of a grid; use {', '.join(known)}")
    for name in sorted(given, key=depth):
        for axis, values in given[name] if name == "token_weights" else [(name, given[name])]:
            axis, values = (WORD + axis if name == "token_weights" else axis), list(values)
            if name == "size":
                values = [tuple(value) if isinstance(value, list | tuple) else value for value in values]
            if not values:
                raise ValueError(f"{name} has no value; give one or more")
            axes[axis] = list(dict.fromkeys(axes.get(axis, []) + values))
    axes |= {"seed": axes.pop("seed", [0])}
    grid = Grid(axes)
    if len(grid) > MOST:
        raise ValueError(f"the grid has {len(grid):,} cells; use at most {MOST:,}")
    if "prompt" not in axes:
        raise ValueError("the content prompt is missing; give one or more as the first arguments")
    if ("layout" in axes) == ("layout_prompt" in axes):
        raise ValueError("give one of --layout IMAGE... and --layout-prompt TEXT...")
    if "-" in map(str, axes.get("layout", [])):
        raise ValueError("layout '-' is standard input, which cannot be read twice; give a file")
    for axis, values in axes.items():
        for value in values:
            options.check(
                {"token_weights": {axis.removeprefix(WORD): value}} if axis.startswith(WORD) else {axis: value}
            )
    return grid


def depth(name: str) -> tuple:
    """Where an axis stands, the outermost first: what is costly to change, and last what batches are made of."""
    order = [*LOADING, "layout", "layout_prompt", "prompt", "size", "steps"]
    if name in order:
        return 0, order.index(name)
    if name in NOISE:
        return 2, NOISE.index(name)
    return 1, list(FACTS).index(name)
