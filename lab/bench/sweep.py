"""What a sweep saves: the UNet calls of three grids, and the time of one of them, shared and each picture for itself.

    OMP_NUM_THREADS=1 python -m lab.bench.sweep [--repeats 1]

The calls are the plan's, as `--plan` of the command tells them. The time is that of the third grid with the embedded
checkpoint, from the prompts to the decoded pictures, without loading and writing: `lab.sweep` against `magicmix()` once
per set of options with the same seeds in one batch. Both are measured alternately in one process, and their pictures
compared.
"""

import argparse
import time
import warnings

import numpy as np

import weights
from command.pictures import open_layout
from lab.sheets import layout_path
from lab.sweep import grid, plan
from lab.sweep.run import Batch, Walk
from magicmix import decode, magicmix

CASTLE = str(layout_path("castle"))
GRIDS = {
    "9 nu x 9 k_min on a picture, 8 seeds": {
        "prompt": ["a tiger"], "layout": [CASTLE], "nu": [n / 10 for n in range(1, 10)],
        "k_min": [n / 20 for n in range(9)], "seed": range(8)},
    "10 prompts x 4 k_min on a layout prompt, 8 seeds": {
        "prompt": [f"a {word}" for word in "tiger panda frog bee crab owl fox cactus donut pizza".split()],
        "layout_prompt": ["a car"], "k_min": [0.0, 0.1, 0.2, 0.3], "seed": range(8)},
    "3 nu x 5 k_min on a picture, 4 seeds": {
        "prompt": ["a tiger"], "layout": [CASTLE], "nu": [0.5, 0.7, 0.9],
        "k_min": [0.0, 0.1, 0.2, 0.3, 0.4], "seed": range(4)},
}  # fmt: skip
SEEDS = range(4)  # of the last


def shared(models, lanes: list[plan.Lane]) -> dict[int, np.ndarray]:
    """cell -> its picture, by a sweep."""
    made = {}
    for end in Walk(models, Batch(len(SEEDS), merges=False)).run(lanes):
        pictures = decode(models, end.x)
        made |= {cell.number: np.asarray(picture) for cell, picture in zip(end.lane.cells, pictures)}
    return made


def alone(models, lanes: list[plan.Lane]) -> dict[int, np.ndarray]:
    """The same by magicmix(), for each set of options anew."""
    made, picture = {}, open_layout(CASTLE).picture
    for lane in lanes:
        given = {"nu": lane.o.nu, "k_min": lane.o.k_min}
        *_, last = magicmix(models, lane.prompt, picture, seeds=SEEDS, **given)
        made |= {cell.number: np.asarray(p) for cell, p in zip(lane.cells, decode(models, last.x))}
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    models, lanes = weights.load(), []
    for name, given in GRIDS.items():
        lanes, _ = plan.lanes(grid.of(given).cells(), models.defaults, 8)
        calls, by_themselves = plan.calls(lanes), plan.calls_alone(lanes)
        print(f"{name}: {calls:,} UNet calls instead of {by_themselves:,}, {by_themselves / calls:.2f} times fewer")
    for _ in range(args.repeats):
        found = {}
        for make in (shared, alone):
            begin = time.process_time(), time.perf_counter()
            pictures = make(models, lanes)
            took = time.process_time() - begin[0], time.perf_counter() - begin[1]
            found[make.__name__] = took, pictures
            print(f"{make.__name__}: {took[0]:.1f} s of processor time, {took[1]:.1f} s", flush=True)
        ((a, x), (b, y)) = found["shared"], found["alone"]
        same = all(np.array_equal(x[number], y[number]) for number in y)
        print(f"ratio {b[0] / a[0]:.2f} (processor time), the pictures are {'equal' if same else 'NOT equal'}")


if __name__ == "__main__":
    main()
