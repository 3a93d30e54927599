"""Single files as trainers, mergers and interfaces leave them: each as tensors without storage, and as a sparse file of
its true size through the real loader."""

import functools
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import TINY, change_config, published_facts, published_rows, sparse_file

import weights
from weights import CheckpointError, files, names
from weights.describe import describe

SD1, SD2 = ("sd15", "v1-5-pruned-emaonly.safetensors"), ("sd21", "v2-1_768-ema-pruned.safetensors")
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
HALF = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
META = HALF | {"I64": torch.int64, "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn}


def renamed(rows, change):
    return {change(name): row for name, row in rows.items()}


def recast(rows, prefix, dtype):
    return {n: (shape, dtype if n.startswith(prefix) else d) for n, (shape, d) in rows.items()}


def averaged(rows, count=None, raw=True):
    """With a copy of `count` averaged tensors, and with or without the raw ones."""
    unet = [n for n in rows if n.startswith(UNET)][:count]
    copy = {"model_ema." + n.removeprefix("model.").replace(".", ""): rows[n] for n in unet}
    return {n: row for n, row in rows.items() if raw or not n.startswith(UNET)} | copy


def without(rows, *prefixes):
    return {n: row for n, row in rows.items() if not n.startswith(prefixes)}


def middle_attention(rows, rank):
    """The VAE's middle attention in diffusers' names inside the original ones, as matrices or 1 x 1 convolutions."""
    out = {}
    for name, (shape, dtype) in rows.items():
        for old, new in {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}.items():
            name = name.replace(f".mid.attn_1.{old}.", f".mid.attn_1.{new}.")
        is_matrix = ".mid.attn_1.to_" in name and len(shape) == 4
        out[name] = (shape[:rank] if is_matrix else shape, dtype)
    return out


def projections(rows, more):
    """proj_in and proj_out with a trailing (1, 1) or without it."""
    place = tuple(f".{p}.weight" for p in ("proj_in", "proj_out"))
    is_one = lambda name: name.startswith(UNET) and name.endswith(place)
    return {n: ((shape[:2] + more) if is_one(n) else shape, d) for n, (shape, d) in rows.items()}


NO_IDS = lambda rows: {n: row for n, row in rows.items() if not n.endswith("position_ids")}
IDS = f"{TEXT}transformer.text_model.embeddings.position_ids"
EMPTY = ([0], "F32")
LEFT = "left over from training and not read"
LEFTOVERS = ["logvar", "scale_factor", "denoiser.sigmas", "ddim_sigmas", "epoch", "global_step", "state_dict"]
LEFTOVERS += ["embedding_manager.initial", f"{VAE}loss.logvar", f"{VAE}model_ema.decay"]

# what: (family, change of the published rows, the notes)
LOADS = {
    "as published": (SD1, lambda rows: rows, []),
    "no position_ids": (SD1, NO_IDS, []),
    "position_ids in half precision": (SD1, lambda rows: rows | {IDS: ([1, 77], "F16")}, []),
    "NovelAI's names": (
        SD1,
        lambda rows: renamed(rows, lambda n: n.replace("transformer.text_model.", "transformer.")),
        [],
    ),
    "half UNet, whole VAE": (SD1, lambda rows: recast(rows, VAE, "F32"), []),
    "whole UNet, half VAE": (SD1, lambda rows: recast(rows, UNET, "F32"), []),
    "double precision": (SD1, lambda rows: recast(rows, TEXT, "F64"), []),
    "matrices in the VAE": (SD1, lambda rows: middle_attention(rows, 2), []),
    "convolutions in the VAE": (SD1, lambda rows: middle_attention(rows, 4), []),
    "projections as matrices": (SD1, lambda rows: projections(rows, []), []),
    "projections as convolutions": (SD2, lambda rows: projections(rows, [1, 1]), []),
    "text_projection and logit_scale": (
        SD1,
        lambda rows: (
            rows
            | {f"{TEXT}logit_scale": ([], "F32"), f"{TEXT}text_projection": ([768, 768], "F16")}
            | {f"{TEXT}transformer.text_projection.weight": ([768, 768], "F16")}
        ),
        [],
    ),
    "SD2's position_ids and projections": (
        SD2,
        lambda rows: (
            rows
            | {f"{TEXT}model.transformer.text_model.embeddings.position_ids": ([1, 77], "I64")}
            | {f"{TEXT}model.transformer.text_projection.weight": ([1024, 1024], "F16")}
            | {f"{TEXT}model.logit_scale": ([], "I64")}
        ),
        [],
    ),
    "SD2's new prefix": (SD2, lambda rows: renamed(rows, lambda n: n.replace(TEXT, "conditioner.embedders.0.")), []),
    "training leftovers": (
        SD1,
        lambda rows: rows | dict.fromkeys(LEFTOVERS, ([], "F32")),
        [f"10 tensors are {LEFT}: ddim_sigmas, denoiser.sigmas, embedding_manager.initial ..."],
    ),
    "every name with state_dict.": (SD1, lambda rows: renamed(rows, lambda n: f"state_dict.{n}"), []),
    "averaged weights": (SD1, averaged, []),
    "averaged weights alone": (SD1, lambda rows: averaged(rows, raw=False), []),
    "50 averaged weights": (SD1, lambda rows: averaged(rows, 50), ["its averaged weights are 50 of 686 tensors"]),
    "300 averaged weights": (SD1, lambda rows: averaged(rows, 300), ["its averaged weights are 300 of 686 tensors"]),
    "a mark for v": (SD1, lambda rows: rows | {"v_pred": EMPTY}, []),
    "marks for v and zero SNR": (SD2, lambda rows: rows | {"v_pred": EMPTY, "ztsnr": EMPTY}, []),
}

# what: (family, change, the message)
REFUSED = {
    "no VAE": (SD1, lambda rows: without(rows, VAE), r"holds text encoder and UNet, no VAE; give one as vae"),
    "UNet alone": (SD1, lambda rows: without(rows, VAE, TEXT), "holds UNet, no text encoder; .* and this as its unet"),
    "bare UNet": (
        SD1,
        lambda rows: renamed(without(rows, VAE, TEXT), lambda n: n.removeprefix(UNET)),
        "holds UNet, no text encoder; .* and this as its unet",
    ),
    "bare VAE": (
        SD1,
        lambda rows: renamed(without(rows, UNET, TEXT), lambda n: n.removeprefix(VAE)),
        "holds VAE, no UNet; give a whole checkpoint, and this as its vae",
    ),
    "a missing averaged tensor": (
        SD1,
        lambda rows: without(averaged(rows, raw=False), "model_ema.diffusion_modelout2bias"),
        r"conv_out\.bias is missing",
    ),
    "an unknown averaged tensor": (
        SD1,
        lambda rows: averaged(rows) | {"model_ema.diffusion_modelsurprise": ([1], "F32")},
        "tensor model_ema.diffusion_modelsurprise is not part of this model",
    ),
    "a LoRA inside": (SD1, lambda rows: rows | {"lora_unet_mid.lora_up.weight": ([4, 4], "F16")}, "is of a LoRA"),
    "a ControlNet inside": (SD1, lambda rows: rows | {"control_model.x.weight": ([4], "F16")}, "is of a ControlNet"),
    "a hypernetwork inside": (SD1, lambda rows: rows | {"768.0.linear.weight": ([4], "F16")}, "is of a hypernetwork"),
    "LCM": (
        SD1,
        lambda rows: rows | {f"{UNET}time_embed.cond_proj.weight": ([320, 256], "F16")},
        r"cond_proj.weight is of a latent consistency model \(LCM\)",
    ),
    "float8 with scales": (SD1, lambda rows: rows | {"scaled_fp8": ([2], "F16")}, "in float8 with scales"),
    "float8": (SD1, lambda rows: recast(rows, UNET, "F8_E4M3"), "is float8_e4m3fn; use float32, float16 or bfloat16"),
    "SDXL": (SD1, lambda rows: rows | {"conditioner.embedders.1.model.x": ([4], "F16")}, "is of SDXL"),
    "inpainting": (SD1, lambda rows: rows | {f"{UNET}input_blocks.0.0.weight": ([320, 9, 3, 3], "F16")}, "inpainting"),
    "depth": (SD2, lambda rows: rows | {f"{UNET}input_blocks.0.0.weight": ([320, 5, 3, 3], "F16")}, "a depth model"),
    "an unknown tensor": (SD1, lambda rows: rows | {f"{UNET}surprise": ([4], "F16")}, "surprise is not part of this"),
    "zero SNR with epsilon": (
        SD1,
        lambda rows: rows | {"ztsnr": EMPTY},
        "zero terminal SNR needs v_prediction; epsilon would divide",
    ),
}


@functools.cache
def network(part, config):
    return weights.build(part, config)


def without_storage(family, change, metadata=None):
    rows = change(published_rows(*family, "F16"))
    tensors = {n: torch.empty(shape, dtype=META[dtype], device="meta") for n, (shape, dtype) in rows.items()}
    source = files.single_file_source(Path("x.safetensors"), tensors, True, metadata or {})
    models = {part: network(part, source.configs[part]) for part in weights.MODELS}
    weights.check_source(source, models, "x.safetensors")
    return source


def in_full_size(tmp_path, family, change, metadata=None):
    return sparse_file(tmp_path / "model.safetensors", change(published_rows(*family, "F16")), metadata)


def load(path, **options):
    return weights.load(path, dtype=torch.float16, vae_dtype=torch.float16, **options)


@pytest.mark.parametrize("what", LOADS)
def test_harmless_files_load(what, tmp_path):
    family, change, notes = LOADS[what]
    source = without_storage(family, change)
    models = load(in_full_size(tmp_path, family, change), prediction="v")
    for found in (source.notes, models.notes):
        assert len(found) == len(notes) and all(note in line for note, line in zip(notes, found, strict=True))
    assert models.unet.config.cross_attention_dim == (1024 if family == SD2 else 768)


@pytest.mark.parametrize("what", REFUSED)
def test_what_could_change_the_picture_is_refused(what, tmp_path):
    family, change, message = REFUSED[what]
    if what != "zero SNR with epsilon":  # that is known when the prediction type is
        with pytest.raises(CheckpointError, match=message):
            without_storage(family, change)
    with pytest.raises(CheckpointError, match=message):
        load(in_full_size(tmp_path, family, change), prediction="epsilon")


def test_averaged_weights_are_used_when_they_are_whole():
    """And the raw ones where they are not, or not asked for."""
    for count, uses in ((None, True), (300, False)):
        rows = averaged(published_rows(*SD1), count)
        tensors = {n: torch.empty(shape, device="meta") for n, (shape, _) in rows.items()}
        copies = {id(t) for n, t in tensors.items() if n.startswith("model_ema.diffusion")}
        for ema in (True, False):
            found = names.split(tensors, ema).parts["unet"]
            assert len(found) == 686 and {id(t) in copies for t in found.values()} == {uses and ema}


@pytest.mark.parametrize(
    ("markers", "metadata", "prediction", "zero_snr"),
    [
        (["v_pred"], {}, "v_prediction", False),
        (["v_pred", "ztsnr"], {}, "v_prediction", True),
        ([], {"modelspec.prediction_type": "v"}, "v_prediction", False),
        ([], {"modelspec.prediction_type": "epsilon"}, "epsilon", False),
        ([], {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, "v_prediction", True),
        ([], {"ss_v_parameterization": "False", "ss_zero_terminal_snr": "False"}, None, False),
        ([], {"modelspec.prediction_type": "something else"}, None, False),
    ],
)
def test_what_a_file_says_of_its_training(markers, metadata, prediction, zero_snr, tmp_path):
    change = lambda rows: rows | dict.fromkeys(markers, EMPTY)
    source = without_storage(SD1, change, metadata)
    assert source.prediction == prediction
    if prediction:
        schedule = load(in_full_size(tmp_path, SD1, change, metadata)).schedule
        assert (schedule.prediction_type, schedule.rescale_betas_zero_snr) == (prediction, zero_snr)


@pytest.mark.parametrize("is_said", [True, False])
def test_the_description_ends_with_a_sentence(is_said, tmp_path):
    metadata = {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"} if is_said else {}
    lines, obstacle = describe(str(in_full_size(tmp_path, SD1, lambda rows: rows, metadata)))
    known = (
        "v_prediction, by ss_v_parameterization in its metadata" if is_said else "not said; probed when it is loaded"
    )
    assert lines[2] == f"prediction   {known}" + ", zero terminal SNR" * is_said
    assert obstacle is None and lines[-1] == f"It loads as SD 1; prediction: {known}."


@pytest.mark.parametrize(("value", "kind"), [(0.0, "epsilon"), (-0.6, "v_prediction")])
def test_a_bare_sd1_file_is_probed(value, kind, tmp_path):
    """All of its UNet is 0 but the last bias, so that it answers `value` everywhere: v for what is below -0.5."""
    path = in_full_size(tmp_path, SD1, lambda rows: rows)
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        start, end = json.loads(file.read(length))[f"{UNET}out.2.bias"]["data_offsets"]
        file.seek(8 + length + start)
        file.write(torch.full(((end - start) // 2,), value, dtype=torch.float16).numpy().tobytes())
    models = load(path)
    assert models.schedule.prediction_type == kind
    assert models.notes == (["the UNet predicts v, as a probe shows; nothing in the file says it"] if value else [])


@pytest.mark.parametrize("names_", ["original, with its prefix", "original", "diffusers"])
def test_a_unet_of_its_own(names_, tmp_path):
    """In place of that of a whole checkpoint, with what its file says of its training."""
    rows = without(published_rows(*SD1, "F16"), VAE, TEXT)
    if names_ == "original":
        rows = renamed(rows, lambda n: n.removeprefix(UNET))
    elif names_ == "diffusers":
        tensors = published_facts()["folders"]["sd15"]["tensors"]["unet"]
        rows = {n: (shape, "F16") for n, (shape, _) in tensors.items()}
    alone = sparse_file(tmp_path / "unet.safetensors", rows, {"modelspec.prediction_type": "v"})
    models = load(in_full_size(tmp_path, SD1, lambda rows: rows), unet=alone)
    assert models.schedule.prediction_type == "v_prediction"
    with pytest.raises(CheckpointError, match="take both from one model"):
        load(TINY, unet=alone)
    with pytest.raises(CheckpointError, match="holds no VAE; give a file or a folder that has one as vae"):
        load(TINY, vae=alone)


def test_a_unet_comes_with_what_is_known_of_its_training(folder, tmp_path):
    """That of a whole folder with its schedule; one alone leaves the schedule that is there."""
    change_config(folder, "scheduler", prediction_type="v_prediction", beta_end=0.02)
    models = weights.load(unet=folder)
    assert (models.schedule.prediction_type, models.schedule.beta_end) == ("v_prediction", 0.02)
    assert weights.load(unet=folder / "unet").schedule == models.schedule
    shutil.copytree(folder / "unet", tmp_path / "alone")
    assert weights.load(unet=tmp_path / "alone").schedule == weights.load().schedule
    change_config(folder, "scheduler", rescale_betas_zero_snr=True)
    with pytest.raises(CheckpointError, match="text states of width 128; a single file must be of SD 1"):
        weights.load(folder, unet=TINY / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_silent_unet_leaves_zero_terminal_snr(tmp_path):
    rows = without(published_rows(*SD1, "F16"), VAE, TEXT)
    alone = sparse_file(tmp_path / "unet.safetensors", rows)
    whole = in_full_size(tmp_path, SD1, lambda rows: rows | {"v_pred": EMPTY, "ztsnr": EMPTY})
    assert load(whole, unet=alone, prediction="v").schedule.rescale_betas_zero_snr


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_the_size_of_a_single_file_of_sd2_follows_the_prediction(prediction, tmp_path):
    models = load(in_full_size(tmp_path, SD2, lambda rows: rows), prediction=prediction)
    assert models.size == ((512, 512) if prediction == "epsilon" else (768, 768))


def test_a_vae_with_counters_of_its_training(tmp_path):
    tensors = published_facts()["folders"]["sd15"]["tensors"]["vae_new_names"]
    rows = {n: (shape, "F16") for n, (shape, _) in tensors.items()}
    rows |= {"model_ema.decay": ([], "F32"), "model_ema.num_updates": ([], "I32"), "loss.logvar": ([], "F32")}
    models = weights.load(vae=sparse_file(tmp_path / "vae.safetensors", rows))
    assert [LEFT in note for note in models.notes] == [True]
