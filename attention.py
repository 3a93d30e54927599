"""Attention, plain and reweightable, and the transformer that carries the text into the UNet.

Axes: B batch, C channels, H W height and width, N image tokens (N = H * W), L text tokens, D width, h heads.
Parameter names are those of the public diffusers files, so a checkpoint's keys are this module's keys.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Multi-head scaled dot-product attention: softmax(q k^T / sqrt(D / h)) v, head by head.

    q is (B, N, D), k and v are (B, L, D), the result is (B, N, D); D must be a multiple of `heads`. In self-attention
    L is N. With `causal`, token n sees only tokens 0..n. Source: Vaswani et al. 2017, equation 1 and section 3.2.2.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, h, N or L, D/h)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention (no context), or cross-attention from image tokens to text tokens with token weights.

    Args:
        dim: width D of the queries and of the result.
        context_dim: width of the context; None for self-attention.
        heads: number of heads h (diffusers calls it attention_head_dim, whatever that name says).
        bias: whether to_q, to_k, to_v have a bias; Stable Diffusion's UNet has none, its VAE has one.
        upcast: compute the attention in float32. SD 2.1's products q k^T exceed 65504, float16's largest number.
    """

    def __init__(self, dim: int, context_dim: int | None, heads: int, bias: bool = False, upcast: bool = False):
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])  # a list: the files say to_out.0

    def forward(self, x: Tensor, context: Tensor | None = None, token_weights: Tensor | None = None) -> Tensor:
        """x (B, N, D), context (B, L, context_dim) or None, token_weights (B, L) or None -> (B, N, D)

        A token weight s_l multiplies column l of every softmax map M, whose rows are not normalised again
        (prompt-to-prompt, Hertz et al. 2022, arXiv 2208.01626, section 3.2; MagicMix takes it over). Since
        (M diag(s)) V = M (diag(s) V), scaling the rows of V does the same and leaves the fused kernel in place.
        """
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        if token_weights is not None:
            v = v * token_weights[:, :, None].to(v.dtype)
        if self.upcast:
            q, k, v = q.float(), k.float(), v.float()
        return self.to_out[0](attend(q, k, v, self.heads).to(x.dtype))


class GEGLU(nn.Module):
    """(B, N, D) -> (B, N, inner): half of the projection gates the other half. Source: Shazeer 2020."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)  # the exact erf form: the tanh approximation differs by up to 5e-4


class FeedForward(nn.Module):
    """(B, N, D) -> (B, N, D) through 4 D gated units."""

    def __init__(self, dim: int):
        super().__init__()
        # The public models were trained with a dropout of rate 0 between the two; it keeps net.2 at index 2.
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each normalised before and added after."""

    def __init__(self, dim: int, context_dim: int, heads: int, upcast: bool):
        super().__init__()
        # eps 1e-5 is LayerNorm's default and what the public models were trained with.
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn1 = Attention(dim, None, heads, upcast=upcast)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.attn2 = Attention(dim, context_dim, heads, upcast=upcast)
        self.norm3 = nn.LayerNorm(dim, eps=1e-5)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor, token_weights: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, token_weights)
        return x + self.ff(self.norm3(x))


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, D), row by row of the picture; D = C."""
    return x.flatten(2).transpose(1, 2)


def to_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, N, D) -> (B, C, H, W), size = (H, W): the inverse of to_tokens."""
    return x.transpose(1, 2).unflatten(2, size)


class Transformer2DModel(nn.Module):
    """(B, C, H, W) -> (B, C, H, W): the feature map as N = H * W tokens of width D = C through `depth` blocks.

    `linear` projects in and out with linear layers (SD2) instead of 1 x 1 convolutions (SD1): the same
    arithmetic, weights of another rank.
    """

    def __init__(
        self, channels: int, context_dim: int, heads: int, depth: int, groups: int, linear: bool, upcast: bool
    ):
        super().__init__()
        # eps 1e-6 here, unlike the UNet's resnets (1e-5): a fact of the public models.
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.linear = linear
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, context_dim, heads, upcast) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor, token_weights: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        y = self.proj_in(to_tokens(y)) if self.linear else to_tokens(self.proj_in(y))  # (B, N, D)
        for block in self.transformer_blocks:
            y = block(y, context, token_weights)
        size = x.shape[2:]
        y = to_map(self.proj_out(y), size) if self.linear else self.proj_out(to_map(y, size))  # (B, C, H, W)
        return x + y
