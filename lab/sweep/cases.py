"""The cases of lab.sweep.claims: what is mixed, how it is made with the fewest UNet calls, and the numbers kept of it.

A case is one layout and one content with its seeds, and has points: ways to mix it. All grid points of a case are one
plan of lab.sweep, so that they share their steps. What is kept of a picture are the numbers of scores.Numbers, in a
gzipped file with a line per case, rewritten whole after each case:

    {"design": ..., "columns": [...]}                              first
    {"case": ["mix", "castle", "a tiger", 8], "seconds": processor seconds, "calls": UNet calls,
     "points": {"0.6 0.15 0.7 1": {"numbers": [a row per seed], "vectors": [a row per seed, where a claim needs one]}}}
"""

import contextlib
import gzip
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import weights
from command import machine, options, pictures, request
from lab.audit.scene import Scene
from lab.audit.variants import DEPARTURES, PROGRAMS
from lab.sheets import LAYOUTS, PROMPTS, layout_path
from lab.sweep import folder, plan
from lab.sweep.grid import Cell, of
from lab.sweep.run import Batch, Failed, Walk
from lab.sweep.scores import JudgeEncoder, Numbers, as_saved, measure
from magicmix import Denoiser, Noise, TextLayout, mix, text_to_image
from scheduler import Schedule

STYLES = ("3d", "flat", "cartoon", "retro")
DRAWN = [f"a {name}" for name in "car house guitar crown rabbit mushroom rocket clock shoe horse".split()]
CONTENTS = [f"a {name}" for name in (*PROMPTS, "penguin", "bee")]
ANIMALS = [f"a {name}" for name in ("dog", "cat", "fox", "bear", "lion", "wolf")]
LAYOUT_SEED = 1000  # of drawn layouts
DIGITS = 4  # that are kept of each number


@dataclass(frozen=True)
class Design:
    """How large all is.

    Attributes:
        layouts: of each kind, pictures of docs/layouts and drawn ones.
        contents, animals: how many of each list.
        seeds, fewer: from 0; `fewer` where a claim needs other data.
        steps: T.
        dtype: in which the checkpoint computes.
    """

    layouts: int = 10
    contents: int = 10
    animals: int = 6
    seeds: int = 8
    fewer: int = 4
    steps: int = 50
    dtype: str = "fp32"


SMALL = {"layouts": 1, "contents": 2, "animals": 2, "seeds": 1, "fewer": 1, "steps": 4}


class Point(NamedTuple):
    """One way to mix. What is not given is the checkpoint's default when the claims were planned. `loop` is a loop of
    lab/audit by its name, or one of the two anchors."""

    k_max: float = 0.6
    k_min: float = 0.15
    nu: float = 0.7
    s: float = 1.0
    loop: str = ""

    @property
    def key(self) -> str:
        return " ".join([*(f"{value:g}" for value in self[:4]), self.loop]).strip()

    @property
    def is_grid(self) -> bool:
        return not self.loop

    def seeds(self, design: Design, case: "Case") -> int:
        """How many of the case's seeds it has."""
        has_all = (self.is_grid and self.s == 1) or self in (LAYOUT, ALONE) or case.kind == "plain"
        return case.seeds if has_all else min(case.seeds, design.fewer)


LAYOUT, ALONE = Point(loop="layout"), Point(loop="content alone")
VARIANTS = {v.name: v for v in (*PROGRAMS, *DEPARTURES)}


class Case(NamedTuple):
    """A layout and a content.

    Attributes:
        kind: "mix" with a picture, "text" with a prompt's trajectory, "plain" without a layout.
        layout: a name of docs/layouts, or a prompt, which "mix" has drawn; "" without.
        prompt: the content's; its last word is the concept.
        seeds: from 0.
    """

    kind: str
    layout: str
    prompt: str
    seeds: int

    @property
    def concept(self) -> str:
        return self.prompt.split()[-1]

    @property
    def has_style(self) -> bool:
        return any(style in self.prompt.split() for style in STYLES)


Needs = dict[Case, list[Point]]


def merged(all_needs: Sequence[Needs]) -> Needs:
    """What several claims need, each point once."""
    found: Needs = {}
    for needs in all_needs:
        for case, points in needs.items():
            found[case] = list(dict.fromkeys([*found.get(case, []), *points]))
    return found


# ---------------------------------------------------------------------------------------------------------- the store


