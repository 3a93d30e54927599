"""Takes the README's picture of the page, in Chromium.

python -m lab.explain.screenshot page.html [--output docs/explain.png] [--k 18] [--width 1280] [--height 1190]
"""

import argparse
import contextlib
import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from command import machine, pictures
from lab.sheets import DOCS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip


@contextlib.contextmanager
def opened(page: Path, size: tuple[int, int]) -> Iterator[Page]:
    """A page in Chromium, in a window of `size` = (width, height). Raises FileNotFoundError or ValueError."""
    pictures.must_be_file(page, "page", "make page writes one")
    if CHROMIUM is None:
        raise FileNotFoundError("no Chromium is installed; install Debian's package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_page(viewport={"width": size[0], "height": size[1]})
        tab.goto(page.resolve().as_uri())
        yield tab
        browser.close()


def write(tab: Page, output: Path) -> None:
    """Writes what is to be seen, in 256 colours. Raises OSError."""
    picture = Image.open(io.BytesIO(tab.screenshot())).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    pictures.replace(output, "output", lambda file: picture.save(file, "PNG", optimize=True))
    print(output)


def go_to(tab: Page, k: int) -> None:
    """Moves the page to step k of the mix. Raises ValueError."""
    tab.wait_for_selector("#maps canvas")
    tab.keyboard.press("Home")
    while tab.inner_text("#readout b") != f"k = {k}":
        if tab.is_disabled("#next"):
            raise ValueError(f"k {k} is no step of this page")
        tab.click("#next")


def parser_of(description: str, output: Path, height: int) -> argparse.ArgumentParser:
    """The options of a screenshot, with these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=height)
    return parser


def main() -> int:
    parser = parser_of(__doc__, DOCS / "explain.png", 1190)
    parser.add_argument("--k", type=int, default=18)
    args = parser.parse_args()

    def work() -> None:
        with opened(args.page, (args.width, args.height)) as tab:
            go_to(tab, args.k)
            write(tab, args.output)

    return machine.run("lab.explain.screenshot", work)


if __name__ == "__main__":
    sys.exit(main())
