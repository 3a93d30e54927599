"""CLIP's tokenizer, by transformers: from a checkpoint's folder, or from the vocabulary embedded here."""

import contextlib
import gzip
import io
import logging
from pathlib import Path

from weights.files import CheckpointError

MERGES = Path(__file__).parent / "clip_merges.txt.gz"
MAX_FILE = 16 << 20  # bytes of one of a tokenizer's files; CLIP's largest, tokenizer.json, has 4 million


def load_tokenizer(folder: Path | None, pad: str = "<|endoftext|>"):
    """transformers' CLIPTokenizer, from a folder's vocab.json and merges.txt, or, without one, from the embedded CLIP
    vocabulary (OpenAI, MIT), which every SD 1 and SD 2 release shares; `pad` is then the padding token.

    Raises CheckpointError when a file is missing or is none of a CLIP tokenizer.
    """
    # transformers looks for torchvision and says so when it is absent; nothing here needs it.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):
        from transformers import CLIPTokenizer

    if folder is None:
        merges = gzip.decompress(MERGES.read_bytes()).decode().splitlines()
        pairs = [tuple(merge.split(" ")) for merge in merges]
        return CLIPTokenizer(clip_vocabulary(pairs), pairs, pad_token=pad, model_max_length=77)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing; a CLIP tokenizer has it")
    for path in folder.iterdir():
        if path.stat().st_size > MAX_FILE:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; a CLIP tokenizer's files have fewer")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the library trips over in files that are not what they are called
        raise CheckpointError(f"{folder} does not hold a CLIP tokenizer: {error!r}") from error


def clip_vocabulary(pairs: list[tuple[str, str]]) -> dict[str, int]:
    """CLIP's token ids follow from its merges: 256 bytes, 256 bytes that end a word, merges, two specials.

    The bytes come in the order of GPT-2's table: printable ones first, as themselves, then the rest as U+0100 onward.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *map("".join, pairs), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}
