"""Describes a checkpoint: python -m weights SOURCE, where SOURCE is what magicmix.py's --weights takes."""

import sys

from command import machine
from weights.describe import describe

USAGE = "usage: python -m weights SOURCE   (a folder, a .safetensors file or a hub id)"


def main() -> int:
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(f"{USAGE}\n\n{__doc__}")
        return 0
    if len(sys.argv) != 2:
        print(USAGE, file=sys.stderr)
        return 2
    return machine.run("weights", lambda: machine.show(describe(sys.argv[1])))


if __name__ == "__main__":
    sys.exit(main())
