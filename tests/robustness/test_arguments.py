"""What magicmix() and text_to_image() take in Python: layouts of every kind, plain spellings of an option, and, for any
object in any place, a documented error of our own or a sound result."""

import dataclasses
import itertools
import linecache
import traceback
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAYOUT, ROOT, with_unet
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import magicmix
from command import pictures

NAN = float("nan")
pytestmark = pytest.mark.filterwarnings("ignore:steps .* denoising from noise")


class VAE:
    """The mean of each field of 8 x 8 pixels, in place of an autoencoder; fast at any size."""

    def __init__(self, config):
        self.config = config

    def encode(self, picture):
        means = torch.nn.functional.avg_pool2d(picture.float(), 8)
        return torch.cat([means, means[:, :1]], dim=1)  # (B, 4, H, W)


@pytest.fixture(scope="module")
def quick(models):
    """The embedded checkpoint with a UNet and a VAE that answer at once."""
    return dataclasses.replace(with_unet(models, lambda x, *_: 0.1 * x, sample_size=2), vae=VAE(models.vae.config))


def last(steps):
    *_, final = steps
    return final.x


# ----------------------------------------------------------------------------------------- layouts of every kind


def saved(tmp_path, name):
    """A picture that is not of the mix's size, in a file."""
    picture = Image.open(LAYOUT).convert("RGB").crop((0, 0, 100, 90))
    exif = Image.Exif()
    if name == "sideways":
        exif[0x0112] = 6
    if name == "transparent":
        picture.putalpha(Image.effect_noise(picture.size, 80))
    if name == "16 bits":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    picture.save(tmp_path / "layout.png", exif=exif)
    return tmp_path / "layout.png"


@pytest.mark.parametrize("name", ["RGB", "sideways", "transparent", "16 bits"])
def test_a_picture_is_a_layout_as_it_is_for_the_command(name, models, tmp_path):
    """A Path, a PIL picture and the tensor that the command makes of the file give the same latents; and a str does
    too little, so it is refused."""
    path, size = saved(tmp_path, name), (48, 64)
    mix = lambda layout, **more: last(magicmix.magicmix(models, "a tiger", layout, steps=2, seeds=[3], **more))
    expected = mix(pictures.fit(pictures.open_layout(path).picture, size))
    assert torch.equal(mix(path, size=size), expected)
    with Image.open(path) as picture:
        assert torch.equal(mix(picture, size=size), expected)
    with pytest.raises(ValueError, match=r"is the name of a file, and as a str .* give the picture as Path\('"):
        mix(str(path))
    assert not torch.equal(mix("a castle", size=size), expected)


def test_what_is_not_given_is_the_checkpoints_own_size(models):
    assert last(magicmix.magicmix(models, "a tiger", LAYOUT, steps=2)).shape == (1, 4, 16, 16)


# ---------------------------------------------------------------------------------------- what has a plain meaning

SPELLINGS = [  # an argument, and the longer way to write it
    ({"seeds": 7}, {"seeds": (7,)}),
    ({"seeds": np.int64(7)}, {"seeds": [7]}),
    ({"seeds": np.arange(2)}, {"seeds": [0, 1]}),
    ({"size": 24}, {"size": (24, 24)}),
    ({"size": np.array([16, 24]).tolist()}, {"size": (16, 24)}),
    ({"size": (np.int64(16), np.int32(24))}, {"size": (16, 24)}),
    ({"negative": None}, {"negative": ""}),
    ({"nu": Fraction(1, 4)}, {"nu": 0.25}),
    ({"guidance": 3}, {"guidance": 3.0}),
]


@pytest.mark.parametrize(("short", "long"), SPELLINGS, ids=[str(short) for short, _ in SPELLINGS])
@pytest.mark.parametrize("layout", ["a car", LAYOUT], ids=["prompt", "picture"])
def test_what_is_meant_is_plain(short, long, layout, models):
    mix = lambda given: last(magicmix.magicmix(models, "a tiger", layout, **({"size": 16, "steps": 2} | given)))
    assert torch.equal(mix(short), mix(long))


# --------------------------------------------------------------------------------------------- what cannot be right


class Mute:
    """An object that cannot be shown."""

    def __repr__(self):
        raise RuntimeError("no repr")


def nothing():
    yield from ()


