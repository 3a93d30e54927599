"""The autoencoder between pictures (B, 3, f H, f W) and latents (B, 4, H, W); f = 8 with four levels.

Driven by the published vae/config.json; parameter names are those of the public vae files (the newer spelling of the
attention, to_q .. to_out.0). Sources: Kingma & Welling 2013; Rombach et al. 2022, section 3.1.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from attention import Attention
from unet import ResnetBlock2D, Upsample2D

# Every GroupNorm of the VAE has eps 1e-6; the UNet's resnets have 1e-5. Mixing them up costs 5e-4 of accuracy.
EPS = 1e-6

# Config fields that this network fixes: another value would mean another network, so a loader must refuse it.
FIXED = {
    "act_fn": "silu",
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The fields of vae/config.json that shape the network; defaults are Stable Diffusion's.

    scaling_factor is 1 / (standard deviation of the latents); most published configs lack it, so its default matters.
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
        """Picture pixels a latent pixel, along one side: one halving between two levels."""
        return 2 ** (len(self.block_out_channels) - 1)


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H // 2, W // 2) for even sides."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        # Zeros on the right and below only, as the public models were trained; padding all sides shifts the picture.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class MidAttention(Attention):
    """Single-head self-attention over the pixels, with its own norm and residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, None, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
        return x + super().forward(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class Level(nn.Module):
    """One level, or the middle: resnets, an attention, a resampler; what is not there has no parameters."""

    def __init__(self, resnets, attention=None, downsampler=None, upsampler=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList([attention] if attention else [])
        self.downsamplers = nn.ModuleList([downsampler] if downsampler else [])
        self.upsamplers = nn.ModuleList([upsampler] if upsampler else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:  # in the middle: between the two resnets
            x = attention(x)
        for resnet in self.resnets[1:]:
            x = resnet(x)
        for down in self.downsamplers:
            x = down(x)
        for up in self.upsamplers:
            x = up(x, (2 * x.shape[2], 2 * x.shape[3]))
        return x


def levels(widths, layers: int, groups: int, resampler) -> nn.ModuleList:
    """The levels of one side, in the order they run; each but the last ends in resampler(width)."""
    blocks, c_in = nn.ModuleList(), widths[0]
    for i, width in enumerate(widths):
        resnets = [ResnetBlock2D(c, width, 0, groups, EPS) for c in [c_in] + [width] * (layers - 1)]
        blocks.append(Level(resnets, **(resampler(width) if i < len(widths) - 1 else {})))
        c_in = width
    return blocks


def middle(width: int, groups: int) -> Level:
    return Level([ResnetBlock2D(width, width, 0, groups, EPS) for _ in range(2)], MidAttention(width, groups))


class Encoder(nn.Module):
    """Pictures (B, 3, f H, f W) -> the moments (B, 2 * latent_channels, H, W), before quant_conv."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = levels(widths, config.layers_per_block, groups, lambda w: {"downsampler": Downsample(w)})
        self.mid_block = middle(widths[-1], groups)
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
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = middle(widths[0], groups)
        # One resnet more a level than the encoder has: a fact of the public models.
        self.up_blocks = levels(widths, config.layers_per_block + 1, groups, lambda w: {"upsampler": Upsample2D(w)})
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Encoder and decoder. Pictures are in [-1, 1]; latents here are unscaled: multiply by config.scaling_factor
    for the diffusion model, divide before decoding."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, f H, f W) in [-1, 1] -> mean and log variance of the posterior, each (B, 4, H, W)."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        # The bounds of the original code: exp(-30) is still a normal float32, exp(20) still finite in float16's range.
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents (B, 4, H, W) -> pictures (B, 3, f H, f W), about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(z))
