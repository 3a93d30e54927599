"""Reweighting through value rows equals reweighting the softmax map; see also the whole loop in test_magicmix.py."""

import torch
from conftest import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import Attention


def explicit(layer: Attention, x, context, s):
    """The same layer with its softmax map in the open: column l times s_l, rows not renormalised."""
    heads = lambda y: y.unflatten(-1, (layer.heads, -1)).transpose(1, 2)
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
def test_upcast_survives_what_overflows_half_precision():
    """SD 2.1's reason for upcast_attention: query-key products beyond 65504."""
    torch.manual_seed(0)
    layer = Attention(32, None, heads=1, upcast=True).to(torch.bfloat16)
    exact = Attention(32, None, heads=1)
    exact.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(1, 9, 32).to(torch.bfloat16)
    # bfloat16 keeps 8 bits; with the attention itself in float32 the projections' rounding is all that is left.
    assert relative_error(layer(x).float(), exact(x.float())) <= 2e-2
