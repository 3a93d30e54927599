"""The tensor names in public files: one pure function per format, (name, tensor) -> [(diffusers name, tensor), ...].

A function knows whole names only and never replaces a part of one. A name that it does not know comes back unchanged,
and the strict check then refuses it by that name; a name that means nothing here comes back as an empty list, with the
reason in the function's text. What no format reads is listed by pattern: UNREAD and LEFTOVERS, each with a reason.
Tensors may lie on the meta device: only shapes matter.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

Pairs = list[tuple[str, Tensor]]

# Patterns of whole names that are left unread, and why. Published files have those of UNREAD; LEFTOVERS are said once.
UNREAD = {
    r"(.+\.)?embeddings\.position_ids": "positions are 0..L-1 by definition; merges corrupt this copy",
    r"model_ema\.(decay|num_updates)": "a counter of the training, also in files without averaged weights",
    r"(sqrt_|log_)?(one_minus_|recip_|recipm1_)?(betas|alphas_cumprod)(_prev)?"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])": "the noise schedule is computed from its config",
    r"((cond_stage_model|conditioner\.embedders\.0)\.)?(model\.)?(transformer\.)?"
    r"(text_projection(\.weight)?|logit_scale|attn_mask)": "served the contrastive training of the text tower",
}
LEFTOVERS = {
    r"(first_stage_model\.)?(loss|model_ema)\.(?!diffusion_model).+": "of the autoencoder's training",
    r"embedding_manager\..+|embedding_manager": "of a textual inversion's training",
    r"logvar|lvlb_weights|scale_factor|denoiser\.(log_)?sigmas|ddim_.+|epoch|global_step|state_dict": "of the training",
}
# Tensors that would change a picture and are not read: what a file that has them is.
FOREIGN = {
    r"(.+\.)?lora_.+|.+\.(lora|hada|lokr|oft)_.+": "a LoRA; merge it into a checkpoint first",
    r"(.+\.)?(control_model|controlnet_\w+|zero_convs|input_hint_block)\..+": "a ControlNet",
    r"(.+\.)?time_embed(ding)?\.cond_proj\..+": "a latent consistency model (LCM) with guidance as an input",
    r"(.+\.)?(scaled_fp8|scale_weight|scale_input)": "a file in float8 with scales; save it in float16",
    r"(.+\.)?motion_modules\..+": "AnimateDiff's motion module",
    r"emb_params|string_to_param\..+": "a textual inversion",
    r"(.+\.)?(image_proj|ip_adapter)\..+": "an IP-Adapter",
    r"(768|320|640|1024|1280)\..+": "a hypernetwork",
    r"(.+\.)?joint_blocks\..+": "SD3",
    r"(.+\.)?(double_blocks|single_blocks)\..+": "Flux",
    r"conditioner\.embedders\.1\..+|model\.diffusion_model\.label_emb\..+": "SDXL",
}
NOT_ASKED, IN_PART = "averaged weights that were not asked for", "averaged weights of a part of the UNet only"
# Empty tensors by which a file says how it was trained.
MARKERS = {"v_pred", "ztsnr"}


def reason(name: str, patterns: dict[str, str]) -> str | None:
    """What the first pattern that is the whole of a name says; None where there is none."""
    return next((said for pattern, said in patterns.items() if re.fullmatch(pattern, name)), None)


# ------------------------------------------------------------------------------------------------ diffusers folders


def diffusers_text(name: str, tensor: Tensor) -> Pairs:
    """text_encoder files: transformers from 5.6 on writes new models without the `text_model.` prefix."""
    if reason(name, UNREAD):
        return []
    return [(name if name.startswith("text_model.") else f"text_model.{name}", tensor)]


VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def diffusers_vae(name: str, tensor: Tensor) -> Pairs:
    """vae files: those of 2022 call the middle attention's layers query, key, value, proj_attn."""
    if m := re.fullmatch(r"((?:en|de)coder\.mid_block\.attentions\.0)\.(query|key|value|proj_attn)\.(\w+)", name):
        name = f"{m[1]}.{VAE_ATTENTION[m[2]]}.{m[3]}"
    return [(name, tensor)]


def diffusers_unet(name: str, tensor: Tensor) -> Pairs:
    """unet files: the names are ours."""
    return [(name, tensor)]


# --------------------------------------------------------------------------------- original (CompVis) single files

UNET = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}  # fmt: skip
RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
          "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}  # fmt: skip
MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


