"""The VAE's decoding of large pictures: the same arithmetic as vae.py's, picture by picture and in strips of rows.

A feature map of SD's decoder takes 1 GB at 1024 x 1024, and a resnet as it is written in vae.py holds several of them.
Here it holds what goes into its convolutions and what comes out; the rest exists for a strip only. The results are
those of the plain decoder up to rounding, without seams: a norm's statistics are those of the whole map, and a 3 x 3
convolution sees the row beyond either end of its strip.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vae

LARGE = 768 * 768  # pixels of a batch, above which its pictures are decoded in strips
VALUES = 2**22  # in a strip of a feature map: enough rows that the two at its ends cost little, and 16 MB in float32


class AutoencoderKL(vae.AutoencoderKL):
    """The same network and parameters, with a decoder that takes large pictures in strips."""

    def __init__(self, config: vae.VAEConfig):
        super().__init__(config)
        self.decoder = Decoder(config)


class Decoder(vae.Decoder):
    """Latents after post_quant_conv (B, latent_channels, H, W) -> pictures (B, 3, f H, f W)."""

    def forward(self, z: Tensor) -> Tensor:
        if pixels(self, z.shape) <= LARGE:
            return super().forward(z)
        return torch.cat([decode(self, one) for one in z.split(1)])


def pixels(decoder: vae.Decoder, shape: torch.Size) -> int:
    """How many pixels the pictures of latents (B, C, H, W) have in all."""
    batch, _, height, width = shape
    return batch * height * width * 4 ** (len(decoder.up_blocks) - 1)


def decode(decoder: vae.Decoder, z: Tensor) -> Tensor:
    """What vae.Decoder's forward does: (B, latent_channels, H, W) -> (B, 3, f H, f W)."""
    x = decoder.mid_block(decoder.conv_in(z))  # an eighth of the size: whole, as its attention must be
    for block in decoder.up_blocks:
        for layer in block.resnets:
            x = resnet(layer, x)
        for layer in block.upsamplers:
            x = joined(layer, x)  # (B, C, 2 H, 2 W)
    return joined(activated(decoder.conv_norm_out, decoder.conv_out, x), x)


def resnet(block: vae.ResnetBlock2D, x: Tensor) -> Tensor:
    """(B, C_in, H, W) -> (B, C_out, H, W), which is written over x where it has no more channels."""
    y = joined(activated(block.norm1, block.conv1, x), x)
    c_out = y.shape[1]
    out = x[:, :c_out] if c_out <= x.shape[1] else torch.empty_like(y)
    for rows, strip in strips(block.conv_shortcut, x):  # 1 x 1: it needs no row that was written over before
        out[:, :, rows] = strip
    for rows, strip in strips(activated(block.norm2, block.conv2, y), y):
        out[:, :, rows] += strip
    return out


def activated(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Strips of x -> conv(silu(norm)) of them, with the norm's statistics over the whole of x."""
    mean, var = moments(x, norm.num_groups, norm.eps)  # (B, groups)
    of_channel = lambda v: v.repeat_interleave(x.shape[1] // norm.num_groups, dim=1)[:, :, None, None]  # (B, C, 1, 1)
    scale = norm.weight[:, None, None] / of_channel(var) ** 0.5
    shift = norm.bias[:, None, None] - of_channel(mean) * scale
    return lambda strip: conv(F.silu(torch.addcmul(shift, strip, scale).to(x.dtype), inplace=True))


def moments(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Of each group of channels the mean, and the variance plus eps: (B, C, H, W) -> (B, groups) twice, float32."""
    pieces = x.split(step(x), dim=2)
    # In one tensor from the start: small ones between the strips would keep the memory of each from being used again.
    found = x.new_empty(2, len(pieces), len(x), groups, dtype=torch.float32)
    for i, rows in enumerate(pieces):
        found[:, i] = moments_of_strip(rows, groups, eps)
    share = torch.tensor([rows.shape[2] / x.shape[2] for rows in pieces], device=x.device)[:, None, None]
    means, variances = found  # (strips, B, groups)
    mean = (share * means).sum(0)
    # The variance within the strips, and that between them.
    return mean, (share * (variances + (means - mean) ** 2)).sum(0)


def moments_of_strip(rows: Tensor, groups: int, eps: float) -> Tensor:
    """The same of a strip: (2, B, groups), by torch's norm, for the moments that it returns beside its result: it is
    fast in either order of the memory."""
    batch, channels, height, width = rows.shape
    dense = rows.to(torch.float32, copy=True)  # a copy has no gaps, which the norm asks
    _, mean, scale = torch.native_group_norm(dense, None, None, batch, channels, height * width, groups, eps)
    return torch.stack([mean, scale**-2])  # scale is 1 / sqrt(variance + eps)


def strips(layer: Callable[[Tensor], Tensor], x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """layer(x), from strips of x's rows: the rows of the result, and the result there.

    The layer is a 3 x 3 convolution with a padding of 1, or something before it that works value by value or makes rows
    of a row. It is given one row more on either side than its strip has; what comes out there is cut off.
    """
    height = x.shape[2]
    for start in range(0, height, step(x)):
        end = min(start + step(x), height)
        first, last = max(start - 1, 0), min(end + 1, height)  # at the picture's edges the padding is right
        y = layer(x[:, :, first:last])
        f = y.shape[2] // (last - first)  # 2 in upsampling
        yield slice(f * start, f * end), y[:, :, f * (start - first) : f * (end - first)]


def step(x: Tensor) -> int:
    """How many rows of (..., H, W) make a strip."""
    return max(1, VALUES * x.shape[-2] // x.numel())


def joined(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """layer(x) in strips, as one tensor, whose channels are last in memory where the strips' are."""
    out = None
    for rows, strip in strips(layer, x):
        if out is None:
            f = strip.shape[3] // x.shape[3]
            is_last = strip.is_contiguous(memory_format=torch.channels_last)
            order = torch.channels_last if is_last else torch.contiguous_format
            shape = (*strip.shape[:2], f * x.shape[2], strip.shape[3])
            out = torch.empty(shape, dtype=strip.dtype, device=strip.device, memory_format=order)
        out[:, :, rows] = strip
    return out
