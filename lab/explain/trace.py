"""The trace of a mix: every step's latents, predictions and cross-attention maps, in one safetensors file.

docs/trace.md has the format. A trace is recorded from outside: hooks on the UNet and on its modules, which are removed
afterwards, and the Steps that the loop yields. `magicmix.py` and the networks know nothing of it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from attention import Attention, Transformer2DModel
from command import options
from command.options import Options
from command.pictures import must_be_file, replace
from lab.explain.maps import maps_of, words_of
from magicmix import Step
from scheduler import Schedule
from weights import Checkpoint

FORMAT = 1  # of the file; a change that a reader must know of adds one
LATENTS = ("e_uncond", "e_cond", "e", "x0", "x_content", "layout", "x")  # of a step, in the order they come about
RUNS = ("layout", "mix")  # along the layout prompt; the mix itself


class Stop(NamedTuple):
    """A step in a trace."""

    run: str  # "layout" or "mix"
    k: int  # sampler steps that are left after it
    phase: str  # as in magicmix.Step; "start" for where a run begins, which has x alone

    @property
    def name(self) -> str:
        """What the names of its tensors begin with."""
        return f"{self.run}/{self.k:03}"


@dataclass
class Trace:
    """A trace, in memory or in a file.

    Attributes:
        tensors: name -> tensor; those of a file are read when they are asked for.
        facts: what the file's metadata says, as docs/trace.md lists it.
    """

    tensors: Mapping[str, Tensor]
    facts: dict

    @property
    def stops(self) -> list[Stop]:
        """The starts and steps in order of execution."""
        return [Stop(**stop) for stop in self.facts["steps"]]

    def get(self, stop: Stop, name: str) -> Tensor | None:
        """A tensor of a step, None where it has none of that name."""
        full = f"{stop.name}/{name}"
        return self.tensors[full] if full in self.tensors else None

    def write(self, path: Path) -> None:
        """Writes the file; the same trace gives the same bytes. Raises OSError."""
        # One key of metadata: the library writes several in an order of its own.
        content = save(dict(sorted(self.tensors.items())), {"magicmix": json.dumps(self.facts, sort_keys=True)})
        replace(path, "trace", lambda file: file.write(content))


# -------------------------------------------------------------------------------------------------------- recording


def kept(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy on the CPU with memory of its own, which the file format asks for."""
    return x.detach().to("cpu", dtype or x.dtype, copy=True).contiguous()


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors among a module's arguments or results, those within lists too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


