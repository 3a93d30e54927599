"""Cross-attention maps on a second, explicit path, and the words that their columns belong to.

The fused kernel in `attention.attend` never has the softmax map M in memory. Here M is computed again, from a
cross-attention's inputs and weights, in float32: softmax(q k^T / sqrt(D / h)), row n for image token n, column l for
text token l. `output_of` carries M on to the module's output, so that tests can hold it against the fused one.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from attention import Attention


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in float32, whatever the dtype of its weights is."""
    return F.linear(x.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())


def per_head(x: Tensor, heads: int) -> Tensor:
    """(B, N or L, D) -> (B, h, N or L, D/h)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def maps_of(attention: Attention, x: Tensor, context: Tensor) -> Tensor:
    """The softmax maps M of a cross-attention, without token weights: x (B, N, D), context (B, L, context_dim) ->
    (B, h, N, L), float32, each row summing to 1. Vaswani et al. 2017, equation 1."""
    q, k = (
        per_head(linear(layer, y), attention.heads) for layer, y in ((attention.to_q, x), (attention.to_k, context))
    )
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)


def output_of(attention: Attention, maps: Tensor, context: Tensor, token_weights: Tensor | None) -> Tensor:
    """The output (B, N, D) of a cross-attention from its maps (B, h, N, L): M diag(s) V, through to_out.
    `token_weights` is s (B, L), None for all 1."""
    v = per_head(linear(attention.to_v, context), attention.heads)  # (B, h, L, D/h)
    if token_weights is not None:
        maps = maps * token_weights[:, None, None, :].float()  # here the columns of M, in the fused path the rows of V
    return linear(attention.to_out[0], (maps @ v).transpose(1, 2).flatten(2))


def words_of(tokenizer, text: str) -> list[tuple[str, list[int]]]:
    """The words of a text in order, each with the positions of its tokens among the L; those beyond L are not there.

    Position 0 is the start token. The end token and the padding follow the last word.
    """
    ids = tokenizer(text, max_length=tokenizer.model_max_length, truncation=True).input_ids[1:-1]  # no start, no end
    added = tokenizer.get_added_vocab()  # each a word of its own, as in clip.token_weights
    words, begin = [], 0
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        if token.endswith("</w>") or token in added or i == len(ids) - 1:  # a word that is cut off has no end
            words.append((tokenizer.decode(ids[begin : i + 1]).strip(), list(range(1 + begin, 2 + i))))
            begin = i + 1
    return words
