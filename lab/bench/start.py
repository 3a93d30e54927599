"""Start-up time and peak memory of one mix on an SD 1.5 shaped folder: this project against diffusers.

    python -m lab.bench.start [--repeats 5] [--folder PATH]

Writes an SD 1.5 shaped checkpoint with random float32 weights (4.3 GB, into --folder, kept if that is given), then runs
both sides alternately, each in a fresh process: import, load, encode a prompt and a 128 x 128 picture, two UNet steps
with guidance, decode. Reported are the time from the process's start to the start and to the end of the first UNet
call, the peak resident memory (VmHWM, which counts mapped file pages that were touched), and the ratios of both sides'
runs in pairs: median, smallest and largest.
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

import clip
import unet
import vae
import weights
from weights.files import STEMS

ROOT = Path(__file__).resolve().parents[2]

# What both sides begin with.
WATCH = """
import json, os, re, sys, time
def started():  # seconds since this process began, from the kernel's own clock
    ticks = int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[19])
    return float(open("/proc/uptime").read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
times = {}
def watch(unet):
    forward = unet.forward
    def timed(*args, **kwargs):
        times.setdefault("first call begins", started())
        out = forward(*args, **kwargs)
        times.setdefault("first call ends", started())
        return out
    unet.forward = timed
def report():
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    print(json.dumps({**times, "whole mix": started(), "peak MB": peak / 1000}))
"""

OURS = """
import torch, weights
from magicmix import decode, magicmix
models = weights.load(sys.argv[1], free_after_use=True)  # as the command loads
watch(models.unet)
picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
*_, last = magicmix(models, "a corgi", picture, k_max=1.0, k_min=0.5, steps=2)
decode(models, last.x)
report()
"""

# The same work on diffusers' parts: what a mix written on its pipeline does, without the classes that it does not need.
THEIRS = """
import torch
from diffusers import StableDiffusionImg2ImgPipeline, DDIMScheduler
pipe = StableDiffusionImg2ImgPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32, safety_checker=None)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
watch(pipe.unet)
picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
pipe.set_progress_bar_config(disable=True)
pipe("a corgi", image=picture, strength=1.0, num_inference_steps=2)
report()
"""


def write_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """The embedded checkpoint's files with SD 1.5's configs, vocabulary and sizes, and random weights."""
    configs = {"text_encoder": clip.CLIPTextConfig(), "unet": unet.UNetConfig(), "vae": vae.VAEConfig()}
    for part, config in configs.items():
        (folder / part).mkdir(parents=True)
        network = weights.MODELS[part]
        known_by = {"model_type": "clip_text_model"} if part == "text_encoder" else {"_class_name": network.__name__}
        (folder / part / "config.json").write_text(json.dumps(dataclasses.asdict(config) | known_by))
        torch.manual_seed(0)
        state = {k: v.to(dtype).contiguous() for k, v in network(config).state_dict().items()}
        save_file(state, folder / part / f"{STEMS[part]}.safetensors", metadata={"format": "pt"})
    for name in ("scheduler/scheduler_config.json", "model_index.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((weights.TINY / name).read_bytes())
    weights.load_tokenizer(None).save_pretrained(folder / "tokenizer")


def run(side: str, folder: Path) -> dict[str, float]:
    """What one side reports, OURS or THEIRS, run in a process of its own."""
    done = subprocess.run([sys.executable, "-c", WATCH + side, str(folder)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def show(pairs: list[tuple[dict, dict]], sides: tuple[str, str]) -> None:
    """Prints both sides' medians, and the median, the smallest and the largest of the pairs' ratios."""
    print(f"{'':24}{sides[0]:>11}{sides[1]:>11}{'ratio':>8}   smallest .. largest")
    for name in pairs[0][0]:
        medians = "".join(f"{statistics.median(p[side][name] for p in pairs):11.2f}" for side in (0, 1))
        ratios = sorted(a[name] / b[name] for a, b in pairs)
        print(f"{name:24}{medians}{statistics.median(ratios):8.2f}   {ratios[0]:.2f} .. {ratios[-1]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "sd15"
        if not folder.exists():
            write_checkpoint(folder)
        run(OURS, folder), run(THEIRS, folder)  # both once, uncounted: the files are in the page cache afterwards
        pairs = [(run(OURS, folder), run(THEIRS, folder)) for _ in range(args.repeats)]
    show(pairs, ("ours", "diffusers"))


if __name__ == "__main__":
    main()
