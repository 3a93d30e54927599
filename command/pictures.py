"""Pictures in files: the layout that is read, the mix that is written, and the parameters in it."""

import contextlib
import hashlib
import io
import json
import os
import struct
import sys
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from command import gallery, machine, options
from command.colours import to_srgb

# Formats that are decoded in this process; Pillow would hand others (EPS) to another program.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA")
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")  # the brands of phones' pictures
MAX_PIPED = 1 << 28  # bytes; a picture of 89 million pixels has as many, uncompressed
MAX_TEXT = 1 << 18  # characters of metadata; of a prompt, some hundreds are read


def must_be_file(path: Path, what: str, right: str) -> None:
    """Raises FileNotFoundError or ValueError; a pipe or a device could be read for ever."""
    if not path.exists():
        raise FileNotFoundError(f"{what} {str(path)!r} does not exist; {right}")
    if not path.is_file():
        raise ValueError(f"{what} {str(path)!r} cannot be read: it is not a file; {right}")


# ------------------------------------------------------------------------------------------------------ the layout


class Layout(NamedTuple):
    """A layout's picture file."""

    picture: Image.Image  # RGB
    sha256: str  # of the file
    is_animated: bool  # it holds more pictures than this, the first one
    colours: str  # what was done to its colours; "" for nothing


def open_layout(path: str | Path) -> Layout:
    """Reads a picture file. Raises FileNotFoundError, or ValueError for anything but a picture that `to_rgb` takes, of
    fewer than 89 million pixels (Pillow's bound against decompression bombs). HEIC is read where pillow-heif is
    installed."""
    path = Path(path)
    must_be_file(path, "layout", "give a picture file")
    with readable(f"layout {str(path)!r}"), path.open("rb") as file:
        return read_layout(file)


def piped_layout() -> Layout:
    """Reads a picture from standard input. Raises ValueError as `open_layout` does, and for more than MAX_PIPED
    bytes."""
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("layout '-' is standard input, which is not there; pipe a picture into the command")
    data = sys.stdin.buffer.read(MAX_PIPED + 1)
    if len(data) > MAX_PIPED:
        raise ValueError(f"layout '-', standard input, has more than {MAX_PIPED:,} bytes; give it as a file")
    with readable("layout '-', standard input,"):
        return read_layout(io.BytesIO(data))


