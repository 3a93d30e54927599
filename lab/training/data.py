"""Stage 1: the pictures, and what every later stage draws from them.

    python -m lab.training.data

fetches four emoji sets from npm at pinned versions (`npm` must be installed), rasterises them to 160 x 160 RGBA and
writes lab/training/data/ (about 25 MB, not committed): one WebP per picture and index.json. Takes a minute or two.

In Python: `Pictures` holds them on a device and renders augmented, captioned batches at the model's 128 x 128.
"""

import colorsys
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).parent
DATA = HERE / "data"
SOURCE = 160  # pixels of a stored picture; larger than SIZE, so that zooming in still samples downwards
SIZE = 128  # pixels of a training picture

# Licences: fluent MIT (Microsoft), noto Apache-2.0 (Google), emojibase MIT. All allow redistribution of derivatives.
PACKAGES = {
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "cartoon": "@iconify-json/noto@1.2.9",
    "retro": "@iconify-json/noto-v1@1.2.5",
    "labels": "emojibase-data@17.0.0",
}
STYLES = ("3d", "flat", "cartoon", "retro")  # the word a caption uses for a set
COLOURS = {
    "red": (0.86, 0.10, 0.14), "orange": (0.97, 0.52, 0.08), "yellow": (0.98, 0.82, 0.14), "green": (0.18, 0.66, 0.26),
    "blue": (0.14, 0.40, 0.90), "purple": (0.52, 0.24, 0.76), "pink": (0.97, 0.46, 0.68), "brown": (0.50, 0.30, 0.16),
    "black": (0.13, 0.13, 0.15), "grey": (0.58, 0.58, 0.60),
}  # fmt: skip
AROUND = ("a", "an", "picture", "of", "emoji", "on", "background")  # the other words of `caption`


def concepts(use: str = "concept") -> dict[str, str]:
    """name -> code point of the concepts (or, with use="layout", of the held-out layouts), from concepts.tsv."""
    rows = [line.split("\t") for line in (HERE / "concepts.tsv").read_text().splitlines() if line[0] != "#"]
    return {name: code for name, code, kind in rows if kind == use}


# ---------------------------------------------------------------------------------------------- rasterising


def fetch(package: str, folder: Path) -> Path:
    """Unpacks an npm package below `folder` and returns where."""
    name = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True)
    target = folder / package.replace("/", "_")
    with tarfile.open(folder / name.stdout.split()[-1]) as archive:
        archive.extractall(target, filter="data")
    return target / "package"


def shrink(picture: Image.Image) -> Image.Image:
    """To SOURCE x SOURCE. Alpha is multiplied in before scaling and divided out after, so that the colour of fully
    transparent pixels does not bleed into the edges."""
    rgba = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    planes = [Image.fromarray(rgba[..., i]).resize((SOURCE, SOURCE), Image.Resampling.BOX) for i in range(4)]
    rgba = np.stack([np.asarray(p) for p in planes], axis=-1)
    rgba[..., :3] /= np.maximum(rgba[..., 3:], 1e-4)
    return Image.fromarray((rgba.clip(0, 1) * 255).round().astype(np.uint8), "RGBA")


class IconSet:
    """A set of SVG icons in Iconify's JSON format, looked up by code point through the chars.json of `names`."""

    def __init__(self, package: Path, names: Path):
        self.chars = json.loads((names / "chars.json").read_text())
        self.set = json.loads((package / "icons.json").read_text())

    def render(self, code: str) -> Image.Image | None:
        import resvg_py  # needed by this stage only

        name = self.chars.get(code)
        icon = self.set["icons"].get(self.set.get("aliases", {}).get(name, {}).get("parent", name))
        if icon is None:
            return None
        size = [icon.get(side) or self.set.get(side, 16) for side in ("width", "height")]
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}">{icon["body"]}</svg>'
        return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * SOURCE, height=2 * SOURCE))))


