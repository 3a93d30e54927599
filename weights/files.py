"""A checkpoint's files: a folder or a single file; what lies in it, before any network is built.

Tensors are memory-mapped by safetensors: opening a source reads headers and configs only.
"""

import dataclasses
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import clip
import scheduler
import unet
import vae
from weights import names
from weights.configs import CheckpointError, read_config, read_json, read_schedule

SPOKEN = {"unet": "UNet", "text_encoder": "text encoder", "vae": "VAE"}
STEMS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
NAMES = {
    "text_encoder": names.diffusers_text,
    "unet": names.diffusers_unet,
    "vae": names.diffusers_vae,
}
# Bounds against hostile files, as those in configs.py.
MAX_HEADER = 4 << 20  # bytes of a safetensors header; published ones stay below half a million
MAX_TENSORS = 4_000  # in a file; the published ones have at most 1,831
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
PICKLES = {".ckpt", ".bin", ".pt", ".pth", ".pkl"}
CONVERT = "diffusers' save_pretrained(..., safe_serialization=True) writes safetensors"
# By these names go models that were distilled to few steps.
FEW_STEPS = re.compile(r"(?i:turbo|lightning|latent.?consistency|hyper.?sd)|(?<![A-Za-z])(?i:lcm|tcd)(?![a-z])")


@dataclasses.dataclass
class Source:
    """What lies in a checkpoint.

    Attributes:
        format: "folder" or "single file".
        configs: part -> its config, for text_encoder, unet, vae and scheduler.
        tensors: part -> {diffusers name: memory-mapped tensor}; a single file's strays are under "unknown".
        files: part -> the files that its tensors come from.
        tokenizer: the folder of the tokenizer's files; None for the embedded CLIP vocabulary.
        prediction: the prediction type, None where nothing says it and the UNet must be probed.
        told_by: what says the prediction type.
        own_options: those in magicmix.json, if it is there.
        unread: name -> why it is left unread.
        averaged: what there is of averaged weights, in words.
        is_guessed: the UNet's config is that of its family, of which some models have another size.
        notes: what its user should know, one line each.
        concepts: the lists of words in concepts.json, if it is there.
    """

    format: str
    configs: dict[str, object]
    tensors: dict[str, dict[str, Tensor]]
    files: dict[str, list[Path]]
    tokenizer: Path | None = None
    prediction: str | None = None
    told_by: str = ""
    own_options: dict = dataclasses.field(default_factory=dict)
    concepts: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    unread: dict[str, str] = dataclasses.field(default_factory=dict)
    averaged: str = "no copy of its own"
    is_guessed: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)

    def where(self, part: str) -> str:
        """The files of a part, to begin a message with."""
        return ", ".join(map(str, self.files[part]))

    def take(self, part: str, other: "Source") -> None:
        """Replaces a part by that of another source. With a UNet comes what its files say of its training; a single
        file that says nothing leaves the prediction type to the probe."""
        for mine, theirs in ((self.configs, other.configs), (self.tensors, other.tensors), (self.files, other.files)):
            mine[part] = theirs[part]
        self.notes += other.notes
        if part == "unet":
            self.averaged, self.is_guessed = other.averaged, other.is_guessed
            if other.told_by:
                self.configs["scheduler"] = other.configs["scheduler"]
            if other.told_by or other.format == "single file":
                self.prediction, self.told_by = other.prediction, other.told_by


def with_training(config: scheduler.ScheduleConfig, prediction: str | None, zero_snr: bool) -> scheduler.ScheduleConfig:
    """A schedule with what is known of the training; an unknown prediction type is epsilon until it is probed, or v
    where zero terminal SNR leaves nothing else. Raises ValueError for what cannot be together."""
    prediction = prediction or ("v_prediction" if zero_snr else "epsilon")
    return dataclasses.replace(config, prediction_type=prediction, rescale_betas_zero_snr=zero_snr)


def few_steps(*said: object) -> list[str]:
    """A line where one of these names says that a model was distilled to few steps."""
    found = next((name for name in map(str, said) if FEW_STEPS.search(name)), None)
    return [f"trained for few steps, as {found!r} says: try 4 to 8 steps and guidance 1"] if found else []


