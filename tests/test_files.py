"""Real files through the real loader: folders whole, sharded and in half precision; single files at full size.

The full-size files are sparse: a true header and a body of zeros that takes no disk, so their loading is real.
"""

import dataclasses
import json
import shutil
import struct

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from test_layouts import FACTS, SINGLE

import weights
from unet import UNetConfig
from weights import CheckpointError
from weights.__main__ import describe

BYTES = {"I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2}  # in the order in which the library lays tensors out


def sparse_file(path, rows):
    """A safetensors file of {name: (shape, dtype)}, as the safetensors library lays it out: by dtype, then by
    name; metadata first; the header padded with spaces to a multiple of 8."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in sorted(rows.items(), key=lambda row: (list(BYTES).index(row[1][1]), row[0])):
        size = BYTES[dtype]
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def published(tmp_path, family, name, dtype=None, drop=()):
    facts = FACTS["single"][family]
    groups = set(facts["files"][name]["groups"])
    rows = {n: (shape, (dtype or d) if d == "F32" else d) for n, (shape, d, group) in facts["tensors"].items()
            if group in groups and not n.startswith(drop)}  # fmt: skip
    return sparse_file(tmp_path / name, rows)


SAFETENSORS = [(family, name) for family, name in SINGLE if name.endswith(".safetensors")]


@pytest.mark.parametrize(("family", "name"), SAFETENSORS)
def test_a_published_single_file_loads(family, name, tmp_path):
    path = published(tmp_path, family, name)
    # The order and the padding of the header have changed with the library's releases, by a few digits and spaces.
    assert abs(path.stat().st_size - FACTS["single"][family]["files"][name]["bytes"]) < 200
    models = weights.load(path, prediction="epsilon")
    assert models.unet.config.cross_attention_dim == (768 if family == "sd15" else 1024)
    assert models.tokenizer.pad_token_id == (49407 if family == "sd15" else 0)
    assert sum(p.numel() for p in models.unet.parameters()) == FACTS_PARAMETERS[family]


@pytest.mark.parametrize(("prediction", "side"), [("auto", 512), ("v", 768)])
def test_a_bare_sd2_file_is_probed(prediction, side, tmp_path):
    """A UNet of zeros answers 0: 0.5 below its input, which is epsilon's side of the probe's -1."""
    models = weights.load(published(tmp_path, "sd21", "v2-1_512-nonema-pruned.safetensors"), prediction=prediction)
    assert models.schedule.prediction_type == ("epsilon" if side == 512 else "v_prediction")
    assert models.size == (side, side)


FACTS_PARAMETERS = {"sd15": 859_520_964, "sd21": 865_910_724}


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_half_precision_resave_loads(dtype, tmp_path):
    path = published(tmp_path, "sd15", "v1-5-pruned-emaonly.safetensors", dtype)
    models = weights.load(path, dtype={"F16": torch.float16, "BF16": torch.bfloat16}[dtype])
    assert models.vae.quant_conv.weight.dtype == torch.float32


def test_a_file_without_a_vae_needs_one(tmp_path):
    path = published(tmp_path, "sd15", "v1-5-pruned-emaonly.safetensors", "F16", drop=("first_stage_model.",))
    with pytest.raises(CheckpointError, match="holds no VAE; give one with --vae"):
        weights.load(path)
    assert weights.load(path, vae=TINY / "vae").vae.config.block_out_channels == (32, 64, 96, 96)
    rows = FACTS["folders"]["sd15"]["tensors"]["vae_old_names"]
    alone = sparse_file(tmp_path / "vae.safetensors", rows)
    original = {n.removeprefix("first_stage_model."): (shape, d) for n, (shape, d, group) in
                FACTS["single"]["sd15"]["tensors"].items() if group == "vae"}  # fmt: skip
    for file in (alone, sparse_file(tmp_path / "original.safetensors", original)):
        assert weights.load(path, vae=file).vae.config.factor == 8


def test_the_description_of_a_single_file(tmp_path):
    lines = "\n".join(describe(str(published(tmp_path, "sd15", "v1-5-pruned.safetensors"))))
    for fact in ("layout       single file", "family       SD 1", "epsilon, as all of SD 1", "686 tensors, 859,520,964",
                 "248 tensors, 83,653,863", "196 tensors, 123,060,480", "a full copy, used unless --no-ema",
                 "12 tensors: the noise schedule", "no release that is known", "missing      nothing"):  # fmt: skip
        assert fact in lines, fact
    drop = ("first_stage_model.decoder.conv_out",)
    second = published(tmp_path, "sd21", "v2-1_768-ema-pruned.safetensors", drop=drop)
    lines = "\n".join(describe(str(second)))
    for fact in ("family       SD 2", "probed when it is loaded", "14 tensors: what SD2 does not read",
                 "missing      vae: decoder.conv_out.bias"):  # fmt: skip
        assert fact in lines, fact


# ------------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TINY, tmp_path / "checkpoint")


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
    for change, message in (({"in_channels": 9}, "inpainting"), ({"in_channels": 8}, "pix2pix"),
                            ({"cross_attention_dim": 2048}, "SDXL")):  # fmt: skip
        config.write_text(json.dumps(raw | change))
        with pytest.raises(CheckpointError, match=message):
            weights.load(folder)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(CheckpointError, match="is a StableDiffusionXLPipeline"):
        weights.load(folder)


def test_the_defaults_of_bare_files_are_the_published_configs():
    """What a single file is given without a config equals what the folders of the same release say."""
    from weights import sources

    for family, ours in (("sd15", UNetConfig()), ("sd21", sources.SD2_UNET)):
        for contents in FACTS["folders"][family]["repos"].values():
            raw = contents["configs"].get("unet/config.json", {})
            for name in ("block_out_channels", "attention_head_dim", "cross_attention_dim", "use_linear_projection"):
                value = raw.get(name, getattr(UNetConfig(), name))
                value = tuple(value) if isinstance(value, list) else value
                assert value == getattr(ours, name), name
