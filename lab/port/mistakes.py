"""What a port gets wrong, each as a change to the reference's own modules, and the output that must be named first.

A mistake is a function of the kit's checkpoints, which it may replace, and of `change`(object, attribute, value), which
lasts as long as the mistake is made. Its docstring is what the checker says of it.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

import attention
import clip
import magicmix as program
import scheduler
import unet
import vae
from command import pictures
from command.options import Options
from weights import Checkpoint

Checkpoints = dict[str, Checkpoint]
Change = Callable[[object, str, object], None]
Mistake = Callable[[Checkpoints, Change], None]

# mistake -> the output that must be named first; None where no number of the kit can show it, for the reason given
MISTAKES: dict[Mistake, str | None] = {}


def shows_at(output: str | None) -> Callable[[Mistake], Mistake]:
    """Puts a mistake on the list."""

    def add(mistake: Mistake) -> Mistake:
        MISTAKES[mistake] = output
        return mistake

    return add


def text_of(mistake: Mistake) -> str:
    return " ".join(mistake.__doc__.split()).rstrip(".")


@contextlib.contextmanager
def made(mistake: Mistake, checkpoints: Checkpoints) -> Iterator[Checkpoints]:
    """Within it the reference makes the mistake, with the checkpoints that it gives."""
    with contextlib.ExitStack() as stack:
        checkpoints = dict(checkpoints)
        mistake(checkpoints, lambda target, name, value: stack.enter_context(mock.patch.object(target, name, value)))
        yield checkpoints


def modules(checkpoints: Checkpoints, part: str, kind: type) -> list[nn.Module]:
    """All modules of a kind in a part of both models."""
    return [m for models in checkpoints.values() for m in getattr(models, part).modules() if isinstance(m, kind)]


# ------------------------------------------------------------------------------------------------------------ tokens


class OtherTokenizer:
    """A tokenizer whose ids are changed afterwards."""

    def __init__(self, tokenizer, change_ids: Callable[[Tensor], None]):
        self.tokenizer, self.change_ids = tokenizer, change_ids

    def __call__(self, *arguments, **more):
        encoded = self.tokenizer(*arguments, **more)
        if isinstance(encoded.input_ids, Tensor):
            self.change_ids(encoded.input_ids)
        return encoded

    def __getattr__(self, name: str):
        return getattr(self.tokenizer, name)


@shows_at("tiny/tokens/ids")
def end_cut_off(checkpoints, change):
    """A prompt that is too long is cut without an end token."""
    for name, models in checkpoints.items():

        def cut(ids, end=models.tokenizer.eos_token_id):
            ids[:, -1][ids[:, -2] != end] = ids[:, -2][ids[:, -2] != end]

        checkpoints[name] = dataclasses.replace(models, tokenizer=OtherTokenizer(models.tokenizer, cut))


@shows_at("sd2/tokens/ids")
def end_token_as_padding(checkpoints, change):
    """SD2's prompts are padded with the end token, not with "!"."""
    models = checkpoints["sd2"]

    def pad(ids, end=models.tokenizer.eos_token_id):
        for row in ids:
            row[(row == end).nonzero()[0] :] = end

    checkpoints["sd2"] = dataclasses.replace(models, tokenizer=OtherTokenizer(models.tokenizer, pad))


@shows_at("tiny/tokens/weights/0")
def weights_one_early(checkpoints, change):
    """A token weight stands one place too early: the start token is forgotten."""
    right = clip.token_weights
    change(clip, "token_weights", lambda *arguments: right(*arguments).roll(-1))


@shows_at("tiny/tokens/weights/0")
def first_place_alone(checkpoints, change):
    """Only the first place of a word gets its token weight."""
    right = clip.token_weights

    def first(tokenizer, prompt, words):
        weights = right(tokenizer, prompt, words)
        changed = (weights != 1).nonzero().flatten()
        weights[changed[1:]] = 1
        return weights

    change(clip, "token_weights", first)


# ---------------------------------------------------------------------------------------------------------- schedule


@shows_at("tiny/schedule/50/abar")
def abar_0_is_1(checkpoints, change):
    """abar_0 is 1, not alphas_cumprod[0] ("set_alpha_to_one": false)."""
    right = scheduler.Schedule.abar
    change(scheduler.Schedule, "abar", lambda self, k: right(self, k) if k else torch.tensor(1.0))


def with_schedule(checkpoints: Checkpoints, **fields) -> None:
    for name, models in checkpoints.items():
        checkpoints[name] = dataclasses.replace(models, schedule=dataclasses.replace(models.schedule, **fields))


@shows_at("tiny/schedule/50/t")
def steps_offset_0(checkpoints, change):
    """steps_offset 0 for 1."""
    with_schedule(checkpoints, steps_offset=0)


@shows_at("tiny/schedule/50/abar")
def betas_linear(checkpoints, change):
    """betas linear, not linear in their square roots ("scaled_linear")."""
    with_schedule(checkpoints, beta_schedule="linear")


