"""The options exist once: the command line, the keywords in Python, the parameters in a picture and magicmix.json all
accept what the scope of an option says, and the same options make the same picture however they are given."""

import dataclasses
import inspect
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import LAYOUT, run, write_again
from PIL import Image

import magicmix
import weights
from command import options, pictures
from command.options import MIXING, PICTURE, RUN

# option: scope, on the command line, the same in Python, in JSON. Written here once more, by hand.
OPTIONS = {
    "prompt": (PICTURE, ["a tiger"], "a tiger"),
    "layout": (PICTURE, ["--layout", "a.png"], "a.png"),
    "layout_prompt": (PICTURE, ["--layout-prompt", "a car"], "a car"),
    "output": (RUN, ["-o", "b.png"], "b.png"),
    "k_max": (MIXING, ["--k-max", "0.75"], 0.75),
    "k_min": (MIXING, ["--k-min", "0.25"], 0.25),
    "nu": (MIXING, ["--nu", "0.5"], 0.5),
    "token_weights": (MIXING, ["--token-weight", "tiger=-1", "--token-weight", "a=2"], {"tiger": -1.0, "a": 2.0}),
    "steps": (MIXING, ["--steps", "9"], 9),
    "guidance": (MIXING, ["--guidance", "3.5"], 3.5),
    "negative": (MIXING, ["--negative", "a dog"], "a dog"),
    "sampler": (MIXING, ["--sampler", "ddpm"], "ddpm"),
    "eta": (MIXING, ["--eta", "0.5"], 0.5),
    "size": (MIXING, ["--size", "24x16"], (16, 24)),
    "seed": (PICTURE, ["--seed", "7"], 7),
    "count": (RUN, ["--count", "2"], 2),
    "sheet": (RUN, ["--sheet"], True),
    "noise": (PICTURE, ["--noise", "eps.npy"], "eps.npy"),
    "noise_row": (PICTURE, ["--noise-row", "3"], 3),
    "keep_noise": (RUN, ["--keep-noise", "eps.npy"], "eps.npy"),
    "weights": (PICTURE, ["--weights", "folder"], "folder"),
    "unet": (PICTURE, ["--unet", "folder"], "folder"),
    "vae": (PICTURE, ["--vae", "folder"], "folder"),
    "no_ema": (PICTURE, ["--no-ema"], True),
    "prediction": (PICTURE, ["--prediction", "v"], "v"),
    "upcast_attention": (PICTURE, ["--upcast-attention", "on"], "on"),
    "device": (RUN, ["--device", "cpu"], "cpu"),
    "dtype": (PICTURE, ["--dtype", "bf16"], "bf16"),
    "vae_dtype": (PICTURE, ["--vae-dtype", "bf16"], "bf16"),
    "concepts": (RUN, ["--concepts"], True),
    "quiet": (RUN, ["--quiet"], True),
    "debug": (RUN, ["--debug"], True),
    "again": (RUN, ["--again", "a.png"], "a.png"),
}
NAMES = list(OPTIONS)
OF_MIX = [name for name, (scope, _, _) in OPTIONS.items() if scope == MIXING]


def test_these_are_all_options():
    assert OPTIONS.keys() == {field.name for field in dataclasses.fields(options.Options)}
    for scope in (MIXING, PICTURE, RUN):
        assert set(options.names(scope)) == {name for name, row in OPTIONS.items() if row[0] == scope}


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_takes_every_option(name):
    _, given, value = OPTIONS[name]
    assert options.parse(given, "", {}) == {name: value}
    assert options.parse([], "", {}) == {}, "what is not given is absent"


