"""Writes what a command measured into a page, docs/measured.md for the benchmarks, between two comments of its own."""

import re
import textwrap
from pathlib import Path

import torch

from command import pictures

PAGE = Path(__file__).resolve().parents[2] / "docs" / "measured.md"


def write(page: Path, key: str, text: str) -> None:
    """Replaces what stands between <!-- KEY --> and <!-- end of KEY -->, or appends it; all else stays as it is.
    Lines of prose are wrapped as the pages' other lines are. Raises OSError."""
    begin, end = f"<!-- {key} -->", f"<!-- end of {key} -->"
    lines = [line if line.startswith(("|", "!")) else textwrap.fill(line, 120) for line in text.strip().splitlines()]
    block, old = "\n".join([begin, *lines, end]), page.read_text(encoding="utf-8")
    found = re.search(f"{re.escape(begin)}.*?{re.escape(end)}", old, re.DOTALL)
    new = old[: found.start()] + block + old[found.end() :] if found else f"{old.rstrip()}\n\n{block}\n"
    pictures.replace(page, "page", lambda file: file.write(new.encode()))


def bfloat16_units() -> list[str]:
    """What this CPU has to compute in bfloat16 itself; without, it is emulated."""
    units = {"AMX": torch.cpu._is_amx_tile_supported(), "AVX512-BF16": torch.cpu._is_avx512_bf16_supported()}
    return [name for name, is_there in units.items() if is_there]


def machine(device: torch.device) -> str:
    """What was measured on, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    units = ", ".join([torch.backends.cpu.get_cpu_capability(), *bfloat16_units()])
    threads = torch.get_num_threads()
    return f"CPU with {units}; {threads} thread{'s' * (threads > 1)}; torch {torch.__version__}"
