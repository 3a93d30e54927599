"""Checkpoints: a folder, a single file or a hub id becomes this project's models, strictly.

Every tensor in the files is accounted for: it is a parameter of the right shape, or it is left unread by name and with
a reason (`weights.names`). So is every field of the networks' configs (`weights.configs`). Tensors stay memory-mapped
and are handed to modules built on the meta device, so a load reads the files once and keeps no second copy, unless a
dtype or device asks for one.
"""

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import clip
import scheduler
import unet
from weights import concepts, hub, strips
from weights.configs import CheckpointError
from weights.files import (
    FLOATS,
    PICKLES,
    SPOKEN,
    Source,
    open_folder,
    open_part,
    open_single_file,
    own_options,
    part_tensors,
)
from weights.tokenizer import CLIP_TOKENS, load_tokenizer

__all__ = ["TINY", "Checkpoint", "CheckpointError", "load", "load_tokenizer", "own_options", "words"]

TINY = Path(__file__).parent / "tiny"
DAMAGED = "get the file again if it is damaged, or compute in float32 if that is finite"
MODELS = {"text_encoder": clip.CLIPTextModel, "unet": unet.UNet2DConditionModel, "vae": strips.AutoencoderKL}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The parts of a text-to-image latent diffusion model, in eval mode, without gradients.

    Attributes:
        tokenizer: transformers' CLIPTokenizerFast; model_max_length is L.
        text_encoder, unet: in `dtype`.
        vae: in float32 unless asked otherwise: decoding in float16 overflows in some public models.
        schedule: the noise schedule's config.
        device, dtype: where the models compute, and in what the text encoder and the UNet do.
        own_options: those of a mix, from the checkpoint's magicmix.json.
        concepts: the lists of words that it was trained on, from its concepts.json; none where it has none.
        identity: part -> fingerprint of its weights, and "configs" -> that of all configs in the files.
        notes: what its user should know, one line each: wishes that are not followed, tensors that are not read.
    """

    tokenizer: object
    text_encoder: clip.CLIPTextModel
    unet: unet.UNet2DConditionModel
    vae: strips.AutoencoderKL
    schedule: scheduler.ScheduleConfig
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    own_options: dict = dataclasses.field(default_factory=dict)
    concepts: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    identity: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was trained at."""
        side = self.unet.config.sample_size
        if self.unet.config.cross_attention_dim in (768, 1024):  # SD 1 and 2; early copies of 1.5's config say 32
            side = max(side, 64)
        return side * self.vae.config.factor, side * self.vae.config.factor

    @property
    def defaults(self) -> dict:
        """The checkpoint's own defaults for a mix: its size, and the options in its magicmix.json."""
        return {"size": self.size} | self.own_options

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels -> (H, W) of the latents. Raises ValueError for sides that do not fit."""
        (height, width), factor = size, self.vae.config.factor
        if height % factor or width % factor or min(size) < factor:
            raise ValueError(f"size {width}x{height} does not fit; both sides must be multiples of {factor}")
        return height // factor, width // factor

    def warn_if_untrained(self, latent_size: tuple[int, int], *texts: object) -> None:
        """Warns (UserWarning) of a size that is not the model's, and of words that it says it was not trained on.

        Args:
            latent_size: (H, W) of the latents.
            texts: the prompts; what is no text among them, as a layout may be, is passed over.
        """
        size, chosen = tuple(side * self.vae.config.factor for side in latent_size), self.defaults["size"]
        if size != self.size and size != (tuple(chosen) if isinstance(chosen, list | tuple) else (chosen, chosen)):
            own, asked = (f"{width}x{height}" for height, width in (self.size, size))
            warnings.warn(f"size {asked}: this checkpoint was trained at {own}; expect worse pictures", stacklevel=2)
        if line := concepts.warning(self.concepts, [text for text in texts if isinstance(text, str)]):
            warnings.warn(line, stacklevel=2)

    def check_finite(self, part: str, result: Tensor, what: str) -> None:
        """Raises when `result`, computed by a part, holds NaN or Inf: CheckpointError that names the first tensor of
        the part's weights that does, or, where they are sound, FloatingPointError that says `what` overflowed."""
        if result.isfinite().all():
            return
        check_weights(part, getattr(self, part).state_dict())
        higher = "the VAE in float32" if part == "vae" else "in float32 or bfloat16, or the attention in float32"
        raise FloatingPointError(f"{what} hold NaN or Inf, and the weights do not; compute {higher}")


# ----------------------------------------------------------------------------------------------------- the numbers


