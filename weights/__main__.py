"""Describes a checkpoint: python -m weights SOURCE, where SOURCE is what magicmix.py's --weights takes."""

import sys

from command import machine
from weights.describe import describe


def show(source: str) -> None:
    """Prints the description; exit code 2 for a checkpoint that does not load. Raises CheckpointError."""
    lines, obstacle = describe(source)
    for line in lines:
        print(machine.printable(line))
    if obstacle:
        sys.exit(2)


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m weights SOURCE   (a folder, a .safetensors file or a hub id)", file=sys.stderr)
        return 2
    return machine.run("weights", lambda: show(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(main())
