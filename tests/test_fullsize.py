"""SD 1.5 and SD 2.1 shaped checkpoints at full size with random weights, in both formats, against diffusers.

    python -m pytest -m fullsize -s

The weights are drawn once, rounded to float16 and written as a folder and as a single file; both must load as the same
tensors, and the loaded models must agree with diffusers and transformers in float32.
"""

import json

import diffusers
import pytest
import torch
import transformers
from conftest import published_facts, randomise, relative_error
from safetensors.torch import save_file

import weights
from weights import MODELS, files

FACTS = published_facts()

pytestmark = pytest.mark.fullsize

REPOSITORIES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5 (was runwayml/stable-diffusion-v1-5)",
    "sd21": "stabilityai/stable-diffusion-2-1",
}
CLASSES = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}


def oracle(part, config, seed):
    if part == "text_encoder":
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    else:
        model = CLASSES[part].from_config(config)
    with torch.no_grad():
        for p in randomise(model, seed).parameters():
            p.copy_(p.half())  # what the files hold
    return model


def names_and_tensors(part, model):
    for name, tensor in model.state_dict().items():
        if part == "text_encoder":
            name = f"text_model.{name.removeprefix('text_model.')}"
        if not name.endswith("position_ids"):
            yield name, tensor.half()


def original_names(family, state):
    """{part: {diffusers name: tensor}} -> the single file's tensors, by inverting the tables."""
    table, out = FACTS["single"][family]["tensors"], {}
    for part, rows in (("unet", FACTS["maps"]["unet"]), ("vae", FACTS["maps"]["vae_new"])):
        out |= {old: state[part][new].reshape(table[old][0]) for old, new in rows.items()}
    if family == "sd15":
        out |= {f"cond_stage_model.transformer.{n}": t for n, t in state["text_encoder"].items()}
    else:
        for old, targets in FACTS["maps"]["openclip"].items():
            found = [state["text_encoder"][new] for new, _ in targets]
            out[old] = torch.cat(found) if found else torch.randn(table[old][0]).half()
    for name, (shape, dtype, group) in table.items():
        if group in ("schedule", "ema_counters"):
            out[name] = torch.zeros(shape, dtype=torch.int32 if dtype == "I32" else torch.float32)
    return {n: t.contiguous() for n, t in out.items()}


@pytest.mark.parametrize("family", ["sd15", "sd21"])
@torch.no_grad()
def test_both_formats_are_the_same_and_agree_with_diffusers(family, tmp_path):
    configs = FACTS["folders"][family]["repos"][REPOSITORIES[family]]["configs"]
    oracles, state = {}, {}
    for seed, part in enumerate(MODELS):
        config = configs[f"{part}/config.json"]
        oracles[part] = oracle(part, config, seed)
        state[part] = dict(names_and_tensors(part, oracles[part]))
        folder = tmp_path / "folder" / part
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        written = state[part]
        if part == "vae":  # in the spelling of the published float32 files
            spelling = {new: FACTS["maps"]["vae_old"][name] for name, new in FACTS["maps"]["vae_new"].items()}
            written = {spelling[name]: t for name, t in written.items()}
        stem = files.STEMS[part]
        save_file({n: t.contiguous() for n, t in written.items()}, folder / f"{stem}.safetensors")
    (tmp_path / "folder" / "scheduler").mkdir()
    schedule = configs["scheduler/scheduler_config.json"]
    (tmp_path / "folder" / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    weights.load_tokenizer(None).save_pretrained(tmp_path / "folder" / "tokenizer")
    save_file(original_names(family, state), tmp_path / "single.safetensors")
    del state

    folder = weights.load(tmp_path / "folder")
    single = weights.load(tmp_path / "single.safetensors")
    for part in MODELS:
        ours, theirs = getattr(folder, part).state_dict(), getattr(single, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    del single

    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49408, (1, 77), generator=g)
    x, t = torch.randn(1, 4, 16, 16, generator=g), torch.tensor([501])
    picture, context = torch.randn(1, 3, 128, 128, generator=g).clamp(-1, 1), folder.text_encoder(ids)
    scale = oracles["vae"].config.scaling_factor
    errors = {
        "text encoder": relative_error(context, oracles["text_encoder"](ids).last_hidden_state),
        "UNet": relative_error(folder.unet(x, t, context), oracles["unet"](x, t, context).sample),
        "VAE encode": relative_error(
            folder.vae.encode(picture), oracles["vae"].encode(picture).latent_dist.mean * scale
        ),
        "VAE decode": relative_error(folder.vae.decode(x), oracles["vae"].decode(x / scale).sample),
    }
    print(family, {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) <= 1e-5