def read_layout(file: BinaryIO) -> Layout:
    """The picture in an open file."""
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    with open_pixels(file) as opened:
        picture, colours = to_rgb(opened)
        return Layout(picture, digest, getattr(opened, "is_animated", False), colours)


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """Within it, whatever Pillow raises becomes a ValueError that begins with `what`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as "corrupt EXIF data"
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except UnidentifiedImageError:
        raise ValueError(f"{what} is not a readable picture; use {', '.join(FORMATS)}") from None
    except ImportError:
        way_out = "pip install pillow-heif lets it be read, or save it as PNG or JPEG"
        raise ValueError(f"{what} is HEIC; {way_out}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"is too large ({str(error).partition(',')[0]})"
        raise ValueError(f"{what} {reason}; scale it down to fewer than 89 million pixels") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise whatever their parsing of a broken file trips over
        reason = str(error) or type(error).__name__
        raise ValueError(f"{what} is not a readable picture ({reason}); save it anew, as PNG") from error


def open_pixels(file: BinaryIO) -> Image.Image:
    """Opens a picture file. Raises UnidentifiedImageError for a format that is not read, ImportError for HEIC without
    pillow-heif, and what Pillow raises for a broken file."""
    file.seek(0)
    if is_heic(file.read(64)):
        import pillow_heif

        pillow_heif.register_heif_opener()
        return Image.open(file, formats=("HEIF",))
    try:
        return Image.open(file, formats=FORMATS)
    except ValueError as error:
        if "MAX_TEXT_CHUNK" not in str(error):
            raise
    # A PNG with a text or a profile of more than 1 MB, which Pillow passes over only together with broken chunks.
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        return Image.open(file, formats=FORMATS)
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def is_heic(start: bytes) -> bool:
    """Whether a file begins as HEIC does (ISO 23008-12): with a box "ftyp" that names a brand of it."""
    brands = {start[i : i + 4] for i in range(8, min(int.from_bytes(start[:4], "big"), len(start)), 4)}
    return start[4:8] == b"ftyp" and not brands.isdisjoint(HEIC)


def to_rgb(picture: Image.Image) -> tuple[Image.Image, str]:
    """A picture as RGB, and what was done to its colours, "" for nothing: EXIF rotation is applied, 16-bit greys are
    scaled to 8 bits, CMYK and palettes are converted, colour profiles are converted to sRGB, and transparency is laid
    on white. Raises ValueError for other pixels than those of 8 or 16 bits."""
    picture = ImageOps.exif_transpose(picture)
    profile = picture.info.get("icc_profile", b"")  # None for one that Pillow cannot read
    if not all(picture.size):
        raise ValueError("it has no pixels")
    if picture.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    if picture.mode in ("I", "F", "LAB"):
        raise ValueError(f"its pixels are of the kind {picture.mode}")
    picture, colours = to_srgb(picture, profile)
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"), colours


def as_layout(given: Tensor | Image.Image | Path | str, size: tuple[int, int]) -> Tensor | str:
    """A layout as it is given in Python -> pictures (1 or B, 3, H, W) in [-1, 1], or a prompt.

    A PIL picture, or that in the file of a Path, is fitted to `size` = (height, width). A tensor has its own size. A
    str is a prompt. Raises TypeError for any other object, FileNotFoundError for a Path to nothing, and ValueError for
    what is no picture and for a str that names a file.
    """
    if isinstance(given, Path):
        options.check({"layout": given})
        return fit(open_layout(given).picture, size)
    if isinstance(given, Image.Image):
        with readable("layout"):
            return fit(to_rgb(given)[0], size)
    if isinstance(given, Tensor):
        check_pixels(given)
    elif not isinstance(given, str):
        right = "a Path or a PIL picture, a tensor (1 or B, 3, height, width) in [-1, 1], or a prompt"
        raise TypeError(f"layout is of the type {type(given).__name__}; give {right}")
    elif Path(given).suffix and os.path.isfile(given):
        name = machine.shown(given)
        right = f"give the picture as Path({name}), on the command line with --layout"
        raise ValueError(f"layout {name} is the name of a file, and as a str it would be a prompt; {right}")
    else:
        options.check({"layout_prompt": given})
    return given


def check_pixels(layout: Tensor) -> None:
    """Raises ValueError unless a tensor is pictures (B, 3, height, width) of floating-point numbers, about -1 to 1."""
    right = "give (1 or B, 3, height, width) of float32 in [-1, 1], as fit() makes it"
    is_plain = layout.layout is torch.strided and not layout.is_meta
    if layout.ndim != 4 or layout.shape[1] != 3 or not layout.numel() or not layout.is_floating_point() or not is_plain:
        raise ValueError(f"layout is {tuple(layout.shape)} of {layout.dtype} on {layout.device}; {right}")
    largest = layout.float().abs().amax().item()
    if not largest <= 2:  # NaN is not; resampling overshoots 1; 0..255 is far above
        raise ValueError(f"layout has values of up to {largest:g}; {right}")


def fit(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """A picture as (1, 3, H, W) in [-1, 1]: resized to cover `size` = (height, width) and centre-cropped to it."""
    pixels = np.array(ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


def changes(layout: Layout | None, size: tuple[int, int]) -> Iterator[str]:
    """What is done to a layout's picture, if there is one, on its way to `size` = (height, width)."""
    if layout and layout.is_animated:
        yield "layout: it holds more than one picture; the first is used"
    if layout and layout.colours:
        yield f"layout: {layout.colours}"
    if layout and layout.picture.size != size[::-1]:
        before, after = (f"{width}x{height}" for width, height in (layout.picture.size, size[::-1]))
        yield f"layout: resized and centre-cropped from {before} to {after}"


