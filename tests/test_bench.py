"""The benchmarks run, both sides give the same results, and the tables go where they belong. No time is tested."""

import re

import pytest
import torch
from conftest import TINY, relative_error

from lab.bench import decoding, growth, page, speed

SMALL = "--shape embedded --device cpu --pairs 2 --steps 4 --step 64 40 --decode 32 --mix 32".split()
WORKS = ["UNet step, batch 2, 64 px", "UNet step, batch 2, 40 px", "decoding, 32 px", "text, 2 prompts",
         "whole mix, 4 steps, 32 px"]  # fmt: skip
# Both sides' largest difference over the largest value. In bfloat16 a value has 8 bits, and 4 steps add up.
BOUNDS = {"float32": 1e-5, "bfloat16": 0.1}


def test_speed(tmp_path):
    path = tmp_path / "measured.md"
    path.write_text("# Above\n\n<!-- speed: embedded, cpu -->\nold\n<!-- end of speed: embedded, cpu -->\n\nbelow\n")
    speed.main([*SMALL, "--dtypes", *BOUNDS, "--variants", "eager", "channels-last", "--page", str(path)])
    text = path.read_text()
    assert text.startswith("# Above\n\n<!-- speed: embedded, cpu -->\nCPU") and "old" not in text
    assert text.endswith("<!-- end of speed: embedded, cpu -->\n\nbelow\n")
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    against = [row for row in cells if len(row) == 7][1:]
    assert [row[:3] for row in against] == [
        [dtype, variant, work] for dtype in BOUNDS for variant in ("eager", "channels-last") for work in WORKS
    ]
    for dtype, _, work, here, there, ratio, difference in against:
        assert float(difference) <= BOUNDS[dtype], (dtype, work)
        assert all(re.fullmatch(r"\d+\.\d+ m?s", time) for time in (here, there))
        median, smallest, largest = map(float, re.fullmatch(r"(.+) \((.+) \.\. (.+)\)", ratio).groups())
        assert 0 <= smallest <= median <= largest
    own = [row for row in cells if len(row) == 6][1:]
    assert [row[:3] for row in own] == [
        [dtype, *names] for dtype in BOUNDS
        for names in (("token weights", "none"), ("guidance 1, one half", "two halves"))
    ]  # fmt: skip


@pytest.mark.parametrize("change", ["guidance", "k_min", "nu"])
def test_a_side_that_does_other_work_shows(change, monkeypatch):
    """The difference is one of the whole mix: it tells what only diffusers' side was given."""
    source = speed.source("embedded")
    ours, theirs = (side(source, torch.float32, torch.device("cpu"), "eager") for side in (speed.Ours, speed.Theirs))
    g = torch.Generator().manual_seed(0)
    inputs = torch.rand(1, 3, 32, 32, generator=g), torch.randn(1, 4, 4, 4, generator=g), 6
    with torch.no_grad():
        here = ours.mix(*inputs)
        assert relative_error(here, theirs.mix(*inputs)) <= 1e-5
        monkeypatch.setitem(speed.MIX, change, speed.MIX[change] / 2)
        assert relative_error(here, theirs.mix(*inputs)) > 1e-3


def test_a_page_gets_a_new_section_at_its_end(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# One\n")
    page.write(path, "a", "first")
    page.write(path, "b", "second\n")
    page.write(path, "a", r"third \1")
    assert (
        path.read_text()
        == "# One\n\n<!-- a -->\nthird \\1\n<!-- end of a -->\n\n<!-- b -->\nsecond\n<!-- end of b -->\n"
    )


def test_growth(tmp_path, monkeypatch):
    """The cases, each once; where the numbers go; the same plot for the same numbers."""
    asked = []
    monkeypatch.setattr(growth, "point", lambda *case: asked.append(case) or (len(asked), 1.5))
    path, plots = tmp_path / "measured.md", [tmp_path / "a.svg", tmp_path / "b.svg"]
    for plot in plots:
        asked.clear()
        path.write_text("# Above\n")
        growth.main(f"--dtype float32 --sizes 32 48 --counts 1 2 --count-size 32 --folder {TINY} --plot {plot} "
                    f"--page {path}".split())  # fmt: skip
    cases = [(32, 1), (48, 1), (32, 2)]
    sides = ["here", "diffusers"]
    warm = [(side, TINY, "float32", 32, 1) for side in sides]
    assert asked == warm + [(side, TINY, "float32", *case) for case in cases for side in sides]
    rows = re.findall(r"^\| \d.*", path.read_text(), re.MULTILINE)
    times = [(3, 4), (5, 6), (7, 8)]
    for row, (size, count), (here, there) in zip(rows, cases, times, strict=True):
        assert row == (f"| {size} x {size} | {count} | {here}.0 s | {there}.0 s | {here / there:.2f} "
                       "| 1.5 GB | 1.5 GB | 1.00 |")  # fmt: skip
    assert "(b.svg)" in path.read_text()
    assert plots[0].read_bytes() == plots[1].read_bytes() and b"<svg" in plots[0].read_bytes()


@pytest.mark.parametrize("side", growth.SIDES)
def test_growth_of_each_side(side):
    """Two pictures in a process of its own, which checks their sizes."""
    time, memory = growth.point(side, TINY, "float32", 40, 2)
    assert time > 0 and 0.1 < memory < 4


def test_decoding(tmp_path):
    """The sides agree, as the command itself asserts, and the table is where it belongs."""
    path = tmp_path / "measured.md"
    path.write_text("# Above\n")
    decoding.main(f"--sizes 40 --folder {TINY / 'vae'} --page {path}".split())
    *_, row, end = path.read_text().splitlines()
    assert row.startswith("| 40 x 40 | ") and end == "<!-- end of decoding -->"
    assert re.fullmatch(r"\| 40 x 40( \| \d\.\d\d GB( \(\d\.\d\d\))?){3}( \| \d+\.\d\d s( \(\d+\.\d\d\))?){3} \|", row)