@pytest.mark.parametrize("name", NAMES)
def test_python_takes_the_options_of_the_mix(name, models):
    scope, _, value = OPTIONS[name]
    small = {"size": (16, 16), "steps": 8, name: value}
    for function, arguments in ((magicmix.magicmix, ("a tiger", "a car")), (magicmix.text_to_image, ("a tiger",))):
        unused = ("k_max", "k_min", "nu") if function is magicmix.text_to_image else ()
        if name in inspect.signature(function).parameters:
            assert name in ("prompt", "layout", "noise"), "arguments that are no options"
            continue
        steps = function(models, *arguments, **small)
        if scope == MIXING and name not in unused:
            assert next(steps).x.isfinite().all()
        else:
            known = ", ".join(n for n in options.names(MIXING) if n not in unused)
            with pytest.raises(TypeError, match=f"'{name}' is no option of the mixing; those are {known}"):
                next(steps)


def test_python_takes_no_unknown_word(models):
    for word in ("colour", "kmax", "k-max", "seed"):
        with pytest.raises(TypeError, match=f"'{word}' is no option of the mixing"):
            next(magicmix.magicmix(models, "a tiger", "a car", **{word: 1}))


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_carries_all_but_where_to_write_and_to_compute(name, tmp_path):
    scope, _, value = OPTIONS[name]
    write_again(tmp_path / "old.png", {"parameters": {name: value}})
    if scope != RUN:
        assert pictures.read_metadata(tmp_path / "old.png")["parameters"] == json.loads(json.dumps({name: value}))
    else:
        with pytest.raises(ValueError, match=f"{name} = .* may not stand there; use prompt, layout, "):
            pictures.read_metadata(tmp_path / "old.png")


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_brings_options_of_the_mix_alone(name, models, tmp_path):
    scope, _, value = OPTIONS[name]
    (tmp_path / "magicmix.json").write_text(json.dumps({"size": [16, 16], "steps": 8, name: value}))
    with_own = dataclasses.replace(models, own_options=weights.own_options(tmp_path))
    for steps in (magicmix.magicmix(with_own, "a tiger", "a car"), magicmix.text_to_image(with_own, "a tiger")):
        if scope == MIXING:
            assert next(steps).x.isfinite().all()
        else:
            with pytest.raises(ValueError, match=f"magicmix.json: {name} = .* may not stand there; use k_max, k_min, "):
                next(steps)


@pytest.mark.parametrize("name", OF_MIX)
def test_an_option_is_the_same_however_it_is_given(name, tmp_path):
    """Over the general default, over the checkpoint's own; typed, as a keyword, from a picture, from magicmix.json."""
    _, given, value = OPTIONS[name]
    write_again(tmp_path / "old.png", {"parameters": {name: value}})
    recorded = pictures.read_metadata(tmp_path / "old.png")["parameters"]
    (tmp_path / "magicmix.json").write_text(json.dumps({name: value}))
    expected = options.Options(**{name: value})
    assert getattr(expected, name) == value != options.DEFAULTS[name]
    assert options.of_mix({}, options.parse(given, "", {})) == expected
    assert options.of_mix({}, {name: value}) == expected
    assert options.of_mix(weights.own_options(tmp_path), {}) == expected
    assert options.of_mix({}, recorded) == expected
    another = {"size": (8, 8), "token_weights": {"a": 3.0}, "negative": "", "sampler": "ddim", "steps": 50}
    own = {name: another.get(name, 0.6)}
    assert options.of_mix(own, {name: value}) == expected, "what is given comes before what a checkpoint brings"
    assert options.of_mix(own, {}) == options.Options(**own)


@pytest.mark.parametrize("name", OF_MIX)
def test_none_stands_for_a_default_only_where_the_default_is_none_or_empty(name, models):
    given = {name: None}
    if name in ("token_weights", "size", "negative"):
        assert options.of_mix({}, given) == options.Options()
        mix = lambda **given: next(magicmix.magicmix(models, "a tiger", "a car", steps=8, **given))
        assert torch.equal(mix(**given).x, mix().x)
    else:
        with pytest.raises(ValueError, match=f"{name} None is"):
            options.of_mix({}, given)
    with pytest.raises(ValueError, match=f"magicmix.json: {name} None is"):
        options.of_mix(given, {})


