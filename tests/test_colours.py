"""Colour profiles, against the colour spaces' own equations (icc.py); errors are in grey levels of 255."""

import re
import sys

import numpy as np
import pytest
from conftest import refused, run
from icc import INK, cmyk_profile, expected, grey_profile, lab_to_srgb, rgb_profile, srgb_encode
from PIL import Image, ImageCms

import magicmix
from command import pictures

# ------------------------------------------------------------------------------------------------------- the tests


def colours_of(seed, shape=(40, 60, 3)):
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    pixels[0, :8, :3] = [[255 * (i >> 2 & 1), 255 * (i >> 1 & 1), 255 * (i & 1)] for i in range(8)]
    return pixels


def read(tmp_path, picture, icc, suffix=".png", **more):
    path = tmp_path / f"layout{suffix}"
    picture.save(path, icc_profile=icc, **more)
    return pictures.open_layout(path)


@pytest.mark.parametrize("name", ["Display P3", "Adobe RGB"])
def test_rgb_profiles(name, tmp_path):
    """Within one grey level of the equations, rounding included, for every colour, those beyond sRGB clipped."""
    pixels = colours_of(0)
    layout = read(tmp_path, Image.fromarray(pixels), rgb_profile(name))
    truth = expected(name, pixels.astype(float))
    error = abs(np.asarray(layout.picture, dtype=float) - truth)
    assert error.max() <= 1.0 and error.mean() <= 0.3, error.max()
    assert abs(truth - pixels).max() > 20, "the profile makes a difference"
    assert layout.colours == f"its colours are converted to sRGB from {name}"


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".avif", ".jpg"])
def test_every_format_that_carries_a_profile(suffix, tmp_path):
    flat = Image.new("RGB", (64, 64), (200, 100, 50))
    more = {"lossless": True} if suffix == ".webp" else {}
    layout = read(tmp_path, flat, rgb_profile("Display P3"), suffix, **more)
    truth = expected("Display P3", np.array([200.0, 100.0, 50.0]))
    assert abs(np.asarray(layout.picture, dtype=float) - truth).max() <= (2.5 if suffix in (".jpg", ".avif") else 1)


