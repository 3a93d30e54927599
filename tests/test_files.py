"""Real files through the real loader: folders whole, sharded and in half precision; single files at full size.

The full-size files are sparse: a true header and a body of zeros that takes no disk, so their loading is real.
"""

import dataclasses
import inspect
import json

import diffusers
import pytest
import torch
import transformers
from conftest import TINY, published_facts, published_rows, run, sparse_file
from safetensors.torch import load_file, save_file

import weights
from clip import CLIPTextConfig
from scheduler import ScheduleConfig
from unet import UNetConfig
from vae import VAEConfig
from weights import CheckpointError, files
from weights.describe import describe

FACTS = published_facts()
SINGLE = [(family, name) for family, facts in FACTS["single"].items() for name in facts["files"]]
PARAMETERS = {"sd15": 859_520_964, "sd21": 865_910_724}  # of the UNet


def published(tmp_path, family, name, dtype=None, drop=()):
    rows = published_rows(family, name, dtype)
    return sparse_file(tmp_path / name, {n: row for n, row in rows.items() if not n.startswith(drop)})


SAFETENSORS = [(family, name) for family, name in SINGLE if name.endswith(".safetensors")]


@pytest.mark.parametrize(("family", "name"), SAFETENSORS)
def test_a_published_single_file_loads(family, name, tmp_path):
    path = published(tmp_path, family, name)
    # The order and the padding of the header have changed with the library's releases, by a few digits and spaces.
    assert abs(path.stat().st_size - FACTS["single"][family]["files"][name]["bytes"]) < 200
    models = weights.load(path, prediction="epsilon")
    assert models.unet.config.cross_attention_dim == (768 if family == "sd15" else 1024)
    assert models.tokenizer.pad_token_id == (49407 if family == "sd15" else 0)
    assert sum(p.numel() for p in models.unet.parameters()) == PARAMETERS[family]


@pytest.mark.parametrize(("prediction", "side"), [("auto", 512), ("v", 768)])
def test_a_bare_sd2_file_is_probed(prediction, side, tmp_path):
    """A UNet of zeros answers 0: 0.5 below its input, which is epsilon's side of the probe's -1."""
    models = weights.load(published(tmp_path, "sd21", "v2-1_512-nonema-pruned.safetensors"), prediction=prediction)
    assert models.schedule.prediction_type == ("epsilon" if side == 512 else "v_prediction")
    assert models.size == (side, side)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_half_precision_resave_loads(dtype, tmp_path):
    path = published(tmp_path, "sd15", "v1-5-pruned-emaonly.safetensors", dtype)
    models = weights.load(path, dtype={"F16": torch.float16, "BF16": torch.bfloat16}[dtype])
    assert models.vae.quant_conv.weight.dtype == torch.float32


@pytest.fixture
def without_vae(tmp_path):
    return published(tmp_path, "sd15", "v1-5-pruned-emaonly.safetensors", "F16", drop=("first_stage_model.",))


def test_a_file_without_a_vae_needs_one(without_vae):
    with pytest.raises(CheckpointError, match=r"holds text encoder and UNet, no VAE; give one as vae"):
        weights.load(without_vae, dtype=torch.float16)
    models = weights.load(without_vae, dtype=torch.float16, vae=TINY / "vae")
    assert models.vae.config.block_out_channels == (32, 64, 96, 96)


def alone(path, spelling):
    """The published autoencoder in a file of its own: as diffusers wrote it first and writes it now, in the original
    spelling, with what served its training, or inside a whole checkpoint."""
    if spelling.startswith("diffusers"):
        return sparse_file(path, FACTS["folders"]["sd15"]["tensors"][f"vae_{spelling.split()[1]}_names"])
    if spelling == "whole checkpoint":
        return published(path.parent, "sd15", "v1-5-pruned-emaonly.safetensors")
    tensors = FACTS["single"]["sd15"]["tensors"].items()
    rows = {n.removeprefix("first_stage_model."): row[:2] for n, row in tensors if row[2] == "vae"}
    return sparse_file(path, rows | ({"loss.logvar": ([], "F32")} if spelling == "training" else {}))


SPELLINGS = ["diffusers old", "diffusers new", "original", "training", "whole checkpoint"]