@dataclass
class Store:
    """The numbers that are there.

    Attributes:
        path: of the file.
        design: of all that is in it.
        lines: case -> its line of the file.
    """

    path: Path
    design: Design
    lines: dict[Case, dict]

    def missing(self, needs: Needs) -> Needs:
        """What is needed and not there."""
        left = {case: [p for p in points if p.key not in self.points(case)] for case, points in needs.items()}
        return {case: points for case, points in left.items() if points}

    def points(self, case: Case) -> dict[str, dict]:
        return self.lines.get(case, {}).get("points", {})

    def add(self, case: Case, line: dict) -> None:
        """Takes up what was made of a case, and writes the file. Raises OSError."""
        old = self.lines.get(case, {"seconds": 0, "calls": 0, "points": {}})
        self.lines[case] = {
            "case": list(case),
            "seconds": round(old["seconds"] + line["seconds"], 1),
            "calls": old["calls"] + line["calls"],
            "points": old["points"] | line["points"],
        }
        head = {"design": asdict(self.design), "columns": list(Numbers._fields)}
        ordered = [head, *(self.lines[c] for c in sorted(self.lines))]  # the same numbers give the same file
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in ordered)
        content = gzip.compress(text.encode(), mtime=0)
        pictures.replace(self.path, "output", lambda file: file.write(content))

    def numbers(self, cases: Sequence, points: Sequence[Point], seeds: int) -> Numbers:
        """Numbers as arrays (..., seeds, points), for nested lists of cases. A layout's one row is every seed's."""
        rows = [self.rows(cases, point, seeds) for point in points]  # (..., seeds, columns) each
        return Numbers(*np.moveaxis(np.stack(rows, axis=-2), -1, 0))

    def rows(self, cases: Sequence, point: Point, seeds: int) -> np.ndarray:
        if not isinstance(cases, Case):
            return np.stack([self.rows(case, point, seeds) for case in cases])
        rows = np.asarray(self.points(cases)[point.key]["numbers"], dtype=np.float64)
        return np.broadcast_to(rows, (seeds, rows.shape[1])) if len(rows) == 1 else rows[:seeds]

    def vectors(self, cases: Sequence, point: Point) -> np.ndarray:
        """(..., seeds, D)"""
        if not isinstance(cases, Case):
            return np.stack([self.vectors(case, point) for case in cases])
        return np.asarray(self.points(cases)[point.key]["vectors"], dtype=np.float64)


