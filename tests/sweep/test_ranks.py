"""Several processes: they divide the work, none writes what another writes, and a kill loses what was in flight."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import LAYOUT, ROOT, forks

from command import machine
from lab.sweep.__main__ import main

FAST = ["--steps", "6", "--size", "32", "--quiet"]
GRID = ["a tiger", "a panda", "--layout-prompt", "a car", "--nu", "0.5,0.8", "--k-min", "0.2,0.4", "--seeds", "0..1",
        "--sampler", "ddpm", *FAST]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "grid"
    assert main([*map(str, GRID), "-o", str(folder)]) == 0
    return picture_bytes(folder)


def picture_bytes(folder):
    return {path.name: path.read_bytes() for path in (folder / "pictures").glob("*.png")}


def index(folder):
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def one_rank(rank, world, port, arguments, folder, fails):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    machine.begin()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}.{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if rank == fails:
        from lab.sweep.__main__ import Part

        Part.write = cannot_write
    os._exit(main([*map(str, arguments), "-o", str(folder)]))


def cannot_write(*_):
    raise OSError("output 'x.png' cannot be written: No space left on device; choose another place")


def start(world, arguments, folder, fails=None):
    """The ranks, as torchrun starts them."""
    port = free_port()
    ranks = [
        forks().Process(target=one_rank, args=(rank, world, port, arguments, folder, fails)) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    return ranks


def ends(ranks):
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks]


def ends_under_torchrun(ranks):
    """torchrun looks every 0.1 s, and ends all ranks when one has ended with an error; here at once."""
    limit = time.monotonic() + 120
    while any(process.is_alive() for process in ranks) and time.monotonic() < limit:
        if any(process.exitcode for process in ranks):
            for process in ranks:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGTERM)
            break
        time.sleep(0.001)
    return ends(ranks)


def made_by(folder):
    """rank -> how many cells it made."""
    parts = {int(path.stem): path.read_text().splitlines() for path in (folder / "parts").glob("*.jsonl")}
    return {rank: len(lines) for rank, lines in sorted(parts.items())}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_make_what_one_process_makes(world, whole, tmp_path):
    """The same bytes, each by one rank; rank 0 tells of it."""
    folder = tmp_path / "grid"
    arguments = [argument for argument in GRID if argument != "--quiet"]
    assert ends(start(world, arguments, folder)) == [0] * world
    assert picture_bytes(folder) == whole
    assert [line["status"] for line in index(folder)] == ["made"] * 16
    assert list(made_by(folder)) == list(range(world)) and sum(made_by(folder).values()) == 16
    said = Path(f"{folder}.0.out").read_text()
    assert said.splitlines()[0] == "2 x 2 x 2 cells, 2 seeds: 66 UNet calls instead of 136"
    assert (f"{world} ranks with " in said) == (world > 1)
    for rank in range(1, world):
        assert Path(f"{folder}.{rank}.out").read_text() == "" and Path(f"{folder}.{rank}.err").read_text() == ""


@pytest.mark.parametrize(("world", "killed", "then"), [(2, 1, 4), (4, 2, 1)])
def test_a_killed_rank(world, killed, then, whole, tmp_path):
    """SIGKILL of one rank, whereupon torchrun ends the others; then continued with another number of ranks."""
    folder = tmp_path / "grid"
    ranks = start(world, GRID, folder)
    limit = time.monotonic() + 120
    while not picture_bytes(folder):
        assert time.monotonic() < limit and all(process.is_alive() for process in ranks)
        time.sleep(0.002)
    ranks[killed].kill()
    ranks[killed].join(60)
    for process in ranks:
        if process.is_alive():
            os.kill(process.pid, signal.SIGTERM)
    codes = ends(ranks)
    assert codes[killed] == -signal.SIGKILL and set(codes) <= {-signal.SIGKILL, 143}
    there = picture_bytes(folder)
    assert 1 <= len(there) < 16 and there.items() <= whole.items()
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "pictures").glob("*.png")}
    listed = {json.loads(line)["cell"] for path in (folder / "parts").glob("*.jsonl") for line in path.open()}
    assert len(there) - world <= len(listed) <= len(there), "a rank loses one line at most"
    assert ends(start(then, GRID, folder)) == [0] * then
    assert picture_bytes(folder) == whole and len(index(folder)) == 16
    kept = {name for name in before if int(name.partition("_")[0]) in listed}
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "pictures").glob("*.png")}
    assert all(before[name] == after[name] for name in kept), "what was done is not made again"


def test_one_ranks_failure_leaves_the_others_work(whole, tmp_path):
    """Rank 1 cannot write: it says so, the others make their parts, and what lacks is listed and made the next time.
    The page, too, is there before torchrun hears of it."""
    folder = tmp_path / "grid"
    codes = ends_under_torchrun(start(3, GRID, folder, fails=1))
    assert all(code in (expected, 143) for code, expected in zip(codes, (1, 2, 0))), codes
    assert (folder / "page.html").is_file() and (folder / "sheets" / "prompt-nu.png").is_file()
    assert "No space left on device" in Path(f"{folder}.1.err").read_text()
    lines = index(folder)
    lacking = [line for line in lines if line["status"] != "made"]
    assert 0 < len(lacking) < 10 and {line["status"] for line in lacking} == {"missing"}
    assert "not made" in Path(f"{folder}.0.err").read_text()
    assert ends(start(2, GRID, folder)) == [0, 0]
    assert picture_bytes(folder) == whole


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layout", "missing.png"], "layout 'missing.png' does not exist"),
        (["--layout", str(LAYOUT), "--nu", "2"], "nu 2.0 is out of range"),
        (["--layout", str(LAYOUT), "--nu", "0.9..0.5"], "range '0.9..0.5' is empty"),
        (["--layout", str(LAYOUT), "--weights", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_told_once(more, message, tmp_path):
    arguments = ["a tiger", *more, *FAST]
    codes = ends_under_torchrun(start(3, arguments, tmp_path / "grid"))
    assert 2 in codes and set(codes) <= {2, 143}
    said = [Path(f"{tmp_path / 'grid'}.{rank}.err").read_text() for rank in range(3)]
    assert said[1:] == ["", ""] and said[0].count("\n") == 1 and message in said[0]


def test_torchrun_itself(tmp_path):
    """As a user starts it, with the --, and a worker killed; then continued without torchrun."""
    folder = tmp_path / "grid"
    arguments = ["a tiger", "--layout", str(LAYOUT), "--nu", "0.1..0.9", "--k-min", "0.2,0.4", *FAST, "-o", str(folder)]
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
            "-m", "lab.sweep", "--", *arguments]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    limit = time.monotonic() + 120
    while len(list(folder.glob("pictures/*.png"))) < 3:
        assert time.monotonic() < limit and process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.005)
    (worker,) = [pid for pid in children(process.pid) if b"RANK=1" in environment(pid)]
    os.kill(worker, signal.SIGKILL)
    assert process.wait(120) != 0
    there = picture_bytes(folder)
    assert 3 <= len(there) < 18
    assert main(arguments) == 0
    made = picture_bytes(folder)
    assert len(made) == 18 and there.items() <= made.items()
    assert {line["status"] for line in index(folder)} == {"made"}


def children(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def environment(pid):
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
