"""How much memory the pictures of a mix need at least, so that what cannot fit is refused before it is begun."""

from vae import AutoencoderKL


def decoding_bytes(vae: AutoencoderKL, latent_size: tuple[int, int], count: int) -> int:
    """A lower bound of the bytes that decoding `count` latents of (H, W) in one batch takes, beside the weights.

    Decoding takes more than a step of the UNet in every Stable Diffusion: it alone works at the picture's full size, f
    times the latent's. There the first resnet of the decoder's last level holds x, its norm and the activation, three
    feature maps of the channels of the level before; a later one holds such an x and three of its own channels. The
    larger of the two is counted. The convolutions' own buffers are not, and attention is taken to be fused, without
    N x N maps: measured peaks are 1.2 to 2 times this bound.
    """
    channels, f = vae.config.block_out_channels, vae.config.factor
    own, before = channels[0], channels[min(1, len(channels) - 1)]  # of the last level, and of the one before it
    maps = max(3 * before, before + 3 * own)
    (height, width), size = latent_size, vae.post_quant_conv.weight.dtype.itemsize
    return count * maps * f * height * f * width * size