# ------------------------------------------------------------------------------------------------------- tensors


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


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file that read_tensors has read."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def sort(path: object, tensors: dict[str, Tensor], ema: bool = True, alone: names.Place | None = None) -> names.Split:
    """The tensors of a file, by part. Raises CheckpointError for one that is of another kind of model, since it would
    change the picture and is not read."""
    for name in tensors:
        if kind := names.reason(name, names.FOREIGN):
            raise CheckpointError(f"{path}: tensor {name} is of {kind}; use a checkpoint of SD 1 or SD 2 without it")
    return names.split(tensors, ema, alone)


# ------------------------------------------------------------------------------------------------------- folders


def refuse_other_families(channels: object, context: object, where) -> None:
    """Raises CheckpointError for the relatives of Stable Diffusion 1 and 2 that these modules do not implement, by the
    UNet's input channels and the width of the text states."""
    by_channels = {5: "a depth model", 7: "an upscaler", 8: "a pix2pix model", 9: "an inpainting model"}
    by_context = {2048: "SDXL", 1280: "SDXL's refiner"}
    kinds = [f"{kind} ({n} input channels)" for n, kind in by_channels.items() if n == channels]
    for kind in kinds + [kind for width, kind in by_context.items() if width == context]:
        raise CheckpointError(f"{where} is {kind}; use a text-to-image model of SD 1 or SD 2")


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


def open_part(part: str, path: Path, half: bool = False, ema: bool = True) -> Source:
    """One part: a folder with its config.json, or the file of a part alone in either spelling, or a whole checkpoint of
    which that part is taken. Raises CheckpointError."""
    if not path.is_dir():
        if not path.exists() and path.suffix not in {".safetensors", *PICKLES}:
            raise CheckpointError(f"{part} {str(path)!r} does not exist; give a folder or a .safetensors file")
        source = open_single_file(path, ema)
        if not source.tensors[part]:
            raise CheckpointError(f"{path} holds no {SPOKEN[part]}; give a file or a folder that has one as {part}")
        return source
    folder = path / part if (path / part).is_dir() else path
    configs, notes, told_by = {part: read_config(folder / "config.json", part)}, [], ""
    if part == "unet" and (folder.parent / "scheduler").is_dir():  # of a whole checkpoint: how the UNet was trained
        configs["scheduler"], notes, _ = read_schedule(folder.parent / "scheduler" / "scheduler_config.json")
        told_by = "its scheduler config"
    files = part_files(folder, STEMS[part], half, ema)
    tensors = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
    found = sort(folder, tensors, ema, (part, NAMES[part]))
    return Source(
        format="folder",
        configs=configs,
        tensors={part: found.parts[part]},
        files={part: files},
        prediction=configs["scheduler"].prediction_type if told_by else None,
        told_by=told_by,
        unread=found.unread,
        notes=notes + left_over(folder, found),
    )


def part_tensors(part: str, files: list[Path]) -> dict[str, Tensor]:
    """The tensors of one part in diffusers' current names, from all its files."""
    tensors = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
    return sort(files[0], tensors, alone=(part, NAMES[part])).parts[part]


def left_over(where: Path, found: names.Split) -> list[str]:
    """A line on the tensors that a training left behind."""
    left = sorted(found.leftovers())
    some = ", ".join(left[:3]) + (" ..." if len(left) > 3 else "")
    return [f"{where}: {len(left)} tensors are left over from training and not read: {some}"] if left else []


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


def open_folder(folder: Path, half: bool, ema: bool, name: str) -> Source:
    """A folder in the diffusers format; `name` is what its user calls it. Raises CheckpointError."""
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    kind = index.get("_class_name", "model")
    if (folder / "transformer").is_dir() and not (folder / "unet").is_dir():
        raise CheckpointError(f"{folder} is a {kind} with a transformer for a UNet; use a model of SD 1 or SD 2")
    raw = read_json(folder / "unet" / "config.json")
    refuse_other_families(raw.get("in_channels"), raw.get("cross_attention_dim"), folder)
    schedule, notes, wished = read_schedule(folder / "scheduler" / "scheduler_config.json")
    parts = {part: open_part(part, folder / part, half, ema) for part in STEMS}
    return Source(
        format="folder",
        configs={part: source.configs[part] for part, source in parts.items()} | {"scheduler": schedule},
        tensors={part: source.tensors[part] for part, source in parts.items()},
        files={part: source.files[part] for part, source in parts.items()},
        tokenizer=folder / "tokenizer" if (folder / "tokenizer").exists() else None,
        prediction=schedule.prediction_type,
        told_by="its scheduler config",
        own_options=own_options(folder),
        unread={name: why for source in parts.values() for name, why in source.unread.items()},
        notes=few_steps(name, kind, wished, raw.get("_name_or_path"), index.get("_name_or_path"))
        + [note for source in parts.values() for note in source.notes],
        concepts=own_concepts(folder),
    )


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


