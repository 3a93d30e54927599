"""Shared pieces of the tests: how errors are measured, and how an oracle gets random weights."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

TINY = ROOT / "weights" / "tiny"


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Maximum absolute error over the reference's largest absolute value."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    assert reference.isfinite().all() and reference.std() > 0, "nothing to compare with"
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter away from its initial value, so that swapped norms or forgotten biases cannot hide."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p += 0.1 * p.std().nan_to_num(1.0).clamp(min=0.5) * torch.randn(p.shape, generator=generator)
    return model.eval()
