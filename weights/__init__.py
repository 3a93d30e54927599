"""Checkpoints: a folder, a single file or a hub id becomes this project's models, strictly.

Every tensor in the files is accounted for: it is a parameter of the right shape, or it is ignored by name and with a
reason (`weights.layouts`). Every config field is used, fixed to the one value that these models implement, or known to
be descriptive (`weights.sources`). Tensors stay memory-mapped and are handed to modules built on the meta device, so a
load reads the files once and keeps no second copy, unless a dtype or device asks for one.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import clip
import scheduler
import unet
import vae
from weights.sources import (
    FLOATS,
    CheckpointError,
    Source,
    one_line,
    open_source,
    open_vae,
    part_tensors,
    probe_prediction,
)

__all__ = ["TINY", "Checkpoint", "CheckpointError", "load", "one_line"]

HERE = Path(__file__).parent
TINY = HERE / "tiny"
MOST_TOKENIZER = 16 << 20  # bytes of one of a tokenizer's files; CLIP's largest, tokenizer.json, has 4 million
DAMAGED = "get the file again if it is damaged, or use --dtype fp32 if that is finite"
MODELS = {"text_encoder": clip.CLIPTextModel, "unet": unet.UNet2DConditionModel, "vae": vae.AutoencoderKL}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The parts of a text-to-image latent diffusion model, in eval mode, without gradients.

    Attributes:
        tokenizer: transformers' CLIPTokenizer; model_max_length is L.
        text_encoder, unet: in the dtype asked for.
        vae: in float32 unless asked otherwise: decoding in float16 overflows in some public models.
        schedule: the noise schedule's config.
        defaults: the checkpoint's own options for magicmix.py, from magicmix.json.
        identity: part -> fingerprint of its weights, for the picture's metadata.
        device, dtype: where and in what the models compute.
    """

    tokenizer: object
    unet: unet.UNet2DConditionModel
    schedule: scheduler.ScheduleConfig
    defaults: dict
    identity: dict[str, str]
    device: torch.device
    dtype: torch.dtype
    _parts: dict[str, nn.Module]  # text_encoder and vae, while they are mapped
    _reopen: dict[str, Callable[[], nn.Module]]  # those that can be mapped again at no cost

    @property
    def text_encoder(self) -> clip.CLIPTextModel:
        return self._part("text_encoder")

    @property
    def vae(self) -> vae.AutoencoderKL:
        return self._part("vae")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was trained at."""
        side = self.unet.config.sample_size
        if self.unet.config.cross_attention_dim in (768, 1024):  # SD 1 and 2; early copies of 1.5's config say 32
            side = max(side, 64)
        return side * self.vae.config.factor, side * self.vae.config.factor

    def _part(self, name: str) -> nn.Module:
        if name not in self._parts:
            self._parts[name] = self._reopen[name]()
        return self._parts[name]

    def check_finite(self, name: str) -> None:
        """Reads every value of a part and raises CheckpointError that names the first tensor with NaN or Inf in it.
        `load` looks at the first values of each tensor only: reading them all would undo what mapping them saves."""
        part = self.unet if name == "unet" else self._part(name)
        for key in not_finite(part.state_dict()):
            raise CheckpointError(f"{name}: tensor {key} holds NaN or Inf; {DAMAGED}")

    def release(self, name: str) -> None:
        """Unmaps a part ("text_encoder" or "vae") that is used in place from its file, so that its memory does not
        stand beside the UNet's; the next use maps it again. One that was converted to another dtype or moved to a
        device is kept: reading it again would cost more than it saves."""
        if name in self._reopen:
            self._parts.pop(name, None)


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


def not_finite(tensors: dict[str, Tensor]) -> Iterator[str]:
    """The names of the tensors that hold NaN or Inf."""
    for name, tensor in tensors.items():
        # The extremes are NaN where any value is; isfinite() of all values would be thirty times slower.
        if tensor.numel() and tensor.dtype in FLOATS and not torch.stack(tensor.aminmax()).isfinite().all():
            yield name


def fingerprint(part: str, tensors: dict[str, Tensor]) -> str:
    """A sha256 that tells checkpoints apart without reading them whole: of every tensor's name, shape, dtype and
    first 64 values. Even a short fine-tuning moves those. Raises CheckpointError when one of them is NaN or Inf."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.flatten()[:64].contiguous()
        if not values.isfinite().all():
            raise CheckpointError(f"{part}: tensor {name} holds NaN or Inf; {DAMAGED}")
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def on_meta():
    """Modules built inside have shapes and no storage. Embeddings skip their random start, which would be thrown away:
    on the meta device it imports torch's compiler, more than a second."""
    reset = nn.Embedding.reset_parameters
    nn.Embedding.reset_parameters = lambda self: None
    try:
        with torch.device("meta"):
            yield
    finally:
        nn.Embedding.reset_parameters = reset


