"""The folders that releases of diffusers and transformers write, from 0.10 and 4.25 to the newest: each loads, computes
what the installed diffusers and transformers compute with it, and gives the token ids that its own release gave.

What they wrote is in data/writers.json.gz: made by data/write_folder.py in each release's environment, and packed by
data/pack_folders.py. The values of the tensors are drawn here.
"""

import gzip
import json
import math
import shutil
import sys

import diffusers
import pytest
import torch
import transformers
from conftest import ROOT, TINY, relative_error, run
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

import weights
from scheduler import Schedule
from weights import CheckpointError, configs

sys.path.insert(0, str(ROOT / "tests" / "data"))
from pack_folders import PACKED, unpack  # noqa: E402

PACK = json.loads(gzip.decompress(PACKED.read_bytes()))
WRITERS = {f"diffusers {w['diffusers']}, transformers {w['transformers']}": w for w in PACK["writers"]}
IDS = {kind: PACK["ids"][PACK["writers"][0]["ids"][f"slow-{kind}"]] for kind in ("sd1", "sd2", "added")}


def write_random(shapes, path):
    """Values of the size of a network's, none of them 0 or 1, so that no weight is the same as another."""
    g, state = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        if name.endswith("position_ids"):
            state[name] = torch.arange(shape[-1]).reshape(shape)
        elif len(shape) == 1:
            state[name] = 0.1 * torch.randn(shape, generator=g) + (1 if name.endswith("weight") else 0)
        else:
            state[name] = torch.randn(shape, generator=g) / math.prod(shape[1:]) ** 0.5
    save_file(state, path, {"format": "pt"})


def token_ids(tokenizer):
    return tokenizer(PACK["prompts"], padding="max_length", truncation=True).input_ids


def text_oracle(folder):
    """transformers' text encoder with a folder's tensors, whichever release named them: from_pretrained of 4.57 leaves
    the weights of a folder of 5.23 at random, as it expects text_model. before their names."""
    oracle = transformers.CLIPTextModel(transformers.CLIPTextConfig.from_pretrained(folder)).eval()
    named = {name.removeprefix("text_model."): name for name in oracle.state_dict()}
    tensors = load_file(folder / "model.safetensors")
    state = {named[n.removeprefix("text_model.")]: t for n, t in tensors.items() if not n.endswith("position_ids")}
    oracle.load_state_dict(state, strict=True)
    return oracle


@pytest.mark.parametrize("name", ["sd1", "sd2", "sd1-added"])
@pytest.mark.parametrize("writer", WRITERS)
@torch.no_grad()
def test_a_pipeline_computes_what_diffusers_computes(writer, name, tmp_path):
    folder = unpack(WRITERS[writer], name, tmp_path / "pipeline", write_random)
    models = weights.load(folder)
    ids = token_ids(models.tokenizer)
    assert ids == IDS["added" if name == "sd1-added" else name]

    g = torch.Generator().manual_seed(1)
    some = torch.tensor([ids[PACK["prompts"].index("a <cat-toy> on a beach")], ids[0]])
    context = models.text_encoder(some)
    assert relative_error(context, text_oracle(folder / "text_encoder")(some).last_hidden_state) <= 1e-5
    if name == "sd1-added":
        return  # the rest is that of sd1

    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    x, t = torch.randn(2, 4, 9, 13, generator=g), torch.tensor([981, 1])
    assert relative_error(models.unet(x, t, context), unet(x, t, context).sample) <= 1e-5
    vae = diffusers.AutoencoderKL.from_pretrained(folder, subfolder="vae")
    scale, picture = vae.config.scaling_factor, torch.rand(2, 3, 20, 36, generator=g) * 2 - 1
    assert relative_error(models.vae.encode(picture), vae.encode(picture).latent_dist.mean * scale) <= 1e-5
    assert relative_error(models.vae.decode(x), vae.decode(x / scale).sample) <= 1e-5
    assert models.schedule.prediction_type == ("v_prediction" if name == "sd2" else "epsilon")


# ------------------------------------------------------------------------------------------------------- tokenizers


def tokenizer_folders():
    """(writer, folder) of every tokenizer that is not byte for byte that of a pipeline or of another writer."""
    seen = []
    for writer, found in WRITERS.items():
        for name in ("sd1", "sd2", "sd1-added", *(f"tokenizers/{key}" for key in found["ids"])):
            place = f"{name}/" if name.startswith("tokenizers") else f"{name}/tokenizer/"
            content = {p.removeprefix(place): c for p, c in found["files"].items() if p.startswith(place)}
            if content not in seen:
                seen.append(content)
                if name.startswith("tokenizers"):
                    yield writer, name


