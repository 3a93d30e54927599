"""The page of a trace: one HTML file that needs nothing else, with every step's pictures, numbers and word maps.

`build` decodes the latents, gathers all that the page shows as plain data, and fills template/page.html with it. The
style and the scripts stand inside the file; its content security policy lets nothing else run and nothing be fetched.
"""

import base64
import dataclasses
import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import jinja2
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

import magicmix
from lab.explain.source import listing
from lab.explain.trace import Stop, Trace
from scheduler import Schedule
from weights import Checkpoint

TEMPLATES = Path(__file__).parent / "template"
STYLES = ("base.css", "page.css")
SCRIPTS = ("dom.js", "data.js", "pictures.js", "source.js", "equations.js", "words.js", "transport.js", "main.js")
# 50 steps at 512 px have some 340 pictures. Were all of them noise, which compresses badly, they would take 23 MB.
LARGEST = 288  # pixels of a picture's longer side
WHOLE = dict(quality=92, subsampling=0)  # of JPEG: a picture as it is, with colour at full size
SHRUNK = dict(quality=85, subsampling=2)  # one that was scaled down to LARGEST
LARGEST_MAP = 32  # cells of a word map's longer side; the largest maps of Stable Diffusion have 64

HALVES = ("cond", "uncond")
NORMS = ("x", "x_content", "layout", "x0", "e_uncond", "e_cond", "e")  # of a step's tensors, on the page


def build(sides: list[tuple[Trace, Checkpoint]], every: int = 1, row: int = 0, quiet: bool = False) -> str:
    """The page of one trace, or of two side by side, as text.

    Args:
        sides: the traces, each with the checkpoint that it was made with.
        every: show every N-th step only, besides the first and the last of each phase.
        row: which picture of a batch is shown.
        quiet: no progress bar.

    Raises ValueError for a trace that lacks what the page shows.
    """
    from tqdm import tqdm

    gallery = Gallery()
    try:
        parts = [Side(trace, models, every, row, gallery) for trace, models in sides]
    except KeyError as error:
        raise ValueError(f"the trace lacks {error}, so there is no page of it; record it anew") from error
    with tqdm(total=sum(part.count() for part in parts), disable=quiet, unit="picture", desc="decoding") as gallery.bar:
        data = [part.data() for part in parts]
    content = {
        "sides": data,
        "positions": positions([part.shown for part in parts]),
        "source": {name: listing(getattr(magicmix, name)) for name in ("mix", "trajectory")},
        "pictures": gallery.encoded,
    }
    return render(content)


def positions(sides: list[list[Stop]]) -> list[dict]:
    """Where the slider can stand: every (run, k) of any side, in order of execution."""
    keys = {(stop.run, stop.k) for side in sides for stop in side}
    return [{"run": run, "k": k} for run, k in sorted(keys, key=lambda key: (key[0] == "mix", -key[1]))]


def render(content: dict) -> str:
    """The file: the template with the data, the style and the scripts in it."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    style = "\n".join((TEMPLATES / name).read_text() for name in STYLES)
    script = "\n".join((TEMPLATES / name).read_text() for name in SCRIPTS)
    policy = f"default-src 'none'; img-src data:; style-src {digest(style)}; script-src {digest(script)}"
    page = templates.get_template("page.html")
    return page.render(
        data=content, style=style, script=script,
        policy=policy, sides=content["sides"],
    )  # fmt: skip


def digest(text: str) -> str:
    """How a content security policy names an inline script or style: by the hash of its text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# --------------------------------------------------------------------------------------------------------- pictures


class Gallery:
    """The page's pictures, each once: a latent that several steps share is decoded and stored once."""

    def __init__(self):
        self.encoded: list[str] = []  # JPEG in base64
        self.known: dict[str, int] = {}  # what it was made of -> its place in `encoded`
        self.decoded: dict[str, Image.Image] = {}  # those of one step
        self.bar = None  # the progress bar, which counts the latents that were asked for

    def decode(self, models: Checkpoint, x: Tensor) -> Image.Image:
        """The picture of a latent (4, H, W)."""
        key = self.key(models, x)
        if key not in self.decoded:
            self.decoded[key] = magicmix.decode(models, x[None].to(models.device))[0]
        return self.decoded[key]

    def of_latent(self, models: Checkpoint, x: Tensor) -> int:
        """The place of the picture of a latent (4, H, W)."""
        self.bar.update()
        return self.add(self.key(models, x), lambda: self.decode(models, x))

    def of_difference(self, models: Checkpoint, x: Tensor, y: Tensor) -> tuple[int, int]:
        """The place of the picture |x - y|, the difference of the two decoded pictures, black where they are equal; and
        how many times it was brightened."""
        key = f"{self.key(models, x)} {self.key(models, y)}"
        apart, gain = brightened(ImageChops.difference(self.decode(models, x), self.decode(models, y)))
        return self.add(key, lambda: apart), gain

    def key(self, models: Checkpoint, x: Tensor) -> str:
        return f"{models.identity.get('vae')} {hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()}"

    def add(self, key: str, make: Callable[[], Image.Image]) -> int:
        if key not in self.known:
            self.known[key] = len(self.encoded)
            self.encoded.append(base64.b64encode(jpeg(make())).decode())
        return self.known[key]