def not_finite(tensors: dict[str, Tensor]) -> Iterator[str]:
    """The names of the tensors that hold NaN or Inf."""
    for name, tensor in tensors.items():
        # The extremes are NaN where any value is; isfinite() of all values would be thirty times slower.
        if tensor.numel() and tensor.dtype in FLOATS and not torch.stack(tensor.aminmax()).isfinite().all():
            yield name


def check_weights(part: str, tensors: dict[str, Tensor]) -> None:
    """Reads every value; raises CheckpointError that names the first tensor with NaN or Inf in it."""
    for name in not_finite(tensors):
        raise CheckpointError(f"{part}: tensor {name} holds NaN or Inf; {DAMAGED}")


def fingerprint(part: str, tensors: dict[str, Tensor]) -> str:
    """A sha256 that tells checkpoints apart without reading them whole: of every tensor's name, shape, dtype and
    first 64 values. A change to later values alone is not seen. Raises CheckpointError when a value read is NaN or
    Inf."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.flatten()[:64].contiguous()
        check_weights(part, {name: values})
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def config_fingerprint(configs: dict[str, object]) -> str:
    """A sha256 of every field of every config that is not at its default, so that a new field changes nothing."""
    fields = {
        part: {
            f.name: getattr(config, f.name) for f in dataclasses.fields(config) if getattr(config, f.name) != f.default
        }
        for part, config in configs.items()
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------- the networks


class NoStart(TorchFunctionMode):
    """Within it, networks are built without random initial weights, which would be thrown away: on the meta device the
    embeddings' would import torch's compiler, more than a second."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return keywords["tensor"]
        return function(*arguments, **(keywords or {}))


def build(part: str, config: object) -> nn.Module:
    """The network of a part on the meta device: names and shapes, no storage."""
    with torch.device("meta"), NoStart():
        return MODELS[part](config).eval().requires_grad_(False)


def check(expected: dict[str, Tensor], found: dict[str, Tensor], where: str) -> None:
    """Raises CheckpointError that names the first missing, unexpected or misshapen tensor."""
    for name in sorted(expected.keys() - found.keys()):
        raise CheckpointError(f"{where}: tensor {name} is missing")
    for name in sorted(found.keys() - expected.keys()):
        raise CheckpointError(f"{where}: tensor {name} is not part of this model")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            shapes = tuple(found[name].shape), tuple(tensor.shape)
            raise CheckpointError(f"{where}: tensor {name} has shape {shapes[0]}, the config asks for {shapes[1]}")
        if found[name].dtype not in FLOATS:
            kind = str(found[name].dtype).removeprefix("torch.")
            raise CheckpointError(f"{where}: tensor {name} is {kind}; use float32, float16 or bfloat16")


