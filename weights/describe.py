"""Describes a checkpoint without computing anything with it.

The lines give the format, the family, the prediction type and what says it, the words that the checkpoint says it
knows, each part's tensors, parameters and dtype, averaged weights, what is left unread and why, the sha256 of each file
with the published release that it equals (releases.json), what holds NaN or Inf, what is missing, and what a user
should know. The last is a sentence: the checkpoint loads and how, or what stands in its way. Networks are built on the
meta device, without storage, to know which tensors they ask for.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from torch import nn

import weights
from weights import MODELS, build, concepts, files, not_finite


def describe(given: str, check_options: Callable = lambda own: None) -> tuple[list[str], str | None]:
    """The description, line by line, and what keeps the checkpoint from being loaded, None where nothing does.

    Args:
        given: the source.
        check_options: raises ValueError for own options in magicmix.json that cannot be right.

    Raises CheckpointError for a source of which nothing can be described.
    """
    source = weights.open_source(given, half=False, ema=True)
    family = family_of(source)
    told = f"{source.prediction}, by {source.told_by}" if source.prediction else "not said; probed when it is loaded"
    zero = ", zero terminal SNR" * source.configs["scheduler"].rescale_betas_zero_snr
    lines = [f"format       {source.format}", f"family       {family}", f"prediction   {told}{zero}"]
    lines += concepts.lines(source.concepts)
    missing, models = [], {part: build(part, source.configs[part]) for part in MODELS}
    for part in MODELS:
        tensors = source.tensors[part]
        parameters = sum(math.prod(t.shape) for t in tensors.values())
        dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})) or "-"
        lines.append(f"{part:<13}{len(tensors)} tensors, {parameters:,} parameters, {dtypes}")
        missing += (
            [f"{part}: {n}" for n in sorted(models[part].state_dict().keys() - tensors.keys())] if tensors else [part]
        )
    lines.append(f"ema          {source.averaged}")
    for reason, count in Counter(source.unread.values()).items():
        lines.append(f"not read     {count} tensors: {reason}")
    for stray in source.tensors.get("unknown", {}):
        lines.append(f"unknown      {stray}")
    for part in MODELS:
        lines += [f"not finite   {part}: {name}" for name in not_finite(source.tensors[part])]
    releases = json.loads((Path(__file__).parent / "releases.json").read_text())
    for path in sorted({f for paths in source.files.values() for f in paths}):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"sha256       {digest} {path.name} = {releases.get(digest, 'no release that is known here')}")
    lines += [f"missing      {name}" for name in missing or ["nothing"]] + [f"note         {n}" for n in source.notes]
    obstacle = obstacle_of(source, models, given, check_options)
    if obstacle:
        return [*lines, f"It does not load: {obstacle}"], obstacle
    return [*lines, f"It loads as {family}; prediction: {told}."], None


def family_of(source: files.Source) -> str:
    if not source.tensors["unet"]:
        return "not known without a UNet"
    context = source.configs["unet"].cross_attention_dim
    return {768: "SD 1", 1024: "SD 2"}.get(context, f"a model of its own (text width {context})")


def obstacle_of(source: files.Source, models: dict[str, nn.Module], where: str, check_options: Callable) -> str | None:
    """What loading would refuse, None where it would not."""
    try:
        weights.check_source(source, models, where)
        weights.tokenizer_of(source, where)
        check_options(source.own_options)
        for part in MODELS:
            weights.check_weights(part, source.tensors[part])
    except ValueError as error:
        return str(error)
    return None