@pytest.mark.parametrize("free", [False, True], ids=["kept", "freed"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_autoencoder_of_its_own(spelling, free, tmp_path):
    models = weights.load(vae=alone(tmp_path / "vae.safetensors", spelling), free_after_use=free)
    assert models.vae.config == VAEConfig()
    for _ in range(2):
        x0 = models.vae.encode(torch.zeros(1, 3, 8, 8))
        assert x0.shape == (1, 4, 1, 1) and models.vae.decode(x0).shape == (1, 3, 8, 8)


def test_an_autoencoder_of_its_own_on_the_command_line(tmp_path):
    alone(tmp_path / "vae.safetensors", "original")
    options = ("--layout-prompt", "a car", "--steps", "4", "--size", "8", "--quiet", "--vae", "vae.safetensors")
    done = run("a tiger", *options, cwd=tmp_path)
    assert done == (0, "", "") and (tmp_path / "mix.png").exists()


def test_the_description_of_a_single_file(tmp_path):
    """In half precision, since every byte is read; the published ones are in float32."""
    lines = "\n".join(describe(str(published(tmp_path, "sd15", "v1-5-pruned.safetensors", "F16")))[0])
    for fact in (
        "format       single file",
        "family       SD 1",
        "prediction   not said; probed when it is loaded",
        "686 tensors, 859,520,964",
        "248 tensors, 83,653,863",
        "196 tensors, 123,060,480",
        "ema          a copy of 686 tensors, used",
        "12 tensors: the noise schedule",
        "no release that is known",
        "missing      nothing",
        "It loads as SD 1; prediction: not said; probed when it is loaded.",
    ):
        assert fact in lines, fact
    drop = ("first_stage_model.decoder.conv_out",)
    second = published(tmp_path, "sd21", "v2-1_768-ema-pruned.safetensors", "F16", drop=drop)
    lines = "\n".join(describe(str(second))[0])
    for fact in (
        "family       SD 2",
        "probed when it is loaded",
        "12 tensors: what SD2 does not read",
        "2 tensors: served the contrastive training",
        "missing      vae: decoder.conv_out.bias",
        f"It does not load: {second}: tensor decoder.conv_out.bias is missing",
    ):
        assert fact in lines, fact


# ------------------------------------------------------------------------------------------------------- folders


def same(one, two):
    a, b = one.unet.state_dict(), two.unet.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def shard(folder, index_name="diffusion_pytorch_model.safetensors.index.json"):
    """The UNet in three files and an index, as save_pretrained writes large models."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state, mapping = load_file(path), {}
    path.unlink()
    for i in range(3):
        name = f"diffusion_pytorch_model-{i + 1:05}-of-00003.safetensors"
        part = {n: state[n] for n in sorted(state)[i::3]}
        save_file(part, folder / "unet" / name)
        mapping |= dict.fromkeys(part, name)
    index = folder / "unet" / index_name
    index.write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    return index


def test_shards_are_put_together(folder):
    index = shard(folder)
    assert same(weights.load(folder), weights.load())
    missing = folder / "unet" / "diffusion_pytorch_model-00002-of-00003.safetensors"
    missing.unlink()
    with pytest.raises(CheckpointError, match="00002-of-00003.safetensors is missing"):
        weights.load(folder)
    for path in ("../vae/diffusion_pytorch_model.safetensors", "/etc/passwd"):
        index.write_text(json.dumps({"weight_map": {"conv_in.bias": path}}))
        with pytest.raises(CheckpointError, match="is not a file name in that folder"):
            weights.load(folder)
    index.write_text(json.dumps({"weight_map": [1]}))
    with pytest.raises(CheckpointError, match="must map tensor names to file names"):
        weights.load(folder)


def test_half_precision_files_are_preferred_for_half_precision(folder):
    unet = folder / "unet"
    state = load_file(unet / "diffusion_pytorch_model.safetensors")
    save_file({n: t.float() * 2 for n, t in state.items()}, unet / "diffusion_pytorch_model.fp16.safetensors")
    value = lambda **options: weights.load(folder, **options).unet.conv_in.bias[0].item()
    plain = state["conv_in.bias"][0].item()
    assert value() == pytest.approx(plain) and value(dtype=torch.float16) == pytest.approx(2 * plain, rel=1e-3)
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    assert value() == pytest.approx(2 * plain), "the only ones there"
    save_file({n: t.float() * 3 for n, t in state.items()}, unet / "diffusion_pytorch_model.non_ema.safetensors")
    assert value() == pytest.approx(2 * plain) and value(ema=False) == pytest.approx(3 * plain)


def test_prediction_and_upcast_can_be_forced(folder):
    assert weights.load(folder).schedule.prediction_type == "epsilon"
    assert weights.load(folder, prediction="v").schedule.prediction_type == "v_prediction"
    upcast = weights.load(folder, upcast_attention=True).unet
    assert upcast.mid_block.attentions[0].transformer_blocks[0].attn2.upcast
    with pytest.raises(ValueError, match="prediction 'x0' is not known"):
        weights.load(folder, prediction="x0")


def test_sizes_come_from_the_config_but_not_from_the_first_wrong_ones(folder, tmp_path):
    assert weights.load(folder).size == (128, 128)
    path = published(tmp_path, "sd15", "v1-5-pruned-emaonly.safetensors")
    models = weights.load(path)
    models.unet.config = dataclasses.replace(models.unet.config, sample_size=32)  # as first published
    assert models.size == (512, 512)


def test_folders_of_pickles_and_of_other_models_are_refused(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds only diffusion_pytorch_model.bin, a pickle"):
        weights.load(folder)
    config = folder / "unet" / "config.json"
    raw = json.loads(config.read_text())
    for change, message in (
        ({"in_channels": 9}, "inpainting"),
        ({"in_channels": 8}, "pix2pix"),
        ({"cross_attention_dim": 2048}, "SDXL"),
    ):
        config.write_text(json.dumps(raw | change))
        with pytest.raises(CheckpointError, match=message):
            weights.load(folder)


@pytest.mark.parametrize("kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionControlNetPipeline", "Anything"])
def test_the_pipelines_name_does_not_decide(folder, kind):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    assert same(weights.load(folder), weights.load())
    (folder / "unet").rename(folder / "transformer")
    with pytest.raises(CheckpointError, match=f"is a {kind} with a transformer for a UNet"):
        weights.load(folder)


# ------------------------------------------------------------------------------------------------- the defaults


def diffusers_defaults(model_class):
    return {n: p.default for n, p in inspect.signature(model_class.__init__).parameters.items()}


# What a published config leaves out is its library's default, at which the model was trained.
LIBRARY = {
    "unet": diffusers_defaults(diffusers.UNet2DConditionModel),
    "text_encoder": transformers.CLIPTextConfig().to_dict(),
    "vae": diffusers_defaults(diffusers.AutoencoderKL),
    "scheduler": diffusers_defaults(diffusers.DDIMScheduler),
}
OURS = {"unet": UNetConfig, "text_encoder": CLIPTextConfig, "vae": VAEConfig, "scheduler": ScheduleConfig}
# Where the releases of a family differ from each other, so that one default cannot be all of them.
DIFFERENT = {
    "stabilityai/stable-diffusion-2-1": {"scheduler": {"prediction_type": "v_prediction"}},  # probed
    "stabilityai/stable-diffusion-2-1-base": {"unet": {"sample_size": 64, "upcast_attention": False}},
    "stabilityai/stable-diffusion-2-base": {"unet": {"sample_size": 64, "upcast_attention": False}},
}
RELEASES = [(f, r) for f, facts in FACTS["folders"].items() for r in facts["repos"] if "inpainting" not in r]


@pytest.mark.parametrize(("family", "repository"), RELEASES)
def test_the_defaults_of_bare_files_are_the_published_configs(family, repository, tmp_path):
    """What a single file is given without a config equals what the folders of the same release say, field by field."""
    name = {"sd15": "v1-5-pruned-emaonly.safetensors", "sd21": "v2-1_768-ema-pruned.safetensors"}[family]
    single = files.open_single_file(published(tmp_path, family, name), ema=True)
    for part, config_class in OURS.items():
        path = f"{part}/{'scheduler_config' if part == 'scheduler' else 'config'}.json"
        published_config = FACTS["folders"][family]["repos"][repository]["configs"][path]
        expected = {f.name: (LIBRARY[part] | published_config)[f.name] for f in dataclasses.fields(config_class)}
        found = dataclasses.asdict(single.configs[part]) | DIFFERENT.get(repository, {}).get(part, {})
        listed = lambda fields: {n: list(v) if isinstance(v, tuple) else v for n, v in fields.items()}
        assert listed(found) == listed(expected), part
        if family == "sd15":
            assert single.configs[part] == config_class(), "the defaults are SD1's"
