"""The uses of claim 9 as pictures, docs/claims/uses.png: layouts above, their mixtures below, with what was measured.

    python -m lab.sweep.uses        after lab.sweep.claims; a minute or two

Nothing is chosen: the first of each list, in its order, with the seed 0. Each use has two rows:

    style transfer    below the mixture the style and the name that it has for the judge
    novel objects     a, b
    breed mixing      a, b
    concept removal   the name that the mixture with s = -1 has for the judge, and low
"""

from command import machine

if __name__ == "__main__":
    machine.begin()  # before torch's import, which Ctrl-C would abort with a traceback

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from command import options, pictures
from command.sheet import contact_sheet
from lab.sweep import cases
from lab.sweep.cases import ALONE, ANIMALS, STYLES, Case, Point, Store, Studio
from lab.sweep.claims import PAGE
from lab.sweep.paper import CLAIMS, REMOVED, crossed, judge, known_styles, nearest, removed, score, styled

COLUMNS = 6


class Use(NamedTuple):
    """A mixture to show, and what was measured of it with the seed 0."""

    case: Case
    point: Point
    measured: str

    @property
    def asked(self) -> str:
        layout, prompt, s = self.case.layout, self.case.prompt, self.point.s
        if s != 1:
            return f"{layout}, s = {s:g}"
        return f"{layout} + {prompt.split()[1]}" if self.case.has_style else f"{layout} + {prompt}"


def uses(store: Store) -> Iterator[list[Use]]:
    """The four uses in the order of the page, at most COLUMNS mixtures of each."""
    design = store.design

    def named(case: Case, point: Point) -> str:
        return judge().names[int(store.numbers(case, [point], 1).named[0, 0])]

    def shares(case: Case) -> str:
        found = score(store, case, [Point()], 1)
        return f"a {found.a[0, 0]:.2f}, b {found.b[0, 0]:.2f}"

    known = store.vectors(known_styles(design), ALONE)  # (layouts, styles, seeds, D)
    style = nearest(store.vectors(styled(design), Point()), known)[..., 0]  # (layouts, styles)
    transfers = [(row[i % len(STYLES)], STYLES[style[i, i % len(STYLES)]]) for i, row in enumerate(styled(design))]
    yield [Use(case, Point(), f"{found}, {named(case, Point())}") for case, found in transfers[:COLUMNS]]

    novel = [row[i] for i, row in enumerate(crossed(design)[: min(COLUMNS, design.contents)])]
    yield [Use(case, Point(), shares(case)) for case in novel]

    animals = ANIMALS[: min(COLUMNS, design.animals)]
    bred = [Case("mix", one, other, design.fewer) for one, other in zip(animals, [*animals[1:], animals[0]])]
    yield [Use(case, Point(), shares(case)) for case in bred]

    low = [store.numbers(case, [REMOVED], 1).low[0, 0] for case in removed(design)[:COLUMNS]]
    yield [Use(case, REMOVED, f"{named(case, REMOVED)}, low {x:.2f}") for case, x in zip(removed(design), low)]


@torch.no_grad()
def sheet(store: Store) -> Image.Image:
    """The pictures, the same that were measured. Raises ValueError where numbers are missing."""
    if left := store.missing(CLAIMS[8].needs(store.design)):
        raise ValueError(f"claim 9 lacks {len(left):,} cases; run lab.sweep.claims --only 9 first")
    torch.set_num_threads(1)  # as lab.sweep.claims has them; more would round otherwise
    studio, shown, captions = Studio(store.design), [], []
    for row in uses(store):
        blank = COLUMNS - len(row)
        above = [studio.picture(use.case.layout) for use in row]
        below = [pictures.to_images(next(studio.make(use.case, [use.point]))[1][:1])[0] for use in row]
        white = Image.new("RGB", below[0].size, "white")
        for line in (above, below):
            shown += [picture.resize(white.size) for picture in line] + [white] * blank
        captions += [use.asked for use in row] + [""] * blank
        captions += [use.measured for use in row] + [""] * blank
    return contact_sheet(shown, captions, COLUMNS)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = options.Parser("lab.sweep.uses", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="the page that numbers lie beside")
    asked = parser.parse_args(sys.argv[1:] if argv is None else argv)
    folder = asked.page.with_suffix("")

    def work() -> None:
        found = sheet(cases.open_store(folder / "scores.jsonl.gz"))
        pictures.replace(folder / "uses.png", "output", lambda file: found.save(file, format="PNG", optimize=True))
        print(folder / "uses.png")

    return machine.run("lab.sweep.uses", work)


if __name__ == "__main__":
    sys.exit(main())