def test_numbers_of_numpy_are_numbers(models):
    """np.linspace and np.arange are how values are swept."""
    numbers = {"k_max": np.float64(0.75), "nu": np.float32(0.5), "guidance": np.int64(3), "steps": np.int64(9)}
    plain = {name: number.item() for name, number in numbers.items()}
    assert options.of_mix({}, numbers) == options.of_mix({}, plain)
    mix = lambda given: next(magicmix.magicmix(models, "a tiger", torch.zeros(1, 3, 16, 16), **given)).x
    assert torch.equal(mix(numbers), mix(plain))
    large = {"guidance": 10**30, "nu": Fraction(1, 2)}  # torch multiplies by neither
    assert torch.equal(mix(large), mix({"guidance": 1e30, "nu": 0.5}))
    with pytest.raises(ValueError, match="steps .* is no whole number"):
        options.of_mix({}, {"steps": np.float64(9)})
    with pytest.raises(ValueError, match="nu .* is no number"):
        options.of_mix({}, {"nu": np.bool_(True)})


def test_the_former_keyword(models):
    """reweight is token_weights; both at once cannot be right."""
    mix = lambda **given: next(magicmix.magicmix(models, "a tiger", torch.zeros(1, 3, 16, 16), steps=8, **given)).x
    today = mix(token_weights={"tiger": -2.0})
    assert torch.equal(today, mix(reweight={"tiger": -2.0})) and not torch.equal(today, mix())
    with pytest.raises((TypeError, ValueError), match="reweight"):
        mix(reweight={"tiger": -2.0}, token_weights={"tiger": 2.0})


# ------------------------------------------------------------------------- the same picture on the command line


def last(steps):
    *_, final = steps
    return final


def of_seeds(done, tmp_path, count):
    assert (done.code, done.err) == (0, "")
    return [Image.open(tmp_path / (f"mix-{4 + i}.png" if count > 1 else "mix.png")) for i in range(count)]


GIVEN = [
    {},
    {"token_weights": {"tiger": 2.0, "a": -1.0}, "negative": "a dog", "guidance": 6.0, "size": (64, 64)},
    {"k_max": 1.0, "k_min": 0.5, "nu": 0.25, "eta": 1.0, "size": (64, 64)},
    {"sampler": "ddpm", "size": (64, 48)},
]


@pytest.mark.parametrize("own", [None, {"steps": 9, "negative": "a house", "sampler": "ddpm", "size": [40, 72]}])
@pytest.mark.parametrize("given", GIVEN, ids=[" ".join(given) for given in GIVEN])
@pytest.mark.parametrize(("kind", "count"), [("picture", 1), ("prompt", 2)])
def test_the_same_arguments_give_the_same_picture(kind, count, given, own, request, tmp_path):
    """Whatever is not given is the checkpoint's own default in both, its size included."""
    source = weights.TINY if own is None else request.getfixturevalue("folder")
    if own is not None:
        (source / "magicmix.json").write_text(json.dumps(own))
    given = ({"steps": 8} if own is None else {}) | given
    typed = []
    for name, value in given.items():
        for word, s in value.items() if name == "token_weights" else ():
            typed += ["--token-weight", f"{word}={s}"]
        if name != "token_weights":
            text = f"{value[1]}x{value[0]}" if name == "size" else str(value)
            typed += [f"--{name.replace('_', '-')}", text]
    what = ["--layout", LAYOUT] if kind == "picture" else ["--layout-prompt", "a house"]
    done = run("a tiger", *what, *typed, "--weights", source, "--seed", 4, "--count", count, "--quiet", cwd=tmp_path)

    models = weights.load(source)
    layout = "a house"
    if kind == "picture":
        size = given.get("size", (own or {}).get("size", (128, 128)))
        layout = pictures.fit(pictures.open_layout(LAYOUT).picture, tuple(size))
    final = last(magicmix.magicmix(models, "a tiger", layout, seeds=range(4, 4 + count), **given))
    for ours, theirs in zip(magicmix.decode(models, final.x), of_seeds(done, tmp_path, count), strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
