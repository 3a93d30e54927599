"""Claims: verdicts on made-up curves, the plan's calls, a run that is killed and goes on, and the page it ends in."""

import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import magicmix
from command import pictures
from command.sheet import LABEL, MARGIN
from lab.audit.variants import diffusers
from lab.sheets import layout_path
from lab.sweep import cases, paper, uses, verdict
from lab.sweep.cases import ALONE, LAYOUT, Case, Design, Point, Store, Studio
from lab.sweep.claims import defaults_section, main
from lab.sweep.paper import CLAIMS, FEW, HIGHER, K_MINS, NU, NUS
from lab.sweep.scores import Interval, JudgeEncoder, Numbers
from lab.sweep.verdict import FAILS, HOLDS, OPEN, Condition, Verdict, spearman
from scheduler import Schedule

# ------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("low", "high", "at_least", "at_most"),
    [
        (0.2, 0.4, HOLDS, FAILS),
        (0.1, 0.4, HOLDS, OPEN),  # the bound itself is reached
        (0.0, 0.4, OPEN, OPEN),
        (0.0, 0.1, OPEN, HOLDS),
        (0.0, 0.05, FAILS, HOLDS),
        (math.nan, math.nan, OPEN, OPEN),
    ],
)
def test_a_condition(low, high, at_least, at_most):
    found = Interval((low + high) / 2, low, high)
    assert Condition("", found, 0.1, True).verdict == at_least
    assert Condition("", found, 0.1, False).verdict == at_most


def test_a_verdict_is_that_of_its_conditions():
    one = {HOLDS: Interval(1, 1, 1), FAILS: Interval(0, 0, 0), OPEN: Interval(0.5, 0, 1)}
    for words, expected in [([HOLDS, HOLDS], HOLDS), ([HOLDS, OPEN], OPEN), ([OPEN, FAILS], FAILS), ([FAILS], FAILS)]:
        conditions = [Condition("", one[word], 0.9, True) for word in words]
        assert Verdict("", conditions).word == Verdict("", conditions).deciding.verdict == expected
        assert Verdict("", conditions, "the measure is blind").word == OPEN


DESIGN = Design(layouts=3, contents=4, animals=3, seeds=4, fewer=4)


def made_up(tmp_path, number, answer, noise=0.02, design=DESIGN):
    """A claim's result on made-up numbers."""
    claim = CLAIMS[number - 1]
    return claim.result(filled(tmp_path, claim.needs(design), answer, noise, design))


def filled(tmp_path, needs, answer, noise=0.02, design=DESIGN):
    """Numbers that `answer` gives: (case, point) -> those that are not what pure pictures have."""
    rng, names = np.random.default_rng(0), JudgeEncoder().names
    store = Store(tmp_path / "scores.jsonl.gz", design, {})
    for case, points in needs.items():
        line = {"case": list(case), "seconds": 1, "calls": 1, "points": {}}
        for point in points:
            plain = {"A": 0.0, "B": 0.6, "named": names.index(case.concept), "grey": 0.2, "overlap": 0.5}
            if point == LAYOUT:
                plain = {"A": 1.0, "B": 0.0, "low": 1.0, "high": 1.0, "overlap": 1.0}
            rows = []
            for _ in range(case.seeds):
                values = dict.fromkeys(Numbers._fields, 0.0) | plain | (answer(case, point) or {})
                if point not in (LAYOUT, ALONE):
                    spread = noise * rng.normal(size=len(values))
                    values = {n: v + e * (n != "named") for (n, v), e in zip(values.items(), spread)}
                rows.append([values[name] for name in Numbers._fields])
            entry = {"numbers": rows}
            if case.kind == "plain":
                entry["vectors"] = [[0.6 * (prompt == case.prompt) for prompt in cases.CONTENTS]] * case.seeds
            line["points"][point.key] = entry
        store.lines[case] = line
    return store


def words(result):
    return [v.word for v in result.verdicts]