GIVE_LAYOUT = "give a Path or a PIL picture, a tensor (1 or B, 3, height, width) in [-1, 1], or a prompt"
GIVE_TENSOR = "give (1 or B, 3, height, width) of float32 in [-1, 1], as fit() makes it"
picture = torch.zeros(1, 3, 16, 16)
WRONG = [  # the place, what stands there, the error, what it says
    ("layout", [picture], TypeError, f"layout is of the type list; {GIVE_LAYOUT}"),
    ("layout", None, TypeError, f"layout is of the type NoneType; {GIVE_LAYOUT}"),
    ("layout", np.zeros((16, 16, 3), np.uint8), TypeError, f"layout is of the type ndarray; {GIVE_LAYOUT}"),
    ("layout", b"layout.png", TypeError, f"layout is of the type bytes; {GIVE_LAYOUT}"),
    ("layout", picture.byte(), ValueError, f"layout is (1, 3, 16, 16) of torch.uint8 on cpu; {GIVE_TENSOR}"),
    ("layout", picture[0], ValueError, f"layout is (3, 16, 16) of torch.float32 on cpu; {GIVE_TENSOR}"),
    ("layout", picture[:0], ValueError, f"layout is (0, 3, 16, 16) of torch.float32 on cpu; {GIVE_TENSOR}"),
    ("layout", picture.to("meta"), ValueError, f"layout is (1, 3, 16, 16) of torch.float32 on meta; {GIVE_TENSOR}"),
    ("layout", picture + 255, ValueError, f"layout has values of up to 255; {GIVE_TENSOR}"),
    ("layout", picture + NAN, ValueError, f"layout has values of up to nan; {GIVE_TENSOR}"),
    ("layout", Path("gone.png"), FileNotFoundError, "layout 'gone.png' does not exist; give a picture file"),
    ("layout", Path("https://a.b/c.png"), ValueError, "is a URL, and nothing is fetched from one; give a picture file"),
    ("layout", ROOT, ValueError, "it is not a file; give a picture file"),
    ("layout", Image.new("RGB", (0, 9)), ValueError, "layout is not a readable picture (it has no pixels)"),
    ("layout", Image.new("F", (9, 9)), ValueError, "layout is not a readable picture (its pixels are of the kind F)"),
    ("prompt", ["a tiger"], ValueError, "prompt ['a tiger'] is no text"),
    ("prompt", None, ValueError, "prompt None is no text"),
    ("seeds", None, TypeError, "seeds is None; give a whole number, or a list or range of them"),
    ("seeds", nothing(), TypeError, "seeds is <generator object"),
    ("seeds", itertools.count(), TypeError, "seeds is count(0); give a whole number"),
    ("seeds", range(10**30), TypeError, "give a whole number, or a list or range of them"),
    ("seeds", 1.5, TypeError, "seeds is 1.5; give a whole number, or a list or range of them"),
    ("seeds", True, ValueError, "seed True is no whole number"),
    ("seeds", "12", ValueError, "seed '1' is no whole number"),
    ("seeds", [], ValueError, "count 0 is out of range; use 1 to 1000"),
    ("size", 20, ValueError, "size 20x20 does not fit; both sides must be multiples of 8"),
    ("size", True, ValueError, "size True is no pair of whole numbers"),
    ("size", "64x64", ValueError, "size '64x64' is no pair of whole numbers"),
    ("negative", ["a dog"], ValueError, "negative ['a dog'] is no text"),
    ("sampler", np.array(["ddim", "ddpm"]), ValueError, "sampler array(['ddim', 'ddpm'], dtype='<U4') is not known"),
    ("nu", Mute(), ValueError, "nu <Mute> is no number"),
    ("nu", torch.tensor(0.5), ValueError, "nu tensor(0.5000) is no number"),
    ("steps", 10**5000, ValueError, "steps <int> is out of range; use 1 to 999"),
    ("noise", torch.zeros(1, 4, 2, 2), TypeError, "noise is of the type Tensor; give what draws it, lambda: eps for a"),
    ("noise", lambda: np.zeros((1, 4, 2, 2)), TypeError, "noise draws an object of the type ndarray; it must draw"),
    ("noise", lambda: torch.zeros(1, 4, 2, 2, dtype=int), ValueError, "noise is torch.int64, or holds NaN or Inf"),
    ("noise", lambda: torch.zeros(1, 4, 2, 2) / 0, ValueError, "noise is torch.float32, or holds NaN or Inf"),
    ("models", "weights/tiny", TypeError, "models is of the type str; give what weights.load() returns"),
]


def mixed(models, place, value):
    """magicmix() with that in that place."""
    arguments = {"models": models, "prompt": "a tiger", "layout": "a car", "size": (16, 24), "steps": 2, place: value}
    return list(magicmix.magicmix(**arguments))


@pytest.mark.parametrize(("place", "value", "error", "message"), WRONG, ids=[f"{p} {m[:40]}" for p, _, _, m in WRONG])
def test_what_cannot_be_right(place, value, error, message, quick):
    with pytest.raises(error) as caught:
        mixed(quick, place, value)
    assert type(caught.value) is error and message in str(caught.value)
    if place not in ("layout", "models", "nu"):
        with pytest.raises(error):
            list(magicmix.text_to_image(quick, **({"prompt": "a tiger", "steps": 2, "size": 16} | {place: value})))


