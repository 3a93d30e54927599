"""The reference as the kit sees it: from the kit's inputs to every output that a port has to give.

`outputs` is also what a dump in PyTorch looks like: hooks on the modules, one call per level. Axes: B C H W, N image
tokens, L text tokens, D width; S steps of a mix, which stand where B does.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import clip
import magicmix as program
import unet
from command import pictures
from command.options import Options
from lab.port.cases import FRACTIONS, NOISE, PROMPTS, QUIET, SAMPLED, STEPS, WEIGHTED, Mix, Model
from scheduler import Schedule
from weights import Checkpoint

Named = Iterator[tuple[str, Tensor]]

# call -> (the part, what is called with which inputs). The order is that of a mix with a picture's layout.
CALLS: dict[str, tuple[str, Callable]] = {
    "text": ("text_encoder", lambda models, of: models.text_encoder(of("ids"))),
    "encode": ("vae", lambda models, of: models.vae.encode(of("picture"))),
    "square": ("unet", lambda models, of: models.unet(of("x"), of("t"), of("context"))),
    "oblong": ("unet", lambda models, of: models.unet(of("x"), of("t"), of("context"))),
    "decode": ("vae", lambda models, of: models.vae.decode(of("x"))),
}


# What modules take, in their order; most take some of these.
ARGUMENTS = ("input_ids", "t", "x", "time", "size", "context", "token_weights")


def cast(tensor: Tensor, network: nn.Module) -> Tensor:
    """Numbers in the network's dtype; ids, timesteps and sizes as they are."""
    return tensor.to(next(network.parameters()).dtype) if tensor.is_floating_point() else tensor


def call(models: Checkpoint, name: str, inputs: dict[str, Tensor], model: Model) -> Tensor:
    """One of CALLS, with the kit's inputs."""
    part, function = CALLS[name]
    return function(models, lambda what: cast(inputs[f"{model.name}/taps/{name}/{what}"], getattr(models, part)))


def watched(network: nn.Module, run: Callable[[], Tensor]) -> list[tuple[str, nn.Module, tuple, Tensor]]:
    """(name, module, arguments, output) of every module that computes something in a run, in the order in which they
    end; the network itself comes last, as "output", with what the run gives."""
    found, hooks = [], []
    for name, module in network.named_modules():
        if name and not isinstance(module, nn.Identity | nn.ModuleList | unet.NoTransformer):

            def keep(module, arguments, output, name=name):
                found.append((name, module, arguments, output[0] if isinstance(output, tuple) else output))

            hooks.append(module.register_forward_hook(keep))
    try:
        output = run()
    finally:
        for hook in hooks:
            hook.remove()
    return [*found, ("output", network, (), output)]


# ----------------------------------------------------------------------------------------------------- the levels


