"""A checkpoint's files: a folder or a single file; what lies in it, before any network is built.

Tensors are memory-mapped by safetensors: opening a source reads headers and configs only.
"""

import dataclasses
import inspect
import json
import types
import typing
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import clip
import scheduler
import unet
import vae
from weights import names

# Config fields that say where a file comes from or how it was trained, not what the network computes.
DESCRIPTIVE = {
    "text_encoder": {
        "architectures", "attention_dropout", "dropout", "initializer_factor", "initializer_range", "model_type",
        "torch_dtype", "dtype", "transformers_version", "projection_dim",
        "bos_token_id", "eos_token_id", "pad_token_id",  # wrong in the published files; the tokenizer's are used
    },
    "unet": set(),
    "vae": {"sample_size", "force_upcast"},  # the VAE runs in float32 here
    "scheduler": {
        "skip_prk_steps", "dynamic_thresholding_ratio", "sample_max_value", "clip_sample_range",  # read by samplers
        "interpolation_type", "use_karras_sigmas", "timestep_type", "sigma_min", "sigma_max",  # that are not ours
    },
}  # fmt: skip
CONFIGS = {
    "text_encoder": (clip.CLIPTextConfig, {}),
    "unet": (unet.UNetConfig, unet.FIXED),
    "vae": (vae.VAEConfig, vae.FIXED),
    "scheduler": (scheduler.ScheduleConfig, scheduler.FIXED),
}
STEMS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
NAMES = {
    "text_encoder": names.diffusers_text,
    "unet": names.diffusers_unet,
    "vae": names.diffusers_vae,
}
# A source may be hostile. These bounds lie far above every published model and keep what is read before the first
# strict comparison, headers and configs, from filling the memory or taking minutes.
MAX_HEADER = 4 << 20  # bytes of a safetensors header; published ones stay below half a million
MAX_TENSORS = 4_000  # in a file; the published ones have at most 1,831
MAX_JSON = 1 << 20  # bytes of a config or an index
MAX_LEVELS = 8  # entries of a list in a config
MAX_NUMBER = 65_536  # in a config, but for these
MAX = {"num_hidden_layers": 100, "layers_per_block": 4, "transformer_layers_per_block": 4, "vocab_size": 1_000_000,
        "num_train_timesteps": 10_000, "sample_size": 512}  # fmt: skip
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
PICKLES = {".ckpt", ".bin", ".pt", ".pth", ".pkl"}
CONVERT = "diffusers' save_pretrained(..., safe_serialization=True) writes safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with what is wrong and what would be right in one line."""