def others(labels: Path) -> dict[str, str]:
    """label -> code point of the emoji beside the concepts: faces, animals, plants, food, places, objects. They teach
    the text encoder more words and the autoencoder more shapes. Labels that share a word with a concept or a held-out
    layout are left out: "tiger face" would be a second tiger."""
    taken = {w for w in concepts() | concepts("layout")} | {"flag", "keycap", "clock", "o’clock", "face", "button"}
    codes = set((concepts() | concepts("layout")).values())
    found = {}
    for entry in sorted(json.loads((labels / "en" / "data.json").read_text()), key=lambda e: e.get("order", 0)):
        code, label = entry["hexcode"].lower().replace("-fe0f", ""), entry["label"].lower()
        words = set(label.replace("-", " ").split())
        if entry.get("group") in (0, 3, 4, 5, 6, 7) and "-" not in code and code not in codes and not words & taken:
            found[label] = code
    return found


def main() -> None:
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        with ThreadPoolExecutor() as pool:
            folders = dict(zip(PACKAGES, pool.map(lambda p: fetch(p, Path(temporary)), PACKAGES.values()), strict=True))
        sets = {
            "flat": IconSet(folders["flat"], folders["flat"]),
            "cartoon": IconSet(folders["cartoon"], folders["cartoon"]),
            "retro": IconSet(folders["retro"], folders["cartoon"]),  # noto's names; its own package has no chars.json
        }

        def render(style: str, code: str) -> Image.Image | None:
            if style != "3d":
                return sets[style].render(code)
            files = [folders["3d"] / "assets" / f"{code}{suffix}.webp" for suffix in ("", "-fe0f")]
            return next((Image.open(f) for f in files if f.exists()), None)

        rows = [(name, code, "concept") for name, code in concepts().items()]
        rows += [(name, code, "layout") for name, code in concepts("layout").items()]
        extra = list(others(folders["labels"]).items())
        random.Random(0).shuffle(extra)
        # Every 20th of the others is never trained on: with the layouts, the held-out set of the autoencoder.
        rows += [(name, code, "held-out" if i % 20 == 0 else "other") for i, (name, code) in enumerate(extra)]
        index = []
        for name, code, use in tqdm(rows, desc="rasterise"):
            for style in STYLES:
                picture = render(style, code)
                if picture is not None:
                    shrink(picture).save(DATA / f"{code}-{style}.webp", lossless=True)
                    index.append({"file": f"{code}-{style}.webp", "name": name, "style": style, "use": use})
    (DATA / "index.json").write_text(json.dumps(index, indent=0))
    print(f"{len(index)} pictures of {len(rows)} emoji in {DATA}")


# -------------------------------------------------------------------------------- augmented, captioned batches


def held_out(row: dict) -> bool:
    """One style of every concept is shown neither to the text encoder nor to the judge, which is measured on it."""
    return row["use"] == "concept" and zlib.crc32(row["name"].encode()) % len(STYLES) == STYLES.index(row["style"])


def caption(name: str, style: str, colour: str | None, background: str | None, rng: random.Random) -> str:
    """What a picture shows, in one of many phrasings; the style is named in a third of them."""

    def a(words: str) -> str:
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    thing = f"{colour} {name}" if colour else name
    phrases = [
        thing,
        a(thing),
        a(thing),
        f"a picture of {a(thing)}",
        f"an emoji of {a(thing)}",
        f"a {style} {thing}",
        f"a {style} {thing}",
        f"a {style} picture of {a(thing)}",
    ]
    phrase = rng.choice(phrases)
    return f"{phrase} on {a(background)} background" if background else phrase


