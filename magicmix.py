"""MagicMix: semantic mixing with diffusion models (Liew et al. 2022, arXiv 2210.16056). The algorithm and its command.

    python magicmix.py "PROMPT" --layout IMAGE            mixes the picture's layout with the prompt's content
    python magicmix.py "PROMPT" --layout-prompt "TEXT"    takes the layout from a prompt instead

k counts the sampler steps that are left: k = T is pure noise, k = 0 is clean. `mix` is the algorithm; everything above
it prepares its arguments, everything below it is the command line.
"""

import os
import signal
import sys

if __name__ == "__main__":
    # The slow imports can be interrupted too. At once: an exception in the middle of torch's own start would abort it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os._exit(128 + number))  # 128 + the signal, as shells count

import argparse
import hashlib
import inspect
import json
import math
import re
import struct
import tempfile
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

import weights
from scheduler import Schedule
from weights import Checkpoint, one_line

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Beyond any use of these models; a slip or a hostile file asks for terabytes.
MOST_SIDE, MOST_PICTURES = 4096, 1000
OVERFLOW = "if the checkpoint is sound, --dtype fp32 or bf16 or --upcast-attention on avoids the overflow"


class Step(NamedTuple):
    """What happened in one step. Latents are float32 (B, 4, H, W), scaled as the UNet sees them."""

    phase: str  # "layout" (following the layout prompt), "mixing" (k >= K_min) or "content" (k < K_min)
    k: int  # sampler steps that are left now
    x: Tensor  # x_k, after the interpolation
    x_content: Tensor  # x'_k, before it
    layout: Tensor | None  # layout_k while mixing, else None
    x0: Tensor  # the clean latent that the UNet's prediction at k + 1 meant


# ------------------------------------------------------------------------------------------------- the prompt


def encode_prompts(models: Checkpoint, prompts: list[str]) -> Tensor:
    """Prompts -> text states (B, L, D), each padded or cut to the tokenizer's L tokens."""
    ids = models.tokenizer(prompts, padding="max_length", max_length=models.tokenizer.model_max_length,
                           truncation=True, return_tensors="pt").input_ids  # fmt: skip
    states = models.text_encoder(ids.to(models.device))
    if not states.isfinite().all():
        models.check_finite("text_encoder")
        raise FloatingPointError(f"the text states hold NaN or Inf; {OVERFLOW}")
    return states


def token_weights(tokenizer, prompt: str, factors: dict[str, float]) -> Tensor:
    """The factor s of every token of a prompt: (L,), 1 where no word was chosen.

    A word (or several: "coffee machine") is found by its token ids, at every place where it begins a word.
    Raises ValueError for a word without tokens or not in the prompt, listing the words that are.
    """
    length = tokenizer.model_max_length
    ids = tokenizer(prompt, max_length=length, truncation=True).input_ids[1:-1]  # without start and end token
    ends = [token.endswith("</w>") for token in tokenizer.convert_ids_to_tokens(ids)]
    begins = [i == 0 or ends[i - 1] for i in range(len(ids))]
    s = torch.ones(length)
    for word, factor in factors.items():
        tokens = tokenizer(word, add_special_tokens=False).input_ids
        places = [i for i in range(len(ids)) if tokens and begins[i] and ids[i : i + len(tokens)] == tokens]
        if not places:
            words = tokenizer.decode(ids).split()
            raise ValueError(f"reweight: {word!r} is not in the prompt; its words are: {', '.join(words) or '(none)'}")
        for i in places:
            s[1 + i : 1 + i + len(tokens)] = factor  # 1 +: the start token
    return s


def cut_off(tokenizer, prompt: str) -> str:
    """The end of a prompt that lies beyond the tokenizer's L tokens and is not read; "" for most prompts."""
    encoded = tokenizer(prompt, return_offsets_mapping=True, verbose=False)  # no warning: it is what is asked here
    places = encoded.offset_mapping[1:-1]  # without start and end token
    unread = places[tokenizer.model_max_length - 2 :]
    return prompt[unread[0][0] :] if unread else ""


