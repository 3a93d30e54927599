"""Verdicts by rules that were set before, and the plots and tables that stand with them."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from command import pictures
from lab.sweep.scores import Interval, average, bootstrap

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"

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
        return OPEN if self.check else self.deciding.verdict

    @property
    def deciding(self) -> Condition:
        """The first condition that does not hold, or else that cannot be told, or else the first."""
        order = {FAILS: 0, OPEN: 1, HOLDS: 2}
        return min(self.conditions, key=lambda condition: order[condition.verdict])


def shown(value: float, low: float, high: float) -> str:
    return f"{value:.2f} ({low:.2f} .. {high:.2f})"


def scalar(statistic: Callable[[np.ndarray], float], data: np.ndarray, axes: int) -> Interval:
    found = bootstrap(statistic, data, axes)
    return Interval(*(float(x) for x in found))


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


def several(statistic: Callable[[np.ndarray], np.ndarray], data: np.ndarray, axes: int) -> list[Interval]:
    """Of a statistic that is an array (n,), an interval each. A largest value of several would not do in its place:
    chance alone moves it up."""
    return [Interval(*map(float, found)) for found in zip(*bootstrap(statistic, data, axes))]


def size(found: Interval) -> Interval:
    """Of a signed quantity's interval, that of its absolute value."""
    low, high = abs(found.low), abs(found.high)
    is_across = found.low <= 0 <= found.high
    return Interval(abs(found.value), 0.0 if is_across else min(low, high), max(low, high))


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
    matplotlib.rcParams.update({"svg.hashsalt": "claims", "svg.fonttype": "none"})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.4), layout="constrained", squeeze=False
    )
    for axis, panel in zip(axes[0], panels):
        if isinstance(panel, Scatter):
            axis.plot(panel.xs, panel.ys, "o", markersize=3.5, alpha=0.6)
            axis.set(xlabel=panel.x, ylabel=panel.y)
        else:
            draw_curves(axis, panel)
        axis.grid(alpha=0.3)
    pictures.replace(path, "output", lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
    pyplot.close(figure)


def draw_curves(axis, panel: Panel) -> None:
    """A panel on matplotlib's axis; where x has names, without lines, side by side."""
    has_names = isinstance(panel.xs[0], str)
    places = np.arange(len(panel.xs)) if has_names else np.asarray(panel.xs)
    for i, ((name, found), style) in enumerate(zip(panel.curves.items(), ("o-", "s--", "^:", "v-."))):
        spread = np.abs(np.stack([found.value - found.low, found.high - found.value]))
        style, x = (style[0], places + 0.12 * i) if has_names else (style, places)
        axis.errorbar(x, found.value, spread, fmt=style, markersize=4, capsize=2.5, label=name)
    axis.set(xlabel=panel.x)
    axis.set_xticks(places, panel.xs, rotation=30 if has_names else 0, ha="right" if has_names else "center")
    axis.legend(fontsize=8)


def table(panel: Panel) -> list[str]:
    """A panel in Markdown."""
    lines = ["| " + " | ".join([panel.x, *(x if isinstance(x, str) else f"{x:g}" for x in panel.xs)]) + " |"]
    lines.append("|---" * (len(panel.xs) + 1) + "|")
    for name, found in panel.curves.items():
        lines.append("| " + " | ".join([name, *(shown(*cell) for cell in zip(*found))]) + " |")
    return lines
