"""Bad input, hostile files and a machine that fails: one line, exit code 2, and nothing lost.

Each case goes through the real command in a process of its own, and through the Python function that it reaches, which
must raise a documented exception before the UNet is called.
"""

import hashlib
import io
import json
import os
import re
import resource
import runpy
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LAYOUT, PRECIOUS, ROOT, change_config, change_tensors, forks, refused, run, script, write_again
from PIL import Image, ImageDraw
from safetensors.torch import save_file

import clip
import magicmix
import weights
from command import machine, options, pictures
from weights import CheckpointError, __main__, configs

NAN = float("nan")


@pytest.fixture(scope="module")
def models():
    """The embedded checkpoint, whose UNet must not be asked."""
    models = weights.load()
    models.unet.forward = None
    return models


# ----------------------------------------------------------------------------------------------------- pictures


def sample(mode="RGB", size=(96, 64)):
    return Image.effect_noise(size, 80).convert(mode)


def truncated(path, keep):
    sample().save(path)
    path.write_bytes(path.read_bytes()[:keep])


def bomb(path, width, height):
    """A valid PNG header of so many pixels, and hardly any data."""
    sample("L", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)


LARGE = "pixels); scale it down to fewer than 89 million"
BAD_PICTURES = {
    "missing": (lambda path: None, "does not exist; give a picture file"),
    "a folder": (lambda path: path.mkdir(), "it is not a file; give a picture file"),
    "a pipe": (os.mkfifo, "it is not a file; give a picture file"),
    "empty": (lambda path: path.write_bytes(b""), "is not a readable picture; use PNG, JPEG"),
    "text": (lambda path: path.write_text("no picture"), "is not a readable picture; use PNG, JPEG"),
    "truncated in its signature": (lambda path: truncated(path, 5), "is not a readable picture"),
    "truncated in its header": (lambda path: truncated(path, 20), "is not a readable picture"),
    "truncated in its pixels": (lambda path: truncated(path, 2000), "is not a readable picture"),
    "20,000 x 20,000": (lambda path: bomb(path, 20_000, 20_000), f"limit of 178956970 {LARGE}"),
    "10,000 x 10,000": (lambda path: bomb(path, 10_000, 10_000), f"limit of 89478485 {LARGE}"),
    "float pixels": (lambda path: sample("F").save(path, "TIFF"), "its pixels are of the kind F"),
    "EPS, which is a program": (lambda path: sample().save(path, "EPS"), "is not a readable picture; use PNG, JPEG"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures(name, tmp_path):
    write, message = BAD_PICTURES[name]
    path = tmp_path / "layout.png"
    write(path)
    error = refused("a tiger", "--layout", "layout.png", cwd=tmp_path, message=message)
    assert "layout 'layout.png'" in error
    with pytest.raises(FileNotFoundError if name == "missing" else ValueError, match=re.escape(message)):
        pictures.open_layout(path)


def halves(left, right, mode="RGB", size=(64, 64)):
    picture = Image.new(mode, size, right)
    ImageDraw.Draw(picture).rectangle((0, 0, size[0] // 2 - 1, size[1] - 1), fill=left)
    return picture


def animation(path):
    others = [Image.new("RGB", (64, 64), colour) for colour in ("green", "blue")]
    halves("red", "black").save(path, "GIF", save_all=True, append_images=others)


def sideways(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees clockwise to be shown: what is at the bottom comes to the left
    stored = halves("black", "red").rotate(-90)  # red below black
    stored.save(path, "PNG", exif=exif)


def sixteen_bits(path):
    grey = np.zeros((64, 64), dtype=np.uint16)
    grey[:, :32] = 257 * 100  # 100 of 255
    Image.fromarray(grey).save(path, "PNG")


RED, BLACK, WHITE, GREY = (255, 0, 0), (0, 0, 0), (255, 255, 255), (100, 100, 100)
GOOD_PICTURES = {  # how it is written, the left and the right half's colour
    "RGB": (lambda path: halves("red", "black").save(path, "PNG"), RED, BLACK),
    "CMYK": (lambda path: halves((0, 255, 255, 0), (0, 0, 0, 255), "CMYK").save(path, "TIFF"), RED, BLACK),
    "CMYK JPEG": (lambda path: halves((0, 255, 255, 0), (0, 0, 0, 255), "CMYK").save(path, "JPEG"), RED, BLACK),
    "16 bits": (sixteen_bits, GREY, BLACK),
    "palette": (lambda path: halves("red", "black").convert("P").save(path, "PNG"), RED, BLACK),
    "1 bit": (lambda path: halves(1, 0, "1").save(path, "PNG"), WHITE, BLACK),
    "grey": (lambda path: halves(100, 0, "L").save(path, "PNG"), GREY, BLACK),
    "grey and alpha": (lambda path: halves((100, 255), (0, 0), "LA").save(path, "PNG"), GREY, WHITE),
    "alpha": (lambda path: halves((255, 0, 0, 255), (0, 0, 0, 0), "RGBA").save(path, "PNG"), RED, WHITE),
    "half transparent": (lambda path: halves((255, 0, 0, 128), (0, 0, 0, 255), "RGBA").save(path, "PNG"),
                         (255, 127, 127), BLACK),
    "transparent palette": (lambda path: halves(0, 1, "P").save(path, "GIF", transparency=1), None, WHITE),
    "animated": (animation, RED, BLACK),
    "sideways": (sideways, RED, BLACK),
    "1 x 1": (lambda path: Image.new("RGB", (1, 1), "red").save(path, "PNG"), RED, RED),
    "long and narrow": (lambda path: halves("red", "black", size=(20_000, 3)).save(path, "PNG"), RED, BLACK),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD_PICTURES)
def test_pictures_of_every_kind(name, tmp_path):
    """The colour in the middle of each half, within 3 grey levels: the palette's and JPEG's own rounding."""
    write, left, right = GOOD_PICTURES[name]
    write(tmp_path / "layout")
    layout = pictures.open_layout(tmp_path / "layout")
    assert layout.is_animated == (name == "animated")
    assert layout.sha256 == hashlib.sha256((tmp_path / "layout").read_bytes()).hexdigest()
    pixels = (pictures.fit(layout.picture, (32, 48))[0] + 1) * 127.5
    assert pixels.shape == (3, 32, 48)
    for colour, column in ((left, 8), (right, 40)):
        if colour:
            assert (pixels[:, 16, column] - torch.tensor(colour)).abs().max() <= 3, (name, pixels[:, 16, column])


def test_what_was_done_to_a_picture_is_said(tmp_path):
    animation(tmp_path / "layout.gif")
    said = [
        "layout: it holds more than one picture; the first is used",
        "layout: resized and centre-cropped from 64x64 to 64x32",
        "mix.png",
    ]
    code, out, _ = run("a tiger", "--layout", "layout.gif", "--size", "64x32", "--steps", "2", cwd=tmp_path)
    assert code == 0 and out.splitlines() == said
    code, out, _ = run("--again", "mix.png", cwd=tmp_path)
    assert code == 0 and out.splitlines() == ["layout: layout.gif", *said]


def test_a_picture_that_fits_is_left_alone_and_nothing_is_said(tmp_path):
    halves("red", "black", size=(96, 64)).save(tmp_path / "layout.png")
    code, out, _ = run("a tiger", "--layout", "layout.png", "--size", "96x64", "--steps", "2", cwd=tmp_path)
    assert (code, out) == (0, "mix.png\n")
    code, out, _ = run("--again", "mix.png", cwd=tmp_path)
    assert (code, out) == (0, "layout: layout.png\nmix.png\n")


# ----------------------------------------------------------------------------------------------- standard input


def piped(data, *arguments, cwd):
    """The command as the shell runs it, with the bytes, or what a file holds, on standard input."""
    line = [sys.executable, str(ROOT / "magicmix.py"), "a tiger", "--steps", "2", "--size", "64", *arguments]
    return subprocess.run(line, input=data, cwd=cwd, capture_output=True, timeout=300)


def test_a_layout_from_standard_input(tmp_path):
    """The same picture as from the file. It is made again with the layout given anew, never from what is piped in."""
    mix = ("a tiger", "--steps", "2", "--size", "64", "--quiet")
    done = piped(LAYOUT.read_bytes(), "--layout", "-", "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert run(*mix, "--layout", LAYOUT, "-o", "file.png", cwd=tmp_path).code == 0
    one, two = (Image.open(tmp_path / name) for name in ("mix.png", "file.png"))
    assert np.array_equal(np.asarray(one), np.asarray(two))
    one, two = (json.loads(picture.info["magicmix"]) for picture in (one, two))
    assert one["parameters"].pop("layout") == "-" and two["parameters"].pop("layout") == str(LAYOUT)
    assert one == two, "the layout's sha256 too"
    first = (tmp_path / "mix.png").read_bytes()
    assert run("--again", "mix.png", "--layout", LAYOUT, "-o", "b.png", "--quiet", cwd=tmp_path).code == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), np.asarray(Image.open(tmp_path / "mix.png")))
    done = run("--again", "mix.png", cwd=tmp_path)
    line = "magicmix: the picture's layout came through standard input; give the layout with --layout\n"
    assert (done.code, done.err) == (2, line) and (tmp_path / "mix.png").read_bytes() == first


class Terminal(io.BytesIO):
    def isatty(self):
        return True


def test_standard_input_that_is_no_layout(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIPED", 1000)
    for stream, message in [
        (io.BytesIO(b""), "layout '-', standard input, is not a readable picture; use PNG, JPEG"),
        (io.BytesIO(b"no picture"), "layout '-', standard input, is not a readable picture; use PNG, JPEG"),
        (io.BytesIO(bytes(1001)), "layout '-', standard input, has more than 1,000 bytes; give it as a file"),
        (Terminal(), "layout '-' is standard input, which is not there; pipe a picture into the command"),
        (None, "layout '-' is standard input, which is not there; pipe a picture into the command"),
    ]:
        monkeypatch.setattr(sys, "stdin", stream and io.TextIOWrapper(stream))
        with pytest.raises(ValueError, match=re.escape(message)):
            pictures.piped_layout()


# ------------------------------------------------------------------------------------------------------ numbers

HUGE = 2**64
LARGEST_SEED = "use 0 to 18446744073709551615"
# What is wrong with the command; its line; the same in Python where it has a meaning there; its message.
NUMBERS = [
    ("--k-min 0.5 --k-max 0.4", "k_min 0.5 is above k_max 0.4", {"k_min": 0.5, "k_max": 0.4}, None),
    ("--k-max 0.05", "k_max 0.05 is below k_min 0.08, the checkpoint's own; give a k_min of 0 to 0.05 as well",
     {"k_max": 0.05}, None),
    ("--k-min 0.7", "k_min 0.7 is above k_max 0.6, the checkpoint's own; give a k_max of 0.7 to 1 as well",
     {"k_min": 0.7}, None),
    ("--k-max 1.1", "k_max 1.1 is out of range; use 0 to 1", {"k_max": 1.1}, None),
    ("--k-min -0.1", "k_min -0.1 is out of range; use 0 to 1", {"k_min": -0.1}, None),
    ("--k-max nan", "k_max nan is out of range; use 0 to 1", {"k_max": NAN}, None),
    ("--nu 1.5", "nu 1.5 is out of range; use 0 to 1", {"nu": 1.5}, None),
    ("--nu much", "argument --nu: 'much' is no number", {"nu": "much"}, "nu 'much' is no number"),
    ("--nu true", "argument --nu: 'true' is no number", {"nu": True}, "nu True is no number"),
    ("--steps 0", "steps 0 is out of range; use 1 to 999", {"steps": 0}, None),
    ("--steps 1000", "steps 1000 is out of range; use 1 to 999", {"steps": 1000}, None),
    ("--steps 1001", "steps 1001 is out of range; use 1 to 999", {"steps": 1001}, None),
    ("--steps 2.5", "argument --steps: '2.5' is no whole number", {"steps": 2.5}, "steps 2.5 is no whole number"),
    ("--guidance -1", "guidance -1.0 is out of range; use 0 to 1e+38", {"guidance": -1.0}, None),
    ("--guidance nan", "guidance nan is out of range", {"guidance": NAN}, None),
    ("--guidance inf", "guidance inf is out of range", {"guidance": float("inf")}, None),
    ("--guidance 2e38", "guidance 2e+38 is out of range; use 0 to 1e+38", {"guidance": 2e38}, None),  # of float32 still
    (f"--guidance {'9' * 5000}", f"argument --guidance: '{'9' * 59} ... {'9' * 29}' has 5,000 characters; use 0 to 1e",
     {"guidance": 10**5000}, "guidance <int> is out of range; use 0 to 1e+38"),
    (f"--seed {'9' * 5000}", f"argument --seed: '{'9' * 59} ... {'9' * 29}' has 5,000 characters; {LARGEST_SEED}",
     {"seeds": [10**5000]}, f"seed <int> is out of range; {LARGEST_SEED}"),
    ("--seed -1", f"seed -1 is out of range; {LARGEST_SEED}", {"seeds": [-1]}, None),
    (f"--seed {HUGE}", f"seed {HUGE} is out of range; {LARGEST_SEED}", {"seeds": [HUGE]}, None),
    ("--seed 1.5", "argument --seed: '1.5' is no whole number", {"seeds": [1.5]}, "seed 1.5 is no whole number"),
    (f"--seed {HUGE - 1} --count 2", f"seed {HUGE}, the last of count 2, is out of range", {"seeds": [HUGE - 1, HUGE]},
     f"seed {HUGE} is out of range"),
    ("--count 0", "count 0 is out of range; use 1 to 1000", {"seeds": []}, None),
    ("--count -3", "count -3 is out of range; use 1 to 1000", None, None),
    ("--count 1001", "count 1001 is out of range; use 1 to 1000", {"seeds": range(1001)}, None),
    (f"--count {10**30}", f"count {10**30} is out of range; use 1 to 1000", None, None),
    ("--size 100", "size 100x100 does not fit; both sides must be multiples of 8", {"size": (100, 100)}, None),
    ("--size 64x4", "size 64x4 does not fit; both sides must be multiples of 8", {"size": (4, 64)}, None),
    ("--size 0", "size 0x0 is out of range; use sides of up to 4096 pixels", {"size": (0, 0)}, None),
    ("--size 64x5000", "size 64x5000 is out of range", {"size": (5000, 64)}, None),
    ("--size 64x64x64", "'64x64x64' is no size; use a number of pixels or WIDTHxHEIGHT", {"size": (64, 64, 64)},
     "size (64, 64, 64) is no pair of whole numbers"),
    ("--size -64", "'-64' is no size", {"size": -64}, "size -64x-64 is out of range; use sides of up to 4096"),
    ("--size 64.0", "'64.0' is no size", {"size": 64.0}, "size 64.0 is no pair of whole numbers"),
    (f"--size {'9' * 5000}", f"'{'9' * 59} ... {'9' * 29}' is no size", {"size": (64, 10**5000)},
     "size <int>x64 is out of range; use sides of up to 4096"),
    ("--size x", "'x' is no size", {"size": "x"}, "size 'x' is no pair of whole numbers"),
    ("--eta 2", "eta 2.0 is out of range; use 0 to 1", {"eta": 2.0}, None),
    ("--sampler euler", "sampler 'euler' is not known; use ddim, ddpm", {"sampler": "euler"}, None),
    ("--token-weight tiger", "argument --token-weight/--reweight: 'tiger' must be WORD=S", {"token_weights": "tiger"},
     "token_weights 'tiger' is no table of words and numbers"),
    ("--reweight tiger", "argument --token-weight/--reweight: 'tiger' must be WORD=S", {"reweight": ["tiger", 1]},
     "token_weights ['tiger', 1] is no table of words and numbers"),
    ("--token-weight =1", "'=1' must be WORD=S", {"token_weights": {"": 1.0}}, "'' is not in the prompt"),
    ("--token-weight tiger=much", "argument --token-weight/--reweight: 'much' is no number",
     {"token_weights": {"tiger": "much"}}, "token_weights tiger: 'much' is no number"),
    ("--token-weight lion=0", "token weight: 'lion' is not in the prompt; its words are: a, tiger",
     {"token_weights": {"lion": 0.0}}, None),
    ("--token-weight tiger=nan", "token_weights tiger: nan is out of range; use -1e+38 to 1e+38; -2 to 2 is the",
     {"token_weights": {"tiger": NAN}}, None),
    ("--token-weight tiger=1e300", "token_weights tiger: 1e+300 is out of range; use -1e+38 to 1e+38; -2 to 2 is the",
     {"token_weights": {"tiger": 1e300}}, None),
    (f"--token-weight tiger={'9' * 5000}", "has 5,000 characters; use -1e+38 to 1e+38",
     {"token_weights": {"tiger": 10**5000}}, "token_weights tiger: <int> is out of range"),
    ("--reweight tiger=-inf", "token_weights tiger: -inf is out of range",
     {"reweight": {"tiger": -float("inf")}}, None),
    ("--colour red", "unrecognized arguments: --colour red", None, None),
    ("more", "unrecognized arguments: more\n", None, None),
]  # fmt: skip


@pytest.mark.parametrize(("given", "line", "arguments", "message"), NUMBERS, ids=[row[0][:40] for row in NUMBERS])
def test_bad_numbers(given, line, arguments, message, tmp_path, models):
    refused("a tiger", "--layout-prompt", "a car", *given.split(), cwd=tmp_path, message=line)
    if arguments is not None:
        with pytest.raises(ValueError, match=re.escape(message or line)):
            next(magicmix.magicmix(models, "a tiger", "a car", **arguments))
        if "size" not in arguments:
            with pytest.raises(ValueError, match=re.escape(message or line)):
                next(magicmix.magicmix(models, "a tiger", torch.zeros(1, 3, 64, 64), **arguments))
        if not arguments.keys() & {"k_max", "k_min", "nu"}:  # those of a layout
            with pytest.raises(ValueError, match=re.escape(message or line)):
                next(magicmix.text_to_image(models, "a tiger", **arguments))


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("a tiger in snow --layout-prompt car", ': "a tiger in snow"'),
        ("--layout-prompt car a tiger in snow", ': "a tiger in snow"'),
        ("a --layout-prompt red tiger in snow", ""),  # the layout's, or the content's
    ],
)
def test_an_unquoted_prompt(typed, text, tmp_path):
    """The shell hands its words over one by one."""
    line = f"unrecognized arguments: tiger in snow; write a text of several words in quotes{text}\n"
    assert refused(*typed.split(), cwd=tmp_path, message=line) == f"magicmix: {line}"


def test_a_default_that_nobody_typed_is_named_as_one():
    """Also where the checkpoint has no options of its own."""
    for given, line in {
        "k_max": "k_max 0.2 is below k_min 0.3, the default; give a k_min of 0 to 0.2 as well",
        "k_min": "k_min 0.9 is above k_max 0.6, the default; give a k_max of 0.9 to 1 as well",
    }.items():
        with pytest.raises(ValueError, match=re.escape(line)):
            options.of_mix({}, {given: {"k_max": 0.2, "k_min": 0.9}[given]})
    with pytest.raises(ValueError, match=r"k_max 0.2 is below k_min 0.5, the checkpoint's own"):
        options.of_mix({"k_min": 0.5}, {"k_max": 0.2})
    with pytest.raises(ValueError, match=r"k_min 0.5 is above k_max 0.2; mixing runs from k_max down to k_min"):
        options.of_mix({}, {"k_max": 0.2, "k_min": 0.5})


def test_arguments_of_several_lines_make_one(tmp_path):
    refused("a tiger", "two\nlines", "more", cwd=tmp_path, message="unrecognized arguments: two lines more")


def test_a_layout_of_a_size_that_does_not_fit(models):
    for sides in ((60, 64), (64, 4)):
        with pytest.raises(ValueError, match=f"size {sides[1]}x{sides[0]} does not fit; both sides must be multiples"):
            next(magicmix.magicmix(models, "a tiger", torch.zeros(1, 3, *sides)))


# --------------------------------------------------------------------------------------------------------- text


PLACES = {  # what each place takes, in words
    "layout": "give a picture file",
    "output": "give a name that ends in .png",
    "noise": "give a .npy or .safetensors file",
    "keep_noise": "give a name that ends in .npy or .safetensors",
    "weights": "give a folder, a .safetensors file or a hub id",
    "unet": "give a folder or a .safetensors file",
    "vae": "give a folder or a .safetensors file",
    "again": "give a picture that magicmix made",
}
NO_PLACES = [  # what stands where a file or a folder should, and what is said of it
    ("", "'' is no path (from a shell variable that is not set?)"),
    ("https://a.b/c.png", "'https://a.b/c.png' is a URL, and nothing is fetched from one"),
    ("x" * 256, f"'{'x' * 59} ... {'x' * 29}' is too long (a name has up to 255 bytes, a path 4095)"),
]


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize(("value", "wrong"), NO_PLACES, ids=["nothing", "a URL", "a long name"])
def test_what_is_no_place(value, wrong, name, tmp_path):
    assert PLACES.keys() == {n for n, facts in options.FACTS.items() if isinstance(facts["kind"], options.Place)}
    line = f"magicmix: {name} {wrong}; {PLACES[name]}\n"
    layout = () if name == "layout" else ("--layout-prompt", "a car")
    typed = "-o" if name == "output" else f"--{name.replace('_', '-')}"
    assert refused("a tiger", *layout, typed, value, cwd=tmp_path, message=wrong) == line
    if value.startswith("https"):
        with pytest.raises(ValueError, match="is a URL"):
            options.check({name: Path(value)})  # which has one slash


def test_layouts_exclude_each_other(tmp_path):
    refused("a tiger", cwd=tmp_path, message="give one of --layout IMAGE and --layout-prompt TEXT")
    both = ("--layout", LAYOUT, "--layout-prompt", "a car")
    refused("a tiger", *both, cwd=tmp_path, message="give one of --layout IMAGE and --layout-prompt TEXT")
    refused("--layout", LAYOUT, cwd=tmp_path, message="the content prompt is missing")


def test_text_that_is_no_unicode(tmp_path, models):
    refused("tiger \udcff", "--layout-prompt", "a car", cwd=tmp_path, message=r"'tiger \udcff' holds half a character")
    for arguments in (("\ud800", "a car"), ("a tiger", "\ud800")):
        with pytest.raises(ValueError, match="holds half a character"):
            next(magicmix.magicmix(models, *arguments))
    with pytest.raises(ValueError, match="negative .* holds half a character"):
        next(magicmix.magicmix(models, "a tiger", "a car", negative="\ud800"))
    with pytest.raises(ValueError, match="token_weights .* holds half a character"):
        next(magicmix.magicmix(models, "a tiger", "a car", token_weights={"\ud800": 1.0}))


TEXTS = ["", "🐯👩‍👩‍👧‍👦", "虎", "نمر في الغابة", "बाघ", "a\x01\x1b[31mtiger\u202e", "<|endoftext|>"]


@pytest.mark.parametrize("prompt", TEXTS)
def test_every_text_is_a_prompt(prompt, tmp_path):
    given = ["--layout-prompt", prompt, "--negative", prompt, "--steps", "2", "--size", "64"]
    code, out, error = run(prompt, *given, "-o", "mix.png", cwd=tmp_path)
    assert code == 0 and "\x1b" not in out and out.endswith("mix.png\n"), error
    code, _, error = run("--again", "mix.png", "-o", "again.png", cwd=tmp_path)
    assert code == 0 and (tmp_path / "again.png").read_bytes() == (tmp_path / "mix.png").read_bytes(), error


def test_the_words_that_are_cut_off_are_printed(tmp_path, models):
    words = " ".join(f"tiger{i}" for i in range(40))
    code, out, error = run("a cat", "--layout-prompt", words, "--negative", words, "--steps", "1", cwd=tmp_path)
    lines = out.splitlines()
    rest = clip.cut_off(models.tokenizer, words)
    assert code == 0 and words.endswith(rest) and 0 < len(rest) < len(words) and "longer than" not in error
    assert lines[:2] == [f"{name}: beyond 32 tokens, cut off: {rest}" for name in ("layout_prompt", "negative")]
    # The oracle: what is cut off changes nothing, one word more does.
    read = words.removesuffix(rest)
    prompts = [words, read, read.rsplit(maxsplit=1)[0]]
    states = clip.encode_prompts(models.tokenizer, models.text_encoder, prompts)
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    for short in ("", "a tiger", "tiger " * 30):
        assert clip.cut_off(models.tokenizer, short) == ""
    assert clip.cut_off(models.tokenizer, "tiger " * 30 + "lion") == "lion"


# -------------------------------------------------------------------------------------------------- checkpoints


def tensors(part, change):
    """A change of a part's safetensors file: change(state) as {name: tensor}."""
    return lambda folder: change_tensors(folder, part, change)


def header(change):
    """A change of the raw bytes of the VAE's file: change(header as a dict, the tensors' bytes) -> bytes."""

    def write(folder):
        path = folder / "vae" / "diffusion_pytorch_model.safetensors"
        data = path.read_bytes()
        end = 8 + struct.unpack("<Q", data[:8])[0]
        path.write_bytes(change(json.loads(data[8:end]), data[end:]))

    return write


def packed(fields, body, length=None):
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def first(fields):
    return fields[min((name for name in fields if name != "__metadata__"), key=lambda n: fields[n]["data_offsets"])]


def moved(by):
    def change(fields, body):
        first(fields)["data_offsets"] = [offset + by for offset in first(fields)["data_offsets"]]
        return packed(fields, body)

    return header(change)


def retyped(dtype):
    """One tensor's dtype, by its name in the header only."""

    def change(fields, body):
        first(fields)["dtype"] = dtype
        return packed(fields, body)

    return header(change)


def config(part, **fields):
    return lambda folder: change_config(folder, part, **fields)


def another(part, **fields):
    """A sound part of another size: its config and its file agree with each other."""

    def write(folder):
        config(part, **fields)(folder)
        made = weights.MODELS[part](configs.read_config(folder / part / "config.json", part))
        (path,) = (folder / part).glob("*.safetensors")
        save_file(made.state_dict(), path)

    return write


def one_token_more(folder):
    path = folder / "tokenizer" / "vocab.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tigers</w>": 5000}))


