"""MagicMix and the Stable Diffusion beneath it in plain NumPy: a port written from the kit beside it.

    python lab/port/numpy_port.py "a tiger" --layout docs/layouts/trophy.png -o mix.png
    python lab/port/numpy_port.py "a tiger" --layout-prompt "a car" -o mix.png

Channels last throughout: feature maps are (B, H, W, C), tokens (B, N, D), text states (B, L, D). float32, on a CPU.
Imports nothing of the project; needs numpy, safetensors and pillow (to read, resize and write pictures).
"""

import argparse
import json
import math
import re
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from safetensors.numpy import load_file

TINY = Path(__file__).resolve().parents[2] / "weights" / "tiny"

# ------------------------------------------------------------------------------------------------------- activations

ERF = np.array([math.erf(i / 4000) for i in range(-24000, 24001)])  # from -6 to 6, beyond which it is -1 and 1
sigmoid = lambda x: 1 / (1 + np.exp(-x))
silu = lambda x: x * sigmoid(x)
gelu = lambda x: (0.5 * x * (1 + erf(x / 2**0.5))).astype(np.float32)
quick_gelu = lambda x: x * sigmoid(np.float32(1.702) * x)


def erf(x):
    """Interpolated between points 2.5e-4 apart: right to 1e-8"""
    place = np.clip((x.astype(np.float64) + 6) * 4000, 0, 47999)
    i = place.astype(np.int32)
    return ERF[i] + (place - i) * (ERF[i + 1] - ERF[i])


def attend(q, k, v, heads, causal=False):
    """softmax(q k^T / sqrt(D / h)) v per head; q (B, N, D), k and v (B, L, D)"""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) for x in (q, k, v))  # (B, h, N or L, D/h)
    scores = q @ k.transpose(0, 1, 3, 2) / np.float32(q.shape[-1] ** 0.5)
    if causal:
        scores += np.triu(np.full(scores.shape[-2:], -np.inf, np.float32), 1)
    maps = np.exp(scores - scores.max(-1, keepdims=True))
    y = maps / maps.sum(-1, keepdims=True) @ v
    return y.transpose(0, 2, 1, 3).reshape(y.shape[0], y.shape[2], -1)


# ---------------------------------------------------------------------------------------------------------- networks


