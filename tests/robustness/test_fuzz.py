"""Hostile files: whatever the bytes are, a documented exception or a sound result, in bounded time and memory.

The inputs are mutations of valid files, so that many get past the first checks, and some plain noise; each follows from
a number. FUZZ=100000 in the environment asks for so many inputs of each kind, new ones every time; without it they are
the same every time.
"""

import contextlib
import ctypes
import functools
import io
import json
import os
import random
import re
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, with_unet
from icc import cmyk_profile, grey_profile, rgb_profile
from PIL import Image, PngImagePlugin
from safetensors.torch import save

import clip
import magicmix
import weights
from command import machine, noise, pictures
from command.colours import to_srgb
from scheduler import Schedule
from weights import CheckpointError, configs, files

MANY = int(os.environ.get("FUZZ", 0))


def numbers(count):
    """What so many inputs follow from."""
    return (random.getrandbits(64) for _ in range(MANY)) if MANY else range(count)


def fresh(path, data):
    """Writes a new file: one that is cut off and written anew waits for the disk."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


@contextlib.contextmanager
def input_of(number):
    """What is random in one input. Notes its number at an error; 5 s is the bound for one."""
    started = time.monotonic()
    try:
        yield Chance(number)
        assert time.monotonic() - started <= 5, "too slow"
    except BaseException as error:
        error.add_note(f"This is the input of the number {number}.")
        raise


# ------------------------------------------------------------------------------------------------------- memory

SLACK = 8 << 20  # bytes: what the allocators of Python, torch and Rust take at a time
LIBC = ctypes.CDLL(None)
IS_MEASURED = os.access("/proc/self/clear_refs", os.W_OK) and hasattr(LIBC, "malloc_trim")  # Linux keeps the peak


@contextlib.contextmanager
def bounded_memory(size):
    """At no moment more than 2 x `size` bytes above what the process had before; see the test below."""
    if not IS_MEASURED:
        yield
        return
    LIBC.malloc_trim(0)  # what earlier tests freed goes back, or memory could be taken from it and raise no peak
    before = peak("VmRSS")
    if peak("VmHWM") - before > SLACK // 2:  # an earlier peak would hide this one
        Path("/proc/self/clear_refs").write_text("5")  # it starts anew
        before = peak("VmRSS")
    yield
    assert peak("VmHWM") - before <= 2 * size + SLACK, "too much memory"


def peak(name):
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not IS_MEASURED, reason="/proc/self/clear_refs: no input's memory is bounded in these tests")
def test_the_memory_of_an_input_is_bounded():
    freed, above = [bytes(1 << 16) for _ in range(1000)], bytes(1 << 16)  # leaves a hole in the heap, below the last
    del freed
    with bounded_memory(0):
        b"x" * (SLACK // 2)
    with bounded_memory(SLACK):
        b"x" * (2 * SLACK)
    with pytest.raises(AssertionError, match="too much memory"), bounded_memory(SLACK):
        b"x" * (4 * SLACK)
    del above


# ------------------------------------------------------------------------------------------------------- chance


class Chance(random.Random):
    """Draws what is odd."""

    LARGE = (2**31, 2**32 - 1, 2**53, 2**62, 2**63, 2**64 - 1, 2**64, 10**30, 10**38, 10**39, 10**400, 10**4299)
    FLOATS = (0.0, -0.0, 1.5, -1.0, 1e-5, 5e-324, 1e300, -1e300, float("nan"), float("inf"), -float("inf"))

    def one_in(self, n):
        return self.randrange(n) == 0

    def many(self, draw, most):
        return [draw() for _ in range(self.randint(0, most))]

    def whole(self):
        return self.choice(self.LARGE) if self.one_in(3) else self.randint(-2, 9)

    def number(self):
        """Of any size and either sign."""
        large = lambda: self.choice(self.LARGE) * self.choice((-1, 1)) + self.randint(-1, 1)
        return self.choice((self.whole, large, self.random, lambda: self.choice(self.FLOATS)))()

    def bytes(self, most=9):
        return self.randbytes(self.randint(0, most))

    def word(self):
        """Of any characters, lone surrogates included."""
        character = lambda: chr(self.randrange(*self.choice(((0, 0x250), (0xD700, 0xE000), (0, 0x110000)))))
        return "".join(self.many(character, 9))

    def text(self):
        return "".join(self.many(lambda: self.choice("a tiger\ud800\x1b\n\0🐯<|>"), 99))

    def anything(self, depth=2):
        """What JSON can hold."""
        kind = self.randrange(8 if depth else 5)
        if kind == 0:
            return self.choice((None, True, False))
        if kind == 1:
            return self.whole()
        if kind == 2:
            return self.choice(self.FLOATS)
        if kind == 3:
            return self.uniform(-2, 2)
        if kind == 4:
            return self.word()
        inner = lambda: self.anything(depth - 1)
        return self.many(inner, 3) if kind < 7 else {self.word(): inner() for _ in range(self.randint(0, 3))}

    def damaged(self, data):
        """Bytes cut off, changed, inserted, dropped."""
        for _ in range(self.randint(0, 3)):
            at, some = self.randint(0, len(data)), self.bytes()
            before, after = data[:at], data[at + len(some) :]
            data = self.choice((before, before + some + after, before + some + data[at:], before + after))
        return data


# -------------------------------------------------------------------------------------------------- safetensors

SOUND = {
    "encoder.conv_in.weight": torch.zeros(4, 3, 3, 3),
    "encoder.conv_in.bias": torch.zeros(4, dtype=torch.float16),
    "decoder.mid_block.attentions.0.query.weight": torch.zeros(4, 4, 1, 1),
    "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 4, 3, 3, dtype=torch.bfloat16),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(1, 768),
}
DTYPES = "BOOL F4 F6_E2M3 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64".split()


def packed(header, body, length=None):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def unpacked(data):
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


FILE = save(SOUND)


def tensor_entry(chance, kind, end):
    """What a header may say of a tensor: of any kind, or one that is consistent and has no values. (0, 2^63) has no
    bytes and no place in memory either."""
    if kind == "empty":
        shape = [0, *(abs(side) for side in chance.many(chance.whole, 3))]
        return {"dtype": chance.choice(DTYPES), "shape": shape, "data_offsets": [chance.choice((0, end))] * 2}
    if kind == "entry":
        return {
            "dtype": chance.anything() if chance.one_in(3) else chance.choice(DTYPES),
            "shape": chance.anything() if chance.one_in(3) else chance.many(chance.whole, 5),
            "data_offsets": chance.anything() if chance.one_in(3) else [chance.whole(), chance.whole()],
        }
    return chance.anything()


def safetensors_file(chance, sound):
    """A mutation of a sound file."""
    if chance.one_in(20):
        return chance.bytes(64)
    header, body = unpacked(sound)
    names = sorted(header)
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        name = chance.word() if chance.one_in(4) else chance.choice(names)
        kind = chance.choice(("drop", "field", "entry", "empty", "empty", "anything"))
        if kind == "drop":
            header.pop(name, None)
        elif kind == "field" and isinstance(header.get(name), dict):
            fields = {
                "dtype": chance.choice(DTYPES),
                "shape": chance.many(chance.whole, 5),
                "data_offsets": chance.anything(),
            }
            field = chance.choice(sorted(fields))
            header[name] = header[name] | {field: fields[field]}
        else:
            header[name] = tensor_entry(chance, kind, len(body))
    length = None
    if chance.one_in(10):
        length = chance.randrange(chance.choice((2**64, 2 * len(json.dumps(header)))))
    data = packed(header, body, length)
    return chance.damaged(data) if chance.one_in(4) else data


def load_all(path):
    """Every way in which a file's tensors are taken up, each to its end or to its CheckpointError."""
    with contextlib.suppress(CheckpointError):
        tensors = files.open_part("vae", path).tensors["vae"]
        weights.check({name: SOUND[name] for name in sorted(SOUND)[:2]}, tensors, str(path))
        weights.fingerprint("vae", tensors)
        weights.check_weights("vae", tensors)
    with contextlib.suppress(CheckpointError):
        source = files.open_single_file(path, ema=True)
        for part in weights.MODELS:
            weights.check(source.tensors[part], source.tensors[part], part)  # for their dtypes
            weights.fingerprint(part, source.tensors[part])
            weights.check_weights(part, source.tensors[part])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    path.write_bytes(FILE)
    load_all(path)  # what is imported at the first use is no part of the file
    return path


