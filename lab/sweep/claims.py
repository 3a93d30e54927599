"""The paper's claims as measured curves, on the embedded checkpoint: docs/claims.md says what is measured and how.

    python -m lab.sweep.claims --plan        the UNet calls of each claim and how long they take; runs nothing else
    python -m lab.sweep.claims               makes what is missing on all cores, then tables and plots
    python -m lab.sweep.claims --only 2,3    of these claims only
    python -m lab.sweep.claims --plots       tables and plots again, from the numbers that are there

The numbers are kept in docs/claims/scores.jsonl.gz after each case, so whatever ends a run, the next one goes on, on
another machine as well. --small is a run of a minute, to see that everything works; it needs a --page of its own.
"""

from command import machine

if __name__ == "__main__":
    machine.begin()  # before torch's import, which Ctrl-C would abort with a traceback

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

from command import options, pictures
from lab.bench import page
from lab.sheets import DOCS, LAYOUTS
from lab.sweep import cases
from lab.sweep.cases import ALONE, ANIMALS, CONTENTS, DRAWN, LAYOUT, OTHERS, STYLES, Case, Design, Needs, Point, Store
from lab.sweep.scores import (
    MARGIN,
    Interval,
    JudgeEncoder,
    Scores,
    anchored,
    as_saved,
    average,
    bootstrap,
    mean,
    measure,
    scores,
)
from magicmix import text_to_image

PAGE = DOCS / "claims.md"
MIXED = 0.25  # of min(a, b): a picture that holds at least a quarter of both
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"
NOT_YET = "Nothing has been run yet."

# ------------------------------------------------------------------------------------------------------------ verdicts


class Condition(NamedTuple):
    """A quantity with its interval, which is to be at least, or else at most, a bound that was set before."""

    text: str
    found: Interval
    bound: float
    at_least: bool

    @property
    def verdict(self) -> str:
        """Holds where the whole interval does, does not where none of it does."""
        low, high = (self.found.low, self.found.high) if self.at_least else (-self.found.high, -self.found.low)
        bound = self.bound if self.at_least else -self.bound
        if not all(map(math.isfinite, (self.found.value, low, high))):
            return OPEN
        return HOLDS if low >= bound else FAILS if high < bound else OPEN

    def line(self) -> str:
        sign = "at least" if self.at_least else "at most"
        return f"| {self.text} | {shown(*self.found)} | {sign} {self.bound:g} | {self.verdict} |"


class Verdict(NamedTuple):
    """One statement's conditions. `check` is what was wrong with the measure itself, if anything."""

    statement: str
    conditions: list[Condition]
    check: str = ""

    @property
    def word(self) -> str:
        found = [condition.verdict for condition in self.conditions]
        if self.check:
            return OPEN
        return FAILS if FAILS in found else OPEN if OPEN in found else HOLDS


def shown(value: float, low: float, high: float) -> str:
    return f"{value:.2f} ({low:.2f} .. {high:.2f})"


def scalar(statistic: Callable[[np.ndarray], float], data: np.ndarray, axes: int) -> Interval:
    found = bootstrap(statistic, data, axes)
    return Interval(*(float(x) for x in found))


# ---------------------------------------------------------------------------------------------------- plots and tables


class Panel(NamedTuple):
    """Curves over one option: name -> an interval per x."""

    x: str
    xs: Sequence[float | str]
    curves: dict[str, Interval]


class Scatter(NamedTuple):
    """A point per pair."""

    x: str
    y: str
    xs: np.ndarray
    ys: np.ndarray


class Result(NamedTuple):
    """What a claim comes to.

    Attributes:
        left_out: NaN scores among all, in words; "" where nothing is scored.
        notes: sentences to stand with the tables.
    """

    verdicts: list[Verdict]
    panels: list[Panel | Scatter]
    left_out: str = ""
    notes: Sequence[str] = ()


def curve(data: np.ndarray, axes: int) -> Interval:
    """Data with the points on the last axis -> their means and intervals."""
    return average(data, axes)


