"""The CLIP text transformer: prompts to the states that condition the UNet, and to the weights of their tokens.

SD1 uses the text tower of CLIP ViT-L/14 (quick_gelu, 12 layers). SD2 uses that of OpenCLIP ViT-H/14 (gelu, the first
23 of its 24 layers, which its config simply calls 23 layers). Both read the last layer after the final norm.
Parameter names are those of the public text_encoder files. Source: Radford et al. 2021, section 2.4.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import attend

# quick_gelu is the sigmoid approximation that OpenAI trained with; it differs from exact gelu by up to 0.02.
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """The fields of text_encoder/config.json that shape the network; defaults are SD1's (CLIP ViT-L/14).

    Raises ValueError for values that do not make a network.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not known; use one of {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {heads}")


class CLIPEmbeddings(nn.Module):
    """input_ids (B, L) -> (B, L, D): each token's embedding and its position's."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        # Positions are 0..L-1 by definition; a position_ids tensor in a file is never read (merges corrupt it).
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class CLIPAttention(nn.Module):
    """(B, L, D) -> (B, L, D): causal self-attention."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        # Causal: a token sees itself and what stands before it, so the end token has read the whole prompt. No
        # padding mask: Stable Diffusion was trained with the states of all L positions, padding included.
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


class CLIPMLP(nn.Module):
    """(B, L, D) -> (B, L, D) through intermediate_size units."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    """(B, L, D) -> (B, L, D): attention and MLP, each normalised before and added after."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CLIPAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPTextTransformer(nn.Module):
    """input_ids (B, L) -> states (B, L, D) after the final norm."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = CLIPEmbeddings(config)
        self.encoder = nn.Module()  # the files say encoder.layers.N
        self.encoder.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embeddings(input_ids)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.final_layer_norm(x)


class CLIPTextModel(nn.Module):
    """input_ids (B, L) of int64 in 0..vocab_size-1, L at most max_position_embeddings -> states (B, L, D)."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.text_model(input_ids)


# ------------------------------------------------------------------------------------------------ prompts and tokens
# `tokenizer` is transformers' CLIPTokenizerFast; its model_max_length is L.


def encode_prompts(tokenizer, encoder: CLIPTextModel, prompts: list[str]) -> Tensor:
    """Prompts -> text states (B, L, D), each prompt padded or cut to L tokens."""
    length = tokenizer.model_max_length
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoder(tokens.input_ids.to(encoder.text_model.final_layer_norm.weight.device))


def token_weights(tokenizer, prompt: str, words: dict[str, float]) -> Tensor:
    """word -> s as the weight of every token of the prompt: (L,), 1 where no word was chosen.

    A word (or several: "coffee machine") is found by its token ids, at every place where it begins a word.
    Raises ValueError for a word without tokens or not in the prompt, listing the words that are.
    """
    length = tokenizer.model_max_length
    ids = tokenizer(prompt, max_length=length, truncation=True).input_ids[1:-1]  # without start and end token
    added = tokenizer.get_added_vocab()  # those of textual inversions are words, without CLIP's mark of an end
    ends = [token.endswith("</w>") or token in added for token in tokenizer.convert_ids_to_tokens(ids)]
    begins = [i == 0 or ends[i - 1] for i in range(len(ids))]
    weights = torch.ones(length)
    for word, s in words.items():
        tokens = tokenizer(word, add_special_tokens=False).input_ids
        places = [i for i in range(len(ids)) if tokens and begins[i] and ids[i : i + len(tokens)] == tokens]
        if not places:
            there = ", ".join(tokenizer.decode(ids).split()) or "(none)"
            raise ValueError(f"token weight: {word!r} is not in the prompt; its words are: {there}")
        for i in places:
            weights[1 + i : 1 + i + len(tokens)] = s  # 1 +: the start token
    return weights


def cut_off(tokenizer, prompt: str) -> str:
    """The end of a prompt that lies beyond L tokens and is not read; "" for most prompts."""
    encoded = tokenizer(prompt, return_offsets_mapping=True, verbose=False)  # no warning: it is what is asked here
    places = encoded.offset_mapping[1:-1]  # without start and end token
    unread = places[tokenizer.model_max_length - 2 :]
    return prompt[unread[0][0] :] if unread else ""