def same_rank(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the expected shapes where they differ by a trailing (1, 1) only: a 1 x 1 convolution and a linear
    layer are the same weights, and re-saved files may have either."""
    return {
        name: t.reshape(expected[name].shape) if name in expected and pointwise(t.shape, expected[name].shape) else t
        for name, t in tensors.items()
    }


def fill(network: nn.Module, tensors: dict[str, Tensor], where: str, dtype: torch.dtype, device: torch.device) -> None:
    """Gives a network its tensors, strictly. Raises CheckpointError, which begins with `where`."""
    expected = network.state_dict()
    found = same_rank(expected, tensors)
    check(expected, found, where)
    network.load_state_dict({name: placed(t, dtype, device) for name, t in found.items()}, strict=True, assign=True)


def placed(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor as the network gets it: itself where it has this dtype and lies on this device, and so stays mapped. But
    a convolution's weight in half precision is copied with its channels last in memory: the feature maps take that
    order over, and convolutions are faster in it (docs/measured.md)."""
    is_kernel = tensor.ndim == 4  # (C_out, C_in, height, width)
    order = torch.channels_last if is_kernel and dtype != torch.float32 else torch.preserve_format
    return tensor.to(device, dtype, memory_format=order)


def pointwise(a: torch.Size, b: torch.Size) -> bool:
    """Whether two shapes differ by a trailing (1, 1) only."""
    return a == (*b, 1, 1) or b == (*a, 1, 1)


@dataclasses.dataclass
class MapAnew:
    """A hook that maps a part's tensors from its files again after each use: the memory that the use took goes with
    the old mapping. What was written into the weights meanwhile goes too."""

    part: str
    network: nn.Module
    files: list[Path]
    dtype: torch.dtype

    def __call__(self, *_) -> None:
        where = ", ".join(map(str, self.files))
        fill(self.network, part_tensors(self.part, self.files), where, self.dtype, torch.device("cpu"))


# --------------------------------------------------------------------------------------------------------- loading


def load(
    source: str | Path = TINY,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    ema: bool = True,
    prediction: str = "auto",
    upcast_attention: bool | None = None,
    vae_dtype: torch.dtype = torch.float32,
    free_after_use: bool = False,
) -> Checkpoint:
    """Loads a checkpoint.

    Args:
        source: a folder in the diffusers format, an original single file, or a hub id, optionally
            @revision; the default is the embedded checkpoint.
        device: where the models go.
        dtype: of the text encoder and the UNet: float32, float16 or bfloat16.
        unet, vae: a UNet or an autoencoder of its own, a folder or a file, in place of the source's.
        ema: take the averaged weights where a file has both.
        prediction: "epsilon" or "v"; "auto" takes what the files say, and probes the UNet where they say nothing.
        upcast_attention: attention in float32; None follows the config.
        vae_dtype: of the VAE; float16 overflows in some public models.
        free_after_use: give the memory of the text encoder and the VAE back after each use, where they lie mapped in
            files of their own. Do not change the weights in place with this on.

    Raises CheckpointError (a ValueError) when anything is missing, unknown or does not fit, or when the VAE or the
    first values of another tensor are not finite; and ValueError for another prediction than these.
    """
    device = torch.device(device)
    opened = open_source(source, dtype != torch.float32, ema, unet, vae)
    found_configs = config_fingerprint(opened.configs)
    if upcast_attention is not None:
        opened.configs["unet"] = dataclasses.replace(opened.configs["unet"], upcast_attention=upcast_attention)
    if prediction not in ("auto", "epsilon", "v"):
        raise ValueError(f"prediction {prediction!r} is not known; use auto, epsilon or v")
    dtypes = {"text_encoder": dtype, "unet": dtype, "vae": vae_dtype}
    models = {part: build(part, opened.configs[part]) for part in MODELS}
    check_source(opened, models, str(source))
    tokenizer = tokenizer_of(opened, str(source))
    for part, network in models.items():
        fill(network, opened.tensors[part], opened.where(part), dtypes[part], device)
    identity = {part: fingerprint(part, opened.tensors[part]) for part in MODELS} | {"configs": found_configs}
    check_weights("vae", opened.tensors["vae"])  # what is wrong in its decoder would show at the very end
    kind = opened.prediction if prediction == "auto" else {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    if kind is None:
        kind = probe_prediction(models["unet"])[0]
        if kind == "v_prediction":
            opened.notes.append("the UNet predicts v, as a probe shows; nothing in the file says it")
    if opened.is_guessed and kind == "epsilon":  # of SD2's single files, only those that predict v are 768 px ones
        models["unet"].config = dataclasses.replace(models["unet"].config, sample_size=64)
    if free_after_use and opened.format == "folder":  # a single file stays mapped for the UNet anyway
        hook_parts(opened, models, dtypes, ["text_encoder", "vae"] if vae is None else ["text_encoder"])
    return Checkpoint(
        tokenizer=tokenizer,
        **models,
        schedule=schedule_of(opened, kind, str(source)),
        device=device,
        dtype=dtype,
        own_options=opened.own_options,
        concepts=opened.concepts,
        identity=identity,
        notes=opened.notes,
    )


def open_source(
    source: str | Path, half: bool, ema: bool, unet: str | Path | None = None, vae: str | Path | None = None
) -> Source:
    """Finds out what `source` is and opens it, with other parts in place of its own where they are given. Raises
    CheckpointError."""
    path, others = Path(source), {"unet": unet, "vae": vae}
    if path.is_dir():
        opened = open_folder(path, half, ema, path.resolve().name)
    elif path.exists() or path.suffix in {".safetensors", *PICKLES}:
        opened = open_single_file(path, ema)
    elif hub.HUB_ID.fullmatch(str(source)):
        opened = open_folder(hub.fetch(str(source), half, ema), half, ema, str(source))
    else:
        raise CheckpointError(
            f"weights {str(source)!r} is no folder, no .safetensors file and no hub id; check the path"
        )
    for part, other in others.items():
        if other is not None:
            opened.take(part, open_part(part, Path(other), half, ema))
    return opened


def check_source(source: Source, models: dict[str, nn.Module], where: str) -> None:
    """Raises CheckpointError for a part that is not there, and for a tensor that does not fit or is of no part.

    Args:
        source: what was opened.
        models: part -> its network on the meta device.
        where: what the source is called, to begin messages with.
    """
    there = [SPOKEN[part] for part in MODELS if source.tensors[part]]
    for part, right in {
        "unet": "give a whole checkpoint, and this as its vae" if there == ["VAE"] else "give a whole checkpoint",
        "text_encoder": "give a checkpoint that has one, and this as its unet",
        "vae": "give one as vae",
    }.items():
        if not source.tensors[part]:
            held = " and ".join(there) or "nothing of SD 1 or 2"
            raise CheckpointError(f"{where} holds {held}, no {SPOKEN[part]}; {right}")
    check({}, source.tensors.get("unknown", {}), where)
    for part, network in models.items():
        expected = network.state_dict()
        check(expected, same_rank(expected, source.tensors[part]), source.where(part))


def tokenizer_of(source: Source, where: str):
    """The tokenizer of a source. Raises CheckpointError when it, or another part, does not belong to the others."""
    text = source.configs["text_encoder"]
    if source.tokenizer is None and text.vocab_size < CLIP_TOKENS:
        raise CheckpointError(f"{where} has no tokenizer folder, and its vocabulary is not CLIP's; get the folder too")
    pad = "!" if text.hidden_act == "gelu" else "<|endoftext|>"  # SD2's, which is id 0; only its text encoder has gelu
    tokenizer = load_tokenizer(source.tokenizer, pad, text.max_position_embeddings)
    check_together(source, tokenizer, where)
    return tokenizer


def schedule_of(source: Source, prediction: str, where: str) -> scheduler.ScheduleConfig:
    """A source's schedule with the prediction type that was found. Raises CheckpointError where it cannot have it."""
    try:
        return dataclasses.replace(source.configs["scheduler"], prediction_type=prediction)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def words(source: str | Path) -> list[str]:
    """The words that a checkpoint was trained on, in lines to print; a hub id is fetched for it. Raises
    CheckpointError."""
    known = open_source(source, half=False, ema=True).concepts
    return concepts.lines(known) or [f"{source} does not say which words it was trained on"]


def check_together(source: Source, tokenizer, where: str) -> None:
    """Raises CheckpointError when parts that are sound do not belong together."""
    text, net, auto = (source.configs[part] for part in ("text_encoder", "unet", "vae"))
    if net.cross_attention_dim != text.hidden_size:
        widths = f"cross_attention_dim {net.cross_attention_dim}, the text encoder's hidden_size is {text.hidden_size}"
        raise CheckpointError(f"{where}: the UNet has {widths}; take both from one model")
    if {net.in_channels, net.out_channels, auto.latent_channels} != {4} or {auto.in_channels, auto.out_channels} != {3}:
        raise CheckpointError(f"{where}: the UNet and the VAE must have 4 latent channels, and pictures 3")
    length, largest = tokenizer.model_max_length, text.max_position_embeddings
    if not (type(length) is int and 2 < length <= largest):
        raise CheckpointError(
            f"{where}: the tokenizer's model_max_length is {length!r}; the encoder takes 3 to {largest}"
        )
    last, own = max(tokenizer.get_vocab().values()), text.vocab_size
    if last >= own or None in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        raise CheckpointError(f"{where}: the tokenizer's ids reach to {last}, the text encoder's to {own - 1}")


def hook_parts(source: Source, models: dict, dtypes: dict[str, torch.dtype], parts: list[str]) -> None:
    """Lets these parts of a folder give their memory back after each use, where that is free: on the CPU, in the dtype
    of their files."""
    users = {"text_encoder": [models["text_encoder"]], "vae": [models["vae"].encoder, models["vae"].decoder]}
    for part in parts:
        tensors = source.tensors[part].values()
        is_mapped = all(t.dtype == dtypes[part] for t in tensors)
        if is_mapped and all(p.device.type == "cpu" for p in models[part].parameters()):
            map_anew = MapAnew(part, models[part], source.files[part], dtypes[part])
            map_anew()  # what loading has read of it goes at once
            for module in users[part]:
                module.register_forward_hook(map_anew)


@torch.no_grad()
def probe_prediction(model: unet.UNet2DConditionModel) -> tuple[str, float]:
    """("epsilon" or "v_prediction", the number it was decided by) for a bare SD2 file, which does not say.

    The test of the A1111 web UI: for a constant input of 0.5 at t = 999, a UNet that predicts epsilon returns about
    its input (at that t it is nearly all noise), one that predicts v returns about -x0, far below. The mean of
    output - input is compared with -1. Needs float32 and takes one small UNet call.
    """
    x = torch.full((1, model.config.in_channels, 8, 8), 0.5)
    context = torch.full((1, 2, model.config.cross_attention_dim), 0.5)
    device = model.conv_in.weight.device
    exact = model
    if model.conv_in.weight.dtype != torch.float32:
        exact = build("unet", model.config)
        exact.load_state_dict({k: v.float() for k, v in model.state_dict().items()}, strict=True, assign=True)
    output = exact(x.to(device), torch.tensor([999], device=device), context.to(device))
    margin = (output - x.to(device)).mean().item()
    return ("v_prediction" if margin < -1 else "epsilon"), margin
