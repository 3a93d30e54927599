"""Makes the kit: the second model, inputs, the reference's numbers, bounds, and the numbers of each mistake.

    python -m lab.port.make [--kit FOLDER]

The reference's numbers are computed in float64 from float32 weights; the schedule and the samplers' arithmetic are
float32, as they are by definition. The bound of an output is MARGIN times the largest error of programs that are right
(`RIGHT`), and at least that in LEAST. Every mistake (mistakes.py) is then made, and must be named where it says. The
table of README.md is written too. Takes some minutes.
"""

import argparse
import contextlib
import dataclasses
import inspect
import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import attention
import clip
import magicmix as program
import unet
import vae
import weights
from command import pictures
from lab.bench import page
from lab.port import cases, reference
from lab.port.cases import KIT, MODELS, QUIET, SAMPLED, Mix, Model
from lab.port.check import Finding, Kit, clearest, module_key
from lab.port.mistakes import MISTAKES, Mistake, made, text_of
from scheduler import Schedule
from weights import Checkpoint
from weights.files import STEMS

MARGIN = 8  # a bound is so many times the noise of right programs, and at least:
LEAST = {
    "noise": 1e-5,  # logarithms and cosines differ between libraries
    "schedule": 1e-5,  # float32 sums of a thousand terms, in any order
    "sampler": 1e-5,
    "units": 1e-6,
    "taps": 1e-6,
    "steps": 1e-5,
    "loop": 3e-4,  # rounding grows over the steps, otherwise on each machine
}
SAMPLES = 64  # positions of an output; those of at most WHOLE values are kept whole, and pictures
WHOLE = 256
# Of each level, how many wrong modules a mistake's numbers are kept of. A port may not have the first of them, and each
# unit is looked at alone.
MODULES = {"units": 1000}
FEW = 3  # of the other levels
MANY = 16  # values of a mistake that are kept, or a few more, evenly taken
PER_STEP = 16  # positions of each step of a mix
GUIDE = Path(__file__).parent / "README.md"


# ------------------------------------------------------------------------------------------------- the second model


def write_sd2(folder: Path) -> None:
    """A random model of SD2's kind: gelu, "!" as padding, linear projections, heads per level, two layers per block, v
    prediction, attention in float32. Its files are float16, so that the numbers in them are exact in any dtype."""
    configs = {
        "text_encoder": clip.CLIPTextConfig(
            vocab_size=2422,
            hidden_size=16,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=20,
            hidden_act="gelu",
        ),
        "unet": unet.UNetConfig(
            block_out_channels=(8, 16, 16),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=2,
            attention_head_dim=(2, 4, 4),
            cross_attention_dim=16,
            use_linear_projection=True,
            upcast_attention=True,
            norm_num_groups=8,
            sample_size=6,
        ),
        "vae": vae.VAEConfig(block_out_channels=(8, 16, 16, 16), layers_per_block=2, norm_num_groups=8),
    }
    known_by = {
        "text_encoder": {"model_type": "clip_text_model"},
        "unet": {"_class_name": "UNet2DConditionModel"},
        "vae": {"_class_name": "AutoencoderKL"},
    }
    generator = torch.Generator().manual_seed(0)
    for part, config in configs.items():
        (folder / part).mkdir(parents=True)
        facts = dataclasses.asdict(config) | known_by[part]
        (folder / part / "config.json").write_text(json.dumps(facts, indent=1) + "\n")
        expected = weights.build(part, config).state_dict()
        state = {name: at_random(name, tensor, generator) for name, tensor in expected.items()}
        save_file(state, folder / part / f"{STEMS[part]}.safetensors", metadata={"format": "pt"})
    (folder / "scheduler").mkdir()
    schedule = json.loads((weights.TINY / "scheduler" / "scheduler_config.json").read_text())
    schedule["prediction_type"] = "v_prediction"
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule, indent=1) + "\n")
    shutil.copy(weights.TINY / "model_index.json", folder)
    shutil.copytree(weights.TINY / "tokenizer", folder / "tokenizer")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / "tokenizer" / name
        facts = json.loads(path.read_text()) | {"pad_token": "!"}
        facts |= {"model_max_length": 20} if "model_max_length" in facts else {}
        path.write_text(json.dumps(facts, indent=1) + "\n")