def original_unet(name: str, tensor: Tensor) -> Pairs:
    """Names below `model.diffusion_model.`: blocks are numbered through, three per level: two (on the way up three)
    resnets, each with its transformer, and the resampler."""
    layer, _, leaf = name.rpartition(".")  # leaf: weight or bias
    if layer in UNET:
        return [(f"{UNET[layer]}.{leaf}", tensor)]
    m = re.fullmatch(r"(?:(input|output)_blocks\.(\d+)|middle_block)\.(\d)\.(.+)", layer)
    if not m:
        return [(name, tensor)]
    side, number, inner, rest = m.groups()
    if side is None:
        place = f"mid_block.{MIDDLE.get(inner)}"
    else:
        level, index = divmod(int(number) - (side == "input"), 3)
        block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
        if rest == "op" or rest == "conv":
            resampler = "downsamplers" if side == "input" else "upsamplers"
            return [(f"{block}.{resampler}.0.conv.{leaf}", tensor)]
        place = f"{block}.{'resnets' if inner == '0' else 'attentions'}.{index}"
    return [(f"{place}.{RESNET.get(rest, rest)}.{leaf}", tensor)]


VAE = {"norm_out": "conv_norm_out", "mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1"}
VAE_MIDDLE = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
VAE_MIDDLE |= {new: new for new in VAE_MIDDLE.values()}  # conversions of 2023 left diffusers' names here
VAE_RESNET = {"nin_shortcut": "conv_shortcut"}


def original_vae(name: str, tensor: Tensor) -> Pairs:
    """Names below `first_stage_model.`: the decoder's levels are numbered from the picture side, so reversed; the
    attention's weights are 1 x 1 convolutions (C, C, 1, 1), here linear layers (C, C)."""
    m = re.fullmatch(r"(encoder|decoder)\.(?:down|up)\.(\d)\.(?:block\.(\d)\.(\w+)|(down|up)sample\.conv)\.(\w+)", name)
    if m:
        side, level, block, layer, resample, leaf = m.groups()
        place = f"{side}.down_blocks.{level}" if side == "encoder" else f"{side}.up_blocks.{3 - int(level)}"
        if resample:
            return [(f"{place}.{resample}samplers.0.conv.{leaf}", tensor)]
        return [(f"{place}.resnets.{block}.{VAE_RESNET.get(layer, layer)}.{leaf}", tensor)]
    if m := re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(.+)\.(\w+)", name):
        if m[2] not in VAE_MIDDLE:
            return [(name, tensor)]
        tensor = tensor.flatten(1) if tensor.dim() == 4 else tensor
        return [(f"{m[1]}.mid_block.attentions.0.{VAE_MIDDLE[m[2]]}.{m[3]}", tensor)]
    if m := re.fullmatch(r"(encoder|decoder)\.(norm_out|mid\.block_[12])\.(.+)", name):
        return [(f"{m[1]}.{VAE[m[2]]}.{m[3]}", tensor)]
    return [(name, tensor)]


OPENCLIP = {"token_embedding.weight": "embeddings.token_embedding.weight",
            "positional_embedding": "embeddings.position_embedding.weight",
            "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias"}  # fmt: skip
OPENCLIP_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
                  "attn.out_proj": "self_attn.out_proj"}  # fmt: skip


def openclip_text(name: str, tensor: Tensor) -> Pairs:
    """Names below `cond_stage_model.model.`, SD2's OpenCLIP text tower: query, key and value are one matrix. Dropped:
    the 24th layer, since SD2 reads the states before it."""
    if name in OPENCLIP:
        return [(f"text_model.{OPENCLIP[name]}", tensor)]
    m = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(?:attn\.in_proj_(weight|bias)|(.+)\.(weight|bias))", name)
    if not m or (m[3] and m[3] not in OPENCLIP_LAYER):
        return [(name, tensor)]
    if m[1] == "23":
        return []
    layer = f"text_model.encoder.layers.{m[1]}"
    if m[3]:
        return [(f"{layer}.{OPENCLIP_LAYER[m[3]]}.{m[4]}", tensor)]
    rows = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True)
    return [(f"{layer}.self_attn.{part}.{m[2]}", part_rows) for part, part_rows in rows]


# ------------------------------------------------------------------------------------------------------ whole files

Place = tuple[str, Callable[[str, Tensor], Pairs]]  # a part and its name map

# Prefix -> part and name map; no prefix begins another.
SINGLE_FILE: dict[str, Place] = {
    "model.diffusion_model.": ("unet", original_unet),
    "first_stage_model.": ("vae", original_vae),
    "cond_stage_model.transformer.": ("text_encoder", diffusers_text),  # SD1
    "cond_stage_model.model.": ("text_encoder", openclip_text),  # SD2
    "conditioner.embedders.0.transformer.": ("text_encoder", diffusers_text),  # the same as newer programs write them
    "conditioner.embedders.0.model.": ("text_encoder", openclip_text),
}


