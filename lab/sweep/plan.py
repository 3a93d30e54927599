"""The plan: a tree of steps in which cells that agree up to a step share every UNet call up to it.

What decides a state x_k, besides the checkpoint: the rows of noise, the size and T; the texts, weights and sampling
that the UNet is called with; the layout; K_max; nu while mixing; and K_min only from the step at which mixing stops. So
a path through the tree has five parts:

    Trunk     the rows and the size; a text layout's own trajectory, from T down to the lowest K_min that is needed
    Under     a content prompt, as a Denoiser has it
    Start     a layout and K_max: the one step from x = layout_{K_max}, whose result every nu mixes
    nu        the mixture, from K_max - 1 on; its last step is the one from the lowest K_min that is needed
    K_min     the content alone: the step from x_{K_min} is the mixture's own, so from K_min - 1 down to 0

Samplers that draw noise draw eps first, then a text layout's trajectory, then the content's. There, K_min decides how
many draws came before the content's first, so a Start is shared between equal K_min only. With a picture as layout
nothing comes before them, and all is shared as with DDIM. Options that change no number (nu where nothing is mixed, the
negative prompt at guidance 1, eta of DDPM) part nothing, and fractions that round to the same step are the same.

One step is made more often than it must be: at K_max = T text layouts all begin with eps, whatever their prompt.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from command import options
from command.options import MIXING, Options
from lab.sweep.grid import NOISE, Cell


class Row(NamedTuple):
    """What one picture's noise comes from."""

    seed: int = 0
    noise: str | None = None
    noise_row: int = 0


class Under(NamedTuple):
    """What a Denoiser is made of, besides the checkpoint: calls under equal ones can run in one batch."""

    prompt: str
    words: tuple[tuple[str, float], ...]  # token weights
    negative: str
    guidance: float
    sampler: str
    eta: float
    steps: int


class Trunk(NamedTuple):
    rows: tuple[Row, ...]
    size: tuple[int, int]  # (height, width) in pixels
    steps: int  # T
    along: Under | None  # of a layout prompt; None for pictures


class Start(NamedTuple):
    layout: str  # a picture's path or a prompt
    K_max: int
    drawn: int  # draws of noise between eps and the content's first one


@dataclass(frozen=True, eq=False)
class Lane:
    """Cells that are equal but for their noise and run as one batch.

    Attributes:
        o: their options, with the checkpoint's defaults.
        prompt, layout, is_text: the content, and the layout's picture or prompt.
        rows, cells: one of each per picture.
    """

    o: Options
    prompt: str
    layout: str
    is_text: bool
    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]

    def only(self, row: int) -> "Lane":
        """One of its cells as a lane."""
        return replace(self, rows=(self.rows[row],), cells=(self.cells[row],))

    def under(self, prompt: str, words: dict[str, float] | None) -> Under:
        o = self.o
        negative = "" if o.guidance == 1 else o.negative
        eta = 0.0 if o.sampler == "ddpm" else o.eta
        return Under(prompt, tuple((words or {}).items()), negative, o.guidance, o.sampler, eta, o.steps)

    @cached_property
    def trunk(self) -> Trunk:
        along = self.under(self.layout, None) if self.is_text else None
        return Trunk(self.rows, self.o.size, self.o.steps, along)

    @cached_property
    def content(self) -> Under:
        return self.under(self.prompt, self.o.token_weights)

    @cached_property
    def start(self) -> Start:
        o, draws = self.o, self.content.sampler == "ddpm" or self.content.eta > 0
        return Start(self.layout, o.K_max, o.steps - o.K_min if self.is_text and draws else 0)

    @property
    def nu(self) -> float | None:
        """None where nothing is mixed."""
        return None if self.o.K_min == self.o.K_max else self.o.nu

    @property
    def stretches(self) -> list[tuple[tuple, int, int]]:
        """Its steps: parts of the tree by name, each with the k from which it goes and the k to which this lane needs
        it."""
        o, start = self.o, (self.trunk, self.content, self.start)
        first, mixed = max(0, o.K_max - 1), max(0, o.K_min - 1)  # the step from K_min is the mixture's; none is from 0
        return [
            *([((self.trunk,), o.steps, o.K_min)] if self.is_text else []),
            (start, o.K_max, first),
            ((*start, self.nu), first, mixed),
            ((*start, self.nu, o.K_min), mixed, 0),
        ]

    @property
    def alone(self) -> int:
        """The UNet calls of one of its pictures by magicmix.py."""
        return self.o.K_max + (self.o.steps - self.o.K_min if self.is_text else 0)


class Refused(NamedTuple):
    """A cell that cannot be made, and why."""

    cell: Cell
    reason: str


