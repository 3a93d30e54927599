"""What the NumPy port gives for the kit, as a dump: an example of how a port is held against the reference.

    python lab/port/numpy_dump.py numpy.safetensors
    python lab/port/check.py numpy.safetensors

Everything goes into one dict under the kit's names; kit.json says which inputs belong to which output.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import numpy_port as port
from PIL import Image
from safetensors.numpy import load_file, save_file

KIT = Path(__file__).resolve().parent / "kit"
FOLDERS = {"tiny": port.TINY, "sd2": KIT / "sd2"}
FACTS = json.loads((KIT / "kit.json").read_text())
CALLS, ASKED = FACTS["calls"], FACTS["asked"]  # what is given, and what it is given for


def channels_last(x):
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def inputs_of(call, stored):
    """argument -> array, of one of the kit's calls"""
    return {argument: channels_last(stored[name]) for argument, name in CALLS.get(call, {}).items()}


def unit(network, name, x, **more):
    """One module alone, found by its name."""
    last, eps = name.rsplit(".", 1)[-1], network.config.get("norm_eps", 1e-6)
    heads = getattr(network, "heads", [0, 0])[1]  # the kit's units lie on the UNet's second level
    if last == "time_proj":
        return network.time_proj(x)
    if name.endswith("resnets.0"):
        return network.resnet(name, x, port.VAE.EPS if isinstance(network, port.VAE) else eps, more.get("time"))
    if name.endswith(("group_norm", "conv_norm_out", "resnets.0.norm1")):
        return network.group_norm(name, x, port.VAE.EPS if isinstance(network, port.VAE) else eps)
    if name.endswith("attentions.0.norm"):
        return network.group_norm(name, x, network.EPS)
    if "norm" in last:
        return network.layer_norm(name, x, network.config.get("layer_norm_eps", 1e-5))
    if last in ("attn1", "attn2"):
        return network.attention(name, x, more.get("context", x), heads, more.get("token_weights"))
    if name.endswith("mid_block.attentions.0"):
        return network.mid_attention(name, x)
    if name.endswith("attentions.0"):
        return network.transformer(name, x, more["context"], None, heads)
    if name.endswith("downsamplers.0"):
        is_vae = isinstance(network, port.VAE)
        return network.downsample(name, x) if is_vae else network.conv(f"{name}.conv", x, stride=2)
    if name.endswith("upsamplers.0"):
        return network.upsample(name, x, tuple(more["size"]) if "size" in more else None)
    method = {"self_attn": "self_attention", "0": "geglu", "ff": "feed_forward"}.get(last, last)
    return getattr(network, method)(name, x)


def tapped(network, run):
    """Every module's output in a run, and the result."""
    network.taps = {}
    result = run()
    taps, network.taps = network.taps, None
    return taps | {"output": result}