def test_claim_1(tmp_path):
    """Low stays where high goes; both go alike; both stay."""
    highs = {point: high for point, high in zip(HIGHER, (0.8, 0.5, 0.2, 0.1))}
    lows = {point: low for point, low in zip(HIGHER, (0.9, 0.8, 0.7, 0.6))}
    keep = lambda case, point: {"low": lows[point], "high": highs[point]} if point in highs else None
    alike = lambda case, point: {"low": highs[point], "high": highs[point]} if point in highs else None
    stay = lambda case, point: {"low": 0.8, "high": 0.8} if point in highs else None
    assert words(made_up(tmp_path, 1, keep)) == [HOLDS]
    assert words(made_up(tmp_path, 1, alike)) == [FAILS]
    assert words(made_up(tmp_path, 1, stay)) == [FAILS]
    assert words(made_up(tmp_path, 1, keep, noise=3)) == [OPEN]
    found = made_up(tmp_path, 1, keep, noise=0).verdicts[0].conditions
    assert np.abs([c.found.value for c in found] - np.array([0.7, 0.6, 0.6 / 0.9 - 0.1 / 0.8])).max() < 1e-9


def test_claim_2(tmp_path):
    def falling(case, point):
        return {"A": 0.9 - point.k_min} if point in K_MINS else None

    assert words(made_up(tmp_path, 2, falling)) == [HOLDS]
    assert words(made_up(tmp_path, 2, lambda case, point: {"A": 0.5} if point in K_MINS else None)) == [FAILS]
    assert words(made_up(tmp_path, 2, falling, noise=3)) == [OPEN]
    not_known = lambda case, point: {"named": 137.0} if point == ALONE else falling(case, point)
    found = made_up(tmp_path, 2, not_known)
    assert words(found) == [OPEN] and "the judge names 0% of the contents alone" in found.verdicts[0].check
    near = lambda case, point: {"A": 0.9} if point == ALONE and case.layout in cases.DRAWN else falling(case, point)
    found = made_up(tmp_path, 2, near)
    assert words(found) == [OPEN] and "50% of the scores are left out" in found.verdicts[0].check
    assert found.left_out == "48 of 96 are left out, whose anchors are less than 0.2 apart."


def test_claim_3(tmp_path):
    """A straight line, a step, and a curve that turns back."""

    def along(shape):
        places = dict(zip(NUS, NU))
        return lambda case, point: {"A": 1 - shape(places[point]), "B": 0.6 * shape(places[point])} if (
            point in places) else None  # fmt: skip

    assert words(made_up(tmp_path, 3, along(lambda nu: nu))) == [HOLDS, HOLDS]
    assert words(made_up(tmp_path, 3, along(lambda nu: nu**4))) == [HOLDS, FAILS]
    assert words(made_up(tmp_path, 3, along(lambda nu: 4 * nu * (1 - nu) + nu)))[0] == FAILS
    assert words(made_up(tmp_path, 3, along(lambda nu: nu), noise=3))[1] == OPEN
    line = np.array([1 - 2 * nu for nu in NU])
    assert np.abs(paper.bends(line)).max() < 1e-12
    assert np.abs(paper.bends(line + np.array([0, 0.3, 0, -0.1, 0, 0])) - [0.15, 0, -0.05, 0]).max() < 1e-12


def test_the_interval_of_an_absolute_value():
    for found, expected in [((1, -1, 2), (1, 0, 2)), ((-1, -3, -0.5), (1, 0.5, 3)), ((2, 1, 3), (2, 1, 3))]:
        assert verdict.size(Interval(*found)) == expected