def tokens(models: Checkpoint, model: Model) -> Named:
    length = models.tokenizer.model_max_length
    encoded = models.tokenizer(
        list(PROMPTS), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    yield "tokens/ids", encoded.input_ids  # (prompts, L)
    for i, (prompt, words) in enumerate(WEIGHTED):
        yield f"tokens/weights/{i}", clip.token_weights(models.tokenizer, prompt, words)  # (L,)


def schedule(models: Checkpoint, model: Model) -> Named:
    for T in STEPS:
        s = Schedule(models.schedule, T)
        abar = torch.stack([s.abar(k) for k in range(T + 1)])  # (T + 1,), from k = 0 on
        yield f"schedule/{T}/t", torch.tensor(s.t[1:])  # (T,), from k = 1 on
        yield f"schedule/{T}/abar", abar
        yield f"schedule/{T}/sqrt_abar", abar**0.5
        yield f"schedule/{T}/sqrt_one_minus_abar", (1 - abar) ** 0.5
    options = [Options(steps=T, k_max=k_max, k_min=k_min) for T, k_max, k_min in FRACTIONS]
    yield "schedule/K", torch.tensor([(o.K_max, o.K_min) for o in options])  # (cases, 2)


def noise(models: Checkpoint, model: Model) -> Named:
    for name, (seed, size) in NOISE.items():
        yield f"noise/{name}", program.Noise(seed, size, torch.device("cpu"))()


def sampler(models: Checkpoint, model: Model, inputs: dict[str, Tensor]) -> Named:
    """Single steps from given latents x and given outputs of a UNet, (S, C, H, W): one k per row."""
    T, ks = SAMPLED
    s, x, output, eps = Schedule(models.schedule, T), *(inputs[f"{model.name}/sampler/{n}"] for n in ("x", "e", "eps"))
    rows = lambda step: zip(*(step(x[i : i + 1], output[i : i + 1], k, eps[i : i + 1]) for i, k in enumerate(ks)))
    yield "sampler/add_noise", torch.cat([s.add_noise(x[i : i + 1], eps[i : i + 1], k) for i, k in enumerate(ks)])
    x_prev, x0 = map(torch.cat, rows(lambda x, e, k, noise: s.ddim(x, e, k)))
    yield "sampler/x0", x0
    yield "sampler/ddim", x_prev
    yield "sampler/ddim_eta_1", torch.cat([*rows(lambda x, e, k, noise: s.ddim(x, e, k, 1.0, noise))][0])
    yield "sampler/ddpm", torch.cat([*rows(s.ddpm)][0])


def units(models: Checkpoint, model: Model, inputs: dict[str, Tensor]) -> Named:
    """Modules that are fed alone: at natural inputs, and with the first one times QUIET."""
    for part, names in model.units.items():
        network = getattr(models, part)
        for name in names:
            at = f"{model.name}/units/{part}/{name}/"
            given = {a: cast(inputs[at + a], network) for a in ARGUMENTS if at + a in inputs}
            yield f"units/{part}/{name}", unit(network, name, *given.values())
            first, *more = given.values()
            if first.is_floating_point():
                yield f"units/{part}/{name}/quiet", unit(network, name, QUIET * first, *more)


def unit(network: nn.Module, name: str, *given: Tensor) -> Tensor:
    if name == "time_proj":
        return unet.timestep_embedding(*given, network.config.block_out_channels[0])
    module = network.get_submodule(name)
    if isinstance(module, unet.Upsample2D):
        x, size = given
        return module(x, tuple(size.tolist()))
    return module(*given)


def taps(models: Checkpoint, model: Model, inputs: dict[str, Tensor]) -> Named:
    """Every module's output in one call of each network."""
    for name, (part, _) in CALLS.items():
        run = lambda name=name: call(models, name, inputs, model)
        for module, _, _, output in watched(getattr(models, part), run):
            yield f"taps/{name}/{module}", output


def denoiser(models: Checkpoint, mix: Mix, prompt: str, words: dict, context: Tensor) -> program.Denoiser:
    """One step of a mix under a prompt whose text states are the kit's."""
    o = dataclasses.replace(mix.options, token_weights=words)
    made = program.Denoiser(models, Schedule(models.schedule, mix.steps), o, None, prompt, words)
    made.context = cast(context, models.unet)
    return made


def single_steps(models: Checkpoint, model: Model, inputs: dict[str, Tensor]) -> Named:
    """Every step of each mix, each from the reference's own latents, so that an error does not travel."""
    for name, mix in model.mixes.items():
        at = f"{model.name}/steps/{name}/"
        given = {key.removeprefix(at): tensor for key, tensor in inputs.items() if key.startswith(at)}
        for what, tensor in steps_of(models, mix, given):
            yield f"steps/{name}/{what}", tensor


def steps_of(models: Checkpoint, mix: Mix, given: dict[str, Tensor]) -> Named:
    o = mix.options
    content = denoiser(models, mix, mix.prompt, mix.token_weights, given["context"])
    x = {o.K_max - i: x for i, x in enumerate(given["x"].split(1))}  # k -> x_k
    if mix.layout_prompt is None:
        layout = program.ImageLayout(content.schedule, given["x0"], given["eps"])
        yield "start", layout(o.K_max)
    else:
        along = denoiser(models, mix, mix.layout_prompt, {}, given["layout_context"])
        layout_x = {mix.steps - i: x for i, x in enumerate(given["layout_x"].split(1))}  # k -> layout_k
        walk = [along(layout_x[k], k) for k in range(mix.steps, o.K_min, -1)]
        yield "layout_x0", torch.cat([x0 for _, x0 in walk])
        yield "layout_x", torch.cat([x for x, _ in walk])
        layout = program.TextLayout(layout_x)
    found = list(program.mix(lambda _, k: content(x[k], k), layout, o.K_max, o.K_min, mix.nu))
    yield "x0", torch.cat([step.x0 for step in found])
    yield "x_content", torch.cat([step.x_content for step in found])
    if mix.layout_prompt is None:
        yield "layout", torch.cat([step.layout for step in found if step.layout is not None])
    yield "x", torch.cat([step.x for step in found])


def run(models: Checkpoint, model: Model, mix: Mix, inputs: dict[str, Tensor]) -> list[program.Step]:
    """A whole mix from prompt, layout and eps."""
    layout = mix.layout_prompt or Image.fromarray(inputs["layout/picture"].numpy())
    eps = inputs[f"{model.name}/loop/eps/{mix.seed}"]
    return list(program.magicmix(models, mix.prompt, layout, noise=lambda: eps, size=model.size, **mix.given))


def loops(models: Checkpoint, model: Model, inputs: dict[str, Tensor]) -> Named:
    """Each mix as a whole, from the prompt to the picture."""
    picture = Image.fromarray(inputs["layout/picture"].numpy())
    fitted = pictures.fit(picture, model.size)[0].permute(1, 2, 0)  # (H, W, 3)
    yield "loop/resized", ((fitted + 1) * 127.5).round().byte()
    for name, mix in model.mixes.items():
        steps = run(models, model, mix, inputs)
        yield f"loop/{name}/x", torch.cat([step.x for step in steps])  # (S, C, H, W)
        yield f"loop/{name}/picture", torch.from_numpy(np.array(program.decode(models, steps[-1].x)[0]))


# The levels in the order in which a port is built; those with inputs take the kit's.
LEVELS = {
    "tokens": lambda models, model, inputs: tokens(models, model),
    "schedule": lambda models, model, inputs: schedule(models, model),
    "noise": lambda models, model, inputs: noise(models, model),
    "sampler": sampler,
    "units": units,
    "taps": taps,
    "steps": single_steps,
    "loop": loops,
}


@torch.no_grad()
def outputs(checkpoints: dict[str, Checkpoint], models: tuple[Model, ...], inputs: dict[str, Tensor]) -> Named:
    """(name, tensor) of every output of the kit, in its order: level by level, model by model."""
    for level in LEVELS.values():
        for model in models:
            for name, tensor in level(checkpoints[model.name], model, inputs):
                yield f"{model.name}/{name}", tensor
