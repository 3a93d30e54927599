"""The autoencoder between pictures (B, 3, f H, f W) and latents (B, 4, H, W); f = 8 with four levels.

Driven by the published vae/config.json; parameter names are those of the public vae files (the newer spelling of the
attention, to_q .. to_out.0). Axes: B batch, C channels, H W latent height and width, N = H * W, D width.
Sources: Kingma & Welling 2013 (arXiv 1312.6114); Rombach et al. 2022 (arXiv 2112.10752), section 3.1.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from attention import Attention, to_map, to_tokens

# Every GroupNorm of the VAE has eps 1e-6; the UNet's resnets have 1e-5.
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The fields of vae/config.json that shape the network; defaults are Stable Diffusion's.

    scaling_factor is 1 / (standard deviation of the latents); most published configs lack it, so its default matters.

    Raises ValueError for values that do not make a network.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    def __post_init__(self):
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if list(getattr(self, name)) != [kind] * len(self.block_out_channels):
                raise ValueError(f"{name} {list(getattr(self, name))} must be {len(self.block_out_channels)} x {kind}")
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            widths, groups = list(self.block_out_channels), self.norm_num_groups
            raise ValueError(f"block_out_channels {widths} must be multiples of norm_num_groups {groups}")

    @property
    def factor(self) -> int:
        """f, the picture's pixels per latent pixel along one side: the size is halved between two levels."""
        return 2 ** (len(self.block_out_channels) - 1)


class ResnetBlock2D(nn.Module):
    """(B, C_in, H, W) -> (B, C_out, H, W). Unlike the UNet's, it knows no timestep."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=EPS)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=EPS)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + self.conv_shortcut(x)


def resnets(c_in: int, c_out: int, layers: int, groups: int) -> nn.ModuleList:
    """The resnets of a level, of which the first changes the channels."""
    return nn.ModuleList(ResnetBlock2D(c, c_out, groups) for c in [c_in] + [c_out] * (layers - 1))


class Downsample2D(nn.Module):
    """(B, C, H, W) -> (B, C, H // 2, W // 2)"""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        # Zeros on the right and below only, as the public models were trained; padding all sides shifts the picture.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    """(B, C, H, W) -> (B, C, 2 H, 2 W): nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class MidAttention(Attention):
    """Single-head self-attention over the N image tokens, with its own norm and residual: (B, C, H, W) to the same."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, None, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(to_tokens(self.group_norm(x)))  # (B, N, D)
        return x + to_map(y, x.shape[2:])


class MidBlock(nn.Module):
    """The middle of either side: an attention between two resnets."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.resnets = resnets(width, width, 2, groups)
        self.attentions = nn.ModuleList([MidAttention(width, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class DownEncoderBlock2D(nn.Module):
    """One level of the encoder: resnets, then half the size; not at the last level."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, is_last: bool):
        super().__init__()
        self.resnets = resnets(c_in, c_out, layers, groups)
        self.downsamplers = nn.ModuleList([] if is_last else [Downsample2D(c_out)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class UpDecoderBlock2D(nn.Module):
    """One level of the decoder: resnets, then twice the size; not at the last level."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, is_last: bool):
        super().__init__()
        self.resnets = resnets(c_in, c_out, layers, groups)
        self.upsamplers = nn.ModuleList([] if is_last else [Upsample2D(c_out)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Pictures (B, 3, f H, f W) -> the moments (B, 2 * latent_channels, H, W), before quant_conv."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        inputs, last = [widths[0], *widths], len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownEncoderBlock2D(inputs[i], width, config.layers_per_block, groups, is_last=i == last)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents after post_quant_conv (B, latent_channels, H, W) -> pictures (B, 3, f H, f W)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        inputs, last = [widths[0], *widths], len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        # One resnet more per level than the encoder has: a fact of the public models.
        self.up_blocks = nn.ModuleList(
            UpDecoderBlock2D(inputs[i], width, config.layers_per_block + 1, groups, is_last=i == last)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Encoder and decoder. Pictures are in [-1, 1], latents scaled as the UNet sees them; both are float32, whatever
    the weights' dtype is."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def posterior(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, f H, f W) in [-1, 1] -> mean and log variance, each (B, 4, H, W), not scaled."""
        mean, logvar = self.quant_conv(self.encoder(picture.to(self.quant_conv.weight.dtype))).chunk(2, dim=1)
        # The original code's bounds: both variances, 9.4e-14 and 4.9e8, are normal float32 numbers. In float16 the
        # first is 0 and the second Inf; only training, in float32, takes the exponential.
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, picture: Tensor) -> Tensor:
        """Pictures (B, 3, f H, f W) in [-1, 1] -> scaled latents x0 (B, 4, H, W): the posterior's mean, so that no
        seed enters."""
        return self.posterior(picture)[0].float() * self.config.scaling_factor

    def decode(self, x: Tensor) -> Tensor:
        """Scaled latents (B, 4, H, W) -> pictures (B, 3, f H, f W), about [-1, 1], not clipped."""
        z = (x / self.config.scaling_factor).to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(z)).float()
