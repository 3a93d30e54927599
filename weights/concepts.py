"""The words that a checkpoint was trained on, where it says so: concepts.json in its folder, named lists of words.

Models that have seen the whole web need no such list. A small one draws a blob for a word that it has never seen, and
this is how its users are told.
"""

import difflib
import re

# What holds a sentence together and names no thing; nobody expects to see it in the picture.
FUNCTION_WORDS = frozenset(
    "a an the this that these those some any no not one of in on at to from by with without for over under above below "
    "behind before beside between near into onto and or but as like is are be it its his her their my your very".split()
)
MAX_NAMED = 5  # unknown words in one warning


def split(text: str) -> list[str]:
    """A text's words in lower case: what stands between spaces and ASCII punctuation, an emoji included."""
    return re.findall(r"[^\s!-/:-@\[-`{-~]+", text.lower())


def unknown(concepts: dict[str, list[str]], texts: list[str]) -> list[str]:
    """The words of the texts that are in none of the lists, each once. None are where there is no list."""
    if not concepts:
        return []
    known = FUNCTION_WORDS.union(*(split(entry) for entries in concepts.values() for entry in entries))
    return list(dict.fromkeys(word for text in texts for word in split(text) if word not in known))


def warning(concepts: dict[str, list[str]], texts: list[str]) -> str:
    """What to say of the texts' unknown words, with the nearest known ones by spelling; "" where all are known."""
    words = unknown(concepts, texts)
    if not words:
        return ""
    entries = [entry for entries in concepts.values() for entry in entries]
    named = []
    for word in words[:MAX_NAMED]:
        near = difflib.get_close_matches(word, entries, n=2)
        named.append(f"{word} (near: {', '.join(near)})" if near else word)
    more = f" and {len(words) - MAX_NAMED} more" if len(words) > MAX_NAMED else ""
    return (
        f"not among the words that this checkpoint knows: {', '.join(named)}{more}; --concepts lists those, and a "
        "public checkpoint knows far more (--weights SOURCE, in Python weights.load(SOURCE))"
    )


def lines(concepts: dict[str, list[str]]) -> list[str]:
    """The lists, one per line, for a description of the checkpoint."""
    return [f"{name:<13}{len(entries)}: {', '.join(entries)}" for name, entries in concepts.items()]
