"""Shared pieces of the tests: how errors are measured, how an oracle gets random weights, how the command is run."""

import multiprocessing
import os
import re
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

TINY = ROOT / "weights" / "tiny"


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


# Every command is a process of its own, forked from one that has done the slow imports and nothing else.
os.environ["PYTHONPATH"] = str(ROOT)  # that one's
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["weights", "transformers.models.clip.tokenization_clip"])


class Done(NamedTuple):
    code: int  # the exit code; -N if signal N ended the process
    out: str
    err: str


def script(arguments: list[str], cwd: Path, log: Path) -> None:
    """magicmix.py as the interpreter runs it, from its first line, in `cwd`."""
    os.chdir(cwd)
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


def command(*arguments, cwd: Path, kill: tuple[signal.Signals, float] | None = None) -> Done:
    """What `python magicmix.py ARGUMENTS` does in `cwd`, ended by a signal some seconds after its first lines where one
    is given."""
    log = cwd.parent / f"{cwd.name}-log"
    process = FORKS.Process(target=script, args=([str(a) for a in arguments], cwd, log))
    process.start()
    if kill:
        wait_for_handlers(process.pid)
        time.sleep(kill[1])
        if process.is_alive():
            os.kill(process.pid, kill[0])
    process.join(300)
    assert process.exitcode is not None, "the command hangs"
    return Done(process.exitcode, *(log.with_suffix(f".{stream}").read_text() for stream in ("out", "err")))
