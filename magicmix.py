"""MagicMix: semantic mixing with diffusion models (Liew et al. 2022, arXiv 2210.16056).

    python magicmix.py "PROMPT" --layout IMAGE            mixes the picture's layout with the prompt's content
    python magicmix.py "PROMPT" --layout-prompt "TEXT"    takes the layout from a prompt instead

k_max, k_min and nu set how much of the layout stays.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out
    from command import machine

    machine.begin()  # before torch's import, which Ctrl-C would abort with a traceback

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

import clip
import weights
from command import machine, options, pictures, request
from command import noise as noise_files
from command.options import Options
from scheduler import Schedule
from weights import Checkpoint, memory

Draw = Callable[[], Tensor]  # one draw of standard normal noise (B, 4, H, W) per call

# --------------------------------------------------------------------------------------------------- the algorithm
# k counts the sampler steps that are left, from T (noise) down to 0 (clean). Latents x are float32 (B, 4, H, W), scaled
# as the UNet sees them: B pictures, latent height H and width W.


class Step(NamedTuple):
    """What happened in one step."""

    phase: str  # "layout" (along the layout prompt), "mixing" (k >= K_min) or "content" (k < K_min)
    k: int  # sampler steps that are left now
    x: Tensor  # x_k, after the interpolation; in phase "layout" it is layout_k
    x_content: Tensor  # x'_k, before the interpolation; x where there is none
    layout: Tensor | None  # layout_k while mixing, else None
    x0: Tensor  # the clean latent as predicted at step k + 1


def mix(denoise: Callable, layout: Callable, K_max: int, K_min: int, nu: float) -> Iterator[Step]:
    """MagicMix, the paper's algorithm 1 and equation 5: a generator of every step from K_max - 1 down to 0.

    Args:
        denoise: (x_k, k) -> (x'_{k-1}, predicted x0) under the content prompt.
        layout: k -> layout_k, asked for K_max and for K_max - 1 .. K_min.
        K_max, K_min: sampler steps, 0 <= K_min <= K_max <= T; mixing goes on while k >= K_min.
        nu: in [0, 1], the share of the content in each mixture.
    """
    x = layout(K_max)
    for k in range(K_max, 0, -1):
        x_content, x0 = denoise(x, k)
        if k - 1 >= K_min:
            layout_k = layout(k - 1)  # of the same noise level as x_content
            x = nu * x_content + (1 - nu) * layout_k
            yield Step("mixing", k - 1, x, x_content, layout_k, x0)
        else:
            x = x_content
            yield Step("content", k - 1, x, x_content, None, x0)


def trajectory(denoise: Callable, x: Tensor, k_from: int, k_to: int, phase: str) -> Iterator[Step]:
    """Plain denoising from x = x_{k_from} down to x_{k_to}: text-to-image when k_from = T and k_to = 0."""
    for k in range(k_from, k_to, -1):
        x, x0 = denoise(x, k)
        yield Step(phase, k - 1, x, x, None, x0)


@dataclass
class ImageLayout:
    """k -> layout_k of a picture: its latent at noise level k, with one eps for all k."""

    schedule: Schedule
    x0: Tensor
    eps: Tensor

    def __call__(self, k: int) -> Tensor:
        return self.schedule.add_noise(self.x0, self.eps, k)


@dataclass
class TextLayout:
    """k -> layout_k of a prompt: the latents of its own trajectory, from x_T = eps on."""

    latents: dict[int, Tensor]

    def __call__(self, k: int) -> Tensor:
        return self.latents[k]


@dataclass
class Denoiser:
    """(x_k, k) -> (x_{k-1}, predicted x0): one sampler step with classifier-free guidance (Ho & Salimans 2022).

    `noise` is for samplers that need it; `words` maps words of the prompt to their token weight s. Raises ValueError,
    CheckpointError or FloatingPointError as `magicmix` does.
    """

    models: Checkpoint
    schedule: Schedule
    options: Options
    noise: Draw
    prompt: str
    words: dict[str, float] | None = None

    def __post_init__(self):
        options.check({"prompt": self.prompt})
        # With guidance 1 the prompt's prediction alone is left, so the negative prompt's is not computed.
        models, negative = self.models, [] if self.options.guidance == 1 else [self.options.negative]
        self.context = clip.encode_prompts(models.tokenizer, models.text_encoder, [*negative, self.prompt])
        models.check_finite("text_encoder", self.context, "the text states")  # (2, L, D), or (1, L, D)
        self.token_weights = None
        if self.words:
            s = clip.token_weights(models.tokenizer, self.prompt, self.words)  # (L,)
            # (2, L): all 1 for the negative prompt
            self.token_weights = torch.stack([torch.ones_like(s) for _ in negative] + [s]).to(models.device)

    def __call__(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        count, halves, o = len(x), len(self.context), self.options
        t = torch.full((halves * count,), self.schedule.t[k], device=x.device)
        context = self.context.repeat_interleave(count, dim=0)  # (2B, L, D)
        s = None if self.token_weights is None else self.token_weights.repeat_interleave(count, dim=0)  # (2B, L)
        both = torch.cat([x] * halves).to(self.models.dtype)  # (2B, 4, H, W): the negative prompt's, then the prompt's
        e = self.models.unet(both, t, context, s).float()  # samplers compute in float32
        if halves == 2:
            e_uncond, e_cond = e.chunk(2)  # (B, 4, H, W) each
            e = e_uncond + o.guidance * (e_cond - e_uncond)
        if o.sampler == "ddpm":
            x, x0 = self.schedule.ddpm(x, e, k, self.noise())
        else:
            x, x0 = self.schedule.ddim(x, e, k, o.eta, self.noise() if o.eta > 0 else None)
        self.models.check_finite("unet", x, f"the latents at k = {k - 1}")
        return x, x0


class Noise:
    """Standard normal noise (B, 4, H, W), one draw per call.

    Drawn on the CPU in float32, with one generator per picture, so that a picture's noise depends on its seed alone,
    not on its batch or device. The first draw is eps; samplers that need noise draw on.

    Args:
        seeds: one per picture; one number is one picture's.
        size: (H, W) of the latents.
        device: where the noise is used.

    Raises TypeError or ValueError for seeds that cannot be.
    """

    def __init__(self, seeds: Sequence[int] | int, size: tuple[int, int], device: torch.device):
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in options.seeds_of(seeds)]
        self.shape, self.device = (1, 4, *size), device

    def __call__(self) -> Tensor:
        return torch.cat([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


# ------------------------------------------------------------------------------------------------------- its uses


@torch.no_grad()
def magicmix(
    models: Checkpoint,
    prompt: str,
    layout: Tensor | Image | Path | str,
    *,
    seeds: Sequence[int] | int = (0,),
    noise: Draw | None = None,
    **given,
) -> Iterator[Step]:
    """Mixes the content of a prompt into a layout: a generator of Steps, the last of which has k = 0. A picture with
    K_max = 0 gives no Step: the result is its own latent.

    Args:
        models: from weights.load.
        prompt: the content.
        layout: a prompt; a Path or PIL picture, fitted to `size`; or (1 or B, 3, f H, f W) in [-1, 1], f of the VAE.
        seeds: one per picture, B pictures in one batch; or one number.
        noise: in place of seeds: what draws the noise, eps first; float32 on the models' device.
        given: the options of the mixing, as command.options.Options has them: k_max, k_min, nu, steps, guidance,
            negative, token_weights, sampler, eta, and size, (height, width) or one number of pixels, unless the layout
            is a tensor. What is not given is the checkpoint's own default, or else the general one.

    Raises, when a step is asked for, TypeError for an unknown option or type, ValueError for a value that cannot be
    right, FileNotFoundError, CheckpointError (a ValueError) for NaN or Inf in weights, FloatingPointError for overflow.
    """
    o = options.of_mix(options.own(models), given)
    schedule = Schedule(models.schedule, o.steps)
    K_max, K_min = o.K_max, o.K_min  # in steps; k_max and k_min are fractions of T = o.steps
    layout = pictures.as_layout(layout, o.size)
    size = models.latent_size(tuple(layout.shape[2:]) if isinstance(layout, Tensor) else o.size)
    noise = Noise(seeds, size, models.device) if noise is None else noise
    eps = noise_files.first(noise)
    content = Denoiser(models, schedule, o, noise, prompt, o.token_weights)
    models.warn_if_untrained(size, prompt, layout, o.negative)
    if isinstance(layout, Tensor):
        x0 = noise_files.matched(models.vae.encode(layout.to(models.device)), eps)  # (B, 4, H, W)
        yield from mix(content, ImageLayout(schedule, x0, eps), K_max, K_min, o.nu)
    else:
        schedule.warn_if_not_noise()
        along, latents = Denoiser(models, schedule, o, noise, layout), {o.steps: eps}  # without token weights
        for step in trajectory(along, eps, o.steps, K_min, "layout"):
            latents[step.k] = step.x
            yield step
        yield from mix(content, TextLayout(latents), K_max, K_min, o.nu)


@torch.no_grad()
def text_to_image(
    models: Checkpoint, prompt: str, *, seeds: Sequence[int] | int = (0,), noise: Draw | None = None, **given
) -> Iterator[Step]:
    """A prompt alone, from noise to clean: a generator of T Steps. Arguments and errors are those of `magicmix`, but
    there is no layout, k_max, k_min or nu."""
    o = options.of_mix(options.own(models), given, unused=("k_max", "k_min", "nu"))
    schedule = Schedule(models.schedule, o.steps)
    schedule.warn_if_not_noise()
    size = models.latent_size(o.size)
    noise = Noise(seeds, size, models.device) if noise is None else noise
    eps = noise_files.first(noise)
    content = Denoiser(models, schedule, o, noise, prompt, o.token_weights)
    models.warn_if_untrained(size, prompt, o.negative)
    yield from trajectory(content, eps, o.steps, 0, "content")


@torch.no_grad()
def decode(models: Checkpoint, x: Tensor) -> list[Image]:
    """Scaled latents (B, 4, H, W) -> pictures. Raises CheckpointError or FloatingPointError for NaN or Inf in them."""
    y = models.vae.decode(x)
    models.check_finite("vae", y, "the decoded pictures")
    return pictures.to_images(y)


# ------------------------------------------------------------------------------------------------------ the command


@torch.no_grad()
def make(asked: dict) -> None:
    """Does what the command line asks for. Raises ValueError or OSError for what is wrong with it, before the
    checkpoint is loaded where that is possible, else before the first step; and what `magicmix` raises."""
    options.check(asked)
    if asked.get("concepts"):
        return machine.show(weights.words(asked.get("weights", weights.TINY)))
    r = request.read(asked, weights.TINY)
    models = weights.load(**r.loading())
    r.check_checkpoint(models.identity)
    r.tell(*models.notes)
    o = options.of_mix(models.defaults, r.mixing())
    size = models.latent_size(o.size)
    machine.check_memory(memory.decoding_bytes(models.vae, size, len(r.seeds)), models.device)
    noise = r.noise_of(Noise(r.seeds, size, models.device))
    layout = pictures.fit(r.layout.picture, o.size).to(models.device) if r.layout else r["layout_prompt"]
    clip.token_weights(models.tokenizer, r["prompt"], o.token_weights or {})  # a wrong word shows before the bar
    r.tell(*pictures.changes(r.layout, o.size))
    r.tell(*r.cut_off(lambda text: clip.cut_off(models.tokenizer, text), models.tokenizer.model_max_length))
    steps = magicmix(models, r["prompt"], layout, noise=noise, **o.only(options.MIXING))
    last = machine.follow(steps, o.K_max if r.layout else o.K_max + o.steps - o.K_min, r["quiet"])
    x = last.x if last else models.vae.encode(layout).expand_as(noise.eps)  # K_max = 0: the layout itself
    if r["keep_noise"]:
        noise_files.write(r["keep_noise"], noise.eps)
    r.save(decode(models, x), o, models)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    asked = options.parse(sys.argv[1:] if argv is None else argv, __doc__, weights.own_options(weights.TINY))
    return machine.run("magicmix", lambda: make(asked), asked.get("quiet", False), asked.get("debug", False))


if __name__ == "__main__":
    sys.exit(main())