@shows_at("tiny/schedule/50/t")
def spacing_of_linspace(checkpoints, change):
    """Timesteps from linspace over all of them, not with "leading" spacing."""
    right = scheduler.Schedule.__init__

    def init(self, config, steps):
        right(self, config, steps)
        self.t = [0, *np.linspace(0, config.num_train_timesteps - 1, steps).round().astype(int).tolist()]

    change(scheduler.Schedule, "__init__", init)


@shows_at("tiny/schedule/K")
def K_by_floor(checkpoints, change):
    """K_max and K_min rounded down."""
    for name in ("K_max", "K_min"):
        change(Options, name, property(lambda self, name=name: int(getattr(self, name.lower()) * self.steps)))


@shows_at("tiny/schedule/K")
def K_half_up(checkpoints, change):
    """Halves of K_max and K_min rounded up, not to the even neighbour."""
    for name in ("K_max", "K_min"):
        change(Options, name, property(lambda self, name=name: int(getattr(self, name.lower()) * self.steps + 0.5)))


@shows_at("tiny/noise/square")
def neighbours_paired(checkpoints, change):
    """Box-Muller on neighbours, not on numbers that stand 8 apart."""
    right = program.Noise.__call__

    def call(self):
        noise = right(self)
        pairs = noise.flatten()[: noise.numel() // 16 * 16].view(-1, 2, 8).transpose(1, 2).flatten()
        return torch.cat([pairs, noise.flatten()[len(pairs) :]]).view_as(noise)

    change(program.Noise, "__call__", call)


# ----------------------------------------------------------------------------------------------------------- sampler


@shows_at("sd2/sampler/x0")
def v_as_epsilon(checkpoints, change):
    """The output is taken for epsilon where it is v."""
    models = checkpoints["sd2"]
    schedule = dataclasses.replace(models.schedule, prediction_type="epsilon")
    checkpoints["sd2"] = dataclasses.replace(models, schedule=schedule)


@shows_at("sd2/sampler/x0")
def v_of_the_other_sign(checkpoints, change):
    """v = b x0 - a eps, the other sign."""
    right = scheduler.Schedule.predict
    signs = {"epsilon": 1, "v_prediction": -1}
    change(
        scheduler.Schedule, "predict", lambda self, x, e, k: right(self, x, signs[self.config.prediction_type] * e, k)
    )


@shows_at("tiny/sampler/ddim_eta_1")
def sigma_left_in(checkpoints, change):
    """DDIM with eta: the direction's factor is sqrt(1 - abar), without sigma^2."""

    def ddim(self, x, output, k, eta=0.0, noise=None):
        abar, abar_prev = self.abar(k), self.abar(k - 1)
        x0, eps = self.predict(x, output, k)
        sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)) ** 0.5
        x_prev = abar_prev**0.5 * x0 + (1 - abar_prev) ** 0.5 * eps
        return (x_prev + sigma * noise if eta > 0 else x_prev), x0

    change(scheduler.Schedule, "ddim", ddim)


@shows_at("tiny/sampler/ddpm")
def variance_is_beta(checkpoints, change):
    """DDPM with the variance beta, not the posterior's."""

    def ddpm(self, x, output, k, noise):
        abar, abar_prev = self.abar(k), self.abar(k - 1) if k > 1 else torch.tensor(1.0)
        alpha = abar / abar_prev
        x0, _ = self.predict(x, output, k)
        mean = abar_prev**0.5 * (1 - alpha) / (1 - abar) * x0 + alpha**0.5 * (1 - abar_prev) / (1 - abar) * x
        return mean + (1 - alpha) ** 0.5 * noise * (k > 1), x0

    change(scheduler.Schedule, "ddpm", ddpm)


RIGHT_DDPM = scheduler.Schedule.ddpm


