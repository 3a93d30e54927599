"""The conditional latent UNet: predicts the noise (or v) in a latent from the latent, its timestep and the text.

Driven by the published unet/config.json; parameter names are those of the public unet files.
Sources: Rombach et al. 2022 (arXiv 2112.10752), section 3.3; Ho et al. 2020 for the resnets.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import Transformer2DModel

# Config fields that this network fixes: another value would mean another network, so a loader must refuse it.
FIXED = {
    "act_fn": "silu",
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
}


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The fields of unet/config.json that shape the network; defaults are SD1's.

    attention_head_dim is the number of heads (8, or one number a level), not their width: the published name is a
    known misnomer that cannot be changed any more. Lists may come as lists or tuples, one entry a level.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    upcast_attention: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 64

    def __post_init__(self):
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            types, plain = getattr(self, name), "DownBlock2D" if name.startswith("down") else "UpBlock2D"
            unknown = sorted(set(types) - {plain, f"CrossAttn{plain}"})
            if unknown or len(types) != levels:
                raise ValueError(f"{name} {list(types)} must name {levels} blocks of {plain} or CrossAttn{plain}")
        for name in ("attention_head_dim", "transformer_layers_per_block"):
            if len(self.per_level(name)) != levels:
                raise ValueError(f"{name} {getattr(self, name)} must be one number or {levels} numbers")
        for width, heads in zip(self.block_out_channels, self.per_level("attention_head_dim"), strict=True):
            if width % self.norm_num_groups or width % heads or width % 2:  # 2: sines and cosines of the timestep
                raise ValueError(
                    f"block_out_channels {list(self.block_out_channels)} must be even and multiples of "
                    f"norm_num_groups {self.norm_num_groups} and attention_head_dim {self.attention_head_dim}"
                )

    def per_level(self, name: str) -> tuple[int, ...]:
        """A field that is one number for all levels or a list, as one number a level."""
        value = getattr(self, name)
        return (value,) * len(self.block_out_channels) if isinstance(value, int) else tuple(value)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """t (B,) -> (B, dim), float32: cos then sin of t * 10000^(-i / (dim/2)), i = 0 .. dim/2 - 1.

    Cosines first is "flip_sin_to_cos"; dividing by dim/2 and not dim/2 - 1 is "freq_shift 0". Always float32: at
    t near 1000, half precision would round the angles by up to half a radian.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    def __init__(self, dim: int, time_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock2D(nn.Module):
    """(B, C_in, H, W) -> (B, C_out, H, W). With time_dim 0 (the VAE's blocks) there is no time embedding."""

    def __init__(self, c_in: int, c_out: int, time_dim: int, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if time_dim:
            self.time_emb_proj = nn.Linear(time_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        if time is not None:
            y = y + self.time_emb_proj(F.silu(time))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Downsample2D(nn.Module):
    """(B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)). The UNet pads all four sides by one; the VAE does not."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample2D(nn.Module):
    """(B, C, H, W) -> (B, C, *size): nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Block(nn.Module):
    """One level, or the middle: resnets, with a transformer after each where the config says so, and a resampler."""

    def __init__(self, resnets, attentions=None, downsampler=None, upsampler=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        if downsampler:
            self.downsamplers = nn.ModuleList([downsampler])
        if upsampler:
            self.upsamplers = nn.ModuleList([upsampler])


class UNet2DConditionModel(nn.Module):
    """The UNet of Stable Diffusion 1 and 2. See `forward` for the shapes, `UNetConfig` for what can vary."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths = list(config.block_out_channels)
        heads, depths = config.per_level("attention_head_dim"), config.per_level("transformer_layers_per_block")
        time_dim, groups, eps = 4 * widths[0], config.norm_num_groups, config.norm_eps
        last = len(widths) - 1

        def resnet(c_in, c_out):
            return ResnetBlock2D(c_in, c_out, time_dim, groups, eps)

        def transformer(level):
            return Transformer2DModel(widths[level], config.cross_attention_dim, heads[level], depths[level], groups,
                                      config.use_linear_projection, config.upcast_attention)  # fmt: skip

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time_dim)

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # the channels that forward() pushes, in order
        for level, (width, kind) in enumerate(zip(widths, config.down_block_types, strict=True)):
            c_in = [skips[-1]] + [width] * (config.layers_per_block - 1)
            resnets = [resnet(c, width) for c in c_in]
            attentions = [transformer(level) for _ in c_in] if kind == "CrossAttnDownBlock2D" else None
            down = Downsample2D(width) if level < last else None
            self.down_blocks.append(Block(resnets, attentions, downsampler=down))
            skips += [width] * (len(c_in) + (level < last))

        self.mid_block = Block([resnet(widths[-1], widths[-1]) for _ in range(2)], [transformer(last)])

        self.up_blocks = nn.ModuleList()
        c = widths[-1]
        for level, kind in zip(reversed(range(len(widths))), config.up_block_types, strict=True):
            resnets = []
            for _ in range(config.layers_per_block + 1):  # one more than on the way down: the resampler's skip
                resnets.append(resnet(c + skips.pop(), widths[level]))
                c = widths[level]
            attentions = [transformer(level) for _ in resnets] if kind == "CrossAttnUpBlock2D" else None
            self.up_blocks.append(Block(resnets, attentions, upsampler=Upsample2D(c) if level > 0 else None))

        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, token_weights: Tensor | None = None) -> Tensor:
        """One prediction.

        Args:
            x: noisy latents (B, C, H, W), any H and W.
            t: timesteps (B,), integers in 0 .. 999.
            context: text states (B, L, cross_attention_dim).
            token_weights: (B, L), the factor on each token's column of every cross-attention map; None for all 1.

        Returns (B, C, H, W): epsilon or v, whichever the checkpoint was trained to predict.
        """
        time = self.time_embedding(timestep_embedding(t, self.config.block_out_channels[0]).to(x.dtype))

        def run(block, i, x):
            x = block.resnets[i](x, time)
            return block.attentions[i](x, context, token_weights) if hasattr(block, "attentions") else x

        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = run(block, i, x)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
                skips.append(x)

        x = run(self.mid_block, 0, x)
        x = self.mid_block.resnets[1](x, time)

        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = run(block, i, torch.cat([x, skips.pop()], dim=1))
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x, skips[-1].shape[2:])  # odd sizes: as large as the skip it will meet

        return self.conv_out(F.silu(self.conv_norm_out(x)))
