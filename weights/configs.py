"""The configs in a checkpoint's folders, field by field: used, or the same network, or refused with what they mean.

A field that shapes a network or its noise levels is used. One that diffusers or transformers has and these networks do
not is accepted at the value at which it changes nothing (NEUTRAL), or at any value if it never changes a picture
(DESCRIPTIVE). A scheduler's other fields are wishes of a sampler: accepted, and said where they change the steps.
Formats: unet/config.json, vae/config.json and scheduler/scheduler_config.json of diffusers, text_encoder/config.json of
transformers.
"""

import dataclasses
import inspect
import json
import types
import typing
from pathlib import Path

import clip
import scheduler
import unet
import vae

CONFIGS = {
    "text_encoder": clip.CLIPTextConfig,
    "unet": unet.UNetConfig,
    "vae": vae.VAEConfig,
    "scheduler": scheduler.ScheduleConfig,
}
# What a config leaves out has its library's default. Ours are Stable Diffusion 1's; these are the ones that differ.
LIBRARY = {
    "text_encoder": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
    "unet": {"cross_attention_dim": 1280},
    "vae": {
        "block_out_channels": (64,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "layers_per_block": 1,
    },
    "scheduler": {},  # the first published ones left out steps_offset, and mean Stable Diffusion's
}
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}

# field: (the values at which it changes nothing, what another value would mean)
NEUTRAL = {
    "unet": {
        "act_fn": (("silu", "swish"), "another activation"),
        "addition_embed_type": ((None,), "more conditions beside the text, as SDXL has"),
        "addition_time_embed_dim": ((None,), "the picture's size as a condition, as SDXL has"),
        "attention_type": (("default",), "attention to more than text, as GLIGEN has"),
        "center_input_sample": ((False,), "another range of the latents"),
        "class_embed_type": ((None,), "a condition beside the text, as unCLIP and upscalers have"),
        "class_embeddings_concat": ((False,), "a condition beside the text"),
        "conv_in_kernel": ((3,), "another first convolution"),
        "conv_out_kernel": ((3,), "another last convolution"),
        "cross_attention_norm": ((None, False), "a norm on the text states"),
        "downsample_padding": ((1,), "another padding"),
        "dual_cross_attention": ((False,), "two text encoders"),
        "encoder_hid_dim": ((None,), "a projection of the text states"),
        "encoder_hid_dim_type": ((None,), "a projection of the text states"),
        "flip_sin_to_cos": ((True,), "another order of the timestep's embedding"),
        "freq_shift": ((0,), "other frequencies of the timestep's embedding"),
        "mid_block_only_cross_attention": ((None, False), "no self-attention in the middle"),
        "mid_block_scale_factor": ((1,), "scaled resnets in the middle"),
        "mid_block_type": (("UNetMidBlock2DCrossAttn",), "another middle"),
        "num_attention_heads": ((None,), "heads under another name; attention_head_dim is the number of heads"),
        "num_class_embeds": ((None,), "a condition beside the text, as upscalers have"),
        "only_cross_attention": ((False,), "no self-attention"),
        "projection_class_embeddings_input_dim": ((None,), "a condition beside the text, as unCLIP and SDXL have"),
        "resnet_out_scale_factor": ((1,), "scaled resnets"),
        "resnet_skip_time_act": ((False,), "another timestep's embedding"),
        "resnet_time_scale_shift": (("default",), "another use of the timestep in the resnets"),
        "reverse_transformer_layers_per_block": ((None,), "other transformers on the way up than on the way down"),
        "time_cond_proj_dim": ((None,), "guidance as an input, as distilled latent consistency models (LCM) have"),
        "time_embedding_act_fn": ((None,), "another timestep's embedding"),
        "time_embedding_dim": ((None,), "another width of the timestep's embedding"),
        "time_embedding_type": (("positional",), "another timestep's embedding"),
        "timestep_post_act": ((None,), "another timestep's embedding"),
    },
    "vae": {
        "act_fn": (("silu", "swish"), "another activation"),
        "latents_mean": ((None,), "latents that are shifted, as other families have"),
        "latents_std": ((None,), "latents that are scaled one by one, as other families have"),
        "mid_block_add_attention": ((True,), "a middle without attention"),
        "shift_factor": ((None,), "latents that are shifted, as SD3 has"),
        "use_post_quant_conv": ((True,), "a decoder without its first convolution, as SD3 has"),
        "use_quant_conv": ((True,), "an encoder without its last convolution, as SD3 has"),
    },
    "text_encoder": {
        "model_type": (("clip_text_model", "clip"), "another text encoder"),
        "quantization_config": ((None,), "weights in integers"),
    },
    "scheduler": {
        "snr_shift_scale": ((1,), "other noise levels, as CogVideoX has"),
        "use_flow_sigmas": ((False,), "a flow model's noise levels"),
    },
}
# Fields that say where a file comes from, or act in training only, or are read only beside a field above.
DESCRIPTIVE = {
    "unet": {"addition_embed_type_num_heads", "dropout"},
    "vae": {"force_upcast", "sample_size"},  # the VAE runs in float32 here, at any size
    # What transformers gives every model, of which this network reads nothing. bos, eos and pad are wrong in the
    # published files; the tokenizer's are used.
    "text_encoder": set(
        """
        add_cross_attention architectures attention_dropout attn_implementation bad_words_ids begin_suppress_tokens
        bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
        do_sample dropout dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
        exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
        initializer_factor initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length min_length
        name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
        output_hidden_states output_scores pad_token_id prefix problem_type projection_dim pruned_heads
        remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
        task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k
        top_p torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache xla_device
        """.split()
    ),
}
# Samplers that are at home here: DDIM and DDPM, and PNDM, which the published configs name.
SAMPLERS = {"DDIMScheduler", "DDPMScheduler", "PNDMScheduler"}

