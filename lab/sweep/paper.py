"""The ten claims of the paper: what each needs, and what its numbers come to. docs/claims.md states them.

Arrays have the axes layouts, contents, seeds and points, in that order. Pairs of layout and content that were not made
are NaN.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from lab.sheets import LAYOUTS
from lab.sweep import cases
from lab.sweep.cases import ALONE, ANIMALS, CONTENTS, DRAWN, LAYOUT, STYLES, Case, Design, Needs, Point, Store
from lab.sweep.scores import MARGIN, JudgeEncoder, Scores, anchored, mean, scores
from lab.sweep.verdict import Condition, Panel, Result, Scatter, Verdict, curve, scalar, several, size, spearman

MIXED = 0.25  # of min(a, b): a picture that holds at least a quarter of both
NAMED, LEFT_OUT = 0.8, 0.25  # the judge must name so many contents alone, and so many scores may be missing at most
REMOVED = Point(s=-1.0)

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
    return {case: list(points) for case in sorted(flat(cases), key=lambda case: case.prompt)}


def flat(cases: Sequence) -> list[Case]:
    """The cases of nested lists."""
    return [cases] if isinstance(cases, Case) else [case for part in cases for case in flat(part)]


def by_pair(cases: Sequence[Case], data: np.ndarray) -> np.ndarray:
    """Data (cases, ...) -> (layouts, contents, ...), NaN for the pairs that are no case."""
    rows, columns = (list(dict.fromkeys(getattr(case, name) for case in cases)) for name in ("layout", "prompt"))
    found = np.full((len(rows), len(columns), *data.shape[1:]), np.nan)
    for case, values in zip(cases, data):
        found[rows.index(case.layout), columns.index(case.prompt)] = values
    return found


ANCHORS = (LAYOUT, ALONE)
HIGHER = [Point(k_max=k, nu=0.9) for k in (0.2, 0.4, 0.6, 0.8)]
K_MINS = [Point(k_min=k) for k in (0.0, 0.08, 0.15, 0.28, 0.6)]
NUS = [Point(k_max=0.15, k_min=0.15, nu=0.0), *(Point(nu=nu) for nu in (0.5, 0.7, 0.8, 0.9)), Point(k_min=0.6)]
NU = (0.0, 0.5, 0.7, 0.8, 0.9, 1.0)
FEW = [Point(k_max=k, k_min=k) for k in (0.06, 0.15, 0.6)]
WORDS = (-1.0, 0.0, 0.5, 1.0, 2.0)
WORDS_MIXED = (-1.0, 0.0, 1.0, 2.0)


@cache
def judge() -> JudgeEncoder:
    return JudgeEncoder()


def names_are(store: Store, cases: Sequence[Case], point: Point, seeds: int, texts: Sequence[str]) -> np.ndarray:
    """Which pictures (cases, seeds) the judge names as the case's text does, such as "a tiger"."""
    own = [judge().names.index(judge().concept(text)) for text in texts]
    return store.numbers(cases, [point], seeds).named[..., 0] == np.asarray(own)[:, None]


def is_mixed(both: np.ndarray) -> np.ndarray:
    """min(a, b) -> whether it is a mixture's, 0 or 1; NaN where there is none."""
    return np.where(np.isnan(both), np.nan, both >= MIXED)


def score(store: Store, cases: Sequence, points: Sequence[Point], seeds: int) -> Scores:
    """The scores (..., seeds, points)."""
    layout, alone = (store.numbers(cases, [anchor], seeds) for anchor in ANCHORS)
    return scores(store.numbers(cases, points, seeds), layout, alone)


def left_out(found: np.ndarray) -> str:
    """How many scores there are not, for scores with the points on the last axis."""
    is_out = np.isnan(found[..., 0])
    return f"{int(is_out.sum()):,} of {is_out.size:,} are left out, whose anchors are less than {MARGIN:g} apart."


def steady(what: str, axis: str, xs: Sequence[float], data: np.ndarray, axes: int, word: str) -> list[Condition]:
    """That the means of the points, on the data's last axis, rise, or fall, by at most 0.02 from each to the next."""
    sign = 1 if word == "rises" else -1
    found = several(lambda data: sign * np.diff(mean(data, axes)), data, axes)
    return [
        Condition(f"{what} {word} from {axis} {x:g} to {y:g} by", change, 0.02, False)
        for x, y, change in zip(xs, xs[1:], found)
    ]


# --------------------------------------------------------------------------------------------------------- the claims


def needs_1(design: Design) -> Needs:
    return each(crossed(design), [*ANCHORS, *HIGHER, *FEW])