def build(part: str, config, tensors: dict[str, Tensor], files: list[Path], dtype, device: torch.device) -> nn.Module:
    """One part's network with its tensors, strictly; `files` are named when they do not fit."""
    with on_meta():
        model = MODELS[part](config)
    # A 1 x 1 convolution and a linear layer are the same weights; re-saved files may have either rank.
    expected = model.state_dict()
    found = {
        name: t.reshape(expected[name].shape) if name in expected and pointwise(t.shape, expected[name].shape) else t
        for name, t in tensors.items()
    }
    check(expected, found, ", ".join(map(str, files)))
    model.load_state_dict({name: t.to(device, dtype) for name, t in found.items()}, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def pointwise(a: torch.Size, b: torch.Size) -> bool:
    """Whether two shapes differ by a trailing (1, 1) only."""
    return a == (*b, 1, 1) or b == (*a, 1, 1)


def load_tokenizer(folder: Path | None, pad: str = "<|endoftext|>"):
    """transformers' CLIPTokenizer, from a folder's vocab.json and merges.txt, or, without one, the embedded CLIP
    vocabulary (OpenAI, MIT), which every SD 1 and SD 2 release shares; `pad` is then the padding token.

    Raises CheckpointError when a file is missing or is none of a CLIP tokenizer.
    """
    # transformers looks for torchvision and says so when it is absent; nothing here needs it.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):
        from transformers import CLIPTokenizer

    if folder is None:
        merges = gzip.decompress((HERE / "clip_merges.txt.gz").read_bytes()).decode().splitlines()
        pairs = [tuple(merge.split(" ")) for merge in merges]
        return CLIPTokenizer(clip_vocabulary(pairs), pairs, pad_token=pad, model_max_length=77)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing; a CLIP tokenizer has it")
    for path in folder.iterdir():
        if path.stat().st_size > MOST_TOKENIZER:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; a CLIP tokenizer's files have fewer")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the library trips over in files that are not what they are called
        raise CheckpointError(f"{folder} does not hold a CLIP tokenizer: {error!r}") from error


def check_together(source: Source, tokenizer, where: str) -> None:
    """Raises CheckpointError when parts that are sound do not belong together."""
    text, net, auto = (source.configs[part] for part in ("text_encoder", "unet", "vae"))
    if net.cross_attention_dim != text.hidden_size:
        widths = f"cross_attention_dim {net.cross_attention_dim}, the text encoder's hidden_size is {text.hidden_size}"
        raise CheckpointError(f"{where}: the UNet has {widths}; take both from one model")
    if {net.in_channels, net.out_channels, auto.latent_channels} != {4} or {auto.in_channels, auto.out_channels} != {3}:
        raise CheckpointError(f"{where}: the UNet and the VAE must have 4 latent channels, and pictures 3")
    length, most = tokenizer.model_max_length, text.max_position_embeddings
    if not (type(length) is int and 2 < length <= most):
        raise CheckpointError(f"{where}: the tokenizer's model_max_length is {length!r}; the encoder takes 3 to {most}")
    last, own = max(tokenizer.get_vocab().values()), text.vocab_size
    if last >= own or None in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        raise CheckpointError(f"{where}: the tokenizer's ids reach to {last}, the text encoder's to {own - 1}")


def clip_vocabulary(pairs: list[tuple[str, str]]) -> dict[str, int]:
    """CLIP's token ids follow from its merges: 256 bytes, 256 bytes that end a word, merges, two specials.

    The bytes come in the order of GPT-2's table: printable ones first, as themselves, then the rest as U+0100 onward.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *map("".join, pairs), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}


def load(
    source: str | Path = TINY,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    vae: str | Path | None = None,
    ema: bool = True,
    prediction: str = "auto",
    upcast_attention: bool | None = None,
    vae_dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    """Loads a checkpoint.

    Args:
        source: a folder in the diffusers layout, a single original-layout .safetensors file, or a hub id, optionally
            @revision; the default is the embedded checkpoint.
        device: where the models go.
        dtype: of the text encoder and the UNet: float32, float16 or bfloat16.
        vae: an autoencoder of its own, a folder or a file; needed for single files that have none.
        ema: take the averaged weights where a file has both.
        prediction: "epsilon" or "v"; "auto" reads the scheduler config, or probes a bare SD2 file.
        upcast_attention: attention in float32; None follows the config.
        vae_dtype: of the VAE; float16 overflows in some public models.

    Raises CheckpointError (a ValueError) when anything is missing, unknown or does not fit.
    """
    device = torch.device(device)
    opened = open_source(source, dtype != torch.float32, ema)
    if vae is not None:
        opened.configs["vae"], opened.tensors["vae"], opened.files["vae"] = open_vae(Path(vae))
    if not opened.tensors["vae"]:
        raise CheckpointError(f"{source} holds no VAE; give one with --vae")
    if upcast_attention is not None:
        opened.configs["unet"] = dataclasses.replace(opened.configs["unet"], upcast_attention=upcast_attention)
    if prediction not in ("auto", "epsilon", "v"):
        raise ValueError(f"prediction {prediction!r} is not known; use auto, epsilon or v")
    dtypes = {"text_encoder": dtype, "unet": dtype, "vae": vae_dtype}
    models = {
        part: build(part, opened.configs[part], opened.tensors[part], opened.files[part], dtypes[part], device)
        for part in MODELS
    }
    check({}, opened.tensors.get("unknown", {}), str(source))
    if prediction == "auto":
        kind = opened.configs["scheduler"].prediction_type if opened.prediction else probe_prediction(models["unet"])[0]
    else:
        kind = {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    if not opened.prediction and kind == "epsilon":  # of the bare SD2 files, those that predict v are the 768 px ones
        models["unet"].config = dataclasses.replace(models["unet"].config, sample_size=64)
    second = opened.configs["text_encoder"].hidden_act == "gelu"
    tokenizer = load_tokenizer(opened.tokenizer, pad="!" if second else "<|endoftext|>")  # SD2 pads with id 0
    check_together(opened, tokenizer, str(source))
    reopen = {
        part: partial(reopened, part, opened.configs[part], opened.files[part], dtypes[part])
        for part in ("text_encoder", "vae")
        # Only what lies in files of its own, in a folder: a single file stays mapped for the UNet anyway.
        if opened.layout == "folder" and (part != "vae" or vae is None) and device.type == "cpu"
        and all(t.dtype == dtypes[part] for t in opened.tensors[part].values())
    }
    return Checkpoint(
        tokenizer=tokenizer,
        schedule=dataclasses.replace(opened.configs["scheduler"], prediction_type=kind),
        defaults=opened.defaults,
        identity={part: fingerprint(part, opened.tensors[part]) for part in MODELS},
        device=device,
        dtype=dtype,
        unet=models.pop("unet"),
        _parts=models,
        _reopen=reopen,
    )


def reopened(part: str, config, files: list[Path], dtype: torch.dtype) -> nn.Module:
    """One part of a folder that was loaded before, from its own files: no other part and no hub is asked."""
    return build(part, config, part_tensors(part, files), files, dtype, torch.device("cpu"))
