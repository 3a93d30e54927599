"""How much memory the pictures of a mix need at least, so that what cannot fit is refused before it is begun."""

from weights import strips


def decoding_bytes(vae: strips.AutoencoderKL, latent_size: tuple[int, int], count: int) -> int:
    """A lower bound of the bytes that decoding `count` latents of (H, W) takes, beside the weights.

    Decoding takes more than a step of the UNet in every Stable Diffusion: it alone works at the picture's full size, f
    times the latent's. There the first resnet of the decoder's last level holds x, its norm and the activation, three
    feature maps of the channels of the level before; a later one holds such an x and three of its own channels. The
    larger of the two is counted. In strips (weights/strips.py) the first holds x, what its first convolution makes of
    it; of one picture at a time. The convolutions'
    own buffers are not counted, and attention is taken to be fused, without N x N maps: measured peaks are 1.2 to 2
    times this bound.
    """
    channels, f = vae.config.block_out_channels, vae.config.factor
    own, before = channels[0], channels[min(1, len(channels) - 1)]  # of the last level, and of the one before it
    (height, width), size = latent_size, vae.post_quant_conv.weight.dtype.itemsize
    pixels = f * height * f * width
    if count * pixels > strips.LARGE:
        pictures = 2 * count * vae.config.out_channels  # one by one, and joined in a batch
        values = max(before + own, pictures)
    else:
        values = count * max(3 * before, before + 3 * own)
    return values * pixels * size