class Recorder:
    """Records the Steps of a loop that calls `models.unet` once per step.

    Args:
        models: whose UNet the loop calls.
        prompt: the content.
        layout: pictures (1 or B, 3, f H, f W) in [-1, 1], or a prompt, as magicmix() takes it.
        mixing: the options of the mix.
        eps: the noise (B, 4, H, W) that it begins with.
        map_dtype: of the maps, float32 or float16.
        heads: keep the maps of each head as well.
        modules: k of the step whose modules' inputs and outputs are kept, None for none.

    Raises ValueError for a `modules` that is no step of this mix.
    """

    def __init__(
        self,
        models: Checkpoint,
        prompt: str,
        layout: Tensor | str,
        mixing: Options,
        eps: Tensor,
        *,
        map_dtype: torch.dtype = torch.float32,
        heads: bool = False,
        modules: int | None = None,
    ):
        self.models, self.mixing, self.map_dtype, self.heads, self.modules = models, mixing, map_dtype, heads, modules
        self.texts = {"negative": mixing.negative, "prompt": prompt}
        self.texts |= {"layout_prompt": layout} if isinstance(layout, str) else {}
        self.schedule = Schedule(models.schedule, mixing.steps)
        self.k_after = {self.schedule.t[k]: k - 1 for k in range(1, mixing.steps + 1)}  # a call's timestep -> Step.k
        first = mixing.steps if isinstance(layout, str) else mixing.K_max
        if modules is not None and not 0 <= modules < first:
            raise ValueError(f"modules {modules} is no step of this mix; its steps are {first - 1} to 0")
        self.tensors: dict[str, Tensor] = {"eps": kept(eps)}
        self.stops: list[Stop] = []
        self.layers: list[str] = []  # names of the cross-attentions, in order of execution
        self.modules_run: list[str] = []  # names of all modules of one call, in order of execution
        self.call: dict[str, Tensor] = {}  # what the hooks saw since the last step
        self.size = (0, 0)  # height and width of the feature map that a transformer works on
        if isinstance(layout, Tensor):
            x0 = models.vae.encode(layout).expand_as(eps)
            self.tensors["layout_x0"] = kept(x0)
            self.start("mix", mixing.K_max, self.schedule.add_noise(x0, eps, mixing.K_max))
        else:
            self.start("layout", mixing.steps, eps)

    @torch.no_grad()
    def follow(self, steps: Iterable[Step]) -> Iterator[Step]:
        """The same Steps, recorded as they come."""
        handles = list(self.hooks())
        try:
            for step in steps:
                self.add(step)
                yield step
        finally:
            for handle in handles:
                handle.remove()

    def start(self, run: str, k: int, x: Tensor) -> None:
        """Records where a run begins."""
        self.stops.append(Stop(run, k, "start"))
        self.tensors[f"{self.stops[-1].name}/x"] = kept(x, torch.float32)

    def add(self, step: Step) -> None:
        """Records a step with the UNet's call that led to it."""
        run = "layout" if step.phase == "layout" else "mix"
        if run == "mix" and all(stop.run == "layout" for stop in self.stops):
            self.start(run, self.mixing.K_max, self.latent_of_layout(self.mixing.K_max))
        stop = Stop(run, step.k, step.phase)
        self.stops.append(stop)
        call, self.call = self.call, {}
        output, context, s = call.pop("output").float(), call.pop("context"), call.pop("token_weights", None)
        e_cond = output[-len(step.x) :]  # of 2B rows the first B are those of the negative prompt; guidance 1 has B
        latents = {"e_cond": e_cond, "e": e_cond, "x": step.x, "x_content": step.x_content, "x0": step.x0}
        if len(output) > len(step.x):
            e_uncond = output[: len(step.x)]
            latents |= {"e_uncond": e_uncond, "e": e_uncond + self.mixing.guidance * (e_cond - e_uncond)}
            self.keep_text("negative", context[0], None)
        if step.layout is not None:
            latents["layout"] = step.layout
        self.keep_text("layout_prompt" if run == "layout" else "prompt", context[-1], None if s is None else s[-1])
        self.tensors |= {f"{stop.name}/{name}": kept(x, torch.float32) for name, x in latents.items()}
        self.tensors |= {f"{stop.name}/{name}": x for name, x in call.items()}

    def keep_text(self, text: str, states: Tensor, s: Tensor | None) -> None:
        """Records what the UNet reads of a text: its states (L, D) and the weights (L,) of its tokens."""
        if f"{text}/states" not in self.tensors:
            self.tensors[f"{text}/states"] = kept(states, torch.float32)
            self.tensors[f"{text}/weights"] = torch.ones(len(states)) if s is None else kept(s, torch.float32)

    def latent_of_layout(self, k: int) -> Tensor:
        """x_k of the layout prompt's own run."""
        return self.tensors[Stop("layout", k, "").name + "/x"]

    def hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        unet = self.models.unet
        names = {module: name or "unet" for name, module in unet.named_modules()}
        yield unet.register_forward_pre_hook(self.before_unet)
        yield unet.register_forward_hook(self.after_unet)
        for module, name in names.items():
            if isinstance(module, Transformer2DModel):
                yield module.register_forward_pre_hook(self.before_transformer)
            elif isinstance(module, Attention) and name.endswith("attn2"):
                yield module.register_forward_hook(Named(name, self.after_attention))
            if self.modules is not None:
                yield module.register_forward_pre_hook(Named(name, self.before_module))
                yield module.register_forward_hook(Named(name, self.after_module))

    def before_unet(self, _: nn.Module, arguments: tuple) -> None:
        x, t, context, *rest = arguments
        self.call = {"context": context}
        if rest and rest[0] is not None:
            self.call["token_weights"] = rest[0]
        self.halves = 2 if len(x) == 2 * len(self.tensors["eps"]) else 1
        self.is_detailed = self.k_after[int(t[0])] == self.modules
        if self.is_detailed:
            self.modules_run = []

    def after_unet(self, _: nn.Module, arguments: tuple, output: Tensor) -> None:
        self.call["output"] = output

    def before_transformer(self, _: nn.Module, arguments: tuple) -> None:
        self.size = arguments[0].shape[2:]

    def after_attention(self, name: str, attention: Attention, arguments: tuple, output: Tensor) -> None:
        x, context, *_ = arguments
        maps = maps_of(attention, x, context)  # (2B or B, h, N, L)
        if name not in self.layers:
            self.layers.append(name)
        of_halves = zip(("uncond", "cond")[-self.halves :], maps.chunk(self.halves))
        for half, m in of_halves:  # (B, h, N, L)
            self.call[f"maps/{half}/{name}"] = kept(m.mean(dim=1).unflatten(1, self.size), self.map_dtype)
            if self.heads:
                self.call[f"heads/{half}/{name}"] = kept(m.unflatten(2, self.size), self.map_dtype)

    def before_module(self, name: str, module: nn.Module, arguments: tuple) -> None:
        if self.is_detailed:
            self.modules_run.append(name)
            for i, x in enumerate(tensors_in(arguments)):
                self.call[f"modules/{name}/input.{i}"] = kept(x)

    def after_module(self, name: str, module: nn.Module, arguments: tuple, output: object) -> None:
        if self.is_detailed:
            for i, x in enumerate(tensors_in(output)):
                self.call[f"modules/{name}/output.{i}"] = kept(x)

    def trace(self, **facts: object) -> Trace:
        """What was recorded, with more facts for the metadata."""
        o, tokenizer = self.mixing, self.models.tokenizer
        if not any(stop.run == "mix" for stop in self.stops):  # K_max = 0: the mix is where the layout ended
            self.start("mix", o.K_max, self.latent_of_layout(o.K_max))
        length = tokenizer.model_max_length
        for text, prompt in self.texts.items():
            ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
            self.tensors[f"{text}/ids"] = torch.tensor(ids)
        self.tensors["t"] = torch.tensor(self.schedule.t)
        self.tensors["abar"] = torch.stack([self.schedule.abar(k) for k in range(o.steps + 1)])
        own = {
            "format": FORMAT,
            "T": o.steps,
            "K_max": o.K_max,
            "K_min": o.K_min,
            "prediction_type": self.models.schedule.prediction_type,
            "steps": [stop._asdict() for stop in self.stops],
            "layers": self.layers,
            "modules": self.modules_run,
            "words": {text: words_of(tokenizer, prompt) for text, prompt in self.texts.items()},
        }
        return Trace(self.tensors, json.loads(json.dumps(own | facts)))