def test_the_defaults(tmp_path):
    """Another value becomes the default where its whole interval is above 0.02; of two, the one that gains more."""
    needs = cases.merged([CLAIMS[i].needs(DESIGN) for i in (1, 2)])
    both = {Point(): 0.4, Point(nu=0.8): 0.55, Point(k_min=0.08): 0.5, Point(nu=0.5): 0.41}  # A and B of min(a, b)
    answer = lambda case, point: {"A": both[point], "B": 0.6 * both[point]} if point in both else None
    store = filled(tmp_path, needs, answer, noise=0)
    found = {gain.text: gain for gain in paper.gains(store).values()}
    better = [name for name, gain in found.items() if gain.verdict == HOLDS]
    assert len(found) == 8 and better == ["nu 0.8", "k_min 0.08"]
    assert abs(found["nu 0.8"].found.value - 0.15) < 1e-9 and abs(found["nu 0.5"].found.value - 0.01) < 1e-9
    assert abs(found["k_min 0.08"].found.value - 0.1) < 1e-9
    share = "min(a, b) is 0.25 or more in 100% of its pictures, in 100% before."
    assert defaults_section(store).endswith(f"\nnu 0.8 gains most. {share}")
    low = both | {Point(): 0.2}
    answer = lambda case, point: {"A": low[point], "B": 0.6 * low[point]} if point in low else None
    assert "in 100% of its pictures, in 0% before." in defaults_section(filled(tmp_path, needs, answer, noise=0))
    alike = filled(tmp_path, needs, lambda case, point: {"A": 0.4, "B": 0.24} if point in both else None)
    assert defaults_section(alike).endswith("\nNone of them gains that much.")
    unknown = filled(tmp_path, needs, lambda case, point: {"named": 137.0} if point == ALONE else answer(case, point))
    assert defaults_section(unknown) == "Nothing can be told: the judge names 0% of the contents alone."


def test_pairs_that_were_not_made_are_nan():
    """Three of four pairs, found by layout and content, whatever their order; the mean is that of what was made."""
    pairs = [Case("mix", "y", "q", 1), Case("mix", "x", "p", 1), Case("mix", "y", "p", 1)]
    found = paper.by_pair(pairs, np.array([[1.0], [2.0], [6.0]]))  # rows y, x; columns q, p
    assert found.shape == (2, 2, 1) and np.isnan(found[1, 0, 0])
    assert found[0, 0, 0] == 1 and found[1, 1, 0] == 2 and found[0, 1, 0] == 6
    assert paper.mean(found, 3) == 3


def test_claim_4(tmp_path):
    """The best nu follows the likeness of the names, or goes against it."""
    design = Design(layouts=8, contents=8, seeds=2, fewer=2)
    judge, places = JudgeEncoder(), dict(zip(NUS, NU))

    def best(sign):
        def answer(case, point):
            (x,), (y,) = judge.texts([case.layout]), judge.texts([case.prompt])
            peak = float(np.clip(0.7 - sign * float(x @ y), 0.5, 1))
            return {"A": 1 - abs(places[point] - peak), "B": 0.6} if point in places else None

        return answer

    assert words(made_up(tmp_path, 4, best(1), 0, design)) == [HOLDS]
    assert words(made_up(tmp_path, 4, best(-1), 0, design)) == [FAILS]
    none = made_up(tmp_path, 4, lambda case, point: {"A": 0.0} if point in places else None, 0, design)
    assert words(none) == [OPEN] and "without one: 64" in none.notes[0]


def test_claim_5(tmp_path):
    few = lambda grey, b: lambda case, point: {"grey": grey, "B": 0.6 * b} if point in FEW else None
    assert words(made_up(tmp_path, 5, few(0.02, 0.0), 0.001)) == [HOLDS]
    assert words(made_up(tmp_path, 5, few(0.1, 0.0), 0.001)) == [FAILS]
    assert words(made_up(tmp_path, 5, few(0.02, 0.5), 0.001)) == [FAILS]


