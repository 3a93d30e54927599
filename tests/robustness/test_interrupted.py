"""Ended in the middle: by Ctrl-C, by SIGTERM, by a kill that nothing can catch."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, forks, run, wait_for_handlers
from PIL import Image

from command import machine, pictures

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
LINUX = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="waits for handlers as Linux shows them")
MIX = ("a tiger", "--layout-prompt", "a car", "--steps", "10", "--size", "64")
KILLS = 50


def overwrite_for_ever(path, seed):
    """The command's own way of writing, again and again, each time with one of two pictures."""
    two = two_pictures()
    order = random.Random(seed)
    while True:
        i = order.randrange(2)
        pictures.save(two[i], path, {"picture": i})


def two_pictures():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


def test_a_kill_while_a_picture_is_overwritten(tmp_path):
    """50 kills at random moments: the file is always one of the pictures, whole, with its own parameters."""
    path, whole = tmp_path / "mix.png", []
    for i, picture in enumerate(two_pictures()):
        pictures.save(picture, path, {"picture": i})
        whole.append(path.read_bytes())
    random_moment, written = random.Random(1), 0
    for kill in range(KILLS):
        path.write_bytes(whole[kill % 2])
        old = path.stat().st_mtime_ns
        process = forks().Process(target=overwrite_for_ever, args=(path, kill))
        process.start()
        while path.stat().st_mtime_ns == old and process.is_alive():  # it has begun
            time.sleep(0.001)
        time.sleep(random_moment.uniform(0, 0.1))
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert path.read_bytes() in whole
        written += path.stat().st_mtime_ns != old
    assert written == KILLS, "nothing was overwritten"
    # The kills were not all between two writings: what they cut off lies beside the picture.
    cut = [temporary for temporary in tmp_path.glob(".magicmix-*.tmp") if temporary.read_bytes() not in whole]
    assert len(cut) >= KILLS // 10, f"only {len(cut)} kills fell into a writing"


@LINUX
@pytest.mark.parametrize(("number", "expected"), SIGNALS)
def test_a_signal_at_any_moment(number, expected, tmp_path):
    """After the imports: the code that shells expect, no traceback, the old picture or the new one, no file besides."""
    (tmp_path / "mix.png").write_bytes(b"old")
    assert run(*MIX, cwd=tmp_path).code == 0
    new, codes = (tmp_path / "mix.png").read_bytes(), []
    whole_run, random_moment = 60.0, random.Random(2)
    while len(codes) < 13 or (codes.count(expected) < 6 and len(codes) < 40):
        (tmp_path / "mix.png").write_bytes(b"old")
        started = time.monotonic()
        done = run(*MIX, cwd=tmp_path, kill=(number, random_moment.uniform(0, whole_run)) if codes else None)
        if done.code == 0:  # the machine may be faster by now
            whole_run = min(whole_run, time.monotonic() - started)
        assert done.code in (0, expected) and "Traceback" not in done.err, done
        assert (tmp_path / "mix.png").read_bytes() in ((new,) if done.code == 0 else (b"old", new))
        assert os.listdir(tmp_path) == ["mix.png"], "files were left behind"
        codes.append(done.code)
    assert codes.count(expected) >= 6, codes


def signalled_where_exceptions_are_lost(number, where):
    """A process that gets a signal in the midst of a library's code and goes on for a while."""
    machine.end_on_signals()

    class Last:
        def __del__(self):
            os.kill(os.getpid(), number)

    if where == "__del__":
        Last()
    else:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), number)
    time.sleep(0.1)
    os._exit(0)


@pytest.mark.parametrize("where", ["__del__", "a bare except"])
@pytest.mark.parametrize(("number", "expected"), SIGNALS)
def test_a_signal_where_exceptions_are_lost(number, expected, where):
    """Python ignores what is raised in a __del__, and libraries catch whatever they like."""
    process = forks().Process(target=signalled_where_exceptions_are_lost, args=(number, where))
    process.start()
    process.join(60)
    assert process.exitcode == expected


def signalled_in_the_middle(number, path):
    """A process that gets a signal when half of a file is written."""
    machine.end_on_signals()

    def write(file):
        file.write(b"half of it")
        file.flush()
        os.kill(os.getpid(), number)
        time.sleep(0.1)

    pictures.replace(path, "output", write)
    os._exit(0)


@pytest.mark.parametrize(("number", "expected"), SIGNALS)
def test_a_signal_in_the_middle_of_a_file(number, expected, tmp_path):
    (tmp_path / "mix.png").write_bytes(b"old")
    process = forks().Process(target=signalled_in_the_middle, args=(number, tmp_path / "mix.png"))
    process.start()
    process.join(60)
    assert process.exitcode == expected and (tmp_path / "mix.png").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["mix.png"], "half a file was left behind"


def one_long_operation(path):
    """A process that is in one call of torch for far more than ten seconds; `path` is a file that is being written."""
    machine.end_on_signals()
    machine.TEMPORARY.add(path)
    q = torch.zeros(1, 1, 200_000, 64)
    path.write_bytes(b"half of it")
    torch.nn.functional.scaled_dot_product_attention(q, q, q)
    os._exit(0)


@pytest.mark.parametrize(("number", "expected"), SIGNALS)
def test_a_signal_within_one_long_operation(number, expected, tmp_path):
    """A step of a large picture: the process ends within two seconds, though no Python runs in it."""
    path = tmp_path / "half"
    process = forks().Process(target=one_long_operation, args=(path,))
    process.start()
    while not path.exists() and process.is_alive():
        time.sleep(0.01)
    time.sleep(0.5)  # it is within the operation now
    os.kill(process.pid, number)
    process.join(2)
    ended = process.exitcode
    process.kill()
    process.join()
    assert ended == expected and not path.exists()


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_what_a_library_writes_on_a_closed_stream_is_no_signal(closed):
    """The number of a closed standard stream goes to the next file that is opened, and so might to the pipe that tells
    of signals. Here torch's OpenMP runtime writes on 2."""
    line = f"{sys.executable} magicmix.py --version {closed}"
    environment = os.environ | {"OMP_DISPLAY_ENV": "TRUE"}
    assert subprocess.run(line, shell=True, cwd=ROOT, env=environment, timeout=60).returncode == 0


@LINUX
@pytest.mark.parametrize(("number", "expected"), SIGNALS)
def test_a_signal_during_the_imports(number, expected, tmp_path):
    """From the script's first lines on; what comes earlier, some hundredths of a second, is the interpreter's start."""
    random_moment = random.Random(3)
    for _ in range(5):
        line = [sys.executable, str(ROOT / "magicmix.py"), *MIX]
        process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for_handlers(process.pid)
        time.sleep(random_moment.uniform(0, 1))
        process.send_signal(number)
        out, error = process.communicate(timeout=60)
        assert (process.returncode, out, error) == (expected, "", "")
    assert not os.listdir(tmp_path)