def result_1(store: Store) -> Result:
    design, grid = store.design, crossed(store.design)
    alone = store.numbers(grid, [ALONE], design.seeds)

    def low_and_high(points: Sequence[Point]) -> np.ndarray:
        """(layouts, contents, seeds, points, 2)"""
        m = store.numbers(grid, points, design.seeds)
        kinds = [anchored(getattr(m, name), getattr(alone, name), np.ones(1), MARGIN) for name in ("low", "high")]
        return np.stack(kinds, axis=-1)

    data, start = low_and_high(HIGHER), low_and_high(FEW)

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
    names, xs = ("low (coarse layout)", "high (detail)"), [point.k_max for point in HIGHER]
    panels = [
        Panel("k_max, nu 0.9", xs, {name: curve(data[..., i], 3) for i, name in enumerate(names)}),
        Panel("k_max, nu 0.9", xs, {"a": curve(ab.a, 3), "b": curve(ab.b, 3), "min(a, b)": curve(ab.both, 3)}),
        Panel("k_max, nu 1", [point.k_max for point in FEW],
              {name: curve(start[..., i], 3) for i, name in enumerate(names)}),
    ]  # fmt: skip
    notes = [f"{name}: {left_out(data[..., i])}" for i, name in enumerate(("Low", "High"))]
    return Result([Verdict("A higher K_max keeps the coarse layout and drops its detail", conditions)], panels,
                  f"a and b: {left_out(ab.a)}", notes)  # fmt: skip


def needs_2(design: Design) -> Needs:
    return each(crossed(design), [*ANCHORS, *K_MINS])


def result_2(store: Store) -> Result:
    grid, seeds = crossed(store.design), store.design.seeds
    ab, m = score(store, grid, K_MINS, seeds), store.numbers(grid, K_MINS, seeds)
    xs = [point.k_min for point in K_MINS]
    conditions = [
        Condition("a at k_min 0 less a at 0.6", scalar(lambda d: mean(d, 3)[0] - mean(d, 3)[-1], ab.a, 3), 0.1, True),
        *steady("a", "k_min", xs, ab.a, 3, "rises"),
    ]
    panels = [
        Panel("k_min, nu 0.7", xs, {"a": curve(ab.a, 3), "b": curve(ab.b, 3), "min(a, b)": curve(ab.both, 3),
                            "2ab / (a + b)": curve(ab.harmonic, 3)}),
        Panel("k_min, nu 0.7", xs, {name: curve(getattr(m, name), 3) for name in ("low", "overlap", "colours")}),
    ]  # fmt: skip
    return Result([Verdict("A lower K_min keeps more of the layout", conditions)], panels, left_out(ab.a))


def needs_3(design: Design) -> Needs:
    return each(crossed(design), [*ANCHORS, *NUS])


def bends(means: np.ndarray) -> np.ndarray:
    """How far a curve over NU is from the line between its ends, at the inner points, as a share of their
    difference."""
    line = means[0] + (means[-1] - means[0]) * np.asarray(NU)
    return (means - line)[1:-1] / abs(means[-1] - means[0])


