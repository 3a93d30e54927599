"""Who is faster on the same work, this project or diffusers: both in one process, on the same weights, in turns.

    python -m lab.bench.speed [--device cuda] [--dtypes float32 bfloat16] [--pairs 7] [--steps 50] ...

The works are a UNet step (batch 2, as guidance needs it), decoding a picture, encoding two prompts, and a whole mix of
50 steps at a reduced size: prompt and picture to latents, K_max steps, decoding. The weights are random and of SD 1.5's
shapes, made in memory; --shape embedded takes the embedded checkpoint's. They come to both sides as a load would bring
them: here through weights.fill, there by load_state_dict.

Each work is done once by each side, uncounted, then in pairs, of which either side begins every other one. Reported are
the median seconds, the median ratio of the pairs with the smallest and the largest, and how far the two results are
apart: the largest difference over the largest value. On a CPU the seconds are those of the processor, of all threads
together, so that other work on the machine enters less. On CUDA the clock waits for the device, and beside the networks
as they are (eager) both sides are also measured in channels-last, compiled, and compiled with CUDA graphs. A second
table has what this project's own choices cost: token weights against none, guidance 1 against two halves.

The tables are written into docs/measured.md (--page), in place of what the same kind of device and the same shapes gave
before.
"""

import argparse
import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers
from torch import Tensor

import clip
import unet
import vae
import weights
from lab.bench import page
from magicmix import decode, magicmix
from scheduler import ScheduleConfig

SD15 = {"text_encoder": clip.CLIPTextConfig(), "unet": unet.UNetConfig(), "vae": vae.VAEConfig()}
THEIRS = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
MIX = dict(k_max=0.6, k_min=0.3, nu=0.9, guidance=7.5)
PROMPT, WORD = "a tiger", "tiger"
# What is done with each network before it is measured. The first is eager execution, as the networks are loaded.
VARIANTS = {
    "eager": lambda network: network,
    "channels-last": lambda network: network.to(memory_format=torch.channels_last),
    "compiled": torch.compile,
    "CUDA graphs": lambda network: torch.compile(network, mode="reduce-overhead"),
}


# ------------------------------------------------------------------------------------------------- the two sides


@dataclasses.dataclass
class Source:
    """What both sides are built from: part -> config, part -> its tensors in float32, and a tokenizer."""

    configs: dict[str, object]
    tensors: dict[str, dict[str, Tensor]]
    tokenizer: object


def source(shape: str) -> Source:
    """shape: "sd15", with random weights, or "embedded", the checkpoint in this repository."""
    if shape == "embedded":
        opened = weights.open_source(weights.TINY, half=False, ema=True)
        tensors = {part: {n: t.float() for n, t in opened.tensors[part].items()} for part in weights.MODELS}
        return Source(opened.configs, tensors, weights.load_tokenizer(opened.tokenizer))
    torch.manual_seed(0)
    return Source(
        SD15 | {"scheduler": ScheduleConfig()},
        {part: weights.MODELS[part](config).state_dict() for part, config in SD15.items()},
        weights.load_tokenizer(None),
    )


class Ours:
    """This project: each method does one work and returns its result."""

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device, variant: str):
        networks = {part: weights.build(part, source.configs[part]) for part in weights.MODELS}
        for part, network in networks.items():
            weights.fill(network, source.tensors[part], part, dtype, device)
        prepare(networks, variant)
        self.models = weights.Checkpoint(
            tokenizer=source.tokenizer, **networks, schedule=source.configs["scheduler"], device=device, dtype=dtype
        )

    def step(self, x: Tensor, t: Tensor, context: Tensor, token_weights: Tensor | None = None) -> Tensor:
        return self.models.unet(x, t, context, token_weights)

    def decode(self, latent: Tensor) -> Tensor:
        return self.models.vae.decode(latent)

    def text(self, ids: Tensor) -> Tensor:
        return self.models.text_encoder(ids)

    def mix(self, picture: Tensor, eps: Tensor, steps: int) -> Tensor:
        *_, last = magicmix(self.models, PROMPT, picture, noise=lambda: eps, steps=steps, **MIX)
        decode(self.models, last.x)
        return last.x


