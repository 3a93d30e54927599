"""Where two traces part: the first step and the first tensor, with both values and the place."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lab.explain.trace import LATENTS, Trace

BEFORE = (  # the tensors that no step has, in the order they come about
    "eps", "layout_x0", "t", "abar", "negative/ids", "negative/states", "negative/weights",
    "prompt/ids", "prompt/states", "prompt/weights",
    "layout_prompt/ids", "layout_prompt/states", "layout_prompt/weights",
)  # fmt: skip


class Parting(NamedTuple):
    """The first tensor that differs."""

    name: str
    reason: str  # what differs, in words


def names_of(trace: Trace) -> list[str]:
    """The names of a trace's tensors in the order in which their values come about."""
    rank = {name: i for i, name in enumerate(BEFORE)}
    modules = {name: i for i, name in enumerate(trace.facts["modules"])}
    layers = {name: i for i, name in enumerate(trace.facts["layers"])}
    stops = {stop.name: i for i, stop in enumerate(trace.stops)}

    def place(full: str) -> tuple:
        """Sorts within a step: its modules, its maps, its predictions, its latents."""
        run, _, rest = full.partition("/")
        k, _, name = rest.partition("/")
        if f"{run}/{k}" not in stops:
            return (0, rank.get(full, len(rank)), full)
        kind, _, rest = name.partition("/")
        module = rest.rpartition("/")[0]
        if kind == "modules":
            within = (0, modules.get(module, -1), rest)
        elif kind in ("maps", "heads"):
            within = (1, layers.get(rest.partition("/")[2], -1), name)
        else:
            within = (2, LATENTS.index(name) if name in LATENTS else -1, name)
        return (1, stops[f"{run}/{k}"], *within)

    return sorted(trace.tensors, key=place)


def difference(a: Tensor, b: Tensor, tolerance: float) -> str | None:
    """What differs between two tensors, in words; None where nothing does. `tolerance` is relative to a's largest
    absolute value. NaN equals NaN."""
    if a.shape != b.shape:
        return f"shape {tuple(a.shape)} and {tuple(b.shape)}"
    if a.dtype != b.dtype:
        return f"dtype {name_of(a.dtype)} and {name_of(b.dtype)}"
    if not a.numel() or torch.equal(a, b):
        return None
    x, y = a.double().flatten(), b.double().flatten()  # exact for every dtype of a trace
    apart = (x - y).abs()
    apart[(x == y) | (x.isnan() & y.isnan())] = 0  # Inf - Inf is NaN
    apart = apart.nan_to_num(nan=torch.inf, posinf=torch.inf)
    largest = x.abs().nan_to_num(0, 0, 0).max().item()
    if apart.max() <= tolerance * largest:
        return None
    i = int(apart.argmax())
    place = tuple(int(n) for n in torch.unravel_index(torch.tensor(i), a.shape))
    relative = f", {apart[i] / largest:.1e} of the largest value" if largest else ""
    return (
        f"at {place}: {x[i]:.9g} and {y[i]:.9g}, {apart[i]:.1e} apart{relative}; "
        f"{int((apart > tolerance * largest).sum()):,} of {a.numel():,} values differ"
    )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def title(name: str, trace: Trace) -> str:
    """A tensor's name with its step in words."""
    for stop in trace.stops:
        if name.startswith(f"{stop.name}/"):
            run = "along the layout prompt" if stop.run == "layout" else "in the mix"
            return f"{run}, k = {stop.k} ({stop.phase}): {name.removeprefix(stop.name + '/')}"
    return f"before the first step: {name}"


def parting(a: Trace, b: Trace, tolerance: float) -> tuple[Parting | None, int]:
    """The first tensor of both that differs, None where none does, and how many of both were equal before it."""
    equal = 0
    for name in names_of(a):
        if name in b.tensors:
            if reason := difference(a.tensors[name], b.tensors[name], tolerance):
                return Parting(name, reason), equal
            equal += 1
    return None, equal


def compare(a: Trace, b: Trace, tolerance: float = 0.0) -> tuple[bool, list[str]]:
    """Whether two traces are the same within the tolerance, and the lines that say so."""
    lines = list(facts_apart(a.facts, b.facts))
    found, equal = parting(a, b, tolerance)
    lines += [f"{title(found.name, a)}", f"  {found.reason}"] if found else []
    lines.append(f"{equal:,} tensors {'before it ' if found else ''}are equal")
    lacking = 0
    for one, other, which in ((a, b, "second"), (b, a, "first")):
        if missing := [name for name in names_of(one) if name not in other.tensors]:
            lacking += len(missing)
            lines.append(f"{len(missing):,} are not in the {which}, such as {title(missing[0], one)}")
    return found is None and not lacking, lines


def facts_apart(a: dict, b: dict) -> Iterator[str]:
    """The parameters, the checkpoint and the versions in which two traces differ."""
    for group in ("parameters", "checkpoint", "versions"):
        left, right = a.get(group) or {}, b.get(group) or {}
        for name in sorted(left.keys() | right.keys()):
            if left.get(name) != right.get(name):
                yield f"{group}: {name} {left.get(name)!r} and {right.get(name)!r}"