@dataclasses.dataclass
class Source:
    """What lies in a checkpoint.

    Attributes:
        format: "folder" or "single file".
        configs: part -> its config, for text_encoder, unet, vae and scheduler.
        tensors: part -> {diffusers name: memory-mapped tensor}; a single file's strays are under "unknown".
        files: part -> the files that its tensors come from.
        tokenizer: the folder of the tokenizer's files; None for the embedded CLIP vocabulary.
        prediction: how the prediction type is known: "config", "family" (SD1), or "" when it must be probed.
        own_options: those in magicmix.json, if it is there.
        concepts: the lists of words in concepts.json, if it is there.
    """

    format: str
    configs: dict[str, object]
    tensors: dict[str, dict[str, Tensor]]
    files: dict[str, list[Path]]
    tokenizer: Path | None
    prediction: str
    own_options: dict
    concepts: dict[str, list[str]] = dataclasses.field(default_factory=dict)


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
    """A config.json as its dataclass. Raises CheckpointError for a field these models do not know or do differently,
    and for a value of another type or out of all proportion."""
    config_class, fixed = CONFIGS[part]
    fields = {f.name: f.type for f in dataclasses.fields(config_class)}
    used = {}
    for name, value in read_json(path).items():
        if name in fields:
            value = tuple(value) if isinstance(value, list) else value
            if value is not None and not fits(name, value, fields[name]):
                kind, most = inspect.formatannotation(fields[name]), MAX.get(name, MAX_NUMBER)
                right = f"use {kind}, its numbers above 0 and at most {most:,}"
                raise CheckpointError(f"{path}: {name} is {value!r}; that is no usable value: {right}")
            used[name] = value
        elif name in fixed:
            if value != fixed[name] and value is not None:
                raise CheckpointError(f"{path}: {name} is {value!r}; this implementation needs {fixed[name]!r}")
        elif not name.startswith("_") and name not in DESCRIPTIVE[part] and value is not None and value is not False:
            # A field of a later release that is off changes nothing; one that is on would.
            raise CheckpointError(f"{path}: {name} is {value!r}; this implementation does not know that field")
    try:
        return config_class(**{k: v for k, v in used.items() if v is not None})
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def fits(name: str, value: object, kind: object) -> bool:
    """Whether a config's value has its field's type and is a positive number of sensible size where it is a number."""
    if isinstance(kind, types.UnionType):
        return any(fits(name, value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return isinstance(value, tuple) and 0 < len(value) <= MAX_LEVELS and all(fits(name, v, inner) for v in value)
    if kind in (int, float):
        whole, most = type(value) is int, MAX.get(name, MAX_NUMBER)
        return (whole or type(value) is kind) and (0 < value <= most or (name == "steps_offset" and value == 0))
    return type(value) is kind


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, memory-mapped. Raises CheckpointError."""
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path} is a pickle, which runs code when it is opened; {CONVERT}")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing or not a file; only safetensors files are read")
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")  # the format: 8 bytes of length, a JSON header, the tensors
        if header > MAX_HEADER:
            raise ValueError(f"its header claims {header:,} bytes, the most that are read are {MAX_HEADER:,}")
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            if len(names) > MAX_TENSORS:
                raise ValueError(f"it has {len(names):,} tensors, the most that are read are {MAX_TENSORS:,}")
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:  # the last two from absurd shapes
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is not a readable safetensors file: {first}") from error


# ------------------------------------------------------------------------------------------------------- folders


def refuse_other_families(channels: int, context: int, where) -> None:
    """Raises CheckpointError for the relatives of Stable Diffusion 1 and 2 that these modules do not implement."""
    kinds = {9: "an inpainting model (9 input channels)", 8: "a pix2pix model (8 input channels)"}
    if channels in kinds or context == 2048:
        raise CheckpointError(f"{where} is {kinds.get(channels, 'SDXL')}; use a text-to-image model of SD 1 or SD 2")


def part_files(folder: Path, stem: str, half: bool, ema: bool) -> list[Path]:
    """The weights files of one part of a folder: whole or in shards, of the precision that fits best.

    Args:
        folder: of the part.
        stem: of the file name: "model" or "diffusion_pytorch_model".
        half: prefer the `.fp16` files; otherwise they are taken only when there are no others.
        ema: False prefers the `.non_ema` file, where a UNet has one.
    """
    plain, fp16 = (stem, f"{stem}.safetensors.index.json"), (f"{stem}.fp16", f"{stem}.safetensors.index.fp16.json")
    for name, index in ([] if ema else [(f"{stem}.non_ema", "")]) + ([fp16, plain] if half else [plain, fp16]):
        if (folder / f"{name}.safetensors").exists():
            return [folder / f"{name}.safetensors"]
        if index and (folder / index).exists():
            shards = read_json(folder / index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
                raise CheckpointError(f"{folder / index}: weight_map must map tensor names to file names")
            for shard in shards.values():
                if Path(shard).name != shard:
                    raise CheckpointError(f"{folder / index}: {shard!r} is not a file name in that folder")
            return [folder / shard for shard in sorted(set(shards.values()))]
    pickled = next((p.name for p in sorted(folder.glob("*")) if p.suffix in PICKLES), None)
    if pickled:
        raise CheckpointError(f"{folder} holds only {pickled}, a pickle, which runs code when it is opened; {CONVERT}")
    raise CheckpointError(f"{folder / stem}.safetensors is missing; only safetensors files are read")


def part_tensors(part: str, files: list[Path]) -> dict[str, Tensor]:
    """The tensors of one part in diffusers' current names, from all its files."""
    return {
        new: t for path in files for old, tensor in read_tensors(path).items() for new, t in NAMES[part](old, tensor)
    }


def own_options(folder: Path) -> dict:
    """The options in a checkpoint's magicmix.json; none where there is no such file. Raises CheckpointError."""
    path = folder / "magicmix.json"
    return read_json(path) if path.exists() else {}


def own_concepts(folder: Path) -> dict[str, list[str]]:
    """The lists of words in a checkpoint's concepts.json; none where there is no such file. Raises CheckpointError."""
    path = folder / "concepts.json"
    found = read_json(path) if path.exists() else {}
    for name, words in found.items():
        if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
            raise CheckpointError(f"{path}: {name} must be a list of words")
    return found


def open_folder(folder: Path, half: bool, ema: bool) -> Source:
    """A folder in the diffusers format. Raises CheckpointError."""
    index = folder / "model_index.json"
    kind = read_json(index).get("_class_name") if index.exists() else None
    if kind not in (None, "StableDiffusionPipeline"):
        raise CheckpointError(f"{folder} is a {kind}; use a text-to-image model of SD 1 or SD 2")
    raw = read_json(folder / "unet" / "config.json")
    refuse_other_families(raw.get("in_channels"), raw.get("cross_attention_dim"), folder)
    paths = {part: folder / part / "config.json" for part in STEMS}
    configs = {p: read_config(path, p) for p, path in paths.items()}
    configs["scheduler"] = read_config(folder / "scheduler" / "scheduler_config.json", "scheduler")
    files = {part: part_files(folder / part, stem, half, ema) for part, stem in STEMS.items()}
    return Source(
        format="folder",
        configs=configs,
        tensors={part: part_tensors(part, files[part]) for part in STEMS},
        files=files,
        tokenizer=folder / "tokenizer",
        prediction="config",
        own_options=own_options(folder),
        concepts=own_concepts(folder),
    )


def open_vae(path: Path) -> tuple[vae.VAEConfig, dict[str, Tensor], list[Path]]:
    """An autoencoder of its own (`vae`): a folder with config.json, or a single file in either spelling."""
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        files = part_files(folder, STEMS["vae"], half=False, ema=True)
        return read_config(folder / "config.json", "vae"), part_tensors("vae", files), files
    tensors = read_tensors(path)
    named = names.split(tensors.items())["vae"]  # inside a whole checkpoint
    if not named:
        rename = names.original_vae if "encoder.down.0.block.0.conv1.weight" in tensors else names.diffusers_vae
        # Stand-alone files may carry the loss's network of their training; it is no part of the autoencoder.
        named = {n: t for old, tensor in tensors.items() if not old.startswith("loss.") for n, t in rename(old, tensor)}
    return vae.VAEConfig(), named, [path]


# -------------------------------------------------------------------------------------------------- single files

SD2_UNET = unet.UNetConfig(
    attention_head_dim=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
    upcast_attention=True,  # 2.1's config says so, and it does no harm to the others
    sample_size=96,
)
SD2_TEXT = clip.CLIPTextConfig(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
)


def open_single_file(path: Path, ema: bool) -> Source:
    """A file in the original (CompVis) format, whose configs are those of its family. Raises CheckpointError."""
    tensors = read_tensors(path)
    return single_file_source(path, tensors, ema)


def single_file_source(path: Path, tensors: dict[str, Tensor], ema: bool) -> Source:
    """The same from tensors that are open already; they may lie on the meta device."""
    if any(name.startswith("conditioner.embedders.") for name in tensors):
        raise CheckpointError(f"{path} is SDXL; use a text-to-image model of SD 1 or SD 2")
    if any("joint_blocks." in name for name in tensors):
        raise CheckpointError(f"{path} is SD3; use a text-to-image model of SD 1 or SD 2")
    inner = "model.diffusion_model.input_blocks."
    first, cross = f"{inner}0.0.weight", f"{inner}1.1.transformer_blocks.0.attn2.to_k.weight"
    for name in (first, cross):
        if name not in tensors:
            raise CheckpointError(f"{path}: tensor {name} is missing; this is no Stable Diffusion 1 or 2 checkpoint")
    context = tensors[cross].shape[-1]
    refuse_other_families(tensors[first].shape[1], context, path)
    is_sd2 = context == SD2_UNET.cross_attention_dim
    parts = names.split(tensors.items(), ema)
    return Source(
        format="single file",
        configs={
            "text_encoder": SD2_TEXT if is_sd2 else clip.CLIPTextConfig(),
            "unet": SD2_UNET if is_sd2 else unet.UNetConfig(),
            "vae": vae.VAEConfig(),
            "scheduler": scheduler.ScheduleConfig(),
        },
        tensors=parts,
        files=dict.fromkeys(parts, [path]),
        tokenizer=None,
        prediction="" if is_sd2 else "family",
        own_options={},
    )
