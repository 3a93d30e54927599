"""The VAE's decoding in strips of rows: equal to the plain one up to rounding, however many rows a strip has."""

import pytest
import torch
from conftest import relative_error
from test_parity import VAES, vae_pair

from vae import AutoencoderKL, VAEConfig
from weights import strips

BOUND = 1e-5


def in_strips(plain):
    """The same weights in the network that weights.load builds."""
    network = strips.AutoencoderKL(plain.config).eval()
    network.load_state_dict(plain.state_dict(), strict=True)
    return network


@pytest.mark.parametrize("kind", VAES)
@pytest.mark.parametrize("size", [(7, 5), (8, 12)])
@pytest.mark.parametrize("values", [1, 1500, 2**22])  # strips of one row; of some, the last ones shorter; one strip
@torch.no_grad()
def test_strips_are_the_plain_decoder(kind, size, values, monkeypatch):
    monkeypatch.setattr(strips, "LARGE", 0)
    monkeypatch.setattr(strips, "VALUES", values)
    plain, oracle = vae_pair(kind)
    x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(4))
    before = x.clone()
    found = in_strips(plain).decode(x)
    assert relative_error(found, plain.decode(x)) <= BOUND
    assert relative_error(found, oracle.decode(x / VAES[kind]["scaling_factor"]).sample) <= BOUND
    assert torch.equal(x, before)


@torch.no_grad()
def test_a_level_with_more_channels_than_the_one_before(monkeypatch):
    """No public model has one; a resnet's result then does not fit over its input."""
    monkeypatch.setattr(strips, "LARGE", 0)
    monkeypatch.setattr(strips, "VALUES", 900)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
    plain = AutoencoderKL(VAEConfig(block_out_channels=(48, 16, 32), norm_num_groups=8, **blocks)).eval()
    x = torch.randn(2, 4, 7, 5, generator=torch.Generator().manual_seed(4))
    assert relative_error(in_strips(plain).decode(x), plain.decode(x)) <= BOUND


@torch.no_grad()
def test_strips_in_half_precision(monkeypatch):
    """The rounding of bfloat16, 2^-8 per operation; the norms are computed in float32 on both sides."""
    monkeypatch.setattr(strips, "LARGE", 0)
    monkeypatch.setattr(strips, "VALUES", 1500)
    plain, _ = vae_pair("sd1")
    x = torch.randn(2, 4, 7, 5, generator=torch.Generator().manual_seed(4))
    exact, half = plain.decode(x), in_strips(plain).to(torch.bfloat16).decode(x)
    assert relative_error(half, exact) <= 2 * relative_error(plain.to(torch.bfloat16).decode(x), exact)


@torch.no_grad()
def test_large_batches_alone_are_decoded_in_strips(models, monkeypatch):
    """One picture at a time, where the batch has more pixels than LARGE."""
    shapes, decode = [], strips.decode
    monkeypatch.setattr(strips, "decode", lambda network, z: shapes.append(z.shape) or decode(network, z))
    x = torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(4))
    monkeypatch.setattr(strips, "LARGE", 3 * 32 * 48)
    plain = models.vae.decode(x)
    assert shapes == []
    monkeypatch.setattr(strips, "LARGE", 3 * 32 * 48 - 1)
    assert relative_error(models.vae.decode(x), plain) <= BOUND
    assert shapes == [(1, 4, 4, 6)] * 3


def test_moments_keep_their_digits(monkeypatch):
    """Far from zero, where E[x^2] - mean^2 has none left in float32."""
    monkeypatch.setattr(strips, "VALUES", 200)
    x = 1000 + torch.randn(2, 12, 9, 7, generator=torch.Generator().manual_seed(0))
    mean, var = strips.moments(x, 4, 1e-6)
    groups = x.double().reshape(2, 4, -1)
    assert (mean - groups.mean(2)).abs().max() <= 3e-4  # between two float32 numbers near 1000 lie 6e-5
    assert relative_error(var.double(), groups.var(2, correction=0)) <= 1e-5
