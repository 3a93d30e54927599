"""How much of its layout and of its content a mixture holds, for a sweep that is made.

    python -m lab.sweep.scores FOLDER                          a sweep by the embedded checkpoint, with its own judge
    python -m lab.sweep.scores FOLDER --encoder ID-OR-FOLDER   any other: a CLIP model, through transformers

With a similarity A to the layout and B to the content, of a mixture m and of two pictures of the same seed,

    a = (A(m) - A(content alone)) / (A(layout) - A(content alone))
    b = (B(m) - B(layout)) / (B(content alone) - B(layout))

so that the layout has a = 1 and b = 0, the content alone a = 0 and b = 1, and a picture that is neither has little of
both. The layout is its picture after the autoencoder, or the end of a text layout's own trajectory. The content alone
is text-to-image with the content's prompt, without token weights. A is between pictures, since a layout is one picture
and need have no name; B is between picture and text. Pictures are compared as they are saved, in grey levels.

Writes FOLDER/scores.jsonl, a line per picture, and prints a table per axis, with 95 % intervals of a bootstrap over
seeds and over cases, which are all other options together.
"""

from command import machine

if __name__ == "__main__":
    machine.begin()  # before torch's import, which Ctrl-C would abort with a traceback

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import weights
from command import options, pictures, request
from lab.sweep.grid import LOADING
from lab.sweep.plan import Row
from lab.sweep.run import Draws, Onward
from lab.training.judge import Judge
from magicmix import decode, text_to_image
from weights import Checkpoint

MARGIN = 0.2  # of the judge's A or B between the anchors; below it, what a seed makes of them would be a large share
FOREGROUND = 25 / 255  # how far below white a pixel's darkest colour must be
BLOCK = 8  # pixels of a block's side whose average is the low frequencies'
COLOURS = 4  # bins of each colour
RESAMPLES = 1000
PLAIN = ("steps", "guidance", "negative", "sampler", "eta", "size")  # options of a mix that text-to-image has too

# --------------------------------------------------------------------------------------------------------- encoders