def test_the_fuzzed_file_is_sound(file):
    """What is mutated gets through to the strict checks."""
    file.write_bytes(FILE)
    with pytest.raises(CheckpointError, match="is not part of this model"):
        weights.check({}, files.open_part("vae", file).tensors["vae"], "here")
    assert set(files.open_single_file(file, ema=True).tensors["unet"]) == {
        "conv_in.weight",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    }


def test_safetensors(file):
    for number in numbers(10_000):
        with input_of(number) as chance:
            data = safetensors_file(chance, FILE)
            fresh(file, data)
            with bounded_memory(len(data)):
                load_all(file)


def test_large_files(file):
    """Files whose headers or bodies are as large as they may be, and larger."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for count, length in ((4_000, 300), (4_001, 300), (100_000, 30), (1_000_000, 5), (1, 4 << 20), (1, 90 << 20)):
        data = packed({f"{i:0{length}}": entry for i in range(count)}, b"")
        fresh(file, data)
        objects = 2_000 * count if count <= 4_000 else 0  # a tensor takes so much, even one without values
        with bounded_memory(len(data) + objects // 2):
            load_all(file)
    with file.open("wb") as sparse:
        entry |= {"shape": [1 << 33], "data_offsets": [0, 1 << 35]}
        sparse.write(packed({"decoder.conv_in.weight": entry}, b""))
        sparse.truncate(sparse.tell() + (1 << 35))  # 32 GB on no disk: mapped, never read
    with bounded_memory(0):
        load_all(file)


# ------------------------------------------------------------------------------------------------------- configs


def config_file(chance):
    """A part, and a mutation of its config."""
    part = chance.choice(("unet", "vae", "text_encoder", "scheduler"))
    own = TINY / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    fields = json.loads(own.read_text())
    width = lambda: chance.choice((32, 64, 2**16)) if chance.one_in(3) else chance.whole()
    draws = (
        chance.whole,
        chance.anything,
        lambda: chance.many(width, 9),
        lambda: chance.choice((100, 1000, 2**16, 10**6)),
        lambda: chance.choice(chance.FLOATS),
    )
    for name in chance.sample(sorted(fields), chance.randint(1, 3)):
        fields[name] = chance.choice(draws)()
    text = json.dumps(fields).encode()
    return part, chance.damaged(text) if chance.one_in(2) else text


def test_configs(file):
    """A config that is read makes a network without storage."""
    path = file.with_name("config.json")
    for number in numbers(2_000):
        with input_of(number) as chance, contextlib.suppress(CheckpointError):
            part, data = config_file(chance)
            fresh(path, data)
            if part == "scheduler":
                Schedule(configs.read_schedule(path)[0], 1)
                continue
            network = weights.build(part, configs.read_config(path, part))
            assert {p.device.type for p in network.parameters()} == {"meta"}
            with pytest.raises(CheckpointError, match="is missing"):
                weights.fill(network, {}, str(path), torch.float32, torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------ metadata

PARAMETERS = {
    "prompt": "a tiger", "layout_prompt": "a car", "k_max": 0.6, "k_min": 0.15, "nu": 0.7, "steps": 20, "guidance": 4.0,
    "negative": "", "token_weights": {"tiger": 2.0}, "sampler": "ddim", "eta": 0.0, "seed": 1, "size": [128, 128],
    "dtype": "fp32", "vae_dtype": "fp32", "prediction": "auto", "upcast_attention": "auto", "no_ema": False,
}  # fmt: skip
NUMBERS = ["k_max", "k_min", "nu", "steps", "guidance", "eta", "seed", "noise_row"]
OTHERS = [
    "layout",
    "weights",
    "vae",
    "noise",
    "noise_row",
    "output",
    "device",
    "quiet",
    "again",
    "count",
    "debug",
    "keep_noise",
    "reweight",
]


# What is said of a mix that goes on.
WARNING = re.compile(r"magicmix: (steps \d+: denoising from noise|size \d+x\d+: this checkpoint|not among the words) ?")


class Reached(Exception):
    """The first step is done, and another one, or the VAE, would be next."""


def stop(*_):
    raise Reached


def tokens_only(tokenizer, encoder, prompts):
    """clip.encode_prompts without the encoder, which would take most of the time."""
    length = tokenizer.model_max_length
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return torch.zeros(*tokens.input_ids.shape, encoder.config.hidden_size)


@pytest.fixture(scope="module")
def again(models):
    """The command on a picture, through its first step, with a checkpoint that is loaded already and a UNet that
    answers at once."""
    models = with_unet(models, lambda x, *_: torch.ones_like(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "load", lambda *_, **__: models)
        patch.setattr(clip, "encode_prompts", tokens_only)
        patch.setattr(machine, "choose_dtype", functools.cache(machine.choose_dtype))  # computes to see if it can
        patch.setattr(machine, "follow", lambda steps, *_: next(steps, None))
        patch.setattr(magicmix, "decode", stop)

        def run(path):
            error = io.StringIO()
            with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()) as out:
                try:
                    asked = {"again": str(path), "output": str(path.with_name("new.png"))}
                    code = machine.run("magicmix", lambda: magicmix.make(asked))
                except Reached:
                    code = 0
            lines = error.getvalue().splitlines()
            assert all(line.startswith("magicmix: ") for line in lines), lines
            lines = [line for line in lines if not WARNING.match(line)]
            assert (code, len(lines)) in ((0, 0), (2, 1)), lines
            assert all(c.isprintable() for c in "".join([*out.getvalue().splitlines(), *lines]))
            return code

        yield run


def with_text(text):
    """A small PNG that carries the text."""
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_itxt("magicmix", text) if zlib.crc32(text.encode()) % 2 else info.add_text("magicmix", text, zip=True)
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def picture(chance):
    parameters = dict(PARAMETERS)
    for _ in range(chance.randint(0, 3)):
        name = chance.word() if chance.one_in(8) else chance.choice([*PARAMETERS, *OTHERS])
        if chance.one_in(3):
            parameters |= {chance.choice(NUMBERS): chance.number()}
        elif chance.one_in(6):
            parameters["token_weights"] = {"tiger": chance.number()}
        elif name in parameters and chance.one_in(2):
            del parameters[name]
        else:
            parameters[name] = chance.text() if chance.one_in(3) else chance.anything()
    metadata = {"parameters": parameters}
    if chance.one_in(4):
        metadata[chance.choice(("checkpoint", "layout_sha256", "noise_sha256", "versions", "parameters"))] = (
            chance.anything()
        )
    text = json.dumps(metadata)
    if chance.one_in(10):
        text = chance.damaged(text.encode()).decode("latin-1") if chance.one_in(2) else "[" * 100_000
    file = with_text(text)
    return chance.damaged(file) if chance.one_in(5) else file


@pytest.mark.parametrize("text", ["a tiger", "a tiger " * 10_000])
def test_the_fuzzed_picture_is_sound(again, tmp_path, text):
    data = with_text(json.dumps({"parameters": PARAMETERS | {"prompt": text}}))
    (tmp_path / "old.png").write_bytes(data)
    assert again(tmp_path / "old.png") == 0


def test_metadata(again, file):
    path = file.with_name("old.png")
    fresh(path, with_text(json.dumps({"parameters": PARAMETERS})))
    assert again(path) == 0  # what is imported at the first use is no part of an input
    for number in numbers(3_000):
        with input_of(number) as chance:
            data = picture(chance)
            fresh(path, data)
            with bounded_memory(len(data)):
                again(path)


# ----------------------------------------------------------------------------------------------------- pictures

SMALL = Image.effect_noise((24, 16), 80).convert("RGB")


@functools.cache
def saved(kind):
    file = io.BytesIO()
    SMALL.save(file, kind)
    return file.getvalue()


def test_pictures(file):
    path = file.with_name("layout")
    for number in numbers(2_000):
        with input_of(number) as chance, contextlib.suppress(ValueError):
            fresh(path, chance.damaged(saved(chance.choice(pictures.FORMATS))))
            layout = pictures.open_layout(path)
            assert pictures.fit(layout.picture, (16, 24)).isfinite().all()


def test_profiles():
    """Of every kind: the picture comes out, with its colours or without."""
    kinds = [("RGB", rgb_profile("Display P3")), ("L", grey_profile()), ("CMYK", cmyk_profile())]
    used = 0
    for number in numbers(2_000):
        with input_of(number) as chance:
            mode, profile = chance.choice(kinds)
            converted = to_srgb(SMALL.convert(mode), chance.damaged(profile))
            assert converted.picture.size == SMALL.size and converted.picture.mode == "RGBA"
            used += "left out" not in converted.note
    assert used > 100, "hardly any profile was read to its end"


# -------------------------------------------------------------------------------------------------------- noise

EPS = np.zeros((2, 4, 2, 3), dtype=np.float32)
DESCRS = "<f4 >f4 <f2 <f8 <i8 |u1 |b1 <c8 <M8[s] |S4 <U2 |V4 |O <f3 x".split()


def npy_file(chance):
    """A mutation of a sound .npy file: of its header's words, of its bytes."""
    fields = {"descr": "<f4", "fortran_order": False, "shape": EPS.shape}
    for _ in range(chance.randint(0, 2)):
        name = chance.word() if chance.one_in(8) else chance.choice(("descr", "fortran_order", "shape"))
        if chance.one_in(8):
            fields.pop(name, None)
        elif name == "descr" and not chance.one_in(4):
            fields[name] = chance.choice(DESCRS)
        elif name == "shape" and not chance.one_in(4):
            fields[name] = tuple(chance.many(chance.whole, 5))
        else:
            fields[name] = chance.anything()
    text = repr(fields) if chance.one_in(8) is False else chance.choice("([{-~'") * chance.randint(1, 9000)
    header = text.encode("latin-1", "replace")[: 2**16 - 1]
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + EPS.tobytes()
    return chance.damaged(data) if chance.one_in(2) else data


@pytest.mark.parametrize("suffix", noise.SUFFIXES)
def test_noise(file, suffix):
    path, sound = file.with_name(f"eps{suffix}"), save({"eps": torch.from_numpy(EPS)})
    for number in numbers(1_000):
        with input_of(number) as chance, contextlib.suppress(ValueError):
            data = npy_file(chance) if suffix == ".npy" else safetensors_file(chance, sound)
            fresh(path, data)
            with bounded_memory(len(data)):
                found = noise.read(path)
            assert found.eps.dtype == torch.float32 and found.eps.ndim == 4 and found.eps.isfinite().all()
            assert found.rows(0, (1, *found.eps.shape[1:])).shape == (1, *found.eps.shape[1:])