def test_claim_6(tmp_path):
    """min(a, b) follows the overlap, from nothing on; it does so from far above nothing on; it does not."""
    design = Design(layouts=6, contents=8, seeds=2)
    pairs = sum(paper.crossed(design), [])
    places = {case: 0.1 + 0.8 * (i * 37 % len(pairs)) / len(pairs) for i, case in enumerate(pairs)}

    def follows(base, slope):
        def answer(case, point):
            if point == ALONE:
                return {"overlap": places[case]}
            return {"A": base + slope * places[case], "B": 0.6} if point in NUS else None

        return answer

    assert words(made_up(tmp_path, 6, follows(0.0, 0.6), 0, design)) == [HOLDS]
    assert words(made_up(tmp_path, 6, follows(0.5, 0.4), 0, design)) == [FAILS]
    assert words(made_up(tmp_path, 6, follows(0.9, -0.9), 0, design)) == [FAILS]

    store = filled(tmp_path, CLAIMS[5].needs(design), follows(0.0, 0.6), 0, design)
    store.lines[pairs[0]]["points"][ALONE.key]["numbers"][0][0] = 0.9  # A, of the one seed that chooses
    found = CLAIMS[5].result(store)
    assert words(found) == [HOLDS] and np.isnan(found.panels[0].ys).sum() == 1


def test_claim_7(tmp_path):
    def answer(twice):
        B = {-1.0: 0.0, 0.0: 0.0, 0.5: 0.3, 1.0: 0.6, 2.0: twice}
        return lambda case, point: {"B": B[point.s], "A": 0.5} if point not in (ALONE, LAYOUT) else None

    assert words(made_up(tmp_path, 7, answer(0.75), 0.001)) == [HOLDS]
    assert words(made_up(tmp_path, 7, answer(0.6), 0.001)) == [FAILS]
    assert words(made_up(tmp_path, 7, answer(0.75), 2)) == [OPEN]


def test_claim_8(tmp_path):
    def answer(apart, spread):
        rng = np.random.default_rng(0)
        return lambda case, point: {
            "A": 0.5 + spread * (case.kind == "text") * rng.normal(), "apart": apart if case.kind == "text" else 0.1
        } if point == Point() else None  # fmt: skip

    design = Design(layouts=6, contents=6, seeds=8)
    assert words(made_up(tmp_path, 8, answer(0.3, 0.2), 0.001, design)) == [HOLDS]
    assert words(made_up(tmp_path, 8, answer(0.1, 0.2), 0.001, design)) == [FAILS]
    assert words(made_up(tmp_path, 8, answer(0.3, 0.0), 0.001, design)) == [FAILS]
    data = np.array([[1.0, 2.0, np.nan, 6.0], [1.0, np.nan, np.nan, np.nan]])
    found = paper.deviation(data, axis=1)
    assert abs(found[0] - np.std([1, 2, 6], ddof=1)) < 1e-12 and np.isnan(found[1])


def test_claim_9_styles():
    """Features near their own concept's centre of a style are put right, in units of their spread; a picture does not
    help to put itself right."""
    rng = np.random.default_rng(0)
    places = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1000.0], [1.0, 1000.0]])
    concepts = np.stack([places[rng.permutation(4)] for _ in range(5)])  # each concept has its own
    known = concepts[:, :, None] + rng.normal(size=(5, 4, 3, 2)) * [0.01, 10.0]
    assert (paper.nearest(known, known) == np.arange(4)[:, None]).all() and paper.accuracy(known) == 1
    assert paper.nearest(known + [0.3, 30.0], known).tolist() == paper.nearest(known, known).tolist()
    noise = rng.normal(size=(40, 4, 3, 50))
    assert abs(paper.accuracy(noise) - 0.25) < 0.06 and math.isnan(paper.accuracy(known[:, :, :1]))


def test_claim_10(tmp_path):
    def answer(loop):
        return lambda case, point: {"A": 0.1} if point.loop == loop else {"A": 0.4} if (
            point not in (ALONE, LAYOUT)) else None  # fmt: skip

    for loop in ("unmixed carried", "one level off"):
        found = {v.statement: v.word for v in made_up(tmp_path, 10, answer(loop), 0.001).verdicts}
        assert len(found) == 7
        for statement, word in found.items():
            assert word == (HOLDS if loop in statement else FAILS), statement


