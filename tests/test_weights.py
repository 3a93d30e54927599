"""Loading is strict: what does not fit is named, whether it is a tensor, a config field or a file."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, change_config, change_tensors, forks, sparse_file

import weights
from weights import CheckpointError, configs

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
        ("unet", "act_fn", "gelu", "act_fn is 'gelu', another activation; this implementation needs 'silu'"),
        ("unet", "time_cond_proj_dim", 256, "time_cond_proj_dim is 256, guidance as an input, as distilled latent"),
        ("unet", "surprise", None, "surprise is None; no release of its library that is known has that field"),
        ("unet", "_class_name", "UNetMotionModel", "_class_name is 'UNetMotionModel'; use a model with the UNet2DCond"),
        ("unet", "mid_block_type", None, "mid_block_type is None, another middle"),
        ("unet", "norm_num_groups", None, "norm_num_groups is None; that is no usable value"),
        ("unet", "only_cross_attention", [False, True, False], "only_cross_attention is .*, no self-attention"),
        ("unet", "layers_per_block", [1, 2, 1], "layers_per_block is .*; that is no usable value"),
        ("unet", "attention_head_dim", [4, 4], "attention_head_dim .* must be one number or 3 numbers"),
        ("unet", "down_block_types", ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"], "down_block_types"),
        ("vae", "use_quant_conv", False, "use_quant_conv is False"),
        ("text_encoder", "hidden_act", "relu", "hidden_act 'relu' is not known; use one of quick_gelu, gelu"),
        ("scheduler", "prediction_type", "sample", "prediction_type 'sample' is not known"),
        ("text_encoder", "model_type", "t5", "model_type is 't5', another text encoder"),
        ("scheduler", "use_flow_sigmas", True, "use_flow_sigmas is True, a flow model's noise levels"),
        ("scheduler", "rescale_betas_zero_snr", True, "zero terminal SNR needs v_prediction"),
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
        model = weights.build("unet", configs.read_config(tmp_path / "config.json", "unet"))
        assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_leaves_the_vae_in_float32(dtype):
    models = weights.load(dtype=dtype)
    assert models.unet.conv_in.weight.dtype == models.text_encoder.text_model.final_layer_norm.weight.dtype == dtype
    assert models.vae.quant_conv.weight.dtype == torch.float32


# ------------------------------------------------------------------------------------------------ the fingerprint


PIN = {"b": torch.arange(100.0).reshape(4, 25), "a": torch.ones(2, dtype=torch.float16)}


def test_the_fingerprint_is_the_one_that_pictures_carry():
    """Of every tensor by name: the name, the shape, the dtype, the first 64 values. Pictures made by earlier versions
    carry it, so it must never change."""
    digest = "ae5432aad3f759b6266ac5e53ad2ae8d867d8bda4462a752d50319f0f3551439"
    assert weights.fingerprint("unet", PIN) == digest
    assert weights.fingerprint("unet", dict(reversed(PIN.items()))) == digest, "the order in the file is no part of it"
    for change in ({"c": torch.ones(1)}, {"b": PIN["b"].reshape(25, 4)}, {"a": torch.ones(2, dtype=torch.bfloat16)}):
        assert weights.fingerprint("unet", PIN | change) != digest
    for place, value in ((0, 0.5), (63, 0.5)):
        changed = PIN["b"].clone()
        changed.view(-1)[place] = value
        assert weights.fingerprint("unet", PIN | {"b": changed}) != digest
    later = PIN["b"].clone()
    later.view(-1)[64:] = float("nan")
    assert weights.fingerprint("unet", PIN | {"b": later}) == digest, "the docstring says so"


@pytest.mark.parametrize(("part", "key"), PARTS.items())
def test_the_fingerprint_of_a_checkpoint_tells_its_parts_apart(folder, part, key):
    before = weights.load(folder).identity
    assert before == weights.load().identity and before.keys() == {"text_encoder", "unet", "vae", "configs"}
    change_tensors(folder, part, lambda state: state[key].view(-1)[64:].mul_(0.5))
    assert weights.load(folder).identity == before
    change_tensors(folder, part, lambda state: state[key].view(-1)[63].add_(0.5))
    after = weights.load(folder).identity
    assert {name for name in before if before[name] != after[name]} == {part}


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("scheduler", {"beta_end": 0.013}),
        ("scheduler", {"prediction_type": "v_prediction"}),
        ("unet", {"norm_eps": 2e-5}),
        ("unet", {"sample_size": 24}),
        ("text_encoder", {"hidden_act": "gelu"}),
        ("vae", {"scaling_factor": 0.5}),
    ],
)
def test_the_fingerprint_sees_the_configs(folder, part, fields):
    before = weights.load(folder).identity
    change_config(folder, part, **fields)
    after = weights.load(folder).identity
    assert {name for name in before if before[name] != after[name]} == {"configs"}


def test_what_computes_nothing_is_no_part_of_the_fingerprint(folder):
    change_config(folder, "unet", _diffusers_version="99.0", _name_or_path="elsewhere")
    change_config(folder, "text_encoder", bos_token_id=5)
    (folder / "magicmix.json").write_text('{"steps": 7}')
    assert weights.load(folder, upcast_attention=True, prediction="v").identity == weights.load().identity


# ------------------------------------------------------------------------------------------ memory that goes back


@pytest.fixture
def whole(folder):
    """A checkpoint whose text encoder and VAE lie in their files as they are used, in float32."""
    for part in ("text_encoder", "vae"):
        change_tensors(folder, part, lambda state: state.update({k: v.float() for k, v in state.items()}))
    return folder


def used(models):
    """What the text encoder and the VAE compute."""
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x0 = models.vae.encode(picture)
    return models.text_encoder(torch.arange(32)[None]), x0, models.vae.decode(x0)


def is_sound(models):
    """No parameter on meta, none with a gradient."""
    parameters = [p for part in (models.text_encoder, models.unet, models.vae) for p in part.parameters()]
    return {(p.device.type, p.requires_grad) for p in parameters} == {("cpu", False)}


def test_parts_that_are_freed_compute_the_same_after_every_use(whole, monkeypatch):
    """They come from their own files alone: the source, which may be a hub id, is not opened again."""
    kept, freed = used(weights.load(whole)), weights.load(whole, free_after_use=True)
    monkeypatch.setattr(weights, "open_source", None)
    sound = []
    for module in (freed.text_encoder, freed.vae.encoder, freed.vae.decoder):
        module.register_forward_pre_hook(lambda *_: sound.append(is_sound(freed)))
        module.register_forward_hook(lambda *_: sound.append(is_sound(freed)))
    for _ in range(3):
        places = [freed.text_encoder.text_model.final_layer_norm.weight, freed.vae.quant_conv.weight]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(used(freed), kept, strict=True))
        after = [freed.text_encoder.text_model.final_layer_norm.weight, freed.vae.quant_conv.weight]
        assert all(a is not b for a, b in zip(places, after)), "mapped anew"
    assert len(sound) == 18 and all(sound) and is_sound(freed)
    assert not freed.vae.training and not freed.text_encoder.training


@pytest.mark.parametrize("options", [{"free_after_use": False}, {"free_after_use": True, "vae_dtype": torch.bfloat16}])
def test_parts_that_are_not_freed_stay_where_they_are(whole, options):
    """What was not asked to be freed, and what was converted: reading it again would cost more than it saves."""
    models = weights.load(whole, dtype=torch.bfloat16, **options)
    before = [p.data_ptr() for part in (models.text_encoder, models.vae) for p in part.parameters()]
    used(models)
    assert before == [p.data_ptr() for part in (models.text_encoder, models.vae) for p in part.parameters()]


def test_what_is_written_into_the_weights_stays_unless_they_are_freed(whole):
    file = whole / "text_encoder" / "model.safetensors"
    content, states = file.read_bytes(), {}
    for free in (False, True):
        models = weights.load(whole, free_after_use=free)
        bias = lambda: models.text_encoder.text_model.final_layer_norm.bias  # noqa: B023
        before = bias().clone()
        bias().add_(1)
        states[free] = [models.text_encoder(torch.arange(32)[None]) for _ in range(3)]
        assert torch.equal(bias(), before if free else before + 1)
    first, second, third = states[False]
    assert torch.equal(first, second) and torch.equal(first, third)
    freed, second, third = states[True]
    assert torch.equal(freed, first) and torch.equal(second, third) and not torch.equal(freed, second)
    assert file.read_bytes() == content


def measure(folder, free, out):
    """In a process of its own: how many bytes of each part's file, and of everything, lie in memory."""
    found = {}

    def note(when):
        mapped = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
        for part in ("text_encoder", "vae"):
            rss = [re.search(r"^Rss:\s+(\d+)", m, re.MULTILINE)[1] for m in mapped if f"{folder}/{part}/" in m]
            found[f"{part} {when}"] = 1024 * sum(map(int, rss))
        status = Path("/proc/self/status").read_text()
        found[f"process {when}"] = 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])

    def use():
        models.text_encoder(torch.arange(32)[None])
        models.vae.decode(torch.zeros(1, 4, 2, 2))

    models = weights.load(folder, free_after_use=free)
    note("loaded")
    use()  # the first use takes memory of its own, for the kernels
    for part, module in (("text_encoder", models.text_encoder), ("vae", models.vae.decoder)):
        module.register_forward_hook(lambda *_, part=part: note(f"in use ({part})"), prepend=True)
    use()
    note("after")
    out.write_text(json.dumps(found))


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="reads from Linux what is mapped")
def test_the_memory_goes_back(folder, tmp_path):
    """Of a text encoder of 220 MB and a VAE of 160 MB, whose files are sparse."""
    change_config(folder, "text_encoder", intermediate_size=65_536)
    change_config(folder, "vae", block_out_channels=[32, 64, 512, 512])
    size, found = {}, {}
    for part in ("text_encoder", "vae"):
        (path,) = (folder / part).glob("*.safetensors")
        network = weights.build(part, configs.read_config(folder / part / "config.json", part))
        sparse_file(path, {name: (tuple(t.shape), "F32") for name, t in network.state_dict().items()})
        size[part] = path.stat().st_size
        assert size[part] > 100e6
    for free in (False, True):
        process = forks().Process(target=measure, args=(folder, free, tmp_path / "found.json"))
        process.start()
        process.join(300)
        found[free] = json.loads((tmp_path / "found.json").read_text())
    kept, freed = found[False], found[True]
    for part in size:
        in_use = f"in use ({part})"
        assert kept[f"{part} {in_use}"] > 0.5 * size[part] and freed[f"{part} {in_use}"] > 0.5 * size[part]
        assert kept[f"{part} after"] > 0.9 * size[part]
        assert freed[f"{part} loaded"] < 0.05 * size[part] and freed[f"{part} after"] < 0.05 * size[part]
        assert freed[f"process {in_use}"] - freed["process after"] > 0.5 * size[part]
    assert kept["process after"] - freed["process after"] > 0.8 * sum(size.values())


# ---------------------------------------------------------------------------------------------------- its size


def test_all_files_together_are_small():
    assert sum(f.stat().st_size for f in TINY.rglob("*") if f.is_file()) <= 25e6


# ---------------------------------------------------------------------------------------------- the memory's order


def test_convolutions_in_half_precision_have_their_channels_last(models):
    """With the same names and values; in float32 they are as in the files, and so is all else."""
    for dtype in (torch.float16, torch.bfloat16):
        half, expected = weights.load(dtype=dtype).unet.state_dict(), models.unet.state_dict()
        assert half.keys() == expected.keys()
        for name, tensor in half.items():
            assert torch.equal(tensor, expected[name].to(dtype))
            assert expected[name].is_contiguous()
            if tensor.ndim == 4 and tensor.shape[2] > 1:
                assert tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
            else:
                assert tensor.is_contiguous()