def draw(path: Path, panels: Sequence[Panel | Scatter]) -> None:
    """Writes the panels side by side, as an SVG that is the same for the same numbers."""
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "claims"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.4), layout="constrained", squeeze=False
    )
    for axis, panel in zip(axes[0], panels):
        if isinstance(panel, Scatter):
            axis.plot(panel.xs, panel.ys, "o", markersize=3.5, alpha=0.6)
            axis.set(xlabel=panel.x, ylabel=panel.y)
        else:
            is_number = not isinstance(panel.xs[0], str)
            places = panel.xs if is_number else range(len(panel.xs))
            for (name, found), style in zip(panel.curves.items(), ("o-", "s--", "^:", "v-.")):
                style = style if is_number else style[0]
                spread = np.abs(np.stack([found.value - found.low, found.high - found.value]))
                axis.errorbar(places, found.value, spread, fmt=style, markersize=4, capsize=2.5, label=name)
            axis.set(xlabel=panel.x)
            axis.set_xticks(places, panel.xs if is_number else None)
            if not is_number:
                axis.set_xticks(places, panel.xs, rotation=30, ha="right")
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    pictures.replace(path, "output", lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
    pyplot.close(figure)


def table(panel: Panel) -> list[str]:
    """A panel in Markdown."""
    lines = ["| " + " | ".join([panel.x, *(x if isinstance(x, str) else f"{x:g}" for x in panel.xs)]) + " |"]
    lines.append("|---" * (len(panel.xs) + 1) + "|")
    for name, found in panel.curves.items():
        lines.append("| " + " | ".join([name, *(shown(*cell) for cell in zip(*found))]) + " |")
    return lines


# ---------------------------------------------------------------------------------------------------- what is compared


def layouts(design: Design) -> list[str]:
    return [*LAYOUTS[: design.layouts], *drawn(design)]


def drawn(design: Design) -> list[str]:
    return DRAWN[: design.layouts]


def contents(design: Design) -> list[str]:
    return CONTENTS[: design.contents]


def crossed(design: Design, kind: str = "mix", of: Sequence[str] | None = None) -> list[list[Case]]:
    """Cases (layouts, contents)."""
    of = layouts(design) if of is None else of
    return [[Case(kind, layout, prompt, design.seeds) for prompt in contents(design)] for layout in of]


def some(design: Design) -> list[Case]:
    """Each layout with two contents, all contents alike often."""
    pairs, n = crossed(design), design.contents
    return [pairs[i][(i + j) % n] for i in range(len(pairs)) for j in dict.fromkeys((0, n // 2))]


def each(cases: Sequence, points: Sequence[Point]) -> Needs:
    """The points of every case, in the order of the contents, which keeps a content's own pictures at hand."""
    flat = list(np.asarray(cases, dtype=object).reshape(-1, len(Case._fields)))
    found = [Case(*case) for case in flat]
    return {case: list(points) for case in sorted(found, key=lambda case: case.prompt)}


ANCHORS = (LAYOUT, ALONE)
HIGHER = [Point(k_max=k, nu=0.9) for k in (0.2, 0.4, 0.6, 0.8)]
K_MINS = [Point(k_min=k) for k in (0.0, 0.08, 0.15, 0.28, 0.6)]
NUS = [Point(k_max=0.15, k_min=0.15, nu=0.0), *(Point(nu=nu) for nu in (0.5, 0.7, 0.8, 0.9)), Point(k_min=0.6)]
NU = (0.0, 0.5, 0.7, 0.8, 0.9, 1.0)
FEW = [Point(k_max=k, k_min=k) for k in (0.06, 0.15, 0.6)]
WORDS = (-1.0, 0.0, 0.5, 1.0, 2.0)
WORDS_MIXED = (-1.0, 0.0, 1.0, 2.0)


def score(store: Store, cases: Sequence, points: Sequence[Point], seeds: int) -> Scores:
    """The scores (..., seeds, points)."""
    layout, alone = (store.numbers(cases, [anchor], seeds) for anchor in ANCHORS)
    return scores(store.numbers(cases, points, seeds), layout, alone)


def left_out(found: np.ndarray) -> str:
    """How many scores there are not, for scores with the points on the last axis."""
    is_out = np.isnan(found[..., 0])
    return f"{int(is_out.sum()):,} of {is_out.size:,} are left out, whose anchors are less than {MARGIN:g} apart."


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of what is no NaN in either; NaN where one does not vary."""
    is_there = ~(np.isnan(x) | np.isnan(y))
    a, b = ranks(x[is_there]), ranks(y[is_there])
    a, b = a - a.mean() if len(a) else a, b - b.mean() if len(b) else b
    norm = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm else math.nan


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks, the mean rank for equal values."""
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def rises(means: np.ndarray) -> float:
    """The largest rise from a point to the next."""
    return float(np.diff(means).max())


# --------------------------------------------------------------------------------------------------------- the claims


def needs_1(design: Design) -> Needs:
    return each(crossed(design), [*ANCHORS, *HIGHER])


def result_1(store: Store) -> Result:
    design, grid = store.design, crossed(store.design)
    m, alone = (store.numbers(grid, points, design.seeds) for points in (HIGHER, [ALONE]))
    shares = [anchored(getattr(m, name), getattr(alone, name), np.ones(1), MARGIN) for name in ("low", "high")]
    data = np.stack(shares, axis=-1)  # (layouts, contents, seeds, points, 2)

    def means(data: np.ndarray) -> np.ndarray:
        return mean(data, 3)

    def ratio(data: np.ndarray) -> float:
        last, first = means(data)[-1], means(data)[0]
        return float(last[0] / first[0] - last[1] / first[1])

    conditions = [
        Condition("high falls from k_max 0.2 to 0.8 by", scalar(lambda d: means(d)[0, 1] - means(d)[-1, 1], data, 3),
                  0.1, True),
        Condition("low at k_max 0.8", scalar(lambda d: means(d)[-1, 0], data, 3), 0.05, True),
        Condition("share of low that is left, less that of high", scalar(ratio, data, 3), 0.1, True),
    ]  # fmt: skip
    ab = score(store, grid, HIGHER, design.seeds)
    xs = [point.k_max for point in HIGHER]
    panels = [
        Panel("k_max", xs, {"low (coarse layout)": curve(shares[0], 3), "high (detail)": curve(shares[1], 3)}),
        Panel("k_max", xs, {"a": curve(ab.a, 3), "b": curve(ab.b, 3), "min(a, b)": curve(ab.both, 3)}),
    ]
    return Result([Verdict("A higher K_max keeps the coarse layout and drops its detail", conditions)], panels,
                  left_out(shares[0]))  # fmt: skip


def needs_2(design: Design) -> Needs:
    return each(crossed(design), [*ANCHORS, *K_MINS])


def result_2(store: Store) -> Result:
    grid, seeds = crossed(store.design), store.design.seeds
    ab, m = score(store, grid, K_MINS, seeds), store.numbers(grid, K_MINS, seeds)
    conditions = [
        Condition("a at k_min 0 less a at 0.6", scalar(lambda d: mean(d, 3)[0] - mean(d, 3)[-1], ab.a, 3), 0.1, True),
        Condition("largest rise of a to the next k_min", scalar(lambda d: rises(mean(d, 3)), ab.a, 3), 0.02, False),
    ]
    xs = [point.k_min for point in K_MINS]
    panels = [
        Panel("k_min", xs, {"a": curve(ab.a, 3), "b": curve(ab.b, 3), "min(a, b)": curve(ab.both, 3),
                            "2ab / (a + b)": curve(ab.harmonic, 3)}),
        Panel("k_min", xs, {name: curve(getattr(m, name), 3) for name in ("low", "overlap", "colours")}),
    ]  # fmt: skip
    return Result([Verdict("A lower K_min keeps more of the layout", conditions)], panels, left_out(ab.a))


def needs_3(design: Design) -> Needs:
    return each(crossed(design), [*ANCHORS, *NUS])


def bend(means: np.ndarray) -> float:
    """The largest distance of a curve over NU from the line between its ends, as a share of their difference."""
    line = means[0] + (means[-1] - means[0]) * np.asarray(NU)
    return float(np.abs(means - line).max() / abs(means[-1] - means[0]))


def result_3(store: Store) -> Result:
    grid, seeds = crossed(store.design), store.design.seeds
    ab, m = score(store, grid, NUS, seeds), store.numbers(grid, NUS, seeds)
    d = ab.difference
    ordered = [
        Condition("a - b at nu 0 less that at nu 1", scalar(lambda d: mean(d, 3)[0] - mean(d, 3)[-1], d, 3), 0.5, True),
        Condition("largest rise of a - b to the next nu", scalar(lambda d: rises(mean(d, 3)), d, 3), 0.02, False),
    ]
    text = "largest distance from the line, as a share of the whole"
    linear = [Condition(text, scalar(lambda d: bend(mean(d, 3)), d, 3), 0.1, False)]
    panels = [
        Panel("nu", NU, {"a": curve(ab.a, 3), "b": curve(ab.b, 3), "min(a, b)": curve(ab.both, 3),
                         "2ab / (a + b)": curve(ab.harmonic, 3)}),
        Panel("nu", NU, {"a - b": curve(d, 3)}),
        Panel("nu", NU, {name: curve(getattr(m, name), 3) for name in ("low", "overlap", "colours")}),
    ]  # fmt: skip
    verdicts = [Verdict("nu sets the ratio of layout to content", ordered), Verdict("That is linear in nu", linear)]
    return Result(verdicts, panels, left_out(ab.a))


def needs_4(design: Design) -> Needs:
    return each(crossed(design, of=drawn(design)), [*ANCHORS, *NUS])


def best_nu(data: np.ndarray) -> np.ndarray:
    """min(a, b) (layouts, contents, seeds, nu) -> the best nu of each pair; NaN where the best is below 0.05."""
    means = np.nan_to_num(mean(data, (2,)), nan=-np.inf)  # (layouts, contents, nu)
    return np.where(means.max(axis=-1) >= 0.05, np.asarray(NU)[means.argmax(axis=-1)], np.nan)


def result_4(store: Store) -> Result:
    design, judge = store.design, JudgeEncoder()
    both = score(store, crossed(design, of=drawn(design)), NUS, design.seeds).both
    alike = (judge.texts(drawn(design)) @ judge.texts(contents(design)).T).double().numpy()  # (layouts, contents)
    data = np.concatenate([both, np.broadcast_to(alike[..., None, None], (*both.shape[:3], 1))], axis=-1)

    def rank(data: np.ndarray) -> float:
        return spearman(data[:, :, 0, -1].ravel(), best_nu(data[..., :-1]).ravel())

    best = best_nu(both)
    condition = Condition("rank correlation of likeness and best nu", scalar(rank, data, 3), -0.2, False)
    bins = [f"{nu:g}: {int((best == nu).sum())}" for nu in NU]
    notes = [f"Pairs by their best nu: {', '.join(bins)}; without one: {int(np.isnan(best).sum())}."]
    panels = [Scatter("likeness of the names", "best nu", alike.ravel(), best.ravel())]
    verdict = Verdict("The best nu grows as the two concepts are less alike", [condition])
    return Result([verdict], panels, left_out(both), notes)


def needs_5(design: Design) -> Needs:
    return each(crossed(design), [*ANCHORS, *FEW])


def result_5(store: Store) -> Result:
    grid, seeds = crossed(store.design), store.design.seeds
    m, alone = (store.numbers(grid, points, seeds) for points in (FEW, [ALONE]))
    change, b = m.grey / alone.grey, score(store, grid, FEW, seeds).b
    conditions = [
        Condition("change with K = 3", scalar(lambda d: mean(d, 3), change[..., 0], 3), 0.25, False),
        Condition("b with K = 3", scalar(lambda d: mean(d, 3), b[..., 0], 3), 0.1, False),
    ]
    xs = [round(point.k_max * store.design.steps) for point in FEW]
    panels = [Panel("K, steps", xs, {"change": curve(change, 3), "b": curve(b, 3)})]
    return Result([Verdict("Few steps change little of the picture", conditions)], panels, left_out(b))


def needs_6(design: Design) -> Needs:
    return needs_3(design)


def result_6(store: Store) -> Result:
    grid, seeds = crossed(store.design), store.design.seeds
    shape = mean(store.numbers(grid, [ALONE], seeds).overlap[..., 0], (2,))  # (layouts, contents)
    both = score(store, grid, NUS, seeds).both
    half = max(1, seeds // 2)
    chosen = np.nan_to_num(mean(both[:, :, :half], (2,)), nan=-np.inf).argmax(axis=-1)  # (layouts, contents)
    best = np.take_along_axis(mean(both[:, :, -half:], (2,)), chosen[..., None], axis=-1)[..., 0]
    data = np.stack([shape, best], axis=-1)

    def least(data: np.ndarray) -> float:
        """The share that is mixed, of the quarter with the least overlap."""
        shape, best = data.reshape(-1, 2)[~np.isnan(data).any(axis=-1).ravel()].T
        return float((best[shape <= np.quantile(shape, 0.25)] >= MIXED).mean()) if len(shape) else math.nan

    conditions = [
        Condition("rank correlation of overlap and min(a, b)",
                  scalar(lambda d: spearman(d[..., 0].ravel(), d[..., 1].ravel()), data, 2), 0.2, True),
        Condition("share that is mixed in the quarter with the least overlap", scalar(least, data, 2), 0.25, False),
    ]  # fmt: skip
    panels = [Scatter("overlap of layout and content alone", "min(a, b) at the best nu", shape.ravel(), best.ravel())]
    verdict = Verdict("Concepts without shared shape cannot be mixed", conditions)
    return Result([verdict], panels, left_out(both), [f"Of all pairs {(best >= MIXED).mean():.0%} are mixed."])


def plain(design: Design) -> list[Case]:
    return [Case("plain", "", prompt, design.seeds) for prompt in contents(design)]


def needs_7(design: Design) -> Needs:
    words = [ALONE, *(Point(s=s) for s in WORDS if s != 1)]
    mixed = [*ANCHORS, *(Point(s=s) for s in WORDS_MIXED)]
    return cases.merged([each(plain(design), words), each(some(design), mixed)])


def result_7(store: Store) -> Result:
    design = store.design
    B = store.numbers(plain(design), [ALONE if s == 1 else Point(s=s) for s in WORDS], design.seeds).B
    likeness = mean(store.vectors(plain(design), ALONE)[..., : design.contents], (1,))  # (pictures of, name of)
    chance = [np.delete(likeness[:, i], i).mean() for i in range(design.contents)]
    data = anchored(B, np.asarray(chance)[:, None, None], B[..., [WORDS.index(1)]], MARGIN)  # (contents, seeds, s)
    ab = score(store, some(design), [Point(s=s) for s in WORDS_MIXED], design.fewer)

    def at(s: float, data: np.ndarray) -> float:
        return float(mean(data[..., WORDS.index(s)], 2))

    def stronger(axis: Sequence[float], data: np.ndarray) -> float:
        return float(mean(data[..., axis.index(2)] - data[..., axis.index(1)], 2))

    conditions = [
        Condition("B at s = -1", scalar(partial(at, -1), data, 2), 0.1, False),
        Condition("B at s = 0", scalar(partial(at, 0), data, 2), 0.1, False),
        Condition("B at s = 2 less that at 1", scalar(partial(stronger, WORDS), data, 2), 0.02, True),
        Condition("largest fall of B to the next s", scalar(lambda d: rises(-mean(d, 2)), data, 2), 0.02, False),
        Condition("in mixes, b at s = -1", scalar(lambda d: mean(d[..., 0], 2), ab.b, 2), 0.1, False),
        Condition("in mixes, b at s = 2 less that at 1", scalar(partial(stronger, WORDS_MIXED), ab.b, 2), 0.02, True),
    ]
    panels = [
        Panel("s, text-to-image", WORDS, {"B": curve(data, 2)}),
        Panel("s, in mixes", WORDS_MIXED, {"a": curve(ab.a, 2), "b": curve(ab.b, 2)}),
    ]
    return Result([Verdict("s < 0 removes the concept, s > 1 strengthens it", conditions)], panels, left_out(ab.a))


def needs_8(design: Design) -> Needs:
    grids = [crossed(design, kind, drawn(design)) for kind in ("text", "mix")]
    return cases.merged([each(grid, [*ANCHORS, Point()]) for grid in grids])


def result_8(store: Store) -> Result:
    design, spreads, found = store.design, [], []
    for kind in ("text", "mix"):
        grid = crossed(design, kind, drawn(design))
        both = score(store, grid, [Point()], design.seeds).both  # (layouts, contents, seeds, 1)
        apart = mean(store.numbers(grid, [Point()], design.seeds).apart, (2,))
        spreads += [deviation(both, axis=2), apart]
        found.append(both)
    data = np.concatenate(spreads, axis=-1)  # (layouts, contents, 4)

    def more(i: int, data: np.ndarray) -> float:
        return float(mean(data[..., i] - data[..., i + 2], 2))

    conditions = [
        Condition("deviation of min(a, b), text-text less image-text", scalar(partial(more, 0), data, 2), 0.02, True),
        Condition("distance of seeds' pictures, text-text less image-text", scalar(partial(more, 1), data, 2), 0.05,
                  True),
    ]  # fmt: skip
    both = np.concatenate(found, axis=-1)
    of = {"standard deviation of min(a, b)": curve(data[..., [0, 2]], 2),
          "distance of seeds' pictures": curve(data[..., [1, 3]], 2), "min(a, b)": curve(both, 3)}  # fmt: skip
    panels = [Panel("layout", ["a prompt", "its picture"], of)]
    return Result([Verdict("Text-text mixing is unpredictable", conditions)], panels, left_out(both))


def deviation(data: np.ndarray, axis: int) -> np.ndarray:
    """The standard deviation over an axis of what is no NaN, with n - 1; NaN for less than two."""
    count = (~np.isnan(data)).sum(axis=axis)
    centred = data - np.expand_dims(mean(data, (axis,)), axis)
    return np.where(count > 1, np.sqrt(np.nansum(centred**2, axis=axis) / np.maximum(count - 1, 1)), np.nan)


def styled(design: Design) -> list[list[Case]]:
    """(layouts, styles)"""
    return [[Case("mix", p, f"a {style} {p.split()[-1]}", design.fewer) for style in STYLES] for p in drawn(design)]


def centres(design: Design) -> list[list[Case]]:
    """(concepts, styles)"""
    names = OTHERS[: design.others]
    return [[Case("plain", "", f"a {style} {name}", 2) for style in STYLES] for name in names]


def breeds(design: Design) -> list[Case]:
    animals = ANIMALS[: design.animals]
    return [Case("mix", p, q, design.fewer) for p in animals for q in animals if p != q]


def removed(design: Design) -> list[Case]:
    return [Case("mix", layout, layout, design.fewer) for layout in drawn(design)]


def needs_9(design: Design) -> Needs:
    return cases.merged([
        each(styled(design), [LAYOUT, Point()]),
        each(centres(design), [ALONE]),
        each(crossed(design), [*ANCHORS, Point()]),
        each(breeds(design), [*ANCHORS, Point()]),
        each(removed(design), [LAYOUT, Point(), Point(s=-1.0)]),
    ])  # fmt: skip


def nearest(x: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Features (..., D) -> the number of the style with the nearest centre. `known` is (concepts, styles, pictures, D);
    each feature counts in units of its spread there."""
    spread = known.std(axis=(0, 1, 2)) + 1e-6
    centre = known.mean(axis=(0, 2))  # (styles, D)
    return np.linalg.norm((x[..., None, :] - centre) / spread, axis=-1).argmin(axis=-1)


def result_9(store: Store) -> Result:
    design, names = store.design, JudgeEncoder().names
    known = store.vectors(centres(design), ALONE)  # (concepts, styles, 2, D)
    order = np.arange(len(STYLES))
    right = [nearest(known[i], np.delete(known, i, axis=0)) == order[:, None] for i in range(len(known))]
    accuracy = float(np.mean(right))

    def name(cases: Sequence[Case], point: Point, seeds: int) -> np.ndarray:
        """Which pictures (cases, seeds) the judge names as the layout."""
        named = store.numbers(cases, [point], seeds).named[..., 0]
        return named == np.asarray([names.index(case.layout.split()[-1]) for case in cases])[:, None]

    style = nearest(store.vectors(styled(design), Point()), known) == order[:, None]  # (layouts, styles, seeds)
    style = np.moveaxis(style, 1, 2).astype(float)  # (layouts, seeds, styles)
    kept = np.stack([name(row, Point(), design.fewer).T for row in styled(design)]).astype(float)
    transfer = [
        Condition("share in the prompt's style", scalar(lambda d: float(d.mean()), style, 2), 0.5, True),
        Condition("share named as the layout", scalar(lambda d: float(d.mean()), kept, 2), 0.5, True),
    ]
    grid = score(store, crossed(design), [Point()], design.seeds).both[..., 0]
    animals = score(store, breeds(design), [Point()], design.fewer).both[..., 0]
    uses = {"Novel objects": (grid, 3), "Breed mixing": (animals, 2)}
    text, verdicts = "share with min(a, b) of 0.25 or more", []
    for use, (both, axes) in uses.items():
        is_mixed = np.where(np.isnan(both), np.nan, both >= MIXED)
        found = scalar(partial(mean, axes=axes), is_mixed, axes)
        verdicts.append(Verdict(use, [Condition(text, found, 0.5, True)]))
    cases_ = removed(design)
    still, before = (name(cases_, point, design.fewer).astype(float) for point in (Point(s=-1.0), Point()))
    low = store.numbers(cases_, [Point(s=-1.0)], design.fewer).low[..., 0]
    removal = [
        Condition("share still named so at s = -1", scalar(partial(mean, axes=2), still, 2), 0.25, False),
        Condition("low, the coarse layout", scalar(partial(mean, axes=2), low, 2), 0.5, True),
    ]
    check = f"the styles' centres name {accuracy:.0%} of pictures" if accuracy < 0.6 else ""
    verdicts = [Verdict("Style transfer", transfer, check), *verdicts, Verdict("Concept removal", removal)]
    shares = {"share": curve(style, 2)}
    notes = [
        f"The styles' centres put {accuracy:.0%} of the pictures of other concepts right; a quarter would be chance.",
        f"At s = 1 the judge names {before.mean():.0%} of the mixes of a layout with its own name so.",
        f"Novel objects: {left_out(grid[..., None])}",
        f"Breed mixing: {left_out(animals[..., None])}",
    ]
    return Result(verdicts, [Panel("style of the prompt", STYLES, shares)], "", notes)


LOOPS = [Point(nu=nu, loop="unmixed carried") for nu in (0.5, 0.7, 0.9)]
LOOPS += [Point(loop=name) for name in cases.VARIANTS if name not in ("unmixed carried", "renoised")]


def needs_10(design: Design) -> Needs:
    return each(some(design), [*ANCHORS, *(Point(nu=point.nu) for point in LOOPS[:3]), *LOOPS])


def result_10(store: Store) -> Result:
    design, grid = store.design, some(store.design)
    theirs = score(store, grid, LOOPS, design.fewer)
    ours = score(store, grid, [Point(nu=point.nu) for point in LOOPS], design.fewer)
    less = ours.both - theirs.both  # (cases, seeds, loops)
    verdicts = []
    for i, point in enumerate(LOOPS):
        if point.nu == 0.7:
            found = scalar(partial(mean, axes=2), less[..., i], 2)
            statement = f"The departure {point.loop!r} costs something"
            verdicts.append(Verdict(statement, [Condition("min(a, b) is lower by", found, 0.02, True)]))
    verdicts.sort(key=lambda verdict: "unmixed" not in verdict.statement)
    names = [point.loop for point in LOOPS[3:]]
    panels = [
        Panel("nu", [point.nu for point in LOOPS[:3]], {
            "min(a, b), this project": curve(ours.both[..., :3], 2),
            "min(a, b), unmixed carried": curve(theirs.both[..., :3], 2),
            "a, this project": curve(ours.a[..., :3], 2), "a, unmixed carried": curve(theirs.a[..., :3], 2)}),
        Panel("loop, less this project's", names, {
            "min(a, b)": curve(-less[..., 3:], 2), "a": curve((theirs.a - ours.a)[..., 3:], 2)}),
    ]  # fmt: skip
    return Result(verdicts, panels, left_out(theirs.both))


@dataclass(frozen=True)
class Claim:
    number: int
    needs: Callable[[Design], Needs]
    result: Callable[[Store], Result]


CLAIMS = [
    Claim(1, needs_1, result_1),
    Claim(2, needs_2, result_2),
    Claim(3, needs_3, result_3),
    Claim(4, needs_4, result_4),
    Claim(5, needs_5, result_5),
    Claim(6, needs_6, result_6),
    Claim(7, needs_7, result_7),
    Claim(8, needs_8, result_8),
    Claim(9, needs_9, result_9),
    Claim(10, needs_10, result_10),
]


# ----------------------------------------------------------------------------------------------------------- the page


def section(number: int, result: Result) -> str:
    """A claim's block, in Markdown."""
    lines = [f"![Claim {number}](claims/{number}.svg)", ""] if result.panels else []
    for verdict in result.verdicts:
        because = f": {verdict.check}" if verdict.check else ""
        lines += [
            f"{verdict.statement}: **{verdict.word}**{because}.",
            "",
            "| condition | measured | bound | |",
            "|---|---|---|---|",
        ]
        lines += [*(condition.line() for condition in verdict.conditions), ""]
    for panel in result.panels:
        lines += [*table(panel), ""] if isinstance(panel, Panel) else []
    return "\n".join([*lines, *result.notes, *([result.left_out] if result.left_out else [])])


def judge_section(store: Store) -> str:
    """What the judge makes of pure layouts and pure contents, in Markdown."""
    design, grid, names = store.design, crossed(store.design), JudgeEncoder().names
    layout, alone = (store.numbers(grid, [anchor], design.seeds) for anchor in ANCHORS)
    own = np.asarray([names.index(prompt.split()[-1]) for prompt in contents(design)])
    own_layouts = np.asarray([names.index(prompt.split()[-1]) for prompt in drawn(design)])
    named = alone.named[0, :, :, 0] == own[:, None]  # (contents, seeds)
    named_layouts = layout.named[-len(own_layouts) :, 0, 0, 0] == own_layouts
    gaps = {"A(layout) - A(content alone)": layout.A - alone.A, "B(content alone) - B(layout)": alone.B - layout.B}
    rows = {"A of the content alone": alone.A, "B of the content alone": alone.B, "B of the layout": layout.B, **gaps}
    lines = [
        f"Contents alone: the judge names {named.sum()} of {named.size} as their prompt. Drawn layouts: "
        f"{named_layouts.sum()} of {named_layouts.size}.",
        "",
        "| pure pictures | mean | smallest | largest |",
        "|---|---|---|---|",
        *(f"| {name} | {x.mean():.2f} | {x.min():.2f} | {x.max():.2f} |" for name, x in rows.items()),
        "",
        left_out(scores(alone, layout, alone).a),
    ]
    return "\n".join(lines)


def verdict_lines(results: dict[int, Result]) -> str:
    lines = ["| claim | verdict | measured |", "|---|---|---|"]
    for number, result in results.items():
        for verdict in result.verdicts:
            c = verdict.conditions[0]
            lines.append(f"| {number}. {verdict.statement} | {verdict.word} | {c.text}: {shown(*c.found)} |")
    return "\n".join(lines)


def write(page_path: Path, store: Store, chosen: Sequence[Claim]) -> list[str]:
    """Writes the tables and plots of the claims whose numbers are all there. Returns what there is to say."""
    told, results, folder = [], {}, store.path.parent
    for claim in CLAIMS:
        needs = claim.needs(store.design)
        if left := store.missing(needs):
            if claim in chosen:
                told.append(f"claim {claim.number}: {len(left):,} of {len(needs):,} cases are missing; run it to go on")
            continue
        results[claim.number] = claim.result(store)
        if claim in chosen:
            draw(folder / f"{claim.number}.svg", results[claim.number].panels)
            page.write(page_path, f"claim {claim.number}", section(claim.number, results[claim.number]))
            told += [f"claim {claim.number}: {v.statement}: {v.word}" for v in results[claim.number].verdicts]
    if results:
        page.write(page_path, "verdicts", verdict_lines(results))
    if not store.missing(each(crossed(store.design), ANCHORS)):
        page.write(page_path, "judge", judge_section(store))
    seconds, calls = (sum(line[name] for line in store.lines.values()) for name in ("seconds", "calls"))
    if calls:
        made = f"{calls:,} UNet calls, one per step and picture, took {seconds / 3600:.2f} hours of one core"
        page.write(page_path, "run", f"{made}, with decoding and measuring, in {store.design.dtype}.")
    return told


# ---------------------------------------------------------------------------------------------------------- the command


def rate(studio: cases.Studio) -> tuple[float, float]:
    """Processor seconds per UNet call, one step of one picture in a batch of eight, and per picture that is decoded and
    measured; on one thread."""
    torch.set_num_threads(1)
    steps = text_to_image(studio.models, CONTENTS[0], seeds=range(8), steps=studio.design.steps)
    next(steps)
    times = [time.process_time()]
    for _ in range(6):
        step = next(steps)
        times.append(time.process_time())
    with torch.no_grad():
        pure = as_saved(studio.models, step.x)
        measure(pure, pure[:1], studio.encoder.texts(CONTENTS[:1])[0], studio.encoder)
    return (times[-1] - times[0]) / 6 / 8, (time.process_time() - times[-1]) / 8


def plan_lines(store: Store, chosen: Sequence[Claim], processes: int) -> list[str]:
    """The plan in words: what each claim adds to the claims before it, and how long all takes."""
    studio = cases.Studio(store.design)
    per_call, per_picture = rate(studio)
    lines, before = [], (0, 0)
    lines.append(
        f"{1000 * per_call:.1f} ms per UNet call, {1000 * per_picture:.0f} ms per picture to decode and measure"
    )
    for i, claim in enumerate(chosen):
        needs = store.missing(cases.merged([c.needs(store.design) for c in chosen[: i + 1]]))
        now = cases.calls(store.design, needs, studio)
        new = [a - b for a, b in zip(now, before)]
        minutes = (new[0] * per_call + new[1] * per_picture) / 60
        lines.append(
            f"claim {claim.number}: {new[0]:,} UNet calls, {new[1]:,} pictures, {minutes:.0f} minutes of a core"
        )
        before = now
    hours = (before[0] * per_call + before[1] * per_picture) / 3600
    lines.append(f"in all {before[0]:,} UNet calls, {before[1]:,} pictures, {hours:.2f} hours of a core")
    lines.append(f"about {hours / processes:.2f} hours on {processes} core{'s' * (processes > 1)}")
    return lines


def numbers(text: str) -> list[Claim]:
    """--only's value. Raises ArgumentTypeError."""
    known = {str(claim.number): claim for claim in CLAIMS}
    unknown = [part for part in text.split(",") if part not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no claim; use 1 to {len(CLAIMS)}, such as 2,3")
    return [known[part] for part in dict.fromkeys(text.split(","))]


def claims(asked: argparse.Namespace) -> None:
    """Does what the command line asks for. Raises ValueError or OSError."""
    if asked.small and asked.page == PAGE:
        raise ValueError("small is a trial, not for docs/claims.md; give --page COPY.md too")
    if not asked.page.is_file():
        raise ValueError(f"page {str(asked.page)!r} does not exist; give docs/claims.md or a copy of it")
    design = Design(dtype=asked.dtype, **(cases.SMALL if asked.small else {}))
    folder = asked.page.with_suffix("")
    store = cases.open_store(folder / "scores.jsonl.gz", design)
    if asked.plan:
        return machine.show(plan_lines(store, asked.only, asked.processes))
    if not asked.plots:
        folder.mkdir(exist_ok=True)
        needs = cases.merged([claim.needs(design) for claim in asked.only])
        left = store.missing(needs)
        print(f"{len(needs) - len(left):,} of {len(needs):,} cases are there", flush=True)
        with tqdm(total=len(left), unit="case", disable=asked.quiet) as bar:
            for case, _ in cases.run(store, needs, asked.processes):
                bar.set_postfix_str(" ".join(case[:3]))
                bar.update()
    machine.show(write(asked.page, store, asked.only))
    print(asked.page)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = options.Parser(
        "lab.sweep.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="print the plan, measure the speed, and end")
    what.add_argument("--plots", action="store_true", help="tables and plots from the numbers that are there")
    parser.add_argument("--only", type=numbers, default=CLAIMS, metavar="N,N", help="these claims [all]")
    count = options.Number(1, 256, whole=True)
    parser.add_argument("--processes", type=count.parse, default=os.cpu_count(), metavar="N", help="one per core [all]")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the checkpoint [fp32]")
    parser.add_argument(
        "--page", type=Path, default=PAGE, metavar="FILE", help="the page; numbers and plots lie beside it"
    )
    parser.add_argument("--small", action="store_true", help="few layouts, contents, seeds and steps")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    asked = parser.parse_args(sys.argv[1:] if argv is None else argv)
    return machine.run("lab.sweep.claims", lambda: claims(asked), asked.quiet)


if __name__ == "__main__":
    sys.exit(main())
