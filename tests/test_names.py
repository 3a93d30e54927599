"""The public files, from exact facts: every tensor name, shape and dtype of the published releases.

tests/data/checkpoints.json.gz holds, in compact form, the headers of the published single files and folders, their
configs, and per-tensor name maps that were compared with diffusers' converters. Nothing here needs the weights: the
tensors lie on the meta device.
"""

import functools
import json
import random
from pathlib import Path

import pytest
import torch
from conftest import published_facts

import weights
from unet import UNet2DConditionModel, UNetConfig
from weights import CheckpointError, configs, files, names

FACTS = published_facts()
DTYPES = {"F32": torch.float32, "F16": torch.float16, "I64": torch.int64, "I32": torch.int32}


def meta(shape, dtype):
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


@pytest.mark.parametrize(
    ("table", "rename", "count"),
    [("unet", names.original_unet, 686), ("vae_new", names.original_vae, 248)],
)
def test_names_equal_the_table(table, rename, count):
    rows = FACTS["maps"][table]
    assert len(rows) == count
    for name, expected in rows.items():
        inner = name.removeprefix("model.diffusion_model.").removeprefix("first_stage_model.")
        ((found, _),) = rename(inner, torch.empty(4, 4, device="meta"))
        assert found == expected


def test_old_vae_names_become_new_ones():
    assert len(FACTS["maps"]["vae_old"]) == 248
    for name, old in FACTS["maps"]["vae_old"].items():
        ((found, _),) = names.diffusers_vae(old, torch.empty(4, device="meta"))
        assert found == FACTS["maps"]["vae_new"][name]


def test_openclip_names_and_rows_equal_the_table():
    rows = FACTS["maps"]["openclip"]
    assert len(rows) == 294
    unread = {name for name in rows if names.reason(name, names.UNREAD)}
    assert unread == {"cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection"}
    for name, expected in rows.items():
        if name in unread:
            assert expected == []
            continue
        tensor = torch.arange(3 * 4.0)[:, None] * torch.ones(1, 4)  # row i holds i: a wrong slice shows
        found = names.openclip_text(name.removeprefix("cond_stage_model.model."), tensor)
        assert [n for n, _ in found] == [n for n, _ in expected]
        for (_, part), (_, how) in zip(found, expected):
            first = {"whole": 0, "q": 0, "k": 4, "v": 8}[how.split()[0]]
            assert part[0, 0] == first and len(part) == (12 if how == "whole" else 4)


# ---------------------------------------------------------------------------- every published file, strictly

SINGLE = [(family, name) for family, facts in FACTS["single"].items() for name in facts["files"]]


def single_file(family, name):
    facts = FACTS["single"][family]
    groups = set(facts["files"][name]["groups"])
    tensors = {n: meta(shape, dtype) for n, (shape, dtype, group) in facts["tensors"].items() if group in groups}
    assert len(tensors) == facts["files"][name]["n_tensors"]
    return tensors


@functools.cache
def expected_tensors(part, config):
    return weights.build(part, config).state_dict()


def check_all(source):
    for part in weights.MODELS:
        weights.check(expected_tensors(part, source.configs[part]), source.tensors[part], part)
    weights.check({}, source.tensors["unknown"], "unknown")


@pytest.mark.parametrize(("family", "name"), SINGLE)
def test_every_published_single_file_is_accounted_for(family, name):
    tensors = single_file(family, name)
    for ema in (True, False):
        source = files.single_file_source(Path(name), tensors, ema, {})
        check_all(source)
    raw = {id(t) for n, t in tensors.items() if n.startswith("model.diffusion_model.")}
    averaged = files.single_file_source(Path(name), tensors, True, {}).tensors["unet"]
    has_copy = "ema_unet" in FACTS["single"][family]["files"][name]["groups"]
    assert all((id(t) in raw) != has_copy for t in averaged.values()), "the averaged weights, where there are any"
    assert all(id(t) in raw for t in source.tensors["unet"].values())


@pytest.mark.parametrize("how", ["missing", "extra", "shape"])
@pytest.mark.parametrize(("family", "name"), SINGLE)
def test_a_damaged_single_file_is_refused_by_the_tensors_name(family, name, how):
    """One tensor of each part missing, extra, or of another shape: the message names it, in diffusers' spelling."""
    random_ = random.Random(f"{name} {how}")
    for prefix, (_, rename) in names.SINGLE_FILE.items():
        tensors = single_file(family, name)
        used = [n for n in tensors if n.startswith(prefix) and rename(n.removeprefix(prefix), tensors[n])]
        if not used:
            continue
        key = random_.choice(used)
        if how == "missing":
            expected = rename(key.removeprefix(prefix), tensors.pop(key))
        elif how == "extra":
            tensors[key + "2"] = tensors[key]
            expected = rename((key + "2").removeprefix(prefix), tensors[key])
        else:
            *sides, side = tensors[key].shape
            tensors[key] = torch.empty([*sides, side + 3], device="meta")
            expected = rename(key.removeprefix(prefix), tensors[key])
        with pytest.raises(CheckpointError) as error:
            check_all(files.single_file_source(Path(name), tensors, False, {}))
        assert any(new in str(error.value) for new, _ in expected) or key in str(error.value)


def test_what_the_text_tower_drops_may_be_missing():
    """Waifu-Diffusion's kind of SD2 file has 23 layers and neither text_projection nor logit_scale."""
    tensors = single_file("sd21", "v2-1_768-ema-pruned.safetensors")
    dropped = [n for n in tensors if ".resblocks.23." in n or n.endswith(("text_projection", "logit_scale"))]
    assert len(dropped) == 14
    check_all(files.single_file_source(Path("x"), {n: t for n, t in tensors.items() if n not in dropped}, True, {}))