class Network:
    """A part's config and weights, and its layers by their names in the file. `taps`, where it is a dict, gets the
    output of every module by its name."""

    def __init__(self, folder, stem):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {n: t.astype(np.float32) for n, t in load_file(folder / f"{stem}.safetensors").items()}
        self.taps = None

    def tap(self, name, y):
        if self.taps is not None:
            self.taps[name] = y
        return y

    def has(self, name):
        return any(n.startswith(f"{name}.") for n in self.weights)

    def count(self, name):
        return next(i for i in range(100) if not self.has(f"{name}.{i}"))

    def linear(self, name, x):
        w = self.weights[f"{name}.weight"]
        y = x @ w.reshape(len(w), -1).T  # a 1 x 1 convolution is one too
        return self.tap(name, y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y)

    def conv(self, name, x, stride=1, pad=(1, 1)):
        """3 x 3; `pad`: rows above and below, and columns left and right."""
        w = self.weights[f"{name}.weight"].transpose(2, 3, 1, 0)  # (3, 3, C_in, C_out)
        x = np.pad(x, ((0, 0), pad, pad, (0, 0)))
        height, width = ((n - 3) // stride + 1 for n in x.shape[1:3])
        y = self.weights[f"{name}.bias"]
        for i in range(3):
            for j in range(3):
                y = y + x[:, i : i + stride * height : stride, j : j + stride * width : stride] @ w[i, j]
        return self.tap(name, y)

    def normalised(self, name, x, axes, eps):
        y = x - x.mean(axes, keepdims=True)
        return y / np.sqrt((y**2).mean(axes, keepdims=True) + np.float32(eps))

    def layer_norm(self, name, x, eps=1e-5):
        y = self.normalised(name, x, -1, eps)
        return self.tap(name, y * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"])

    def group_norm(self, name, x, eps):
        groups = x.reshape(*x.shape[:3], self.config["norm_num_groups"], -1)  # (B, H, W, groups, C / groups)
        y = self.normalised(name, groups, (1, 2, 4), eps).reshape(x.shape)
        return self.tap(name, y * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"])

    def resnet(self, name, x, eps, time=None):
        y = self.conv(f"{name}.conv1", silu(self.group_norm(f"{name}.norm1", x, eps)))
        if time is not None:
            y = y + self.linear(f"{name}.time_emb_proj", silu(time))[:, None, None]
        y = self.conv(f"{name}.conv2", silu(self.group_norm(f"{name}.norm2", y, eps)))
        return self.tap(name, y + (self.linear(f"{name}.conv_shortcut", x) if self.has(f"{name}.conv_shortcut") else x))

    def upsample(self, name, x, size=None):
        """To twice the size by the nearest neighbour, of which `size` = (H, W) is kept."""
        height, width = size or (2 * x.shape[1], 2 * x.shape[2])
        return self.tap(name, self.conv(f"{name}.conv", x.repeat(2, 1).repeat(2, 2)[:, :height, :width]))

    def attention(self, name, x, context, heads, s=None):
        q, k, v = (self.linear(f"{name}.to_{n}", y) for n, y in (("q", x), ("k", context), ("v", context)))
        v = v if s is None else v * s[:, :, None]  # a token weight scales a column of every map
        return self.tap(name, self.linear(f"{name}.to_out.0", attend(q, k, v, heads)))


class TextEncoder(Network):
    def __init__(self, folder):
        super().__init__(folder, "model")
        self.act = {"quick_gelu": quick_gelu, "gelu": gelu}[self.config["hidden_act"]]

    def embeddings(self, name, ids):
        tokens, positions = (self.weights[f"{name}.{n}_embedding.weight"] for n in ("token", "position"))
        tokens = self.tap(f"{name}.token_embedding", tokens[ids])
        return self.tap(name, tokens + positions[: ids.shape[1]])

    def self_attention(self, name, x):
        q, k, v = (self.linear(f"{name}.{n}_proj", x) for n in "qkv")
        y = attend(q, k, v, self.config["num_attention_heads"], causal=True)
        return self.tap(name, self.linear(f"{name}.out_proj", y))

    def mlp(self, name, x):
        return self.tap(name, self.linear(f"{name}.fc2", self.act(self.linear(f"{name}.fc1", x))))

    def __call__(self, ids):
        """(B, L) -> (B, L, D)"""
        x, eps = self.embeddings("text_model.embeddings", ids), self.config["layer_norm_eps"]
        for i in range(self.config["num_hidden_layers"]):
            name = f"text_model.encoder.layers.{i}"
            x = x + self.self_attention(f"{name}.self_attn", self.layer_norm(f"{name}.layer_norm1", x, eps))
            x = self.tap(name, x + self.mlp(f"{name}.mlp", self.layer_norm(f"{name}.layer_norm2", x, eps)))
        return self.tap("text_model", self.layer_norm("text_model.final_layer_norm", x, eps))


class UNet(Network):
    EPS = 1e-6  # of the transformers' GroupNorm; that of the resnets is in the config

    def __init__(self, folder):
        super().__init__(folder, "diffusion_pytorch_model")
        heads, self.levels = self.config["attention_head_dim"], len(self.config["block_out_channels"])
        self.heads = heads if isinstance(heads, list) else [heads] * self.levels  # a number of heads, whatever its name

    def time_proj(self, t):
        half = self.config["block_out_channels"][0] // 2
        angles = t[:, None].astype(np.float32) * np.exp(-math.log(10000) * np.arange(half) / half).astype(np.float32)
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)

    def time_embedding(self, name, x):
        return self.tap(name, self.linear(f"{name}.linear_2", silu(self.linear(f"{name}.linear_1", x))))

    def geglu(self, name, x):
        value, gate = np.split(self.linear(f"{name}.proj", x), 2, axis=-1)
        return self.tap(name, value * gelu(gate))

    def feed_forward(self, name, x):
        return self.tap(name, self.linear(f"{name}.net.2", self.geglu(f"{name}.net.0", x)))

    def transformer(self, name, x, context, s, heads):
        y = self.group_norm(f"{name}.norm", x, self.EPS).reshape(len(x), -1, x.shape[-1])  # (B, N, C), row by row
        y = self.linear(f"{name}.proj_in", y)
        for i in range(self.count(f"{name}.transformer_blocks")):
            block = f"{name}.transformer_blocks.{i}"
            z = self.layer_norm(f"{block}.norm1", y)
            y = y + self.attention(f"{block}.attn1", z, z, heads)
            y = y + self.attention(f"{block}.attn2", self.layer_norm(f"{block}.norm2", y), context, heads, s)
            y = self.tap(block, y + self.feed_forward(f"{block}.ff", self.layer_norm(f"{block}.norm3", y)))
        return self.tap(name, x + self.linear(f"{name}.proj_out", y).reshape(x.shape))

    def layer(self, block, i, x, time, context, s, level):
        """A resnet and its transformer, where it has one."""
        x = self.resnet(f"{block}.resnets.{i}", x, self.config["norm_eps"], time)
        name = f"{block}.attentions.{i}"
        return self.transformer(name, x, context, s, self.heads[level]) if self.has(name) else x

    def __call__(self, x, t, context, s=None):
        """(B, H, W, 4), (B,), (B, L, D), token weights (B, L) -> (B, H, W, 4)"""
        time = self.time_embedding("time_embedding", self.time_proj(t))
        x = self.conv("conv_in", x)
        skips, layers = [x], self.config["layers_per_block"]
        for level in range(self.levels):
            block = f"down_blocks.{level}"
            for i in range(layers):
                x = self.layer(block, i, x, time, context, s, level)
                skips.append(x)
            if self.has(f"{block}.downsamplers"):
                x = self.conv(f"{block}.downsamplers.0.conv", x, stride=2)
                skips.append(self.tap(f"{block}.downsamplers.0", x))
            self.tap(block, x)
        x = self.layer("mid_block", 0, x, time, context, s, -1)
        x = self.tap("mid_block", self.layer("mid_block", 1, x, time, context, s, -1))
        for i, level in enumerate(reversed(range(self.levels))):
            block = f"up_blocks.{i}"
            for j in range(layers + 1):
                x = self.layer(block, j, np.concatenate([x, skips.pop()], axis=-1), time, context, s, level)
            if self.has(f"{block}.upsamplers"):
                x = self.upsample(f"{block}.upsamplers.0", x, skips[-1].shape[1:3])
            self.tap(block, x)
        return self.conv("conv_out", silu(self.group_norm("conv_norm_out", x, self.config["norm_eps"])))


class VAE(Network):
    EPS = 1e-6

    def __init__(self, folder):
        super().__init__(folder, "diffusion_pytorch_model")
        self.scale = np.float32(self.config["scaling_factor"])

    def downsample(self, name, x):
        return self.tap(name, self.conv(f"{name}.conv", x, stride=2, pad=(0, 1)))  # right and below only

    def mid_attention(self, name, x):
        y = self.group_norm(f"{name}.group_norm", x, self.EPS).reshape(len(x), -1, x.shape[-1])
        return self.tap(name, x + self.attention(name, y, y, heads=1).reshape(x.shape))

    def middle(self, name, x):
        x = self.mid_attention(f"{name}.attentions.0", self.resnet(f"{name}.resnets.0", x, self.EPS))
        return self.tap(name, self.resnet(f"{name}.resnets.1", x, self.EPS))

    def blocks(self, name, x, sampler, sample):
        for i in range(self.count(name)):
            block = f"{name}.{i}"
            for j in range(self.count(f"{block}.resnets")):
                x = self.resnet(f"{block}.resnets.{j}", x, self.EPS)
            x = self.tap(block, sample(f"{block}.{sampler}.0", x) if self.has(f"{block}.{sampler}") else x)
        return x

    def end(self, name, x):
        return self.tap(
            name, self.conv(f"{name}.conv_out", silu(self.group_norm(f"{name}.conv_norm_out", x, self.EPS)))
        )

    def encode(self, picture):
        """(B, 8 H, 8 W, 3) in [-1, 1] -> the scaled posterior mean (B, H, W, 4)"""
        x = self.blocks("encoder.down_blocks", self.conv("encoder.conv_in", picture), "downsamplers", self.downsample)
        moments = self.linear("quant_conv", self.end("encoder", self.middle("encoder.mid_block", x)))
        return moments[..., : moments.shape[-1] // 2] * self.scale

    def decode(self, x):
        """(B, H, W, 4) -> (B, 8 H, 8 W, 3), about [-1, 1]"""
        x = self.conv("decoder.conv_in", self.linear("post_quant_conv", x / self.scale))
        x = self.middle("decoder.mid_block", x)
        return self.end("decoder", self.blocks("decoder.up_blocks", x, "upsamplers", self.upsample))


# --------------------------------------------------------------------------------------------------- prompts and words


class Tokenizer:
    """CLIP's byte pairs: text in lower case -> ids of length L."""

    WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")  # letters, single digits, the rest

    def __init__(self, folder):
        facts = json.loads((folder / "tokenizer_config.json").read_text())
        self.ids = json.loads((folder / "vocab.json").read_text())
        merges = (folder / "merges.txt").read_text().splitlines()[1:]
        self.ranks = {tuple(merge.split()): i for i, merge in enumerate(merges)}
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's alphabet for the 256 bytes
        others = [b for b in range(256) if b not in printable]
        self.letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
        self.length, self.pad = facts["model_max_length"], self.ids[facts["pad_token"]]

    def word(self, word):
        """The ids of one word: the pair of the lowest rank is joined, again and again."""
        tokens = [self.letters[b] for b in word.encode()]
        tokens[-1] += "</w>"
        while pairs := [p for p in zip(tokens, tokens[1:]) if p in self.ranks]:
            best, joined = min(pairs, key=self.ranks.get), []
            for token in tokens:
                is_pair = joined and (joined[-1], token) == best
                joined[-1:] = [joined[-1] + token] if is_pair else [*joined[-1:], token]
            tokens = joined
        return [self.ids[token] for token in tokens]

    def words(self, text):
        text = " ".join(unicodedata.normalize("NFC", text).split()).lower()
        return [self.word(word) for word in self.WORDS.findall(text)]

    def __call__(self, text):
        ids = sum(self.words(text), [])[: self.length - 2]
        ids = [self.ids["<|startoftext|>"], *ids, self.ids["<|endoftext|>"]]
        return np.array(ids + [self.pad] * (self.length - len(ids)))

    def weights(self, prompt, chosen):
        """{word: s} -> (L,): s at every token of a word, or of several, wherever it begins a word of the prompt."""
        words, s = self.words(prompt), np.ones(self.length, np.float32)
        for text, value in chosen.items():
            sought, place = self.words(text), 1  # behind the start token
            for i, word in enumerate(words):
                if words[i : i + len(sought)] == sought:
                    s[place : place + len(sum(sought, []))] = value
                place += len(word)
        return s


# ---------------------------------------------------------------------------------------------------------- the noise


def randn(seed, shape):
    """torch.randn of a CPU generator: the Mersenne Twister's low 24 bits as uniforms, Box-Muller on those 8 apart in
    blocks of 16; what is left at the end is drawn anew, as the last 16. Of 16 numbers or more."""
    count = math.prod(shape)
    draws = np.random.RandomState(seed & 0xFFFFFFFF)._bit_generator
    uniform = lambda n: (draws.random_raw(n) & 0xFFFFFF).astype(np.float32) / np.float32(1 << 24)

    def normal(u):
        first, second = 1 - u.reshape(-1, 2, 8)[:, 0], u.reshape(-1, 2, 8)[:, 1]
        radius, angle = np.sqrt(-2 * np.log(first)), np.float32(2 * np.pi) * second
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()

    u = uniform(count)
    z = normal(u[: count // 16 * 16])
    if count % 16:
        z = np.concatenate([z, u[len(z) :]])
        z[-16:] = normal(uniform(16))
    return z.reshape(shape)


# ------------------------------------------------------------------------------------------------ schedule and sampler


class Schedule:
    """t[k] and abar[k], k = 0 .. T steps left; float32."""

    def __init__(self, config, T):
        n = config["num_train_timesteps"]
        self.v = config["prediction_type"] == "v_prediction"
        roots = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, n, dtype=np.float32)
        self.t = np.array([0] + [i * (n // T) + config["steps_offset"] for i in range(T)])
        self.abar = np.cumprod(1 - roots**2, dtype=np.float32)[self.t]  # abar[0] is that of timestep 0, not 1

    def add_noise(self, x0, eps, k):
        return np.sqrt(self.abar[k]) * x0 + np.sqrt(1 - self.abar[k]) * eps if k else x0

    def predict(self, x, output, k):
        """(x0, eps)"""
        a, b = np.sqrt(self.abar[k]), np.sqrt(1 - self.abar[k])
        return (a * x - b * output, a * output + b * x) if self.v else ((x - b * output) / a, output)

    def ddim(self, x, output, k, eta=0, noise=0):
        """(x_{k-1}, x0)"""
        abar, before = self.abar[k], self.abar[k - 1]
        x0, eps = self.predict(x, output, k)
        sigma = np.float32(eta) * np.sqrt((1 - before) / (1 - abar) * (1 - abar / before))
        return np.sqrt(before) * x0 + np.sqrt(np.maximum(1 - before - sigma**2, 0)) * eps + sigma * noise, x0

    def ddpm(self, x, output, k, noise):
        """(x_{k-1}, x0)"""
        abar, before = self.abar[k], self.abar[k - 1] if k > 1 else np.float32(1)
        x0, alpha = self.predict(x, output, k)[0], abar / before
        mean = np.sqrt(before) * (1 - alpha) / (1 - abar) * x0 + np.sqrt(alpha) * (1 - before) / (1 - abar) * x
        return mean + np.sqrt((1 - before) / (1 - abar) * (1 - alpha)) * noise, x0


# ----------------------------------------------------------------------------------------------------------- MagicMix


class Model:
    """The parts of a checkpoint in a folder, and what they do together."""

    def __init__(self, folder):
        self.text, self.unet = TextEncoder(folder / "text_encoder"), UNet(folder / "unet")
        self.vae, self.tokenizer = VAE(folder / "vae"), Tokenizer(folder / "tokenizer")
        self.schedule_config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())

    def states(self, *prompts):
        return self.text(np.stack([self.tokenizer(prompt) for prompt in prompts]))

    def denoiser(self, schedule, context, guidance, s=None):
        """(x_k, k) -> (x_{k-1}, x0); context (2, L, D): the negative prompt's states, then the prompt's; s (L,)"""
        both = None if s is None else np.stack([np.ones_like(s), s])

        def denoise(x, k):
            t = np.full(2, schedule.t[k])
            e_uncond, e_cond = np.split(self.unet(np.concatenate([x, x]), t, context, both), 2)
            return schedule.ddim(x, e_uncond + np.float32(guidance) * (e_cond - e_uncond), k)

        return denoise


def mix(denoise, layout, K_max, K_min, nu):
    """The paper's loop: (x, x', layout, x0) of every step from K_max - 1 down to 0."""
    x, nu = layout(K_max), np.float32(nu)
    for k in range(K_max, 0, -1):
        x_content, x0 = denoise(x, k)
        layout_k = layout(k - 1) if k - 1 >= K_min else None
        x = x_content if layout_k is None else nu * x_content + (1 - nu) * layout_k
        yield x, x_content, layout_k, x0


def steps_of(fraction, T):
    return round(fraction * T)  # halves to the even neighbour


def magicmix(model, prompt, layout, eps, steps=50, k_max=0.6, k_min=0.3, nu=0.7, guidance=7.5, negative="", words=None):
    """The latents x of every step; layout: a prompt or a picture (1, 8 H, 8 W, 3) in [-1, 1]; eps (1, H, W, 4)"""
    schedule, K_max, K_min = Schedule(model.schedule_config, steps), steps_of(k_max, steps), steps_of(k_min, steps)
    s = model.tokenizer.weights(prompt, words) if words else None
    content = model.denoiser(schedule, model.states(negative, prompt), guidance, s)
    if isinstance(layout, str):
        along = model.denoiser(schedule, model.states(negative, layout), guidance)
        latents = {steps: eps}
        for k in range(steps, K_min, -1):
            latents[k - 1] = along(latents[k], k)[0]
        levels, walk = latents.get, [latents[k] for k in range(steps - 1, K_min - 1, -1)]
    else:
        x0 = model.vae.encode(layout)
        levels, walk = lambda k: schedule.add_noise(x0, eps, k), []
    return walk + [x for x, *_ in mix(content, levels, K_max, K_min, nu)]


def fitted(picture, size):
    """A PIL picture -> (1, height, width, 3) in [-1, 1], resized to cover the size and cropped at its centre"""
    pixels = np.asarray(ImageOps.fit(picture.convert("RGB"), size[::-1], Image.Resampling.LANCZOS))
    return pixels[None].astype(np.float32) / np.float32(127.5) - 1


def grey_levels(y):
    """(B, height, width, 3) in [-1, 1] -> 0 to 255, rounded to the nearest"""
    return np.round(np.clip(y / 2 + np.float32(0.5), 0, 1) * 255).astype(np.uint8)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    layouts = parser.add_mutually_exclusive_group(required=True)
    layouts.add_argument("--layout", type=Path)
    layouts.add_argument("--layout-prompt")
    parser.add_argument("--weights", type=Path, default=TINY)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", default="mix.png")
    args = parser.parse_args()
    model, own = Model(args.weights), json.loads((args.weights / "magicmix.json").read_text())
    side = model.unet.config["sample_size"]
    layout = args.layout_prompt or fitted(Image.open(args.layout), (8 * side, 8 * side))
    eps = randn(args.seed, (1, 4, side, side)).transpose(0, 2, 3, 1)
    x = magicmix(model, args.prompt, layout, eps, **own)[-1]
    Image.fromarray(grey_levels(model.vae.decode(x))[0]).save(args.output)


if __name__ == "__main__":
    main()
