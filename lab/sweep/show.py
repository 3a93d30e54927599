"""What is made of a sweep's pictures when they are there: index.jsonl, contact sheets, and the page."""

import itertools
import json
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from command import pictures, sheet
from lab.sweep.folder import Folder
from lab.sweep.grid import WORD, Cell, written

WIDEST, LARGEST = 16_000, 64_000_000  # pixels of a sheet's side, and of all of it, about
SMALLEST = 24  # pixels of a picture on it


def entries(folder: Folder, records: dict[int, dict]) -> list[dict]:
    """A line of the index for every cell: what it is, and what has become of it."""
    found = []
    for cell in folder.grid.cells():
        record = records.get(cell.number, {"status": "missing"})
        name = folder.name(cell)
        entry = {"cell": cell.number, "status": record["status"], "options": cell.given, "command": cell.command(name)}
        if record["status"] == "made":
            entry |= {"picture": f"pictures/{name}"}
            entry |= {key: record[key] for key in ("parameters", "batch", "checkpoint")}
        elif record["status"] == "failed":
            entry |= {"reason": record["reason"]}
        found.append(entry)
    return found


def write_index(folder: Folder, lines: list[dict]) -> None:
    """Writes index.jsonl. Raises OSError."""
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    pictures.replace(folder.path / "index.jsonl", "output", lambda file: file.write(content))


def said(axis: str, value: object) -> str:
    """A value on a label: "nu 0.5", "k-min 0.1", "a tiger"."""
    if axis in ("prompt", "layout_prompt"):
        return str(value)
    if axis == "layout":
        return Path(value).stem
    name = f"s of {axis.removeprefix(WORD)}" if axis.startswith(WORD) else axis.replace("_", "-")
    return f"{name} {written(value)}"


# ----------------------------------------------------------------------------------------------------------- sheets


def write_sheets(folder: Folder, lines: list[dict]) -> list[str]:
    """Writes a contact sheet per pair of axes, or of the one axis that varies, all others at their first value; the
    outer axis of a pair goes down. Returns what is to be said of sheets that would be too large. Raises OSError."""
    varied, told = folder.grid.varied, []
    pairs = list(itertools.combinations(varied, 2)) or [tuple(varied)][: len(varied)]
    names = sheet_names(pairs)
    for pair in pairs:
        counts = [len(varied[axis]) for axis in pair]
        rows, columns = counts if len(pair) == 2 else [math.ceil(math.sqrt(counts[0]))] * 2
        if max(rows, columns) > WIDEST // SMALLEST:
            told.append(f"sheet of {' and '.join(pair)}: {rows:,} x {columns:,} pictures are too many; left out")
            continue
        cells = [cell for cell in folder.grid.cells() if is_first(folder, cell, pair)]
        side = min(sheet.CELL, WIDEST // max(rows, columns), math.isqrt(LARGEST // (rows * columns)))
        tiles = [tile(folder, lines[cell.number], side) for cell in cells]
        labels = [", ".join(said(axis, cell.values[axis]) for axis in pair) for cell in cells]
        made = sheet.contact_sheet(same_size(tiles), labels, columns)
        pictures.save(made, folder.path / "sheets" / f"{names[pair]}.png", None)
    return told


def sheet_names(pairs: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Pairs of axes -> names of files, each another one: words that have token weights may hold anything."""
    names: dict[tuple[str, ...], str] = {}
    for pair in pairs:
        name = "-".join(re.sub(r"[^\w.+]+", "-", axis.replace("_", "-")).strip("-.")[:40] for axis in pair)
        names[pair] = name if name not in names.values() else f"{name}-{len(names)}"
    return names


def is_first(folder: Folder, cell: Cell, but: tuple[str, ...]) -> bool:
    """Whether a cell has the first value of every axis but some."""
    return all(axis in but or cell.values[axis] == values[0] for axis, values in folder.grid.varied.items())


def tile(folder: Folder, line: dict, side: int) -> Image.Image:
    """A cell on a sheet: its picture, or why there is none."""
    if line["status"] == "made":
        with Image.open(folder.path / line["picture"]) as picture:
            small = picture.convert("RGB")
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        return small
    empty = Image.new("RGB", (side, side), "#f3e3df")
    text = "\n".join(textwrap.wrap(f"{line['status']}: {line.get('reason', 'not made yet')}", max(8, side // 7)))
    draw = ImageDraw.Draw(empty)
    draw.rectangle((0, 0, side - 1, side - 1), outline="#8f2a22", width=2)
    draw.multiline_text((6, 6), text, "#8f2a22", ImageFont.load_default(11))
    return empty


def same_size(tiles: list[Image.Image]) -> list[Image.Image]:
    """Pictures of several sizes, each in the middle of a white one of the largest width and height."""
    size = tuple(max(picture.size[i] for picture in tiles) for i in (0, 1))
    placed = []
    for picture in tiles:
        canvas = Image.new("RGB", size, "white")
        canvas.paste(picture, tuple((size[i] - picture.size[i]) // 2 for i in (0, 1)))
        placed.append(canvas)
    return placed
