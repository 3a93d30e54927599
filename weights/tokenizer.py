"""CLIP's tokenizer, by transformers: from a checkpoint's folder, or from the vocabulary embedded here."""

import contextlib
import gzip
import io
import json
import logging
import tempfile
from pathlib import Path

from weights.configs import CheckpointError

MERGES = Path(__file__).parent / "clip_merges.txt.gz"
MAX_FILE = 16 << 20  # bytes of one of a tokenizer's files; CLIP's largest, tokenizer.json, has 4 million
CLIP_TOKENS = 49_408  # of the embedded vocabulary
SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}


def load_tokenizer(folder: Path | None, pad: str = "<|endoftext|>", length: int = 77):
    """transformers' CLIPTokenizerFast, which gives the same ids in its releases 4 and 5.

    Args:
        folder: with tokenizer.json, or vocab.json and merges.txt; None means the embedded CLIP vocabulary (OpenAI,
            MIT), which every SD 1 and SD 2 release shares.
        pad, length: the padding token and L, for folders whose configs do not say them.

    Raises CheckpointError when a file is missing or is none of a CLIP tokenizer.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            write_clip_vocabulary(Path(temporary))
            return read_tokenizer(Path(temporary), pad, length)
    if not (folder / "tokenizer.json").exists():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name} is missing; a CLIP tokenizer has it, or a tokenizer.json")
    for path in folder.iterdir():
        if path.stat().st_size > MAX_FILE:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; a CLIP tokenizer's files have fewer")
    return read_tokenizer(folder, pad, length)


def read_tokenizer(folder: Path, pad: str, length: int):
    """Raises CheckpointError for files that are none of a CLIP tokenizer."""
    # transformers looks for torchvision and says so when it is absent; nothing here needs it.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):
        from transformers import AddedToken, CLIPTokenizerFast
    missing = {}
    if not any((folder / name).exists() for name in ("tokenizer_config.json", "special_tokens_map.json")):
        # As published: "normalized", so that <|STARTOFTEXT|> in a prompt is the special token too.
        missing = {name: AddedToken(token, normalized=True) for name, token in SPECIAL.items()} | {"pad_token": pad}
    try:
        tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True, **missing)
    except Exception as error:  # whatever the library trips over in files that are not what they are called
        raise CheckpointError(f"{folder} does not hold a CLIP tokenizer: {error!r}") from error
    if tokenizer.model_max_length == UNSAID:
        tokenizer.model_max_length = length
    return tokenizer


UNSAID = int(1e30)  # transformers' model_max_length where no file says it


def write_clip_vocabulary(folder: Path) -> None:
    """CLIP's vocab.json and merges.txt, as every SD 1 and SD 2 release has them."""
    merges = gzip.decompress(MERGES.read_bytes()).decode().splitlines()
    vocabulary = clip_vocabulary([tuple(merge.split(" ")) for merge in merges])
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def clip_vocabulary(pairs: list[tuple[str, str]]) -> dict[str, int]:
    """CLIP's token ids follow from its merges: 256 bytes, 256 bytes that end a word, merges, two specials.

    The bytes come in the order of GPT-2's table: printable ones first, as themselves, then the rest as U+0100 onward.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *map("".join, pairs), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}
