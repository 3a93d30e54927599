"""Takes the picture of a sweep's page in docs/sweep.md, in Chromium.

python -m lab.sweep.screenshot sweep/page.html [--output docs/sweep.png] [--width 1280] [--height 1300]
"""

import sys

from command import machine
from lab.explain.screenshot import opened, parser_of, write
from lab.sheets import DOCS


def main() -> int:
    args = parser_of(__doc__, DOCS / "sweep.png", 1300).parse_args()

    def work() -> None:
        with opened(args.page, (args.width, args.height)) as tab:
            tab.wait_for_selector("#grid .tile")
            write(tab, args.output)

    return machine.run("lab.sweep.screenshot", work)


if __name__ == "__main__":
    sys.exit(main())
