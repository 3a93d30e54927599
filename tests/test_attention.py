"""Attention: token weights equal a softmax map with weighted columns; products that overflow float16 are survived."""

import pytest
import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention import Attention, attend


def explicit(layer: Attention, x, context, s):
    """The same layer with its softmax map in the open: column l times s_l, rows not normalised again."""

    def heads(y):
        return y.unflatten(-1, (layer.heads, -1)).transpose(1, 2)

    q, k, v = heads(layer.to_q(x)), heads(layer.to_k(context)), heads(layer.to_v(context))
    m = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)  # (B, h, N, L)
    return layer.to_out[0](((m * s[:, None, None, :]) @ v).transpose(1, 2).flatten(2))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=7, max_size=7), st.integers(0, 2**31))
@torch.no_grad()
def test_weights_scale_the_columns_of_the_map(s, seed):
    torch.manual_seed(seed)
    layer = Attention(32, 24, heads=4)
    x, context = torch.randn(2, 15, 32), torch.randn(2, 7, 24)
    weights = torch.stack([torch.ones(7), torch.tensor(s)])
    kept = context.clone(), weights.clone()
    assert relative_error(layer(x, context, weights), explicit(layer, x, context, weights)) <= 1e-5
    assert torch.equal(context, kept[0]) and torch.equal(weights, kept[1])


@torch.no_grad()
def test_weights_of_one_change_nothing():
    torch.manual_seed(0)
    layer = Attention(32, 24, heads=4)
    x, context = torch.randn(2, 15, 32), torch.randn(2, 7, 24)
    assert torch.equal(layer(x, context, torch.ones(2, 7)), layer(x, context))


@torch.no_grad()
def test_a_causal_token_sees_nothing_after_it():
    q, k, v = (torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    whole = attend(q, k, v, heads=2, causal=True)
    for n in range(1, 7):  # the same tokens, and none after them
        assert relative_error(whole[:, :n], attend(q[:, :n], k[:, :n], v[:, :n], heads=2, causal=True)) <= 1e-6


@pytest.fixture
def half_precision_products():
    """CPUs compute half-precision attention in float32; with this, as GPUs may, in the inputs' own precision."""
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)


@torch.no_grad()
def test_upcast_survives_products_beyond_float16(half_precision_products):
    """SD 2.1's reason for upcast_attention: products of queries and keys above 65504, the largest float16."""
    torch.manual_seed(0)
    layers = {upcast: Attention(32, 24, heads=2, upcast=upcast) for upcast in (False, True)}
    layers[True].to_q.weight.mul_(1500), layers[True].to_k.weight.mul_(1500)
    layers[False].load_state_dict(layers[True].state_dict(), strict=True)
    x, context = torch.randn(2, 9, 32).half(), torch.randn(2, 7, 24).half()
    plain, upcast = layers[False].half(), layers[True].half()
    q, k = upcast.to_q(x).float(), upcast.to_k(context).float()
    assert q.isfinite().all() and k.isfinite().all() and (q[:, :, :16] @ k[:, :, :16].mT).abs().max() / 4 > 65504
    assert not plain(x, context).isfinite().all(), "without upcast it overflows"
    exact = Attention(32, 24, heads=2)
    exact.load_state_dict({name: p.float() for name, p in upcast.state_dict().items()}, strict=True)
    # What is left is float16's rounding of q and k, which moves such steep maps, so v alone is compared.
    exact.to_q, exact.to_k = torch.nn.Identity(), torch.nn.Identity()
    expected = exact.to_out[0](attend(q, k, exact.to_v(context.float()), heads=2))
    assert relative_error(upcast(x, context).float(), expected) <= 2e-3