def test_rank_correlation():
    """1 - 6 sum(d^2) / (n (n^2 - 1)) without ties; the correlation of mean ranks with them; NaN counts for nothing."""
    x, y = np.array([1.0, 2, 3, 4, 5]), np.array([10.0, 30, 20, 50, 40])
    assert abs(spearman(x, y) - (1 - 6 * 4 / (5 * 24))) < 1e-12
    assert abs(spearman(x, -(x**3)) + 1) < 1e-12
    ties = np.corrcoef([1.5, 1.5, 3, 4], [1, 2.5, 2.5, 4])[0, 1]
    assert abs(spearman(np.array([1.0, 1, 2, 3]), np.array([0.0, 5, 5, 9])) - ties) < 1e-12
    assert abs(spearman(np.append(x, np.nan), np.append(y, 0.0)) - spearman(x, y)) < 1e-12
    assert math.isnan(spearman(x, np.ones(5))) and math.isnan(spearman(np.array([]), np.array([])))


# --------------------------------------------------------------------------------------------------------------- cases


SMALL = Design(**cases.SMALL)
TEN = Design(**cases.SMALL | {"steps": 10})


@pytest.fixture(scope="module")
def studio():
    return Studio(TEN)


def test_the_full_plan():
    """20 layouts, 10 contents and 8 seeds; what each claim needs is what its text says; keys are unique."""
    design = Design()
    needs = cases.merged([claim.needs(design) for claim in CLAIMS])
    main_ = [case for case, points in needs.items() if NUS[1] in points]
    assert len(main_) == 200 and {case.seeds for case in main_} == {8}
    assert len({case.layout for case in main_}) == 20 and len({case.prompt for case in main_}) == 10
    assert all(
        set(points) >= {*HIGHER, *K_MINS, *NUS, *FEW, LAYOUT, ALONE} for c, points in needs.items() if c in main_
    )
    assert len([c for c in needs if c.kind == "text"]) == 100 and len(paper.some(design)) == 40
    assert len({(c.prompt) for c in paper.some(design)}) == 10
    assert [len(set(map(lambda p: p.key, points))) for points in needs.values()] == [*map(len, needs.values())]
    assert design.contents == len(cases.CONTENTS) and design.layouts == len(cases.DRAWN)


def test_the_calls_of_a_case(studio):
    """T = 10: K_max 6 and K_min 2. The mixtures of three nu share their first step; k_min 0.6 is no mixing; a content
    alone is counted once for two layouts."""
    one, other = Case("mix", "teapot", "a tiger", 2), Case("mix", "castle", "a tiger", 2)
    points = [Point(nu=0.5), Point(nu=0.7), Point(k_min=0.6), LAYOUT]
    assert cases.calls(TEN, {one: points}, studio) == (2 * (1 + 3 * 5), 8)
    assert cases.calls(TEN, {one: [*points, ALONE], other: [ALONE]}, studio)[0] == 2 * 16 + 2 * 10
    text = Case("text", "a car", "a tiger", 1)
    assert cases.calls(TEN, {text: [Point(), LAYOUT, ALONE]}, studio)[0] == 6 + 10 + 10
    drawn = Case("mix", "a car", "a tiger", 1)
    assert cases.calls(TEN, {drawn: [Point(loop="diffusers"), LAYOUT]}, studio)[0] == 6 + 10


