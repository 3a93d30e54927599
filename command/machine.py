"""The machine that a command runs on: signals, errors, device and precision.

Nothing slow is imported at the top: signals are handled before torch is there.
"""

import contextlib
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

TEMPORARY = set()  # files that are being written, to be cleared away when the process ends


def begin() -> None:
    """What a command does first, before torch is imported."""
    take_closed_places()
    end_on_signals()
    let_threads_sleep()


def take_closed_places() -> None:
    """Files 0, 1 and 2, where they were closed before the start, lead nowhere from now on; else the next files that are
    opened would take their numbers, and what a library prints would go into them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, this one


def let_threads_sleep() -> None:
    """torch's threads sleep while they wait for each other; by default they spin, and beside another busy process they
    then keep the one that they wait for from its core (lab/bench/busy.py). The OpenMP runtime reads this once, when
    torch is imported. OMP_WAIT_POLICY or GOMP_SPINCOUNT, if the user has set one, stays as it is and wins."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def end_on_signals() -> None:
    """SIGINT and SIGTERM end the process at once, with 128 + the signal, as shells count. Not by an exception: in the
    middle of torch's start one would abort the process, and in a library's `__del__` it would be lost."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    # Python calls a handler between two of its own instructions, and one of torch's may take minutes. So the
    # interpreter also writes the signal's number into this pipe, at once, and a thread reads it.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # signal.set_wakeup_fd asks for it
    signal.set_wakeup_fd(writing)
    threading.Thread(target=end_for_the_main_thread, args=(reading,), daemon=True).start()


def end_for_the_main_thread(reading: int) -> None:
    """Waits for a signal's number and ends the process unless its own handler does that first, as it does where it
    can: no file is then being moved into its place meanwhile."""
    number = os.read(reading, 1)[0]
    time.sleep(0.2)
    end(number, None)


def end(number: int, _) -> None:
    """Clears away what is half written and ends the process."""
    for path in list(TEMPORARY):
        path.unlink(missing_ok=True)
    os._exit(128 + number)


def one_line(text: object) -> str:
    """Text that may come from a file, for the terminal: one line of at most 1,000 characters, control characters
    escaped."""
    text = printable(" ".join(str(text).split()))
    return text if len(text) <= 1000 else f"{text[:600]} ... {text[-300:]}"


def shown(value: object) -> str:
    """A value for a message: its repr, of which at most 100 characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an integer of more than 4,300 digits has none; an object's own may raise anything
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-30:]}"