def replaced(name, content):
    def write(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def pickled(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")


def sharded(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {"conv_in.weight": "../../secret.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def spoil(part, name, place, value):
    """One number of one tensor."""
    return tensors(part, lambda state: state[name].view(-1)[place].fill_(value))


def pipe(folder):
    (folder / "vae" / "config.json").unlink()
    os.mkfifo(folder / "vae" / "config.json")


UNET = "unet/diffusion_pytorch_model.safetensors"
CHECKPOINTS = {  # what is done to a copy of the embedded checkpoint, the line
    "the file is empty": (replaced(UNET, b""), "is not a readable safetensors file"),
    "a truncated length": (replaced(UNET, b"\x10\0\0"), "is not a readable safetensors file"),
    "a truncated header": (header(lambda h, body: packed(h, b"")[:100]), "invalid header length"),
    "truncated tensors": (header(lambda h, body: packed(h, body[:-1])), "file not fully covered"),
    "more than the tensors": (header(lambda h, body: packed(h, body + b"x")), "file not fully covered"),
    "a header beyond the file": (header(lambda h, body: packed(h, body[:100], 4_000_000)), "invalid header length"),
    "an absurd header": (header(lambda h, body: packed(h, body, 2**63)), "claims 9,223,372,036,854,775,808 bytes"),
    "a header that is no JSON": (header(lambda h, b: struct.pack("<Q", 4) + b"{{{{" + b), "invalid JSON in header"),
    "overlapping offsets": (moved(-4), "is not a readable safetensors file"),
    "offsets out of range": (moved(1 << 40), "is not a readable safetensors file"),
    "an overflowing shape": (header(lambda h, b: packed({"a": {"dtype": "F32", "shape": [2**62, 8],
                             "data_offsets": [0, 8]}}, b"\0" * 8)), "overflow"),
    "an absurd empty shape": (header(lambda h, b: packed({"a": {"dtype": "F32", "shape": [0, 2**63],
                              "data_offsets": [0, 0]}}, b"")), "is not a readable safetensors file"),
    "too many tensors": (header(lambda h, b: packed({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                         for i in range(4_001)}, b"")), "4,001 tensors, the most that are read are 4,000"),
    "an unknown dtype": (retyped("F31"), "is not a readable safetensors file"),
    "whole numbers": (tensors("vae", lambda s: s.update({"quant_conv.bias": torch.ones(8, dtype=torch.int64)})),
                      "tensor quant_conv.bias is int64; use float32, float16 or bfloat16"),
    "eight bits": (tensors("vae", lambda s: s.update({"quant_conv.bias": torch.ones(8).to(torch.float8_e4m3fn)})),
                   "tensor quant_conv.bias is float8_e4m3fn; use float32, float16 or bfloat16"),
    "a NaN": (spoil("unet", "conv_in.bias", 7, NAN), "unet: tensor conv_in.bias holds NaN or Inf"),
    "an Inf": (spoil("vae", "decoder.conv_in.bias", 0, float("inf")), "vae: tensor decoder.conv_in.bias holds NaN"),
    "a control character": (tensors("vae", lambda s: s.update({"\x1b[31mred": torch.ones(1)})), r"tensor \x1b[31mred"),
    "another text encoder": (another("text_encoder", hidden_size=64), "cross_attention_dim 128, the text encoder's"),
    "another number of channels": (another("unet", in_channels=3), "the UNet and the VAE must have 4 latent channels"),
    "another vocabulary": (one_token_more, "the tokenizer's ids reach to 5000, the text encoder's to 2421"),
    "only a pickle": (pickled, "holds only diffusion_pytorch_model.bin, a pickle, which runs code when it is opened"),
    "an index that leaves the folder": (sharded, "'../../secret.safetensors' is not a file name in that folder"),
    "no tokenizer": (replaced("tokenizer", None), "has no tokenizer folder, and its vocabulary is not CLIP's"),
    "a tokenizer of nonsense": (replaced("tokenizer/vocab.json", "[]"), "does not hold a CLIP tokenizer"),
    "an absurd tokenizer": (replaced("tokenizer/more.json", b" " * (17 << 20)), "has 17,825,792 bytes"),
    "an endless prompt": (replaced("tokenizer/tokenizer_config.json", '{"model_max_length": 1000000000}'),
                          "model_max_length is 1000000000; the encoder takes 3 to 32"),
    "a model_max_length too large": (replaced("tokenizer/tokenizer_config.json", '{"model_max_length": 77}'),
                                     "the tokenizer's model_max_length is 77; the encoder takes 3 to 32"),
    "no config": (replaced("unet/config.json", None), "config.json is missing"),
    "no scheduler": (replaced("scheduler/scheduler_config.json", None), "scheduler_config.json is missing"),
    "broken JSON": (replaced("vae/config.json", '{"a": '), "config.json cannot be read as JSON"),
    "a list": (replaced("vae/config.json", "[]"), "must hold a JSON object, not list"),
    "deep JSON": (replaced("vae/config.json", "[" * 100_000), "config.json cannot be read as JSON"),
    "no text": (replaced("vae/config.json", b"\xff\xfe\xff"), "config.json cannot be read as JSON"),
    "a huge config": (replaced("vae/config.json", " " * (1 << 21)), "has 2,097,152 bytes"),
    "a pipe for a config": (pipe, "config.json is missing"),
    "another part's config": (lambda f: shutil.copy(f / "vae" / "config.json", f / "unet"),
                              "_class_name is 'AutoencoderKL'; use a model with the UNet2DConditionModel"),
    "the config of another model": (config("unet", num_single_layers=38),
                                    "num_single_layers is 38; no release of its library that is known has that field"),
    "another width": (config("unet", cross_attention_dim=768), "the config asks for"),
    "SDXL": (config("unet", cross_attention_dim=2048), "is SDXL; use a text-to-image model of SD 1 or SD 2"),
    "text for a number": (config("unet", norm_num_groups="8"), "norm_num_groups is '8'; that is no usable value"),
    "true for a number": (config("unet", layers_per_block=True), "layers_per_block is True; that is no usable value"),
    "a negative width": (config("unet", block_out_channels=[-96, 128, 160]), "that is no usable value"),
    "no levels": (config("unet", block_out_channels=[]), "block_out_channels is (); that is no usable value"),
    "absurd widths": (config("unet", block_out_channels=[10**12] * 3), "that is no usable value"),
    "absurd levels": (config("vae", block_out_channels=[32] * 10**5), "that is no usable value"),
    "absurd layers": (config("text_encoder", num_hidden_layers=10**9), "num_hidden_layers is 1000000000; that is no"),
    "absurd vocabulary": (config("text_encoder", vocab_size=10**15), "vocab_size is 1000000000000000; that is no"),
    "absurd schedule": (config("scheduler", num_train_timesteps=10**12), "num_train_timesteps is 1000000000000; that"),
    "absurd size": (config("unet", sample_size=10**9), "sample_size is 1000000000; that is no usable value"),
    "infinite scale": (config("vae", scaling_factor=float("inf")), "scaling_factor is inf; that is no usable value"),
    "negative eps": (config("unet", norm_eps=-1e-5), "norm_eps is -1e-05; that is no usable value"),
    "betas that fall": (config("scheduler", beta_start=0.5, beta_end=0.1), "must rise between 0 and 1"),
    "groups that do not divide": (config("vae", norm_num_groups=7), "must be multiples of norm_num_groups 7"),
    "heads that do not divide": (config("text_encoder", num_attention_heads=3), "must be a multiple of"),
    "heads of the UNet": (config("unet", attention_head_dim=7), "must be even and multiples of"),
    "options that are no JSON": (replaced("magicmix.json", "{"), "magicmix.json cannot be read as JSON"),
    "options that are a list": (replaced("magicmix.json", "[]"), "magicmix.json must hold a JSON object, not list"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoints(name, tmp_path, folder):
    change, message = CHECKPOINTS[name]
    change(folder)
    refused("a tiger", "--layout-prompt", "a car", "--weights", "checkpoint", cwd=tmp_path, message=message)
    with pytest.raises(CheckpointError) as caught:
        weights.load(folder)
    assert message in machine.one_line(str(caught.value))


MIXING_ONLY = "may not stand there; use k_max, k_min, nu, token_weights, steps, guidance, negative, sampler, eta, size"
OWN_OPTIONS = [  # a checkpoint's magicmix.json, and what is said of it
    ({"steps": "many"}, "steps 'many' is no whole number"),
    ({"steps": True}, "steps True is no whole number"),
    ({"k_max": None}, "k_max None is no number"),
    ({"k_min": 0.9, "k_max": 0.1}, "k_min 0.9 is above k_max 0.1"),
    ({"nu": 7}, "nu 7 is out of range; use 0 to 1"),
    ({"sampler": ["ddim"]}, "sampler ['ddim'] is not known; use ddim, ddpm"),
    ({"nu": 10**400}, f"nu 1{'0' * 59} ... {'0' * 30} is out of range; use 0 to 1"),
    ({"guidance": 10**400}, f"guidance 1{'0' * 59} ... {'0' * 30} is out of range; use 0 to 1e+38"),
    ({"token_weights": {"tiger": -(10**400)}}, f"token_weights tiger: -1{'0' * 58} ... {'0' * 30} is out of range"),
    ({"size": [64]}, "size [64] is no pair of whole numbers"),
    ({"layout": "a.png"}, f"layout = 'a.png' {MIXING_ONLY}"),
    ({"weights": "folder"}, f"weights = 'folder' {MIXING_ONLY}"),
    ({"output": "/etc/passwd"}, f"output = '/etc/passwd' {MIXING_ONLY}"),
    ({"prompt": "a lion"}, f"prompt = 'a lion' {MIXING_ONLY}"),
    ({"seed": 5}, f"seed = 5 {MIXING_ONLY}"),
    ({"dtype": "bf16"}, f"dtype = 'bf16' {MIXING_ONLY}"),
    ({"colour": "red"}, f"colour = 'red' {MIXING_ONLY}"),
]


@pytest.mark.parametrize(("own", "message"), OWN_OPTIONS, ids=[str(own)[:60] for own, _ in OWN_OPTIONS])
def test_a_checkpoints_options(own, message, tmp_path, folder):
    (folder / "magicmix.json").write_text(json.dumps(own))
    message = f"magicmix.json: {message}"
    refused("a tiger", "--layout-prompt", "a car", "--weights", "checkpoint", cwd=tmp_path, message=message)
    with_own = weights.load(folder)
    with_own.unet.forward = None
    for steps in (magicmix.magicmix(with_own, "a tiger", "a car"), magicmix.text_to_image(with_own, "a tiger")):
        with pytest.raises(ValueError, match=re.escape(message)):
            next(steps)


DEEP = {  # in the middle of a tensor, where loading does not look: (part, tensor, place)
    "text_encoder": ("text_model.encoder.layers.1.mlp.fc2.weight", 9999, NAN),
    "unet": ("mid_block.resnets.0.conv1.weight", 9999, NAN),
    "vae": ("decoder.up_blocks.2.resnets.0.conv2.weight", 9999, -float("inf")),
}


@pytest.mark.parametrize("part", DEEP)
def test_one_bad_number_in_a_checkpoint(part, tmp_path, folder):
    """The VAE's shows when it is loaded, the text encoder's when a prompt is encoded, the UNet's after its first call.
    A bad first number of a tensor shows in any part when it is loaded: those are among the checkpoints above."""
    name, place, value = DEEP[part]
    spoil(part, name, place, value)(folder)
    message = f"{part}: tensor {name} holds NaN or Inf"
    for layout in (("--layout", LAYOUT), ("--layout-prompt", "a car")):
        refused("a tiger", *layout, "--weights", "checkpoint", "--quiet", cwd=tmp_path, message=message)
    if part == "vae":
        with pytest.raises(CheckpointError, match=re.escape(message)):
            weights.load(folder)
        return
    for free in (False, True):
        models, calls = weights.load(folder, free_after_use=free), []
        models.unet.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        with pytest.raises(CheckpointError, match=re.escape(message)):
            next(magicmix.magicmix(models, "a tiger", "a car"))
        assert len(calls) == (part == "unet")


def test_one_bad_number_in_an_autoencoder_of_its_own(tmp_path, folder):
    spoil("vae", *DEEP["vae"])(folder)
    message = f"vae: tensor {DEEP['vae'][0]} holds NaN or Inf"
    refused("a tiger", "--layout-prompt", "a car", "--vae", "checkpoint", "--quiet", cwd=tmp_path, message=message)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        weights.load(vae=folder)


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt", "model.pth", "model.pkl"])
@pytest.mark.parametrize("there", [True, False])
def test_pickles_are_never_opened(name, there, tmp_path):
    if there:
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")  # would leave a file behind
    message = f"{name} is a pickle, which runs code when it is opened; diffusers' save_pretrained"
    for option in ("--weights", "--vae"):
        refused("a tiger", "--layout-prompt", "a car", option, name, cwd=tmp_path, message=message)
    with pytest.raises(CheckpointError, match="is a pickle"):
        weights.load(tmp_path / name)


def test_a_bad_checkpoint_is_described_or_refused(folder, capsys, monkeypatch):
    spoil("unet", *DEEP["unet"])(folder)
    monkeypatch.setattr(sys, "argv", ["weights", str(folder)])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    out = capsys.readouterr().out
    assert ended.value.code == 2 and f"not finite   unet: {DEEP['unet'][0]}\n" in out
    assert out.splitlines()[-1].startswith(f"It does not load: unet: tensor {DEEP['unet'][0]} holds NaN or Inf")
    replaced("vae/config.json", '{"a\\u001b": 1}')(folder)
    assert __main__.main() == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("weights: ") and error.count("\n") == 1 and r"a\x1b is 1" in error


def test_a_control_character_in_a_description_is_escaped(folder, capsys, monkeypatch):
    change_tensors(folder, "vae", lambda state: state.update({"\x1b[31mred": torch.full((1,), NAN)}))
    monkeypatch.setattr(sys, "argv", ["weights", str(folder)])
    with pytest.raises(SystemExit):
        __main__.main()
    out, _ = capsys.readouterr()
    assert "not finite   vae: \\x1b[31mred\n" in out and "\x1b" not in out


@pytest.mark.parametrize("argument", ["-h", "--help"])
def test_the_description_has_a_help(argument, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["weights", argument])
    assert __main__.main() == 0
    out, error = capsys.readouterr()
    assert out.startswith("usage: python -m weights SOURCE") and "Describes a checkpoint" in out and error == ""


@pytest.mark.parametrize("arguments", [[], ["one", "two"]])
def test_a_description_needs_one_source(arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["weights", *arguments])
    assert __main__.main() == 2 and capsys.readouterr().err.startswith("usage: python -m weights SOURCE")


def test_sources_that_are_none(tmp_path):
    text = ("a tiger", "--layout-prompt", "a car")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "other.png").write_bytes(PRECIOUS)
    for source, message in {
        "nowhere": "'nowhere' is no folder, no .safetensors file and no hub id",
        "gone.safetensors": "gone.safetensors is missing",
        "pipe.safetensors": "pipe.safetensors is missing",
        "/dev/zero": "/dev/zero is missing",
        "other.png": "other.png is not a readable safetensors file",
        "x" * 300: "is too long (a name has up to 255 bytes, a path 4095); give a folder, a .safetensors file or a hub",
        "x/" * 2500: "is too long (a name has up to 255 bytes, a path 4095); give a folder",
        "é" * 128: "is too long (a name has up to 255 bytes, a path 4095); give a folder",
    }.items():
        refused(*text, "--weights", source, cwd=tmp_path, message=message)
    refused(
        *text,
        "--vae",
        "nowhere",
        cwd=tmp_path,
        message="vae 'nowhere' does not exist; give a folder or a .safetensors file",
    )


# -------------------------------------------------------------------------------------------------- the machine

MIX = ("a tiger", "--layout-prompt", "a car", "--steps", "2", "--size", "64")
SAID = "magicmix: size 64x64: this checkpoint was trained at 128x128; expect worse pictures"  # of every MIX


def test_outputs_that_cannot_be(tmp_path):
    for output, message in {
        "no/such/folder/mix.png": "output folder 'no/such/folder' does not exist; make it first",
        ".": "output '.' is not a file; give a name for the file",
        "/dev/null": "output '/dev/null' is not a file",  # as root, a rename would replace it
        "mix.jpg": "output 'mix.jpg' would hold a PNG; let its name end in .png",
        "x" * 300 + ".png": "is too long (a name has up to 255 bytes, a path 4095); give a name that ends in .png",
        "/proc/mix.png": "output folder '/proc' cannot be written to",  # not even by root
    }.items():
        refused(*MIX, "-o", output, cwd=tmp_path, message=message)
    (tmp_path / "v-sheet.png").mkdir()
    refused(*MIX, "--sheet", "-o", "v.png", cwd=tmp_path, message="output 'v-sheet.png' is not a file")
    refused(*MIX, "-o", "mix.png/mix.png", cwd=tmp_path, message="output folder 'mix.png' does not exist")


@pytest.mark.parametrize("output", ["..", ".", "folder", "folder/", "gone/", "link"])
@pytest.mark.parametrize("count", [1, 2])
def test_outputs_that_are_folders(output, count, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    message = f"output {output!r} is not a file; give a name for the file in that folder"
    refused(*MIX, "-o", output, "--count", count, cwd=tmp_path, message=message)


def test_a_name_that_is_too_long_with_its_seed(tmp_path):
    message = f"output '{'x' * 59} ... {'x' * 23}-0.png' is too long (a name has up to 255 bytes"
    refused(*MIX, "-o", "x" * 250 + ".png", "--count", 2, cwd=tmp_path, message=message)


def test_a_link_stays_a_link(tmp_path):
    """Its target is written; one that points nowhere yet makes it."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "old.png").write_bytes(PRECIOUS)
    for name, target in (("one.png", "far/old.png"), ("two.png", "far/new.png"), ("three.png", "two.png")):
        (tmp_path / name).symlink_to(target)
        assert run(*MIX, "--quiet", "-o", name, cwd=tmp_path) == (0, "", "")
        assert os.readlink(tmp_path / name) == target
    assert sorted(os.listdir(tmp_path / "far")) == ["new.png", "old.png"], "temporary files stay"
    assert (tmp_path / "far" / "new.png").read_bytes() == (tmp_path / "far" / "old.png").read_bytes()
    (tmp_path / "nowhere.png").symlink_to("gone/new.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    refused(*MIX, "-o", "nowhere.png", cwd=tmp_path, message="gone' does not exist; make it first")
    refused(*MIX, "-o", "loop.png", cwd=tmp_path, message="loop.png' is a link that leads back to itself")


def inputs(tmp_path):
    """A folder with files to read, under several names."""
    halves("red", "black").save(tmp_path / "s.png")
    shutil.copy(tmp_path / "s.png", tmp_path / "s-1.png")
    np.save(tmp_path / "eps.npy", np.zeros((2, 4, 8, 8), dtype=np.float32))
    shutil.copy(weights.TINY / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "v.safetensors")
    os.link(tmp_path / "s.png", tmp_path / "hard.png")
    (tmp_path / "soft.png").symlink_to("s.png")
    (tmp_path / "here").symlink_to(".")
    write_again(tmp_path / "old.png", {"parameters": {"prompt": "a tiger", "layout": "s.png", "steps": 8}})


OVERWRITTEN = [  # the command, which file would be lost under which name
    ("--layout s.png -o s.png", "output 's.png'", "layout 's.png'"),
    ("--layout s.png -o ./here/s.png", "output 'here/s.png'", "layout 's.png'"),
    ("--layout s.png -o hard.png", "output 'hard.png'", "layout 's.png'"),
    ("--layout s.png -o soft.png", "output 'soft.png'", "layout 's.png'"),
    ("--layout soft.png -o s.png", "output 's.png'", "layout 'soft.png'"),
    ("--layout s-1.png -o s.png --count 2", "output 's-1.png'", "layout 's-1.png'"),
    ("--again old.png -o s.png", "output 's.png'", "layout 's.png'"),
    ("--layout-prompt car --noise eps.npy -o eps.npy", "output 'eps.npy'", "noise 'eps.npy'"),
    ("--layout-prompt car --noise eps.npy --keep-noise here/eps.npy", "keep_noise 'here/eps.npy'", "noise 'eps.npy'"),
    ("--layout-prompt car --keep-noise new.npy -o here/new.npy", "output 'here/new.npy'", "keep_noise 'new.npy'"),
    ("--layout-prompt car --vae v.safetensors -o v.safetensors", "output 'v.safetensors'", "vae 'v.safetensors'"),
]


@pytest.mark.parametrize(("given", "written", "read"), OVERWRITTEN, ids=[row[0] for row in OVERWRITTEN])
def test_nothing_that_is_read_is_written_over(given, written, read, tmp_path):
    inputs(tmp_path)
    prompt = [] if "--again" in given else ["a tiger"]
    message = f"{written} is the same file as {read}"
    error = refused(*prompt, *given.split(), "--size", "64", cwd=tmp_path, message=message)
    assert error.endswith(", which would be lost; give another name\n")


@pytest.mark.parametrize("given", ["--weights checkpoint", "--unet checkpoint/unet", "--vae checkpoint"])
def test_no_file_of_a_checkpoint_is_written_over(given, folder, tmp_path):
    name, place = given.split()
    place = {"--unet": "unet"}.get(name, "vae")
    output = f"checkpoint/{place}/diffusion_pytorch_model.safetensors"
    message = f"output '{output}' is a file of {name[2:]} "
    refused(*MIX, *given.split(), "-o", output, cwd=tmp_path, message=message)


def test_no_file_of_the_embedded_checkpoint_is_written_over(tmp_path):
    (tmp_path / "soft.png").symlink_to(weights.TINY / "magicmix.json")
    refused(*MIX, "-o", "soft.png", cwd=tmp_path, message="output 'soft.png' is a file of weights ")
    before = (weights.TINY / "magicmix.json").read_bytes()
    assert (weights.TINY / "magicmix.json").read_bytes() == before


def test_the_file_at_standard_input_is_not_written_over(tmp_path):
    halves("red", "black").save(tmp_path / "s.png")
    before = (tmp_path / "s.png").read_bytes()
    command = [sys.executable, str(ROOT / "magicmix.py"), "a tiger", "--layout", "-", "-o", "s.png"]
    with (tmp_path / "s.png").open("rb") as piped:
        done = subprocess.run(command, stdin=piped, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "output 's.png' is the same file as layout '-', which would be lost" in done.stderr
    assert (tmp_path / "s.png").read_bytes() == before


def test_standard_output_is_no_file(tmp_path):
    refused(*MIX, "-o", "-", cwd=tmp_path, message="output '-' is no name for a file")


def test_concepts_are_asked_of_a_place(tmp_path):
    refused("--concepts", "--weights", "", cwd=tmp_path, message="weights '' is no path")


def test_the_picture_to_make_again_may_be_written_over(tmp_path):
    assert run(*MIX, "--quiet", cwd=tmp_path).code == 0
    first = (tmp_path / "mix.png").read_bytes()
    assert run("--again", "mix.png", "--quiet", cwd=tmp_path) == (0, "", "")
    assert (tmp_path / "mix.png").read_bytes() == first


def test_devices_and_dtypes_that_cannot_be(tmp_path, monkeypatch):
    for device in ("abacus", "cuda:99", "meta", "xla", ""):
        message = f"device {device!r} cannot be used ("
        refused(*MIX, "--device", device, cwd=tmp_path, message=message)
        with pytest.raises(ValueError, match=re.escape(message)):
            machine.choose_device(device)
    for option in ("dtype", "vae_dtype"):
        message = f"{option} 'fp8' is not known; use fp32, fp16, bf16"
        refused(*MIX, f"--{option.replace('_', '-')}", "fp8", cwd=tmp_path, message=message)
    monkeypatch.setitem(machine.DTYPES, "fp16", "float8_e4m3fn")  # one that no CPU convolves in
    with pytest.raises(ValueError, match="dtype fp16 cannot be used on device 'cpu'"):
        machine.choose_dtype("fp16", torch.device("cpu"))


def script_in_limits(limit, more, arguments, cwd, log):
    """The command in a process whose operating system refuses it more than that, or than it has now and so much more.
    Its tokenizer's library is imported and its threads have no stacks of their own, so that the limit hits the work."""
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if more else 0
    resource.setrlimit(limit, (has + more, resource.RLIM_INFINITY) if more else (2000, resource.RLIM_INFINITY))
    script(arguments, cwd, log, None)


def limited(limit, more, *arguments, cwd):
    (cwd / "mix.png").write_bytes(PRECIOUS)
    log = cwd.parent / f"{cwd.name}-log"
    process = forks().Process(target=script_in_limits, args=(limit, more, arguments, cwd, log))
    process.start()
    process.join(300)
    error = log.with_suffix(".err").read_text()
    assert process.exitcode == 2 and error.count("\n") == 1, error
    assert (cwd / "mix.png").read_bytes() == PRECIOUS
    assert [path.name for path in cwd.iterdir()] == ["mix.png"]
    return error


def test_a_disk_that_takes_no_more(tmp_path):
    """A limit on the size of files, in the middle of the picture: write() fails as it does on a full disk."""
    error = limited(resource.RLIMIT_FSIZE, 0, *MIX, "--quiet", cwd=tmp_path)
    assert error == "magicmix: output 'mix.png' cannot be written: File too large; choose another place\n"


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the size of the process from Linux")
def test_out_of_memory(tmp_path):
    large = [*MIX[:-1], "2048", "--quiet"]
    error = limited(resource.RLIMIT_AS, 400_000_000, *large, cwd=tmp_path)
    assert error == "magicmix: out of memory; a smaller --size, --count 1 or --dtype bf16 needs less\n"


def script_on(closed, full, broken, arguments, cwd, log):
    """The command with some of its standard streams closed before the start, on a full disk or on a pipe that nobody
    reads."""
    os.set_inheritable(log := os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), True)
    reader, writer = os.pipe()
    os.close(reader)
    for number in (1, 2):
        os.dup2(log, number)
    for name in closed:  # as the interpreter does when it starts without
        os.close({"stdout": 1, "stderr": 2}[name])
        setattr(sys, name, None)
    for number in full:
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)
    for number in broken:
        os.dup2(writer, number)
    os.chdir(cwd)
    sys.argv = ["magicmix.py", *arguments]
    runpy.run_path(str(ROOT / "magicmix.py"), run_name="__main__")


NO_SPACE, NO_READER = "No space left on device", "Broken pipe"
STREAMS = {  # closed; full; broken; the exit code; the reason in the line, "" where there is no line
    "stderr closed": (["stderr"], [], [], 0, ""),
    "stdout closed": (["stdout"], [], [], 0, ""),
    "both closed": (["stdout", "stderr"], [], [], 0, ""),
    "stdout full": ([], [1], [], 2, NO_SPACE),
    "stdout broken": ([], [], [1], 2, NO_READER),
    "stderr full": ([], [2], [], 2, ""),
    "stderr broken": ([], [], [2], 2, ""),
    "both full": ([], [1, 2], [], 2, ""),
}


def on_streams(name, arguments, cwd):
    """The exit code and the lines of the command's own that could be written."""
    log = cwd.parent / f"{cwd.name}-log"
    process = forks().Process(target=script_on, args=(*STREAMS[name][:3], arguments, cwd, log))
    process.start()
    process.join(300)
    return process.exitcode, [line for line in re.split("[\r\n]+", log.read_text()) if line.startswith("magicmix: ")]


FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")


@FULL
@pytest.mark.parametrize("name", STREAMS)
def test_streams_that_take_nothing(name, tmp_path):
    """The picture is written. One that fails is named, where there is a stderr, and told by the exit code."""
    *_, code, reason = STREAMS[name]
    lines = [f"magicmix: stdout cannot be written to: {reason}; all else is done"] if reason else []
    code_, found = on_streams(name, [*MIX, "--steps", "8"], tmp_path)
    assert code_ == code and [line for line in found if line != SAID] == lines
    assert Image.open(tmp_path / "mix.png").size == (64, 64)
    assert len(list(tmp_path.iterdir())) == 1


@FULL
@pytest.mark.parametrize("name", ["stdout full", "both full", "both closed"])
def test_a_help_that_cannot_be_read(name, tmp_path):
    *_, code, reason = STREAMS[name]
    lines = [f"magicmix: stdout cannot be written to: {reason}; all else is done"] if reason else []
    assert on_streams(name, ["--help"], tmp_path) == (code, lines)


@FULL
@pytest.mark.parametrize("name", STREAMS)
def test_another_error_comes_first(name, tmp_path):
    lines = ["magicmix: picture 'gone.png' does not exist; --again needs a magicmix picture"]
    is_shown = not ("stderr" in name or "both" in name)
    assert on_streams(name, ["--again", "gone.png"], tmp_path) == (2, lines if is_shown else [])


def test_a_closed_stderr_in_the_shell(tmp_path):
    line = f"exec {sys.executable} {ROOT / 'magicmix.py'} {' '.join(map(repr, MIX))} 2>&-"
    done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, b"mix.png\n") and Image.open(tmp_path / "mix.png").size == (64, 64)


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    code = "import os; from command import machine; machine.begin(); open('places', 'w').write(repr(os.pipe()))"
    line = f"""exec {sys.executable} -c "{code}" <&- >&- 2>&-"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(line, shell=True, cwd=tmp_path, env=environment, timeout=300).returncode == 0
    assert min(json.loads((tmp_path / "places").read_text().replace("(", "[").replace(")", "]"))) > 2


def test_debug_shows_the_traceback(tmp_path):
    code, _, error = run(*MIX, "--weights", "nowhere", "--debug", cwd=tmp_path)
    assert code == 2 and error.startswith("Traceback") and "CheckpointError" in error
    assert error.splitlines()[-1].startswith("magicmix: weights 'nowhere' is no folder")


# ----------------------------------------------------------------------------------------------- --again's files


def again(**parameters):
    return {"parameters": {"prompt": "a tiger", "layout_prompt": "a car", "steps": 1} | parameters}


NOT_THERE = "may not stand there; use prompt, layout, layout_prompt, k_max"
METADATA = [  # that is refused when it is read
    ("{", "cannot be read"),
    ("[" * 100_000, "cannot be read"),
    ("[]", "has no magicmix parameters; --again needs a picture that has"),
    ('{"parameters": 3}', "has no magicmix parameters"),
    ('{"parameters": {"seed": ' + "9" * 5000 + "}}", "cannot be read"),
    (json.dumps(again(prompt="x" * 300_000)), "its parameters have 300,"),
    (again(output="/tmp/elsewhere.png"), f"output = '/tmp/elsewhere.png' {NOT_THERE}"),
    (again(device="cuda"), f"device = 'cuda' {NOT_THERE}"),
    (again(debug=True), f"debug = True {NOT_THERE}"),
    (again(again="mix.png"), f"again = 'mix.png' {NOT_THERE}"),
    (again(count=10**9), f"count = 1000000000 {NOT_THERE}"),
    (again(keep_noise="eps.npy"), f"keep_noise = 'eps.npy' {NOT_THERE}"),
    (again(colour="red"), f"colour = 'red' {NOT_THERE}"),
    (again(prompt=3), "prompt 3 is no text"),
    (again(prompt=None), "prompt None is no text"),
    (again(layout=3), "layout 3 is no path"),
    (again(weights=""), "weights '' is no path"),
    (again(weights="\0"), r"weights '\x00' holds a NUL byte, which no path can; give a folder, a .safetensors"),
    (again(noise="\0"), r"noise '\x00' holds a NUL byte, which no path can; give a .npy or .safetensors file"),
    (again(vae="\ud800"), r"vae '\ud800' holds half a character (a surrogate); give a folder or a .safetensors file"),
    (again(layout="https://a.b/c.png"), "layout 'https://a.b/c.png' is a URL, and nothing is fetched from one; give a"),
    (again(layout="x" * 300), f"layout '{'x' * 59} ... {'x' * 29}' is too long"),
    (again(steps=True), "steps True is no whole number"),
    (again(noise_row=-1), "noise_row -1 is out of range; use 0 to 9223372036854775807"),
    (again(noise_row=0.5), "noise_row 0.5 is no whole number"),
    (again(no_ema=1), "no_ema 1 is neither true nor false"),
    (again(size="64"), "size '64' is no pair of whole numbers"),
    (again(size=[64]), "size [64] is no pair of whole numbers"),
    (again(size=[64.0, 64.0]), "size [64.0, 64.0] is no pair of whole numbers"),
    (again(size={}), "size {} is no pair of whole numbers"),
    (again(size=[10**9, 10**9]), "size 1000000000x1000000000 is out of range"),
    (again(token_weights={"tiger": "x"}), "token_weights tiger: 'x' is no number"),
    (again(token_weights={"tiger": True}), "token_weights tiger: True is no number"),
    (again(reweight=[1, 2]), "token_weights [1, 2] is no table of words and numbers"),
    (again(reweight={"tiger": float("nan")}), "token_weights tiger: nan is out of range; use -1e+38 to 1e+38"),
    (again(k_max=float("nan")), "k_max nan is out of range"),
    (again(k_max=0.2, k_min=0.3), "k_min 0.3 is above k_max 0.2"),
    (again(guidance=1e999), "guidance inf is out of range"),
    (again(guidance=10**400), f"guidance 1{'0' * 59} ... {'0' * 30} is out of range; use 0 to 1e+38"),
    (again(token_weights={"tiger": 10**400}), f"token_weights tiger: 1{'0' * 59} ... {'0' * 30} is out of range; use"),
    (again(token_weights={"tiger": -1e300}), "token_weights tiger: -1e+300 is out of range"),
    (again(noise_row=10**30), "is out of range; use 0 to 9223372036854775807"),
    (again(seed=-1), "seed -1 is out of range"),
    (again(seed=10**300), f"is out of range; {LARGEST_SEED}"),
    (again(steps=10**12), "steps 1000000000000 is out of range"),
    (again(sampler="euler"), "sampler 'euler' is not known; use ddim, ddpm"),
    (again(dtype="fp8"), "dtype 'fp8' is not known; use fp32, fp16, bf16"),
    (again(upcast_attention="maybe"), "upcast_attention 'maybe' is not known; use auto, on, off"),
    (again(negative="\ud800"), "holds half a character"),
]
LATER = [  # that is refused when it is used
    (again(layout="layout.png"), "give one of --layout IMAGE and --layout-prompt TEXT"),
    ({"parameters": {"layout_prompt": "a car"}}, "the content prompt is missing"),
    (again(weights="/dev/zero"), "/dev/zero is missing"),
    (again(weights="model.ckpt"), "weights 'model.ckpt', named in the picture, does not exist; it is relative to"),
    (again(noise="/gone/eps.npy"), "noise '/gone/eps.npy', named in the picture, does not exist; give it with --noise"),
    (again(vae="/dev/zero"), "/dev/zero is missing"),
    (again(noise="/dev/zero"), "noise '/dev/zero' cannot be read: it is not a file"),
    (again() | {"checkpoint": {"unet": "0"}}, "made with another checkpoint ("),
    (again() | {"checkpoint": {"unet": [{}]}}, "made with another checkpoint ("),
    (again() | {"checkpoint": {"colour": "red"}}, "made with another checkpoint ("),
    (again() | {"checkpoint": None}, "the picture's checkpoint is None; --again needs a magicmix picture"),
    (again() | {"checkpoint": []}, "the picture's checkpoint is []; --again needs a magicmix picture"),
]


@pytest.mark.parametrize(("metadata", "message"), METADATA, ids=[message for _, message in METADATA])
def test_bad_metadata(metadata, message, tmp_path):
    write_again(tmp_path / "old.png", metadata)
    error = refused("--again", "old.png", cwd=tmp_path, message=message)
    assert "picture 'old.png'" in error
    with pytest.raises(ValueError, match=re.escape(message)):
        pictures.read_metadata(tmp_path / "old.png")


@pytest.mark.parametrize(("metadata", "message"), LATER, ids=[str(metadata) for metadata, _ in LATER])
def test_metadata_that_cannot_be_followed(metadata, message, tmp_path):
    write_again(tmp_path / "old.png", metadata)
    refused("--again", "old.png", cwd=tmp_path, message=message)
    assert pictures.read_metadata(tmp_path / "old.png") == metadata


def test_pictures_to_make_again_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    truncated(tmp_path / "cut.png", 40)
    sample().save(tmp_path / "photo.jpg")
    for name, message in {
        "gone.png": "picture 'gone.png' does not exist; --again needs a magicmix picture",
        "pipe.png": "it is not a file; --again needs a magicmix picture",
        "cut.png": "picture 'cut.png' is not a readable PNG; --again needs a magicmix picture",
        "photo.jpg": "picture 'photo.jpg' is not a readable PNG; --again needs a magicmix picture",
        str(LAYOUT): "has no magicmix parameters",
    }.items():
        refused("--again", name, cwd=tmp_path, message=message)


def test_a_path_from_the_metadata_is_shown_before_it_is_followed(tmp_path):
    """Even with --quiet, and with its control characters escaped."""
    metadata = again(layout="\x1b[2Jsecret.png", weights="model\nfolder", vae="other", noise="eps.npy")
    del metadata["parameters"]["layout_prompt"]
    write_again(tmp_path / "old.png", metadata)
    code, out, error = run("--again", "old.png", "--quiet", cwd=tmp_path)
    assert code == 2
    assert out == "layout: \\x1b[2Jsecret.png\nnoise: eps.npy\nweights: model folder\nvae: other\n"
    assert "does not exist" in error and "\x1b" not in error


def test_a_picture_made_again_in_another_folder(tmp_path):
    """Its paths are relative to where it was made; they, or the files that are given, lead to the same picture."""
    made, elsewhere = tmp_path / "made", tmp_path / "elsewhere"
    made.mkdir(), elsewhere.mkdir()
    shutil.copy(LAYOUT, made / "layout.png")
    np.save(made / "eps.npy", np.zeros((1, 4, 8, 8), dtype=np.float32))
    mix = ("a tiger", "--layout", "layout.png", "--noise", "eps.npy", "--steps", "2", "--size", "64", "--quiet")
    assert run(*mix, cwd=made).code == 0
    gone = "named in the picture, does not exist; it is relative to the folder in which the picture was made; give it"
    error = refused("--again", made / "mix.png", cwd=elsewhere, message=f"layout 'layout.png', {gone} with --layout or")
    assert error.endswith("or go there\n")
    layout = ("--layout", made / "layout.png")
    refused("--again", made / "mix.png", *layout, cwd=elsewhere, message=f"noise 'eps.npy', {gone} with --noise or go")
    noise = ("--noise", made / "eps.npy")
    assert run("--again", made / "mix.png", *layout, *noise, "--quiet", cwd=elsewhere).code == 0
    pixels = [np.asarray(Image.open(folder / "mix.png")) for folder in (made, elsewhere)]
    assert np.array_equal(*pixels)


def test_another_layout_replaces_the_recorded_one(tmp_path):
    assert run("a tiger", "--layout", LAYOUT, "--steps", "2", cwd=tmp_path).code == 0
    for option, value in (("--layout-prompt", "a car"), ("--layout", ROOT / "docs" / "layouts" / "mug.png")):
        code, _, error = run("--again", "mix.png", option, value, "-o", "new.png", cwd=tmp_path)
        assert code == 0, error
        direct = run("a tiger", option, value, "--steps", "2", "-o", "direct.png", cwd=tmp_path)
        assert direct.code == 0
        assert (tmp_path / "new.png").read_bytes() == (tmp_path / "direct.png").read_bytes()
