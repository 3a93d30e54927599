"""Checkpoints: a folder in the diffusers layout becomes this project's models, strictly.

Every tensor in the files is accounted for: it is a parameter of the right shape, or it stands in IGNORED with its
reason. Every field of a config is used, fixed to the one value that these models implement, or in DESCRIPTIVE.

The layout (https://huggingface.co/docs/diffusers, "DiffusionPipeline"): model_index.json, and one folder each for
tokenizer, text_encoder, unet, vae and scheduler. `magicmix.json` beside them is ours and optional: the options that
suit the checkpoint better than the general defaults.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

import clip
import scheduler
import unet
import vae

TINY = Path(__file__).parent / "tiny"

# Tensors that are left unread, by full name.
IGNORED = {
    "text_model.embeddings.position_ids": "positions are 0..L-1 by definition; merges corrupt this copy",
}

# Config fields that say where a file comes from or how it was trained, not what the network computes.
DESCRIPTIVE = {
    "text_encoder": {
        "architectures", "attention_dropout", "dropout", "initializer_factor", "initializer_range", "model_type",
        "torch_dtype", "dtype", "transformers_version", "projection_dim",
        "bos_token_id", "eos_token_id", "pad_token_id",  # wrong in the published files; the tokenizer's are used
    },
    "unet": set(),
    "vae": {"sample_size", "force_upcast", "latents_mean", "latents_std"},  # the VAE always runs in float32 here
    "scheduler": {
        "skip_prk_steps", "dynamic_thresholding_ratio", "sample_max_value", "clip_sample_range",  # read by samplers
        "interpolation_type", "use_karras_sigmas", "timestep_type", "sigma_min", "sigma_max",  # that are not ours
    },
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with what is wrong and what would be right in one line."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The parts of a text-to-image latent diffusion model, in eval mode, without gradients.

    Attributes:
        tokenizer: transformers' CLIPTokenizer; model_max_length is L.
        text_encoder, unet: in the dtype asked for.
        vae: always in float32: decoding in float16 overflows in the public models.
        schedule: the noise schedule's config.
        defaults: the checkpoint's own options for magicmix.py, from magicmix.json.
        identity: part -> sha256 of its weights file, for the picture's metadata.
        device, dtype: where and in what the models compute.
    """

    tokenizer: object
    text_encoder: clip.CLIPTextModel
    unet: unet.UNet2DConditionModel
    vae: vae.AutoencoderKL
    schedule: scheduler.ScheduleConfig
    defaults: dict
    identity: dict[str, str]
    device: torch.device
    dtype: torch.dtype


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises CheckpointError when it is missing, not JSON or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a checkpoint folder in the diffusers layout has it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_config(path: Path, part: str, config_class: type, fixed: dict) -> object:
    """A config.json as its dataclass. Raises CheckpointError for a field these models do not know or do differently."""
    fields = {f.name for f in dataclasses.fields(config_class)}
    used = {}
    for name, value in read_json(path).items():
        if name in fields:
            used[name] = tuple(value) if isinstance(value, list) else value
        elif name in fixed:
            if value != fixed[name] and value is not None:
                raise CheckpointError(f"{path}: {name} is {value!r}; this implementation needs {fixed[name]!r}")
        elif not name.startswith("_") and name not in DESCRIPTIVE[part] and value is not None and value is not False:
            # A field of a later release that is off changes nothing; one that is on would.
            raise CheckpointError(f"{path}: {name} is {value!r}; this implementation does not know that field")
    try:
        return config_class(**{k: v for k, v in used.items() if v is not None})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def fill(model: nn.Module, path: Path, dtype: torch.dtype, device: torch.device) -> str:
    """Hands the tensors of a safetensors file to a model built on the meta device. Returns the file's sha256.

    Raises CheckpointError that names the first missing, unexpected or misshapen tensor.
    """
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys()) - IGNORED.keys()
            for name in sorted(expected.keys() - keys):
                raise CheckpointError(f"{path}: tensor {name} is missing")
            for name in sorted(keys - expected.keys()):
                raise CheckpointError(f"{path}: tensor {name} is not part of this model")
            for name, shape in expected.items():
                found = tuple(file.get_slice(name).get_shape())
                if found != shape:
                    raise CheckpointError(f"{path}: tensor {name} has shape {found}, the config asks for {shape}")
            state = {name: file.get_tensor(name).to(device, dtype) for name in expected}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; only safetensors files are read") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None
    model.load_state_dict(state, strict=True, assign=True)
    model.eval().requires_grad_(False)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tokenizer(folder: Path):
    """transformers' CLIPTokenizer from vocab.json and merges.txt. Raises CheckpointError when they are missing."""
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        if not (folder / name).exists():
            raise CheckpointError(f"{folder / name} is missing; a CLIP tokenizer has it")
    # transformers looks for torchvision and says so when it is absent; nothing here needs it.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):
        from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def load(source: str | Path = TINY, device: str | torch.device = "cpu", dtype=torch.float32) -> Checkpoint:
    """Loads a checkpoint.

    Args:
        source: a folder in the diffusers layout; the default is the embedded checkpoint.
        device: where the models go.
        dtype: of the text encoder and the UNet: float32, float16 or bfloat16. The VAE stays in float32.

    Raises CheckpointError (a ValueError) when anything is missing, unknown or does not fit.
    """
    source, device = Path(source), torch.device(device)
    if not source.is_dir():
        raise CheckpointError(f"weights {str(source)!r} is not a folder; give one in the diffusers layout")
    parts = {
        "text_encoder": (clip.CLIPTextModel, clip.CLIPTextConfig, {}, "model", dtype),
        "unet": (unet.UNet2DConditionModel, unet.UNetConfig, unet.FIXED, "diffusion_pytorch_model", dtype),
        "vae": (vae.AutoencoderKL, vae.VAEConfig, vae.FIXED, "diffusion_pytorch_model", torch.float32),
    }
    models, identity = {}, {}
    for part, (model_class, config_class, fixed, stem, part_dtype) in parts.items():
        config = read_config(source / part / "config.json", part, config_class, fixed)
        with torch.device("meta"):
            models[part] = model_class(config)
        identity[part] = fill(models[part], source / part / f"{stem}.safetensors", part_dtype, device)
    schedule = read_config(source / "scheduler" / "scheduler_config.json", "scheduler",
                           scheduler.ScheduleConfig, scheduler.FIXED)  # fmt: skip
    own = source / "magicmix.json"
    return Checkpoint(
        tokenizer=load_tokenizer(source / "tokenizer"),
        schedule=schedule,
        defaults=read_json(own) if own.exists() else {},
        identity=identity,
        device=device,
        dtype=dtype,
        **models,
    )
