"""The conditional latent UNet: predicts the noise (or v) in a latent from the latent, its timestep and the text.

Driven by the published unet/config.json; parameter names are those of the public unet files.
Axes: B batch, C channels, H W latent height and width, L text tokens, D width of the text states.
Sources: Rombach et al. 2022 (arXiv 2112.10752), section 3.3; Ho et al. 2020 for the resnets.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import Transformer2DModel


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The fields of unet/config.json that shape the network; defaults are SD1's.

    attention_head_dim is the number of heads (8, or one number per level), not their width: the published name is a
    known misnomer that cannot be changed any more. Lists may come as lists or tuples, one entry per level.

    Raises ValueError for values that do not make a network.
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
        for name, plain in (("down_block_types", "DownBlock2D"), ("up_block_types", "UpBlock2D")):
            types = getattr(self, name)
            if not set(types) <= {plain, f"CrossAttn{plain}"} or len(types) != levels:
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
        """A field that is one number for all levels, or a list, as one number per level."""
        value = getattr(self, name)
        return (value,) * len(self.block_out_channels) if isinstance(value, int) else tuple(value)


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """t (B,) -> (B, dim), float32: cos then sin of t * 10000^(-i / (dim/2)), i = 0 .. dim/2 - 1.

    Cosines first is "flip_sin_to_cos"; dividing by dim/2 and not dim/2 - 1 is "freq_shift 0". Always float32: for t
    from 512 on, float16 would round the angles by up to 0.25 rad and bfloat16 by up to 2 rad.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """(B, dim) -> (B, time_dim)"""

    def __init__(self, dim: int, time_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock2D(nn.Module):
    """x (B, C_in, H, W) and time (B, time_dim) -> (B, C_out, H, W)"""

    def __init__(self, c_in: int, c_out: int, config: UNetConfig):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, c_in, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim(config), c_out)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, c_out, eps=config.norm_eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = y + self.time_emb_proj(F.silu(time))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return y + self.conv_shortcut(x)


def time_dim(config: UNetConfig) -> int:
    """The width of the timestep's embedding: four times that of the first level, in all public models."""
    return 4 * config.block_out_channels[0]


class Downsample2D(nn.Module):
    """(B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)), padded by one on all four sides."""

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


class NoTransformer(nn.Module):
    """Stands in for the transformer at levels that have none, so that all levels read alike."""

    def forward(self, x: Tensor, context: Tensor, token_weights: Tensor | None) -> Tensor:
        return x


def transformer(config: UNetConfig, level: int) -> Transformer2DModel:
    """The transformer of a level; level 0 has the largest H and W."""
    return Transformer2DModel(
        channels=config.block_out_channels[level],
        context_dim=config.cross_attention_dim,
        heads=config.per_level("attention_head_dim")[level],
        depth=config.per_level("transformer_layers_per_block")[level],
        groups=config.norm_num_groups,
        linear=config.use_linear_projection,
        upcast=config.upcast_attention,
    )


