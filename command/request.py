"""What a command asks for, with the files that it names: read and checked before a checkpoint is loaded."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from command import machine, noise, options, pictures, sheet
from command.options import MIXING, PICTURE


@dataclass(frozen=True)
class Request:
    """A command's request. request["nu"] is an option as it was given, or its general default.

    Attributes:
        given: the options that were typed, over those of the picture that is made again; others are absent.
        before: the metadata of that picture; empty where none is made again.
        seeds: of the pictures to make.
        paths: of these pictures, and last of their contact sheet if one is asked for.
        layout: the layout's picture, None for a layout prompt.
        noise: eps from a file, None where it is drawn.
    """

    given: dict
    before: dict
    seeds: range
    paths: list[Path]
    layout: pictures.Layout | None
    noise: noise.NoiseFile | None

    def __getitem__(self, name: str) -> object:
        return self.given.get(name, options.DEFAULTS[name])

    def mixing(self) -> dict:
        """Those given that say how to mix."""
        return {name: value for name, value in self.given.items() if name in options.names(MIXING)}

    def loading(self) -> dict:
        """The arguments of weights.load, but for the source of an embedded checkpoint."""
        device = machine.choose_device(self["device"])
        source = {} if self["weights"] is None else {"source": self["weights"]}
        return source | {
            "device": device,
            "dtype": machine.choose_dtype(self["dtype"], device),
            "unet": self["unet"],
            "vae": self["vae"],
            "ema": not self["no_ema"],
            "prediction": self["prediction"],
            "upcast_attention": {"auto": None, "on": True, "off": False}[self["upcast_attention"]],
            "vae_dtype": machine.choose_dtype(self["vae_dtype"], device),
            "free_after_use": True,
        }

    def noise_of(self, drawn: Callable[[], Tensor]) -> noise.Known:
        """The noise of the pictures: eps from the file where one is given, otherwise, and for samplers that need more,
        as it is drawn from the seeds. Raises ValueError for a file with too few rows."""
        eps = drawn()  # (B, 4, H, W), drawn in any case, so that the later draws are the same
        if self.noise:
            eps = self.noise.rows(self["noise_row"], eps.shape).to(eps.device)
        return noise.Known(eps, drawn)

    def tell(self, *lines: object) -> None:
        """Prints the lines, unless --quiet was given."""
        if not self["quiet"]:
            for line in lines:
                print(line)

    def cut_off(self, unread: Callable[[str], str], length: int) -> Iterator[str]:
        """What to say of the prompts that are longer than `length` tokens; unread(text) is what lies beyond them."""
        for name in ("prompt", "layout_prompt", "negative"):
            if text := unread(self[name] or ""):
                yield f"{name}: beyond {length} tokens, cut off: {machine.one_line(text)}"

    def check_checkpoint(self, identity: dict[str, str]) -> None:
        """Raises ValueError when the picture to make again was made with a checkpoint of another identity."""
        recorded = self.before.get("checkpoint", identity)
        if not isinstance(recorded, dict):
            raise ValueError(f"the picture's checkpoint is {machine.shown(recorded)}; --again needs a magicmix picture")
        if other := [part for part, digest in recorded.items() if digest != identity.get(part)]:
            right = "give the one that it was made with, by --weights, --unet and --vae"
            raise ValueError(f"the picture was made with another checkpoint ({', '.join(other)} differ); {right}")

    def check_nothing_is_lost(self, embedded: Path) -> None:
        """Raises ValueError when a file that is read, or another that is written, would be written over, under whatever
        name. The picture that is made again may be: it can be made again. `embedded`: the embedded checkpoint."""
        inputs = {name: self.given[name] for name in options.places(PICTURE) if name in self.given}
        taken = {}
        for name, path in (inputs | {"keep_noise": self["keep_noise"]}).items():  # what is read comes first
            if path is not None:
                is_piped = name == "layout" and str(path) == "-"
                taken.setdefault(pictures.identity(0 if is_piped else path), name)
        folders = {name: path for name, path in ({"weights": embedded} | inputs).items() if os.path.isdir(path)}
        for path in self.paths:
            for name, folder in folders.items():
                if path.exists() and path.resolve().is_relative_to(Path(folder).resolve()):
                    lost = f"output {str(path)!r} is a file of {name} {str(folder)!r}, which would be lost"
                    raise ValueError(f"{lost}; give another name")
        for name, path in [("output", path) for path in self.paths] + [("keep_noise", self["keep_noise"] or "")]:
            other = taken.get(pictures.identity(path), name)
            if other != name:
                both = f"{name} {str(path)!r} is the same file as {other} {self.given[other]!r}"
                raise ValueError(f"{both}, which would be lost; give another name")

    def metadata(self, row: int, mixing: options.Options, models) -> dict:
        """What the picture of the seed in that row carries: all that --again needs. `mixing` and `models` are those
        that it was made with."""
        parameters = {name: self.given[name] for name in options.names(PICTURE) if name in self.given}
        parameters |= {name: value for name, value in mixing.only(MIXING).items() if value is not None}
        parameters |= {"seed": self.seeds[row], "dtype": machine.dtype_name(models.dtype)}
        if "weights" in parameters and not os.path.isabs(self["weights"]) and os.path.exists(self["weights"]):
            parameters["weights"] = os.path.join(".", self["weights"])  # else, from elsewhere, it could be a hub id
        digests = {}
        if self.layout:
            digests["layout_sha256"] = self.layout.sha256
        if self.noise:
            parameters["noise_row"] = self["noise_row"] + row
            digests["noise_sha256"] = self.noise.sha256
        return {"parameters": parameters, "checkpoint": models.identity, "versions": machine.versions()} | digests

    def save(self, made: list[Image.Image], mixing: options.Options, models) -> None:
        """Writes the pictures, one per seed, and their contact sheet if one is asked for, and prints the paths."""
        for row, picture in enumerate(made):
            pictures.save(picture, self.paths[row], self.metadata(row, mixing, models))
            self.tell(self.paths[row])
        if self["sheet"]:
            pictures.save(sheet.contact_sheet(made, [f"seed {seed}" for seed in self.seeds]), self.paths[-1], None)
            self.tell(self.paths[-1])


def check_recorded(name: str, path: str) -> None:
    """Raises ValueError or FileNotFoundError for a path in the picture that is made again which leads nowhere here."""
    if name == "layout" and path == "-":
        raise ValueError("the picture's layout came through standard input; give the layout with --layout")
    is_hub_id = name == "weights" and path.partition("@")[0].count("/") == 1 and not path.startswith(".")
    if not is_hub_id and not os.path.exists(path):
        folder = "" if os.path.isabs(path) else "; it is relative to the folder in which the picture was made"
        right = f"give it with --{name}" + " or go there" * bool(folder)
        raise FileNotFoundError(f"{name} {machine.shown(path)}, named in the picture, does not exist{folder}; {right}")


def read(asked: dict, embedded: Path) -> Request:
    """Reads and checks all that can be before a checkpoint is there.

    Args:
        asked: the options that were typed.
        embedded: the folder of the embedded checkpoint.

    Raises ValueError or OSError that names the first thing that is wrong.
    """
    before = pictures.read_metadata(asked["again"]) if "again" in asked else {}
    given = options.recall(before["parameters"], asked) if before else asked
    options.check(given)
    if "prompt" not in given:
        raise ValueError("the content prompt is missing; give it as the first argument")
    if ("layout" in given) == ("layout_prompt" in given):
        raise ValueError("give one of --layout IMAGE and --layout-prompt TEXT")
    for name in options.places(PICTURE):
        if name in given and name not in asked:
            check_recorded(name, given[name])
    layout = None
    if "layout" in given:
        is_piped = str(given["layout"]) == "-"
        layout = pictures.piped_layout() if is_piped else pictures.open_layout(given["layout"])
    o = options.DEFAULTS | given
    seeds = range(o["seed"], o["seed"] + o["count"])
    request = Request(
        given,
        before,
        seeds=seeds,
        paths=pictures.output_paths(o["output"], seeds, o["sheet"]),
        layout=layout,
        noise=noise.read(given["noise"]) if "noise" in given else None,
    )
    for name, file in (("layout", request.layout), ("noise", request.noise)):
        if file and name not in asked and before.get(f"{name}_sha256", file.sha256) != file.sha256:
            raise ValueError(f"{name} {given[name]!r} has changed; give the file to use with --{name}")
    if "keep_noise" in given:
        noise.check_target(given["keep_noise"])
    request.check_nothing_is_lost(embedded)
    return request