# A source may be hostile. These bounds lie far above every published model and keep what is read before the first
# strict comparison from filling the memory or taking minutes.
MAX_JSON = 1 << 20  # bytes of a config or an index
MAX_LEVELS = 8  # entries of a list in a config
MAX_NUMBER = 65_536  # in a config, but for these
MAX = {"num_hidden_layers": 100, "layers_per_block": 4, "transformer_layers_per_block": 4, "vocab_size": 1_000_000,
       "num_train_timesteps": 10_000, "sample_size": 512}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with what is wrong and what would be right in one line."""


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError when it is missing, too large, not JSON or not an object."""
    if not path.is_file():  # a pipe or a device could be read for ever
        raise CheckpointError(f"{path} is missing or not a file; a checkpoint folder in the diffusers format has it")
    if path.stat().st_size > MAX_JSON:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; no config has more than {MAX_JSON:,}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_config(path: Path, part: str) -> object:
    """A config.json as its dataclass. Raises CheckpointError for another kind of network, for a field that is in no
    release of its library, and for a value of another type or out of all proportion."""
    found = read_json(path)
    kind = found.get("_class_name", CLASSES.get(part))
    if kind != CLASSES.get(part):
        raise CheckpointError(f"{path}: _class_name is {kind!r}; use a model with the {CLASSES[part]} of SD 1 or SD 2")
    for name, value in found.items():
        if name not in LIBRARY_FIELDS[part] and not name.startswith("_"):
            raise CheckpointError(
                f"{path}: {name} is {value!r}; no release of its library that is known has that field"
            )
    return to_config(path, part, found)


def read_schedule(path: Path) -> tuple[scheduler.ScheduleConfig, list[str], str]:
    """A scheduler_config.json as its dataclass, a line on what its sampler asks for that is done otherwise here, and
    the sampler's class. Raises CheckpointError for noise levels that cannot be used."""
    found = read_json(path)
    kind = str(found.get("_class_name", "DDIMScheduler"))
    if found.get("trained_betas") is None and not found.keys() >= {"beta_start", "beta_end"}:
        raise CheckpointError(
            f"{path}: {kind} without beta_start and beta_end; use a model of SD 1 or SD 2, which has them"
        )
    config = to_config(path, "scheduler", found)
    switches = [name for name in ("set_alpha_to_one", "clip_sample", "thresholding") if found.get(name) is True]
    spacing = [str(found["timestep_spacing"])] if found.get("timestep_spacing") else []
    notes = []
    if kind not in SAMPLERS or spacing not in ([], [config.timestep_spacing]) or switches:
        asked = ", ".join([kind.removesuffix("Scheduler"), *spacing, *(f"{name} true" for name in switches)])
        notes.append(f"scheduler: asks for {asked}; MagicMix samples with DDIM, {config.timestep_spacing}")
    return config, notes, kind


def to_config(path: Path, part: str, found: dict) -> object:
    """The fields of a config that are used, as its dataclass; those at which another value means another network are
    checked. Raises CheckpointError."""
    kinds = {field.name: field.type for field in dataclasses.fields(CONFIGS[part])}
    defaults = {field.name: field.default for field in dataclasses.fields(CONFIGS[part])} | LIBRARY[part]
    used = dict(LIBRARY[part])
    for name, value in found.items():
        if name in NEUTRAL[part]:
            neutral, meaning = NEUTRAL[part][name]
            if one_of(value) not in neutral:
                right = " or ".join(map(repr, neutral))
                raise CheckpointError(f"{path}: {name} is {value!r}, {meaning}; this implementation needs {right}")
        elif name in kinds and not (value is None and not defaults[name]):  # null is off, where off is the default
            used[name] = value = as_field(value, kinds[name])
            if not fits(name, value, kinds[name]):
                kind, most = inspect.formatannotation(kinds[name]), MAX.get(name, MAX_NUMBER)
                right = f"use {kind}, its numbers above 0 and at most {most:,}"
                raise CheckpointError(f"{path}: {name} is {value!r}; that is no usable value: {right}")
    try:
        return CONFIGS[part](**used)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def one_of(value: object) -> object:
    """A list of equal entries, one per level, as one of them; other values as they are."""
    return value[0] if isinstance(value, list) and value and all(entry == value[0] for entry in value) else value


def as_field(value: object, kind: object) -> object:
    """A JSON value in the type of its field: tuples for lists, one entry where the field is the same at all levels."""
    takes_list = any(typing.get_origin(one) is tuple for one in (kind, *typing.get_args(kind)))
    value = value if takes_list else one_of(value)
    return tuple(value) if isinstance(value, list) else value


def fits(name: str, value: object, kind: object) -> bool:
    """Whether a config's value has its field's type and is a positive number of sensible size where it is a number."""
    if isinstance(kind, types.UnionType):
        return any(fits(name, value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        inner, longest = typing.get_args(kind)[0], MAX["num_train_timesteps"] if name == "trained_betas" else MAX_LEVELS
        return isinstance(value, tuple) and 0 < len(value) <= longest and all(fits(name, v, inner) for v in value)
    if kind in (int, float):
        whole, most = type(value) is int, MAX.get(name, MAX_NUMBER)
        return (whole or type(value) is kind) and (0 < value <= most or (name == "steps_offset" and value == 0))
    return type(value) is kind


LIBRARY_FIELDS = {
    part: {field.name for field in dataclasses.fields(CONFIGS[part])} | NEUTRAL[part].keys() | DESCRIPTIVE[part]
    for part in DESCRIPTIVE
}
