"""How far half-precision mixes are from float32 ones, on the embedded checkpoint.

python -m lab.bench.precision            on the CPU; six minutes on one core
python -m lab.bench.precision cuda       on another device
"""

import math
import sys

import numpy as np
import torch

import weights
from command.pictures import fit, open_layout
from lab.sheets import layout_path
from magicmix import decode, magicmix

CASES = [("trophy", "a tiger"), ("vase", "a penguin"), ("mug", "a panda"), ("castle", "a strawberry")]


def pictures(dtype: torch.dtype, device: str) -> np.ndarray:
    """The cases with the checkpoint's own options, seed 0: (cases, H, W, 3) grey levels."""
    models = weights.load(device=device, dtype=dtype)
    out = []
    for name, prompt in CASES:
        layout = fit(open_layout(layout_path(name)).picture, models.size).to(device)
        *_, last = magicmix(models, prompt, layout)
        out.append(np.asarray(decode(models, last.x)[0], dtype=np.float64))
    return np.stack(out)


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    exact = pictures(torch.float32, device)
    for dtype in (torch.float16, torch.bfloat16):
        error = ((pictures(dtype, device) - exact) ** 2).mean(axis=(1, 2, 3))
        psnr = [10 * math.log10(255**2 / e) if e else math.inf for e in error]
        print(f"{str(dtype):15} PSNR against float32: {', '.join(f'{p:.1f}' for p in psnr)} dB")


if __name__ == "__main__":
    main()