def to_abar_0(schedule: scheduler.Schedule, x: Tensor, output: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """DDPM's last step as if it were one of the others."""
    abar, abar_prev, (x0, _) = schedule.abar(1), schedule.abar(0), schedule.predict(x, output, 1)
    alpha = abar / abar_prev
    mean = abar_prev**0.5 * (1 - alpha) / (1 - abar) * x0 + alpha**0.5 * (1 - abar_prev) / (1 - abar) * x
    return mean + ((1 - abar_prev) / (1 - abar) * (1 - alpha)) ** 0.5 * noise, x0


@shows_at("tiny/sampler/ddpm")
def ddpm_ends_at_abar_0(checkpoints, change):
    """DDPM's last step ends at abar_0, as DDIM's does, not at 1."""
    change(
        scheduler.Schedule,
        "ddpm",
        lambda self, x, e, k, noise: RIGHT_DDPM(self, x, e, k, noise) if k > 1 else to_abar_0(self, x, e, noise),
    )


@shows_at("tiny/sampler/ddpm")
def ddpm_ends_at_abar_0_without_noise(checkpoints, change):
    """DDPM's last step ends at abar_0, without noise; it ends at 1."""
    change(
        scheduler.Schedule,
        "ddpm",
        lambda self, x, e, k, noise: RIGHT_DDPM(self, x, e, k, noise) if k > 1 else to_abar_0(self, x, e, 0 * noise),
    )


@shows_at("tiny/sampler/add_noise")
def variance_for_deviation(checkpoints, change):
    """Noise with the factor 1 - abar, not its square root."""
    change(
        scheduler.Schedule,
        "add_noise",
        lambda self, x0, eps, k: self.abar(k) ** 0.5 * x0 + (1 - self.abar(k)) * eps if k else x0,
    )


# ------------------------------------------------------------------------------------------------- norms, activations


@shows_at("tiny/units/text_encoder/text_model.encoder.layers.0.layer_norm1/quiet")
def clip_layer_norm_eps(checkpoints, change):
    """LayerNorm eps 1e-6 for 1e-5 in the text encoder."""
    for module in modules(checkpoints, "text_encoder", nn.LayerNorm):
        change(module, "eps", 1e-6)


@shows_at("tiny/units/unet/down_blocks.1.resnets.0.norm1/quiet")
def resnet_eps(checkpoints, change):
    """GroupNorm eps 1e-6 for 1e-5 in the UNet's resnets and at its end."""
    for block in modules(checkpoints, "unet", unet.ResnetBlock2D):
        change(block.norm1, "eps", 1e-6)
        change(block.norm2, "eps", 1e-6)
    for network in modules(checkpoints, "unet", unet.UNet2DConditionModel):
        change(network.conv_norm_out, "eps", 1e-6)


@shows_at("tiny/units/unet/down_blocks.1.attentions.0.norm/quiet")
def transformer_eps(checkpoints, change):
    """GroupNorm eps 1e-5 for 1e-6 in the UNet's transformers."""
    for module in modules(checkpoints, "unet", attention.Transformer2DModel):
        change(module.norm, "eps", 1e-5)


@shows_at("tiny/units/unet/down_blocks.1.attentions.0.transformer_blocks.0.norm1/quiet")
def block_eps(checkpoints, change):
    """LayerNorm eps 1e-6 for 1e-5 in the UNet's transformers."""
    for module in modules(checkpoints, "unet", nn.LayerNorm):
        change(module, "eps", 1e-6)


@shows_at("tiny/units/vae/encoder.down_blocks.2.resnets.0.norm1/quiet")
def vae_eps(checkpoints, change):
    """GroupNorm eps 1e-5 for 1e-6 in the autoencoder."""
    for module in modules(checkpoints, "vae", nn.GroupNorm):
        change(module, "eps", 1e-5)


def grouped(module: nn.GroupNorm, x: Tensor, normalise: Callable[[Tensor], Tensor]) -> Tensor:
    """A GroupNorm with another normalisation of (B, groups, values)."""
    y = normalise(x.flatten(2).reshape(len(x), module.num_groups, -1)).view_as(x)
    return y * module.weight[:, None, None] + module.bias[:, None, None]


@shows_at("tiny/units/unet/down_blocks.1.resnets.0.norm1")
def group_variance(checkpoints, change):
    """GroupNorm with the variance over n - 1."""
    change(
        nn.GroupNorm,
        "forward",
        lambda self, x: grouped(
            self, x, lambda y: (y - y.mean(-1, True)) / (y.var(-1, correction=1, keepdim=True) + self.eps) ** 0.5
        ),
    )


@shows_at("tiny/units/unet/down_blocks.1.resnets.0.norm1/quiet")
def eps_on_the_deviation(checkpoints, change):
    """GroupNorm with its eps added to the standard deviation, not to the variance."""
    change(
        nn.GroupNorm,
        "forward",
        lambda self, x: grouped(
            self, x, lambda y: (y - y.mean(-1, True)) / (y.std(-1, correction=0, keepdim=True) + self.eps)
        ),
    )


@shows_at("tiny/units/unet/down_blocks.1.resnets.0.norm1")
def groups_of_channels(checkpoints, change):
    """The groups of a GroupNorm taken across the channels: channel c in the group c mod groups."""

    def forward(self, x):
        order = torch.arange(x.shape[1]).view(-1, self.num_groups).T.flatten()
        back = order.argsort()
        y = F.group_norm(x[:, order], self.num_groups, eps=self.eps)[:, back]
        return y * self.weight[:, None, None] + self.bias[:, None, None]

    change(nn.GroupNorm, "forward", forward)


@shows_at("tiny/units/text_encoder/text_model.encoder.layers.0.layer_norm1")
def layer_variance(checkpoints, change):
    """LayerNorm with the variance over n - 1."""
    change(
        nn.LayerNorm,
        "forward",
        lambda self, x: (x - x.mean(-1, True)) / (x.var(-1, keepdim=True) + self.eps) ** 0.5 * self.weight + self.bias,
    )


@shows_at("tiny/units/text_encoder/text_model.encoder.layers.0.mlp")
def gelu_for_quick_gelu(checkpoints, change):
    """Exact gelu for quick_gelu."""
    for module in modules({"tiny": checkpoints["tiny"]}, "text_encoder", clip.CLIPMLP):
        change(module, "act", F.gelu)


@shows_at("sd2/units/text_encoder/text_model.encoder.layers.0.mlp")
def quick_gelu_for_gelu(checkpoints, change):
    """quick_gelu for exact gelu."""
    for module in modules({"sd2": checkpoints["sd2"]}, "text_encoder", clip.CLIPMLP):
        change(module, "act", clip.ACTIVATIONS["quick_gelu"])


@shows_at("sd2/units/text_encoder/text_model.encoder.layers.0.mlp")
def tanh_gelu_in_clip(checkpoints, change):
    """gelu by its tanh approximation in the text encoder."""
    for module in modules({"sd2": checkpoints["sd2"]}, "text_encoder", clip.CLIPMLP):
        change(module, "act", partial(F.gelu, approximate="tanh"))


@shows_at("tiny/units/unet/down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0")
def tanh_gelu_in_geglu(checkpoints, change):
    """gelu by its tanh approximation in GEGLU."""

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate, approximate="tanh")

    change(attention.GEGLU, "forward", forward)