def result_3(store: Store) -> Result:
    grid, seeds = crossed(store.design), store.design.seeds
    ab, m = score(store, grid, NUS, seeds), store.numbers(grid, NUS, seeds)
    d = ab.difference
    ordered = [
        Condition("a - b at nu 0 less that at nu 1", scalar(lambda d: mean(d, 3)[0] - mean(d, 3)[-1], d, 3), 0.5, True),
        *steady("a - b", "nu", NU, d, 3, "rises"),
    ]
    linear = [
        Condition(f"distance from the line at nu {nu:g}, as a share of the whole", size(found), 0.1, False)
        for nu, found in zip(NU[1:-1], several(lambda d: bends(mean(d, 3)), d, 3))
    ]
    panels = [
        Panel("nu, k_min 0.15", NU, {"a": curve(ab.a, 3), "b": curve(ab.b, 3), "min(a, b)": curve(ab.both, 3),
                         "2ab / (a + b)": curve(ab.harmonic, 3)}),
        Panel("nu, k_min 0.15", NU, {"a - b": curve(d, 3)}),
        Panel("nu, k_min 0.15", NU, {name: curve(getattr(m, name), 3) for name in ("low", "overlap", "colours")}),
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
    design = store.design
    both = score(store, crossed(design, of=drawn(design)), NUS, design.seeds).both
    alike = (judge().texts(drawn(design)) @ judge().texts(contents(design)).T).double().numpy()  # (layouts, contents)
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
    known = mean(both[:, :, :half], (2,))  # (layouts, contents, nu)
    chosen = np.nan_to_num(known, nan=-np.inf).argmax(axis=-1)  # (layouts, contents)
    best = np.take_along_axis(mean(both[:, :, -half:], (2,)), chosen[..., None], axis=-1)[..., 0]
    best = np.where(np.isnan(known).all(axis=-1), np.nan, best)
    data = np.stack([shape, best], axis=-1)

    def least(data: np.ndarray) -> float:
        """The share that is mixed, of the quarter with the least overlap."""
        shape, best = data.reshape(-1, 2)[~np.isnan(data).any(axis=-1).ravel()].T
        return float((best[shape <= np.quantile(shape, 0.25)] >= MIXED).mean()) if len(shape) else np.nan

    conditions = [
        Condition("rank correlation of overlap and min(a, b)",
                  scalar(lambda d: spearman(d[..., 0].ravel(), d[..., 1].ravel()), data, 2), 0.2, True),
        Condition("share that is mixed in the quarter with the least overlap", scalar(least, data, 2), 0.25, False),
    ]  # fmt: skip
    panels = [Scatter("overlap of layout and content alone", "min(a, b) at the best nu", shape.ravel(), best.ravel())]
    verdict = Verdict("Concepts without shared shape cannot be mixed", conditions)
    return Result([verdict], panels, left_out(both), [f"Of all pairs {mean(is_mixed(best), 2):.0%} are mixed."])


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
    a, b = (by_pair(some(design), x) for x in (ab.a, ab.b))  # (layouts, contents, seeds, s)

    def at(s: float, data: np.ndarray) -> float:
        return float(mean(data[..., WORDS.index(s)], 2))

    def stronger(axis: Sequence[float], axes: int, data: np.ndarray) -> float:
        return float(mean(data[..., axis.index(2)] - data[..., axis.index(1)], axes))

    conditions = [
        Condition("B at s = -1", scalar(partial(at, -1), data, 2), 0.1, False),
        Condition("B at s = 0", scalar(partial(at, 0), data, 2), 0.1, False),
        Condition("B at s = 2 less that at 1", scalar(partial(stronger, WORDS, 2), data, 2), 0.02, True),
        *steady("B", "s", WORDS, data, 2, "falls"),
        Condition("in mixes, b at s = -1", scalar(lambda d: mean(d[..., 0], 3), b, 3), 0.1, False),
        Condition("in mixes, b at s = 2 less that at 1", scalar(partial(stronger, WORDS_MIXED, 3), b, 3), 0.02, True),
    ]
    panels = [
        Panel("s, text-to-image", WORDS, {"B": curve(data, 2)}),
        Panel("s, in mixes", WORDS_MIXED, {"a": curve(a, 3), "b": curve(b, 3)}),
    ]
    verdict = Verdict("s < 0 removes the concept, s > 1 strengthens it", conditions)
    return Result([verdict], panels, f"Mixes: {left_out(ab.a)}", [f"Text-to-image: {left_out(data)}"])


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


def known_styles(design: Design) -> list[list[Case]]:
    """(layouts, styles)"""
    return [[Case("plain", "", case.prompt, case.seeds) for case in row] for row in styled(design)]


def breeds(design: Design) -> list[Case]:
    animals = ANIMALS[: design.animals]
    return [Case("mix", p, q, design.fewer) for p in animals for q in animals if p != q]


def removed(design: Design) -> list[Case]:
    return [Case("mix", layout, layout, design.fewer) for layout in drawn(design)]


def needs_9(design: Design) -> Needs:
    return cases.merged([
        each(styled(design), [*ANCHORS, Point()]),
        each(known_styles(design), [ALONE]),
        each(crossed(design), [*ANCHORS, Point()]),
        each(breeds(design), [*ANCHORS, Point()]),
        each(removed(design), [*ANCHORS, Point(), REMOVED]),
    ])  # fmt: skip


def nearest(x: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Features (concepts, styles, seeds, D) -> the number of the style whose centre is nearest, among `known`, of the
    same axes, in the same concept; each feature counts in units of its spread there."""
    spread = known.std(axis=(0, 1, 2)) + 1e-6
    centre = known.mean(axis=2)[:, None, None]  # (concepts, 1, 1, styles, D)
    return np.linalg.norm((x[..., None, :] - centre) / spread, axis=-1).argmin(axis=-1)


def accuracy(known: np.ndarray) -> float:
    """The share of known pictures that the other seeds' centres put right; NaN for one seed."""
    order, seeds = np.arange(len(STYLES))[:, None], range(known.shape[2])
    if len(seeds) < 2:
        return np.nan
    return float(np.mean([nearest(known[:, :, [i]], np.delete(known, i, axis=2)) == order for i in seeds]))


def named_as_layout(store: Store, cases: Sequence[Case], point: Point, seeds: int) -> np.ndarray:
    """Which pictures (cases, seeds) the judge names as the layout, 0 or 1."""
    return names_are(store, cases, point, seeds, [case.layout for case in cases]).astype(float)


def check_layouts(store: Store) -> str:
    """What keeps the judge's names of drawn layouts from telling anything; "" where nothing does."""
    known = named_as_layout(store, removed(store.design), LAYOUT, 1).mean()
    return "" if known >= NAMED else f"the judge names {known:.0%} of the layouts"


def low(store: Store, cases: Sequence, point: Point) -> np.ndarray:
    """(..., seeds)"""
    return store.numbers(cases, [point], store.design.fewer).low[..., 0]


def style_transfer(store: Store) -> Result:
    design, grid = store.design, styled(store.design)
    known = store.vectors(known_styles(design), ALONE)  # (layouts, styles, seeds, D)
    is_right = nearest(store.vectors(grid, Point()), known) == np.arange(len(STYLES))[:, None]
    kept = np.stack([named_as_layout(store, row, Point(), design.fewer) for row in grid])
    nearer = low(store, grid, Point()) - low(store, grid, ALONE)
    style, kept, nearer = (
        np.moveaxis(x.astype(float), 1, 2) for x in (is_right, kept, nearer)
    )  # (layouts, seeds, styles)
    conditions = [
        Condition("share in the prompt's style", scalar(lambda d: float(d.mean()), style, 2), 0.5, True),
        Condition("share named as the layout", scalar(lambda d: float(d.mean()), kept, 2), 0.5, True),
        Condition("low, less that of the prompt alone", scalar(lambda d: float(d.mean()), nearer, 2), 0.1, True),
    ]
    right = accuracy(known)
    check = check_layouts(store) if right >= 0.6 else f"the styles' centres put {right:.0%} of pure pictures right"
    notes = [f"The styles' centres put {right:.0%} of the text-to-image pictures right; a quarter would be chance."]
    panel = Panel("style of the prompt", STYLES, {"share": curve(style, 2)})
    return Result([Verdict("Style transfer", conditions, check)], [panel], "", notes)


def mixing(store: Store, use: str, cases: Sequence[Case], seeds: int) -> Result:
    """Novel objects or breeds."""
    both = score(store, cases, [Point()], seeds).both
    found = scalar(partial(mean, axes=3), by_pair(cases, is_mixed(both)[..., 0]), 3)
    condition = Condition("share with min(a, b) of 0.25 or more", found, 0.5, True)
    return Result([Verdict(use, [condition], check_judge(store, cases))], [], "", [f"{use}: {left_out(both)}"])


def removal(store: Store) -> Result:
    grid, seeds = removed(store.design), store.design.fewer
    still, before = (named_as_layout(store, grid, point, seeds) for point in (REMOVED, Point()))
    conditions = [
        Condition("share still named so at s = -1", scalar(partial(mean, axes=2), still, 2), 0.25, False),
        Condition("low, the coarse layout", scalar(partial(mean, axes=2), low(store, grid, REMOVED), 2), 0.5, True),
    ]
    notes = [
        f"At s = 1 the judge names {before.mean():.0%} of the mixes of a layout with its own name so. The name's own "
        f"text-to-image pictures have {low(store, grid, ALONE).mean():.2f} of low against the layouts."
    ]
    return Result([Verdict("Concept removal", conditions, check_layouts(store))], [], "", notes)


def result_9(store: Store) -> Result:
    design = store.design
    uses = [
        style_transfer(store),
        mixing(store, "Novel objects", flat(crossed(design)), design.seeds),
        mixing(store, "Breed mixing", breeds(design), design.fewer),
        removal(store),
    ]
    return Result(
        [verdict for use in uses for verdict in use.verdicts],
        [panel for use in uses for panel in use.panels],
        "",
        [note for use in uses for note in use.notes],
    )


LOOPS = [Point(nu=nu, loop="unmixed carried") for nu in (0.5, 0.7, 0.9)]
LOOPS += [Point(loop=name) for name in cases.VARIANTS if name not in ("unmixed carried", "renoised")]


def needs_10(design: Design) -> Needs:
    return each(some(design), [*ANCHORS, *(Point(nu=point.nu) for point in LOOPS[:3]), *LOOPS])


def result_10(store: Store) -> Result:
    design, grid = store.design, some(store.design)
    found = [score(store, grid, points, design.fewer) for points in (LOOPS, [Point(nu=point.nu) for point in LOOPS])]
    out = left_out(found[0].both)
    theirs, ours = (Scores(*(by_pair(grid, x) for x in of)) for of in found)  # (layouts, contents, seeds, loops)
    less = ours.both - theirs.both
    verdicts = []
    for i, point in enumerate(LOOPS):
        if point.nu == 0.7:
            found = scalar(partial(mean, axes=3), less[..., i], 3)
            statement = f"The departure {point.loop!r} costs something"
            verdicts.append(Verdict(statement, [Condition("min(a, b) is lower by", found, 0.02, True)]))
    verdicts.sort(key=lambda verdict: "unmixed" not in verdict.statement)
    names = [point.loop for point in LOOPS[3:]]
    panels = [
        Panel("nu", [point.nu for point in LOOPS[:3]], {
            "min(a, b), this project": curve(ours.both[..., :3], 3),
            "min(a, b), unmixed carried": curve(theirs.both[..., :3], 3),
            "a, this project": curve(ours.a[..., :3], 3), "a, unmixed carried": curve(theirs.a[..., :3], 3)}),
        Panel("loop, less this project's", names, {
            "min(a, b)": curve(-less[..., 3:], 3), "a": curve((theirs.a - ours.a)[..., 3:], 3)}),
    ]  # fmt: skip
    return Result(verdicts, panels, out)


# -------------------------------------------------------------------------------------------------------- the defaults


def gains(store: Store) -> dict[Point, Condition]:
    """What the other points of the curves of claims 2 and 3 gain in min(a, b) against the default of that time."""
    names = [*(f"nu {nu:g}" for nu in NU), *(f"k_min {point.k_min:g}" for point in K_MINS[:-1])]  # the last is nu 1
    others = {point: name for point, name in zip([*NUS, *K_MINS[:-1]], names) if point != Point()}
    both = score(store, crossed(store.design), [*others, Point()], store.design.seeds).both
    found = several(lambda d: mean(d, 3), both[..., :-1] - both[..., -1:], 3)
    return {point: Condition(name, gain, 0.02, True) for (point, name), gain in zip(others.items(), found)}


def mixed_share(store: Store, point: Point) -> float:
    """The share of pictures that hold at least a quarter of both."""
    return float(mean(is_mixed(score(store, crossed(store.design), [point], store.design.seeds).both), 4))


# ------------------------------------------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        number: on the page.
        needs: design -> the points of each case that it needs.
        made_of: store -> the result, where all that is there; `result` also asks whether the judge can be trusted.
        judged: design -> the cases that the judge scores, in nested lists; none where its result asks itself.
    """

    number: int
    needs: Callable[[Design], Needs]
    made_of: Callable[[Store], Result]
    judged: Callable[[Design], Sequence] = lambda design: []

    def result(self, store: Store) -> Result:
        found = self.made_of(store)
        wrong = check_judge(store, self.judged(store.design))
        return found._replace(verdicts=[v._replace(check=v.check or wrong) for v in found.verdicts])


def check_judge(store: Store, cases: Sequence) -> str:
    """What keeps the judge's scores of these cases from telling anything; "" where nothing does."""
    named, out = [], []
    for case in flat(cases):
        alone = store.numbers(case, [ALONE], case.seeds)
        named += list(alone.named[:, 0] == judge().names.index(case.concept))
        if case.kind != "plain":
            layout = store.numbers(case, [LAYOUT], case.seeds)
            out += list(np.isnan(scores(alone, layout, alone).a[:, 0]))
    if named and np.mean(named) < NAMED:
        return f"the judge names {np.mean(named):.0%} of the contents alone"
    if out and np.mean(out) > LEFT_OUT:
        return f"{np.mean(out):.0%} of the scores are left out"
    return ""


CLAIMS = [
    Claim(1, needs_1, result_1),
    Claim(2, needs_2, result_2, crossed),
    Claim(3, needs_3, result_3, crossed),
    Claim(4, needs_4, result_4, lambda design: crossed(design, of=drawn(design))),
    Claim(5, needs_5, result_5, crossed),
    Claim(6, needs_6, result_6, crossed),
    Claim(7, needs_7, result_7, lambda design: [*plain(design), *some(design)]),
    Claim(8, needs_8, result_8, lambda design: [crossed(design, kind, drawn(design)) for kind in ("text", "mix")]),
    Claim(9, needs_9, result_9),
    Claim(10, needs_10, result_10, some),
]
