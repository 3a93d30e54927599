"""What public MagicMix programs do, and single departures from the paper, each a loop to lay beside `magicmix.mix`.

A loop takes what `mix` takes: `denoise` (x_k, k) -> (x'_{k-1}, predicted x0) under the content prompt, here always a
magicmix.Denoiser with DDIM and eta 0; `layout` k -> layout_k; K_max and K_min in steps; nu. It returns x_0. A program
takes `denoise`, `layout` and the options with k_max and k_min as fractions, since rounding them is part of what it
does. Latents are float32 (B, 4, H, W), scaled. Where the programs stand, and at which commit: docs/audit.md.

The paper's loop, `mix` without what it tells of its steps:

    x = layout(K_max)
    for k in range(K_max, 0, -1):
        x_content, x0 = denoise(x, k)
        if k - 1 >= K_min:
            x = nu * x_content + (1 - nu) * layout(k - 1)
        else:
            x = x_content
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from command.options import Options
from magicmix import Denoiser, mix

Layout = Callable[[int], Tensor]  # k -> layout_k


def paper(denoise: Denoiser, layout: Layout, o: Options) -> Tensor:
    """This project's own loop."""
    *_, last = mix(denoise, layout, o.K_max, o.K_min, o.nu)
    return last.x


def paper_unmixed(denoise: Denoiser, layout: Layout, o: Options) -> Tensor:
    """The same with nu = 1: the start carries all that there is of the layout, as in image-to-image."""
    *_, last = mix(denoise, layout, o.K_max, o.K_min, 1.0)
    return last.x


# ------------------------------------------------------------------------------------- single departures from the paper


def step_from(denoise: Denoiser, x: Tensor, seen: Tensor, k: int) -> Tensor:
    """One step from x with the noise that the UNet predicts for another latent, `seen`.

    A DDIM step is linear in the latent and the prediction together: the step of `seen` plus that of the difference,
    for which nothing is predicted, is the step of x with the prediction for `seen`.
    """
    onward, _ = denoise(seen, k)
    rest, _ = denoise.schedule.ddim(x - seen, torch.zeros_like(x), k)
    return onward + rest


def unmixed_carried(denoise: Denoiser, layout: Layout, K_max: int, K_min: int, nu: float) -> Tensor:
    """The mixture is shown to the UNet, and the step goes on from the latents without it.

    So the layout hardly counts. Let x and the layout be sqrt(abar) u + sqrt(1 - abar) eps and sqrt(abar) z + ..., with
    the same eps. A UNet that leaves the mixture's clean latent nu u + (1 - nu) z as it is predicts eps. From the
    mixture that would lead to nu u + (1 - nu) z, but from x it leads to u again, where there is no z.
    """
    x = seen = layout(K_max)
    for k in range(K_max, 0, -1):
        x = step_from(denoise, x, seen, k)
        if k - 1 >= K_min:
            seen = nu * x + (1 - nu) * layout(k - 1)
        else:
            seen = x
    return x


def level_off(denoise: Denoiser, layout: Layout, K_max: int, K_min: int, nu: float, off: int) -> Tensor:
    """Each layout that is mixed in has the noise level of `off` steps before: 1 is noisier by one step."""
    x = layout(K_max)
    for k in range(K_max, 0, -1):
        x_content, _ = denoise(x, k)
        if k - 1 >= K_min:
            x = nu * x_content + (1 - nu) * layout(k - 1 + off)
        else:
            x = x_content
    return x


def truncated(k_max: float, k_min: float, T: int) -> tuple[int, int]:
    """K_max and K_min cut off by int(), where 0.58 * 50 is 28.999..., instead of rounded."""
    return int(k_max * T), int(k_min * T)


def truncated_paper(denoise: Denoiser, layout: Layout, o: Options) -> Tensor:
    """The paper's loop between such K_max and K_min."""
    *_, last = mix(denoise, layout, *truncated(o.k_max, o.k_min, o.steps), o.nu)
    return last.x


# ------------------------------------------------------------------------------------------------------- the programs


def diffusers(denoise: Denoiser, layout: Layout, o: Options) -> Tensor:
    """diffusers' examples/community/magic_mix.py, and daspartho/MagicMix, from which it came."""
    K_max, K_min = truncated(o.k_max, o.k_min, o.steps)
    return unmixed_carried(denoise, layout, K_max, K_min + 1, o.nu)  # nothing is mixed at K_min itself


def nipunjindal(denoise: Denoiser, layout: Layout, o: Options) -> Tensor:
    """nipunjindal/diffusers-magic-mix."""
    K_max, _ = truncated(o.k_max, o.k_min, o.steps)
    _, K_min = truncated(o.k_max, o.k_min, K_max)  # k_min is a fraction of the steps that are taken, not of T
    return unmixed_carried(denoise, layout, K_max, K_min + 1, o.nu)


def cloneofsimo(denoise: Denoiser, layout: Layout, o: Options, off: int) -> Tensor:
    """cloneofsimo/magicmix; `off` is its scheduler's steps_offset, which goes into the index of the layouts. Raises
    IndexError, as the program does, when K_max = K_min leaves no layout to start from."""
    K_max, K_min = truncated(o.k_max, o.k_min, o.steps)
    # It indexes the timesteps from the end, and index -0 is the first of them, the noisiest level T.
    levels = [k + off or o.steps for k in range(K_max - 1, K_min - 1, -1)]
    x = layout(levels[0])
    for i, k in enumerate(range(min(K_max, o.steps - off), 0, -1)):
        x, _ = denoise(x, k)
        if i < len(levels):
            x = o.nu * x + (1 - o.nu) * layout(levels[i])
    return x


# ---------------------------------------------------------------------------------------------------------- all of them

TRAJECTORY, RENOISED, RENOISED_ANEW = "its trajectory", "renoised", "renoised anew"  # what a prompt's layouts come from
PICTURE, PROMPT = "picture", "prompt"  # kinds of layouts


class Variant(NamedTuple):
    """A loop and what it is given.

    Attributes:
        name: in the table and on the sheet.
        run: (denoise, layout, options) -> x_0.
        takes: the kinds of layouts that there are for it.
        source: a prompt's layouts come from its own trajectory, or from its finished picture, noised again: RENOISED
            with the eps that the trajectory began with, RENOISED_ANEW with a second noise.
        steps_offset: of its schedule; None for the checkpoint's own.
    """

    name: str
    run: Callable[[Denoiser, Layout, Options], Tensor]
    takes: tuple[str, ...] = (PICTURE, PROMPT)
    source: str = TRAJECTORY
    steps_offset: int | None = None


PAPER = Variant("this project", paper)
START = Variant("nu = 1", paper_unmixed)
PROGRAMS = (
    Variant("diffusers", diffusers, (PICTURE,)),
    Variant("nipunjindal", nipunjindal, (PICTURE,)),
    Variant("cloneofsimo 0", partial(cloneofsimo, off=0), source=RENOISED_ANEW, steps_offset=0),
    Variant("cloneofsimo 1", partial(cloneofsimo, off=1), source=RENOISED_ANEW, steps_offset=1),
)
DEPARTURES = (
    Variant("unmixed carried", lambda denoise, layout, o: unmixed_carried(denoise, layout, o.K_max, o.K_min, o.nu)),
    Variant("one level off", lambda denoise, layout, o: level_off(denoise, layout, o.K_max, o.K_min, o.nu, off=1)),
    Variant("renoised", paper, (PROMPT,), source=RENOISED),
    Variant("K truncated", truncated_paper),
)
