"""How time and peak memory grow with the size of a picture and with the number of pictures, here and in diffusers.

    python -m lab.bench.growth [--dtype bfloat16] [--sizes 256 384 512 768 1024] [--counts 1 2 4 8 16] [--folder PATH]

Each point is a process of its own, on an SD 1.5 shaped checkpoint with random weights, written in the dtype that is
computed in (into --folder, kept if that is given): load, text to image in one step with guidance, decode. The time is
the processor's for step and decoding, of all threads together; the memory is the process's peak (VmHWM, mapped file
pages included). The pictures of a point are one batch on both sides. --sizes are pixels of a side, for one picture;
--counts are numbers of pictures of --count-size pixels.

Writes a plot, docs/growth.svg (--plot), and its numbers into docs/measured.md (--page). Every point is measured once.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import torch

from lab.bench import page
from lab.bench.start import ROOT, write_checkpoint

# What both sides begin with: FOLDER, DTYPE, SIZE in pixels of a side and COUNT of pictures.
BEGIN = """
import json, re, sys, time, warnings
import torch
warnings.simplefilter("ignore")  # of sizes and of one step
FOLDER, DTYPE, SIZE, COUNT = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
"""

OURS = """
import weights
from magicmix import decode, text_to_image
models = weights.load(FOLDER, dtype=DTYPE, vae_dtype=DTYPE, free_after_use=True)  # as the command loads
began = time.process_time()
*_, last = text_to_image(models, "a corgi", seeds=range(COUNT), size=(SIZE, SIZE), steps=1, guidance=7.5)
pictures = decode(models, last.x)
"""

THEIRS = """
from diffusers import DDIMScheduler, StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=DTYPE, safety_checker=None)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
began = time.process_time()
pictures = pipe("a corgi", num_inference_steps=1, guidance_scale=7.5, num_images_per_prompt=COUNT, height=SIZE,
                width=SIZE).images
"""

END = """
seconds = time.process_time() - began
assert [picture.size for picture in pictures] == [(SIZE, SIZE)] * COUNT
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(json.dumps([seconds, peak / 1e6]))
"""

SIDES = {"here": OURS, "diffusers": THEIRS}
QUANTITIES = ("processor seconds", "peak memory, GB")


def point(side: str, folder: Path, dtype: str, size: int, count: int) -> tuple[float, float]:
    """(seconds, peak memory in GB)"""
    arguments = [str(folder), dtype, str(size), str(count)]
    command = [sys.executable, "-c", BEGIN + SIDES[side] + END, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def measure(folder: Path, dtype: str, cases: list[tuple[int, int]]) -> dict[tuple[int, int], dict[str, tuple]]:
    """(size, count) -> side -> (seconds, peak memory in GB)"""
    points = {}
    for size, count in cases:
        points[size, count] = {side: point(side, folder, dtype, size, count) for side in SIDES}
        print(row(size, count, points[size, count]), flush=True)
    return points


def row(size: int, count: int, values: dict[str, tuple[float, float]]) -> str:
    cells = [f"{size} x {size}", str(count)]
    for here, there, unit in zip(*values.values(), ("s", "GB")):
        cells += [f"{here:.1f} {unit}", f"{there:.1f} {unit}", f"{here / there:.2f}"]
    return f"| {' | '.join(cells)} |"


def plot(path: Path, points: dict, sizes: list[int], counts: list[int], count_size: int) -> None:
    """Four panels: time and memory over size and over count."""
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "growth"  # the same numbers give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.5), sharey="row", layout="constrained")
    columns = (
        ("pixels of a side, one picture", sizes, [(size, 1) for size in sizes]),
        (f"pictures of {count_size} x {count_size}", counts, [(count_size, count) for count in counts]),
    )
    for column, (label, xs, keys) in enumerate(columns):
        for panel, quantity in enumerate(QUANTITIES):
            axis = axes[panel, column]
            for side, style in zip(SIDES, ("o-", "s--")):
                axis.plot(xs, [points[key][side][panel] for key in keys], style, label=side)
            axis.set(xlabel=label, ylabel=quantity if column == 0 else None, xticks=xs, ylim=(0, None))
            axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16" if page.bfloat16_units() else "float32")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 384, 512, 768, 1024])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--count-size", type=int, default=256)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--plot", type=Path, default=page.PAGE.with_name("growth.svg"))
    parser.add_argument("--page", type=Path, default=page.PAGE)
    args = parser.parse_args(argv)
    cases = dict.fromkeys([*((size, 1) for size in args.sizes), *((args.count_size, n) for n in args.counts)])
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "sd15"
        if not folder.exists():
            write_checkpoint(folder, getattr(torch, args.dtype))
        for side in SIDES:  # once uncounted: the files are in the page cache afterwards
            point(side, folder, args.dtype, args.sizes[0], 1)
        points = measure(folder, args.dtype, list(cases))
    plot(args.plot, points, args.sizes, args.counts, args.count_size)
    measured_on = f"{page.machine(torch.device('cpu'))}; {args.dtype}; processor time of all threads"
    head = f"{measured_on}. Every point once, in a process of its own."
    table = [
        "| size | pictures | here | diffusers | ratio | here | diffusers | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [row(*case, values) for case, values in points.items()]
    picture = f"![Time and peak memory over size and count]({args.plot.name})"
    page.write(args.page, "growth", "\n".join([head, "", *table, *rows, "", picture]))


if __name__ == "__main__":
    main()