# What trainers write into a file's metadata, and what it says of the prediction type.
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction", "velocity": "v_prediction"}


def training(markers: set[str], metadata: dict[str, str]) -> tuple[str | None, str, bool]:
    """What a file says of its training: the prediction type or None, what says so, and whether with zero terminal SNR.

    Markers are empty tensors of some programs. The metadata's modelspec.prediction_type is of the SAI model metadata
    standard, the keys that begin with ss_ are of sd-scripts.
    """
    zero_snr = "ztsnr" in markers or metadata.get("ss_zero_terminal_snr") == "True"
    if "v_pred" in markers:
        return "v_prediction", "its tensor v_pred", zero_snr
    if kind := PREDICTIONS.get(metadata.get("modelspec.prediction_type", "").lower()):
        return kind, "modelspec.prediction_type in its metadata", zero_snr
    if metadata.get("ss_v_parameterization") == "True":
        return "v_prediction", "ss_v_parameterization in its metadata", zero_snr
    return None, "", zero_snr


def open_single_file(path: Path, ema: bool) -> Source:
    """A file in the original (CompVis) format, or of one part alone. Raises CheckpointError."""
    tensors = read_tensors(path)
    return single_file_source(path, tensors, ema, read_metadata(path))


def single_file_source(path: Path, tensors: dict[str, Tensor], ema: bool, metadata: dict[str, str]) -> Source:
    """The same from tensors that are open already; they may lie on the meta device. The configs are those of the
    family that the UNet is of, if there is one."""
    found = sort(path, tensors, ema)
    net = found.parts["unet"]
    cross = [tensor for name, tensor in net.items() if name.endswith("attn2.to_k.weight")]
    if net and not (cross and "conv_in.weight" in net):
        raise CheckpointError(f"{path}: the UNet has no conv_in.weight or no attn2.to_k.weight; use SD 1 or SD 2")
    width = cross[0].shape[-1] if net else unet.UNetConfig().cross_attention_dim
    if net:
        refuse_other_families(net["conv_in.weight"].shape[1], width, path)
    if width not in (unet.UNetConfig().cross_attention_dim, SD2_UNET.cross_attention_dim):
        right = "a single file must be of SD 1 (768) or SD 2 (1024); give the folder with its config.json"
        raise CheckpointError(f"{path}: its UNet reads text states of width {width}; {right}")
    is_sd2 = width == SD2_UNET.cross_attention_dim
    prediction, told_by, zero_snr = training(found.markers, metadata)
    notes = few_steps(path.stem) + left_over(path, found)
    averaged = "no copy of its own"
    if found.averaged:
        state = "used" if found.is_averaged else "not used"
        averaged = f"a copy of {found.averaged} tensors, {state}"
        if any(why == names.IN_PART for why in found.unread.values()):
            notes.append(f"{path}: its averaged weights are {found.averaged} of {len(net)} tensors, and are not used")
    try:
        schedule = with_training(scheduler.ScheduleConfig(), prediction, zero_snr)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Source(
        format="single file",
        configs={
            "text_encoder": SD2_TEXT if is_sd2 else clip.CLIPTextConfig(),
            "unet": SD2_UNET if is_sd2 else unet.UNetConfig(),
            "vae": vae.VAEConfig(),
            "scheduler": schedule,
        },
        tensors=found.parts,
        files=dict.fromkeys(found.parts, [path]),
        prediction=prediction,
        told_by=told_by,
        unread=found.unread,
        averaged=averaged,
        is_guessed=True,
        notes=notes,
    )
