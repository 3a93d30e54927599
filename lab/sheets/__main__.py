"""The pictures of the README and the model card, made by the embedded checkpoint.

python -m lab.sheets            all of them; thirteen minutes on one core
python -m lab.sheets nu s       only these
"""

import sys

from PIL import Image, ImageDraw, ImageFont

import weights
from command.pictures import fit, open_layout
from lab.sheets import DOCS, LAYOUTS, PROMPTS, layout_path
from lab.training import data
from magicmix import decode, magicmix, text_to_image

SIDE, MARGIN, LABEL = 128, 4, 22  # pixels: of a picture, between two, of a line of text
BLANK = Image.new("RGB", (SIDE, SIDE), "white")


class Studio:
    """The embedded checkpoint, and pictures made by it with its own options, seed 0."""

    def __init__(self):
        self.models = weights.load()

    def mix(self, prompt: str, layout: str, **options) -> Image.Image:
        """Mixes into a picture of docs/layouts, or, if there is none of that name, into that prompt."""
        path = layout_path(layout)
        source = fit(open_layout(path).picture, (SIDE, SIDE)) if path.exists() else layout
        *_, last = magicmix(self.models, prompt, source, **options)
        return decode(self.models, last.x)[0]

    def text_to_image(self, prompt: str, **options) -> Image.Image:
        *_, last = text_to_image(self.models, prompt, **options)
        return decode(self.models, last.x)[0]


def show(layout: str) -> Image.Image:
    """A picture of docs/layouts, to stand beside the mixes."""
    return Image.open(layout_path(layout)).convert("RGB")


