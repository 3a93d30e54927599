"""The benchmarks run, both sides give the same results, and the tables go where they belong. No time is tested."""

import re

import pytest
import torch
from conftest import relative_error

from lab.bench import page, speed

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
    assert text.startswith("# Above\n\n<!-- speed: embedded, cpu -->\nCPU (") and "old" not in text
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
