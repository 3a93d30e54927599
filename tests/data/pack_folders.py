"""What write_folder.py wrote in several environments, in one file: `python pack_folders.py FOLDER ...` makes
writers.json.gz, and unpack() a checkpoint's folder of it again.

Every JSON file is kept as it is, and of the tensors their names and shapes. CLIP's vocabulary follows from the merges
in weights/, so vocab.json and merges.txt are kept as None, and tokenizer.json without these two tables. Packing checks
that what is left out can be put back.
"""

import functools
import gzip
import json
import sys
from pathlib import Path

from safetensors import safe_open
from write_folder import PROMPTS, clip_vocabulary

PACKED = Path(__file__).parent / "writers.json.gz"


@functools.cache
def tables() -> dict[str, str]:
    """The texts that are left out: of the files that hold nothing else, and of the two tables in tokenizer.json, whose
    merges are lines or, in newer releases, pairs."""
    vocabulary, merges = clip_vocabulary()
    return {
        "vocab.json": json.dumps(vocabulary),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "lines": json.dumps(merges),
        "pairs": json.dumps([merge.split(" ") for merge in merges]),
    }


def tokenizer_file(packed: dict) -> str:
    """The text of a tokenizer.json with its tables."""
    text, kind = json.dumps(packed), packed["model"]["merges"]
    text = text.replace('"vocab": null', f'"vocab": {tables()["vocab.json"]}')
    return text.replace(f'"merges": "{kind}"', f'"merges": {tables()[kind]}')


def pack_file(path: Path) -> object:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}
    if path.name == "merges.txt":
        assert path.read_text("utf-8") == tables()[path.name]
        return None
    value = json.loads(path.read_text("utf-8"))
    if path.name == "vocab.json":
        assert value == json.loads(tables()[path.name])
        return None
    if path.name == "tokenizer.json":
        without = {"vocab": None, "merges": "pairs" if isinstance(value["model"]["merges"][0], list) else "lines"}
        packed = value | {"model": value["model"] | without}
        assert json.loads(tokenizer_file(packed)) == value
        return packed
    return value


def pack(folder: Path) -> dict:
    """One environment's folder: {"files": {path: content}, "schedulers", "ids", ...}."""
    facts = json.loads((folder / "facts.json").read_text())
    written = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    kept = [p for p in written if p.relative_to(folder).parts[0] in ("sd1", "sd2", "sd1-added", "tokenizers")]
    return facts | {
        "files": {str(p.relative_to(folder)): pack_file(p) for p in kept},
        "schedulers": {p.stem: json.loads(p.read_text()) for p in sorted((folder / "schedulers").glob("*.json"))},
    }


def unpack(writer: dict, part: str, folder: Path, write_tensors) -> Path:
    """Writes the files of one of a writer's folders again.

    Args:
        writer: one of the entries of writers.json.gz.
        part: "sd1", "sd2", "sd1-added", or "tokenizers/slow-sd1" and so on.
        folder: to write to; it is made.
        write_tensors: write_tensors({name: shape}, path) writes a safetensors file.
    """
    for name, content in writer["files"].items():
        if not name.startswith(f"{part}/"):
            continue
        path = folder / name.removeprefix(f"{part}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            write_tensors(content, path)
        elif content is None:
            path.write_text(tables()[path.name], "utf-8")
        else:
            path.write_text(tokenizer_file(content) if path.name == "tokenizer.json" else json.dumps(content), "utf-8")
    return folder


if __name__ == "__main__":
    writers = [pack(Path(folder)) for folder in sys.argv[1:]]
    different = []  # most tokenizers give the same ids
    for writer in writers:
        for name, ids in writer["ids"].items():
            if ids not in different:
                different.append(ids)
            writer["ids"][name] = different.index(ids)
    text = json.dumps({"prompts": PROMPTS, "ids": different, "writers": writers}, separators=(",", ":"))
    PACKED.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
