"""The layouts and prompts of the README's and the model card's sheets, which audits and sweeps take too.

docs/layouts holds the layouts: emoji that no training stage has seen (teapot, castle, handbag, pear, boot, sofa and
trophy, from the sets that the model card credits), and three drawings that `drawings` of __main__.py makes.
"""

from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
LAYOUTS = ["teapot", "castle", "handbag", "pear", "boot", "sofa", "trophy", "mug", "vase", "boat"]
PROMPTS = ["tiger", "panda", "frog", "strawberry", "watermelon", "cactus", "donut", "pizza"]


def layout_path(name: str) -> Path:
    return DOCS / "layouts" / f"{name}.png"