def at_random(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Weights that keep the size of what goes through them, biases and norms away from 0 and 1."""
    x = torch.randn(tensor.shape, generator=generator)
    if tensor.ndim == 1:
        x = 0.2 * x + ("norm" in name and name.endswith("weight"))
    elif "embedding.weight" not in name:
        x = x / tensor[0].numel() ** 0.5
    return x.half()


# ------------------------------------------------------------------------------------------------------- checkpoints


def checkpoints(kit: Path, dtype: torch.dtype) -> dict[str, Checkpoint]:
    """The kit's models; in float64 without SD2's upcast, which would round to float32."""
    found = {}
    for model in MODELS:
        folder = kit / "sd2" if model.name == "sd2" else model.folder
        models = weights.load(folder, upcast_attention=False if dtype == torch.float64 else None)
        for part in ("text_encoder", "unet", "vae"):
            getattr(models, part).to(dtype)
        found[model.name] = dataclasses.replace(models, dtype=dtype)
    return found


# ------------------------------------------------------------------------------------------------------------- inputs


@torch.no_grad()
def make_inputs(models: dict[str, Checkpoint]) -> dict[str, Tensor]:
    """What the kit feeds a port with, in float32."""
    picture = Image.open(weights.TINY.parents[1] / "docs" / "layouts" / "teapot.png").convert("RGB")
    inputs = {"layout/picture": torch.from_numpy(np.array(picture.crop((8, 20, 120, 108))))}  # (88, 112, 3)
    for model in MODELS:
        found = inputs_of(models[model.name], model, inputs)
        inputs |= {f"{model.name}/{name}": t.float() if t.is_floating_point() else t for name, t in found.items()}
        inputs |= unit_inputs(models[model.name], model, inputs)
        for name, mix in model.mixes.items():
            inputs |= step_inputs(models[model.name], model, name, mix, inputs)
    return inputs


def inputs_of(models: Checkpoint, model: Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """For the sampler, for the networks' calls, and the mixes' eps."""
    g = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(shape, generator=g)
    length = models.tokenizer.model_max_length
    encoded = models.tokenizer(["", "a red tiger"], padding="max_length", max_length=length, return_tensors="pt")
    context = models.text_encoder(encoded.input_ids)
    picture = Image.fromarray(inputs["layout/picture"].numpy())
    layout = lambda height, width: pictures.fit(picture, (8 * height, 8 * width))
    schedule = Schedule(models.schedule, 50)
    both = torch.cat([layout(*model.vae), layout(*model.vae).flip(3) * 0.5])
    found = {
        "taps/text/ids": encoded.input_ids,
        "taps/encode/picture": both,
        "taps/decode/x": models.vae.encode(both.to(models.dtype)),
        **{f"sampler/{name}": normal(len(SAMPLED[1]), 4, 5, 7) for name in ("x", "e", "eps")},
    }
    for name, size, ks in (("square", model.square, (30, 10)), ("oblong", model.oblong, (45, 3))):
        x0 = models.vae.encode(layout(*size).to(models.dtype))
        found[f"taps/{name}/x"] = torch.cat([schedule.add_noise(x0, normal(1, 4, *size), k) for k in ks])
        found[f"taps/{name}/t"] = torch.tensor([schedule.t[k] for k in ks])
        found[f"taps/{name}/context"] = context
    size = models.latent_size(model.size)
    for mix in model.mixes.values():
        found[f"loop/eps/{mix.seed}"] = program.Noise(mix.seed, size, torch.device("cpu"))()
    return found


def unit_inputs(models: Checkpoint, model: Model, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each unit is given within a call: the natural inputs."""
    found = {}
    calls = {"text": "text_encoder", "encode": "vae", "oblong": "unet", "decode": "vae"}
    for call, part in calls.items():
        run = lambda call=call: reference.call(models, call, inputs, model)
        for name, module, given, _ in reference.watched(getattr(models, part), run):
            if name in model.units[part]:
                at = f"{model.name}/units/{part}/{name}/"
                takes = inspect.signature(module.forward).parameters  # torch's own norms call it "input"
                for argument, value in zip(["x" if a == "input" else a for a in takes], given):
                    if value is not None:
                        value = value if isinstance(value, Tensor) else torch.tensor(value)
                        found[at + argument] = value.float() if value.is_floating_point() else value
                if name.endswith("attn2"):
                    s = torch.ones(2, given[1].shape[1])
                    s[1, 2:4] = torch.tensor([0.5, -1.0])
                    found[at + "token_weights"] = s
    found[f"{model.name}/units/unet/time_proj/t"] = torch.tensor([1, 21, 501, 981])
    return found


def step_inputs(models: Checkpoint, model: Model, name: str, mix: Mix, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The states that each step of a mix starts from, and what else it needs."""
    at, eps = f"{model.name}/steps/{name}/", inputs[f"{model.name}/loop/eps/{mix.seed}"]
    steps = reference.run(models, model, mix, inputs)
    walk = [step.x for step in steps if step.phase == "layout"]
    mixed = [step for step in steps if step.phase != "layout"]
    encoded = clip.encode_prompts(models.tokenizer, models.text_encoder, [mix.negative, mix.prompt])
    found = {"eps": eps, "context": encoded}
    if mix.layout_prompt is None:
        fitted = pictures.fit(Image.fromarray(inputs["layout/picture"].numpy()), model.size)
        x0 = models.vae.encode(fitted)
        start = Schedule(models.schedule, mix.steps).add_noise(x0, eps, mix.options.K_max)
        found |= {"x0": x0}
    else:
        prompts = [mix.negative, mix.layout_prompt]
        found["layout_context"] = clip.encode_prompts(models.tokenizer, models.text_encoder, prompts)
        found["layout_x"] = torch.cat([eps, *walk])  # layout_T .. layout_{K_min}
        start = walk[mix.steps - mix.options.K_max - 1]
    found["x"] = torch.cat([start, *[step.x for step in mixed[:-1]]])  # x_{K_max} .. x_1
    return {at + key: value.float().contiguous() for key, value in found.items()}


# --------------------------------------------------------------------------------------------------- right programs


@contextlib.contextmanager
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def other_formulas() -> Iterator[None]:
    """Norms, attention, and the timestep's embedding written out, as a port writes them."""

    def normalised(x, axes, eps):
        mean = x.mean(axes, keepdim=True)
        return (x - mean) / (((x - mean) ** 2).mean(axes, keepdim=True) + eps).sqrt()

    def layer_norm(self, x):
        return normalised(x, -1, self.eps) * self.weight + self.bias

    def group_norm(self, x):
        y = normalised(x.unflatten(1, (self.num_groups, -1)), (2, 3, 4), self.eps).flatten(1, 2)
        return y * self.weight[:, None, None] + self.bias[:, None, None]

    def attend(q, k, v, heads, causal=False):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if causal:
            scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype).triu(1)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def timestep_embedding(t, dim):
        angles = t.double()[:, None] * 10000 ** (-torch.arange(dim // 2).double() / (dim // 2))
        return torch.cat([angles.cos(), angles.sin()], dim=-1).float()

    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (nn.LayerNorm, "forward", layer_norm),
            (nn.GroupNorm, "forward", group_norm),
            (attention, "attend", attend),
            (clip, "attend", attend),
            (unet, "timestep_embedding", timestep_embedding),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield


@contextlib.contextmanager
def products_in_parts() -> Iterator[None]:
    """Sums of products in another order: over the two halves of the input channels."""
    linear, conv2d = F.linear, F.conv2d

    def halves(right, x, w, bias, axis, *more):
        half = w.shape[1] // 2
        if half == 0:
            return right(x, w, bias, *more)
        first = right(x.narrow(axis, 0, half), w[:, :half], None, *more)
        second = right(x.narrow(axis, half, w.shape[1] - half), w[:, half:], None, *more)
        return first + second if bias is None else first + second + (bias if axis == -1 else bias[:, None, None])

    with (
        mock.patch.object(F, "linear", lambda x, w, bias=None: halves(linear, x, w, bias, -1)),
        mock.patch.object(F, "conv2d", lambda x, w, bias=None, *more: halves(conv2d, x, w, bias, 1, *more)),
    ):
        yield


# name -> (whether channels are last in memory, what else differs): programs that are right, all in float32
RIGHT: dict[str, tuple[bool, Callable]] = {
    "one thread": (False, contextlib.nullcontext),
    "two threads": (False, two_threads),
    "channels last": (True, contextlib.nullcontext),
    "written out": (False, other_formulas),
    "sums in parts": (False, products_in_parts),
}


def right_outputs(kit: Path, inputs: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(output's name, tensor) of every one of them."""
    for channels_last, differing in RIGHT.values():
        found = checkpoints(kit, torch.float32)
        if channels_last:
            for models in found.values():
                models.unet.to(memory_format=torch.channels_last)
                models.vae.to(memory_format=torch.channels_last)
        with differing():
            yield from reference.outputs(found, MODELS, inputs)


# ------------------------------------------------------------------------------------------------------------ the kit


def module_of(name: str, models: dict[str, Checkpoint]) -> str:
    """What an output is the output of, in words."""
    model, level, *rest = name.split("/")
    words = {
        "tokens": "tokenizer",
        "schedule": "schedule",
        "noise": "eps as torch's generator on the CPU draws it",
        "sampler": "single sampler step",
        "steps": "single step of a mix, from the reference's latents",
        "loop": "whole mix",
    }
    if level in words:
        return words[level]
    part, path = rest[0], rest[1]
    network = getattr(models[model], part if level == "units" else reference.CALLS[part][0])
    if path == "output":
        return f"the result of {type(network).__name__}"
    if path == "time_proj":
        return "timestep_embedding"
    parents = [network.get_submodule(path.rsplit(".", up)[0]) for up in range(1, path.count(".") + 1)]
    parent = next((m for m in parents if not isinstance(m, nn.ModuleList)), network)
    quiet = f", its input times {QUIET}" if rest[-1] == "quiet" else ""
    return f"{type(network.get_submodule(path)).__name__} of {type(parent).__name__}{quiet}"


def facts_of(name: str, tensor: Tensor, models: dict[str, Checkpoint]) -> dict:
    """An output's row in kit.json, but for its bound."""
    shape, axes = list(tensor.shape), {4: "BHWC", 3: "BND", 2: "BD", 1: "L"}[tensor.ndim]
    if tensor.ndim == 4:
        assert not tensor.shape[1] == tensor.shape[2] == tensor.shape[3], f"{name}: {shape} has two readings"
        shape = [shape[0], *shape[2:], shape[1]]
    if tensor.dtype == torch.uint8:
        axes = "HWC"
    rows = rows_of(name)
    return {
        "shape": shape,
        "axes": axes,
        "module": module_of(name, models),
        "largest": 1.0 if not tensor.is_floating_point() else float(tensor.abs().max()),
    } | ({"rows": rows} if rows else {})


def rows_of(name: str) -> list[str]:
    """What the rows of an output are, in words, where they are not pictures of a batch."""
    model, level, *rest = name.split("/")
    if name.endswith("tokens/ids"):
        return [f"the prompt {prompt[:40]!r}" for prompt in cases.PROMPTS]
    if name.endswith("schedule/K"):
        return [f"T {T}, k_max {k_max}, k_min {k_min}" for T, k_max, k_min in cases.FRACTIONS]
    if level == "sampler":
        return [f"k {k}" for k in SAMPLED[1]]
    if level not in ("steps", "loop") or rest[-1] in ("start", "picture", "resized"):
        return []
    mix = next(m for m in MODELS if m.name == model).mixes[rest[0]]
    K_max, K_min = mix.options.K_max, mix.options.K_min
    along = [f"the step from k {k} along the layout's prompt" for k in range(mix.steps, K_min, -1)]
    mixed = [f"the step from k {k}" for k in range(K_max, 0, -1)]
    if rest[-1].startswith("layout_"):
        return along
    return along + mixed if level == "loop" and mix.layout_prompt else mixed


def calls_of(inputs: dict[str, Tensor], stored: dict[str, str]) -> dict[str, dict[str, str]]:
    """What is computed from the kit's inputs: call -> argument -> the input's name in the file, in the order in which
    modules take them. An output belongs to the call that its name begins with."""
    calls = {}
    for name in inputs:
        at, _, argument = name.rpartition("/")
        calls.setdefault(at, {})[argument] = stored[name]
    order = lambda argument: reference.ARGUMENTS.index(argument) if argument in reference.ARGUMENTS else -1
    return {at: dict(sorted(given.items(), key=lambda row: order(row[0]))) for at, given in calls.items()}


def asked_of_a_port() -> dict:
    """cases.py, for ports: what is to be computed."""
    facts = dataclasses.asdict
    models = {
        m.name: {"units": m.units, "size": m.size, "mixes": {n: facts(x) for n, x in m.mixes.items()}} for m in MODELS
    }
    return {
        "prompts": cases.PROMPTS,
        "weighted": cases.WEIGHTED,
        "steps": cases.STEPS,
        "fractions": cases.FRACTIONS,
        "noise": cases.NOISE,
        "sampled": cases.SAMPLED,
        "quiet": cases.QUIET,
        "models": models,
    }


def stored_once(inputs: dict[str, Tensor]) -> dict[str, str]:
    """input -> the first input with the same numbers, which the file holds for both."""
    first = {}
    return {
        name: first.setdefault((t.dtype, tuple(t.shape), t.contiguous().numpy().tobytes()), name)
        for name, t in inputs.items()
    }


def positions_key(shape: list[int], tensor: Tensor) -> str | None:
    """Where the positions of an output stand, one list per shape; None for one that is kept whole."""
    is_whole = tensor.numel() <= WHOLE or not tensor.is_floating_point()
    return None if is_whole else f"positions/{'x'.join(map(str, shape))}"


def positions_of(key: str) -> Tensor:
    """Positions in an output of a shape, at random but evenly over the first axis: (positions, axes), int16."""
    shape = [int(n) for n in key.removeprefix("positions/").split("x")]
    count = SAMPLES if shape[0] <= 2 else PER_STEP * shape[0]
    generator = torch.Generator().manual_seed(sum(shape))
    columns = [torch.randint(n, (count,), generator=generator) for n in shape]
    columns[0] = torch.arange(count) * shape[0] // count
    return torch.stack(columns, dim=1).to(torch.int16)


def sampled(facts: dict, tensor: Tensor) -> Tensor:
    """An output's values at its positions, as check.py takes them from a dump."""
    channels_last = tensor.movedim(1, -1) if facts["axes"] == "BHWC" else tensor
    key = positions_key(facts["shape"], tensor)
    return channels_last.reshape(-1) if key is None else channels_last[tuple(positions_of(key).long().T)]


def bound_of(name: str, tensor: Tensor, noise: float) -> dict:
    if tensor.dtype == torch.uint8:
        return {"bound": 1.0, "mean_bound": 0.001}  # grey levels
    if not tensor.is_floating_point():
        return {"bound": 0.0}
    least = LEAST.get(name.split("/")[1], 0.0)  # token weights are equal
    return {"bound": float(f"{max(MARGIN * noise, least):.1e}"), "noise": float(f"{noise:.1e}")}


def make(kit: Path) -> None:
    """Everything but the mistakes."""
    shutil.rmtree(kit / "sd2", ignore_errors=True)
    write_sd2(kit / "sd2")
    truth = checkpoints(kit, torch.float64)
    inputs = make_inputs(truth)
    exact = dict(reference.outputs(truth, MODELS, inputs))
    outputs = {name: facts_of(name, tensor, truth) for name, tensor in exact.items()}
    numbers = {name: sampled(outputs[name], tensor) for name, tensor in exact.items()}
    noise = dict.fromkeys(outputs, 0.0)
    for name, tensor in right_outputs(kit, inputs):
        error = (sampled(outputs[name], tensor).double() - numbers[name].double()).abs().max().item()
        noise[name] = max(noise[name], error / outputs[name]["largest"])
    for name, tensor in exact.items():
        outputs[name] |= bound_of(name, tensor, noise[name])
    stored = stored_once(inputs)
    save(kit / "inputs.safetensors", {name: inputs[name] for name in stored.values()})
    keys = sorted({positions_key(outputs[name]["shape"], tensor) for name, tensor in exact.items()} - {None})
    save(kit / "expected.safetensors", numbers | {key: positions_of(key) for key in keys})
    rows = [f"{json.dumps(name)}: {json.dumps(facts)}" for name, facts in outputs.items()]
    calls = [f"{json.dumps(name)}: {json.dumps(given)}" for name, given in calls_of(inputs, stored).items()]
    asked = json.dumps(asked_of_a_port(), indent=1)
    lines = [
        '{"asked": ' + asked + ', "calls": {',
        ",\n".join(calls),
        '}, "outputs": {',
        ",\n".join(rows),
        "}}",
    ]  # a row per line
    (kit / "kit.json").write_text("\n".join(lines) + "\n")


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    """In float32, int32, int16 or uint8."""
    plain = {torch.float64: torch.float32, torch.int64: torch.int32}
    save_file({n: t.to(plain.get(t.dtype, t.dtype)).contiguous().clone() for n, t in tensors.items()}, path)
    path.chmod(0o644)


def read_inputs(kit: Path) -> dict[str, Tensor]:
    """The inputs under all their names, as `reference` takes them."""
    tensors = load_file(kit / "inputs.safetensors")
    calls = json.loads((kit / "kit.json").read_text())["calls"]
    named = {f"{at}/{argument}": tensors[name] for at, given in calls.items() for argument, name in given.items()}
    return {name: t.long() if t.dtype == torch.int32 else t for name, t in named.items()}


# --------------------------------------------------------------------------------------------------------- mistakes


def add_mistakes(kit: Path) -> list[str]:
    """Makes every mistake, puts its numbers at the first modules that are wrong in each level into the kit, and returns
    the rows of the guide's table. Raises AssertionError for one that is not named where it should be."""
    for name in ("mistakes.json", "mistakes.safetensors"):
        (kit / name).unlink(missing_ok=True)  # of an earlier kit
    checker, inputs, rows = Kit(kit), read_inputs(kit), []
    wrong = {}  # output/number of the mistake -> values
    found = checkpoints(kit, torch.float32)
    for number, (mistake, where) in enumerate(MISTAKES.items()):
        first = {}  # level -> what is wrong, module by module: [[(finding, tensor), ...], ...]
        with made(mistake, found) as changed:
            named = reference.outputs(changed, MODELS, inputs)
            for module, group in itertools.groupby(named, key=lambda row: module_key(row[0])):
                if first and "/loop/" in module:
                    break  # whole mixes take long, and an earlier level tells more
                checked = [(checker.check(name, tensor.numpy()), tensor) for name, tensor in group]
                if wrong_ones := [(finding, tensor) for finding, tensor in checked if not finding.is_right]:
                    first.setdefault(module.split("/")[1], []).append(wrong_ones)
        finding = clearest([finding for finding, _ in next(iter(first.values()))[0]]) if first else None
        named_first = finding.name if finding else None
        assert named_first == where, f"{text_of(mistake)}: {named_first} is named first, not {where}"
        kept = itertools.chain.from_iterable(ones[: MODULES.get(level, FEW)] for level, ones in first.items())
        for shown, tensor in itertools.chain.from_iterable(kept):
            if shown.error is not None:
                values = sampled(checker.outputs[shown.name], tensor)
                wrong[f"{shown.name}/{number}"] = values[:: max(1, len(values) // MANY)]
        rows.append(row(checker, mistake, finding))
        print(rows[-1], flush=True)
    save(kit / "mistakes.safetensors", wrong)
    (kit / "mistakes.json").write_text(json.dumps([text_of(mistake) for mistake in MISTAKES], indent=0) + "\n")
    return rows


def row(checker: Kit, mistake: Mistake, finding: Finding | None) -> str:
    if finding is None:
        return f"| {text_of(mistake)} | nothing | | | |"
    facts = checker.outputs[finding.name]
    error = "its shape" if finding.error is None else f"{finding.error:.1e}"
    return f"| {text_of(mistake)} | `{finding.name}` | {error} | {facts['bound']:.1e} | {facts.get('noise', 0):.1e} |"


def table(rows: list[str]) -> str:
    head = ["| mistake | named first | error | bound | noise of right programs |", "|---|---|---|---|---|"]
    return "\n".join(head + rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, default=KIT, help="where the kit goes")
    parser.add_argument("--guide", type=Path, default=GUIDE, help="the page that the table of mistakes goes to")
    parser.add_argument("--mistakes", action="store_true", help="leave the kit's numbers as they are")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="size ")  # small on purpose
    args.kit.mkdir(parents=True, exist_ok=True)
    if not args.mistakes:
        make(args.kit)
    page.write(args.guide, "mistakes", table(add_mistakes(args.kit)))


if __name__ == "__main__":
    main()
