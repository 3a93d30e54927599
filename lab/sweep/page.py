"""The page of a sweep: one HTML file that needs nothing else, with all pictures of the grid in it."""

import base64
import io
from pathlib import Path

import jinja2
from PIL import Image

from command import pictures
from lab.explain.page import TEMPLATES as EXPLAIN
from lab.explain.page import digest
from lab.sweep.folder import Folder
from lab.sweep.grid import written
from lab.sweep.show import said

TEMPLATES = Path(__file__).parent / "template"
SCRIPTS = (EXPLAIN / "dom.js", TEMPLATES / "sweep.js")
STYLES = (EXPLAIN / "base.css", TEMPLATES / "sweep.css")
# A picture takes some 0.35 bytes per pixel as JPEG. Sides are chosen so that a page stays below about 64 MB.
SIDES = (288, 192, 128, 96, 64, 48, 32)
ROOM, PER_PIXEL = 64e6, 0.5


def write(folder: Folder, lines: list[dict]) -> None:
    """Writes page.html. Raises OSError."""
    html = build(folder, lines).encode()
    pictures.replace(folder.path / "page.html", "output", lambda file: file.write(html))


def build(folder: Folder, lines: list[dict]) -> str:
    """The page as text.

    Args:
        folder: with the pictures.
        lines: of the index.
    """
    grid = folder.grid
    made = sum(line["status"] == "made" for line in lines)
    side = side_of(made)
    cells, places = [], {axis: {value: i for i, value in enumerate(values)} for axis, values in grid.axes.items()}
    for cell, line in zip(grid.cells(), lines):
        shown = {
            "at": [places[axis][cell.values[axis]] for axis in places],
            "command": line["command"],
            "status": line["status"],
        }
        if line["status"] == "made":
            batch = ", ".join(f"{calls} of {size}" for calls, size in line["batch"])
            shown |= {"file": line["picture"], "picture": encoded(folder.path / line["picture"], side), "batch": batch}
        else:
            shown["reason"] = line.get("reason", "not made yet")
        cells.append(shown)
    axes = [
        {
            "name": axis,
            "values": [written(value) for value in values],
            "labels": [said(axis, value) for value in values],
        }
        for axis, values in grid.axes.items()
    ]
    content = {"axes": axes, "cells": cells, "shape": grid.shape(), "side": side}
    loader = jinja2.FileSystemLoader(TEMPLATES)
    templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    style = "\n".join(path.read_text() for path in STYLES)
    script = "\n".join(path.read_text() for path in SCRIPTS)
    policy = f"default-src 'none'; img-src data:; style-src {digest(style)}; script-src {digest(script)}"
    return templates.get_template("sweep.html").render(
        data=content, style=style, script=script, policy=policy, shape=grid.shape()
    )


def side_of(count: int) -> int:
    """Pixels of a picture's longer side on a page of so many."""
    fitting = [side for side in SIDES if count * PER_PIXEL * side**2 <= ROOM]
    return fitting[0] if fitting else SIDES[-1]


def encoded(path: Path, side: int) -> str:
    """A picture as JPEG in base64, no side longer than `side`."""
    file = io.BytesIO()
    with Image.open(path) as picture:
        small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)  # makes no picture larger
    small.save(file, "JPEG", quality=90, subsampling=0)
    return base64.b64encode(file.getvalue()).decode()
