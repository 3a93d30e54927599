"""Peak memory and time of decoding one large picture: in strips, plainly, and by diffusers.

    python -m lab.bench.decoding [--sizes 512 1024] [--repeats 1] [--dtype float32] [--folder PATH]

Writes an SD 1.5 shaped autoencoder with random weights (335 MB in float32, into --folder, kept if that is given).
Each run is a process of its own, and the sides take turns: load, decode the latent of one picture. "Strips" is
weights/strips.py, which is used above 768 x 768 pixels and here at every size; "plain" is vae.py's own decoder. The
medians of the process's peak memory (VmHWM, mapped file pages included) and of the processor's seconds of decoding (all
threads together), and their ratios to diffusers', are written into docs/measured.md (--page).
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import vae
from lab.bench import page
from lab.bench.start import ROOT
from weights.files import STEMS

OURS = """
import weights
from weights import files, strips
source = files.open_part("vae", Path(FOLDER), half=False, ema=True)
network = weights.build("vae", source.configs["vae"])
weights.fill(network, source.tensors["vae"], FOLDER, DTYPE, torch.device("cpu"))
strips.LARGE = LARGE
decode = network.decode
"""

THEIRS = """
import diffusers
network = diffusers.AutoencoderKL.from_pretrained(FOLDER, torch_dtype=DTYPE)
decode = lambda x: network.decode((x / network.config.scaling_factor).to(DTYPE)).sample.float()
"""

# FOLDER, SIZE in pixels of a side, DTYPE.
BEGIN = """
import json, re, sys, time
from pathlib import Path
import torch
FOLDER, SIZE, DTYPE = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])
"""

END = """
x = torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(0))
began = time.process_time()
with torch.no_grad():
    y = decode(x)
seconds = time.process_time() - began
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(json.dumps([peak / 1e6, seconds, y.abs().mean().item()]))
"""

SIDES = {"strips": "LARGE = 0" + OURS, "plain": "LARGE = 1 << 60" + OURS, "diffusers": THEIRS}


def write_vae(folder: Path, config: vae.VAEConfig, dtype: torch.dtype) -> None:
    """A folder with config.json and random weights, as diffusers reads it."""
    folder.mkdir(parents=True)
    known_by = {"_class_name": "AutoencoderKL"}
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config) | known_by))
    torch.manual_seed(0)
    state = {k: v.to(dtype).contiguous() for k, v in vae.AutoencoderKL(config).state_dict().items()}
    save_file(state, folder / f"{STEMS['vae']}.safetensors", metadata={"format": "pt"})


def run(side: str, folder: Path, size: int, dtype: str) -> tuple[float, float, float]:
    """(peak memory in GB, seconds, mean absolute value of the picture)"""
    command = [sys.executable, "-c", BEGIN + SIDES[side] + END, str(folder), str(size), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def row(size: int, medians: dict[str, list[float]]) -> str:
    """The medians of each side as a line of the table, with the ratios of the first two to diffusers'."""
    cells, theirs = [f"{size} x {size}"], medians["diffusers"]
    for quantity, unit in enumerate(("GB", "s")):
        for side in ("strips", "plain"):
            value = medians[side][quantity]
            cells.append(f"{value:.2f} {unit} ({value / theirs[quantity]:.2f})")
        cells.append(f"{theirs[quantity]:.2f} {unit}")
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--page", type=Path, default=page.PAGE)
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "vae"
        if not folder.exists():
            write_vae(folder, vae.VAEConfig(), getattr(torch, args.dtype))
        for size in args.sizes:
            rounds = [{side: run(side, folder, size, args.dtype) for side in SIDES} for _ in range(args.repeats)]
            for means in ([r[side][2] for side in SIDES] for r in rounds):
                assert max(means) - min(means) <= 1e-2 * max(means), f"the sides disagree: {means}"
            medians = {side: [statistics.median(c) for c in zip(*(r[side] for r in rounds))] for side in SIDES}
            rows.append(row(size, medians))
            print(rows[-1], flush=True)
    runs = f"medians of {args.repeats} runs" if args.repeats > 1 else "one run of each"
    measured_on = f"{page.machine(torch.device('cpu'))}; {args.dtype}; {runs}; processor time of all threads"
    head = f"{measured_on}. In brackets is the ratio to diffusers."
    table = ["| size | memory: strips | plain | diffusers | time: strips | plain | diffusers |", f"|{'---|' * 7}"]
    page.write(args.page, "decoding", "\n".join([head, "", *table, *rows]))


if __name__ == "__main__":
    main()