def write(name: str, rows: list[list[Image.Image]], top: list[str], left: list[str] | None = None) -> None:
    """Writes a labelled grid of pictures as docs/NAME.png."""
    font = ImageFont.load_default(14)
    indent = max((int(font.getlength(t)) for t in left), default=0) + 12 if left else 0
    cell = SIDE + MARGIN
    canvas = Image.new("RGB", (indent + cell * len(rows[0]), LABEL + cell * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, text in enumerate(top):
        draw.text((indent + i * cell + cell // 2, LABEL // 2), text, "black", font, anchor="mm")
    for j, row in enumerate(rows):
        if left:
            draw.text((6, LABEL + j * cell + cell // 2), left[j], "black", font, anchor="lm")
        for i, picture in enumerate(row):
            canvas.paste(picture, (indent + i * cell, LABEL + j * cell))
    canvas.save(DOCS / f"{name}.png", optimize=True)
    print(DOCS / f"{name}.png")


def drawings() -> None:
    """Writes the drawn layouts: a mug, a vase and a sailing boat, at four times the size and averaged."""
    shapes = {
        "mug": [("ellipse", (82, 44, 118, 90), "#c23b30"), ("ellipse", (91, 53, 109, 81), "white"),
                ("rounded_rectangle", (20, 26, 96, 106), "#d8483c"), ("ellipse", (20, 18, 96, 36), "#8f2a22")],
        "vase": [("rectangle", (50, 14, 78, 40), "#3b64c8"),
                 ("polygon", [(54, 40), (74, 40), (96, 66), (82, 116), (46, 116), (32, 66)], "#3b64c8"),
                 ("polygon", [(34, 64), (94, 64), (94, 74), (36, 74)], "#9ab4f0")],
        "boat": [("polygon", [(14, 84), (114, 84), (96, 112), (32, 112)], "#7a4a26"),
                 ("rectangle", (60, 14, 65, 84), "#54341c"), ("polygon", [(68, 18), (68, 78), (108, 78)], "#e8e2d0"),
                 ("polygon", [(57, 30), (57, 78), (24, 78)], "#e07b39")],
    }  # fmt: skip
    for name, parts in shapes.items():
        canvas = Image.new("RGB", (4 * SIDE, 4 * SIDE), "white")
        for kind, points, colour in parts:
            flat = [4 * v for p in points for v in (p if isinstance(p, tuple) else (p,))]
            extra = {"radius": 40} if kind == "rounded_rectangle" else {}
            getattr(ImageDraw.Draw(canvas), kind)(flat, fill=colour, **extra)
        canvas.resize((SIDE, SIDE), Image.Resampling.BOX).save(layout_path(name))


# ------------------------------------------------------------------------------------------------------ the sheets


def hero(studio: Studio) -> None:
    """The picture at the top of the README: layout above, the mixture below."""
    cases = [
        ("castle", "strawberry"),
        ("trophy", "tiger"),
        ("vase", "penguin"),
        ("handbag", "bee"),
        ("boot", "cactus"),
        ("mug", "panda"),
        ("pear", "frog"),
    ]
    rows = [[show(name) for name, _ in cases], [studio.mix(f"a {p}", name) for name, p in cases]]
    write("hero", rows, [f"+ a {p}" for _, p in cases])


def mixes(studio: Studio) -> None:
    """Ten layouts that were never trained on, eight prompts, the checkpoint's own options, seed 0."""
    rows = [[show(name)] + [studio.mix(f"a {p}", name) for p in PROMPTS] for name in LAYOUTS]
    write("mixes", rows, ["layout", *(f"a {p}" for p in PROMPTS)], LAYOUTS)


def sweep(studio: Studio, option: str, values: list[float], **fixed) -> None:
    """One option across, three mixes down, as docs/OPTION.png."""
    cases = [("handbag", "watermelon"), ("castle", "strawberry"), ("teapot", "tiger")]
    rows = [[show(name)] + [studio.mix(f"a {p}", name, **{option: v}, **fixed) for v in values] for name, p in cases]
    write(option, rows, ["layout", *(f"{option.replace('_', '-')} {v}" for v in values)], [f"a {p}" for _, p in cases])


def nu(studio: Studio) -> None:
    sweep(studio, "nu", [0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])


def k_min(studio: Studio) -> None:
    sweep(studio, "k_min", [0.0, 0.06, 0.1, 0.14, 0.18, 0.24, 0.3, 0.4, 0.6])


def k_max(studio: Studio) -> None:
    """With nu 0.9, so that the layout enters mostly through the noise at K_max."""
    sweep(studio, "k_max", [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], nu=0.9)


def s(studio: Studio) -> None:
    """The token weight s of the concept's word: first plain text-to-image, then mixed into a layout."""
    values = [-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]
    plain = ["strawberry", "penguin", "tiger"]
    mixed = [("handbag", "watermelon"), ("castle", "strawberry"), ("mug", "panda")]
    rows = [[BLANK] + [studio.text_to_image(f"a {p}", token_weights={p: v}) for v in values] for p in plain]
    rows += [[show(name)] + [studio.mix(f"a {p}", name, token_weights={p: v}) for v in values] for name, p in mixed]
    write("s", rows, ["layout", *(f"s {v:g}" for v in values)], [f"a {p}" for p in [*plain, *(p for _, p in mixed)]])


def text_text(studio: Studio) -> None:
    """The layout comes from a prompt's own denoising; its plain picture stands first."""
    layouts, prompts = ["a car", "a house", "a 3d guitar", "a 3d elephant", "a crown"], PROMPTS[:6]
    rows = [[studio.text_to_image(t)] + [studio.mix(f"a {p}", t) for p in prompts] for t in layouts]
    write("text-text", rows, ["layout alone", *(f"a {p}" for p in prompts)], layouts)


def concepts(studio: Studio) -> None:
    """One plain text-to-image sample of every concept, seed 0, without choosing."""
    names = list(data.concepts())
    pictures = [studio.text_to_image(f"a {name}", steps=30) for name in names]
    across = 12
    rows = [pictures[i : i + across] for i in range(0, len(names), across)]
    rows[-1] += [BLANK] * (across - len(rows[-1]))
    write("concepts", rows, [""] * across)


SHEETS = {
    "hero": hero,
    "mixes": mixes,
    "nu": nu,
    "k_min": k_min,
    "k_max": k_max,
    "s": s,
    "text-text": text_text,
    "concepts": concepts,
}


def main() -> int:
    names = sys.argv[1:] or list(SHEETS)
    for name in names:
        if name not in SHEETS:
            print(f"sheet {name!r} is not known; there are: {', '.join(SHEETS)}", file=sys.stderr)
            return 2
    drawings()
    studio = Studio()
    for name in names:
        SHEETS[name](studio)
    return 0


if __name__ == "__main__":
    sys.exit(main())