def open_store(path: Path, design: Design | None = None) -> Store:
    """The file's numbers, of the design that it was begun with; with a design, none where there is no file. Raises
    ValueError for a file that is of another design or cannot be read, OSError."""
    where = f"scores {str(path)!r}"
    if not path.exists():
        if design is None:
            raise ValueError(f"{where} do not exist; run lab.sweep.claims first")
        return Store(path, design, {})
    try:
        head, *lines = map(json.loads, gzip.decompress(path.read_bytes()).decode().splitlines())
        before, columns = head["design"], head["columns"]
        design = Design(**before) if design is None else design
        store = Store(path, design, {Case(*line["case"]): line for line in lines})
    except (ValueError, KeyError, TypeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{where} cannot be read ({error}); move it away to begin anew") from error
    if before != asdict(design) or columns != list(Numbers._fields):
        differs = [name for name, value in asdict(design).items() if before.get(name) != value] or ["columns"]
        raise ValueError(f"{where} was begun with another {differs[0]}; give that, or move the file away to begin anew")
    return store


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other runs away from a folder, and removes what a killed one left half written. Raises ValueError where
    another run is at work, OSError."""
    path.mkdir(exist_ok=True)
    opened = os.open(path, os.O_RDONLY)
    try:
        folder.lock(opened, f"folder {str(path)!r}", "run")
        folder.remove_halves(path)
        yield
    finally:
        os.close(opened)


# ------------------------------------------------------------------------------------------------------------ making


class Studio:
    """Makes and measures cases, in one process.

    Args:
        design: how large all is.
        report: called at every UNet call of a grid.
    """

    def __init__(self, design: Design, report: Callable[[int], None] = lambda calls: None):
        self.design, self.report = design, report
        asked = request.Request({"device": "cpu", "dtype": design.dtype}, {}, range(0), [], None, None)
        self.models = weights.load(**asked.loading() | {"free_after_use": False})
        self.encoder = JudgeEncoder()
        self.plain: dict[tuple[str, range], Tensor] = {}
        self.trajectories: dict[tuple[str, range], dict[int, Tensor]] = {}
        self.calls = 0

    def count(self, calls: int) -> None:
        self.calls += calls
        self.report(calls)

    def trajectory(self, prompt: str, seeds: range) -> dict[int, Tensor]:
        """k -> x_k of a prompt alone, from T to 0; made once."""
        key = prompt, seeds
        if key not in self.trajectories:
            eps = self.noise(seeds)()
            steps = text_to_image(self.models, prompt, seeds=seeds, steps=self.design.steps)
            self.trajectories[key] = {self.design.steps: eps} | {step.k: step.x for step in steps}
            self.count(self.design.steps * len(seeds))
        return self.trajectories[key]

    def noise(self, seeds: range) -> Noise:
        return Noise(seeds, self.models.latent_size(self.models.size), self.models.device)

    def alone(self, prompt: str, seeds: range) -> Tensor:
        """Text-to-image, as saved (B, 3, H, W); made once."""
        if (prompt, seeds) not in self.plain:
            self.plain[prompt, seeds] = as_saved(self.models, self.trajectory(prompt, seeds)[0])
        return self.plain[prompt, seeds]

    def picture(self, layout: str) -> Image.Image:
        """A layout's picture, from docs/layouts or drawn."""
        if layout in LAYOUTS:
            return pictures.open_layout(layout_path(layout)).picture
        return pictures.to_images(self.alone(layout, range(LAYOUT_SEED, LAYOUT_SEED + 1)))[0]

    def lanes(self, case: Case, points: Sequence[Point]) -> list[plan.Lane]:
        """A picture's grid points as a plan; a lane's cells have its point's number."""
        cells = []
        for i, point in enumerate(points):
            given = {"layout": [case.layout], "prompt": [case.prompt], "steps": [self.design.steps]}
            given |= {"k_max": [point.k_max], "k_min": [point.k_min], "nu": [point.nu]}
            given |= {"token_weights": [(case.concept, [point.s])]} if point.s != 1 else {}
            cells += [Cell(i, cell.values) for cell in of(given | {"seed": self.seeds(case, point)}).cells()]
        lanes, refused = plan.lanes(cells, self.models.defaults, case.seeds)
        for cell, reason in refused:
            raise ValueError(f"point {points[cell.number].key}: {reason}")
        return lanes

    def seeds(self, case: Case, point: Point) -> range:
        return range(point.seeds(self.design, case))

    def mixing(self, point: Point) -> options.Options:
        mixing = {"steps": self.design.steps, "k_max": point.k_max, "k_min": point.k_min, "nu": point.nu}
        return options.of_mix(self.models.defaults, mixing)

    def loop(self, case: Case, point: Point) -> Tensor:
        """The final latents of a loop of lab/audit."""
        models, o, seeds = self.models, self.mixing(point), self.seeds(case, point)
        eps, layout = self.noise(seeds)(), pictures.fit(self.picture(case.layout), self.models.size)
        self.count(o.K_max * len(seeds))
        return Scene(models, o, case.prompt, layout, eps, eps).run(
            VARIANTS[point.loop]
        )  # a picture needs no second eps

    def into_text(self, case: Case, point: Point) -> Tensor:
        """The final latents of a mix into a prompt's trajectory, which all contents share."""
        o, seeds, schedule = (
            self.mixing(point),
            self.seeds(case, point),
            Schedule(self.models.schedule, self.design.steps),
        )
        layout = TextLayout(self.trajectory(case.layout, seeds))
        *_, last = mix(
            Denoiser(self.models, schedule, o, self.noise(seeds), case.prompt), layout, o.K_max, o.K_min, o.nu
        )
        self.count(o.K_max * len(seeds))
        return last.x

    def alone_with(self, case: Case, point: Point) -> Tensor:
        """The final latents of text-to-image with a token weight."""
        seeds, words = self.seeds(case, point), {case.concept: point.s}
        *_, last = text_to_image(self.models, case.prompt, seeds=seeds, steps=self.design.steps, token_weights=words)
        self.count(self.design.steps * len(seeds))
        return last.x

    def anchor(self, case: Case, point: Point) -> Tensor:
        """One of the two pictures that a case's scores are anchored at, as saved (1 or B, 3, H, W)."""
        if point == ALONE or case.kind == "plain":
            return self.alone(case.prompt, range(case.seeds))
        if case.kind == "text":
            return self.alone(case.layout, range(case.seeds))
        fitted = pictures.fit(self.picture(case.layout), self.models.size)
        return as_saved(self.models, self.models.vae.encode(fitted))

    def make(self, case: Case, points: Sequence[Point]) -> Iterator[tuple[Point, Tensor]]:
        """The pictures of a case's points, as saved (B, 3, H, W)."""
        grid = [point for point in points if point.is_grid and case.kind == "mix"]
        pictures_ = {case.layout: self.picture(case.layout)} if grid else {}
        for end in Walk(self.models, Batch(case.seeds, False), pictures_, self.count).run(self.lanes(case, grid)):
            if isinstance(end, Failed):
                raise ValueError(f"case {' '.join(case[:3])}: {end.reason}")
            yield grid[end.lane.cells[0].number], as_saved(self.models, end.x)
        for point in points:
            if point in (LAYOUT, ALONE):
                yield point, self.anchor(case, point)
            elif point not in grid:
                of_kind = {"mix": self.loop, "text": self.into_text, "plain": self.alone_with}
                yield point, as_saved(self.models, of_kind[case.kind](case, point))

    @torch.no_grad()
    def line(self, case: Case, points: Sequence[Point]) -> dict:
        """What is kept of a case's points."""
        began, self.calls, found = time.process_time(), 0, {}
        layout = self.anchor(case, LAYOUT)
        (text,) = self.encoder.texts([case.concept])
        for point, shown in self.make(case, points):
            measured = measure(shown, layout, text, self.encoder)
            entry = {"numbers": rounded(torch.stack([x.float() for x in measured], dim=1))}
            if case.has_style:
                entry["vectors"] = rounded(self.style(shown))
            elif case.kind == "plain" and point == ALONE:  # the likeness to every content's name
                entry["vectors"] = rounded(self.encoder.images(shown) @ self.encoder.texts(CONTENTS).T)
            found[point.key] = entry
        return {"seconds": time.process_time() - began, "calls": self.calls, "points": found}

    def style(self, shown: Tensor) -> Tensor:
        """Pictures (B, 3, 128, 128) -> (B, 192): means and standard deviations of the channels of the judge's second
        block."""
        x = self.encoder.judge.tower.features[:6](torch.nn.functional.avg_pool2d(shown, 2))  # (B, 96, 16, 16)
        return torch.cat([x.mean(dim=(2, 3)), x.std(dim=(2, 3))], dim=1)


def rounded(x: Tensor) -> list[list[float]]:
    return [[round(value, DIGITS) for value in row] for row in x.tolist()]


def calls(design: Design, needs: Needs, studio: Studio) -> tuple[int, int]:
    """What is needed in UNet calls, one per step and picture, and in pictures to decode and measure; each prompt's own
    pictures are made once."""
    total, shown, plain = 0, 0, set()
    for case, points in needs.items():
        if case.kind == "mix" and case.layout not in LAYOUTS:
            plain.add((case.layout, 1))
        elif case.kind == "text":
            plain.add((case.layout, case.seeds))
        if ALONE in points or case.kind == "plain":
            plain.add((case.prompt, case.seeds))
        grid = [point for point in points if point.is_grid and case.kind == "mix"]
        total += plan.calls(studio.lanes(case, grid))
        for point in points:
            count = point.seeds(design, case)
            if point not in (LAYOUT, ALONE, *grid):
                total += count * (design.steps if case.kind == "plain" else studio.mixing(point).K_max)
            shown += count
    return total + sum(design.steps * count for _, count in plain), shown


# ------------------------------------------------------------------------------------------------------- processes


def work(jobs: connection.Connection, design: Design) -> None:
    """A process of one thread: takes cases until there are no more, or until the process that sends them is gone."""
    machine.end_on_signals()
    torch.set_num_threads(1)
    parent = os.getppid()

    def still_wanted(_: int) -> None:
        if os.getppid() != parent:
            os._exit(1)

    studio = Studio(design, still_wanted)
    while True:
        try:
            case, points = jobs.recv()
        except EOFError:
            return
        try:
            done = studio.line(case, points)
        except Exception as error:  # is raised where the others are waited for
            done = error
        try:
            jobs.send((case, done))
        except BrokenPipeError:
            return


def run(store: Store, needs: Needs, processes: int) -> Iterator[tuple[Case, dict]]:
    """Makes what is missing, on so many cores, and keeps each case as soon as it is done. Raises what a process
    raises, once the others have ended."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that begin now
    todo = list(store.missing(needs).items())
    context, running = get_context("spawn"), {}
    try:
        for _ in range(min(processes, len(todo))):
            here, there = context.Pipe()
            process = context.Process(target=work, args=(there, store.design), daemon=True)
            process.start()
            there.close()
            running[here] = process
            here.send(todo.pop(0))
        idle = set()
        while len(idle) < len(running):
            for here in connection.wait(set(running) - idle):
                try:
                    case, done = here.recv()
                except EOFError:
                    running[here].join()
                    code = running[here].exitcode
                    raise ValueError(f"a process ended with code {code}; start again to go on") from None
                if isinstance(done, Exception):
                    raise done
                store.add(case, done)
                yield case, done
                if todo:
                    here.send(todo.pop(0))
                else:
                    idle.add(here)
    finally:
        for here, process in running.items():
            here.close()
            process.terminate()
            process.join()