@pytest.mark.parametrize(("writer", "name"), tokenizer_folders())
def test_a_tokenizer_gives_the_ids_of_its_release(writer, name, tmp_path):
    tokenizer = weights.load_tokenizer(unpack(WRITERS[writer], name, tmp_path / "tokenizer", write_random))
    assert token_ids(tokenizer) == PACK["ids"][WRITERS[writer]["ids"][name.removeprefix("tokenizers/")]]


NEWEST = list(WRITERS)[-1]
SLOW, FAST = {"vocab.json", "merges.txt"}, {"tokenizer.json"}


@pytest.mark.parametrize(
    ("writer", "name", "kept"),
    [(list(WRITERS)[0], kind, kept) for kind in ("sd1", "sd2") for kept in (SLOW, set())]
    + [(NEWEST, kind, FAST) for kind in ("sd1", "sd2", "sd1-added")],
)
def test_a_tokenizer_with_files_missing(writer, name, kept, tmp_path):
    """What they would say is the family's: 77 tokens, and the padding, which is "!" for SD 2."""
    folder = unpack(WRITERS[writer], name, tmp_path / "pipeline", write_random)
    for path in (folder / "tokenizer").iterdir():
        if path.name not in kept:
            path.unlink()
    if not kept:
        (folder / "tokenizer").rmdir()
    assert token_ids(weights.load(folder).tokenizer) == IDS["added" if name == "sd1-added" else name]


# ------------------------------------------------------------------------------------------------------- schedulers


def schedulers():
    """Every config of every release, but for the versions in it: "Class.way" -> the different ones."""
    found = {}
    for writer in PACK["writers"]:
        for name, config in writer["schedulers"].items():
            config = {k: v for k, v in config.items() if k != "_diffusers_version"}
            if config not in found.setdefault(name, []):
                found[name].append(config)
    return found


SCHEDULERS = schedulers()


def other_noise(config):
    """What in a config says that its model was trained with other noise levels, or for another target; None for a
    model of this kind, whichever sampler the config is for."""
    if config.get("beta_start") is None:
        return "beta_start"
    target = config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction")
    wrong = {"snr_shift_scale": 1, "use_flow_sigmas": False}
    return next((k for k, v in wrong.items() if config.get(k, v) != v), "prediction_type" if target else None)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_says_how_the_model_was_trained(name, tmp_path):
    """Its betas and its target are the model's, as diffusers' DDIM has them. The rest is a wish, and is said."""
    path = tmp_path / "scheduler_config.json"
    for config in SCHEDULERS[name]:
        path.write_text(json.dumps(config))
        if other_noise(config):
            with pytest.raises(CheckpointError, match=other_noise(config)):
                configs.read_schedule(path)
            continue
        ours, notes, _ = configs.read_schedule(path)
        asked = {"timestep_spacing": "leading", "steps_offset": config.get("steps_offset", ours.steps_offset)}
        theirs = diffusers.DDIMScheduler.from_config(config | asked)
        theirs.set_timesteps(20)
        schedule = Schedule(ours, 20)
        assert schedule.t[:0:-1] == theirs.timesteps.tolist()
        assert (schedule.alphas_cumprod - theirs.alphas_cumprod).abs().max() <= 1e-6
        assert ours.prediction_type == theirs.config.prediction_type
        wish = config["_class_name"].removesuffix("Scheduler")
        assert any(f"asks for {wish}" in note for note in notes) or wish in ("DDIM", "DDPM", "PNDM")


def test_all_schedulers_are_here():
    """Of the installed diffusers, those that cannot be made without arguments of their own among the failed."""
    found = [w for w in PACK["writers"] if w["diffusers"] == diffusers.__version__]
    assert found, "a new release of diffusers: write and pack its folders"
    exported = {n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax")}
    assert {name.partition(".")[0] for name in [*found[0]["schedulers"], *found[0]["failed"]]} == exported


# ------------------------------------------------------------------------------------------------------ and back


def test_the_embedded_checkpoint_saved_again_gives_the_same_picture(tmp_path):
    diffusers.StableDiffusionPipeline.from_pretrained(TINY).save_pretrained(tmp_path / "again")
    shutil.copy(TINY / "magicmix.json", tmp_path / "again")  # our own, which diffusers does not know
    asked = ["a tiger", "--layout", ROOT / "docs" / "layouts" / "trophy.png", "--steps", "4", "--size", "72x104"]
    pictures = {}
    for source in (TINY, tmp_path / "again"):
        done = run(*asked, "--weights", source, "-o", f"{source.name}.png", cwd=tmp_path)
        assert done.code == 0, done.err
        pictures[source.name] = Image.open(tmp_path / f"{source.name}.png").convert("RGB")
    assert ImageChops.difference(*pictures.values()).getbbox() is None
