"""MagicMix: semantic mixing with diffusion models (Liew et al. 2022, arXiv 2210.16056). The algorithm and its command.

    python magicmix.py "PROMPT" --layout IMAGE            mixes the picture's layout with the prompt's content
    python magicmix.py "PROMPT" --layout-prompt "TEXT"    takes the layout from a prompt instead

k counts the sampler steps that are left: k = T is pure noise, k = 0 is clean. `mix` is the algorithm; everything above
it prepares its arguments, everything below it is the command line.
"""

import argparse
import hashlib
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

import weights
from scheduler import Schedule
from weights import Checkpoint

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
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
    return models.text_encoder(ids.to(models.device))


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

    Raises ValueError for a value out of range, before any step, and FloatingPointError at a step whose latents are
    not finite.
    """
    check(k_max, k_min, nu, steps, guidance, eta, sampler, seeds, reweight or {})
    if reweight:
        token_weights(models.tokenizer, prompt, reweight)
    factor, count = models.vae.config.factor, len(seeds)
    height, width = layout.shape[2:] if isinstance(layout, Tensor) else size or models.size
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
        if isinstance(layout, Tensor):
            x0 = encode(models, layout).expand(count, -1, -1, -1)
            models.release("vae")  # until decoding
            layout_at = partial(schedule.add_noise, x0, eps)
        else:
            states = {steps: eps}
            for state in trajectory(of_layout, eps, steps, K_min):
                states[state.k] = state.x
                yield state
            layout_at = states.__getitem__
        yield from mix(content, layout_at, K_max, K_min, nu)

    return watched(run())


def watched(steps: Iterator[Step]) -> Iterator[Step]:
    """The same steps. Raises FloatingPointError at the first whose latents are not finite."""
    for step in steps:
        if not torch.isfinite(step.x).all():
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


def check(k_max, k_min, nu, steps, guidance, eta, sampler, seeds, reweight) -> None:
    """Raises ValueError with the first offending value and the range that would be right."""
    if not 1 <= steps <= 999:
        raise ValueError(f"steps {steps} is out of range; use 1 to 999")
    for name, value in (("k-max", k_max), ("k-min", k_min), ("nu", nu), ("eta", eta)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} {value} is out of range; use 0 to 1")
    if k_min > k_max:
        raise ValueError(f"k-min {k_min} is above k-max {k_max}; mixing runs from k-max down to k-min")
    if not (math.isfinite(guidance) and guidance >= 0):
        raise ValueError(f"guidance {guidance} is out of range; use a number from 0 on (1: no guidance)")
    if sampler not in ("ddim", "ddpm"):
        raise ValueError(f"sampler {sampler!r} is not known; use ddim or ddpm")
    if not seeds:
        raise ValueError("count 0 makes no picture; use 1 or more")
    for seed in seeds:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed {seed} is out of range; use 0 to 2^64 - 1")
    for word, factor in reweight.items():
        if not math.isfinite(factor):
            raise ValueError(f"reweight {word}={factor} is not a finite number; -2 to 2 is the useful range")


# ------------------------------------------------------------------------------------------- the command line


def open_layout(path: Path, size: tuple[int, int]) -> tuple[Tensor, str]:
    """A picture file as (1, 3, H, W) in [-1, 1] and its sha256.

    EXIF rotation is applied, transparency is laid on white, and the picture is resized to cover `size` = (height,
    width) and centre-cropped to it. Raises FileNotFoundError or ValueError.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"layout {str(path)!r} does not exist; give a picture file") from None
    except OSError as error:
        raise ValueError(f"layout {str(path)!r} cannot be read: {error.strerror}") from None
    try:
        with Image.open(io.BytesIO(data)) as file:
            picture = ImageOps.exif_transpose(file).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"layout {str(path)!r} is not a readable picture: {error}") from None
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB")
    picture = ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    return pixels / 127.5 - 1, hashlib.sha256(data).hexdigest()


