"""Shared pieces of the tests: how errors are measured, how an oracle gets random weights, copies of the embedded
checkpoint to change, and how the command is run."""

import dataclasses
import functools
import gzip
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import struct
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests themselves run side by side
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command import machine  # noqa: E402

machine.let_threads_sleep()  # with more than one: before torch is imported

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image, PngImagePlugin  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import weights  # noqa: E402
from lab.explain.screenshot import CHROMIUM, FLAGS  # noqa: E402

TINY = ROOT / "weights" / "tiny"
LAYOUT = ROOT / "docs" / "layouts" / "castle.png"
PRECIOUS = b"a picture that was there before"


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Maximum absolute error over the reference's largest absolute value."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    assert reference.isfinite().all() and reference.std() > 0, "nothing to compare with"
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter away from its initial value, so that swapped norms or forgotten biases cannot hide."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p += 0.1 * p.std().nan_to_num(1.0).clamp(min=0.5) * torch.randn(p.shape, generator=generator)
    return model.eval()


@functools.cache
def published_facts() -> dict:
    """The headers and configs of the published files, and name maps; see test_names.py."""
    return json.loads(gzip.decompress((ROOT / "tests" / "data" / "checkpoints.json.gz").read_bytes()))


# Bytes of a value, in the order in which the library lays tensors out.
BYTES = {"I64": 8, "F64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}


def published_rows(family: str, name: str, dtype: str | None = None) -> dict[str, tuple[list[int], str]]:
    """name -> (shape, dtype) of every tensor of a published single file; `dtype` in place of float32."""
    facts = published_facts()["single"][family]
    groups = set(facts["files"][name]["groups"])
    return {
        n: (shape, (dtype or d) if d == "F32" else d)
        for n, (shape, d, group) in facts["tensors"].items()
        if group in groups
    }


def sparse_file(path: Path, rows: dict[str, tuple[list[int], str]], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file of {name: (shape, dtype)}, all zeros, with a true header and a body that takes no disk.

    As the safetensors library lays it out: by dtype, then by name; metadata first; the header padded with spaces to a
    multiple of 8.
    """
    header, end = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0
    for name, (shape, dtype) in sorted(rows.items(), key=lambda row: (list(BYTES).index(row[1][1]), row[0])):
        size = BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


# -------------------------------------------------------------------------------- copies of the embedded checkpoint


@pytest.fixture(scope="session")
def models():
    """The embedded checkpoint, for tests that leave it as it is."""
    return weights.load()


class UNet:
    """What `answer` returns, with a UNet's config."""

    def __init__(self, config, answer):
        self.config, self.answer = config, answer

    def __call__(self, *arguments):
        return self.answer(*arguments)


def with_unet(models: weights.Checkpoint, answer, **fields) -> weights.Checkpoint:
    """The same with another UNet: answer(x, t, context, token_weights), and other fields in its config."""
    config = dataclasses.replace(models.unet.config, **fields)
    return dataclasses.replace(models, unet=UNet(config, answer))


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded checkpoint; it goes with the test."""
    yield shutil.copytree(TINY, tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "checkpoint")


def change_tensors(folder: Path, part: str, change) -> None:
    """change(state) of a part's safetensors file as {name: tensor}."""
    (path,) = (folder / part).glob("*.safetensors")
    state = load_file(path)
    change(state)
    save_file(state, path)


def change_config(folder: Path, part: str, **fields) -> None:
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ------------------------------------------------------------------------------------------------------ the command


@functools.cache
def forks():
    """The context in which every process is forked from one that has done the slow imports and nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "magicmix", "tqdm", "transformers.models.clip.tokenization_clip"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))  # that one's
        forkserver.ensure_running()
    return context


class Done(NamedTuple):
    code: int  # the exit code; -N if signal N ended the process
    out: str
    err: str


def script(arguments: list[str], cwd: Path, log: Path, environment: dict[str, str] | None) -> None:
    """magicmix.py as the interpreter runs it, from its first line, in `cwd`."""
    os.chdir(cwd)
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
        for name in [n for n in sys.modules if n.partition(".")[0] == "huggingface_hub"]:
            del sys.modules[name]  # it reads the environment when it is imported
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(log.with_suffix(f".{stream}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["magicmix.py", *arguments]
    runpy.run_path(str(ROOT / "magicmix.py"), run_name="__main__")


def wait_for_handlers(pid: int) -> None:
    """Until the process catches SIGTERM, as the script does from its first lines on and the interpreter does not."""
    caught, limit = 0, time.monotonic() + 60
    while not caught & 1 << (signal.SIGTERM - 1):
        assert time.monotonic() < limit, "the command does not start"
        caught = int(re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)


def run(
    *arguments,
    cwd: Path,
    environment: dict[str, str] | None = None,
    kill: tuple[signal.Signals, float] | None = None,
) -> Done:
    """What `python magicmix.py ARGUMENTS` does.

    Args:
        arguments: of the command, as text or what becomes text.
        cwd: the folder that it runs in.
        environment: its environment, for huggingface_hub; None for that of the tests.
        kill: a signal, and how many seconds after the command's first lines it comes.
    """
    log = cwd.parent / f"{cwd.name}-log"
    process = forks().Process(target=script, args=([str(a) for a in arguments], cwd, log, environment))
    process.start()
    if kill:
        wait_for_handlers(process.pid)
        time.sleep(kill[1])
        if process.is_alive():
            os.kill(process.pid, kill[0])
    process.join(300)
    assert process.exitcode is not None, "the command hangs"
    return Done(process.exitcode, *(log.with_suffix(f".{stream}").read_text() for stream in ("out", "err")))


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Every file below a folder with its content, and every other thing without."""
    return {p: p.read_bytes() if p.is_file() and not p.is_symlink() else None for p in sorted(folder.rglob("*"))}


def refused(*arguments, cwd: Path, message: str) -> str:
    """Runs a command that must fail: exit code 2, one line, every file as it was. Returns the line."""
    (cwd / "mix.png").write_bytes(PRECIOUS)
    before = contents(cwd)
    code, _, error = run(*arguments, cwd=cwd)
    assert code == 2 and "Traceback" not in error, error
    assert error.startswith("magicmix: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert message in error, error
    assert contents(cwd) == before, "files were changed, left behind or lost"
    return error


def write_again(path: Path, metadata: dict | str) -> None:
    """A small picture that carries the metadata, for --again."""
    info = PngImagePlugin.PngInfo()
    info.add_text("magicmix", metadata if isinstance(metadata, str) else json.dumps(metadata))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


# ---------------------------------------------------------------------------------------------------------- a browser

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page is not driven")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def open_tab(browser):
    """open_tab(path, ready, ...): a page's file, opened, when what `ready` selects is there. At the end: no request
    left that file, no error was logged, and no dialog was shown."""
    contexts, requests, errors = [], [], []

    def opened(path, ready, width=1280, height=900, **context):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **context))
        tab = contexts[-1].new_page()
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("console", lambda message: errors.append(message.text) if message.type != "log" else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("dialog", lambda dialog: errors.append(dialog.message))
        tab.goto(path.as_uri())
        tab.wait_for_selector(ready)
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert [url for url in requests if not url.startswith(("data:", "file:"))] == []
    assert len([url for url in requests if url.startswith("file:")]) == len(contexts)
    assert errors == []


def wait_until(condition):
    """In place of wait_for_function, which the page's policy forbids."""
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit, "it does not happen"
        time.sleep(0.05)
