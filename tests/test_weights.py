"""Loading is strict: what does not fit is named, whether it is a tensor, a config field or a file."""

import json
import shutil

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file

import unet
import weights
from weights import CheckpointError, sources


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TINY, tmp_path / "checkpoint")


def change_tensors(folder, part, change):
    (path,) = (folder / part).glob("*.safetensors")
    state = load_file(path)
    change(state)
    save_file(state, path)


def change_config(folder, part, **fields):
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


PARTS = {
    "text_encoder": "text_model.encoder.layers.0.mlp.fc1.weight",
    "unet": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "vae": "decoder.mid_block.attentions.0.to_out.0.bias",
}


@pytest.mark.parametrize(("part", "key"), PARTS.items())
def test_every_tensor_is_accounted_for(folder, part, key):
    change_tensors(folder, part, lambda state: state.update({key: torch.cat([state[key], state[key]])}))
    with pytest.raises(CheckpointError, match=f"{key} has shape"):
        weights.load(folder)
    change_tensors(folder, part, lambda state: state.pop(key))
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        weights.load(folder)


@pytest.mark.parametrize("part", PARTS)
def test_an_unknown_tensor_is_refused(folder, part):
    change_tensors(folder, part, lambda state: state.update({"surprise.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="surprise.weight is not part of this model"):
        weights.load(folder)


def test_the_ignored_tensor_is_ignored(folder):
    ids = torch.full((1, 32), 7)  # nonsense on purpose: it must not be read
    change_tensors(folder, "text_encoder", lambda s: s.update({"text_model.embeddings.position_ids": ids}))
    one, two = weights.load(folder), weights.load()
    tokens = torch.arange(32)[None]
    assert torch.equal(one.text_encoder(tokens), two.text_encoder(tokens))


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("unet", "act_fn", "gelu", "act_fn is 'gelu'; this implementation needs 'silu'"),
        ("unet", "time_cond_proj_dim", 256, "time_cond_proj_dim is 256; this implementation does not know that field"),
        ("unet", "attention_head_dim", [4, 4], "attention_head_dim .* must be one number or 3 numbers"),
        ("unet", "down_block_types", ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"], "down_block_types"),
        ("vae", "use_quant_conv", False, "use_quant_conv is False"),
        ("text_encoder", "hidden_act", "relu", "hidden_act 'relu' is not known; use one of quick_gelu, gelu"),
        ("scheduler", "prediction_type", "sample", "prediction_type 'sample' is not known"),
        ("scheduler", "timestep_spacing", "trailing", "timestep_spacing is 'trailing'"),
        ("scheduler", "set_alpha_to_one", True, "set_alpha_to_one is True"),
    ],
)
def test_configs_that_mean_another_network_are_refused(folder, part, field, value, message):
    change_config(folder, part, **{field: value})
    with pytest.raises(CheckpointError, match=message):
        weights.load(folder)


def test_missing_and_broken_files_are_named(folder):
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json cannot be read as JSON"):
        weights.load(folder)
    shutil.copy(TINY / "unet" / "config.json", folder / "unet")
    for name in ("unet/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/merges.txt"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name.split('/')[1]} is missing"):
            weights.load(folder)
        (folder / name).write_bytes(kept)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        weights.load(folder)
    with pytest.raises(CheckpointError, match="is no folder, no .safetensors file and no hub id"):
        weights.load(folder / "no" / "where")


def test_the_published_configs_are_understood(tmp_path):
    """SD 1.4's and 2.1's own unet/config.json, verbatim from the public repositories: every field is known."""
    common = {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False, "downsample_padding": 1, "dual_cross_attention": False, "flip_sin_to_cos": True,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "freq_shift": 0, "in_channels": 4,
        "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32,
        "num_class_embeds": None, "only_cross_attention": False, "out_channels": 4,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }  # fmt: skip
    published = {
        859_520_964: {"attention_head_dim": 8, "cross_attention_dim": 768, "class_embed_type": None, "sample_size": 64,
                      "mid_block_type": "UNetMidBlock2DCrossAttn", "resnet_time_scale_shift": "default",
                      "upcast_attention": False, "use_linear_projection": False},
        865_910_724: {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "sample_size": 96,
                      "use_linear_projection": True, "upcast_attention": True},
    }  # fmt: skip
    for parameters, fields in published.items():
        (tmp_path / "config.json").write_text(json.dumps(common | fields))
        config = sources.read_config(tmp_path / "config.json", "unet")
        with torch.device("meta"):
            model = unet.UNet2DConditionModel(config)
        assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_leaves_the_vae_in_float32(dtype):
    models = weights.load(dtype=dtype)
    assert models.unet.conv_in.weight.dtype == models.text_encoder.text_model.final_layer_norm.weight.dtype == dtype
    assert models.vae.quant_conv.weight.dtype == torch.float32


def test_a_released_part_comes_back(folder, monkeypatch):
    """Only one that lies in its file as it is, in float32 here, is let go. It comes from that file alone: the source,
    which may be a hub id, is not opened again."""
    for part in ("text_encoder", "vae"):
        change_tensors(folder, part, lambda state: state.update({k: v.float() for k, v in state.items()}))
    for source, mapped in ((folder, True), (TINY, False)):
        models = weights.load(source)
        monkeypatch.setattr(weights, "open_source", None)
        for part in ("text_encoder", "vae"):
            before, kept = getattr(models, part), getattr(models, part).state_dict()
            models.release(part)
            after = getattr(models, part)
            assert (after is not before) == mapped
            assert all(torch.equal(kept[name], tensor) for name, tensor in after.state_dict().items())
        monkeypatch.undo()


def test_all_files_together_are_small():
    assert sum(f.stat().st_size for f in TINY.rglob("*") if f.is_file()) <= 25e6