def lanes(cells: Iterable[Cell], own: dict, batch: int) -> tuple[list[Lane], list[Refused]]:
    """Cells as lanes of up to `batch` rows, in the order in which the tree is walked; and those that cannot be.

    Args:
        cells: of one checkpoint.
        own: the checkpoint's own defaults.
        batch: rows of a lane, at most.
    """
    families: dict[tuple, dict[Row, list[Cell]]] = {}
    for cell in cells:
        key = tuple((axis, value) for axis, value in cell.values.items() if axis not in NOISE)
        row = Row(**{name: cell.values[name] for name in NOISE if name in cell.values})
        families.setdefault(key, {}).setdefault(row, []).append(cell)
    made, refused = [], []
    for family in families.values():
        given = next(iter(family.values()))[0].given
        try:
            o = options.of_mix(own, {name: value for name, value in given.items() if name in options.names(MIXING)})
        except ValueError as error:
            refused += [Refused(cell, str(error)) for same in family.values() for cell in same]
            continue
        is_text = "layout_prompt" in given
        layout = given["layout_prompt" if is_text else "layout"]
        rows = [(row, cell) for row, same in family.items() for cell in same]
        for i in range(0, len(rows), batch):
            part = rows[i : i + batch]
            made.append(Lane(o, given["prompt"], layout, is_text, *map(tuple, zip(*part))))
    return list(leaves(walk(made))), refused


Ends = dict[float | None, dict[int, list[Lane]]]  # nu -> K_min -> lanes that end in the same states
Tree = dict[Trunk, dict[Under, dict[Start, Ends]]]


def walk(lanes: Iterable[Lane]) -> Tree:
    """The tree of lanes."""
    tree: Tree = {}
    for lane in lanes:
        ends = tree.setdefault(lane.trunk, {}).setdefault(lane.content, {}).setdefault(lane.start, {})
        ends.setdefault(lane.nu, {}).setdefault(lane.o.K_min, []).append(lane)
    return tree


def leaves(tree: Tree) -> Iterator[Lane]:
    """The lanes of a tree in order."""
    for contents in tree.values():
        for starts in contents.values():
            for ends in starts.values():
                for at in ends.values():
                    for same in at.values():
                        yield from same


# ------------------------------------------------------------------------------------------------------- its calls


class Count:
    """The steps of lanes, one after another: of each, those that no lane before it has made."""

    def __init__(self):
        self.lowest: dict[object, int] = {}

    def add(self, stretches: Iterable[tuple[object, int, int]]) -> int:
        new = 0
        for name, top, to in stretches:
            before = self.lowest.get(name, top)
            if to < before:
                new += before - to
                self.lowest[name] = to
        return new


def calls(lanes: Iterable[Lane]) -> int:
    """The UNet calls of lanes that share what they can; one call is one step of one picture."""
    count = Count()
    return sum(len(lane.rows) * count.add(lane.stretches) for lane in lanes)


def calls_alone(lanes: Iterable[Lane]) -> int:
    """Those of the same pictures, each made by magicmix.py."""
    return sum(lane.alone * len(lane.rows) for lane in lanes)


def share(lanes: Sequence[Lane], ranks: int) -> list[list[Lane]]:
    """Lanes in the tree's order -> a part for each rank, some of them empty.

    The parts follow each other in the tree, so that neighbours share within one part what they can; what two parts have
    in common at a cut, each makes for itself. Where the cuts lie makes the largest part as small as it can be.
    """
    names: dict[tuple, int] = {}  # numbers, which are compared faster
    steps = [[(names.setdefault(name, len(names)), *ks) for name, *ks in lane.stretches] for lane in lanes]
    jobs = list(zip((len(lane.rows) for lane in lanes), steps))
    low = calls(lanes) // ranks  # no largest part is smaller
    high = (
        low + 1 + 2 * max((lane.alone * len(lane.rows) for lane in lanes), default=0)
    )  # and there is always such a cut
    while low < high:
        limit = (low + high) // 2
        if len(cut(jobs, limit)) <= ranks:
            high = limit
        else:
            low = limit + 1
    begins = cut(jobs, high)
    parts = [list(lanes[begin:end]) for begin, end in zip(begins, [*begins[1:], len(lanes)])]
    return parts + [[] for _ in range(ranks - len(parts))]


def cut(jobs: Sequence[tuple[int, list]], limit: int) -> list[int]:
    """Where parts begin that follow each other, as few as have at most `limit` UNet calls each; a job that has more is
    a part of its own.

    Args:
        jobs: of each lane, its rows and its stretches.
    """
    begins, count, load = [0], Count(), 0
    for i, (rows, stretches) in enumerate(jobs):
        new = rows * count.add(stretches)
        if i > begins[-1] and load + new > limit:
            begins.append(i)
            count, load = Count(), 0
            new = rows * count.add(stretches)
        load += new
    return begins