def save(picture: Image.Image, path: Path, metadata: dict) -> None:
    """Writes a PNG with the parameters as text; beside the old file first, so that a failure leaves that one whole."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("magicmix", json.dumps(metadata, ensure_ascii=False, sort_keys=True))
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
        try:
            picture.save(file, format="PNG", pnginfo=info)
            file.close()
            os.chmod(file.name, 0o666 & ~umask())
            os.replace(file.name, path)
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise


def umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_metadata(path: Path) -> dict:
    """The parameters in a picture that this program made. Raises FileNotFoundError or ValueError."""
    try:
        with Image.open(path) as file:
            file.load()
            text = file.info.get("magicmix")
        metadata = json.loads(text) if text else None
    except FileNotFoundError:
        raise FileNotFoundError(f"picture {str(path)!r} does not exist; --again needs a magicmix picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"picture {str(path)!r} cannot be read: {error}") from None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("parameters"), dict):
        raise ValueError(f"picture {str(path)!r} has no magicmix parameters; --again needs a picture that has")
    for name, value in metadata["parameters"].items():
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        numbers = all(isinstance(number, (int, float)) for number in inner) and (name != "size" or len(inner) == 2)
        if not isinstance(value, PARAMETERS.get(name, ())) or not numbers:
            raise ValueError(f"picture {str(path)!r} has a parameter that cannot be right: {name} = {value!r}")
    return metadata


def parse_size(text: str) -> tuple[int, int]:
    """'512' or 'WIDTHxHEIGHT' -> (height, width)."""
    try:
        width, height = (int(n) for n in (text.lower().split("x") * 2)[:2])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; use a number of pixels or WIDTHxHEIGHT") from None
    return height, width


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
        self.exit(2, f"magicmix: {message}\n")  # one line, without the usage


# The general defaults; a checkpoint's magicmix.json may have better ones for itself.
DEFAULTS = {
    "output": "mix.png", "k_max": 0.6, "k_min": 0.3, "nu": 0.9, "steps": 50, "guidance": 7.5,
    "negative": "", "reweight": {}, "sampler": "ddim", "eta": 0.0, "seed": 0, "count": 1, "size": None,
    "device": "auto",
}  # fmt: skip


# What a picture's metadata may set, and as what: never where to write or where to compute.
PARAMETERS = {
    "prompt": str, "layout": str, "layout_prompt": str, "weights": str, "k_max": (int, float), "k_min": (int, float),
    "nu": (int, float), "steps": int, "guidance": (int, float), "negative": str, "reweight": dict, "sampler": str,
    "eta": (int, float), "seed": int, "size": list, "dtype": str, "vae": str, "no_ema": bool, "prediction": str,
    "upcast_attention": str, "vae_dtype": str,
}  # fmt: skip
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
    add("--prediction", choices=["auto", "epsilon", "v"], help="what the UNet predicts [auto: its config, or a probe]")
    add("--upcast-attention", choices=["auto", "on", "off"], help="attention in float32 [auto: the config]")
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
    add("--sampler", choices=["ddim", "ddpm"], help="the sampler [ddim]")
    add("--eta", type=float, help="DDIM's noise, 0 (deterministic) to 1 [0]")
    add("--seed", type=int, help="the seed of the first picture's noise eps [0]")
    add("--count", type=int, metavar="N", help="variations, with seeds SEED to SEED + N - 1, in one batch [1]")
    add("--size", type=parse_size, help="pixels of a side, or WIDTHxHEIGHT [the checkpoint's own]")
    add("--device", help="cpu, cuda, mps ... [auto: a GPU where there is one]")
    add("--dtype", choices=list(DTYPES), help="precision of the UNet [fp32 on a CPU, fp16 on a GPU]")
    add("--vae-dtype", choices=list(DTYPES), help="precision of the VAE; fp16 overflows in some checkpoints [fp32]")
    add("--quiet", action="store_true", help="no progress bar, no messages")
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
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def precision(name: str) -> torch.dtype:
    """Raises ValueError for a name that is not in DTYPES; a picture's metadata may hold any."""
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not known; use {', '.join(DTYPES)}")
    return DTYPES[name]


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "safetensors", "pillow", "numpy")}


def run(given: dict) -> list[Path]:
    """Does what the command line asks for and returns the pictures' paths. Raises ValueError or OSError."""
    before = {}
    if "again" in given:
        before = read_metadata(Path(given["again"]))
        given = before["parameters"] | given
    if "prompt" not in given:
        raise ValueError("the content prompt is missing; give it as the first argument")
    if ("layout" in given) == ("layout_prompt" in given):
        raise ValueError("give one of --layout IMAGE and --layout-prompt TEXT")
    quiet, output = given.get("quiet", False), Path(given.get("output", DEFAULTS["output"]))
    if not output.parent.is_dir():
        raise ValueError(f"output folder {str(output.parent)!r} does not exist; make it first")
    if before and not quiet:  # a path that comes from a file is shown before it is followed
        print(*(f"{name}: {given[name]}" for name in ("layout", "weights", "vae") if name in given), sep="\n")

    device = choose_device(given.get("device", DEFAULTS["device"]))
    dtype = given.get("dtype") or ("fp32" if device.type == "cpu" else "fp16")
    models = weights.load(
        given.get("weights") or weights.TINY, device, precision(dtype), vae=given.get("vae"),
        ema=not given.get("no_ema"), prediction=given.get("prediction", "auto"),
        upcast_attention={"on": True, "off": False}.get(given.get("upcast_attention")),
        vae_dtype=precision(given.get("vae_dtype", "fp32")),
    )  # fmt: skip
    if before.get("checkpoint", models.identity) != models.identity:
        raise ValueError("the picture was made with another checkpoint; give its folder with --weights")
    options = DEFAULTS | models.defaults | given
    size = tuple(options["size"] or models.size)
    if "layout" in given:
        source, (layout, digest) = "layout", open_layout(Path(given["layout"]), size)
        if before.get("layout_sha256", digest) != digest:
            raise ValueError(f"layout {given['layout']!r} has changed; give the picture that was used with --layout")
    else:
        source, layout, digest = "layout_prompt", given["layout_prompt"], None

    seeds = list(range(options["seed"], options["seed"] + options["count"]))
    numbers = {name: options[name] for name in ("k_max", "k_min", "nu", "steps", "guidance", "negative", "reweight",
                                                "sampler", "eta")}  # fmt: skip
    mixing = magicmix(models, given["prompt"], layout, seeds=seeds, size=size, **numbers)
    K_max, K_min = in_steps(options["k_max"], options["k_min"], options["steps"])
    last = follow(mixing, K_max + (options["steps"] - K_min if source == "layout_prompt" else 0), quiet)
    x = last.x if last else encode(models, layout).expand(len(seeds), -1, -1, -1)  # K_max = 0: the layout itself

    paths = []
    for seed, picture in zip(seeds, decode(models, x), strict=True):
        path = output.with_name(f"{output.stem}-{seed}{output.suffix}") if len(seeds) > 1 else output
        parameters = {"prompt": given["prompt"], source: given[source], **numbers, "seed": seed, "size": size,
                      "dtype": dtype} | {name: given[name] for name in LOADING if name in given}  # fmt: skip
        metadata = {"parameters": parameters, "checkpoint": models.identity, "versions": versions()}
        save(picture, path, metadata | ({"layout_sha256": digest} if digest else {}))
        paths.append(path)
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
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"magicmix: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # the shell's code for Ctrl-C
    return 0


if __name__ == "__main__":
    sys.exit(main())