@dataclass
class Named:
    """A hook that is told the name of its module."""

    name: str
    hook: object

    def __call__(self, *arguments) -> None:
        self.hook(self.name, *arguments)


# ---------------------------------------------------------------------------------------------------------- reading


class File(Mapping):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path):
        self.file = safe_open(path, "pt")
        self.names = set(self.file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.names))

    def __len__(self) -> int:
        return len(self.names)


def read(path: str | Path) -> Trace:
    """Opens a trace. Raises FileNotFoundError, or ValueError for a file that is none."""
    path = Path(path)
    must_be_file(path, "trace", "give a file that --trace wrote")
    try:
        tensors = File(path)
        trace = Trace(tensors, json.loads((tensors.file.metadata() or {}).get("magicmix", "null")))
        check_facts(trace)
    except (SafetensorError, ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read: {error}"
        raise ValueError(f"trace {str(path)!r} {reason}; give a file that --trace wrote") from error
    return trace


def check_facts(trace: Trace) -> None:
    """Raises ValueError, KeyError or TypeError for facts that are not what docs/trace.md says."""
    facts = trace.facts
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ValueError(f"it is no trace of format {FORMAT}")
    for name, kind in (("T", int), ("K_max", int), ("K_min", int), ("parameters", dict), ("words", dict)):
        if type(facts[name]) is not kind:
            raise ValueError(f"{name} is {facts[name]!r}")
    options.check(facts["parameters"], scopes=(options.MIXING, options.PICTURE))
    for name in ("layers", "modules"):
        if not isinstance(facts[name], list) or not all(isinstance(text, str) for text in facts[name]):
            raise ValueError(f"{name} is no list of names")
    for words in facts["words"].values():
        for word, places in words:
            if not isinstance(word, str) or not all(type(place) is int and place > 0 for place in places):
                raise ValueError(f"the word {word!r} stands at {places!r}")
    for stop in trace.stops:
        if stop.run not in RUNS or type(stop.k) is not int or not 0 <= stop.k <= facts["T"]:
            raise ValueError(f"it has a step {stop}")
        if f"{stop.name}/x" not in trace.tensors:
            raise KeyError(f"{stop.name}/x")