def denoiser(models: Checkpoint, schedule: Schedule, step: Callable, negative: str, guidance: float, count: int,
             prompt: str, factors: dict[str, float]) -> Callable:  # fmt: skip
    """A function (x_k, k) -> (x_{k-1}, predicted x0): one sampler step under a prompt.

    Args:
        models, schedule: the checkpoint and the T noise levels.
        step: (x, output, k) -> (x_{k-1}, x0), a method of the schedule with its eta and noise.
        negative: what stands in for the empty prompt.
        guidance: g of classifier-free guidance (Ho & Salimans 2022), any finite number; 1 is none.
        count: B, the pictures in the batch.
        prompt, factors: the condition, and word -> s, which hold for the conditional half only.
    """
    context = encode_prompts(models, [negative, prompt]).repeat_interleave(count, dim=0)  # (2B, L, D)
    s = None
    if factors:
        chosen = token_weights(models.tokenizer, prompt, factors)
        s = torch.stack([torch.ones_like(chosen), chosen]).repeat_interleave(count, dim=0).to(models.device)

    def denoise(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        t = torch.full((2 * count,), schedule.t[k], device=models.device)
        e = models.unet(torch.cat([x, x]).to(models.dtype), t, context, s).float()  # samplers compute in float32
        e_uncond, e_cond = e.chunk(2)
        return step(x, e_uncond + guidance * (e_cond - e_uncond), k)

    return denoise


# ---------------------------------------------------------------------------------------------- the algorithm


def trajectory(denoise: Callable, x: Tensor, k_from: int, k_to: int) -> Iterator[Step]:
    """Plain denoising from x = x_{k_from} down to x_{k_to}: text-to-image when k_from = T and k_to = 0."""
    for k in range(k_from, k_to, -1):
        x, x0 = denoise(x, k)
        yield Step("layout", k - 1, x, x, None, x0)


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
        mixing = k - 1 >= K_min
        x = nu * x_content + (1 - nu) * layout(k - 1) if mixing else x_content
        yield Step("mixing" if mixing else "content", k - 1, x, x_content, layout(k - 1) if mixing else None, x0)


class Noise:
    """Standard normal noise, drawn on the CPU in float32: one generator a picture, so that a picture depends on its
    seed alone, not on its batch or device. The first draw is eps; samplers that need noise draw on."""

    def __init__(self, seeds: Sequence[int], height: int, width: int, device: torch.device):
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.shape, self.device = (1, 4, height, width), device

    def __call__(self) -> Tensor:
        return torch.cat([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def magicmix(
    models: Checkpoint,
    prompt: str,
    layout: Tensor | str,
    *,
    k_max: float = 0.6,
    k_min: float = 0.3,
    nu: float = 0.9,
    steps: int = 50,
    guidance: float = 7.5,
    negative: str = "",
    reweight: dict[str, float] | None = None,
    sampler: str = "ddim",
    eta: float = 0.0,
    seeds: Sequence[int] = (0,),
    size: tuple[int, int] | None = None,
) -> Iterator[Step]:
    """Mixes the content of a prompt into a layout: a generator of Steps, the last of which has k = 0.

    Args:
        models: from weights.load.
        prompt: the content.
        layout: a picture (1, 3, H, W) in [-1, 1], sides multiples of the VAE's factor; or the layout's prompt.
        k_max, k_min: fractions of the steps, 0 <= k_min <= k_max <= 1; K = round(k * T).
        nu: share of the content in each mixture, in [0, 1].
        steps: T, 1 to 999.
        guidance, negative: classifier-free guidance and the prompt to move away from.
        reweight: word of the prompt -> s, the factor on its cross-attention; [-2, 2] is the useful range.
        sampler, eta: "ddim" with eta in [0, 1] (0: deterministic), or "ddpm".
        seeds: one a picture; B = len(seeds) pictures are made in one batch.
        size: (height, width) in pixels for a layout prompt; None for the checkpoint's own.

    Raises ValueError for a value out of range, before any step; CheckpointError (a ValueError) for weights with NaN or
    Inf, before the first step or, where they are the UNet's, at it; and FloatingPointError at a step whose latents are
    not finite for another reason.
    """
    height, width = layout.shape[2:] if isinstance(layout, Tensor) else size or models.size
    prompts = [prompt, layout] if isinstance(layout, str) else [prompt]
    check(prompts, seeds, (height, width), k_max=k_max, k_min=k_min, nu=nu, steps=steps, guidance=guidance,
          negative=negative, reweight=reweight or {}, sampler=sampler, eta=eta)  # fmt: skip
    if reweight:
        token_weights(models.tokenizer, prompt, reweight)
    factor, count = models.vae.config.factor, len(seeds)
    if height % factor or width % factor or min(height, width) < factor:
        raise ValueError(f"size {width}x{height} does not fit; both sides must be multiples of {factor}")
    schedule = Schedule(models.schedule, steps)
    noise = Noise(seeds, height // factor, width // factor, models.device)
    K_max, K_min = in_steps(k_max, k_min, steps)

    def step(x: Tensor, output: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if sampler == "ddpm":
            return schedule.ddpm(x, output, k, noise())
        return schedule.ddim(x, output, k, eta, noise() if eta > 0 else None)

    @torch.no_grad()
    def run() -> Iterator[Step]:
        under = partial(denoiser, models, schedule, step, negative, guidance, count)
        content, eps = under(prompt, reweight or {}), noise()
        of_layout = None if isinstance(layout, Tensor) else under(layout, {})
        models.release("text_encoder")  # all prompts are encoded
        models.check_finite("vae")  # now: what is wrong in its decoder would show at the very end
        x0 = encode(models, layout).expand(count, -1, -1, -1) if isinstance(layout, Tensor) else None
        models.release("vae")  # until decoding
        if x0 is not None:
            layout_at = partial(schedule.add_noise, x0, eps)
        else:
            states = {steps: eps}
            for state in trajectory(of_layout, eps, steps, K_min):
                states[state.k] = state.x
                yield state
            layout_at = states.__getitem__
        yield from mix(content, layout_at, K_max, K_min, nu)

    return watched(models, run())


def watched(models: Checkpoint, steps: Iterator[Step]) -> Iterator[Step]:
    """The same steps. Raises FloatingPointError at the first whose latents are not finite, or CheckpointError when
    that is the fault of the UNet's weights."""
    for step in steps:
        if not torch.isfinite(step.x).all():
            models.check_finite("unet")
            raise FloatingPointError(f"the latents hold NaN or Inf at k = {step.k} ({step.phase}); {OVERFLOW}")
        yield step


def encode(models: Checkpoint, picture: Tensor) -> Tensor:
    """A picture (B, 3, H, W) in [-1, 1] -> scaled latents x0: the posterior mean, so that no seed enters."""
    vae = models.vae
    return vae.encode(picture.to(vae.quant_conv.weight))[0].float() * vae.config.scaling_factor


@torch.no_grad()
def decode(models: Checkpoint, x: Tensor) -> list[Image.Image]:
    """Scaled latents (B, 4, H, W) -> pictures. Raises FloatingPointError when the VAE returns NaN or Inf."""
    vae = models.vae
    y = vae.decode((x / vae.config.scaling_factor).to(vae.quant_conv.weight)).float()
    if not torch.isfinite(y).all():
        raise FloatingPointError("the picture holds NaN or Inf after the VAE's decoder; use --vae-dtype fp32")
    pixels = ((y / 2 + 0.5).clamp(0, 1) * 255).round().byte()  # the nearest grey level, as diffusers rounds
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def in_steps(k_max: float, k_min: float, T: int) -> tuple[int, int]:
    """Fractions of the steps -> K_max, K_min. Halves go to the even neighbour, as Python rounds."""
    return round(k_max * T), round(k_min * T)


def check(prompts, seeds, size, *, k_max, k_min, nu, steps, guidance, negative, reweight, sampler, eta) -> None:
    """Raises ValueError with the first offending value and the range that would be right."""
    for text in (*prompts, negative, *reweight):
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"{text!r} holds half a character (a surrogate); write prompts in UTF-8")
    if not 1 <= steps <= 999:
        raise ValueError(f"steps {steps} is out of range; use 1 to 999")
    for name, value in (("k-max", k_max), ("k-min", k_min), ("nu", nu), ("eta", eta)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} {value} is out of range; use 0 to 1")
    if k_min > k_max:
        raise ValueError(f"k-min {k_min} is above k-max {k_max}; mixing runs from k-max down to k-min")
    if not (math.isfinite(guidance) and guidance >= 0):
        raise ValueError(f"guidance {guidance} is out of range; use a number from 0 on (1: no guidance)")
    if sampler not in CHOICES["sampler"]:
        raise ValueError(f"sampler {sampler!r} is not known; use ddim or ddpm")
    check_count(len(seeds))
    for seed in seeds:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed {seed} is out of range; use 0 to 2^64 - 1")
    for word, factor in reweight.items():
        if not math.isfinite(factor):
            raise ValueError(f"reweight {word}={factor} is not a finite number; -2 to 2 is the useful range")
    if not all(1 <= side <= MOST_SIDE for side in size):
        raise ValueError(f"size {size[1]}x{size[0]} is out of range; use sides of up to {MOST_SIDE} pixels")


def check_count(count: int) -> None:
    if not 1 <= count <= MOST_PICTURES:
        raise ValueError(f"count {count} is out of range; use 1 or more, at most {MOST_PICTURES}")


# ------------------------------------------------------------------------------------------- the command line


def must_be_file(path: Path, what: str, right: str) -> None:
    """Raises FileNotFoundError or ValueError; a pipe or a device could be read for ever."""
    if not path.exists():
        raise FileNotFoundError(f"{what} {str(path)!r} does not exist; {right}")
    if not path.is_file():
        raise ValueError(f"{what} {str(path)!r} cannot be read: it is not a file; {right}")


# Formats that are decoded in this process; Pillow would hand others (EPS) to another program.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA")


def open_layout(path: Path) -> tuple[Image.Image, str, bool]:
    """A picture file -> the picture as RGB, the sha256 of the file, and whether it holds more pictures than this, the
    first one.

    EXIF rotation is applied, 16-bit greys are scaled to 8 bits, CMYK and palettes are converted, and transparency is
    laid on white; colour profiles are not read. Raises FileNotFoundError, or ValueError for anything but a picture of
    8 or 16 bits and of fewer than 89 million pixels (Pillow's bound against decompression bombs).
    """
    must_be_file(path, "layout", "give a picture file")
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as "corrupt EXIF data"
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            with Image.open(file, formats=FORMATS) as opened:
                more = getattr(opened, "is_animated", False)
                picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
            picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
        if picture.mode in ("I", "F", "LAB"):
            raise ValueError(f"its pixels are of the kind {picture.mode}")
        picture = picture.convert("RGBA")
    except UnidentifiedImageError:
        raise ValueError(f"layout {str(path)!r} is not a readable picture; use {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"is too large ({str(error).partition(',')[0]})"
        raise ValueError(f"layout {str(path)!r} {reason}; scale it down to fewer than 89 million pixels") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise whatever their parsing of a broken file trips over
        reason = str(error) or type(error).__name__
        raise ValueError(f"layout {str(path)!r} is not a readable picture ({reason}); save it anew, as PNG") from error
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"), digest, more


def fit(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """A picture as (1, 3, H, W) in [-1, 1]: resized to cover `size` = (height, width) and centre-cropped to it."""
    pixels = np.array(ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


def check_output(path: Path) -> None:
    """Raises ValueError or OSError when no picture can be written to `path`, before there is one."""
    if path.suffix.lower() in {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}:
        raise ValueError(f"output {str(path)!r} would hold a PNG; let its name end in .png")
    if not path.parent.is_dir():
        raise ValueError(f"output folder {str(path.parent)!r} does not exist; make it first")
    if path.exists() and not path.is_file():  # a folder; /dev/null, which must not be replaced
        raise ValueError(f"output {str(path)!r} is not a file; give a name for the picture")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        reason = f"cannot be written to: {error.strerror}"
        raise ValueError(f"output folder {str(path.parent)!r} {reason}; choose another with -o") from error


def save(picture: Image.Image, path: Path, metadata: dict) -> None:
    """Writes a PNG with the parameters as text: beside the old file first, so that whatever happens, `path` holds the
    old picture or the new one, whole. Raises OSError."""
    info = PngImagePlugin.PngInfo()
    info.add_text("magicmix", json.dumps(metadata, sort_keys=True))  # ASCII: a path in it may not even be UTF-8
    temporary = path.with_name(f".magicmix-{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            picture.save(file, format="PNG", pnginfo=info)
            file.flush()
            os.fsync(file.fileno())  # the content before the name: a power cut must not leave an empty file
        os.replace(temporary, path)
    except OSError as error:
        reason = f"cannot be written: {error.strerror or error}"
        raise OSError(f"output {str(path)!r} {reason}; choose another place with -o") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_metadata(path: Path) -> dict:
    """The parameters in a picture that this program made; their types are checked. Raises FileNotFoundError or
    ValueError."""
    must_be_file(path, "picture", "--again needs a magicmix picture")
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=("PNG",)) as picture:  # reads up to the pixels, which are not needed
                text = picture.info.get("magicmix")
        if text and len(text) > MOST_TEXT:
            raise ValueError(f"its parameters have {len(text):,} characters")
        metadata = json.loads(text) if text else None
    except UnidentifiedImageError:
        raise ValueError(f"picture {str(path)!r} is not a readable PNG; --again needs a magicmix picture") from None
    except (OSError, SyntaxError, ValueError, RecursionError, struct.error) as error:
        raise ValueError(f"picture {str(path)!r} cannot be read: {error}; --again needs a magicmix picture") from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("parameters"), dict):
        raise ValueError(f"picture {str(path)!r} has no magicmix parameters; --again needs a picture that has")
    check_types(metadata["parameters"], f"picture {str(path)!r}")
    return metadata


def check_types(parameters: dict, where: str) -> None:
    """Raises ValueError for a parameter from a file that may not stand there, or with a value of another type."""
    for name, value in parameters.items():
        kind = PARAMETERS.get(name, ())
        if isinstance(value, bool):
            right = kind is bool
        elif isinstance(value, dict):
            right = kind is dict and all(type(factor) in (int, float) for factor in value.values())
        elif isinstance(value, list):
            right = kind is list and len(value) == 2 and all(type(side) is int for side in value)
        else:
            right = isinstance(value, kind)
        if not right:
            raise ValueError(f"{where} has a parameter that cannot be right: {name} = {value!r}")
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{where}: {name} {value!r} is not known; use {', '.join(CHOICES[name])}")


def parse_size(text: str) -> tuple[int, int]:
    """'512' or 'WIDTHxHEIGHT' -> (height, width)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and len(side) < 10 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; use a number of pixels or WIDTHxHEIGHT")
    return int(sides[-1]), int(sides[0])


def parse_factor(text: str) -> tuple[str, float]:
    """'WORD=S' -> (word, s)."""
    word, equals, factor = text.rpartition("=")
    try:
        s = float(factor)
    except ValueError:
        s = None
    if not equals or not word.strip() or s is None:
        raise argparse.ArgumentTypeError(f"{text!r} must be WORD=S, a word of the prompt and a number")
    return word.strip(), s


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"magicmix: {one_line(message)}\n")  # without the usage


# The options that magicmix() takes as they are, with its defaults; a checkpoint's magicmix.json may have better ones.
KEYWORDS = ("k_max", "k_min", "nu", "steps", "guidance", "negative", "reweight", "sampler", "eta")
DEFAULTS = {name: inspect.signature(magicmix).parameters[name].default for name in KEYWORDS}
DEFAULTS |= {"reweight": {}, "seed": 0, "count": 1, "size": None, "output": "mix.png", "device": "auto"}
# What a picture's metadata may set, and as what: never where to write or where to compute.
PARAMETERS = {
    "prompt": str, "layout": str, "layout_prompt": str, "weights": str, "k_max": (int, float), "k_min": (int, float),
    "nu": (int, float), "steps": int, "guidance": (int, float), "negative": str, "reweight": dict, "sampler": str,
    "eta": (int, float), "seed": int, "size": list, "dtype": str, "vae": str, "no_ema": bool, "prediction": str,
    "upcast_attention": str, "vae_dtype": str,
}  # fmt: skip
CHOICES = {"sampler": ("ddim", "ddpm"), "dtype": tuple(DTYPES), "vae_dtype": tuple(DTYPES),
           "prediction": ("auto", "epsilon", "v"), "upcast_attention": ("auto", "on", "off")}  # fmt: skip
LAYOUTS = {"layout", "layout_prompt"}
MOST_TEXT = 1 << 18  # characters of metadata; of a prompt, some hundreds are read
LOADING = ("weights", "vae", "no_ema", "prediction", "upcast_attention", "vae_dtype")  # recorded where they were given


def parse(argv: list[str]) -> dict:
    """The options that were given, by name; those that were not are absent."""
    parser = Parser(
        prog="magicmix.py",
        description="Mixes the content of a prompt into the layout of a picture or of another prompt (MagicMix, "
        "arXiv 2210.16056). Denoising starts at step K_max from the layout's noise; down to K_min each latent is "
        "interpolated with the layout's, x = nu * content + (1 - nu) * layout; below K_min the prompt alone finishes.",
        epilog="Defaults in brackets are general; a checkpoint may bring its own (the embedded one does).",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("prompt", nargs="?", help="the content: what the picture is to become")
    add("--layout", metavar="IMAGE", help="take the layout from this picture (image-text mixing)")
    add("--layout-prompt", metavar="TEXT", help="take the layout from this prompt's own denoising (text-text mixing)")
    add("-o", "--output", help="the PNG to write; with --count N, SEED is added to the name [mix.png]")
    add("--weights", metavar="SOURCE", help="a checkpoint: a folder in the diffusers layout, an original-layout "
        ".safetensors file, or a hub id, optionally @revision [the embedded one]")  # fmt: skip
    add("--vae", metavar="PATH", help="another autoencoder, a folder or a file [the checkpoint's]")
    add("--no-ema", action="store_true", help="the raw weights, where a file has averaged ones too")
    add("--prediction", choices=CHOICES["prediction"], help="what the UNet predicts [auto: its config, or a probe]")
    add("--upcast-attention", choices=CHOICES["upcast_attention"], help="attention in float32 [auto: the config]")
    add("--k-max", type=float, help="K_max as a fraction of the steps: where denoising starts. Higher: less of the "
        "layout's detail stays [0.6]")  # fmt: skip
    add("--k-min", type=float, help="K_min as a fraction of the steps: where mixing stops. Lower: more of the "
        "layout stays [0.3]")  # fmt: skip
    add("--nu", type=float, help="nu, the content's share in each mixture; 1 is plain image-to-image [0.9]")
    add("--steps", type=int, help="T, sampler steps from pure noise to clean, 1 to 999 [50]")
    add("--guidance", type=float, help="classifier-free guidance scale; 1 is none [7.5]")
    add("--negative", metavar="TEXT", help="what to move away from, in place of the empty prompt [empty]")
    add("--reweight", metavar="WORD=S", type=parse_factor, action="append",
        help="multiply the cross-attention to a word of the prompt by S; 0 or less removes it; repeatable")  # fmt: skip
    add("--sampler", choices=CHOICES["sampler"], help="the sampler [ddim]")
    add("--eta", type=float, help="DDIM's noise, 0 (deterministic) to 1 [0]")
    add("--seed", type=int, help="the seed of the first picture's noise eps [0]")
    add("--count", type=int, metavar="N", help="variations, with seeds SEED to SEED + N - 1, in one batch [1]")
    add("--size", type=parse_size, help="pixels of a side, or WIDTHxHEIGHT [the checkpoint's own]")
    add("--device", help="cpu, cuda, mps ... [auto: a GPU where there is one]")
    add("--dtype", choices=list(DTYPES), help="precision of the UNet [fp32 on a CPU, fp16 on a GPU]")
    add("--vae-dtype", choices=list(DTYPES), help="precision of the VAE; fp16 overflows in some checkpoints [fp32]")
    add("--quiet", action="store_true", help="no progress bar, no messages but the paths that --again follows")
    add("--debug", action="store_true", help="show the traceback of an error as well")
    add("--again", metavar="PICTURE", help="make a picture again from the parameters in it; options override them")
    given = vars(parser.parse_args(argv))
    if "reweight" in given:
        given["reweight"] = dict(given["reweight"])
    return given


def choose_device(name: str) -> torch.device:
    """Raises ValueError for a device that torch does not know or that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {name!r} cannot be used ({reason}); use cpu, or auto for what is there") from error
    return torch.device(name)


def precision(name: str, device: torch.device) -> torch.dtype:
    """Raises ValueError when the device cannot compute in that precision."""
    try:
        x = torch.ones(1, 4, 4, 4, device=device, dtype=DTYPES[name])
        F.conv2d(x, x).item()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"dtype {name} cannot be used on device {str(device)!r} ({reason}); use fp32") from error
    return DTYPES[name]


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "safetensors", "pillow", "numpy")}


def recall(asked: dict) -> tuple[dict, dict]:
    """The metadata of the picture to make again, and its parameters overridden by the options asked for."""
    before = read_metadata(Path(asked["again"]))
    recorded = before["parameters"]
    if asked.keys() & LAYOUTS:  # a layout of either kind replaces the recorded one
        recorded = {name: value for name, value in recorded.items() if name not in LAYOUTS}
    for name in ("layout", "weights", "vae"):
        if name in recorded and name not in asked:  # a path that comes from a file is shown before it is followed
            print(f"{name}: {one_line(recorded[name])}")
    return before, recorded | asked


def run(asked: dict) -> list[Path]:
    """Does what the command line asks for and returns the pictures' paths. Raises ValueError or OSError for what is
    wrong with it, as far as possible before the checkpoint is loaded and in any case before the first step;
    FloatingPointError as magicmix() does."""
    before, given = recall(asked) if "again" in asked else ({}, asked)
    if "prompt" not in given:
        raise ValueError("the content prompt is missing; give it as the first argument")
    if len(given.keys() & LAYOUTS) != 1:
        raise ValueError("give one of --layout IMAGE and --layout-prompt TEXT")
    quiet = given.get("quiet", False)
    options = DEFAULTS | {"k_max": 1.0, "k_min": 0.0} | given  # what was not given may yet come from the checkpoint
    prompts = {name: given[name] for name in ("prompt", "layout_prompt", "negative") if name in given}
    check_count(options["count"])  # before as many seeds are listed
    seeds = range(options["seed"], options["seed"] + options["count"])
    check(prompts.values(), seeds, options["size"] or (1, 1), **{name: options[name] for name in KEYWORDS})
    output = Path(options["output"])
    paths = [output.with_name(f"{output.stem}-{seed}{output.suffix}") for seed in seeds] if len(seeds) > 1 else [output]
    for path in paths:
        check_output(path)
    picture = digest = None
    if "layout" in given:
        picture, digest, more = open_layout(Path(given["layout"]))
        if "layout" not in asked and before.get("layout_sha256", digest) != digest:
            raise ValueError(f"layout {given['layout']!r} has changed; give the picture to use with --layout")
        if more and not quiet:
            print("layout: it holds more than one picture; the first is used")
    device = choose_device(options["device"])
    dtype = given.get("dtype") or ("fp32" if device.type == "cpu" else "fp16")

    models = weights.load(
        given.get("weights") or weights.TINY, device, precision(dtype, device), vae=given.get("vae"),
        ema=not given.get("no_ema"), prediction=given.get("prediction", "auto"),
        upcast_attention={"on": True, "off": False}.get(given.get("upcast_attention")),
        vae_dtype=precision(given.get("vae_dtype", "fp32"), device),
    )  # fmt: skip
    if before.get("checkpoint", models.identity) != models.identity:
        raise ValueError("the picture was made with another checkpoint; give its folder with --weights")
    check_types(models.defaults, "magicmix.json")
    options = DEFAULTS | models.defaults | given
    height, width = size = tuple(options["size"] or models.size)
    if not quiet:
        if picture and picture.size != (width, height):
            print(f"layout: resized and centre-cropped from {picture.width}x{picture.height} to {width}x{height}")
        for name, prompt in prompts.items():
            if unread := cut_off(models.tokenizer, prompt):
                print(f"{name}: beyond {models.tokenizer.model_max_length} tokens, cut off: {one_line(unread)}")
    layout = fit(picture, size) if picture else given["layout_prompt"]
    keywords = {name: options[name] for name in KEYWORDS}
    mixing = magicmix(models, given["prompt"], layout, seeds=seeds, size=size, **keywords)
    K_max, K_min = in_steps(options["k_max"], options["k_min"], options["steps"])
    last = follow(mixing, K_max + (0 if picture else options["steps"] - K_min), quiet)
    x = last.x if last else encode(models, layout).expand(len(seeds), -1, -1, -1)  # K_max = 0: the layout itself

    source = "layout" if picture else "layout_prompt"
    for seed, made, path in zip(seeds, decode(models, x), paths, strict=True):
        parameters = {"prompt": given["prompt"], source: given[source], **keywords, "seed": seed, "size": size,
                      "dtype": dtype} | {name: given[name] for name in LOADING if name in given}  # fmt: skip
        metadata = {"parameters": parameters, "checkpoint": models.identity, "versions": versions()}
        save(made, path, metadata | ({"layout_sha256": digest} if digest else {}))
    return paths


def follow(steps: Iterator[Step], total: int, quiet: bool) -> Step | None:
    """Runs the generator under a progress bar that names the phase; returns the last step, None if there was none."""
    from tqdm import tqdm

    last = None
    with tqdm(total=total, disable=quiet, unit="step") as bar:
        for last in steps:
            bar.set_description(last.phase)
            bar.update()
    return last


def main(argv: list[str] | None = None) -> int:
    given = parse(sys.argv[1:] if argv is None else argv)
    try:
        for path in run(given):
            if not given.get("quiet"):
                print(path)
        return 0
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        message = str(error)
        # torch has a type of its own for this on a GPU only
        if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory|ALLOC_FAILED", message):
            message = "out of memory; a smaller --size, --count 1 or --dtype bf16 needs less"
        elif isinstance(error, RuntimeError):
            raise
        if given.get("debug"):
            traceback.print_exc()
        print(f"magicmix: {one_line(message)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # an exception, from here on: save() has something to clear away
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
