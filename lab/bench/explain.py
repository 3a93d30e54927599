"""What the trace of a mix costs: the same mix with it and without it.

    python -m lab.bench.explain [--repeats 7] [--steps 50] [--folder PATH]

Both sides run alternately, each in a fresh process, on the embedded checkpoint or the one in --folder: castle.png mixed
with "a strawberry". Reported are the time of the steps alone, the time from the process's start to the end (loading,
and with the trace writing it), the peak resident memory, and the ratios of both sides' runs in pairs: median, smallest
and largest.
"""

import argparse
from pathlib import Path

import weights
from lab.bench.start import run, show

# What both sides begin with; `steps` is the generator.
MIX = """
import tempfile, torch, weights
from pathlib import Path
from command import options
from command.pictures import fit, open_layout
from magicmix import Noise, magicmix
models = weights.load(sys.argv[1], free_after_use=True)
layout = fit(open_layout("docs/layouts/castle.png").picture, models.size)
o = options.of_mix(models.defaults, {"steps": STEPS})
eps = Noise([0], models.latent_size(models.size), models.device)()
steps = magicmix(models, "a strawberry", layout, noise=lambda: eps, steps=STEPS)
def timed(steps):
    begin = time.perf_counter()
    *_, last = steps
    times["the steps"] = time.perf_counter() - begin
"""
WITHOUT = "timed(steps)\nreport()\n"
WITH = """
from lab.explain.trace import Recorder
recorder = Recorder(models, "a strawberry", layout, o, eps)
timed(recorder.follow(steps))
with tempfile.TemporaryDirectory() as folder:
    recorder.trace().write(Path(folder) / "mix.safetensors")
report()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=weights.TINY)
    args = parser.parse_args()
    sides = [f"STEPS = {args.steps}\n{MIX}{side}" for side in (WITH, WITHOUT)]
    for side in sides:
        run(side, args.folder)  # once, uncounted: the files are in the page cache afterwards
    show([tuple(run(side, args.folder) for side in sides) for _ in range(args.repeats)], ("with", "without"))


if __name__ == "__main__":
    main()
