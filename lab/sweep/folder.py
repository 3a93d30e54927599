"""The folder of a sweep, which can be continued after whatever ended it.

    sweep.json             what the sweep is: its axes, and the sha256 of the files that it reads
    pictures/              one PNG per cell, named by its number and by what varies
    parts/RANK.jsonl       what each rank has done, one line per cell; a line that a kill cut off counts for nothing
    index.jsonl            one line per cell, made of the parts when a run ends
    sheets/, page.html     made of the pictures then

A cell is done when its picture is there, whole, and a line says so. One process group writes at a time.
"""

import fcntl
import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from command import pictures
from lab.sweep.grid import WORD, Cell, Grid, written

FORMAT = 1
LONGEST = 180  # bytes of a picture's name


@dataclass
class Folder:
    """A sweep's folder.

    Attributes:
        path: of the folder.
        grid: its sweep.
        lock: the open file whose lock keeps a second sweep away.
    """

    path: Path
    grid: Grid
    lock: TextIO | None = field(default=None, repr=False)

    def name(self, cell: Cell) -> str:
        """The file's name of a cell's picture: its number, and the values of the axes that vary."""
        width = len(str(len(self.grid) - 1))
        axes = [axis for axis in self.grid.varied] or ["prompt"]
        parts = [slug(axis, cell.values[axis]) for axis in axes]
        name = "_".join([f"{cell.number:0{width}}", *parts])
        return name.encode()[:LONGEST].decode(errors="ignore") + ".png"

    def picture(self, cell: Cell) -> Path:
        return self.path / "pictures" / self.name(cell)

    # -------------------------------------------------------------------------------------------------- its records

    def record(self, rank: int, **facts: object) -> None:
        """Adds a line to a rank's own part, with the time, since later lines may lie in another rank's part."""
        facts |= {"time": time.time_ns()}
        path = self.path / "parts" / f"{rank}.jsonl"
        with path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # what a kill cut off
                    file.write(b"\n")
            file.write(json.dumps(facts).encode() + b"\n")

    def records(self) -> dict[int, dict]:
        """A line of every cell, by its number: the last that says that it was made, where its picture is there, else
        the last that says that it failed."""
        there = {path.name for path in (self.path / "pictures").iterdir()}
        is_there = [self.name(cell) in there for cell in self.grid.cells()]
        found = {}  # number -> ((is made, time), record)
        for path in sorted((self.path / "parts").glob("*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    record = json.loads(line)
                    number, order = int(record["cell"]), (record["status"] == "made", int(record["time"]))
                    before = found.get(number, (order, None))
                    if (is_there[number] or not order[0]) and order >= before[0]:
                        found[number] = order, record
                except (ValueError, KeyError, TypeError, IndexError):
                    continue
        return {number: record for number, (_, record) in found.items()}


def slug(axis: str, value: object) -> str:
    """A value in a file's name."""
    text = Path(value).stem if axis in ("layout", "weights", "unet", "vae", "noise") else written(value)
    text = re.sub(r"[^\w.+-]+", "-", text).strip("-.")[:40] or "none"
    if axis in ("prompt", "layout", "layout_prompt"):
        return text
    name = f"s-{axis.removeprefix(WORD)}" if axis.startswith(WORD) else axis
    return f"{re.sub(r'[^a-zA-Z0-9]+', '-', name)}-{text}"


# ---------------------------------------------------------------------------------------------------------- opening


def open_folder(path: str | Path, grid: Grid, digests: dict[str, str]) -> Folder:
    """Begins a sweep's folder, or takes up one of the same sweep, and keeps others out while this process lives.

    Args:
        path: of the folder; its parent must be there.
        grid: the sweep.
        digests: the sha256 of the files that it reads, by name.

    Raises ValueError or OSError for a folder that is another's, or cannot be written.
    """
    path = Path(path)
    this = json.loads(json.dumps({"format": FORMAT, "axes": list(grid.axes.items()), "sha256": digests}))
    if path.exists() and not path.is_dir():
        raise ValueError(f"output {str(path)!r} is not a folder; give a name for one")
    sign = path / "sweep.json"
    if path.is_dir() and not sign.exists() and any(not name.startswith(".") for name in os.listdir(path)):
        raise ValueError(f"output {str(path)!r} holds other files and no sweep; give a new name")
    pictures.check_writable(sign if path.exists() else path, "output")
    path.mkdir(exist_ok=True)
    folder = Folder(path, grid, (path / ".lock").open("a"))
    lock(folder.lock, f"output {str(path)!r}", "sweep")
    if sign.exists():
        check_same(sign, this)
    else:
        pictures.replace(sign, "output", lambda file: file.write(json.dumps(this, indent=1).encode()))
    for below in ("pictures", "parts", "sheets"):
        (path / below).mkdir(exist_ok=True)
    remove_halves(path)
    return folder


def lock(opened: TextIO | int, where: str, other: str) -> None:
    """Keeps others away from what is open, while it is. Raises ValueError where another, called so, is at work."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{where} is being written by another {other}; wait for it, or end it") from None


def remove_halves(path: Path) -> None:
    """Removes what a kill left half written, in a locked folder and those in it."""
    for half in [*path.glob(".magicmix-*.tmp"), *path.glob("*/.magicmix-*.tmp")]:
        half.unlink(missing_ok=True)


def check_same(sign: Path, this: dict) -> None:
    """Raises ValueError when a folder is not of this sweep."""
    where, right = f"output {str(sign.parent)!r}", "give a new name"
    try:
        before = json.loads(sign.read_text())
        axes, now = dict(before["axes"]), dict(this["axes"])
        digests = before["sha256"]
        if before["format"] != FORMAT:
            raise ValueError(f"it has format {before['format']}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} has no sweep.json that can be read ({error}); {right}") from error
    differs = [axis for axis in [*now, *axes] if axes.get(axis) != now.get(axis)]
    if differs or list(axes) != list(now):
        raise ValueError(f"{where} holds another sweep ({', '.join(differs[:1]) or 'order'} differs); {right}")
    for name, digest in this["sha256"].items():
        if digests.get(name) != digest:
            raise ValueError(f"{where} was begun with another {name!r}, which has changed since; {right}")
