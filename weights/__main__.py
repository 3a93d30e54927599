"""Describes a checkpoint without building a network: python -m weights SOURCE

SOURCE is what --weights takes. Prints the layout, the family, the prediction type and how it is known, each part's
tensors, parameters and dtype, averaged weights, what is ignored and why, the sha256 of each file with the published
release that it equals (releases.json), what holds NaN or Inf, and what is missing.
"""

import hashlib
import json
import math
import sys
from collections import Counter
from pathlib import Path

from weights import MODELS, layouts, not_finite, on_meta, one_line, sources


def ignored(source: sources.Source) -> Counter:
    """reason -> how many tensors of the files are left unread for it."""
    if source.layout == "folder":
        placed = [(sources.LAYOUTS[part], name, t) for part, files in source.files.items() for f in files
                  for name, t in sources.read_tensors(f).items()]  # fmt: skip
    else:
        (path,) = set(sum(source.files.values(), []))
        placed = [(*layouts.place(name)[1:], t) for name, t in sources.read_tensors(path).items()]
    reasons = Counter()
    for layout, name, tensor in placed:
        if name in layouts.IGNORED:
            reasons[layouts.IGNORED[name]] += 1
        elif not layout(name, tensor):
            full = f"text_model.{name}"  # as files without that prefix leave it off
            reasons[layouts.IGNORED.get(full, "what SD2 does not read of its text tower")] += 1
    return reasons


def describe(given: str) -> list[str]:
    """The description, line by line. Raises CheckpointError."""
    source = sources.open_source(given, half=False, ema=True)
    context, schedule = source.configs["unet"].cross_attention_dim, source.configs["scheduler"]
    family = {768: "SD 1", 1024: "SD 2"}.get(context, f"its own (text width {context})")
    known = {"config": f"{schedule.prediction_type}, from the scheduler config", "family": "epsilon, as all of SD 1",
             "": "not in the file; probed when it is loaded, or --prediction"}[source.prediction]  # fmt: skip
    lines = [f"layout       {source.layout}", f"family       {family}", f"prediction   {known}"]
    missing = []
    for part, model_class in MODELS.items():
        tensors = source.tensors[part]
        with on_meta():
            expected = model_class(source.configs[part]).state_dict()
        parameters = sum(math.prod(t.shape) for t in tensors.values())
        dtypes = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})) or "-"
        lines.append(f"{part:<13}{len(tensors)} tensors, {parameters:,} parameters, {dtypes}")
        missing += [part] if not tensors else [f"{part}: {n}" for n in sorted(expected.keys() - tensors.keys())]
    if source.layout == "single file":
        copies = sum(n.startswith("model_ema.") for n in sources.read_tensors(source.files["unet"][0]))
        lines.append(f"ema          {'a full copy, used unless --no-ema' if copies > 100 else 'no copy of its own'}")
    for reason, count in ignored(source).items():
        lines.append(f"ignored      {count} tensors: {reason}")
    for stray in source.tensors.get("unknown", {}):
        lines.append(f"unknown      {one_line(stray)}")
    for part in MODELS:
        lines += [f"not finite   {part}: {one_line(name)}" for name in not_finite(source.tensors[part])]
    releases = json.loads((Path(__file__).parent / "releases.json").read_text())
    for path in sorted({f for files in source.files.values() for f in files}):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"sha256       {digest} {path.name} = {releases.get(digest, 'no release that is known here')}")
    return lines + [f"missing      {name}" for name in missing or ["nothing"]]


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m weights SOURCE   (a folder, a .safetensors file or a hub id)", file=sys.stderr)
        return 2
    try:
        print("\n".join(describe(sys.argv[1])))
    except (ValueError, OSError) as error:
        print(f"weights: {one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