# ----------------------------------------------------------------------------------------- any object in any place


class Odd:
    """An object that has a length, and nothing in it."""

    def __len__(self):
        return 2


TENSORS = st.builds(
    lambda shape, dtype, value: torch.full(shape, 0.0).to(dtype) + value,
    st.sampled_from([(), (3,), (0, 3, 8, 8), (1, 3, 16, 24), (2, 3, 16, 24), (1, 4, 2, 3), (1, 1, 16, 24)]),
    st.sampled_from([torch.float32, torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64]),
    st.sampled_from([0, 1, 0.5, 200, NAN, float("inf")]),
)
PICTURES = st.builds(
    Image.new,
    st.sampled_from(["1", "L", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16", "LA", "HSV", "LAB", "YCbCr"]),
    st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(0, 64), st.floats(), st.fractions(), st.decimals(),
    st.complex_numbers(), st.text(max_size=20), st.binary(max_size=9),
    st.sampled_from([10**400, -(10**5000), 2**64, "ddim", "ddpm", "tiger", str(LAYOUT), np.float32(1), np.bool_(1)]),
    st.sampled_from([LAYOUT, ROOT, Path("gone.png"), Path("a\0b"), Path("x" * 300), Odd(), object(), int, Ellipsis]),
)  # fmt: skip
OBJECTS = st.one_of(
    PLAIN, st.lists(PLAIN, max_size=3), st.tuples(PLAIN, PLAIN), st.sets(st.integers(), max_size=3), TENSORS, PICTURES,
    st.dictionaries(st.one_of(st.text(max_size=9), st.just("tiger"), st.integers()), PLAIN, max_size=2),
    TENSORS.map(lambda tensor: lambda: tensor), TENSORS.map(lambda t: t.resolve_conj().numpy()), PLAIN.map(
        lambda value: iter([value])), st.builds(range, st.integers(0, 10**40)),
    st.sampled_from([torch.zeros(1, 3, 16, 16).to_sparse(), torch.zeros(1, 3, 16, 16, device="meta")]),
)  # fmt: skip
NUMBERS = st.one_of(st.floats(0, 1), st.integers(), st.floats())
TABLES = st.dictionaries(st.sampled_from(["a", "tiger", "lion", ""]), NUMBERS, max_size=2)
PLACES = {  # and what is likelier there to be sound
    "models": PLAIN, "prompt": st.text(), "layout": st.one_of(TENSORS, PICTURES), "seeds": st.lists(NUMBERS),
    "noise": TENSORS.map(lambda tensor: lambda: tensor), "k_max": NUMBERS, "k_min": NUMBERS, "nu": NUMBERS,
    "token_weights": TABLES, "steps": st.integers(0, 1001), "guidance": NUMBERS, "negative": st.text(),
    "sampler": st.sampled_from(["ddim", "ddpm", "DDIM"]), "eta": NUMBERS, "reweight": TABLES, "colour": PLAIN,
    "size": st.one_of(st.integers(0, 50), st.lists(st.sampled_from([8, 24, 40, 41, 5000]), max_size=3)),
}  # fmt: skip
SOME = st.sampled_from(sorted(PLACES)).flatmap(
    lambda place: st.tuples(st.just(place), st.booleans().flatmap(lambda any: OBJECTS if any else PLACES[place]))
)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(SOME, min_size=1, max_size=2).map(dict))
@example({"guidance": 10**30})
@example({"token_weights": {"tiger": 10**30}, "steps": np.int64(3)})
@example({"layout": LAYOUT, "size": [24, 16], "seeds": range(2)})
def test_any_object_in_any_place(quick, objects):
    """A documented error that a line of this project raises, in one line; or latents that are finite."""
    arguments = {"models": quick, "prompt": "a tiger", "layout": "a car", "size": (16, 24), "steps": 2} | objects
    functions = [(magicmix.magicmix, arguments)]
    if not objects.keys() & {"layout", "k_max", "k_min", "nu"}:
        functions.append((magicmix.text_to_image, {n: a for n, a in arguments.items() if n != "layout"}))
    for function, given_ in functions:
        try:
            found = last(itertools.islice(function(**given_), 4))
        except (TypeError, ValueError, FileNotFoundError, FloatingPointError) as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            assert Path(frame.filename).is_relative_to(ROOT), f"raised elsewhere: {frame}"
            assert linecache.getline(frame.filename, frame.lineno).strip().startswith("raise "), f"an accident: {frame}"
            assert 0 < len(str(error)) < 2000 and "\n" not in str(error)
        else:
            assert found.isfinite().all() and found.ndim == 4 and found.shape[1] == 4
            assert 1 <= len(found) <= 1000
