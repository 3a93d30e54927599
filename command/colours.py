"""Colour profiles (ICC): pictures in other colours, as phones, cameras and printers' programs write them, to sRGB."""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from command.machine import one_line

MAX_PROFILE = 4 << 20  # bytes; the large ones, of printing presses, have some 3 million
SAME = 2  # grey levels; a profile that moves no colour further is sRGB, as its writers round it
# What a profile may describe -> the mode of the pixels that it is for, and the modes that are such pixels.
SPACES = {
    "RGB": ("RGB", ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr")),  # greys are colours of it as well
    "GRAY": ("L", ("1", "L", "LA")),
    "CMYK": ("CMYK", ("CMYK",)),
}


class Converted(NamedTuple):
    """A picture in sRGB."""

    picture: Image.Image  # RGBA
    note: str  # what was done to its colours, or why its profile was left out; "" for nothing


def to_srgb(picture: Image.Image, profile: bytes | None) -> Converted:
    """A picture and its profile -> the picture in sRGB.

    The conversion is LittleCMS's, relative colorimetric with black point compensation: white and black stay white and
    black, colours beyond sRGB are clipped. A picture whose profile is sRGB itself keeps its pixels. A profile that is
    broken, too large, or for pixels of another kind is left out.

    Args:
        picture: of 8 bits in any mode.
        profile: b"" where there is none; None where there is one that is broken or too large for Pillow.
    """
    if profile == b"":
        return Converted(picture.convert("RGBA"), "")
    try:
        if profile is None:
            raise ValueError("it is broken or too large")
        if len(profile) > MAX_PROFILE:
            raise ValueError(f"it has {len(profile):,} bytes, {MAX_PROFILE:,} are read at most")
        opened = ImageCms.getOpenProfile(io.BytesIO(profile))
        mode, modes = SPACES.get(opened.profile.xcolor_space.strip(), ("", ()))
        if picture.mode not in modes:
            raise ValueError(f"it is for {opened.profile.xcolor_space.strip()} pixels, these are {picture.mode}")
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        if mode == "L":  # LittleCMS's fast way of mapping greys is up to 10 levels off where a curve is steep
            flags |= ImageCms.Flags.NOOPTIMIZE
        srgb, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.buildTransform(opened, srgb, mode, "RGB", intent, flags)
        rgba = picture.convert("RGBA")
        if mode != "CMYK" and is_identity(transform, mode):
            return Converted(rgba, "")
        converted = transform.apply((picture if mode in ("L", "CMYK") else rgba).convert(mode))
        name = one_line(opened.profile.profile_description or "its own profile")[:80]
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        return Converted(picture.convert("RGBA"), f"its colour profile is left out: {one_line(error)}")
    converted.putalpha(rgba.getchannel("A"))
    return Converted(converted, f"its colours are converted to sRGB from {name}")


def is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform from RGB or L to RGB leaves all colours where they are, but for SAME grey levels."""
    levels = np.arange(0, 256, 15, dtype=np.uint8)  # 18, the extremes included
    colours = levels if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    before = Image.fromarray(colours.reshape(1, -1) if mode == "L" else colours)
    difference = np.asarray(before.convert("RGB"), dtype=int) - np.asarray(transform.apply(before), dtype=int)
    return abs(difference).max() <= SAME
