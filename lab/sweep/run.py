"""Walks a plan's tree, depth first, with the parts of magicmix.py.

Tracks are stretches of steps in flight: a mixture from K_max down, or a content from K_min down. Tracks under the same
Denoiser that are at the same k run in one UNet call; each then takes its own step, which is one step of `mix`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

import clip
from command import machine, pictures
from command import noise as noise_files
from lab.sweep import plan
from lab.sweep.grid import Cell, of
from lab.sweep.plan import Ends, Lane, Row, Start, Trunk, Under
from magicmix import Denoiser, ImageLayout, Noise, TextLayout, mix, trajectory
from scheduler import Schedule
from weights import Checkpoint, memory

LARGEST_CPU, LARGEST_GPU = 8, 64  # pictures in one UNet call, where nothing else is asked for
MOST_TEXTS = 1000  # prompts whose states are kept, some 0.5 MB each


class Batch(NamedTuple):
    """How many pictures one UNet call may have: of a cell's seeds, and, if it merges, of other cells as well."""

    size: int
    merges: bool

    def tracks(self, rows: int) -> int:
        """How many tracks of so many rows run together."""
        return max(1, self.size // rows) if self.merges else 1


class Done(NamedTuple):
    """A lane at its end.

    Attributes:
        x: the final latents (B, 4, H, W).
        sizes: how many pictures each UNet call had on the way, from the first step to the last.
    """

    lane: Lane
    x: Tensor
    sizes: list[int]

    def only(self, row: int) -> "Done":
        """One of its cells."""
        return Done(self.lane.only(row), self.x[row : row + 1], self.sizes)


class Failed(NamedTuple):
    """A lane that could not be made, and why."""

    lane: Lane
    reason: str


# ------------------------------------------------------------------------------------------------------------ noise


class Draws:
    """The noise of a trunk's rows: draws(i) is the i-th draw (B, 4, H, W), eps for i = 0, in the order in which
    magicmix.py draws them from the same seeds. What was drawn is kept, for the other tracks, and on the CPU: a device
    without memory must not lose a draw, since a second try would go on with the next one."""

    def __init__(self, rows: Sequence[Row], size: tuple[int, int], device: torch.device):
        self.noise, self.device = Noise([row.seed for row in rows], size, torch.device("cpu")), device
        eps = noise_files.first(self.noise)
        files = {path: noise_files.read(path) for path in {row.noise for row in rows if row.noise}}
        for i, row in enumerate(rows):
            if row.noise:
                eps = torch.cat([eps[:i], files[row.noise].rows(row.noise_row, eps[i : i + 1].shape), eps[i + 1 :]])
        self.made = [eps]

    def __call__(self, i: int) -> Tensor:
        while len(self.made) <= i:
            self.made.append(self.noise())
        return self.made[i].to(self.device)


@dataclass
class Onward:
    """Noise for one track: each call is the next draw."""

    draws: Draws
    i: int

    def __call__(self) -> Tensor:
        self.i += 1
        return self.draws(self.i - 1)


# ----------------------------------------------------------------------------------------------------------- tracks


@dataclass
class Track:
    """A stretch of steps in flight, from x = x_k down to `to`. This one is of the content alone.

    Attributes:
        noise: its draws, for samplers that need them.
        sizes: the pictures in each UNet call so far.
    """

    x: Tensor
    k: int
    to: int
    noise: Onward
    sizes: list[int]

    def take(self, x_content: Tensor, x0: Tensor, size: int) -> None:
        """One step, of which the UNet's part is done: (x'_{k-1}, predicted x0) of a call with `size` pictures."""
        self.x = x_content
        self.k -= 1
        self.sizes.append(size)

    def branch(self) -> "Track":
        """The content alone, from here down to 0."""
        return Track(self.x, self.k, 0, replace(self.noise), list(self.sizes))


@dataclass
class Mixture(Track):
    """A stretch in which a layout is mixed in.

    Attributes:
        layout: k -> layout_k, for k down to the lowest K_min.
        nu: the content's share.
        K_mins: where contents part from it.
        ends: K_min -> the track that has parted there: after the step from x_{K_min}, which is not mixed any more.
    """

    layout: Callable[[int], Tensor]
    nu: float
    K_mins: Sequence[int]
    ends: dict[int, Track] = field(default_factory=dict)

    def __post_init__(self):
        self.end_at_0()

    def end_at_0(self) -> None:
        """At K_min = 0 the end is the mixture itself."""
        if self.k == 0 and 0 in self.K_mins:
            self.ends[0] = self.branch()

    def take(self, x_content: Tensor, x0: Tensor, size: int) -> None:
        before = self.x
        super().take(x_content, x0, size)
        if self.k + 1 in self.K_mins:
            self.ends[self.k + 1] = self.branch()
        if self.k >= min(self.K_mins):  # one step of `mix`, which starts from x_k
            pair = TextLayout({self.k + 1: before, self.k: self.layout(self.k)})
            self.x = next(mix(lambda *_: (x_content, x0), pair, self.k + 1, 0, self.nu)).x
        self.end_at_0()


class Company:
    """The noise of a Denoiser that serves several tracks: of those that take the step, in their order."""

    def __init__(self):
        self.tracks: list[Track] = []

    def __call__(self) -> Tensor:
        return torch.cat([track.noise() for track in self.tracks])


def advance(denoise: Denoiser, tracks: Sequence[Track], report: Callable[[int], None]) -> None:
    """Takes tracks to their ends, each step of all that are at the highest k together. `report` is told how many
    pictures each call had."""
    while running := [track for track in tracks if track.k > track.to]:
        k = max(track.k for track in running)
        now = [track for track in running if track.k == k]
        rows = [len(track.x) for track in now]
        denoise.noise.tracks = now
        x_content, x0 = denoise(torch.cat([track.x for track in now]), k)
        for track, *parts in zip(now, x_content.split(rows), x0.split(rows)):
            track.take(*parts, sum(rows))
        report(sum(rows))
    denoise.noise.tracks = []  # they are large


# ------------------------------------------------------------------------------------------------------------ the walk


class Kept(dict):
    """A dictionary of the last MOST_TEXTS entries: text states are large, and a grid may have thousands of prompts."""

    def __setitem__(self, key: object, value: object) -> None:
        if len(self) >= MOST_TEXTS:
            del self[next(iter(self))]
        super().__setitem__(key, value)


class Once:
    """A text encoder that keeps what it has encoded."""

    def __init__(self, encoder: clip.CLIPTextModel):
        self.encoder, self.states = encoder, Kept()

    def __getattr__(self, name: str) -> object:
        return getattr(self.encoder, name)

    def __call__(self, ids: Tensor) -> Tensor:
        key = tuple(map(tuple, ids.tolist()))
        if key not in self.states:
            self.states[key] = self.encoder(ids)
        return self.states[key]


class Walk:
    """Executes lanes with one checkpoint.

    Args:
        models: from weights.load.
        batch: how many pictures run together.
        layouts: the pictures of layouts by name; others are read from the file of that name.
        report: told of every UNet call how many pictures it had.
        tell: told, in words, what is done to layouts.
    """

    def __init__(
        self,
        models: Checkpoint,
        batch: Batch,
        layouts: dict[str, Image] | None = None,
        report: Callable[[int], None] = lambda calls: None,
        tell: Callable[[str], None] = lambda line: None,
    ):
        self.models = replace(models, text_encoder=Once(models.text_encoder))
        self.batch, self.layouts, self.report, self.tell = batch, layouts or {}, report, tell
        self.encoded: dict[tuple, Tensor] = {}
        self.denoisers: dict[Under, Denoiser] = Kept()

    @torch.no_grad()
    def run(self, lanes: Sequence[Lane]) -> Iterator[Done | Failed]:
        """Every lane, Done or Failed, each as soon as it is. What fails is a ValueError, a FloatingPointError, an
        OSError of a layout or a noise file, or memory that is too small; other errors are raised. Where cells of a lane
        fail together, each is tried alone."""
        for end in self.together(lanes):
            if isinstance(end, Failed) and len(end.lane.cells) > 1:
                for row in range(len(end.lane.cells)):
                    yield from self.together([end.lane.only(row)])
            else:
                yield end

    def together(self, lanes: Sequence[Lane]) -> Iterator[Done | Failed]:
        """Every lane as it is."""
        for trunk, contents in plan.walk(lanes).items():
            of_trunk = list(plan.leaves({trunk: contents}))
            ((_, grown),) = self.attempt(partial(self.grow, trunk), [of_trunk])
            if isinstance(grown, str):
                yield from (Failed(lane, grown) for lane in of_trunk)
            else:
                yield from grown.run(contents)

    def grow(self, trunk: Trunk, groups: list[list[Lane]]) -> list["Grown"]:
        return [Grown(self, trunk, lanes) for lanes in groups]

    def attempt(self, work: Callable[[list], list], jobs: list) -> list[tuple]:
        """Each job with what `work` makes of it, or, in words, why it cannot. Where jobs fail together, each is tried
        alone."""
        try:
            return list(zip(jobs, work(jobs)))
        except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
            is_memory = machine.is_out_of_memory(error)
            if isinstance(error, RuntimeError) and not is_memory:
                raise
            reason = "out of memory; a smaller --batch or --size needs less" if is_memory else str(error)
        if len(jobs) == 1:
            return [(jobs[0], reason)]
        return [done for job in jobs for done in self.attempt(work, [job])]

    def denoiser(self, under: Under, lane: Lane, prompt: str, words: dict | None, schedule: Schedule) -> Denoiser:
        """The Denoiser of a content or a layout prompt, made once."""
        if under not in self.denoisers:
            self.denoisers[under] = Denoiser(self.models, schedule, lane.o, Company(), prompt, words)
        return self.denoisers[under]

    def latent(self, layout: str, size: tuple[int, int]) -> Tensor:
        """The latent (1, 4, H, W) of a layout's picture, encoded once."""
        if (layout, size) not in self.encoded:
            if layout in self.layouts:
                picture = self.layouts[layout]
            else:
                opened = pictures.open_layout(layout)
                picture = opened.picture
                for line in pictures.changes(opened, size):
                    self.tell(line.replace("layout", layout, 1))
            self.encoded[layout, size] = self.models.vae.encode(pictures.fit(picture, size).to(self.models.device))
        return self.encoded[layout, size]


class Grown:
    """A trunk that is there: its noise, and a text layout's trajectory. Raises what `Walk.run` takes for a failure."""

    def __init__(self, walk: Walk, trunk: Trunk, lanes: Sequence[Lane]):
        self.walk, self.trunk, self.latents, self.sizes = walk, trunk, {}, []
        models = walk.models
        self.size = models.latent_size(trunk.size)
        self.schedule = Schedule(models.schedule, trunk.steps)
        self.draws = Draws(trunk.rows, self.size, models.device)
        if trunk.along:
            self.schedule.warn_if_not_noise()
            along = walk.denoiser(trunk.along, lanes[0], lanes[0].layout, None, self.schedule)
            track = Track(self.draws(0), trunk.steps, 0, Onward(self.draws, 1), [])
            along.noise.tracks = [track]
            self.latents[trunk.steps] = track.x
            for step in trajectory(along, track.x, trunk.steps, min(lane.o.K_min for lane in lanes), "layout"):
                self.latents[step.k] = step.x
                self.sizes.append(len(step.x))
                walk.report(len(step.x))
            along.noise.tracks = []

    def layout(self, name: str) -> Callable[[int], Tensor]:
        """k -> layout_k."""
        if self.trunk.along:
            return TextLayout(self.latents)
        eps = self.draws(0)
        x0 = noise_files.matched(self.walk.latent(name, self.trunk.size), eps)
        return ImageLayout(self.schedule, x0, eps)

    def run(self, contents: dict[Under, dict[Start, Ends]]) -> Iterator[Done | Failed]:
        at_once, attempt = self.walk.batch.tracks(len(self.trunk.rows)), self.walk.attempt
        for under, starts in contents.items():
            for some in chunks(list(starts.items()), at_once):
                mixtures = []
                for (start, ends), begun in attempt(partial(self.begin, under), some):
                    if isinstance(begun, str):
                        yield from (Failed(lane, begun) for at in ends.values() for lane in chain(*at.values()))
                    else:
                        mixtures += [(start, begun, nu, at) for nu, at in ends.items()]
                for some_mixtures in chunks(mixtures, at_once):
                    yield from self.ends(under, some_mixtures, at_once)

    def ends(self, under: Under, mixtures: list[tuple], at_once: int) -> Iterator[Done | Failed]:
        """Mixtures that run together, and then the contents that part from them."""
        contents = []
        for (*_, at), parted in self.walk.attempt(partial(self.mix, under), mixtures):
            if isinstance(parted, str):
                yield from (Failed(lane, parted) for lane in chain(*at.values()))
            else:
                contents += [(parted[K_min], lanes) for K_min, lanes in sorted(at.items())]
        for some in chunks(contents, at_once):
            for (_, lanes), end in self.walk.attempt(partial(self.go_on, under), some):
                for lane in lanes:
                    if isinstance(end, str):
                        yield Failed(lane, end)
                    else:
                        yield Done(lane, end.x, self.sizes[: lane.o.steps - lane.o.K_min] + end.sizes)

    def begin(self, under: Under, starts: list[tuple[Start, Ends]]) -> list[Track]:
        """The step from x = layout_{K_max}."""
        tracks = []
        for start, _ in starts:
            x, noise = self.layout(start.layout)(start.K_max), Onward(self.draws, 1 + start.drawn)
            tracks.append(Track(x, start.K_max, max(0, start.K_max - 1), noise, []))
        advance(self.denoiser(under, starts[0][1]), tracks, self.walk.report)
        return tracks

    def denoiser(self, under: Under, ends: Ends) -> Denoiser:
        """The content's."""
        lane = next(chain(*(chain(*at.values()) for at in ends.values())))
        texts = [lane.layout] if lane.is_text else []
        self.walk.models.warn_if_untrained(self.size, lane.prompt, *texts, lane.o.negative)
        return self.walk.denoiser(under, lane, lane.prompt, lane.o.token_weights, self.schedule)

    def mix(self, under: Under, mixtures: list[tuple[Start, Track, float | None, dict]]) -> list[dict[int, Track]]:
        """Mixtures from K_max down to the lowest K_min of each -> K_min -> the track that parts there."""
        made = []
        for start, begun, nu, at in mixtures:
            layout, to = self.layout(start.layout), max(0, min(at) - 1)
            mixture = Mixture(layout(start.K_max), start.K_max, to, replace(begun.noise), [], layout, nu, list(at))
            if start.K_max > 0:
                mixture.take(begun.x, begun.x, *begun.sizes)
            made.append(mixture)
        advance(self.walk.denoisers[under], made, self.walk.report)
        return [mixture.ends for mixture in made]

    def go_on(self, under: Under, contents: list[tuple[Track, list[Lane]]]) -> list[Track]:
        """Contents from where they part down to 0."""
        tracks = [parted.branch() for parted, _ in contents]
        advance(self.walk.denoisers[under], tracks, self.walk.report)
        return tracks


def chunks(jobs: list, size: int) -> Iterator[list]:
    return (jobs[i : i + size] for i in range(0, len(jobs), size))


# --------------------------------------------------------------------------------------------------------- in Python


def automatic(models: Checkpoint, latent_size: tuple[int, int], rows: int) -> Batch:
    """The batch where none is asked for. On a CPU: the seeds of one cell, up to LARGEST_CPU, so that each picture has
    the bytes that magicmix.py --count gives it. On a GPU: up to LARGEST_GPU pictures of any cells. In both, as many as
    twice over fit in the free memory when they are decoded.

    Args:
        latent_size: (H, W) of the largest pictures.
        rows: how many rows of noise there are.
    """
    is_cpu = models.device.type == "cpu"
    most = min(LARGEST_CPU, rows) if is_cpu else LARGEST_GPU
    free = machine.free_memory(models.device)
    while most > 1 and 2 * memory.decoding_bytes(models.vae, latent_size, most) > free:
        most //= 2
    return Batch(most, merges=not is_cpu)


def latents(
    models: Checkpoint, given: dict, *, batch: int = 8, layouts: dict[str, Image] | None = None
) -> Iterator[tuple[Cell, Tensor]]:
    """The final latent (4, H, W) of every cell of a grid, in the order in which they are done.

    Args:
        models: from weights.load.
        given: option -> values, as lab.sweep.grid.of takes them; none of the options of a checkpoint's loading.
        batch: seeds in one UNet call, at most.
        layouts: PIL pictures by the names that "layout" has; other names are files.

    Raises ValueError for a grid that cannot be, and, naming the cell, for one that could not be made.
    """
    lanes, refused = plan.lanes(of(given).cells(), models.defaults, batch)
    for cell, reason in refused:
        raise ValueError(f"cell {cell.number}: {reason}")
    for end in Walk(models, Batch(batch, merges=False), layouts).run(lanes):
        if isinstance(end, Failed):
            raise ValueError(f"cell {end.lane.cells[0].number}: {end.reason}")
        yield from zip(end.lane.cells, end.x)
