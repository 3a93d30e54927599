"""The configs of other programs: every field of the installed diffusers and transformers is in the tables, at the value
that changes nothing; and the values that real files hold come out as they should."""

import inspect
import json

import diffusers
import pytest
import transformers

import weights
from weights import CheckpointError, configs

CONSTRUCTORS = {
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
    "text_encoder": transformers.CLIPTextConfig,
}
LIBRARY = {
    part: {name: p.default for name, p in inspect.signature(constructor.__init__).parameters.items() if name != "self"}
    for part, constructor in CONSTRUCTORS.items()
}
# Beside what transformers' constructor takes, what it writes.
LIBRARY["text_encoder"] |= {name: None for name in transformers.CLIPTextConfig().to_dict() if name[0] != "_"}


@pytest.mark.parametrize("part", LIBRARY)
def test_no_field_of_the_installed_releases_is_missing(part):
    takes_any = {"kwargs"}
    assert LIBRARY[part].keys() - takes_any <= configs.LIBRARY_FIELDS[part]


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_the_neutral_value_is_the_librarys_default(part):
    """These networks are the library's at its defaults, so a field that a config leaves out is neutral."""
    for name, (neutral, _) in configs.NEUTRAL[part].items():
        assert LIBRARY[part][name] in neutral, name


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_what_is_left_out_has_the_librarys_default(part, tmp_path):
    """Where ours differs and the library's makes a network of its own; sample_size, a size in pixels here, is ours."""
    library = LIBRARY[part] | (transformers.CLIPTextConfig().to_dict() if part == "text_encoder" else {})
    defaults = {name: getattr(configs.CONFIGS[part], name) for name in vars(configs.CONFIGS[part]()) if name in library}
    for name, ours in (defaults | configs.LIBRARY[part]).items():
        assert library[name] == ours or name == "sample_size", name
    (tmp_path / "config.json").write_text("{}")
    if part == "text_encoder":  # the only one whose defaults make a network without more
        assert configs.read_config(tmp_path / "config.json", part).num_attention_heads == 8


# (part, field, value, what comes out: True where it loads, else a part of the message)
SEEN = [
    ("unet", "conv_in_kernel", 3, True),
    ("unet", "time_embedding_type", "positional", True),
    ("unet", "time_embedding_type", "fourier", "another timestep's embedding"),
    ("unet", "resnet_out_scale_factor", 1.0, True),
    ("unet", "attention_type", "default", True),
    ("unet", "attention_type", "gated", "GLIGEN"),
    ("unet", "dropout", 0.1, True),
    ("unet", "addition_embed_type_num_heads", 64, True),
    ("unet", "addition_embed_type", "text_time", "SDXL"),
    ("unet", "addition_time_embed_dim", 256, "SDXL"),
    ("unet", "class_embed_type", "projection", "unCLIP"),
    ("unet", "projection_class_embeddings_input_dim", 2816, "SDXL"),
    ("unet", "time_cond_proj_dim", 256, "latent consistency models"),
    ("unet", "class_embeddings_concat", False, True),
    ("unet", "upcast_attention", None, True),
    ("unet", "only_cross_attention", [False, False, False], True),
    ("unet", "layers_per_block", [1, 1, 1], True),
    ("unet", "in_channels", 9, "inpainting"),
    ("unet", "in_channels", 8, "pix2pix"),
    ("unet", "in_channels", 5, "depth"),
    ("unet", "in_channels", 7, "upscaler"),
    ("unet", "cross_attention_dim", 2048, "SDXL"),
    ("vae", "force_upcast", True, True),
    ("vae", "shift_factor", 0.1159, "SD3"),
    ("vae", "use_quant_conv", False, "SD3"),
    ("vae", "latents_mean", [0.1, 0.2, 0.3, 0.4], "other families"),
    ("vae", "_class_name", "AutoencoderTiny", "use a model with the AutoencoderKL"),
    ("text_encoder", "torchscript", True, True),
    ("text_encoder", "model_type", "t5", "another text encoder"),
    ("text_encoder", "quantization_config", {"load_in_8bit": True}, "weights in integers"),
    ("scheduler", "beta_start", 0.0015, True),
    ("scheduler", "beta_schedule", "squaredcos_cap_v2", "beta_schedule 'squaredcos_cap_v2' is not known"),
    ("scheduler", "prediction_type", "sample", "prediction_type 'sample' is not known"),
    ("scheduler", "lambda_min_clipped", -float("inf"), True),
    ("scheduler", "disable_corrector", [], True),
    ("scheduler", "a_wish_of_tomorrow", {"any": "thing"}, True),
    ("scheduler", "trained_betas", [0.1] * 1000, True),
    ("scheduler", "trained_betas", [0.1] * 10, "trained_betas must be 1000 numbers"),
    ("scheduler", "beta_end", None, "beta_end is None"),
]


@pytest.mark.parametrize(("part", "field", "value", "outcome"), SEEN)
def test_what_real_files_hold(part, field, value, outcome, folder):
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    if outcome is True:
        weights.open_source(folder, half=False, ema=True)
    else:
        with pytest.raises(CheckpointError, match=outcome):
            weights.open_source(folder, half=False, ema=True)


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({}, None),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, None),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace"},
            "scheduler: asks for EulerDiscrete, linspace; MagicMix samples with DDIM, leading",
        ),
        (
            {"set_alpha_to_one": True, "clip_sample": True},
            "scheduler: asks for DDIM, leading, set_alpha_to_one true, clip_sample true; "
            "MagicMix samples with DDIM, leading",
        ),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}, None),
        (
            {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "leading"},
            "scheduler: asks for DDIM, leading; MagicMix samples with DDIM, trailing",
        ),
    ],
)
def test_a_samplers_wishes_are_said_in_one_line(fields, note, folder):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert weights.open_source(folder, half=False, ema=True).notes == ([note] if note else [])


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("scheduler", {"_class_name": "LCMScheduler"}),
        ("model_index", {"_class_name": "LatentConsistencyModelPipeline"}),
        ("model_index", {"_name_or_path": "someone/sd-turbo"}),
        ("unet", {"_name_or_path": "someone/hyper-sd15"}),
        ("unet", {"_name_or_path": "someone/realcmix"}),  # not LCM
    ],
)
def test_a_model_of_few_steps_says_so(where, said, folder):
    name = {"scheduler": "scheduler/scheduler_config.json", "unet": "unet/config.json"}.get(where, "model_index.json")
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | said))
    notes = [note for note in weights.open_source(folder, half=False, ema=True).notes if "few steps" in note]
    (value,) = said.values()
    expected = f"trained for few steps, as {value!r} says: try 4 to 8 steps and guidance 1"
    assert notes == ([] if "realcmix" in value else [expected])
