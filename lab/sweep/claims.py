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
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from command import options
from lab.bench import page
from lab.sheets import DOCS
from lab.sweep import cases
from lab.sweep.cases import ALONE, CONTENTS, LAYOUT, Design, Point, Store
from lab.sweep.paper import (
    ANCHORS,
    CLAIMS,
    Claim,
    check_judge,
    crossed,
    drawn,
    each,
    gains,
    left_out,
    mixed_share,
    names_are,
)
from lab.sweep.scores import as_saved, measure, scores
from lab.sweep.verdict import HOLDS, Panel, Result, draw, shown, table
from magicmix import text_to_image

PAGE = DOCS / "claims.md"


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
    design, grid = store.design, crossed(store.design)
    layout, alone = (store.numbers(grid, [anchor], design.seeds) for anchor in ANCHORS)
    named = names_are(store, grid[0], ALONE, design.seeds, [case.prompt for case in grid[0]])  # (contents, seeds)
    of_drawn = [row[0] for row in crossed(design, of=drawn(design))]
    named_layouts = names_are(store, of_drawn, LAYOUT, 1, drawn(design))
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


def defaults_section(store: Store) -> str:
    """What other values than the checkpoint's defaults would gain, in Markdown."""
    if wrong := check_judge(store, crossed(store.design)):
        return f"Nothing can be told: {wrong}."
    found = gains(store)
    better = [point for point, gain in found.items() if gain.verdict == HOLDS]
    if better:
        best = max(better, key=lambda point: found[point].found.value)
        before, now = (f"{mixed_share(store, point):.0%}" for point in (Point(), best))
        says = f"{found[best].text} gains most. min(a, b) is 0.25 or more in {now} of its pictures, in {before} before."
    else:
        says = "None of them gains that much."
    return "\n".join(["| in place of the default | min(a, b) gains | bound | |", "|---|---|---|---|",
                      *(gain.line() for gain in found.values()), "", says])  # fmt: skip


def verdict_lines(results: dict[int, Result]) -> str:
    lines = ["| claim | verdict | measured |", "|---|---|---|"]
    for number, result in results.items():
        for verdict in result.verdicts:
            c = verdict.deciding
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
    if {1, 2, 3} <= results.keys():
        shares = [results[3].panels[0], results[2].panels[0], results[1].panels[1]]
        draw(folder / "shares.svg", shares)  # the README's: a and b over nu, k_min and k_max
        page.write(page_path, "defaults", defaults_section(store))
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


def make(store: Store, chosen: Sequence[Claim], processes: int, quiet: bool) -> None:
    """Makes what the claims need and is not there. Raises ValueError or OSError."""
    needs = cases.merged([claim.needs(store.design) for claim in chosen])
    left = store.missing(needs)
    print(f"{len(needs) - len(left):,} of {len(needs):,} cases are there", flush=True)
    calls, _ = cases.calls(store.design, left, cases.Studio(store.design))
    with tqdm(total=calls, unit="call", disable=quiet) as bar:
        for case, line in cases.run(store, needs, processes):
            bar.set_postfix_str(" ".join(case[:3]))
            bar.update(min(line["calls"], calls - bar.n))  # each process makes a prompt's own pictures once


def claims(asked: argparse.Namespace) -> None:
    """Does what the command line asks for. Raises ValueError or OSError."""
    if asked.small and asked.page == PAGE:
        raise ValueError("small is a trial, not for docs/claims.md; give --page COPY.md too")
    if not asked.page.is_file():
        raise ValueError(f"page {str(asked.page)!r} does not exist; give docs/claims.md or a copy of it")
    design = Design(dtype=asked.dtype, **(cases.SMALL if asked.small else {}))
    folder = asked.page.with_suffix("")
    path = folder / "scores.jsonl.gz"
    if asked.plan:
        return machine.show(plan_lines(cases.open_store(path, design), asked.only, asked.processes))
    if not asked.plots:
        with cases.locked(folder):
            make(cases.open_store(path, design), asked.only, asked.processes, asked.quiet)
    machine.show(write(asked.page, cases.open_store(path), asked.only))
    print(asked.page)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = options.Parser(
        "lab.sweep.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="print the plan, measure the speed, and end")
    what.add_argument("--plots", action="store_true", help="tables and plots from whatever numbers are there")
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