class DownBlock(nn.Module):
    """One level on the way down: resnets with their transformers, then half the size, but for the last level."""

    def __init__(self, config: UNetConfig, level: int, kind: str, c_in: int):
        super().__init__()
        width = config.block_out_channels[level]
        widths_in = [c_in] + [width] * (config.layers_per_block - 1)
        self.resnets = nn.ModuleList(ResnetBlock2D(c, width, config) for c in widths_in)
        self.attentions = nn.ModuleList(
            transformer(config, level) if kind == "CrossAttnDownBlock2D" else NoTransformer() for _ in widths_in
        )
        is_last = level == len(config.block_out_channels) - 1
        self.downsamplers = nn.ModuleList([] if is_last else [Downsample2D(width)])

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor, token_weights: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """-> (B, C, H, W) or half of that size, and every feature map on the way, for the skips."""
        skips = []
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x, time), context, token_weights)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)  # (B, C, ceil(H/2), ceil(W/2))
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """The middle: a transformer between two resnets."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(ResnetBlock2D(width, width, config) for _ in range(2))
        self.attentions = nn.ModuleList([transformer(config, level=-1)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor, token_weights: Tensor | None) -> Tensor:
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context, token_weights)
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    """One level on the way up: resnets, each of which takes a skip beside what comes in, with their transformers; then
    the size of the next level's skips, but for level 0. `c_skips`: the skips' channels, in the order they are taken."""

    def __init__(self, config: UNetConfig, level: int, kind: str, c_in: int, c_skips: list[int]):
        super().__init__()
        width = config.block_out_channels[level]
        widths_in = [c_in] + [width] * (len(c_skips) - 1)
        self.resnets = nn.ModuleList(
            ResnetBlock2D(c + skip, width, config) for c, skip in zip(widths_in, c_skips, strict=True)
        )
        self.attentions = nn.ModuleList(
            transformer(config, level) if kind == "CrossAttnUpBlock2D" else NoTransformer() for _ in c_skips
        )
        self.upsamplers = nn.ModuleList([Upsample2D(width)] if level > 0 else [])

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        size: tuple[int, int],
        time: Tensor,
        context: Tensor,
        token_weights: Tensor | None,
    ) -> Tensor:
        for resnet, attention, skip in zip(self.resnets, self.attentions, skips, strict=True):
            x = torch.cat([x, skip], dim=1)  # (B, C + C_skip, H, W), the skip behind x: the order of conv1's weights
            x = attention(resnet(x, time), context, token_weights)
        for upsample in self.upsamplers:
            x = upsample(x, size)  # (B, C, *size)
        return x


class UNet2DConditionModel(nn.Module):
    """The UNet of Stable Diffusion 1 and 2. See `forward` for the shapes, `UNetConfig` for what can vary."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, levels = config.block_out_channels, range(len(config.block_out_channels))

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time_dim(config))

        c_in = [widths[0], *widths[:-1]]  # the channels that come into each level on the way down
        self.down_blocks = nn.ModuleList(
            DownBlock(config, level, kind, c_in[level])
            for level, kind in zip(levels, config.down_block_types, strict=True)
        )
        self.mid_block = MidBlock(config)

        # On the way up a level takes the skips of its resnets, and last the one that came into it on the way down.
        c_skips = [[width] * config.layers_per_block + [c] for width, c in zip(widths, c_in, strict=True)]
        c_up = [*widths[1:], widths[-1]]  # the channels that come into each level on the way up
        self.up_blocks = nn.ModuleList(
            UpBlock(config, level, kind, c_up[level], c_skips[level])
            for level, kind in zip(reversed(levels), config.up_block_types, strict=True)
        )

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | int, context: Tensor, token_weights: Tensor | None = None) -> Tensor:
        """One prediction.

        Args:
            x: noisy latents (B, C, H, W), any H and W; like the context in the weights' dtype.
            t: timesteps (B,), integers from 0 to below num_train_timesteps; or one for all.
            context: text states (B, L, cross_attention_dim).
            token_weights: (B, L), the weight of each token's column in every cross-attention map; None for all 1.

        Returns (B, C, H, W): epsilon or v, whichever the checkpoint was trained to predict.
        """
        t = torch.as_tensor(t, device=x.device).expand(len(x))  # (B,)
        time = self.time_embedding(timestep_embedding(t, self.config.block_out_channels[0]).to(x.dtype))
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, time, context, token_weights)
            skips += more
        x = self.mid_block(x, time, context, token_weights)
        for block in self.up_blocks:
            skips, own = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
            size = skips[-1].shape[2:] if skips else x.shape[2:]  # an odd size is that of the skip it will meet
            x = block(x, own[::-1], size, time, context, token_weights)  # the last skip first
        return self.conv_out(F.silu(self.conv_norm_out(x)))