FOLDERS = [
    (family, repository, path)
    for family, facts in FACTS["folders"].items()
    for repository, contents in facts["repos"].items()
    for path in contents["files"]
    if "inpainting" not in repository
]


@pytest.mark.parametrize(("family", "repository", "path"), FOLDERS)
def test_every_published_folder_file_is_accounted_for(family, repository, path, tmp_path):
    facts = FACTS["folders"][family]
    part, contents = path.split("/")[0], facts["repos"][repository]
    which, dtype, _ = contents["files"][path]
    rows = dict(facts["tensors"][which.split(" ")[0]])
    if "with position_ids" in which:
        rows["text_model.embeddings.position_ids"] = [[1, 77], "I64"]
    (tmp_path / "config.json").write_text(json.dumps(contents["configs"][f"{part}/config.json"]))
    expected = expected_tensors(part, configs.read_config(tmp_path / "config.json", part))
    found = dict(p for n, (shape, kind) in rows.items() for p in files.NAMES[part](n, meta(shape, kind)))
    weights.check(expected, found, path)


@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_text_encoders_without_their_prefix_are_accounted_for(family):
    rows = FACTS["folders"][family]["tensors"]["text_encoder"]
    for name, (shape, dtype) in rows.items():
        if name == "text_model.embeddings.position_ids":
            continue
        ((found, _),) = names.diffusers_text(name.removeprefix("text_model."), meta(shape, dtype))
        assert found == f"text_model.{name.removeprefix('text_model.')}"


@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_published_configs_and_schedules_are_understood(family, tmp_path):
    for repository, contents in FACTS["folders"][family]["repos"].items():
        found, path = {}, tmp_path / "config.json"
        for name, fields in contents["configs"].items():
            path.write_text(json.dumps(fields))
            part = name.split("/")[0]
            found[part] = configs.read_schedule(path)[0] if part == "scheduler" else configs.read_config(path, part)
        assert found.keys() == configs.CONFIGS.keys()
        kind = found["scheduler"].prediction_type
        assert kind == ("v_prediction" if repository.endswith("stable-diffusion-2-1") else "epsilon")


# -------------------------------------------------------------------------------------------------- other families


@pytest.mark.parametrize(
    ("channels", "context", "message"), [(9, 768, "inpainting"), (8, 768, "pix2pix"), (4, 2048, "SDXL")]
)
def test_relatives_are_recognised_and_refused(channels, context, message):
    tensors = single_file("sd15", "v1-5-pruned-emaonly.safetensors")
    inner = "model.diffusion_model.input_blocks."
    tensors[f"{inner}0.0.weight"] = torch.empty(320, channels, 3, 3, device="meta")
    tensors[f"{inner}1.1.transformer_blocks.0.attn2.to_k.weight"] = torch.empty(320, context, device="meta")
    with pytest.raises(CheckpointError, match=message):
        files.single_file_source(Path("x.safetensors"), tensors, True, {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("conditioner.embedders.1.model.x", "is of SDXL"),
        ("model.diffusion_model.joint_blocks.0.x", "is of SD3"),
        ("model.diffusion_model.something.else", "the UNet has no conv_in.weight"),
        ("something.else", "x.safetensors holds nothing of SD 1 or 2, no UNet; give a whole checkpoint"),
    ],
)
def test_other_architectures_are_refused(name, message):
    path = Path("x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        source = files.single_file_source(path, {name: torch.empty(1, device="meta")}, True, {})
        weights.check_source(source, {}, str(path))


# ------------------------------------------------------------------------------------------------- the vocabulary


def test_the_embedded_vocabulary_is_clips():
    """Ids that are published facts: SD1 pads with 49407, SD2 with 0; "hello!" is 3306 and, where "!" pads, 0."""
    one, two = weights.load_tokenizer(None), weights.load_tokenizer(None, pad="!")
    assert len(one) == 49408 and one.model_max_length == 77
    ids = lambda tokenizer, text: tokenizer(text, padding="max_length").input_ids
    assert ids(one, "hello!")[:4] == [49406, 3306, 256, 49407] and set(ids(one, "")[1:]) == {49407}
    assert ids(two, "hello")[:4] == [49406, 3306, 49407, 0] and set(ids(two, "")[2:]) == {0}
    astronaut = ids(one, "a photograph of an astronaut riding a horse")[:10]
    assert " ".join(map(str, astronaut)) == "49406 320 8853 539 550 18376 6765 320 4558 49407"


def constant_unet(value):
    """A UNet that answers `value` everywhere: what a perfect epsilon or v predictor would say to the probe."""
    model = UNet2DConditionModel(
        UNetConfig(
            block_out_channels=(8, 8),
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            attention_head_dim=2,
            cross_attention_dim=16,
            norm_num_groups=4,
        )
    )
    with torch.no_grad():
        model.conv_out.weight.zero_()
        model.conv_out.bias.fill_(value)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("value", "kind"), [(0.5, "epsilon"), (-0.4, "epsilon"), (-0.6, "v_prediction")])
def test_the_probe_decides_at_its_threshold(value, kind, dtype):
    found, margin = weights.probe_prediction(constant_unet(value).to(dtype))
    assert found == kind and margin == pytest.approx(value - 0.5, abs=1e-3)