class Encoder(Protocol):
    """What compares pictures with pictures and texts.

    Attributes:
        name: for tables.
        limits: what it cannot tell, in a sentence.
        margins: of A and of B, how far apart two anchors must be.
        known: features (n, D) of the names that it gives to pictures; None for an encoder without names.
    """

    name: str
    limits: str
    margins: tuple[float, float]
    known: Tensor | None

    def images(self, shown: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> unit features (B, D)."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit features (n, D). Raises ValueError for one that it does not know."""


class JudgeEncoder:
    """lab/training's judge, for the embedded checkpoint."""

    name = "the embedded judge"
    limits = "It knows emoji of 138 concepts and nothing else, and names them whatever their place, colour and style."
    margins = MARGIN, MARGIN

    def __init__(self):
        self.judge = Judge()
        self.names, self.known = self.judge.names, self.judge.texts

    @torch.no_grad()
    def images(self, shown: Tensor) -> Tensor:
        return self.judge.tower(
            F.interpolate(shown, (128, 128), mode="area") if shown.shape[-2:] != (128, 128) else shown
        )

    def texts(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([self.known[self.names.index(self.concept(text))] for text in texts])

    def concept(self, text: str) -> str:
        """The concept that a text names, "a tiger" or "tiger". Raises ValueError for any other text."""
        concept = text.removeprefix("a ").removeprefix("an ")
        if concept not in self.names:
            known = 'the judge knows "a NAME" only, with a name of magicmix.py --concepts'
            raise ValueError(f"prompt {machine.shown(text)} has no score: {known}; give --encoder")
        return concept


class CLIPEncoder:
    """A CLIP image and text model.

    Args:
        source: a hub id or a folder, as transformers reads it, with safetensors.

    Raises ValueError for what is none, OSError for what cannot be read.
    """

    limits = "It was trained on photographs with captions, and weighs things more than places."
    margins = 0.1, 0.03  # its cosines lie closer together, those of pictures and texts within some tenths
    known = None

    def __init__(self, source: str):
        from transformers import CLIPConfig, CLIPModel, CLIPProcessor

        self.name = source
        try:
            kind = CLIPConfig.get_config_dict(source)[0].get("model_type")
            if kind != "clip":
                raise ValueError(f"it is of the type {kind}")
            self.model, report = CLIPModel.from_pretrained(source, use_safetensors=True, output_loading_info=True)
            if report["missing_keys"]:
                raise ValueError(f"it has no {sorted(report['missing_keys'])[0]}")
            self.processor = CLIPProcessor.from_pretrained(source)
        except (ValueError, OSError) as error:
            what = "a CLIP model with image and text, such as openai/clip-vit-base-patch32"
            raise ValueError(f"encoder {machine.shown(source)} cannot be used: {error}; give {what}") from error
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def images(self, shown: Tensor) -> Tensor:
        given = self.processor(images=pictures.to_images(shown), return_tensors="pt")
        return F.normalize(self.model.get_image_features(**given).pooler_output, dim=-1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        given = self.processor(text=list(texts), return_tensors="pt", padding=True, truncation=True)
        return F.normalize(self.model.get_text_features(**given).pooler_output, dim=-1)


# ------------------------------------------------------------------------------------------- measures without encoder


def silhouettes(shown: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1], on white -> (B, H, W), where there is foreground: pixels whose darkest colour
    is more than FOREGROUND below white, and what they enclose. White things on white have none."""
    is_white = (1 - shown.amin(dim=1)) / 2 <= FOREGROUND + 1e-6  # (B, H, W); 25 grey levels below are white
    is_white = F.pad(is_white, (1, 1, 1, 1), value=True)
    outside, before = torch.zeros_like(is_white), None
    outside[:, 0] = True
    while before is None or not torch.equal(outside, before):  # white that is reached from there, not across corners
        before = outside.clone()
        outside[:, 1:] |= before[:, :-1]
        outside[:, :-1] |= before[:, 1:]
        outside[:, :, 1:] |= before[:, :, :-1]
        outside[:, :, :-1] |= before[:, :, 1:]
        outside &= is_white
    return ~outside[:, 1:-1, 1:-1]


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Silhouettes (B, H, W) -> (B,), intersection over union; 0 where both are empty."""
    return (a & b).sum(dim=(1, 2)) / (a | b).sum(dim=(1, 2)).clamp(min=1)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """(B, ...) twice -> Pearson's correlation (B,); 0 where one has no variance."""
    a, b = (x.flatten(1) - x.flatten(1).mean(dim=1, keepdim=True) for x in (a, b))
    norm = a.norm(dim=1) * b.norm(dim=1)
    return (a * b).sum(dim=1) / norm.clamp(min=1e-3)


def frequencies(shown: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, H, W) -> their averages over blocks (B, 3, H / 8, W / 8), and what is left of the pictures."""
    low = F.avg_pool2d(shown, BLOCK)
    return low, shown - F.interpolate(low, scale_factor=BLOCK)


def histogram(shown: Tensor, foreground: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] and silhouettes -> shares of foreground pixels (B, 64) per colour; 0 where there
    are none."""
    bins = ((shown + 1) / 2 * COLOURS).long().clamp(0, COLOURS - 1)  # (B, 3, H, W)
    number = (bins[:, 0] * COLOURS + bins[:, 1]) * COLOURS + bins[:, 2]  # (B, H, W)
    counts = torch.zeros(len(shown), COLOURS**3).scatter_add_(1, number.flatten(1), foreground.flatten(1).float())
    return counts / foreground.sum(dim=(1, 2)).clamp(min=1)[:, None]


# ------------------------------------------------------------------------------------------------------ a picture's


class Numbers(NamedTuple):
    """What is measured of pictures, (B,) each. All but B and named are similarities to the layout or differences from
    it.

    Attributes:
        A: cosine of the encoder's features of the picture and of the layout.
        B: cosine of those of the picture and of the content's text.
        named: the number of the encoder's name for the picture; -1 for encoders without names.
        overlap, low, high, colours: the measures without an encoder; 1 for the layout itself.
        grey: mean absolute difference, 0 .. 1.
        apart: 1 - cosine, mean over the batch's other pictures; 0 where there is none.
    """

    A: Tensor
    B: Tensor
    named: Tensor
    overlap: Tensor
    low: Tensor
    high: Tensor
    colours: Tensor
    grey: Tensor
    apart: Tensor


def measure(shown: Tensor, layout: Tensor, text: Tensor, encoder: Encoder) -> Numbers:
    """The numbers of pictures.

    Args:
        shown: (B, 3, H, W) in [-1, 1], of one case and several seeds.
        layout: (1 or B, 3, H, W).
        text: the content's feature, (D,).
    """
    count = len(shown)
    features, own = encoder.images(shown), encoder.images(layout)  # (B, D), (1 or B, D)
    ours, theirs = silhouettes(shown), silhouettes(layout)  # (B, H, W), (1 or B, H, W)
    (low, high), (layout_low, layout_high) = frequencies(shown), frequencies(layout)
    named = torch.full((count,), -1) if encoder.known is None else (features @ encoder.known.T).argmax(dim=1)
    alike = features @ features.T
    return Numbers(
        A=(features * own).sum(dim=1),
        B=features @ text,
        named=named,
        overlap=overlap(ours, theirs),
        low=correlation(low, layout_low),
        high=correlation(high, layout_high),
        colours=torch.minimum(histogram(shown, ours), histogram(layout, theirs)).sum(dim=1),
        grey=(shown - layout).abs().mean(dim=(1, 2, 3)) / 2,
        apart=1 - (alike.sum(dim=1) - alike.diagonal()) / (count - 1) if count > 1 else torch.zeros(count),
    )


def as_saved(models: Checkpoint, x: Tensor) -> Tensor:
    """Latents (B, 4, h, w) -> pictures (B, 3, H, W) in [-1, 1] on the CPU, in grey levels as files hold them."""
    return torch.cat([pictures.fit(picture, picture.size[::-1]) for picture in decode(models, x)])


# --------------------------------------------------------------------------------------------------------- the scores


class Scores(NamedTuple):
    a: np.ndarray
    b: np.ndarray
    both: np.ndarray  # min(a, b)
    harmonic: np.ndarray  # 2ab / (a + b)
    difference: np.ndarray  # a - b


HEAD = ("a", "b", "min(a, b)", "2ab / (a + b)", "a - b")


def anchored(value: np.ndarray, zero: np.ndarray, one: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """(value - zero) / (one - zero); NaN where one - zero is not above 0, or below the margin."""
    apart = one - zero
    is_wide = (apart > 0) & (apart >= margin)
    return np.where(is_wide, value - zero, np.nan) / np.where(is_wide, apart, 1)


def scores(m: Numbers, layout: Numbers, alone: Numbers, margins: tuple[float, float] = JudgeEncoder.margins) -> Scores:
    """The scores of mixtures from their numbers and those of their anchors, arrays of shapes that broadcast. NaN, all
    five, where either pair of anchors is nearer than its margin. 2ab / (a + b) is 0 where a or b is not above 0."""
    a, b = anchored(m.A, alone.A, layout.A, margins[0]), anchored(m.B, layout.B, alone.B, margins[1])
    a, b = np.where(np.isnan(b), np.nan, a), np.where(np.isnan(a), np.nan, b)
    both = np.minimum(a, b)
    is_mixed = both > 0
    harmonic = np.where(is_mixed, 2 * a * b, 0 * both) / np.where(is_mixed, a + b, 1)
    return Scores(a, b, both, harmonic, a - b)


class Interval(NamedTuple):
    """A statistic, one number or an array, and its 95 % interval."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], data: np.ndarray, axes: int, resamples: int = RESAMPLES
) -> Interval:
    """The percentile bootstrap of crossed factors: each of the first `axes` axes of the data is drawn from with
    replacement, independently of the others (Owen 2007, "The pigeonhole bootstrap"). It is wider than that of single
    pictures, as it must be: pictures that share a layout are not independent.

    Args:
        statistic: data -> a number or an array. What is NaN in a resample does not count.
        data: axes such as layouts, contents, seeds, and then any others.
        axes: how many are drawn from.
    """
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(resamples):
        resample = data
        for axis in range(axes):
            resample = resample.take(rng.integers(data.shape[axis], size=data.shape[axis]), axis=axis)
        drawn.append(statistic(resample))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of slices that are all NaN: their interval is NaN as well
        low, high = np.nanquantile(np.asarray(drawn), (0.025, 0.975), axis=0)
    return Interval(np.asarray(statistic(data)), low, high)


def mean(data: np.ndarray, axes: int | tuple[int, ...]) -> np.ndarray:
    """Over axes (a number: the first so many), of what is no NaN; NaN where nothing is."""
    axes = tuple(range(axes)) if isinstance(axes, int) else axes
    is_there = ~np.isnan(data)
    count = is_there.sum(axis=axes)
    return np.where(count, np.where(is_there, data, 0).sum(axis=axes), np.nan) / np.maximum(count, 1)


def average(data: np.ndarray, axes: int, resamples: int = RESAMPLES) -> Interval:
    """Means over the first axes, with their intervals."""
    return bootstrap(partial(mean, axes=axes), data, axes, resamples)


# ------------------------------------------------------------------------------------------------------- the command


class Scorer:
    """Scores a sweep's pictures, of one checkpoint.

    Args:
        models: the checkpoint.
        encoder: what compares.
    """

    def __init__(self, models: Checkpoint, encoder: Encoder):
        self.models, self.encoder, self.made = models, encoder, {}

    def plain(self, prompt: str, given: dict, row: Row) -> Tensor:
        """Text-to-image (1, 3, H, W) from one row of noise; made once."""
        key = prompt, json.dumps(given), row
        if key not in self.made:
            o = options.of_mix(self.models.defaults, given)
            noise = Onward(Draws([row], self.models.latent_size(o.size), self.models.device), 0)
            *_, last = text_to_image(self.models, prompt, noise=noise, **given)
            self.made[key] = as_saved(self.models, last.x)
        return self.made[key]

    def score(self, folder: Path, line: dict) -> dict[str, float | None]:
        """The numbers and scores of one line of the index; None for scores that are left out. Raises ValueError or
        OSError."""
        given = line["options"]
        shared = {name: value for name, value in given.items() if name in PLAIN}
        row = Row(**{n: given[n] for n in ("seed", "noise", "noise_row") if n in given})
        shown = pictures.open_layout(folder / line["picture"]).picture
        shown = pictures.fit(shown, shown.size[::-1])
        alone = self.plain(given["prompt"], shared, row)
        if "layout_prompt" in given:
            layout = self.plain(given["layout_prompt"], shared, row)
        else:
            fitted = pictures.fit(pictures.open_layout(given["layout"]).picture, tuple(shown.shape[-2:]))
            layout = as_saved(self.models, self.models.vae.encode(fitted.to(self.models.device)))
        (text,) = self.encoder.texts([given["prompt"]])
        m, of_layout, of_alone = (
            Numbers(*(x.double().numpy() for x in measure(x, layout, text, self.encoder)))
            for x in (shown, layout, alone)
        )
        numbers = {name: value.item() for name, value in zip(Numbers._fields, m) if name not in ("named", "apart")}
        found = {
            name: value.item()
            for name, value in zip(Scores._fields, scores(m, of_layout, of_alone, self.encoder.margins))
        }
        return numbers | {name: None if math.isnan(value) else value for name, value in found.items()}


@torch.no_grad()
def score(folder: Path, encoder: Encoder) -> list[dict]:
    """The index's lines of the pictures that are there, each with its scores. Raises ValueError or OSError."""
    index = folder / "index.jsonl"
    if not index.is_file():
        raise ValueError(f"folder {str(folder)!r} has no index.jsonl; give one that lab.sweep made")
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    lines = [line for line in lines if line["status"] == "made"]
    if not lines:
        raise ValueError(f"folder {str(folder)!r} has no picture that was made; run its sweep first")
    scorers = {}
    for line in tqdm(lines, unit="picture"):
        loading = {name: value for name, value in line["options"].items() if name in LOADING}
        if isinstance(encoder, JudgeEncoder) and loading.keys() & {"weights", "unet", "vae"}:
            raise ValueError(
                "encoder is missing: the judge knows the embedded checkpoint's pictures only; give --encoder"
            )
        key = json.dumps(loading)
        if key not in scorers:
            asked = request.Request(loading, {}, range(0), [], None, None)
            scorers[key] = Scorer(weights.load(**asked.loading() | {"free_after_use": False}), encoder)
        line["scores"] = scorers[key].score(folder, line)
    return lines


def tables(lines: list[dict]) -> list[str]:
    """A table in Markdown per axis that varies, with means and intervals over cases and seeds."""

    def text(line: dict, axis: str) -> str:
        return str(line["options"][axis])

    axes = [axis for axis in lines[0]["options"] if axis != "seed"]
    varied = [axis for axis in axes if len({text(line, axis) for line in lines}) > 1]
    out = []
    for axis in varied or ["prompt"]:
        out += [f"| {axis} | pictures | " + " | ".join(HEAD) + " |", "|---" * (len(HEAD) + 2) + "|"]
        groups: dict[str, list[dict]] = {}
        for line in lines:
            groups.setdefault(text(line, axis), []).append(line)
        for value, some in groups.items():
            there = sum(line["scores"]["a"] is not None for line in some)
            cells = [f"{v:.2f} ({low:.2f} .. {high:.2f})" for v, low, high in zip(*average(crossed(some), 2))]
            out.append(f"| {value} | {there} of {len(some)} | " + " | ".join(cells) + " |")
        out.append("")
    return out


def crossed(lines: list[dict]) -> np.ndarray:
    """Lines -> their scores (cases, seeds, 5), NaN where there is none."""

    def case(line: dict) -> str:
        return json.dumps({name: value for name, value in line["options"].items() if name != "seed"})

    cases = {key: i for i, key in enumerate(dict.fromkeys(map(case, lines)))}
    seeds = {key: i for i, key in enumerate(dict.fromkeys(line["options"]["seed"] for line in lines))}
    data = np.full((len(cases), len(seeds), len(Scores._fields)), np.nan)
    for line in lines:
        found = [line["scores"][name] for name in Scores._fields]
        data[cases[case(line)], seeds[line["options"]["seed"]]] = np.array(found, dtype=float)  # None: NaN
    return data


def show(folder: Path, source: str | None) -> None:
    encoder = CLIPEncoder(source) if source else JudgeEncoder()
    lines = score(folder, encoder)
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    pictures.replace(folder / "scores.jsonl", "output", lambda file: file.write(content))
    apart = " or ".join(f"{margin:g} in {name}" for margin, name in zip(encoder.margins, "AB"))
    left_out = f"Left out of the tables are pictures whose anchors are less than {apart} apart."
    machine.show([*tables(lines), left_out, f"{encoder.name}: {encoder.limits}", str(folder / "scores.jsonl")])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = options.Parser(
        "lab.sweep.scores", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of a sweep")
    parser.add_argument("--encoder", metavar="ID-OR-FOLDER", help="a CLIP model [the embedded checkpoint's judge]")
    asked = parser.parse_args(sys.argv[1:] if argv is None else argv)
    return machine.run("lab.sweep.scores", lambda: show(asked.folder, asked.encoder))


if __name__ == "__main__":
    sys.exit(main())