class Theirs:
    """The same works by the modules of diffusers and transformers."""

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device, variant: str):
        configs = {part: dataclasses.asdict(source.configs[part]) for part in weights.MODELS}
        with weights.NoStart():
            networks = {part: kind(**configs[part]) for part, kind in THEIRS.items()}
        networks["text_encoder"] = transformers.CLIPTextModel(transformers.CLIPTextConfig(**configs["text_encoder"]))
        for part, network in networks.items():
            own = {n.removeprefix("text_model."): n for n in network.state_dict()}  # transformers 5.6 drops the prefix
            state = {own[n.removeprefix("text_model.")]: t.to(device, dtype) for n, t in source.tensors[part].items()}
            network.load_state_dict(state, strict=True, assign=True)
            network.eval().requires_grad_(False).to(device)  # what is no parameter
        prepare(networks, variant)
        self.unet, self.vae, self.text_encoder = (networks[part] for part in ("unet", "vae", "text_encoder"))
        self.tokenizer, self.dtype, self.device = source.tokenizer, dtype, device
        fields = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "steps_offset")
        schedule = {name: getattr(source.configs["scheduler"], name) for name in fields}
        self.scheduler = diffusers.DDIMScheduler(**schedule, set_alpha_to_one=False, clip_sample=False)

    def step(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.unet(x, t, context).sample

    def decode(self, latent: Tensor) -> Tensor:
        return self.vae.decode(latent.to(self.dtype) / self.vae.config.scaling_factor).sample

    def text(self, ids: Tensor) -> Tensor:
        return self.text_encoder(ids)[0]

    def mix(self, picture: Tensor, eps: Tensor, steps: int) -> Tensor:
        """MagicMix's loop around a DDIM step, written as a pipeline of diffusers is."""
        K_max, K_min = (round(MIX[name] * steps) for name in ("k_max", "k_min"))
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(["", PROMPT], padding="max_length", max_length=length, return_tensors="pt")
        context = self.text(tokens.input_ids.to(self.device))
        x0 = self.vae.encode(picture.to(self.dtype)).latent_dist.mean.float() * self.vae.config.scaling_factor
        self.scheduler.set_timesteps(steps)
        t = self.scheduler.timesteps.flip(0)  # t[k - 1] is that of k steps left
        x = self.scheduler.add_noise(x0, eps, t[K_max - 1 : K_max])
        for k in range(K_max, 0, -1):
            e_uncond, e_cond = self.step(torch.cat([x, x]).to(self.dtype), t[k - 1], context).float().chunk(2)
            e = e_uncond + MIX["guidance"] * (e_cond - e_uncond)
            x = self.scheduler.step(e, t[k - 1], x).prev_sample
            if k - 1 >= K_min:
                layout = self.scheduler.add_noise(x0, eps, t[k - 2 : k - 1]) if k > 1 else x0
                x = MIX["nu"] * x + (1 - MIX["nu"]) * layout
        self.decode(x)
        return x


def prepare(networks: dict[str, torch.nn.Module], variant: str) -> None:
    """Puts the networks into the variant, the VAE by its two halves. The text encoder is not made a CUDA graph: its
    states are used in every step, and what a graph returns lasts until the next one runs."""
    change = VARIANTS[variant]
    networks["unet"] = change(networks["unet"])
    networks["text_encoder"] = VARIANTS["compiled" if variant == "CUDA graphs" else variant](networks["text_encoder"])
    for half in ("encoder", "decoder"):
        setattr(networks["vae"], half, change(getattr(networks["vae"], half)))


# --------------------------------------------------------------------------------------------------- what is timed


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: two ways of doing a work, in pairs."""

    names: tuple[str, ...]
    seconds: tuple[float, float]  # medians
    ratios: list[float]  # of the pairs, sorted
    difference: float  # of the two results, over the second's largest value

    def text(self, with_difference: bool) -> str:
        ratio = f"{statistics.median(self.ratios):.2f} ({self.ratios[0]:.2f} .. {self.ratios[-1]:.2f})"
        cells = [*self.names, *map(duration, self.seconds), ratio, *[f"{self.difference:.0e}"] * with_difference]
        return f"| {' | '.join(cells)} |"


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Of the clock on CUDA, of the process on a CPU."""
    if device.type == "cpu":
        began = time.process_time()
        call()
        return time.process_time() - began
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began


@torch.no_grad()
def compare(names: tuple[str, ...], a: Callable, b: Callable, pairs: int, device: torch.device, alike=True) -> Row:
    """a against b; `alike` where they give the same result."""
    ours, theirs = a().float().clone(), b().float().clone()  # warm; cloned, as a CUDA graph writes over its results
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item() if alike else float("nan")
    rounds = []
    for i in range(pairs):
        if i % 2:
            second = seconds(b, device)
            rounds.append((seconds(a, device), second))
        else:
            rounds.append((seconds(a, device), seconds(b, device)))
    medians = tuple(statistics.median(column) for column in zip(*rounds))
    row = Row(names, medians, sorted(x / y for x, y in rounds), difference)
    print(row.text(alike), flush=True)
    return row


def measure(
    source: Source, dtype: torch.dtype, device: torch.device, variant: str, args
) -> tuple[list[Row], list[Row]]:
    """The rows against diffusers, and those of this project against itself."""
    ours, theirs = Ours(source, dtype, device, variant), Theirs(source, dtype, device, variant)
    name, f, g = str(dtype).removeprefix("torch."), source.configs["vae"].factor, torch.Generator().manual_seed(0)
    normal = lambda count, channels, side: torch.randn(count, channels, side, side, generator=g).to(device)
    length, width = source.tokenizer.model_max_length, source.configs["unet"].cross_attention_dim
    ids = source.tokenizer(["", PROMPT], padding="max_length", max_length=length, return_tensors="pt").input_ids.to(
        device
    )
    context, t = torch.randn(2, length, width, generator=g).to(device, dtype), torch.full((2,), 501, device=device)
    xs = {side: normal(2, 4, side // f).to(dtype) for side in args.step}
    works = {f"UNet step, batch 2, {side} px": ("step", x, t, context) for side, x in xs.items()} | {
        f"decoding, {args.decode} px": ("decode", normal(1, 4, args.decode // f)),
        "text, 2 prompts": ("text", ids),
        f"whole mix, {args.steps} steps, {args.mix} px": (
            "mix", normal(1, 3, args.mix).clamp(-1, 1), normal(1, 4, args.mix // f), args.steps
        ),
    }  # fmt: skip
    against = []
    for work, (method, *inputs) in works.items():
        here, there = (partial(getattr(side, method), *inputs) for side in (ours, theirs))
        against.append(compare((name, variant, work), here, there, args.pairs, device))
    if variant != "eager":
        return against, []
    x, s = xs[args.step[0]], clip.token_weights(source.tokenizer, PROMPT, {WORD: 0.5}).expand(2, -1).to(device)
    both = partial(ours.step, x, t, context)
    choices = {
        ("token weights", "none"): partial(ours.step, x, t, context, s),
        ("guidance 1, one half", "two halves"): partial(ours.step, x[:1], t[:1], context[:1]),
    }
    own = [compare((name, *pair), choice, both, args.pairs, device, alike=False) for pair, choice in choices.items()]
    return against, own


# ------------------------------------------------------------------------------------------------------- the page


def section(against: list[Row], own: list[Row], device: torch.device, args) -> str:
    clock = "processor time of all threads" if device.type == "cpu" else "time by the clock"
    shapes = "SD 1.5's shapes, random weights" if args.shape == "sd15" else "the embedded checkpoint"
    return "\n".join([
        f"{page.machine(device)}; {shapes}; {clock}, medians of {args.pairs} pairs. The ratio is the median of the "
        "pairs', with the smallest and the largest; the difference is that of the results over the largest value.",
        "",
        "| dtype | networks | work | here | diffusers | ratio | difference |",
        "|---|---|---|---|---|---|---|",
        *(row.text(with_difference=True) for row in against),
        "",
        f"This project against itself, one UNet step at {args.step[0]} px:",
        "",
        "| dtype | with | against | with | against | ratio |",
        "|---|---|---|---|---|---|",
        *(row.text(with_difference=False) for row in own),
    ])  # fmt: skip


def dtypes_of(device: torch.device) -> list[str]:
    """float32, and what the device computes natively of the half precisions."""
    if device.type == "cuda":
        return ["float32", "float16", *["bfloat16"] * torch.cuda.is_bf16_supported()]
    return ["float32", *["bfloat16"] * bool(page.bfloat16_units())]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", help="default: float32 and what the device has of float16 and bfloat16")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all on CUDA, eager on a CPU")
    parser.add_argument("--shape", choices=("sd15", "embedded"), default="sd15")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=50, help="of the whole mix")
    parser.add_argument("--step", type=int, nargs="+", default=[256, 512], help="pixels of a side in a UNet step")
    parser.add_argument("--decode", type=int, default=256, help="pixels of a side of the decoded picture")
    parser.add_argument("--mix", type=int, default=64, help="pixels of a side of the whole mix")
    parser.add_argument("--page", type=Path, default=page.PAGE, help="where the tables go")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="size ")  # of the mix: small on purpose
    variants = args.variants or (list(VARIANTS) if args.device.type == "cuda" else ["eager"])
    weights_of_both, against, own = source(args.shape), [], []
    for dtype in args.dtypes or dtypes_of(args.device):
        for variant in variants:
            rows = measure(weights_of_both, getattr(torch, dtype), args.device, variant, args)
            against += rows[0]
            own += rows[1]
            # What is there so far, as the whole takes long.
            page.write(args.page, f"speed: {args.shape}, {args.device.type}", section(against, own, args.device, args))


if __name__ == "__main__":
    main()
