"""What the kit asks of a port: prompts, schedules, modules and mixes, for each of its two models."""

from dataclasses import dataclass, field
from pathlib import Path

import weights
from command.options import Options

KIT = Path(__file__).parent / "kit"
QUIET = 0.01  # what a unit's first input is multiplied by, so that an eps in a norm is as large as the variance

PROMPTS = (
    "",
    "a tiger",
    "A Tiger",
    "a coffee machine",
    "tiger tiger, a tiger",
    "a cat's mug (red); no dog!? #1 at 100%",
    "  two   spaces\tand a\nline ",
    "café, naïve, 日本, 🐯",
    "a panda " * 60,
)
WEIGHTED = (  # (prompt, word -> s)
    ("a red tiger, a tiger", {"tiger": 0.5}),
    ("a coffee machine on a table", {"coffee machine": -1.0}),
    ("a panda and a panda", {"a": 2.0, "panda": 0.0}),
)
STEPS = (50, 30, 20, 1)  # the T of the schedules
FRACTIONS = (  # (T, k_max, k_min): halves that round down to an even number and halves that round up to one
    (50, 0.6, 0.15),  # 7.5 -> 8
    (30, 0.6, 0.15),  # 4.5 -> 4
    (30, 0.75, 0.25),  # 22.5 -> 22, 7.5 -> 8
    (50, 0.58, 0.29),  # 28.999999999999996 -> 29, 14.5 -> 14
    (50, 1.0, 0.0),
)
SAMPLED = (50, (50, 26, 2, 1))  # T and the k of single sampler steps


# Those of a mix that are options of magicmix(); the others say what is mixed.
OPTIONS = ("steps", "k_max", "k_min", "nu", "guidance", "negative", "token_weights")


@dataclass(frozen=True, kw_only=True)
class Mix:
    """One run of the loop."""

    prompt: str
    steps: int
    k_max: float
    k_min: float
    nu: float = 0.7
    guidance: float = 4.0
    negative: str = ""
    layout_prompt: str | None = None  # None: the kit's picture
    token_weights: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    @property
    def given(self) -> dict:
        """How it is mixed, as magicmix() takes it."""
        return {name: getattr(self, name) for name in OPTIONS}

    @property
    def options(self) -> Options:
        """The same; in it, K_max and K_min."""
        return Options(**self.given)


@dataclass(frozen=True, kw_only=True)
class Model:
    """One of the kit's models, and what is asked of it.

    units: part -> the modules that are fed alone, by their names in the files.
    square, oblong: (H, W) of the latents of the two UNet calls.
    vae: (H, W) of the latents that are encoded to and decoded from.
    size: (height, width) of the mixes in pixels.
    """

    name: str
    folder: Path
    units: dict[str, tuple[str, ...]]
    square: tuple[int, int]
    oblong: tuple[int, int]
    vae: tuple[int, int]
    size: tuple[int, int]
    mixes: dict[str, Mix]


TEXT_UNITS = (
    "text_model.embeddings",
    "text_model.encoder.layers.0.layer_norm1",
    "text_model.encoder.layers.0.self_attn",
    "text_model.encoder.layers.0.layer_norm2",
    "text_model.encoder.layers.0.mlp",
    "text_model.final_layer_norm",
)
VAE_UNITS = (
    "encoder.down_blocks.2.resnets.0.norm1",
    "encoder.down_blocks.2.resnets.0",
    "encoder.down_blocks.2.downsamplers.0",
    "encoder.mid_block.attentions.0.group_norm",
    "encoder.mid_block.attentions.0",
    "decoder.up_blocks.0.upsamplers.0",
    "decoder.up_blocks.0.resnets.0",
)


def unet_units(level: int, up: int) -> tuple[str, ...]:
    """One of each kind of module. `level`: a level on the way down with a transformer and a downsampling behind it;
    `up`: a block on the way up with an upsampling."""
    transformer = f"down_blocks.{level}.attentions.0"
    block = f"{transformer}.transformer_blocks.0"
    return (
        "time_proj",  # as diffusers calls it: a function of t, with no weights
        "time_embedding",
        f"down_blocks.{level}.resnets.0.norm1",
        f"down_blocks.{level}.resnets.0",
        f"{transformer}.norm",
        f"{block}.norm1",
        f"{block}.attn1",
        f"{block}.norm2",
        f"{block}.attn2",
        f"{block}.norm3",
        f"{block}.ff.net.0",
        f"{block}.ff",
        transformer,
        f"down_blocks.{level}.downsamplers.0",
        f"up_blocks.{up}.upsamplers.0",
    )


MODELS = (
    Model(
        name="tiny",
        folder=weights.TINY,
        units={"text_encoder": TEXT_UNITS, "unet": unet_units(1, 0), "vae": VAE_UNITS},
        square=(16, 16),
        oblong=(11, 14),
        vae=(3, 5),
        size=(128, 128),
        mixes={
            "image": Mix(prompt="a tiger", steps=50, k_max=0.6, k_min=0.15),
            "text": Mix(
                prompt="a panda", layout_prompt="a car", negative="red", steps=30, k_max=0.6, k_min=0.15, seed=1
            ),
            "reweighted": Mix(
                prompt="a blue panda", steps=20, k_max=0.8, k_min=0.15, token_weights={"panda": 0.5}, seed=2
            ),
        },
    ),
    Model(
        name="sd2",
        folder=KIT / "sd2",
        units={"text_encoder": TEXT_UNITS, "unet": (*unet_units(1, 0), "conv_norm_out"), "vae": VAE_UNITS},
        square=(6, 6),
        oblong=(7, 10),
        vae=(3, 5),
        size=(32, 48),
        mixes={
            "image": Mix(prompt="a tiger", steps=10, k_max=0.8, k_min=0.25, token_weights={"tiger": -0.5}, seed=3),
            "text": Mix(prompt="a tiger", layout_prompt="a mug", steps=10, k_max=0.7, k_min=0.3, seed=4),
        },
    ),
)
NOISE = {"square": (5, (16, 16)), "oblong": (6, (9, 13))}  # name -> (seed, (H, W))
