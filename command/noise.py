"""Noise in files: eps (B, 4, H, W), float32, as a .npy file or as the tensor "eps" of a .safetensors file.

B pictures, 4 latent channels, latent height and width (an eighth of the picture's for Stable Diffusion). The values are
standard normal. So another implementation can be given the very noise that was used here, and the other way round.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from command.pictures import check_writable, must_be_file, replace

SUFFIXES = (".npy", ".safetensors")


class NoiseFile(NamedTuple):
    """Noise from a file."""

    eps: Tensor  # (B, 4, H, W), float32
    sha256: str  # of the file

    def rows(self, first: int, shape: tuple[int, ...]) -> Tensor:
        """`shape` = (count, 4, H, W) of it from row `first` on. Raises ValueError when they are not there."""
        if self.eps.shape[1:] != shape[1:] or first + shape[0] > len(self.eps):
            raise ValueError(f"noise has shape {tuple(self.eps.shape)}; {tuple(shape)} from row {first} on are needed")
        return self.eps[first : first + shape[0]]


def read(path: str | Path) -> NoiseFile:
    """The noise in a file. Raises FileNotFoundError or ValueError."""
    path = Path(path)
    must_be_file(path, "noise", "give a .npy or .safetensors file")
    check_suffix(path)
    try:
        eps = read_npy(path) if path.suffix == ".npy" else read_safetensors(path)
        is_finite = bool(eps.isfinite().all())
    except Exception as error:  # whatever the libraries trip over in files that are not what they are called
        raise ValueError(f"noise {str(path)!r} cannot be read: {error}; save an array of (B, 4, H, W)") from error
    if eps.ndim != 4 or eps.shape[1] != 4 or not is_finite:
        raise ValueError(f"noise {str(path)!r} has shape {tuple(eps.shape)}; save finite numbers of shape (B, 4, H, W)")
    with path.open("rb") as file:
        return NoiseFile(eps, hashlib.file_digest(file, "sha256").hexdigest())


def read_npy(path: Path) -> Tensor:
    """A .npy file's numbers in float32. It is mapped, so that its shape is held against its size before it is read."""
    with np.errstate(all="ignore"):  # an absurd shape is refused; a number too large for float32 is Inf, refused too
        array = np.lib.format.open_memmap(path, mode="r")
        if array.dtype.kind not in "fiu":
            raise ValueError(f"it holds {array.dtype}")
        return torch.from_numpy(array.astype(np.float32))


def read_safetensors(path: Path) -> Tensor:
    """The tensor "eps" of a .safetensors file in float32."""
    eps = load_file(path)["eps"]
    if eps.is_complex():  # float() would drop the imaginary part
        raise ValueError(f"it holds {eps.dtype}")
    return eps.float()


class Known:
    """Noise whose first draw is known, one draw per call: `eps` (B, 4, H, W), then what `later` draws."""

    def __init__(self, eps: Tensor, later: Callable[[], Tensor]):
        self.eps, self.later, self.drawn = eps, later, 0

    def __call__(self) -> Tensor:
        self.drawn += 1
        return self.eps if self.drawn == 1 else self.later()


def first(noise: Callable[[], Tensor]) -> Tensor:
    """The first draw. Raises TypeError for what draws no tensor, ValueError for one that is not finite numbers
    (B, 4, H, W)."""
    if not callable(noise):
        raise TypeError(f"noise is of the type {type(noise).__name__}; give what draws it, lambda: eps for a known eps")
    eps = noise()
    if not isinstance(eps, Tensor):
        raise TypeError(f"noise draws an object of the type {type(eps).__name__}; it must draw tensors (B, 4, H, W)")
    if eps.ndim != 4 or eps.shape[1] != 4 or not eps.numel():
        raise ValueError(f"noise has shape {tuple(eps.shape)}; the first draw must be (B, 4, H, W)")
    if not eps.is_floating_point() or not eps.isfinite().all():
        raise ValueError(f"noise is {eps.dtype}, or holds NaN or Inf; the first draw must be finite numbers in float32")
    return eps


def matched(x0: Tensor, eps: Tensor) -> Tensor:
    """The latents of a layout (1 or B, 4, H, W) in the shape of eps (B, 4, H, W). Raises ValueError when that cannot
    be."""
    if x0.shape[1:] != eps.shape[1:] or len(x0) not in (1, len(eps)):
        raise ValueError(f"noise has shape {tuple(eps.shape)}; this layout's latent has {tuple(x0.shape)}")
    return x0.expand_as(eps)


def check_target(path: str | Path) -> None:
    """Raises ValueError or OSError when noise cannot be written to `path`."""
    check_suffix(Path(path))
    check_writable(Path(path), "noise")


def write(path: str | Path, eps: Tensor) -> None:
    """Writes eps (B, 4, H, W), in the format that the name ends in. Raises OSError."""
    eps = eps.cpu().contiguous()
    if Path(path).suffix == ".npy":
        replace(Path(path), "noise", lambda file: np.save(file, eps.numpy()))
    else:
        replace(Path(path), "noise", lambda file: file.write(save({"eps": eps})))


def check_suffix(path: Path) -> None:
    """Raises ValueError for a name of another kind of file."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"noise {str(path)!r} is of no kind that is read; let its name end in {' or '.join(SUFFIXES)}")
