"""What write_folder.py wrote in several environments, in one file: `python pack_folders.py FOLDER ...` makes
writers.json.gz, and unpack() a checkpoint's folder of it again.

Kept verbatim are every JSON file and the names and shapes of every tensor; the values of the tensors are not, and CLIP's
vocabulary follows from the merges in weights/. So vocab.json and merges.txt are kept as None, and tokenizer.json
without the two tables. Packing checks that what is left out can be put back.
"""

import gzip
import json
import sys
from pathlib import Path

from safetensors import safe_open
from write_folder import PROMPTS, clip_vocabulary

PACKED = Path(__file__).parent / "writers.json.gz"


def table_file(name: str) -> str:
    """The text of vocab.json or merges.txt."""
    vocabulary, merges = clip_vocabulary()
    return json.dumps(vocabulary) if name == "vocab.json" else "\n".join(["#version: 0.2", *merges, ""])


def with_tables(packed: dict) -> dict:
    """A tokenizer.json with its vocabulary and merges, as pairs or as lines as they were."""
    vocabulary, merges = clip_vocabulary()
    merges = [merge.split(" ") for merge in merges] if packed["model"]["merges"] == "pairs" else merges
    return packed | {"model": packed["model"] | {"vocab": vocabulary, "merges": merges}}


def pack_file(path: Path) -> object:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}
    if path.name == "merges.txt":
        assert path.read_text("utf-8") == table_file(path.name)
        return None
    value = json.loads(path.read_text("utf-8"))
    if path.name == "vocab.json":
        assert value == json.loads(table_file(path.name))
        return None
    if path.name == "tokenizer.json":
        tables = {"vocab": None, "merges": "pairs" if isinstance(value["model"]["merges"][0], list) else "lines"}
        packed = value | {"model": value["model"] | tables}
        assert with_tables(packed) == value
        return packed
    return value


def pack(folder: Path) -> dict:
    """One environment's folder: {"files": {path: content}, "schedulers", "ids", ...}."""
    facts = json.loads((folder / "facts.json").read_text())
    written = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.parent.name not in ("schedulers",)]
    kept = [p for p in written if p != folder / "facts.json" and p.relative_to(folder).parts[0] != "published"]
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
            path.write_text(table_file(path.name), "utf-8")
        else:
            path.write_text(json.dumps(with_tables(content) if path.name == "tokenizer.json" else content), "utf-8")
    return folder


if __name__ == "__main__":
    writers = [pack(Path(folder)) for folder in sys.argv[1:]]
    tables = []  # of ids, most of which are equal
    for writer in writers:
        for name, ids in writer["ids"].items():
            if ids not in tables:
                tables.append(ids)
            writer["ids"][name] = tables.index(ids)
    text = json.dumps({"prompts": PROMPTS, "ids": tables, "writers": writers}, separators=(",", ":"))
    PACKED.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
