"""Make a whole grid of mixes; cells that agree up to a step share the work up to it.

    python -m lab.sweep PROMPT... --layout IMAGE... --nu 0.5,0.6..0.9 --k-min 0..0.3/0.05 --seeds 0..7 -o FOLDER
    torchrun --nproc-per-node 8 -m lab.sweep -- PROMPT... --layout-prompt TEXT... -o FOLDER

Every option of magicmix.py that a picture depends on may have many values: 0.5,0.6..0.9 for numbers, where a..b/step is
a range and a..b counts in the last decimal place; several after one another for texts and files. docs/sweep.md says
more. Exit code 0: every cell is there; 1: some failed, and are listed; 2: nothing could be done, for one reason.
"""

from command import machine

if __name__ == "__main__":
    machine.begin()  # before torch's import, which Ctrl-C would abort with a traceback

import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch

import clip
import weights
from command import noise as noise_files
from command import options, pictures, request
from lab.sweep import grid, page, plan, ranks, show
from lab.sweep.folder import Folder, open_folder
from lab.sweep.grid import LOADING, NOISE, SINGLE, Cell, Grid
from lab.sweep.plan import Lane
from lab.sweep.ranks import Elsewhere, Ranks
from lab.sweep.run import Batch, Done, Failed, Walk, automatic
from magicmix import decode
from weights import memory

NOTHING = torch.empty(0)


@dataclass
class Sweep:
    """A sweep in one of its processes.

    Attributes:
        grid, given: what is asked for; the options that are not of the grid.
        ranks: this process among all.
        folder: where the pictures go.
        files: what is known of the layouts and the noise that are read, for what pictures record.
        done: the numbers and records of the cells that were there before.
    """

    grid: Grid
    given: dict
    ranks: Ranks
    folder: Folder
    files: dict[str, pictures.Layout | noise_files.NoiseFile]
    done: dict[int, dict]

    @property
    def quiet(self) -> bool:
        """Rank 0 alone speaks."""
        return self.given.get("quiet", False) or self.ranks.rank > 0

    def tell(self, *lines: object) -> None:
        if not self.quiet:
            for line in lines:
                print(line, flush=True)

    def run(self) -> list[Exception]:
        """Makes what is missing, one checkpoint after the other. Returns what ended this rank's share of it."""
        cells = self.grid.cells()  # the checkpoint's options are the outermost axes
        parts = [list(group) for _, group in groupby(cells, lambda c: [c.values.get(name) for name in LOADING])]
        errors = [self.run_part(f"part {number}", part, len(parts) == 1) for number, part in enumerate(parts)]
        return [error for error in errors if error]

    def run_part(self, name: str, cells: list[Cell], is_all: bool) -> Exception | None:
        """Makes the cells of one checkpoint. Where that cannot be used they fail. Raises ValueError if they are all, or
        if it is not what it was."""
        part, error = self.ranks.together(partial(Part, self, name, cells))
        refused = part.changed() if part else error if is_all else None
        if refused:
            raise refused if self.ranks.rank == 0 else Elsewhere()
        if part:
            return part.run()
        if "plan" in self.given:
            self.tell(f"{len(cells):,} cells would fail: {error}")
        elif self.ranks.rank == 0:
            for cell in cells:
                if cell.number not in self.done:
                    self.folder.record(0, cell=cell.number, status="failed", reason=str(error))
        return None

    def finish(self) -> int:
        """What rank 0 makes of all that is there. Returns how many cells failed."""
        lines = show.entries(self.folder, self.folder.records())
        show.write_index(self.folder, lines)
        page.write(self.folder, lines)
        self.tell(*show.write_sheets(self.folder, lines))
        self.tell(self.folder.path / "index.jsonl", self.folder.path / "page.html")
        reasons: dict[str, list[int]] = {}
        for line in lines:
            if line["status"] != "made":
                reasons.setdefault(line.get("reason", "not made"), []).append(line["cell"])
        for reason, failed in reasons.items():
            more = f" and {len(failed) - 5:,} others" if len(failed) > 5 else ""
            which = f"cell{'s' * (len(failed) > 1)} {', '.join(map(str, failed[:5]))}{more}"
            machine.say(f"lab.sweep: {which} failed: {machine.one_line(reason)}")
        return sum(map(len, reasons.values()))