@shows_at("tiny/units/unet/down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0")
def geglu_swapped(checkpoints, change):
    """GEGLU with its halves swapped."""

    def forward(self, x):
        gate, value = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)

    change(attention.GEGLU, "forward", forward)


@shows_at("tiny/units/unet/down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0")
def silu_in_geglu(checkpoints, change):
    """silu for gelu in GEGLU (SwiGLU)."""

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.silu(gate)

    change(attention.GEGLU, "forward", forward)


# ------------------------------------------------------------------------------------------ layers and their weights


@shows_at("tiny/units/text_encoder/text_model.encoder.layers.0.self_attn")
def not_transposed(checkpoints, change):
    """Square linear layers with their weights not transposed."""
    for part in ("text_encoder", "unet", "vae"):
        for module in modules(checkpoints, part, nn.Linear):
            if module.in_features == module.out_features:
                change(module, "weight", nn.Parameter(module.weight.T.contiguous(), requires_grad=False))


def with_kernels(checkpoints: Checkpoints, change: Change, turned: Callable[[Tensor], Tensor]) -> None:
    for part in ("unet", "vae"):
        for module in modules(checkpoints, part, nn.Conv2d):
            change(module, "weight", nn.Parameter(turned(module.weight).contiguous(), requires_grad=False))


@shows_at("tiny/units/unet/down_blocks.1.resnets.0")
def kernels_swapped(checkpoints, change):
    """Convolution kernels with height and width swapped."""
    with_kernels(checkpoints, change, lambda kernel: kernel.transpose(2, 3))


@shows_at("tiny/units/unet/down_blocks.1.resnets.0")
def kernels_flipped(checkpoints, change):
    """Convolution kernels turned by 180 degrees: a convolution, where the networks have a correlation."""
    with_kernels(checkpoints, change, lambda kernel: kernel.flip(2, 3))