@torch.no_grad()
def test_a_case_is_what_magicmix_makes(studio, models):
    """A case's numbers against pictures by magicmix.py, or by a loop of lab/audit, measured anew, at 1e-4; and its
    calls are the plan's."""
    judge, seeds = JudgeEncoder().judge, [0, 1]
    layout = pictures.fit(pictures.open_layout(layout_path("teapot")).picture, (128, 128))
    case = Case("mix", "teapot", "a tiger", 2)
    points = [Point(), Point(k_max=0.4, k_min=0.2, nu=0.5), Point(s=-1.0), Point(loop="diffusers"), LAYOUT, ALONE]
    line = studio.line(case, points)
    assert line["calls"] == cases.calls(TEN, {case: points}, studio)[0]

    def expected(x):
        shown = torch.cat([pictures.fit(p, (128, 128)) for p in magicmix.decode(models, x)])
        own = pictures.fit(magicmix.decode(models, models.vae.encode(layout))[0], (128, 128))
        features, text = judge.tower(shown), judge.texts[judge.names.index("tiger")]
        return features @ judge.tower(own)[0], features @ text, (shown - own).abs().mean(dim=(1, 2, 3)) / 2

    def final(steps):
        *_, last = steps
        return last.x

    given = {"seeds": seeds, "steps": 10}
    k_min = {"k_min": Point().k_min}
    schedule, eps = Schedule(models.schedule, 10), magicmix.Noise([0], (16, 16), models.device)
    o = studio.mixing(Point())
    content = magicmix.Denoiser(models, schedule, o, eps, "a tiger")
    latents = [
        final(magicmix.magicmix(models, "a tiger", layout, **given, **k_min)),
        final(magicmix.magicmix(models, "a tiger", layout, k_max=0.4, k_min=0.2, nu=0.5, **given)),
        final(magicmix.magicmix(models, "a tiger", layout, steps=10, token_weights={"tiger": -1.0}, **k_min)),
        diffusers(content, magicmix.ImageLayout(schedule, models.vae.encode(layout), eps()), o),
        models.vae.encode(layout),
        final(magicmix.text_to_image(models, "a tiger", **given)),
    ]
    for point, x in zip(points, latents):
        rows = torch.tensor(line["points"][point.key]["numbers"])
        assert len(rows) == len(x)
        for name, values in zip(("A", "B", "grey"), expected(x)):
            assert (rows[:, Numbers._fields.index(name)] - values).abs().max() < 2e-4, (point, name)


@torch.no_grad()
def test_text_layouts_and_plain_cases(studio, models):
    """Into a prompt's trajectory as magicmix.py mixes, anchored at its end; text-to-image with token weights."""
    judge = JudgeEncoder().judge

    def features(steps):
        *_, last = steps
        return judge.tower(pictures.fit(magicmix.decode(models, last.x)[0], (128, 128)))[0]

    A, B = (Numbers._fields.index(name) for name in "AB")
    points = studio.line(Case("text", "a car", "a tiger", 1), [Point(), LAYOUT])["points"]
    mixed, own = (
        features(magicmix.magicmix(models, "a tiger", "a car", steps=10, k_min=Point().k_min)),
        features(magicmix.text_to_image(models, "a car", steps=10)),
    )
    assert abs(points[Point().key]["numbers"][0][A] - mixed @ own) < 2e-4
    assert abs(points[LAYOUT.key]["numbers"][0][A] - 1) < 2e-4
    points = studio.line(Case("plain", "", "a tiger", 1), [Point(s=2.0), ALONE])["points"]
    strong = features(magicmix.text_to_image(models, "a tiger", steps=10, token_weights={"tiger": 2.0}))
    text = judge.texts[judge.names.index("tiger")]
    assert abs(points[Point(s=2.0).key]["numbers"][0][B] - strong @ text) < 2e-4
    assert abs(points[ALONE.key]["vectors"][0][0] - points[ALONE.key]["numbers"][0][B]) < 2e-4  # CONTENTS[0]


# --------------------------------------------------------------------------------------------------------- the command


def trial(tmp_path):
    return Path(shutil.copy(ROOT / "docs" / "claims.md", tmp_path / "claims.md"))


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ends(pid, seconds):
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        state = re.search(r"\) (\w)", Path(f"/proc/{pid}/stat").read_text()) if Path(f"/proc/{pid}").exists() else None
        if state is None or state[1] == "Z":
            return True
        time.sleep(0.1)
    return False


