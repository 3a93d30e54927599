"""Every norm and every kind of block against diffusers and transformers, on natural inputs and on quiet ones.

On natural inputs a wrong eps moves the output of a whole network by about 1e-5, which is near the bound there. On the
same inputs times 0.01 it moves a single norm by 1e-2 and more. So each norm is fed directly. Inputs are not square and
come in batches of 2.
"""

import diffusers
import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from test_parity import pairs, vae_pair
from torch import nn

import attention
import unet
import vae

BOUND = 1e-5
LOUDNESS = pytest.mark.parametrize("loudness", [1.0, 0.01])


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """The oracle's weights, away from where they start."""
    with torch.no_grad():
        for i, p in enumerate(theirs.parameters()):
            p += 0.3 * tensor(*p.shape, seed=i)
    ours.load_state_dict(theirs.state_dict(), strict=True)


# --------------------------------------------------------------------------------------------------------- norms


def norms(model):
    """name -> norm; transformers from 5.6 on leaves the text encoder's prefix out of the names."""
    kinds = (nn.GroupNorm, nn.LayerNorm)
    return {n.removeprefix("text_model."): m for n, m in model.named_modules() if isinstance(m, kinds)}


@LOUDNESS
@torch.no_grad()
def test_every_norm_of_every_network(loudness):
    """By name: UNet, VAE and text encoder of SD1's and SD2's kind, 241 norms."""
    count = 0
    for ours, theirs in pairs():
        expected = norms(theirs)
        assert norms(ours).keys() == expected.keys()
        for name, norm in norms(ours).items():
            if isinstance(norm, nn.GroupNorm):
                x = loudness * tensor(2, norm.num_channels, 3, 5)
            else:
                x = loudness * tensor(2, 7, *norm.normalized_shape)
            assert relative_error(norm(x), expected[name](x)) <= 1e-6, name
            count += 1
    assert count == 241


# -------------------------------------------------------------------------------------------------------- blocks


@LOUDNESS
@pytest.mark.parametrize(("c_in", "c_out"), [(16, 16), (16, 24)])
@torch.no_grad()
def test_resnets(c_in, c_out, loudness):
    config = unet.UNetConfig(block_out_channels=(16,) * 4, norm_num_groups=8)
    x, time = loudness * tensor(2, c_in, 5, 9), tensor(2, 64)
    ours = unet.ResnetBlock2D(c_in, c_out, config)
    theirs = ResnetBlock2D(in_channels=c_in, out_channels=c_out, temb_channels=64, groups=8, eps=1e-5)
    same_weights(ours, theirs)
    assert relative_error(ours(x, time), theirs(x, time)) <= BOUND
    ours = vae.ResnetBlock2D(c_in, c_out, groups=8)
    theirs = ResnetBlock2D(in_channels=c_in, out_channels=c_out, temb_channels=None, groups=8, eps=1e-6)
    same_weights(ours, theirs)
    assert relative_error(ours(x), theirs(x, None)) <= BOUND


@LOUDNESS
@pytest.mark.parametrize("linear", [False, True])
@torch.no_grad()
def test_transformers(linear, loudness):
    x, context = loudness * tensor(2, 32, 5, 9), tensor(2, 7, 24)
    ours = attention.Transformer2DModel(32, 24, heads=4, depth=2, groups=8, linear=linear, upcast=False)
    theirs = Transformer2DModel(4, 8, in_channels=32, num_layers=2, cross_attention_dim=24, norm_num_groups=8,
                                use_linear_projection=linear)  # fmt: skip
    same_weights(ours, theirs)
    assert relative_error(ours(x, context), theirs(x, context).sample) <= BOUND
    tokens = loudness * tensor(2, 45, 32)
    ours, theirs = attention.BasicTransformerBlock(32, 24, 4, False), BasicTransformerBlock(32, 4, 8, 0.0, 24)
    same_weights(ours, theirs)
    assert relative_error(ours(tokens, context, None), theirs(tokens, encoder_hidden_states=context)) <= BOUND
    ours, theirs = attention.FeedForward(32), FeedForward(32)
    same_weights(ours, theirs)
    assert relative_error(ours(tokens), theirs(tokens)) <= BOUND


@torch.no_grad()
def test_resampling():
    for height, width in ((6, 10), (5, 9)):  # odd sides too
        x = tensor(2, 8, height, width)
        ours, theirs = unet.Downsample2D(8), Downsample2D(8, use_conv=True, padding=1, name="op")
        same_weights(ours, theirs)
        assert relative_error(ours(x), theirs(x)) <= BOUND
        ours, theirs = vae.Downsample2D(8), Downsample2D(8, use_conv=True, padding=0, name="op")
        same_weights(ours, theirs)
        assert relative_error(ours(x), theirs(x)) <= BOUND
        ours, theirs = unet.Upsample2D(8), Upsample2D(8, use_conv=True)
        same_weights(ours, theirs)
        for size in ((2 * height, 2 * width), (2 * height - 1, 2 * width - 1)):
            assert relative_error(ours(x, size), theirs(x, size)) <= BOUND
        ours = vae.Upsample2D(8)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert relative_error(ours(x), theirs(x)) <= BOUND


@torch.no_grad()
def test_timesteps_and_their_embedding():
    t = torch.tensor([999, 981, 501, 21, 1, 0])
    expected = diffusers.models.embeddings.get_timestep_embedding(t, 320, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert relative_error(unet.timestep_embedding(t, 320), expected) <= 1e-6
    theirs = diffusers.models.embeddings.TimestepEmbedding(16, 64)
    ours = unet.TimestepEmbedding(16, 64)
    same_weights(ours, theirs)
    assert relative_error(ours(tensor(2, 16)), theirs(tensor(2, 16))) <= BOUND


@torch.no_grad()
@torch.no_grad()
@pytest.mark.parametrize("t", [500, np.int64(500), torch.tensor(500), torch.tensor([500])])
def test_one_timestep_is_that_of_the_whole_batch(t, models):
    x, context = tensor(2, 4, 8, 12), tensor(2, 32, 128)
    assert torch.equal(models.unet(x, t, context), models.unet(x, torch.tensor([500, 500]), context))


def test_timesteps_stay_exact_in_half_precision():
    """Angles in float16 would be off by up to 0.25 rad: as whole numbers do not show it, t is halfway between two."""
    t = torch.tensor([999.25])
    assert relative_error(unet.timestep_embedding(t, 64).double(), exact_embedding(999.25, 64)) <= 1e-4
    for dtype, most in ((torch.float16, 0.25), (torch.bfloat16, 2.0)):
        rounding = (torch.arange(512, 1000, 0.125).to(dtype).double() - torch.arange(512, 1000, 0.125)).abs().max()
        assert rounding == most


def exact_embedding(t, dim):
    """The closed form in double precision."""
    angles = t * 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    return torch.cat([angles.cos(), angles.sin()])[None]


# ----------------------------------------------------------------------------------------------- the VAE's bounds


@torch.no_grad()
def test_the_log_variance_is_bounded():
    """As the original code bounds it, on both sides."""
    ours, theirs = vae_pair("sd1")
    for model in (ours, theirs):
        model.quant_conv.bias[4:] = torch.tensor([-60.0, 0.0, 0.0, 40.0])
    picture = tensor(2, 3, 24, 40)
    (_, logvar), expected = ours.posterior(picture), theirs.encode(picture).latent_dist.logvar
    assert logvar.min() == -30 and logvar.max() == 20
    assert relative_error(logvar, expected) <= BOUND
