"""Describes a checkpoint: python -m weights SOURCE, where SOURCE is what magicmix.py's --weights takes."""

import sys

from command import machine, options
from weights.describe import describe

USAGE = "usage: python -m weights SOURCE   (a folder, a .safetensors file or a hub id)"


def show(source: str) -> None:
    """Prints the description; exit code 2 for a checkpoint that does not load. Raises ValueError."""
    options.check({"weights": source})
    lines, obstacle = describe(source, lambda own: options.check(own, "magicmix.json: ", (options.MIXING,)))
    machine.show(lines)
    if obstacle:
        sys.exit(2)


def main() -> int:
    machine.begin()
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(f"{USAGE}\n\n{__doc__}")
        return 0
    if len(sys.argv) != 2:
        print(USAGE, file=sys.stderr)
        return 2
    return machine.run("weights", lambda: show(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(main())