def to_images(y: Tensor) -> list[Image.Image]:
    """Pictures (B, 3, H, W) in [-1, 1] as images of 8 bits: clipped, then rounded to the nearest grey level."""
    pixels = ((y / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


# ------------------------------------------------------------------------------------------------------ the output


def output_paths(output: str | Path, seeds: range, sheet: bool = False) -> list[Path]:
    """Where the picture of each seed goes: `output` itself for one seed, otherwise with the seed in the name; and last
    the contact sheet, if there is to be one. Raises ValueError or OSError when no picture can be written there, before
    there is one."""
    path = Path(output)
    if str(path) == "-":
        raise ValueError("output '-' is no name for a file, and nothing is written to stdout; give a name in .png")
    if path.is_dir() or str(output).endswith(os.sep):
        raise ValueError(f"output {str(output)!r} is not a file; give a name for the file in that folder")
    if path.suffix.lower() in {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}:
        raise ValueError(f"output {str(path)!r} would hold a PNG; let its name end in .png")
    paths = [path] if len(seeds) == 1 else [path.with_name(f"{path.stem}-{s}{path.suffix}") for s in seeds]
    paths += [path.with_name(f"{path.stem}-sheet{path.suffix}")] if sheet else []
    for path in paths:
        options.check({"output": str(path)})  # with the seed, the name may be too long
        check_writable(path, "output")
    return paths


def real(path: Path) -> Path:
    """Where a file of that name is written: where the link points to if it is a link, which so stays one."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def identity(path: str | Path) -> object:
    """What all names of one file have in common, hard and symbolic links too, and names of a file that is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def check_writable(path: Path, what: str) -> None:
    """Raises ValueError or OSError when no file can be written to `path`."""
    path = real(path)
    if path.is_symlink():
        raise ValueError(f"{what} {str(path)!r} is a link that leads back to itself; give another name")
    if not path.parent.is_dir():
        raise ValueError(f"{what} folder {str(path.parent)!r} does not exist; make it first")
    if path.exists() and not path.is_file():  # a folder; /dev/null, which must not be replaced
        raise ValueError(f"{what} {str(path)!r} is not a file; give a name for the file")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        reason = f"cannot be written to: {error.strerror}"
        raise ValueError(f"{what} folder {str(path.parent)!r} {reason}; choose another") from error


def replace(path: Path, what: str, write) -> None:
    """Writes a file beside the old one first, so that whatever happens, `path` holds the old one or the new one, whole.
    Of a link, the file that it points to is written.

    Args:
        path: of the file.
        what: the word for the file in an error message.
        write: called with the open binary file.

    Raises OSError.
    """
    temporary = real(path).with_name(f".magicmix-{uuid.uuid4().hex}.tmp")
    machine.TEMPORARY.add(temporary)
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # the content before the name: a power cut must not leave an empty file
        os.replace(temporary, real(path))
    except OSError as error:
        reason = f"cannot be written: {error.strerror or error}"
        raise OSError(f"{what} {str(path)!r} {reason}; choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)
        machine.TEMPORARY.discard(temporary)


def save(picture: Image.Image, path: Path, metadata: dict | None) -> None:
    """Writes a PNG with the metadata, if there is any, as its text "magicmix", in JSON; the "parameters" in it stand
    there for other programs as well. Raises OSError."""
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        info.add_text("magicmix", json.dumps(metadata, sort_keys=True))  # ASCII: a path in it may not even be UTF-8
        if "parameters" in metadata:
            info.add_text("parameters", gallery.parameters(metadata["parameters"]))
            info.add_itxt(gallery.XMP_KEY, gallery.xmp(metadata["parameters"]))
    replace(path, "output", lambda file: picture.save(file, format="PNG", pnginfo=info))


def read_metadata(path: str | Path) -> dict:
    """The metadata in a picture that this program made; its "parameters" are options that may stand in a picture.
    Raises FileNotFoundError or ValueError."""
    path = Path(path)
    must_be_file(path, "picture", "--again needs a magicmix picture")
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=("PNG",)) as picture:  # reads up to the pixels, which are not needed
                text = picture.info.get("magicmix")
        if text and len(text) > MAX_TEXT:
            raise ValueError(f"its parameters have {len(text):,} characters")
        metadata = json.loads(text) if text else None
    except UnidentifiedImageError:
        raise ValueError(f"picture {str(path)!r} is not a readable PNG; --again needs a magicmix picture") from None
    except (OSError, SyntaxError, ValueError, RecursionError, struct.error) as error:
        raise ValueError(f"picture {str(path)!r} cannot be read: {error}; --again needs a magicmix picture") from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("parameters"), dict):
        raise ValueError(f"picture {str(path)!r} has no magicmix parameters; --again needs a picture that has")
    parameters = options.todays_names(metadata["parameters"])
    options.check(parameters, f"picture {str(path)!r}: ", (options.MIXING, options.PICTURE))
    return metadata | {"parameters": parameters}