class Pictures:
    """The pictures of the given uses on a device, and batches of them.

    Args:
        uses: which rows of index.json to hold: "concept", "layout", "other", "held-out".
        device: where the pictures stay and batches are made.
    """

    def __init__(self, uses: tuple[str, ...], device: torch.device):
        if not (DATA / "index.json").exists():
            sys.exit("lab/training/data is missing; make it with: python -m lab.training.data")
        self.rows = [row for row in json.loads((DATA / "index.json").read_text()) if row["use"] in uses]
        with ThreadPoolExecutor() as pool:
            arrays = list(pool.map(lambda r: np.asarray(Image.open(DATA / r["file"]).convert("RGBA")), self.rows))
        self.rgba = torch.from_numpy(np.stack(arrays)).to(device).permute(0, 3, 1, 2)  # (rows, 4, SOURCE, SOURCE) uint8
        self.device = device

    def premultiplied(self, rows: Tensor) -> Tensor:
        rgba = self.rgba[rows.to(self.device)].float() / 255
        return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)

    def plain(self, rows: Tensor) -> Tensor:
        """(B, 3, SIZE, SIZE) in [-1, 1]: unaugmented, on white."""
        rgba = F.interpolate(self.premultiplied(rows), (SIZE, SIZE), mode="bilinear", antialias=True)
        return (rgba[:, :3] + 1 - rgba[:, 3:]) * 2 - 1

    def batch(self, rows: Tensor, rng: random.Random, generator: torch.Generator, tint: float, backdrop: float):
        """Augmented pictures of the given rows.

        Args:
            rows: (B,) row numbers.
            rng, generator: the sources of every random choice; generator on the CPU.
            tint, backdrop: probability of recolouring a picture, of a coloured background.

        Returns (pictures (B, 3, SIZE, SIZE) in [-1, 1], captions, attributes): attributes is a list of
        (name, style, colour or None, background or None).
        """
        n = len(rows)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator) * (high - low) + low

        rgba = self.premultiplied(rows)

        # Rotation, scale, mild anisotropy, flip, shift, and a smooth warp: one sampling grid.
        angle, scale = uniform(-0.24, 0.24, n), uniform(1.0, 1.3, n)
        stretch = uniform(-0.06, 0.06, n).exp()
        flip = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
        cos, sin = angle.cos() * scale, angle.sin() * scale
        shift = uniform(-0.06, 0.06, n, 2)
        theta = torch.stack([cos * stretch * flip, -sin, shift[:, 0], sin * flip, cos / stretch, shift[:, 1]], 1)
        # Sampled at twice the size and averaged 2 x 2, which antialiases the bilinear lookup.
        grid = F.affine_grid(theta.view(n, 2, 3).to(self.device), (n, 4, 2 * SIZE, 2 * SIZE), align_corners=False)
        warp = F.interpolate(uniform(-0.04, 0.04, n, 2, 4, 4).to(self.device), (2 * SIZE, 2 * SIZE), mode="bicubic")
        rgba = F.grid_sample(rgba, grid + warp.permute(0, 2, 3, 1), align_corners=False)
        rgba = F.avg_pool2d(rgba, 2)  # (B, 4, SIZE, SIZE)
        colour, alpha = rgba[:, :3], rgba[:, 3:]

        tints = [rng.choice(list(COLOURS)) if rng.random() < tint else None for _ in range(n)]
        backdrops = [rng.choice([c for c in COLOURS if c != t]) if rng.random() < backdrop else None for t in tints]

        def jitter(x: float, d: float) -> float:
            return min(1.0, max(0.0, x + rng.uniform(-d, d)))

        def jittered(name: str) -> tuple[float, float, float]:
            h, s, v = colorsys.rgb_to_hsv(*COLOURS[name])
            return colorsys.hsv_to_rgb((h + rng.uniform(-0.02, 0.02)) % 1, jitter(s, 0.08), jitter(v, 0.06))

        # A tint maps luminance to a ramp black - colour - white and keeps a quarter of the original colour.
        ramp = torch.tensor([jittered(t) if t else (0.0, 0.0, 0.0) for t in tints], device=self.device)
        ramp = ramp[:, :, None, None]
        tinted = torch.tensor([t is not None for t in tints], device=self.device)[:, None, None, None]
        luma = (colour * torch.tensor([0.299, 0.587, 0.114], device=self.device)[:, None, None]).sum(1, keepdim=True)
        luma = luma / alpha.clamp(min=1e-3)
        knee = 0.6
        ramped = torch.where(luma < knee, ramp * luma / knee, ramp + (1 - ramp) * (luma - knee) / (1 - knee))
        colour = torch.where(tinted, 0.75 * ramped.clamp(0, 1) * alpha + 0.25 * colour, colour)

        behind = torch.tensor([jittered(b) if b else (1.0, 1.0, 1.0) for b in backdrops], device=self.device)
        pictures = colour + (1 - alpha) * behind[:, :, None, None]
        facts = [(self.rows[r]["name"], self.rows[r]["style"]) for r in rows.tolist()]
        attributes = [(name, style, t, b) for (name, style), t, b in zip(facts, tints, backdrops, strict=True)]
        return pictures * 2 - 1, [caption(*a, rng) for a in attributes], attributes


if __name__ == "__main__":
    main()
