"""Hostile files: whatever the bytes are, a documented exception or a sound result, in bounded time and memory.

The inputs are mutations of valid files, so that most get past the first check, and some plain noise. FUZZ=100000 in the
environment asks for so many inputs of each kind, new ones every time; without it they are the same every time.
"""

import contextlib
import io
import json
import os
import re
import struct
import zlib
from pathlib import Path

import pytest
import torch
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import save

import magicmix
import weights
from weights import CheckpointError, sources

MANY = int(os.environ.get("FUZZ", 0))


def fuzzed(count):
    """5 s is the bound for one input; hypothesis reports a slower one."""
    return settings(max_examples=MANY or count, derandomize=not MANY, deadline=5000, database=None,
                    suppress_health_check=list(HealthCheck))  # fmt: skip


# ------------------------------------------------------------------------------------------------------- memory

SLACK = 8 << 20  # bytes: what the allocators of Python, torch and Rust take at a time


@contextlib.contextmanager
def bounded_memory(size):
    """At no moment more than 2 x `size` bytes above what the process had before. Linux keeps the peak."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak("VmRSS")
    yield
    assert peak("VmHWM") - before <= 2 * size + SLACK


def peak(name):
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


# -------------------------------------------------------------------------------------------------- safetensors

SOUND = {
    "encoder.conv_in.weight": torch.zeros(4, 3, 3, 3),
    "encoder.conv_in.bias": torch.zeros(4, dtype=torch.float16),
    "decoder.mid_block.attentions.0.query.weight": torch.zeros(4, 4, 1, 1),
    "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 4, 3, 3, dtype=torch.bfloat16),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(1, 768),
}
FILE = save(SOUND)
END = 8 + struct.unpack("<Q", FILE[:8])[0]
HEADER, BODY = json.loads(FILE[8:END]), FILE[END:]

whole = st.integers(-2, 9) | st.sampled_from([2**31, 2**32 - 1, 2**53, 2**62, 2**63, 2**64 - 1, 2**64, 10**30])
words = st.text(st.characters(exclude_categories=()), max_size=9)  # lone surrogates are in
anything = st.recursive(st.none() | st.booleans() | whole | st.floats() | words,
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
                        max_leaves=6)  # fmt: skip
texts = st.text(st.sampled_from("a tiger\ud800\x1b\n\0🐯<|>"), max_size=99)
DTYPES = "BOOL F4 F6_E2M3 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64"
dtypes = st.sampled_from(DTYPES.split())
shapes = st.lists(whole, max_size=5)
entries = st.fixed_dictionaries({"dtype": dtypes | anything, "shape": shapes | anything,
                                 "data_offsets": st.tuples(whole, whole) | anything})  # fmt: skip
# Consistent ones, of no values: (0, 2^63) has no bytes and no place in memory either.
empty = st.fixed_dictionaries({"dtype": dtypes, "shape": st.lists(whole.map(abs), max_size=3).map(lambda s: [0, *s]),
                               "data_offsets": st.just((0, 0)) | st.just((len(BODY), len(BODY)))})  # fmt: skip


@st.composite
def damaged(draw, data):
    """Bytes cut off, changed, inserted."""
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["cut", "change", "insert", "drop"]))
        some = draw(st.binary(max_size=9))
        data = {"cut": data[:at], "change": data[:at] + some + data[at + len(some) :],
                "insert": data[:at] + some + data[at:], "drop": data[:at] + data[at + len(some) :]}[kind]  # fmt: skip
    return data


@st.composite
def safetensors_files(draw):
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=64))
    header = dict(HEADER)
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(HEADER)) | words)
        what = draw(st.sampled_from(["drop", "field", "entry", "empty", "anything"]))
        if what == "drop":
            header.pop(name, None)
        elif what == "field" and isinstance(header.get(name), dict):
            header[name] = header[name] | draw(st.sampled_from([{"dtype": draw(dtypes)}, {"shape": draw(shapes)},
                                                                {"data_offsets": draw(anything)}]))  # fmt: skip
        else:
            header[name] = draw({"entry": entries, "empty": empty}.get(what, anything))
    text = json.dumps(header).encode()
    length = draw(st.just(len(text)) | st.just(len(text)) | st.integers(0, 2**64 - 1) | st.integers(0, 2 * len(text)))
    return draw(damaged(struct.pack("<Q", length) + text + BODY))


def load_all(path):
    """Every way in which a file's tensors are taken up, each to its end or to its CheckpointError."""
    with contextlib.suppress(CheckpointError):
        _, tensors, files = sources.open_vae(path)
        weights.check({name: SOUND[name] for name in sorted(SOUND)[:2]}, tensors, str(files))
        weights.fingerprint("vae", tensors)
    with contextlib.suppress(CheckpointError):
        source = sources.open_single_file(path, ema=True)
        for part in weights.MODELS:
            weights.check(source.tensors[part], source.tensors[part], part)  # for their dtypes
            weights.fingerprint(part, source.tensors[part])


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
        _, tensors, _ = sources.open_vae(file)
        weights.check({}, tensors, "here")
    assert set(sources.open_single_file(file, ema=True).tensors["unet"]) == {
        "conv_in.weight", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"}  # fmt: skip


@fuzzed(10_000)
@given(data=safetensors_files())
def test_safetensors(file, data):
    file.write_bytes(data)
    with bounded_memory(len(data)):
        load_all(file)


def test_large_files(file):
    """Files whose headers or bodies are as large as they may be, and larger."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for count, length in ((4_000, 300), (4_001, 300), (100_000, 30), (1_000_000, 5), (1, 4 << 20), (1, 90 << 20)):
        text = json.dumps({f"{i:0{length}}": entry for i in range(count)}).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text)
        with bounded_memory(8 + len(text)):
            load_all(file)
    with file.open("wb") as sparse:
        entry |= {"shape": [1 << 33], "data_offsets": [0, 1 << 35]}
        text = json.dumps({"decoder.conv_in.weight": entry}).encode()
        sparse.write(struct.pack("<Q", len(text)) + text)
        sparse.truncate(8 + len(text) + (1 << 35))  # 32 GB on no disk: mapped, never read
    with bounded_memory(0):
        load_all(file)


# ------------------------------------------------------------------------------------------------------ configs


@fuzzed(2_000)
@given(data=st.data())
def test_configs(file, data):
    """A config that is read makes a network without storage, in the same bounds."""
    part = data.draw(st.sampled_from(["unet", "vae", "text_encoder", "scheduler"]))
    own = TINY / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    fields = json.loads(own.read_text())
    lists = st.lists(whole | st.sampled_from([32, 64, 2**16]), max_size=9)
    for name in data.draw(st.lists(st.sampled_from(sorted(fields)), max_size=3)):
        fields[name] = data.draw(whole | lists | st.sampled_from([100, 1000, 2**16, 10**6]) | st.floats() | anything)
    path = file.with_name("config.json")
    text = json.dumps(fields).encode()
    path.write_bytes(data.draw(st.just(text) | damaged(text)))
    with contextlib.suppress(CheckpointError):
        config = sources.read_config(path, part)
        if part == "scheduler":
            magicmix.Schedule(config, 1)
        else:
            with pytest.raises(CheckpointError, match="is missing"):
                weights.build(part, config, {}, [path], torch.float32, torch.device("cpu"))


# ----------------------------------------------------------------------------------------------------- metadata

PARAMETERS = {
    "prompt": "a tiger", "layout_prompt": "a car", "k_max": 0.6, "k_min": 0.15, "nu": 0.7, "steps": 20, "guidance": 4.0,
    "negative": "", "reweight": {"tiger": 2.0}, "sampler": "ddim", "eta": 0.0, "seed": 1, "size": [128, 128],
    "dtype": "fp32", "vae_dtype": "fp32", "prediction": "auto", "upcast_attention": "auto", "no_ema": False,
}  # fmt: skip
NAMES = [*PARAMETERS, "layout", "weights", "vae", "output", "device", "quiet", "again", "count", "debug"]


class Reached(Exception):
    """The first step would be next."""


@pytest.fixture(scope="module")
def again():
    """The command line on a picture, as far as its first step, with a checkpoint that is loaded already."""
    models = weights.load()

    def stop(*_):
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "load", lambda *_, **__: models)
        patch.setattr(magicmix, "follow", stop)

        def run(path):
            error = io.StringIO()
            with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()) as out:
                try:
                    code = magicmix.main(["--again", str(path), "-o", str(path.with_name("new.png"))])
                except Reached:
                    code = 0
            lines = error.getvalue()
            assert (code, lines.count("\n")) in ((0, 0), (2, 1)), lines
            assert all(c.isprintable() for c in (out.getvalue() + lines).replace("\n", ""))
            return code

        yield run


def with_text(text):
    """A small PNG that carries the text."""
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_itxt("magicmix", text) if zlib.crc32(text.encode()) % 2 else info.add_text("magicmix", text, zip=True)
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


@st.composite
def pictures(draw):
    parameters = dict(PARAMETERS)
    for name in draw(st.lists(st.sampled_from(NAMES) | words, max_size=3)):
        if name in parameters and draw(st.booleans()):
            del parameters[name]
        else:
            parameters[name] = draw(anything | texts)
    metadata = {"parameters": parameters} | draw(st.just({}) | st.dictionaries(st.sampled_from(
        ["checkpoint", "layout_sha256", "versions", "parameters"]), anything, max_size=1))  # fmt: skip
    text = json.dumps(metadata)
    if draw(st.integers(0, 9)) == 0:
        text = draw(damaged(text.encode()).map(lambda data: data.decode("latin-1")) | st.just("[" * 100_000))
    file = with_text(text)
    return draw(damaged(file)) if draw(st.integers(0, 4)) == 0 else file


@pytest.mark.parametrize("text", ["a tiger", "a tiger " * 10_000])
def test_the_fuzzed_picture_is_sound(again, tmp_path, text):
    data = with_text(json.dumps({"parameters": PARAMETERS | {"prompt": text}}))
    (tmp_path / "old.png").write_bytes(data)
    assert again(tmp_path / "old.png") == 0


@fuzzed(3_000)
@given(data=pictures())
def test_metadata(again, file, data):
    path = file.with_name("old.png")
    path.write_bytes(data)
    with bounded_memory(len(data)):
        again(path)


# ----------------------------------------------------------------------------------------------------- pictures

SMALL = Image.effect_noise((24, 16), 80).convert("RGB")


@fuzzed(2_000)
@given(data=st.data())
def test_pictures(file, data):
    kind = data.draw(st.sampled_from(magicmix.FORMATS))
    sound = io.BytesIO()
    SMALL.save(sound, kind)
    path = file.with_name("layout")
    path.write_bytes(data.draw(damaged(sound.getvalue())))
    with contextlib.suppress(ValueError):
        picture, _, _ = magicmix.open_layout(path)
        assert magicmix.fit(picture, (16, 24)).isfinite().all()
