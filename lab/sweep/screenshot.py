"""Takes the picture of a sweep's page in docs/sweep.md, in Chromium.

python -m lab.sweep.screenshot sweep/page.html [--output docs/sweep.png] [--width 1280] [--height 1300]
"""

import argparse
import sys
from pathlib import Path

from command import machine
from lab.explain.screenshot import opened, write


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parents[2] / "docs" / "sweep.png")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1300)
    args = parser.parse_args()

    def work() -> None:
        with opened(args.page, (args.width, args.height)) as tab:
            tab.wait_for_selector("#grid .tile")
            write(tab, args.output)

    return machine.run("lab.sweep.screenshot", work)


if __name__ == "__main__":
    sys.exit(main())