def read(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def test_a_run_that_is_killed_goes_on(tmp_path, capsys):
    """kill -9 after some cases: they are there, whole; the processes end; the next run makes the rest and none again;
    the page and the plots are the same when they are made again from the numbers."""
    page = trial(tmp_path)
    before, scores = page.read_text(), tmp_path / "claims" / "scores.jsonl.gz"
    command = [sys.executable, "-m", "lab.sweep.claims", "--small", "--page", str(page), "-q", "--only", "2"]
    command += ["--processes", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not (scores.exists() and len(read(scores)) > 1):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.1)
    started = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(started) >= 2 and all(ends(pid, 20) for pid in started)
    head, *kept = read(scores)
    assert page.read_text() == before

    small = ["--small", "--page", str(page), "-q"]
    assert main(["--plots", *small]) == 0  # what is there is too little for any claim
    assert "claim 2: " in (out := capsys.readouterr().out) and "cases are missing" in out
    assert main(["--processes", "1", *small]) == 0
    assert "claim 10: The departure 'unmixed carried'" in capsys.readouterr().out
    _, *lines = read(scores)
    needs = cases.merged([claim.needs(SMALL) for claim in CLAIMS])
    assert {Case(*line["case"]) for line in lines} == set(needs)
    assert sum(len(line["points"]) for line in lines) == sum(map(len, needs.values()))
    for line in kept:  # a case that was there keeps its points, and gets those that other claims need
        (now,) = [after for after in lines if after["case"] == line["case"]]
        assert now["points"].items() >= line["points"].items()

    text = page.read_text()
    assert "Nothing has been run yet." not in text and text.count("![Claim ") == 10
    made = {path: path.read_bytes() for path in (tmp_path / "claims").iterdir()}
    assert len(made) == 12  # the numbers, a plot per claim, the README's
    for path in made:
        if path.suffix == ".svg":
            assert b"date" not in path.read_bytes().lower()
            path.unlink()
    assert main(["--plots", "--page", str(page)]) == 0  # of whatever size the numbers are
    assert page.read_text() == text
    assert {path: path.read_bytes() for path in (tmp_path / "claims").iterdir()} == made
    prose = re.sub(r"<!-- (.+?) -->.*?<!-- end of \1 -->", "", text, flags=re.DOTALL)
    assert prose == re.sub(r"<!-- (.+?) -->.*?<!-- end of \1 -->", "", before, flags=re.DOTALL)


@torch.no_grad()
def test_the_uses_are_shown(tmp_path, models, capsys):
    """The sheet holds the layout, the mixture that magicmix makes, and the numbers that the scores' formula gives."""
    page = trial(tmp_path)
    assert uses.main(["--page", str(page)]) == 2
    assert "do not exist" in capsys.readouterr().err
    small = ["--small", "--page", str(page), "-q", "--processes", "1"]
    assert main(["--only", "2", *small]) == 0 and uses.main(["--page", str(page)]) == 2
    assert "claim 9 lacks" in capsys.readouterr().err
    assert main(["--only", "9", *small]) == 0 and uses.main(["--page", str(page)]) == 0
    store = cases.open_store(tmp_path / "claims" / "scores.jsonl.gz")
    rows = list(uses.uses(store))
    assert [[use.asked for use in row] for row in rows] == [
        ["a car + 3d"],
        ["teapot + a tiger", "a car + a panda"],
        ["a dog + a cat", "a cat + a dog"],
        ["a car, s = -1"],
    ]
    points = store.points(Case("mix", "teapot", "a tiger", 1))
    (mixed, layout, alone) = (points[point.key]["numbers"][0] for point in (Point(), LAYOUT, ALONE))
    a, b = (mixed[0] - alone[0]) / (layout[0] - alone[0]), (mixed[1] - layout[1]) / (alone[1] - layout[1])
    assert rows[1][0].measured == f"a {a:.2f}, b {b:.2f}"

    picture = Image.open(tmp_path / "claims" / "uses.png")
    across, down = 128 + MARGIN, 128 + MARGIN + LABEL
    assert picture.size == (MARGIN + uses.COLUMNS * across, MARGIN + 8 * down)
    *_, last = magicmix.magicmix(models, "a tiger", layout_path("teapot"), steps=4, k_min=Point().k_min)
    for row, expected in [(2, Image.open(layout_path("teapot"))), (3, magicmix.decode(models, last.x)[0])]:
        x, y = MARGIN, MARGIN + row * down
        shown = np.asarray(picture.crop((x, y, x + 128, y + 128)), dtype=int)
        assert np.abs(shown - np.asarray(expected.convert("RGB"), dtype=int)).max() == 0


def test_what_cannot_be_run(tmp_path, capsys):
    page = trial(tmp_path)

    def refused(*arguments):
        assert main([*map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("lab.sweep.claims: "), error
        return error

    assert "give --page COPY.md too" in refused("--small")
    assert "does not exist" in refused("--page", tmp_path / "none.md")
    assert "do not exist; run lab.sweep.claims first" in refused("--plots", "--page", page)
    scores = tmp_path / "claims" / "scores.jsonl.gz"
    scores.parent.mkdir()
    Store(scores, SMALL, {}).add(Case("plain", "", "a tiger", 1), {"seconds": 1, "calls": 1, "points": {}})
    whole = scores.read_bytes()
    assert "was begun with another layouts" in refused("--page", page)
    assert "was begun with another dtype" in refused("--small", "--dtype", "bf16", "--page", page)
    for content in (whole[:-10], b"no gzip", gzip.compress(b"{}\n")):
        scores.write_bytes(content)
        assert "cannot be read" in refused("--plots", "--small", "--page", page)
        assert scores.read_bytes() == content
    with pytest.raises(SystemExit) as stopped:
        main(["--only", "2,11"])
    assert stopped.value.code == 2 and "'11' is no claim" in capsys.readouterr().err


def test_one_run_at_a_time(tmp_path, capsys):
    """A second run is refused while the first lives; what a kill left half written goes; afterwards all is free."""
    page = trial(tmp_path)
    (tmp_path / "claims").mkdir()
    half, other = tmp_path / "claims" / ".magicmix-0.tmp", tmp_path / "claims" / "other.svg"
    half.touch(), other.touch()
    with cases.locked(tmp_path / "claims"):
        assert other.exists() and not half.exists()
        assert main(["--small", "--page", str(page), "-q"]) == 2
        assert "is being written by another run" in capsys.readouterr().err
        Store(tmp_path / "claims" / "scores.jsonl.gz", SMALL, {}).add(
            Case("plain", "", "a tiger", 1), {"seconds": 1, "calls": 1, "points": {}}
        )
        assert main(["--page", str(page), "--plots"]) == 0
    with cases.locked(tmp_path / "claims"):
        pass


def test_a_case_that_fails_is_told_and_what_was_made_stays(tmp_path):
    store = Store(tmp_path / "scores.jsonl.gz", SMALL, {})
    good, bad = Case("plain", "", "a tiger", 1), Case("plain", "", "a teapot", 1)
    with pytest.raises(ValueError, match="the judge knows"):
        list(cases.run(store, {good: [ALONE], bad: [ALONE]}, 1))
    assert list(cases.open_store(store.path, SMALL).lines) == [good]


def test_plots_are_drawn(tmp_path):
    """A curve's points stand where their values are: two points' heights in the SVG are as far apart as the values."""
    found = Interval(np.array([0.0, 1.0, 0.25]), np.array([-0.1, 0.9, 0.2]), np.array([0.1, 1.1, 0.3]))
    verdict.draw(tmp_path / "p.svg", [verdict.Panel("nu", [0.0, 0.5, 1.0], {"a": found})])
    text = (tmp_path / "p.svg").read_text()
    line = max(re.findall(r'<path d="M ([^"]+?)" clip-path="[^"]+" style="fill: none; stroke: #1f77b4', text), key=len)
    points = np.array([[float(v) for v in part.split()] for part in re.split(r"L", line)])
    assert points.shape == (3, 2)
    (x0, y0), (x1, y1), (x2, y2) = points
    assert abs((x1 - x0) - (x2 - x1)) < 1e-3 and abs((y2 - y0) / (y1 - y0) - 0.25) < 1e-4
    assert verdict.table(verdict.Panel("nu", [0.0, 0.5, 1.0], {"a": found}))[2:] == [
        "| a | 0.00 (-0.10 .. 0.10) | 1.00 (0.90 .. 1.10) | 0.25 (0.20 .. 0.30) |"
    ]
    assert os.listdir(tmp_path) == ["p.svg"]