def test_a_picture_in_srgb_keeps_its_pixels(tmp_path):
    """Whoever wrote its profile; transparency and palettes included."""
    pixels = colours_of(1)
    for icc in (rgb_profile("sRGB"), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        layout = read(tmp_path, Image.fromarray(pixels), icc)
        assert np.array_equal(np.asarray(layout.picture), pixels) and layout.colours == ""
        for picture in (
            Image.fromarray(colours_of(2, (40, 60, 4)), "RGBA"),
            Image.fromarray(pixels).quantize(16),
            Image.fromarray(pixels[..., 0]),
            Image.fromarray(pixels).convert("1"),
            Image.fromarray(colours_of(3, (40, 60, 3))[..., :2].copy(), "LA"),
        ):
            assert np.array_equal(*(np.asarray(read(tmp_path, picture, with_icc).picture) for with_icc in (icc, None)))


def test_transparency_is_kept(tmp_path):
    pixels = np.full((8, 8, 4), (200, 100, 50, 255), dtype=np.uint8)
    pixels[:, 4:, 3] = 0
    layout = np.asarray(read(tmp_path, Image.fromarray(pixels), rgb_profile("Display P3")).picture, dtype=float)
    assert abs(layout[:, :4] - expected("Display P3", np.array([200.0, 100.0, 50.0]))).max() <= 1
    assert layout[:, 4:].min() == 255


def test_greys(tmp_path):
    """A grey profile, and greys in a picture whose profile is an RGB one; also at 16 bits."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    truth = (255 * srgb_encode(ramp / 255))[..., None].repeat(3, axis=-1)
    for picture in (Image.fromarray(ramp), Image.fromarray(ramp.astype(np.uint16) * 257)):
        layout = read(tmp_path, picture, grey_profile())
        assert abs(np.asarray(layout.picture, dtype=float) - truth).max() <= 1
    truth = expected("Adobe RGB", ramp[..., None].repeat(3, axis=-1).astype(float))
    layout = read(tmp_path, Image.fromarray(ramp), rgb_profile("Adobe RGB"))
    assert abs(np.asarray(layout.picture, dtype=float) - truth).max() <= 1


def test_cmyk_profiles(tmp_path):
    """The colours of paper and of each ink alone, and of half black, from Lab; Pillow alone would show other ones."""
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (0, 0, 0, 102)]
    lab = [*INK.values(), (60, 0, 0)]
    truth = np.array([lab_to_srgb(*colour) for colour in lab])
    picture = Image.fromarray(np.array([inks], dtype=np.uint8), "CMYK")
    layout = read(tmp_path, picture, cmyk_profile(), ".tif")
    assert abs(np.asarray(layout.picture, dtype=float)[0] - truth).max() <= 2, np.asarray(layout.picture)  # 8-bit Lab
    assert abs(np.asarray(picture.convert("RGB"), dtype=float)[0] - truth).max() > 50
    assert layout.colours == "its colours are converted to sRGB from a press"


BROKEN = {
    "noise": (lambda: np.random.default_rng(0).bytes(3000), ""),
    "cut": (lambda: rgb_profile("Display P3")[:200], ""),
    "for other pixels": (cmyk_profile, "it is for CMYK pixels, these are RGB"),
    "of a kind that no picture has": (lambda: rgb_profile("sRGB").replace(b"RGB XYZ ", b"Luv XYZ "), ""),
    "5 MB": (lambda: rgb_profile("Display P3") + bytes(5 << 20), "it has 5,24"),
}


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_profile_that_cannot_be_used_is_left_out(name, suffix, tmp_path):
    """With one line; the picture is read as if it had none."""
    make, reason = BROKEN[name]
    picture = Image.fromarray(colours_of(4))
    layout = read(tmp_path, picture, make(), suffix)
    assert layout.colours.startswith("its colour profile is left out: ") and "\n" not in layout.colours
    assert reason in layout.colours or suffix == ".png" and layout.colours.endswith("it is broken or too large")
    assert np.array_equal(np.asarray(layout.picture), np.asarray(read(tmp_path, picture, None, suffix).picture))


def test_what_happens_to_the_colours_is_said(tmp_path):
    mix = ("a tiger", "--layout", "layout.png", "--size", "64", "--steps", "2", "--k-max", "0", "--k-min", "0")
    picture = Image.new("RGB", (64, 64), (200, 100, 50))
    for icc, line in (
        (rgb_profile("Display P3"), "layout: its colours are converted to sRGB from Display P3"),
        (rgb_profile("sRGB"), None),
        (None, None),
        (bytes(20 << 20), "layout: its colour profile is left out: it is broken or too large"),
        (hostile(), "layout: its colours are converted to sRGB from a\\x1b[31m b"),
    ):
        picture.save(tmp_path / "layout.png", icc_profile=icc)
        code, out, error = run(*mix, cwd=tmp_path)
        assert (code, out.splitlines()) == (0, [line, "mix.png"] if line else ["mix.png"]), error


def hostile():
    """Display P3 with control characters in its name."""
    name = "Display P3"
    return rgb_profile(name).replace(name.encode("utf-16-be"), "a\x1b[31m\nb  ".encode("utf-16-be"))


# ------------------------------------------------------------------------------------------------------------ HEIC

HEAD = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(100)


def test_heic_without_its_reader_is_refused_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    path = tmp_path / "photo.heic"
    for head in (HEAD, HEAD.replace(b"ftypheic", b"ftypmif1")):
        path.write_bytes(head)
        line = f"layout {str(path)!r} is HEIC; pip install pillow-heif lets it be read, or save it as PNG or JPEG"
        with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
            pictures.open_layout(path)
        assert magicmix.main(["a tiger", "--layout", str(path)]) == 2
        assert capsys.readouterr().err == f"magicmix: {line}\n"
    path.write_bytes(HEAD.replace(b"heic", b"avif"))  # a cousin that Pillow reads
    with pytest.raises(ValueError, match="not a readable picture"):
        pictures.open_layout(path)


def test_heic_with_its_reader(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="pip install -r requirements-dev.txt brings it")
    heif.register_heif_opener()
    picture = Image.new("RGB", (64, 48), (200, 100, 50))
    picture.paste((20, 40, 200), (32, 0, 64, 48))
    picture.save(tmp_path / "photo.heic", format="HEIF", quality=95, icc_profile=rgb_profile("Display P3"))
    layout = pictures.open_layout(tmp_path / "photo.heic")
    assert layout.picture.size == (64, 48) and layout.colours.endswith("from Display P3")
    found = np.asarray(layout.picture, dtype=float)
    for colour, x in (((200, 100, 50), 8), ((20, 40, 200), 56)):  # lossy, and in half the colour resolution
        assert abs(found[24, x] - expected("Display P3", np.array(colour, dtype=float))).max() <= 4
    path = tmp_path / "broken.heic"
    path.write_bytes((tmp_path / "photo.heic").read_bytes()[:300])
    message = "layout 'broken.heic' is not a readable picture"
    refused("a tiger", "--layout", "broken.heic", cwd=tmp_path, message=message)