def dump_of(model, name, stored):
    """(output's name, array) of one of the kit's models."""
    given = lambda call: inputs_of(f"{name}/{call}", stored)
    asked, tokenizer = ASKED["models"][name], model.tokenizer
    yield "tokens/ids", np.stack([tokenizer(prompt) for prompt in ASKED["prompts"]])
    for i, (prompt, words) in enumerate(ASKED["weighted"]):
        yield f"tokens/weights/{i}", tokenizer.weights(prompt, words)
    for T in ASKED["steps"]:
        s = port.Schedule(model.schedule_config, T)
        yield from {f"schedule/{T}/t": s.t[1:], f"schedule/{T}/abar": s.abar}.items()
        yield f"schedule/{T}/sqrt_abar", np.sqrt(s.abar)
        yield f"schedule/{T}/sqrt_one_minus_abar", np.sqrt(1 - s.abar)
    yield "schedule/K", np.array([[port.steps_of(f, T) for f in fractions] for T, *fractions in ASKED["fractions"]])
    for case, (seed, size) in ASKED["noise"].items():
        yield f"noise/{case}", port.randn(seed, (1, 4, *size))

    T, ks = ASKED["sampled"]
    s, rows = port.Schedule(model.schedule_config, T), given("sampler")
    x, e, eps = (rows[n][:, None] for n in ("x", "e", "eps"))  # row by row, each at its k
    yield "sampler/add_noise", np.concatenate([s.add_noise(x[i], eps[i], k) for i, k in enumerate(ks)])
    yield "sampler/x0", np.concatenate([s.ddim(x[i], e[i], k)[1] for i, k in enumerate(ks)])
    yield "sampler/ddim", np.concatenate([s.ddim(x[i], e[i], k)[0] for i, k in enumerate(ks)])
    yield "sampler/ddim_eta_1", np.concatenate([s.ddim(x[i], e[i], k, 1, eps[i])[0] for i, k in enumerate(ks)])
    yield "sampler/ddpm", np.concatenate([s.ddpm(x[i], e[i], k, eps[i])[0] for i, k in enumerate(ks)])

    networks = {"text_encoder": model.text, "unet": model.unet, "vae": model.vae}
    for part, units in asked["units"].items():
        for unit_name in units:
            (first, x), *more = given(f"units/{part}/{unit_name}").items()
            yield f"units/{part}/{unit_name}", unit(networks[part], unit_name, x, **dict(more))
            if x.dtype == np.float32:
                quiet = np.float32(ASKED["quiet"]) * x
                yield f"units/{part}/{unit_name}/quiet", unit(networks[part], unit_name, quiet, **dict(more))

    runs = {
        "text": (model.text, lambda given: model.text(given["ids"])),
        "encode": (model.vae, lambda given: model.vae.encode(given["picture"])),
        "square": (model.unet, lambda given: model.unet(given["x"], given["t"], given["context"])),
        "oblong": (model.unet, lambda given: model.unet(given["x"], given["t"], given["context"])),
        "decode": (model.vae, lambda given: model.vae.decode(given["x"])),
    }
    for call, (network, run) in runs.items():
        for module, y in tapped(network, lambda run=run, call=call: run(given(f"taps/{call}"))).items():
            yield f"taps/{call}/{module}", y

    for case, o in asked["mixes"].items():
        for what, array in single_steps(model, o, given(f"steps/{case}")).items():
            yield f"steps/{case}/{what}", array

    picture = Image.fromarray(stored["layout/picture"])
    yield "loop/resized", np.round((port.fitted(picture, asked["size"])[0] + 1) * 127.5).astype(np.uint8)
    for case, o in asked["mixes"].items():
        mixing = {n: o[n] for n in ("steps", "k_max", "k_min", "nu", "guidance", "negative")}
        layout = o["layout_prompt"] or port.fitted(picture, asked["size"])
        eps = given("loop/eps")[str(o["seed"])]
        xs = port.magicmix(model, o["prompt"], layout, eps, words=o["token_weights"], **mixing)
        yield f"loop/{case}/x", np.concatenate(xs)
        yield f"loop/{case}/picture", port.grey_levels(model.vae.decode(xs[-1]))[0]


def single_steps(model, o, given):
    """Every step of a mix, each from the latents that the kit gives."""
    T, K_max, K_min = o["steps"], *(port.steps_of(o[n], o["steps"]) for n in ("k_max", "k_min"))
    schedule = port.Schedule(model.schedule_config, T)
    s = model.tokenizer.weights(o["prompt"], o["token_weights"]) if o["token_weights"] else None
    content = model.denoiser(schedule, given["context"], o["guidance"], s)
    if o["layout_prompt"]:
        along = model.denoiser(schedule, given["layout_context"], o["guidance"])
        latents = {T - i: x[None] for i, x in enumerate(given["layout_x"])}  # k -> layout_k
        x, x0 = zip(*[along(latents[k], k) for k in range(T, K_min, -1)])
        found = {"layout_x0": np.concatenate(x0), "layout_x": np.concatenate(x)}
        layout = latents.get
    else:
        layout = lambda k: schedule.add_noise(given["x0"], given["eps"], k)
        found = {"start": layout(K_max)}
    starts = {K_max - i: x[None] for i, x in enumerate(given["x"])}  # k -> x_k
    x, x_content, mixed, x0 = zip(*port.mix(lambda _, k: content(starts[k], k), layout, K_max, K_min, o["nu"]))
    found |= {"x0": np.concatenate(x0), "x_content": np.concatenate(x_content)}
    if not o["layout_prompt"]:
        found["layout"] = np.concatenate([y for y in mixed if y is not None])
    return found | {"x": np.concatenate(x)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path, help="a .safetensors file to write")
    path, stored, dump = parser.parse_args().dump, load_file(KIT / "inputs.safetensors"), {}
    for name, folder in FOLDERS.items():
        for output, array in dump_of(port.Model(folder), name, stored):
            dump[f"{name}/{output}"] = np.ascontiguousarray(array)
    save_file(dump, path)
    print(f"{len(dump)} outputs in {path}")


if __name__ == "__main__":
    main()
