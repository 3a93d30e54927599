"""What the training stages share: the optimiser loop with checkpoints, averaged weights, logs and picture sheets."""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from command.pictures import to_images
from command.sheet import contact_sheet

RUNS = Path(__file__).parent / "runs"


def arguments(description: str, steps: int, batch: int) -> argparse.Namespace:
    """The options every training stage has; the defaults fit 150 minutes on two cores."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps in all [%(default)s]")
    parser.add_argument("--batch", type=int, default=batch, help="pictures per step [%(default)s]")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate [%(default)s]")
    parser.add_argument(
        "--variants", type=int, default=24, help="cached renderings per picture (UNet, judge) [%(default)s]"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile: pays off on a GPU only")
    parser.add_argument("--stop-at", type=int, help="stop after this step, to be resumed later by the same command")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    return args


def autocast(device: torch.device):
    """bfloat16 where it is safe; on two cores with AVX-512 it doubles the speed, gradients agree to 0.04 %."""
    return torch.autocast(device.type, dtype=torch.bfloat16)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class Trainer:
    """AdamW with warm-up and cosine decay, gradient clipping, an exponential average of the weights (what is used
    afterwards), a checkpoint every five minutes that the same command resumes from, and a log of one JSON line per
    hundred steps. Everything lies in lab/training/runs/NAME.

    Args:
        name: of the stage.
        model: what is trained; stays the raw weights, the average is in `self.average`.
        args: from `arguments`.
        decay: of the average, per step.
    """

    def __init__(self, name: str, model: nn.Module, args: argparse.Namespace, decay: float):
        self.folder, self.model, self.args, self.decay = RUNS / name, model, args, decay
        self.folder.mkdir(parents=True, exist_ok=True)
        self.names = [n for n, _ in model.named_parameters()]
        self.weights = list(model.parameters())
        self.average = [p.detach().clone() for p in self.weights]
        fused = args.device.type == "cuda"
        self.optimiser = torch.optim.AdamW(
            self.weights, lr=args.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=fused
        )
        self.step, self.seconds = 0, 0.0
        if (self.folder / "checkpoint.safetensors").exists():
            self._resume()

    def _resume(self) -> None:
        state = load_file(self.folder / "checkpoint.safetensors", device=str(self.args.device))
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        with torch.no_grad():
            for name, p, average in zip(self.names, self.weights, self.average, strict=True):
                p.copy_(state[f"weight.{name}"])
                average.copy_(state[f"average.{name}"])
                self.optimiser.state[p] = {
                    "step": torch.tensor(float(self.step), device=self.args.device),
                    "exp_avg": state[f"first.{name}"],
                    "exp_avg_sq": state[f"second.{name}"],
                }
        print(f"resumed at step {self.step}")

    def save(self) -> None:
        """Writes the checkpoint beside the old one, then replaces it, so that an interruption loses nothing."""
        state = {"step": torch.tensor(self.step), "seconds": torch.tensor(self.seconds, dtype=torch.float64)}
        for name, p, average in zip(self.names, self.weights, self.average, strict=True):
            moments = self.optimiser.state[p]
            state |= {f"weight.{name}": p.detach(), f"average.{name}": average}
            state |= {f"first.{name}": moments["exp_avg"], f"second.{name}": moments["exp_avg_sq"]}
        temporary = self.folder / "checkpoint.tmp"
        save_file({k: v.contiguous() for k, v in state.items()}, temporary)
        temporary.replace(self.folder / "checkpoint.safetensors")

    def averaged(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name, contiguous float32 on the CPU."""
        return {n: a.float().cpu().contiguous() for n, a in zip(self.names, self.average, strict=True)}

    def run(self, loss_of_step, measure=None) -> None:
        """Trains to args.steps (or args.stop_at).

        Args:
            loss_of_step: () -> (loss, {name: number to log}).
            measure: () -> {name: number}, called every 1000 steps, without gradients.
        """
        last = min(self.args.steps, self.args.stop_at or self.args.steps)
        saved = started = time.monotonic()
        before, warmup = self.seconds, min(500, self.args.steps // 20 + 1)
        bar = tqdm(range(self.step, last), initial=self.step, total=self.args.steps, mininterval=5)
        bar.set_description(self.folder.name)
        for self.step in bar:
            progress = self.step / self.args.steps
            cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
            for group in self.optimiser.param_groups:
                group["lr"] = self.args.rate * min((self.step + 1) / warmup, cosine)
            loss, numbers = loss_of_step()
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimiser.step()
            decay = min(self.decay, (self.step + 1) / (self.step + 10))  # a young average forgets the random start
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.weights, 1 - decay)
            self.step += 1
            self.seconds = before + time.monotonic() - started
            if self.step % 100 == 0 or self.step == last:
                numbers = {"loss": loss, **numbers}
                if measure is not None and (self.step % 1000 == 0 or self.step == last):
                    with torch.no_grad():
                        numbers |= measure()
                numbers = {k: round(float(torch.as_tensor(v).detach()), 5) for k, v in numbers.items()}
                with open(self.folder / "log.jsonl", "a") as log:
                    log.write(json.dumps({"step": self.step, "seconds": round(self.seconds), **numbers}) + "\n")
                bar.set_postfix(numbers)
            if time.monotonic() - saved > 300:
                self.save()
                saved = time.monotonic()
        if self.step:
            self.save()


def load_average(name: str, model: nn.Module) -> nn.Module:
    """Puts the averaged weights of a stage into `model` (strictly) and returns it in eval mode without gradients."""
    state = load_file(RUNS / name / "average.safetensors")
    model.load_state_dict(state, strict=True)
    return model.eval().requires_grad_(False)


def sheet(pictures: Tensor, columns: int, path: Path) -> None:
    """Writes pictures (B, 3, H, W) in [-1, 1] as one image, row by row."""
    contact_sheet(to_images(pictures.float()), columns=columns).save(path)