class Part:
    """The cells of one checkpoint.

    Args:
        sweep: which they are part of.
        name: what the ranks call this part.
        cells: the cells.

    Raises ValueError or OSError for a checkpoint that cannot be loaded or whose pictures do not fit.
    """

    def __init__(self, sweep: Sweep, name: str, cells: list[Cell]):
        self.sweep, self.name, self.cells = sweep, name, cells
        loading = {name: value for name, value in cells[0].values.items() if name in LOADING}
        device = {name: value for name, value in sweep.given.items() if name == "device"}
        r = request.Request(device | loading, {}, range(0), [], None, None)
        self.models = weights.load(**r.loading() | {"free_after_use": False})  # they are used again and again
        # All that the numbers depend on and that the axes do not say.
        defaults = {name: value for name, value in self.models.defaults.items() if name not in cells[0].values}
        dtypes = [str(self.models.dtype), str(self.models.vae.post_quant_conv.weight.dtype)]
        digest = hashlib.sha256(json.dumps([self.models.identity, defaults, dtypes], sort_keys=True).encode())
        self.identity = digest.hexdigest()[:16]
        self.last = NOTHING, []  # the latents that were decoded last, and their pictures
        self.batch = self.fitting_batch() if sweep.ranks.rank == 0 else None

    def run(self) -> Exception | None:
        """Makes this rank's share of what is missing, and waits for the others. Returns what ended it."""
        sweep, world = self.sweep, self.sweep.ranks.world
        batch = sweep.ranks.from_first(lambda: self.batch)
        lanes, refused = plan.lanes(self.cells, self.models.defaults, batch.size)
        missing = [lane for lane in lanes if any(cell.number not in sweep.done for cell in lane.cells)]
        shares = plan.share(missing, world)
        sweep.tell(*self.models.notes, *self.cut_off(), *self.planned(lanes, missing, shares, batch))
        if "plan" in sweep.given:
            return None
        if sweep.ranks.rank == 0:
            for cell, reason in refused:
                sweep.folder.record(0, cell=cell.number, status="failed", reason=reason)
        self.bar = Bar(sweep, self.name, sum(map(plan.calls, shares)))
        self.walk = Walk(self.models, batch, report=self.bar.report, tell=self.bar.tell)
        with self.bar:
            error = self.make(shares[sweep.ranks.rank])
            sweep.ranks.wait(f"{self.name} ends", self.bar.refresh)
        return error

    def make(self, lanes: Sequence[Lane]) -> Exception | None:
        """Makes and writes lanes. Returns what ended it, so that the other ranks' work goes on before it is raised."""
        try:
            for end in self.walk.run(lanes):
                self.write(end)
        except Exception as error:
            if self.sweep.ranks.world == 1:
                raise
            return error
        return None

    # ----------------------------------------------------------------------------------------------- before the work

    def changed(self) -> ValueError | None:
        """What to say when cells that are there were made with another checkpoint."""
        made = {self.sweep.done[cell.number]["checkpoint"] for cell in self.cells if cell.number in self.sweep.done}
        if made <= {self.identity}:
            return None
        differs = "with another checkpoint, other defaults or another dtype than now"
        return ValueError(f"output {str(self.sweep.folder.path)!r} was begun {differs}; give a new name")

    def fitting_batch(self) -> Batch:
        """The batch that was asked for, or the automatic one. Raises ValueError for pictures that cannot fit."""
        axes, asked = self.sweep.grid.axes, self.sweep.given.get("batch")
        kind = options.FACTS["size"]["kind"]
        sizes = [kind.plain(size) for size in axes.get("size", [self.models.defaults["size"]])]
        largest, rows = max(sizes, key=math.prod), math.prod(len(axes.get(name, [0])) for name in NOISE)
        factor = self.models.vae.config.factor
        latent = tuple(side // factor for side in largest)
        batch = Batch(asked, True) if asked else automatic(self.models, latent, rows)
        needed = memory.decoding_bytes(self.models.vae, latent, min(batch.size, rows))
        machine.check_memory(needed, self.models.device, "--batch")
        return batch

    def planned(self, lanes: list[Lane], missing: list[Lane], shares: list[list[Lane]], batch: Batch) -> Iterator[str]:
        """The plan in words."""
        grid = self.sweep.grid
        shape = grid.shape() if len(self.cells) == len(grid) else f"{len(self.cells):,} cells of one checkpoint"
        yield f"{shape}: {plan.calls(lanes):,} UNet calls instead of {plan.calls_alone(lanes):,}"
        if len(missing) < len(lanes):
            there = sum(cell.number in self.sweep.done for cell in self.cells)
            yield f"{there:,} of {len(self.cells):,} pictures are there; {plan.calls(missing):,} UNet calls are left"
        if len(shares) > 1:
            each = [plan.calls(share) for share in shares]
            yield f"{len(shares)} ranks with {min(each):,} to {max(each):,} UNet calls each, {sum(each):,} in all"
        yield f"up to {batch.size} pictures in one call, {'of any cells' if batch.merges else 'the seeds of a cell'}"

    def cut_off(self) -> Iterator[str]:
        """What to say of texts that are not read to their end."""
        tokenizer = self.models.tokenizer
        for name in ("prompt", "layout_prompt", "negative"):
            for text in self.sweep.grid.axes.get(name, []):
                one = request.Request({name: text}, {}, range(0), [], None, None)
                yield from one.cut_off(lambda text: clip.cut_off(tokenizer, text), tokenizer.model_max_length)

    # ------------------------------------------------------------------------------------------------- what is made

    def write(self, end: Done | Failed) -> None:
        """Writes the pictures of a lane that are not there yet, and a line for each."""
        missing = [row for row, cell in enumerate(end.lane.cells) if cell.number not in self.sweep.done]
        if not missing:
            return
        ((_, made),) = self.walk.attempt(self.decoded, [end]) if isinstance(end, Done) else [(end, end.reason)]
        if isinstance(made, str) and len(end.lane.cells) > 1:  # each cell alone
            for row in missing:
                self.write(end.only(row))
            return
        for row in missing:
            cell, rank = end.lane.cells[row], self.sweep.ranks.rank
            if isinstance(made, str):
                self.sweep.folder.record(rank, cell=cell.number, status="failed", reason=made)
                continue
            metadata = self.metadata(cell, end.lane.o)
            pictures.save(made[row], self.sweep.folder.picture(cell), metadata)
            batch = [[len(list(run)), size] for size, run in groupby(end.sizes)]
            facts = {"parameters": metadata["parameters"], "batch": batch, "checkpoint": self.identity}
            self.sweep.folder.record(rank, cell=cell.number, status="made", **facts)

    def decoded(self, ends: list[Done]) -> list[list]:
        """The pictures of a lane, in one batch, as magicmix.py decodes them; lanes that end alike share them."""
        if self.last[0] is not ends[0].x:
            self.last = ends[0].x, decode(self.models, ends[0].x)
        return [self.last[1]]

    def metadata(self, cell: Cell, o: options.Options) -> dict:
        """What magicmix.py would write into the cell's picture."""
        given, files = cell.given, self.sweep.files
        layout, noise = (files.get(given.get(name)) for name in ("layout", "noise"))
        seeds = range(given["seed"], given["seed"] + 1)
        return request.Request(given, {}, seeds, [], layout, noise).metadata(0, o, self.models)


class Bar:
    """The progress bar of all ranks together, which rank 0 shows. A context.

    Args:
        sweep: whose ranks count.
        name: of the part.
        total: UNet calls of all ranks.
    """

    def __init__(self, sweep: Sweep, name: str, total: int):
        from tqdm import tqdm

        self.ranks, self.counter, self.quiet = sweep.ranks, f"{name} calls", sweep.quiet
        self.bar = tqdm(total=total, disable=sweep.quiet, unit="call")

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def report(self, calls: int) -> None:
        self.show(self.ranks.add(self.counter, calls))

    def refresh(self) -> None:
        self.show(self.ranks.add(self.counter, 0))

    def show(self, calls: int) -> None:
        self.bar.update(min(calls, self.bar.total) - self.bar.n)  # a retry counts twice

    def tell(self, line: str) -> None:
        if not self.quiet:
            machine.say(line)


# ------------------------------------------------------------------------------------------------------ the command


def read_files(axes: dict[str, list]) -> dict[str, pictures.Layout | noise_files.NoiseFile]:
    """Reads every layout and noise file once, so that what is wrong shows before the work; of each, what pictures
    record of it is kept, without the content. Raises ValueError or OSError."""
    layouts = {path: pictures.open_layout(path)._replace(picture=None) for path in axes.get("layout", [])}
    noise = {path: noise_files.read(path)._replace(eps=NOTHING) for path in axes.get("noise", [])}
    return layouts | noise


def begin(asked: dict, opened: list[Folder]) -> tuple:
    """What rank 0 does before all others: it checks what is asked for, reads the files, and opens the folder, which it
    appends, unless the plan alone is wanted. Returns the arguments of Sweep but for the ranks, and the folder by its
    name. Raises ValueError or OSError."""
    given = {name: value for name, value in asked.items() if name in (*SINGLE, "batch", "plan")}
    options.check({name: value for name, value in given.items() if name in SINGLE})
    try:
        grid.BATCH.check(given.get("batch", 1))
    except ValueError as error:
        raise ValueError(f"batch {error}") from None
    g = grid.of({name: value for name, value in asked.items() if name not in (*given, "output")})
    output = asked.get("output", "sweep")
    options.check({"output": output})
    files, done = read_files(g.axes), {}
    if "plan" not in given:
        opened.append(open_folder(output, g, {name: file.sha256 for name, file in files.items()}))
        done = {number: record for number, record in opened[0].records().items() if record["status"] == "made"}
    return g, given, output, files, done


def sweep(asked: dict, members: list[Ranks], failed: list[int]) -> None:
    """Does what the command line asks for; appends the ranks that it has joined, and how many cells failed. Raises
    ValueError or OSError."""
    joined = ranks.join(asked.get("device", "auto"))
    members.append(joined)
    opened: list[Folder] = []  # on rank 0, with its lock
    g, given, output, files, done = joined.from_first(partial(begin, asked, opened))
    this = Sweep(g, given, joined, opened[0] if opened else Folder(Path(output), g), files, done)
    errors = this.run()
    try:
        if joined.rank == 0 and "plan" not in given:
            failed.append(this.finish())
    finally:
        joined.wait("finished", lambda: None)  # torchrun ends all ranks when one ends with an error
    if errors:
        raise errors[0]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    speaks = contextlib.nullcontext() if ranks.is_first() else contextlib.redirect_stderr(open(os.devnull, "w"))
    try:
        with speaks:
            asked = grid.parse(argv, __doc__, weights.own_options(weights.TINY))
    except SystemExit:
        ranks.join("cpu").leave()
        raise
    failed: list[int] = []
    members: list[Ranks] = []
    quiet = asked.get("quiet", False) or not ranks.is_first()
    try:
        code = machine.run("lab.sweep", lambda: sweep(asked, members, failed), quiet, asked.get("debug", False))
    except Elsewhere:
        return 2
    finally:
        for joined in members:  # what there is to say has been said
            joined.leave()
    return code or int(sum(failed) > 0)


if __name__ == "__main__":
    sys.exit(main())
