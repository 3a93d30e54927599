"""Colour spaces by their equations, and profiles of them written byte by byte, from the published primaries and curves
(ICC.1:2010)."""

import struct

import numpy as np

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