def alone_vae(name: str, tensor: Tensor) -> Pairs:
    """An autoencoder in a file of its own, in either spelling: each map leaves the other's names as they are."""
    return [pair for old, t in original_vae(name, tensor) for pair in diffusers_vae(old, t)]


# A part in a file of its own: how some names begin there and nowhere else, and its name map.
ALONE: dict[str, Place] = {
    "input_blocks.": ("unet", original_unet),
    "down_blocks.": ("unet", diffusers_unet),
    "decoder.": ("vae", alone_vae),
    "text_model.": ("text_encoder", diffusers_text),
}


@dataclass
class Split:
    """A file's tensors, sorted.

    Attributes:
        parts: part -> {diffusers name: tensor}; what belongs to no part is under "unknown", with its own name.
        unread: name -> why it is left unread.
        markers: those of MARKERS that are there.
        averaged: how many averaged weights of the UNet are there.
        is_averaged: whether the UNet's weights are those.
    """

    parts: dict[str, dict[str, Tensor]] = field(
        default_factory=lambda: {"unet": {}, "vae": {}, "text_encoder": {}, "unknown": {}}
    )
    unread: dict[str, str] = field(default_factory=dict)
    markers: set[str] = field(default_factory=set)
    averaged: int = 0
    is_averaged: bool = False

    def leftovers(self) -> list[str]:
        """The unread names that no published file has."""
        return [name for name, why in self.unread.items() if why in LEFTOVERS.values()]


def split(tensors: dict[str, Tensor], ema: bool = True, alone: Place | None = None) -> Split:
    """Sorts the tensors of a file, whole or of one part.

    A full averaged copy of the UNet (`model_ema.` and the name without its dots) replaces the raw weights, unless
    `ema` is false and there are raw ones. A copy in part is left unread. Files called "emaonly" have it merged already
    and hold two counters only.

    Args:
        tensors: name -> tensor.
        ema: whether averaged weights are preferred.
        alone: the part that names without a prefix belong to, and their map; None to find out.
    """
    if tensors and all(name.startswith("state_dict.") for name in tensors):  # of a trainer that saved its own wrapping
        tensors = {name.removeprefix("state_dict."): tensor for name, tensor in tensors.items()}
    if alone is None:
        alone = next((place for start, place in ALONE.items() if any(name.startswith(start) for name in tensors)), None)
    raw = {name for name in tensors if name.startswith("model.diffusion_model.")}
    averaged = {name: raw_name(name) for name in tensors if raw_name(name)}
    is_whole = raw <= set(averaged.values())
    out = Split(averaged=len(averaged), is_averaged=bool(averaged) and is_whole and (ema or not raw))
    for name, tensor in tensors.items():
        if name in MARKERS:
            out.markers.add(name)
        elif why := reason(name, UNREAD) or reason(name, LEFTOVERS):
            out.unread[name] = why
        elif name in averaged and not out.is_averaged:
            out.unread[name] = NOT_ASKED if is_whole else IN_PART
        elif not (name in raw and out.is_averaged):
            part, rename, inner = place(averaged.get(name, name), alone)
            pairs = rename(inner, tensor)
            out.parts[part].update(pairs)
            if not pairs:
                out.unread[name] = "what SD2 does not read of its text tower"
    return out


def place(name: str, alone: Place | None) -> tuple[str, Callable[[str, Tensor], Pairs], str]:
    """Where a tensor belongs: its part, that part's name map, and its name without the prefix. `alone` is the part and
    map of names without one; where that is None too, the tensor is "unknown" and keeps its name."""
    for prefix, (part, rename) in SINGLE_FILE.items():
        if name.startswith(prefix):
            return part, rename, name.removeprefix(prefix)
    return (*(alone or ("unknown", diffusers_unet)), name)


# Layers of the UNet below a block's number, by their names without dots, as averaged weights have them.
DOTLESS = {
    name.replace(".", ""): name
    for name in ["", *RESNET, "op", "conv", "norm", "proj_in", "proj_out"]
    + [f"transformer_blocks.0.attn{i}.{layer}" for i in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")]
    + [f"transformer_blocks.0.{layer}" for layer in ("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3")]
}


def raw_name(name: str) -> str | None:
    """The name of an averaged weight with its dots: model_ema.diffusion_modelout2bias ->
    model.diffusion_model.out.2.bias. None for other names."""
    blocks = r"((?:input|output)_blocks)(\d+)|(middle_block|time_embed|out)"
    m = re.fullmatch(rf"model_ema\.diffusion_model(?:{blocks})(\d)(\D.*?|)(weight|bias)", name)
    if not m or m[5] not in DOTLESS:
        return None
    return ".".join(["model.diffusion_model", *filter(None, [*m.groups()[:4], DOTLESS[m[5]], m[6]])])
