"""The tensor names in public files: one pure function per format, (name, tensor) -> [(diffusers name, tensor), ...].

A function knows whole names only and never replaces a part of one. A name that it does not know comes back unchanged,
and the strict check then refuses it by that name; a name that means nothing here comes back as an empty list, and
stands in IGNORED or in the function's text with its reason. Tensors may lie on the meta device: only shapes matter.
"""

import re
from collections.abc import Callable, Iterable

from torch import Tensor

Pairs = list[tuple[str, Tensor]]

# Tensors that are left unread, by full name, and why.
IGNORED = {
    "text_model.embeddings.position_ids": "positions are 0..L-1 by definition; merges corrupt this copy",
    "model_ema.decay": "a counter of the training, also in files without averaged weights",
    "model_ema.num_updates": "a counter of the training, also in files without averaged weights",
} | dict.fromkeys(
    "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
    "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance "
    "posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2".split(),
    "the noise schedule is computed from its config",
)

# ------------------------------------------------------------------------------------------------ diffusers folders


def diffusers_text(name: str, tensor: Tensor) -> Pairs:
    """text_encoder files: transformers from 5.6 on writes new models without the `text_model.` prefix."""
    name = name if name.startswith("text_model.") else f"text_model.{name}"
    return [] if name in IGNORED else [(name, tensor)]


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
    if m := re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(norm|q|k|v|proj_out)\.(\w+)", name):
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
    the 24th layer, since SD2 reads the states before it, and what only served the contrastive training."""
    if name in OPENCLIP:
        return [(f"text_model.{OPENCLIP[name]}", tensor)]
    if name in ("text_projection", "logit_scale", "attn_mask"):
        return []
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


# Prefix -> part and name map; no prefix begins another.
SINGLE_FILE: dict[str, tuple[str, Callable[[str, Tensor], Pairs]]] = {
    "model.diffusion_model.": ("unet", original_unet),
    "first_stage_model.": ("vae", original_vae),
    "cond_stage_model.transformer.": ("text_encoder", diffusers_text),  # SD1
    "cond_stage_model.model.": ("text_encoder", openclip_text),  # SD2
}


def split(items: Iterable[tuple[str, Tensor]], ema: bool = True) -> dict[str, dict[str, Tensor]]:
    """A single file's tensors as {part: {diffusers name: tensor}}; what belongs to no part is under "unknown".

    A full averaged copy of the UNet (`model_ema.` and the name without its dots) replaces the raw weights, unless
    `ema` is false. Files called "emaonly" have it merged already and hold two counters only.
    """
    items = dict(items)
    parts = {"unet": {}, "vae": {}, "text_encoder": {}, "unknown": {}}
    # The dotless names cannot be split again, so they are made from the raw ones.
    averaged = {averaged_name(name): name for name in items if name.startswith("model.diffusion_model.")}
    has_copy = sum(name.startswith("model_ema.") for name in items) > 100
    for name, tensor in items.items():
        if name in IGNORED or name in averaged:
            continue
        part, rename, inner = place(name)
        if part == "unet" and has_copy and ema:
            if averaged_name(name) not in items:
                continue  # the strict check will name it
            tensor = items[averaged_name(name)]
        parts[part].update(rename(inner, tensor))
    return parts


def place(name: str) -> tuple[str, Callable[[str, Tensor], Pairs], str]:
    """Where a single file's tensor belongs: its part, that part's name map, and its name without the prefix. What
    belongs to no part is "unknown" and keeps its name."""
    for prefix, (part, rename) in SINGLE_FILE.items():
        if name.startswith(prefix):
            return part, rename, name.removeprefix(prefix)
    return "unknown", diffusers_unet, name


def averaged_name(name: str) -> str:
    """model.diffusion_model.out.2.bias -> model_ema.diffusion_modelout2bias"""
    return "model_ema." + name.removeprefix("model.").replace(".", "")