def brightened(picture: Image.Image) -> tuple[Image.Image, int]:
    """A dark picture times a whole number, at most 16, by which hardly any of its values is clipped; and the number."""
    ninety_nine = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float().quantile(0.99).item()
    gain = int(min(16, max(1, 255 // max(1, ninety_nine))))
    return picture.point(lambda value: value * gain), gain


def jpeg(picture: Image.Image) -> bytes:
    """A picture as the page holds it: no side longer than LARGEST, in JPEG."""
    file = io.BytesIO()
    small = picture.copy()
    small.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)  # makes no picture larger
    # Not `optimize`: Pillow then guesses a buffer, which decoded noise overflows.
    small.save(file, "JPEG", **(WHOLE if small.size == picture.size else SHRUNK))
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------- one trace


class Side:
    """What the page shows of one trace. Raises KeyError for a tensor that is not there, ValueError for one that cannot
    be."""

    def __init__(self, trace: Trace, models: Checkpoint, every: int, row: int, gallery: Gallery):
        self.trace, self.models, self.row, self.gallery = trace, models, row, gallery
        facts = trace.facts
        kind = dataclasses.replace(models.schedule, prediction_type=facts["prediction_type"])
        self.schedule = Schedule(kind, facts["T"])
        rows = len(trace.tensors["eps"])
        if row >= rows:
            raise ValueError(f"row {row} is not in the trace; it has {rows}")
        self.check()
        self.shown = [stop for run in ("layout", "mix") for stop in chosen(self.of_run(run), every)]

    def check(self) -> None:
        """Raises KeyError or ValueError unless every tensor that is needed is there, in its shape."""
        facts, tensors = self.trace.facts, self.trace.tensors
        latents, length = tensors["eps"].shape, len(tensors["prompt/ids"])
        for stop in self.trace.stops:
            names = {"x"} if stop.phase == "start" else {"x", "x_content", "x0", "e", "e_cond"}
            names |= {"layout"} if stop.phase == "mixing" else set()
            for name in names:
                if tensors[f"{stop.name}/{name}"].shape != latents:
                    raise ValueError(f"{stop.name}/{name} is not of shape {tuple(latents)}")
        called = [stop for stop in self.trace.stops if stop.phase != "start"]
        halves = [half for half in HALVES if called and f"{called[0].name}/e_{half}" in tensors]
        needed = {f"{stop.name}/maps/{half}/{layer}" for stop in called for half in halves for layer in facts["layers"]}
        for name in sorted(needed):
            shape = tensors[name].shape
            if len(shape) != 4 or shape[0] != latents[0] or shape[3] != length or not tensors[name].is_floating_point():
                raise ValueError(f"{name} is not of shape ({latents[0]}, H, W, {length})")
        for text, words in facts["words"].items():
            if len(tensors[f"{text}/ids"]) != length or max([0, *(i for _, at in words for i in at)]) >= length:
                raise ValueError(f"the words of {text} are not within its {length} tokens")

    def of_run(self, run: str) -> list[Stop]:
        return [stop for stop in self.trace.stops if stop.run == run]

    def latent(self, stop: Stop, name: str) -> Tensor | None:
        """A latent of a step (4, H, W), float32; None where there is none."""
        x = self.trace.get(stop, name)
        return None if x is None else x[self.row].float()

    def count(self) -> int:
        """How many latents are shown, for the progress bar: those of the steps, the layout's and the result's."""
        return sum(len(self.latents(stop)) for stop in self.shown) + 2

    def latents(self, stop: Stop) -> dict[str, Tensor]:
        """What is decoded at a step, by name: its own latents, and the clean ones that each prediction means."""
        names = ("x",) if stop.phase == "start" else ("x", "x_content", "layout", "x0")
        found = {name: x for name in names if (x := self.latent(stop, name)) is not None}
        if stop.phase != "start":
            before = self.latent(Stop(stop.run, stop.k + 1, ""), "x")
            for half in ("uncond", "cond"):
                if (e := self.latent(stop, f"e_{half}")) is not None:
                    found[f"x0_{half}"] = self.schedule.predict(before, e, stop.k + 1)[0]
        return found

    def pictures(self, stop: Stop) -> dict[str, int]:
        """The places of a step's pictures, by name."""
        latents = self.latents(stop)
        self.gallery.decoded.clear()
        places = {name: self.gallery.of_latent(self.models, x) for name, x in latents.items()}
        if stop.phase == "mixing":
            apart = self.gallery.of_difference(self.models, latents["x"], latents["x_content"])
            places["apart"], places["gain"] = apart
        if stop.phase == "start" and stop.run == "mix":
            places["layout"] = places["x"]  # x_{K_max} = layout_{K_max}
        return places

    def data(self) -> dict:
        """All of it, as plain data."""
        facts, tensors = self.trace.facts, self.trace.tensors
        parameters = facts["parameters"]
        is_picture = "layout_x0" in tensors
        end_of_layout = tensors["layout_x0"][self.row] if is_picture else self.clean_layout()
        layout = self.gallery.of_latent(self.models, end_of_layout)
        return {
            "parameters": {name: value for name, value in parameters.items() if value not in (None, "", {})},
            "prompt": parameters.get("prompt") or "",
            "layoutPrompt": None if is_picture else parameters.get("layout_prompt") or "",
            "T": facts["T"],
            "Kmax": facts["K_max"],
            "Kmin": facts["K_min"],
            "nu": parameters.get("nu"),
            "guidance": parameters.get("guidance"),
            "sampler": parameters.get("sampler", "ddim"),
            "eta": parameters.get("eta", 0.0),
            "prediction": facts["prediction_type"],
            "values": tensors["eps"][self.row].numel(),
            "size": [side * self.models.vae.config.factor for side in tensors["eps"].shape[2:]],
            "layoutPicture": layout,
            "result": self.gallery.of_latent(self.models, self.latent(self.trace.stops[-1], "x")),
            "stops": [self.stop(stop) for stop in self.shown],
            "maps": {run: maps for run in ("layout", "mix") if (maps := self.maps(run))},
        }

    def clean_layout(self) -> Tensor:
        """The clean picture of a layout prompt, as predicted at the end of its run, which goes to K_min only."""
        last = self.of_run("layout")[-1]
        x0 = self.latent(last, "x0")
        return self.latent(last, "x") if x0 is None else x0

    def stop(self, stop: Stop) -> dict:
        """A step's numbers and the places of its pictures."""
        latents = {name: x for name in NORMS if (x := self.latent(stop, name)) is not None}
        norms = {name: x.norm().item() for name, x in latents.items()}
        if "e_uncond" in latents:
            norms["e_apart"] = (latents["e_cond"] - latents["e_uncond"]).norm().item()
        if stop.phase == "mixing":
            norms["x_apart"] = (latents["x"] - latents["x_content"]).norm().item()
        before = min(stop.k + 1, self.schedule.T)
        return {
            "run": stop.run,
            "k": stop.k,
            "phase": stop.phase,
            "t": self.schedule.t[before],
            "abar": self.schedule.abar(stop.k).item(),
            "abarBefore": self.schedule.abar(before).item(),
            "norms": {name: float(f"{norm:.5g}") for name, norm in norms.items()},
            "pictures": self.pictures(stop),
        }

    # ------------------------------------------------------------------------------------------------- its word maps

    def maps(self, run: str) -> dict | None:
        """The word maps of a run; None where nothing was recorded.

        Per half: the groups of columns, and per shown step, and last averaged over all steps, a map of each group for
        each size of layer and for all together. A map is bytes, 255 at its peak; `peaks` has the peaks.
        """
        steps = [stop for stop in self.of_run(run) if stop.phase != "start"]
        layers = self.trace.facts["layers"]
        if not steps or not layers:
            return None
        halves = [half for half in HALVES if self.trace.get(steps[0], f"e_{half}") is not None]
        shown = [stop for stop in self.shown if stop.run == run and stop.phase != "start"]
        found = {}
        for half in halves:
            groups = self.groups(run, half)
            columns = torch.zeros(len(self.trace.tensors["prompt/ids"]), len(groups))  # (L, groups)
            for i, group in enumerate(groups):
                columns[group["tokens"], i] = 1.0  # the columns of a word's tokens are added: what it gets in all
            total: dict[str, Tensor] = {}
            kept = {}
            for stop in steps:
                of_step = self.by_size(stop, half, columns)
                total = {size: total.get(size, 0) + m / len(steps) for size, m in of_step.items()}
                if stop in shown:
                    kept[stop] = of_step
            rows = [*(kept[stop] for stop in shown), total]
            found[half] = {"groups": groups, "sizes": [[*m.shape[1:], name] for name, m in total.items()]}
            found[half] |= packed([m for row in rows for m in row.values()])
        return {"steps": [stop.k for stop in shown], "halves": found}

    def by_size(self, stop: Stop, half: str, columns: Tensor) -> dict[str, Tensor]:
        """The maps (groups, H_l, W_l) of a step by size, each the mean of the layers that have it; "all" is the mean of
        all layers, each brought to the largest size bilinearly."""
        layers: dict[str, list[Tensor]] = {}
        for layer in self.trace.facts["layers"]:
            m = self.trace.tensors[f"{stop.name}/maps/{half}/{layer}"][self.row].float() @ columns  # (H_l, W_l, groups)
            m = m.permute(2, 0, 1)
            layers.setdefault("x".join(map(str, m.shape[1:])), []).append(shrunk(m))
        largest = max((m[0].shape[1:] for m in layers.values()), key=torch.Size.numel)
        every = [
            F.interpolate(m[None], size=largest, mode="bilinear", align_corners=False)[0]
            for same in layers.values()
            for m in same
        ]
        return {"all": torch.stack(every).mean(dim=0)} | {
            name: torch.stack(m).mean(dim=0) for name, m in layers.items()
        }

    def groups(self, run: str, half: str) -> list[dict]:
        """The columns of a half's maps in groups: each word of the run's prompt, the start token, and the end token
        with the padding. In the unconditional half the negative prompt stands there: its words come too, and at the
        places of the prompt's words whatever it has there."""
        facts, tensors = self.trace.facts, self.trace.tensors
        text = "layout_prompt" if run == "layout" else "prompt"
        read = text if half == "cond" else "negative"  # what this half reads
        length = len(tensors[f"{read}/ids"])
        s = tensors[f"{read}/weights"]
        own = facts["words"][read]
        end = max((place for _, places in own for place in places), default=0) + 1
        there = {place: word for word, places in own for place in places}
        groups = []
        if half == "uncond":
            for word, places in facts["words"][text]:
                what = " ".join(dict.fromkeys(there.get(place, "padding") for place in places))
                groups.append({"kind": "place", "word": word, "tokens": places, "there": what})
        groups += [{"kind": "word", "word": word, "tokens": places} for word, places in own]
        groups.append({"kind": "start", "word": "start token", "tokens": [0]})
        groups.append({"kind": "end", "word": "end and padding", "tokens": list(range(end, length))})
        return [
            group | {"s": float(f"{s[group['tokens'][0]].item():.6g}") if group["tokens"] else 1.0} for group in groups
        ]


def chosen(stops: list[Stop], every: int) -> list[Stop]:
    """Every N-th step of a run, and the first and the last of each phase."""
    last = len(stops) - 1
    changes = [i for i in range(last) if stops[i].phase != stops[i + 1].phase]  # the last of a phase
    edges = {0, last, *changes, *(i + 1 for i in changes)}
    return [stop for i, stop in enumerate(stops) if i in edges or (last - i) % every == 0]


def shrunk(m: Tensor) -> Tensor:
    """A map (groups, H, W), averaged down until no side is longer than LARGEST_MAP."""
    factor = -(-max(m.shape[1:]) // LARGEST_MAP)
    return m if factor == 1 else F.avg_pool2d(m[None], factor, ceil_mode=True, count_include_pad=False)[0]


def packed(maps: list[Tensor]) -> dict:
    """Maps (groups, H_l, W_l) one after another: `cells`, their bytes in base64, and `peaks`, what 255 stands for in
    each."""
    peaks = torch.cat([m.flatten(1).amax(dim=1) for m in maps])
    cells = [(m / m.flatten(1).amax(dim=1)[:, None, None].clamp(min=1e-30) * 255).round().byte() for m in maps]
    content = b"".join(m.numpy().tobytes() for m in cells)
    return {"peaks": [float(f"{p:.5g}") for p in peaks.tolist()], "cells": base64.b64encode(content).decode()}