def rounded(x: Tensor, bits: int) -> Tensor:
    """float32 with so many bits of mantissa, rounded to the nearest."""
    step = 1 << (23 - bits)
    return (((x.float().view(torch.int32) + step // 2) // step) * step).view(torch.float32)


def with_products(change: Change, bits: int) -> None:
    for name in ("linear", "conv2d"):
        right = getattr(F, name)
        change(F, name, lambda x, w, *more, right=right: right(rounded(x, bits), rounded(w, bits), *more))


@shows_at("tiny/units/text_encoder/text_model.encoder.layers.0.self_attn")
def tf32(checkpoints, change):
    """Matrix products with 10 bits of mantissa (TF32)."""
    with_products(change, 10)


@shows_at("tiny/units/text_encoder/text_model.encoder.layers.0.self_attn")
def bfloat16(checkpoints, change):
    """Matrix products with 7 bits of mantissa (bfloat16)."""
    with_products(change, 7)


@shows_at("tiny/units/unet/down_blocks.1.downsamplers.0")
def same_padding(checkpoints, change):
    """ "SAME" padding in the UNet's downsampling: on an even side, right and below only."""

    def forward(self, x):
        height, width = x.shape[2:]
        padded = F.pad(x, (width % 2, 1, height % 2, 1))
        return F.conv2d(padded, self.conv.weight, self.conv.bias, stride=2)

    change(unet.Downsample2D, "forward", forward)


@shows_at("tiny/units/vae/encoder.down_blocks.2.downsamplers.0")
def symmetric_padding(checkpoints, change):
    """All four sides padded in the autoencoder's downsampling, not right and below only."""
    change(
        vae.Downsample2D,
        "forward",
        lambda self, x: F.conv2d(x, self.conv.weight, self.conv.bias, stride=2, padding=1),
    )


@shows_at("tiny/units/unet/up_blocks.0.upsamplers.0")
def bilinear_upsampling(checkpoints, change):
    """Upsampling by bilinear interpolation, not by the nearest neighbour."""
    change(
        unet.Upsample2D,
        "forward",
        lambda self, x, size: self.conv(F.interpolate(x, size=size, mode="bilinear", align_corners=False)),
    )


@shows_at("tiny/units/unet/up_blocks.0.upsamplers.0")
def upsampling_from_the_end(checkpoints, change):
    """An odd size cut off at the left and at the top after upsampling, not at the right and below."""

    def forward(self, x, size):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest")[:, :, -size[0] :, -size[1] :])

    change(unet.Upsample2D, "forward", forward)


# ------------------------------------------------------------------------------------------------------ text encoder


@shows_at("tiny/units/text_encoder/text_model.embeddings")
def positions_from_1(checkpoints, change):
    """Positions counted from 1."""

    def forward(self, ids):
        return self.token_embedding(ids) + self.position_embedding.weight.roll(-1, 0)[: ids.shape[1]]

    change(clip.CLIPEmbeddings, "forward", forward)


@shows_at("tiny/units/text_encoder/text_model.encoder.layers.0.self_attn")
def no_causal_mask(checkpoints, change):
    """No causal mask in the text encoder."""
    change(clip, "attend", lambda q, k, v, heads, causal: attention.attend(q, k, v, heads))


@shows_at("tiny/units/text_encoder/text_model.final_layer_norm")
def no_final_norm(checkpoints, change):
    """The text encoder's final LayerNorm left out."""
    for models in checkpoints.values():
        change(models.text_encoder.text_model.final_layer_norm, "forward", lambda x: x)


@shows_at("tiny/taps/text/text_model.final_layer_norm")
def last_layer_left_out(checkpoints, change):
    """The text encoder's last layer left out ("clip skip")."""

    def forward(self, ids):
        x = self.embeddings(ids)
        for layer in self.encoder.layers[:-1]:
            x = layer(x)
        return self.final_layer_norm(x)

    change(clip.CLIPTextTransformer, "forward", forward)


@shows_at("tiny/taps/text/text_model.encoder.layers.0.self_attn.q_proj")
def norm_behind(checkpoints, change):
    """Each block of the text encoder normalised behind, not before."""

    def forward(self, x):
        x = self.layer_norm1(x + self.self_attn(x))
        return self.layer_norm2(x + self.mlp(x))

    change(clip.CLIPEncoderLayer, "forward", forward)


# ---------------------------------------------------------------------------------------------- the time and the UNet


def with_embedding(change: Change, embedding: Callable[[Tensor, Tensor], Tensor], last: int = 0) -> None:
    """embedding(t, frequencies); `last` is taken from the number that the exponents are divided by."""

    def timestep_embedding(t, dim):
        half = dim // 2
        return embedding(t.float(), 10000 ** (-torch.arange(half, dtype=torch.float32) / (half - last)))

    change(unet, "timestep_embedding", timestep_embedding)


@shows_at("tiny/units/unet/time_proj")
def sine_first(checkpoints, change):
    """Sines before cosines in the timestep's embedding."""
    with_embedding(change, lambda t, f: torch.cat([(t[:, None] * f).sin(), (t[:, None] * f).cos()], dim=-1))


@shows_at("tiny/units/unet/time_proj")
def freq_shift_1(checkpoints, change):
    """freq_shift 1: exponents divided by dim/2 - 1."""
    with_embedding(change, lambda t, f: torch.cat([(t[:, None] * f).cos(), (t[:, None] * f).sin()], dim=-1), last=1)


@shows_at("tiny/units/unet/time_proj")
def half_precision_angles(checkpoints, change):
    """The angles of the timestep's embedding in float16."""
    halves = lambda angles: torch.cat([angles.cos(), angles.sin()], dim=-1)
    with_embedding(change, lambda t, f: halves((t[:, None] * f).half().float()))


@shows_at("tiny/units/unet/time_proj")
def interleaved(checkpoints, change):
    """Cosines and sines in turns, not one half each."""
    turns = lambda angles: torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)
    with_embedding(change, lambda t, f: turns(t[:, None] * f))


@shows_at("tiny/units/unet/down_blocks.1.resnets.0")
def time_without_silu(checkpoints, change):
    """No silu on the time before a resnet's time_emb_proj."""

    def forward(self, x, time):
        y = self.conv1(F.silu(self.norm1(x)))
        y = y + self.time_emb_proj(time)[:, :, None, None]
        return self.conv2(F.silu(self.norm2(y))) + self.conv_shortcut(x)

    change(unet.ResnetBlock2D, "forward", forward)


@shows_at("tiny/units/unet/down_blocks.1.resnets.0")
def time_behind_the_norm(checkpoints, change):
    """The time added behind a resnet's second norm, not before it."""

    def forward(self, x, time):
        y = self.norm2(self.conv1(F.silu(self.norm1(x)))) + self.time_emb_proj(F.silu(time))[:, :, None, None]
        return self.conv2(F.silu(y)) + self.conv_shortcut(x)

    change(unet.ResnetBlock2D, "forward", forward)


@shows_at("tiny/taps/square/up_blocks.0.resnets.0.norm1")
def skip_first(checkpoints, change):
    """The skip before x in the concatenation."""

    def forward(self, x, skips, size, time, context, token_weights):
        for resnet, transformer, skip in zip(self.resnets, self.attentions, skips, strict=True):
            x = transformer(resnet(torch.cat([skip, x], dim=1), time), context, token_weights)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x

    change(unet.UpBlock, "forward", forward)


# --------------------------------------------------------------------------------------------------------- attention


@shows_at("tiny/units/unet/down_blocks.1.attentions.0.transformer_blocks.0.attn1")
def heads_as_width(checkpoints, change):
    """attention_head_dim read as the width of a head; it is their number."""
    for module in modules(checkpoints, "unet", attention.Attention):
        change(module, "heads", module.to_q.out_features // module.heads)


@shows_at("tiny/units/unet/down_blocks.1.attentions.0.transformer_blocks.0.attn1")
def scale_of_the_width(checkpoints, change):
    """Attention scaled by 1 / sqrt(D), not by 1 / sqrt(D / h)."""
    change(attention, "attend", lambda q, k, v, heads: RIGHT_ATTEND(q / heads**0.5, k, v, heads))


@shows_at("tiny/units/unet/down_blocks.1.attentions.0.transformer_blocks.0.attn1")
def heads_in_turns(checkpoints, change):
    """Channel c of an attention in the head c mod h, not c // (D / h)."""

    def attend(q, k, v, heads):
        split = lambda x: x.unflatten(-1, (-1, heads)).transpose(-1, -2).flatten(-2)
        merged = RIGHT_ATTEND(split(q), split(k), split(v), heads)
        return merged.unflatten(-1, (heads, -1)).transpose(-1, -2).flatten(-2)

    change(attention, "attend", attend)


RIGHT_ATTEND = attention.attend


@shows_at("tiny/units/unet/down_blocks.1.attentions.0.transformer_blocks.0.attn2")
def maps_normalised_again(checkpoints, change):
    """The rows of a weighted cross-attention map normalised again."""

    def forward(self, x, context=None, token_weights=None):
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        if token_weights is None:
            return self.to_out[0](attention.attend(q, k, v, self.heads))
        s = token_weights[:, :, None].to(v.dtype)
        row_sums = attention.attend(q, k, s.expand_as(v), self.heads)
        return self.to_out[0](attention.attend(q, k, v * s, self.heads) / row_sums)

    change(attention.Attention, "forward", forward)


@shows_at("tiny/units/unet/down_blocks.1.attentions.0.transformer_blocks.0.attn2")
def weights_on_the_keys(checkpoints, change):
    """Token weights on the keys, before the softmax."""

    def forward(self, x, context=None, token_weights=None):
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        k = k if token_weights is None else k * token_weights[:, :, None].to(k.dtype)
        return self.to_out[0](attention.attend(q, k, v, self.heads))

    change(attention.Attention, "forward", forward)


@shows_at("tiny/units/unet/down_blocks.1.attentions.0")
def tokens_by_columns(checkpoints, change):
    """Tokens put back into a map column by column."""
    change(attention, "to_map", lambda x, size: x.transpose(1, 2).unflatten(2, size[::-1]).transpose(2, 3))


@shows_at("tiny/units/unet/down_blocks.1.attentions.0")
def no_outer_residual(checkpoints, change):
    """The transformer's input not added to its output."""
    right = attention.Transformer2DModel.forward
    change(attention.Transformer2DModel, "forward", lambda self, x, *more: right(self, x, *more) - x)


@shows_at("tiny/units/unet/down_blocks.1.attentions.0")
def cross_attention_first(checkpoints, change):
    """Cross-attention before self-attention."""

    def forward(self, x, context, token_weights):
        x = x + self.attn2(self.norm2(x), context, token_weights)
        x = x + self.attn1(self.norm1(x))
        return x + self.ff(self.norm3(x))

    change(attention.BasicTransformerBlock, "forward", forward)


@shows_at("tiny/units/vae/encoder.mid_block.attentions.0")
def heads_in_the_vae(checkpoints, change):
    """Eight heads in the autoencoder's attention, not one."""
    for module in modules(checkpoints, "vae", vae.MidAttention):
        change(module, "heads", 8)


# ------------------------------------------------------------------------------------------------------- autoencoder


def with_scale(checkpoints: Checkpoints, change: Change, method: str, scale: Callable[[float], float]) -> None:
    right = getattr(vae.AutoencoderKL, method)

    def scaled(self, x):
        config = self.config
        self.config = dataclasses.replace(config, scaling_factor=scale(config.scaling_factor))
        try:
            return right(self, x)
        finally:
            self.config = config

    change(vae.AutoencoderKL, method, scaled)


@shows_at("tiny/taps/encode/output")
def scale_of_sd1(checkpoints, change):
    """0.18215 for the config's scaling_factor."""
    for method in ("encode", "decode"):
        with_scale(checkpoints, change, method, lambda scale: 0.18215)


@shows_at("tiny/taps/encode/output")
def encoded_without_scale(checkpoints, change):
    """Latents not multiplied by the scaling_factor."""
    with_scale(checkpoints, change, "encode", lambda scale: 1.0)


@shows_at("tiny/taps/decode/post_quant_conv")
def decoded_without_scale(checkpoints, change):
    """Latents not divided by the scaling_factor."""
    with_scale(checkpoints, change, "decode", lambda scale: 1.0)


@shows_at("tiny/taps/encode/output")
def log_variance_for_mean(checkpoints, change):
    """The moments' second half for the first: the log variance for the mean."""
    right = vae.AutoencoderKL.posterior
    change(vae.AutoencoderKL, "posterior", lambda self, picture: right(self, picture)[::-1])


# --------------------------------------------------------------------------------------------------------------- mix


def with_halves(change: Change, guided: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Guidance by another rule: the UNet's halves are put where the right rule gives what the wrong one would."""
    right = program.Denoiser.__call__

    def call(self, x, k):
        model = self.models.unet

        def unet(both, t, context, s):
            e_uncond, e_cond = model(both, t, context, s).chunk(2)
            e = guided(e_uncond, e_cond, self.options.guidance)
            return torch.cat([e, e])

        swapped = dataclasses.replace(self, models=dataclasses.replace(self.models, unet=unet))
        swapped.context, swapped.token_weights = self.context, self.token_weights
        return right(swapped, x, k)

    change(program.Denoiser, "__call__", call)


@shows_at("tiny/steps/image/x0")
def halves_swapped(checkpoints, change):
    """The halves of the guidance swapped: the prompt first."""
    with_halves(change, lambda uncond, cond, g: cond + g * (uncond - cond))


@shows_at("tiny/steps/image/x0")
def guidance_from_the_prompt(checkpoints, change):
    """Guidance that starts from the prompt's prediction: g + 1 for g."""
    with_halves(change, lambda uncond, cond, g: cond + g * (cond - uncond))


@shows_at("tiny/steps/image/x0")
def timestep_of_the_next_step(checkpoints, change):
    """The UNet is called at t[k - 1] on the way from k to k - 1, not at t[k]."""
    right = program.Denoiser.__call__

    def call(self, x, k):
        model = self.models.unet
        earlier = lambda both, t, *more: model(both, torch.full_like(t, self.schedule.t[k - 1]), *more)
        moved = dataclasses.replace(self, models=dataclasses.replace(self.models, unet=earlier))
        moved.context, moved.token_weights = self.context, self.token_weights
        return right(moved, x, k)

    change(program.Denoiser, "__call__", call)


@shows_at("tiny/steps/reweighted/x0")
def both_halves_weighted(checkpoints, change):
    """Token weights on the negative prompt's half too."""
    right = program.Denoiser.__post_init__

    def post_init(self):
        right(self)
        if self.token_weights is not None:
            self.token_weights = self.token_weights[-1:].repeat(len(self.token_weights), 1)

    change(program.Denoiser, "__post_init__", post_init)


@shows_at("tiny/steps/image/layout")
def layout_one_level_off(checkpoints, change):
    """layout_k mixed into x_{k-1}, not layout_{k-1}."""
    right = program.mix

    def mix(denoise, layout, K_max, K_min, nu):
        return right(denoise, lambda k: layout(k if k == K_max else k + 1), K_max, K_min, nu)

    change(program, "mix", mix)


@shows_at("tiny/steps/image/start")
def noise_of_its_own(checkpoints, change):
    """Another eps for the layout than the kit's."""
    right = program.ImageLayout.__call__
    change(program.ImageLayout, "__call__", lambda self, k: right(dataclasses.replace(self, eps=-self.eps), k))


@shows_at("tiny/steps/image/layout")
def noise_drawn_anew(checkpoints, change):
    """A new eps for the layout in every step."""
    right = program.ImageLayout.__call__
    called = []

    def call(self, k):
        called.append(k)
        return right(dataclasses.replace(self, eps=self.eps.roll(len(called) - 1, 3)), k)

    change(program.ImageLayout, "__call__", call)


@shows_at("tiny/steps/image/layout")
def one_mixing_step_too_few(checkpoints, change):
    """Mixing while k > K_min, one step too few."""
    right = program.mix
    change(program, "mix", lambda denoise, layout, K_max, K_min, nu: right(denoise, layout, K_max, K_min + 1, nu))


@shows_at("tiny/steps/image/x")
def nu_on_the_layout(checkpoints, change):
    """nu on the layout, 1 - nu on the content."""
    right = program.mix
    change(program, "mix", lambda denoise, layout, K_max, K_min, nu: right(denoise, layout, K_max, K_min, 1 - nu))


@shows_at("tiny/steps/image/x")
def mixture_thrown_away(checkpoints, change):
    """The mixture shown to the UNet and then thrown away: unmixed latents are carried on."""
    right = program.mix

    def mix(denoise, layout, K_max, K_min, nu):
        for step in right(denoise, layout, K_max, K_min, nu):
            yield step._replace(x=step.x_content)

    change(program, "mix", mix)


@shows_at("tiny/steps/text/x")
def layout_noised_again(checkpoints, change):
    """A text layout's last latent noised again, not the prompt's own trajectory."""

    class Renoised(program.TextLayout):
        def __call__(self, k):
            schedule = scheduler.Schedule(scheduler.ScheduleConfig(), max(self.latents))
            last = self.latents[min(self.latents)]
            return schedule.add_noise(last, self.latents[max(self.latents)], k)

    change(program, "TextLayout", Renoised)


@shows_at("tiny/loop/text/x")
def negative_prompt_left_out(checkpoints, change):
    """The negative prompt left out, the empty one in its place."""
    right = program.Denoiser.__post_init__

    def post_init(self):
        self.options = dataclasses.replace(self.options, negative="")
        right(self)

    change(program.Denoiser, "__post_init__", post_init)


@shows_at("tiny/loop/text/x")
def layout_prompt_weighted(checkpoints, change):
    """The content's negative prompt is not used along the layout prompt."""
    right = program.trajectory

    def trajectory(denoise, x, k_from, k_to, phase):
        if denoise.prompt == "a car":
            denoise = dataclasses.replace(denoise, options=dataclasses.replace(denoise.options, negative=""))
        return right(denoise, x, k_from, k_to, phase)

    change(program, "trajectory", trajectory)


# ---------------------------------------------------------------------------------------------------------- pictures


@shows_at("tiny/loop/resized")
def bicubic(checkpoints, change):
    """The layout resized with BICUBIC, not LANCZOS."""
    right = ImageOps.fit
    change(ImageOps, "fit", lambda picture, size, method: right(picture, size, Image.Resampling.BICUBIC))


@shows_at("tiny/loop/resized")
def stretched(checkpoints, change):
    """The layout stretched to the size, not cropped."""
    change(ImageOps, "fit", lambda picture, size, method: picture.resize(size, method))


@shows_at("tiny/loop/resized")
def cropped_at_the_corner(checkpoints, change):
    """The layout cropped from its upper left corner, not from its centre."""
    right = ImageOps.fit
    change(ImageOps, "fit", lambda picture, size, method: right(picture, size, method, centering=(0.0, 0.0)))


@shows_at("tiny/loop/image/picture")
def rounded_down(checkpoints, change):
    """Grey levels rounded down, not to the nearest."""

    def to_images(y):
        levels = ((y / 2 + 0.5).clamp(0, 1) * 255).byte()
        return [Image.fromarray(p) for p in levels.permute(0, 2, 3, 1).numpy()]

    change(pictures, "to_images", to_images)


# ----------------------------------------------------------------------------------- what the numbers do not tell apart


@shows_at(None)
def no_upcast(checkpoints, change):
    """SD2's attention in float16: the kit is computed in float64, where upcast_attention changes nothing."""
    for module in modules(checkpoints, "unet", attention.Attention):
        change(module, "upcast", False)


@shows_at(None)
def schedule_in_float64(checkpoints, change):
    """The schedule in float64: its difference is smaller than that of right programs' rounding."""
    right = scheduler.alphas_cumprod

    def alphas_cumprod(config):
        if config.trained_betas is not None or config.rescale_betas_zero_snr or config.beta_schedule != "scaled_linear":
            return right(config)
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps).double() ** 2
        return torch.cumprod(1 - betas, dim=0).float()

    change(scheduler, "alphas_cumprod", alphas_cumprod)


@shows_at(None)
def cropped_upsampling(checkpoints, change):
    """Upsampling by 2 and cut off at the right and below for an odd size: that is the same."""
    change(
        unet.Upsample2D,
        "forward",
        lambda self, x, size: self.conv(F.interpolate(x, scale_factor=2, mode="nearest")[:, :, : size[0], : size[1]]),
    )


@shows_at(None)
def no_clamp(checkpoints, change):
    """The log variance not clamped: no latent of MagicMix depends on it."""
    right = vae.AutoencoderKL.posterior
    change(vae.AutoencoderKL, "posterior", lambda self, picture: (right(self, picture)[0], None))
