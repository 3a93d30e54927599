"""Colour profiles, against the colour spaces' own equations. The profiles are written here, byte by byte, from the
published primaries and curves (ICC.1:2010); errors are in grey levels of 255."""

import re
import struct
import sys

import numpy as np
import pytest
from conftest import refused, run
from PIL import Image, ImageCms

import magicmix
from command import pictures

# ------------------------------------------------------------------------------------- the colour spaces' equations

D65, D50 = np.array([0.3127, 0.3290]), np.array([0.9642, 1.0, 0.8249])  # x, y; X, Y, Z as ICC rounds it
PRIMARIES = {  # x, y of red, green and blue
    "sRGB": [(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)],
    "Display P3": [(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)],
    "Adobe RGB": [(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)],
}
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def to_xyz(name):
    """Linear RGB -> X, Y, Z, adapted from D65 to D50 (Bradford), the matrix of a profile's rXYZ, gXYZ and bXYZ."""
    lift = lambda x, y: np.array([x / y, 1, (1 - x - y) / y])
    corners, white = np.stack([lift(*p) for p in PRIMARIES[name]], axis=1), lift(*D65)
    matrix = corners * np.linalg.solve(corners, white)
    adapt = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D50) / (BRADFORD @ white)) @ BRADFORD
    return adapt @ matrix


def srgb_decode(v):
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def srgb_encode(v):
    v = v.clip(0, 1)
    return np.where(v <= 0.0031308, 12.92 * v, 1.055 * v ** (1 / 2.4) - 0.055)


ADOBE = 563 / 256  # Adobe RGB's gamma
CURVES = {"sRGB": srgb_decode, "Display P3": srgb_decode, "Adobe RGB": lambda v: v**ADOBE}


def expected(name, pixels):
    """Pixels (..., 3) of 0..255 in a colour space -> in sRGB, not rounded."""
    linear = CURVES[name](pixels / 255) @ to_xyz(name).T @ np.linalg.inv(to_xyz("sRGB")).T
    return 255 * srgb_encode(linear)


# ------------------------------------------------------------------------------------------------ profiles by hand


def fixed(*numbers):
    return b"".join(struct.pack(">i", round(n * 65536)) for n in numbers)


def profile(space, tags, kind=b"mntr", pcs=b"XYZ "):
    """An ICC profile of version 4 with these tags."""
    start, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        body += b"\0" * (-len(body) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s12s4s", start + len(body), b"test", 0x04200000, kind, space, pcs, b"", b"acsp")
    header += b"\0" * (68 - len(header)) + fixed(*D50)
    return header + b"\0" * (128 - len(header)) + struct.pack(">I", len(tags)) + table + body


def described(text):
    encoded = text.encode("utf-16-be")
    return b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(encoded), 28) + encoded


PARAMETRIC = b"para\0\0\0\0\0\3\0\0" + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
GAMMA = b"curv\0\0\0\0" + struct.pack(">IH", 1, 563)


def rgb_profile(name):
    curve = GAMMA if name == "Adobe RGB" else PARAMETRIC
    tags = {b"desc": described(name), b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50)}
    for letter, column in zip("rgb", to_xyz(name).T):
        tags |= {f"{letter}XYZ".encode(): b"XYZ \0\0\0\0" + fixed(*column), f"{letter}TRC".encode(): curve}
    return profile(b"RGB ", tags)


def grey_profile():
    """Greys of gamma 1: linear light."""
    linear = b"curv\0\0\0\0" + struct.pack(">I", 0)
    tags = {b"desc": described("linear grey"), b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50), b"kTRC": linear}
    return profile(b"GRAY", tags)


INK = {"": (100, 0, 0), "c": (60, -20, -30), "m": (55, 60, 0), "y": (90, -5, 80), "k": (0, 0, 0)}  # L, a, b on paper


def cmyk_profile():
    """A press with a table of two points per ink: alone each ink has the colour above, all mixtures are black."""
    corner = lambda *on: INK.get("".join(ink for ink, is_on in zip("cmyk", on) if is_on), (0, 0, 0))
    grid = [corner(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    straight = bytes(range(256))
    table = bytes(n for L, a, b in grid for n in (round(L * 2.55), a + 128, b + 128))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + straight * 4 + table + straight * 3
    tags = {b"desc": described("a press"), b"wtpt": b"XYZ \0\0\0\0" + fixed(*D50), b"A2B0": lut}
    return profile(b"CMYK", tags, b"prtr", b"Lab ")


def lab_to_srgb(L, a, b):
    """CIE 1976, for D50; not rounded."""
    y = (L + 16) / 116
    f = np.array([y + a / 500, y, y - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * D50
    return 255 * srgb_encode(np.linalg.solve(to_xyz("sRGB"), xyz))


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
        (rgb_profile("a\x1b[31m\nb") if "a\x1b[31m\nb" in PRIMARIES else hostile(), "layout: its colours are converted "
         "to sRGB from a\\x1b[31m b"),
    ):  # fmt: skip
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
