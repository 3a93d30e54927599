"""The numbers of an audit: how far each picture is from this project's, and what is left of layout and content."""

from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from command.pictures import fit
from lab.training.judge import Judge

HEAD = ("loop", "picture: mean", "largest", "latents: mean", "largest", "layout left", "content left")
JUDGE = ("judge names it", "likeness to the prompt")


class Made(NamedTuple):
    """What one loop made."""

    x: Tensor  # (1, 4, H, W), scaled
    picture: Image.Image


class Numbers(NamedTuple):
    """What is measured of it. None stands for what cannot be measured."""

    grey: tuple[float, float]  # the picture's mean and largest difference from this project's, in grey levels, 0 .. 255
    latents: tuple[float, float]  # the latents'
    layout: float | None
    content: float | None
    judged: (
        tuple[str, float] | None
    )  # the judge's name for the picture; its similarity to the prompt's concept, -1 .. 1


def grey(a: Image.Image, b: Image.Image) -> tuple[float, float]:
    """The mean and the largest difference of two pictures in grey levels, over all pixels and colours."""
    apart = abs(np.asarray(a, dtype=np.int16) - np.asarray(b, dtype=np.int16))
    return float(apart.mean()), float(apart.max())


def left(picture: Image.Image, anchor: Image.Image, other: Image.Image) -> float | None:
    """How much of `anchor` is left in a picture: 1 for all, 0 where it is as far away as `other`, below 0 where it is
    farther. Distances are means in grey levels. None where both anchors are one picture."""
    apart = grey(anchor, other)[0]
    return 1 - grey(picture, anchor)[0] / apart if apart else None


@torch.no_grad()
def measure(made: Made, ours: Made, layout: Made, start: Made, judge: Judge | None, concept: str) -> Numbers:
    """The numbers of what one loop made.

    Args:
        ours: what this project made.
        layout, start: the anchors: the layout itself, and the mix with nu = 1, which has of it what the start carries.
        judge: of the embedded checkpoint; None where there is none.
        concept: the judge's name for the prompt.
    """
    apart = (made.x - ours.x).abs()
    judged = None
    if judge:
        similarity = judge(fit(made.picture, made.picture.size[::-1]))[0]  # (concepts,)
        judged = judge.names[similarity.argmax()], similarity[judge.names.index(concept)].item()
    return Numbers(
        grey(made.picture, ours.picture),
        (apart.mean().item(), apart.max().item()),
        left(made.picture, layout.picture, start.picture),
        left(made.picture, start.picture, layout.picture),
        judged,
    )


def average(found: list[tuple[Numbers, str]]) -> Numbers:
    """The averages of several mixes' (numbers, concept): of differences the mean and the largest, and how many of the
    pictures the judge names as the prompt does."""
    rows = [n for n, _ in found]
    right = sum(n.judged[0] == concept for n, concept in found)
    return Numbers(
        *((fmean(n[i][0] for n in rows), max(n[i][1] for n in rows)) for i in range(2)),
        fmean(n.layout for n in rows),
        fmean(n.content for n in rows),
        (f"{right} of {len(found)}", fmean(n.judged[1] for n in rows)),
    )


def lines(rows: dict[str, Numbers]) -> list[str]:
    """A table in Markdown, of one mix."""
    head = HEAD + JUDGE * all(n.judged for n in rows.values())
    body = []
    for name, n in rows.items():
        cells = [name, f"{n.grey[0]:.2f}", f"{n.grey[1]:.0f}", f"{n.latents[0]:.3f}", f"{n.latents[1]:.2f}"]
        cells += ["-" if v is None else f"{v:.2f}" for v in (n.layout, n.content)]
        body.append(cells + ([n.judged[0], f"{n.judged[1]:.2f}"] if n.judged else []))
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]