def printable(text: str) -> str:
    """Text with its control characters escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def show(lines: list[str]) -> None:
    """Prints text that may come from a file."""
    for line in lines:
        print(printable(line))


class Stream:
    """A standard stream whose failure does not end the work: `check` tells of it afterwards. One that was closed before
    the start, for which Python has None, takes everything and has no failure. A context: within it, sys has this one.

    Args:
        name: stdout or stderr.
    """

    def __init__(self, name: str):
        self.name, self.before, self.error = name, getattr(sys, name), None
        self.stream = self.before or open(os.devnull, "w")

    def __enter__(self) -> "Stream":
        setattr(sys, self.name, self)
        return self

    def __exit__(self, *_) -> None:
        setattr(sys, self.name, self.before)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def attempt(self, action: Callable, *arguments) -> None:
        try:
            action(*arguments)
        except OSError as error:
            self.error = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # where its buffer goes in the end

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def check(self) -> None:
        """Raises OSError that names the stream when it has failed."""
        self.flush()
        if self.error:
            raise OSError(f"{self.name} cannot be written to: {self.error.strerror}; all else is done")


def run(program: str, work: Callable[[], None], quiet: bool = False, debug: bool = False) -> int:
    """Runs a command and returns its exit code: 0, or 2 after one line on stderr for input that cannot be used, or for
    a stdout or stderr that could not be written to, when all else is done.

    Args:
        program: how its lines begin.
        work: what it does.
        quiet: no warnings.
        debug: the traceback above the line.
    """
    with Stream("stdout") as out, Stream("stderr") as err, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say(f"{program}: {one_line(message)}")
        if quiet:
            warnings.simplefilter("ignore")
        try:
            work()
            out.check()
            err.check()
            return 0
        except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
            message = str(error)
            if is_out_of_memory(error):
                message = "out of memory; a smaller --size, --count 1 or --dtype bf16 needs less"
            elif isinstance(error, RuntimeError):
                raise
            if debug:
                traceback.print_exc()
            print(f"{program}: {one_line(message)}", file=sys.stderr)
            return 2


def is_out_of_memory(error: Exception) -> bool:
    """torch has a type of its own for this on a GPU only."""
    told = re.search("out of memory|can't allocate memory|ALLOC_FAILED", str(error))
    return isinstance(error, MemoryError) or told is not None


def follow(steps: Iterator, total: int, quiet: bool):
    """Runs a generator of Steps under a progress bar that names the phase; returns the last, None if there was none.
    After the first step the bar shows the time that is left; a line says so where that is more than a minute."""
    from tqdm import tqdm

    last, began = None, time.monotonic()
    with tqdm(total=total, disable=quiet, unit="step") as bar:
        for done, last in enumerate(steps, start=1):
            bar.set_description(last.phase)
            bar.update()
            took = time.monotonic() - began
            if done == 1 and took * (total - 1) > 60 and not quiet:
                left = took * (total - 1) / 60
                say(f"magicmix: the first step took {took:.0f} s; about {left:,.0f} min for the {total - 1} others")
    return last


def say(line: str) -> None:
    """Prints a line on stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def choose_device(name: str):
    """The torch.device of that name; "auto" takes a GPU where there is one. Raises ValueError for one that torch does
    not know or that is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {name!r} cannot be used ({reason}); use cpu, or auto for what is there") from error
    return torch.device(name)


def check_memory(needed: int, device, fewer: str = "--count") -> None:
    """Raises ValueError when so many bytes are more than the device has free. `fewer` is the option for how many
    pictures are decoded at once."""
    free = free_memory(device)
    if needed > free:
        amounts = f"at least {needed / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are free"
        raise ValueError(f"decoding the pictures needs {amounts}; a smaller --size or {fewer} needs less")


def free_memory(device) -> int:
    """The bytes that can still be used on a torch.device, or more: swap counts, as what fits must not be refused."""
    import torch

    if device.type == "cuda":  # what torch holds in reserve is free for it as well
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):  # Linux alone has it
        text = Path("/proc/meminfo").read_text()
        found = [1024 * sum(int(kb) for kb in re.findall(r"^(?:MemAvailable|SwapFree): +(\d+) kB", text, re.MULTILINE))]
    with contextlib.suppress(OSError, ValueError):  # a container's limit, where there is one ("max" otherwise)
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found)


DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def dtype_name(dtype) -> str:
    """torch.float32 -> fp32"""
    return {torch_name: name for name, torch_name in DTYPES.items()}[str(dtype).removeprefix("torch.")]


def choose_dtype(name: str | None, device):
    """The torch.dtype of that name; None is fp32 on a CPU and fp16 elsewhere. Raises ValueError when the device cannot
    compute in it."""
    import torch

    name = name or ("fp32" if device.type == "cpu" else "fp16")
    dtype = getattr(torch, DTYPES[name])
    try:
        x = torch.ones(1, 4, 4, 4, device=device, dtype=dtype)
        torch.nn.functional.conv2d(x, x).item()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"dtype {name} cannot be used on device {str(device)!r} ({reason}); use fp32") from error
    return dtype


def versions() -> dict[str, str]:
    """The versions of what a picture's bytes depend on."""
    return {name: version(name) for name in ("torch", "transformers", "safetensors", "pillow", "numpy")}


def version_lines() -> list[str]:
    """What --version shows: the commit where this is a clone that git can be asked about, and what it runs on."""
    clone, commit = Path(__file__).resolve().parents[1], ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if (clone / ".git").exists():  # or git would name the commit of a repository around it
            git = ["git", "-C", str(clone), "describe", "--always", "--dirty"]
            commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    lines = [f"magicmix {commit or '(not a git clone)'}", f"Python {platform.python_version()}"]
    return lines + [f"{name} {number}" for name, number in versions().items()]
