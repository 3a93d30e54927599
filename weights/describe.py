"""Describes a checkpoint without computing anything with it.

The lines give the format, the family, the prediction type and how it is known, the words that the checkpoint says it
knows, each part's tensors, parameters and dtype, averaged weights, what is ignored and why, the sha256 of each file
with the published release that it equals (releases.json), what holds NaN or Inf, and what is missing. Networks are
built on the meta device, without storage, to know which tensors they ask for.
"""

import hashlib
import json
import math
from collections import Counter
from pathlib import Path

from weights import MODELS, build, concepts, files, names, not_finite, open_source


def ignored(source: files.Source) -> Counter:
    """reason -> how many tensors of the files are left unread for it."""
    if source.format == "folder":
        placed = [
            (files.NAMES[part], name, tensor)
            for part, paths in source.files.items()
            for path in paths
            for name, tensor in files.read_tensors(path).items()
        ]
    else:
        (path,) = set(sum(source.files.values(), []))
        placed = [(*names.place(name)[1:], tensor) for name, tensor in files.read_tensors(path).items()]
    reasons = Counter()
    for rename, name, tensor in placed:
        if name in names.IGNORED:
            reasons[names.IGNORED[name]] += 1
        elif not rename(name, tensor):
            full = f"text_model.{name}"  # as files without that prefix leave it off
            reasons[names.IGNORED.get(full, "what SD2 does not read of its text tower")] += 1
    return reasons


def describe(given: str) -> list[str]:
    """The description, line by line. Raises CheckpointError."""
    source = open_source(given, half=False, ema=True)
    context, schedule = source.configs["unet"].cross_attention_dim, source.configs["scheduler"]
    family = {768: "SD 1", 1024: "SD 2"}.get(context, f"its own (text width {context})")
    known = {
        "config": f"{schedule.prediction_type}, from the scheduler config",
        "family": "epsilon, as all of SD 1",
        "": "not in the file; probed when it is loaded, or --prediction",
    }[source.prediction]
    lines = [f"format       {source.format}", f"family       {family}", f"prediction   {known}"]
    lines += concepts.lines(source.concepts)
    missing = []
    for part in MODELS:
        tensors, expected = source.tensors[part], build(part, source.configs[part]).state_dict()
        parameters = sum(math.prod(t.shape) for t in tensors.values())
        dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})) or "-"
        lines.append(f"{part:<13}{len(tensors)} tensors, {parameters:,} parameters, {dtypes}")
        missing += [part] if not tensors else [f"{part}: {n}" for n in sorted(expected.keys() - tensors.keys())]
    if source.format == "single file":
        copies = sum(n.startswith("model_ema.") for n in files.read_tensors(source.files["unet"][0]))
        lines.append(f"ema          {'a full copy, used unless --no-ema' if copies > 100 else 'no copy of its own'}")
    for reason, count in ignored(source).items():
        lines.append(f"ignored      {count} tensors: {reason}")
    for stray in source.tensors.get("unknown", {}):
        lines.append(f"unknown      {stray}")
    for part in MODELS:
        lines += [f"not finite   {part}: {name}" for name in not_finite(source.tensors[part])]
    releases = json.loads((Path(__file__).parent / "releases.json").read_text())
    for path in sorted({f for paths in source.files.values() for f in paths}):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"sha256       {digest} {path.name} = {releases.get(digest, 'no release that is known here')}")
    return lines + [f"missing      {name}" for name in missing or ["nothing"]]
