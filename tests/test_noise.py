"""Noise that is given: from a file on the command line, from any callable in Python."""

import io
import json
import os
import struct

import numpy as np
import pytest
import torch
from conftest import LAYOUT, PRECIOUS, refused, run, write_again
from PIL import Image
from safetensors.torch import load_file, save, save_file

import magicmix
import weights
from command import noise
from command.pictures import fit, open_layout

SUFFIXES = ["npy", "safetensors"]
FAST = ["--steps", "8", "--size", "64x48", "--quiet"]  # the last one silences warnings as well
SHAPE = (4, 6, 8)  # of the latents of 64 x 48 pixels
LAYOUTS = {"picture": ["--layout", LAYOUT], "prompt": ["--layout-prompt", "a car"]}
SAMPLERS = {"ddim": [], "ddpm": ["--sampler", "ddpm"], "eta 1": ["--eta", "1"]}


@pytest.fixture
def mix(models, tmp_path, monkeypatch, capfd):
    """The command in this process and in the test's folder, with a checkpoint that is loaded already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "load", lambda **_: models)

    def mix(*arguments, output="mix.png"):
        assert magicmix.main(["a tiger", *map(str, arguments), *FAST, "-o", output]) == 0
        assert capfd.readouterr() == ("", "")

    return mix


def pixels(path):
    return np.asarray(Image.open(path), dtype=int)


def parameters(path):
    return json.loads(Image.open(path).info["magicmix"])["parameters"]


def gaussian(count=1, seed=0, shape=SHAPE):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def written(path, eps):
    if path.suffix == ".npy":
        np.save(path, eps.numpy())
    else:
        save_file({"eps": eps}, path)
    return path


def read(path):
    return torch.from_numpy(np.load(path)) if path.suffix == ".npy" else load_file(path)["eps"]


# --------------------------------------------------------------------------------------------------- kept and given


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_kept_noise_given_again_makes_the_same_picture(sampler, layout, tmp_path, mix):
    """From a file of either kind; samplers that need more noise draw on as they do without a file."""
    shared = [*LAYOUTS[layout], *SAMPLERS[sampler], "--seed", "5"]
    mix(*shared)
    drawn = magicmix.Noise([5], SHAPE[1:], torch.device("cpu"))()
    for suffix in SUFFIXES:
        mix(*shared, "--keep-noise", f"eps.{suffix}", output="kept.png")
        assert (tmp_path / "kept.png").read_bytes() == (tmp_path / "mix.png").read_bytes(), "keeping changes nothing"
        assert torch.equal(read(tmp_path / f"eps.{suffix}"), drawn)
        mix(*shared, "--noise", f"eps.{suffix}", output="given.png")
        assert np.array_equal(pixels(tmp_path / "given.png"), pixels(tmp_path / "mix.png"))
    another = ["--noise", written(tmp_path / "another.npy", gaussian(seed=1))]
    mix(*shared, *another, output="another.png")
    assert abs(pixels(tmp_path / "another.png") - pixels(tmp_path / "mix.png")).max() > 10, "eps makes the difference"


def test_the_real_command_keeps_and_takes_noise(tmp_path):
    shared = ["a tiger", *LAYOUTS["prompt"], *FAST]
    assert run(*shared, "--keep-noise", "eps.npy", cwd=tmp_path) == (0, "", "")
    assert run(*shared, "--noise", "eps.npy", "--keep-noise", "eps.safetensors", "-o", "b.png", cwd=tmp_path).code == 0
    assert torch.equal(read(tmp_path / "eps.npy"), read(tmp_path / "eps.safetensors"))
    assert np.array_equal(pixels(tmp_path / "b.png"), pixels(tmp_path / "mix.png"))


def test_the_seed_draws_what_a_sampler_needs_besides(tmp_path, mix):
    eps = ["--noise", written(tmp_path / "eps.npy", gaussian())]
    for sampler, differ in (("ddim", False), ("ddpm", True), ("eta 1", True)):
        for seed in ("1", "2"):
            mix(*LAYOUTS["picture"], *SAMPLERS[sampler], *eps, "--seed", seed, output=f"{seed}.png")
        assert np.array_equal(pixels(tmp_path / "1.png"), pixels(tmp_path / "2.png")) != differ


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int64, ">f4"])
def test_a_file_may_hold_other_numbers(dtype, tmp_path):
    """They are used in float32; and in the order of Fortran's arrays as in C's."""
    eps = gaussian().numpy().astype(dtype)
    np.save(tmp_path / "eps.npy", np.asfortranarray(eps))
    found = noise.read(tmp_path / "eps.npy")
    assert found.eps.dtype == torch.float32 and np.array_equal(found.eps.numpy(), eps.astype(np.float32))


# -------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_of_a_batch_is_made_again(sampler, suffix, tmp_path, mix, capfd):
    """Alone, from its row of the file, which it carries."""
    written(tmp_path / f"eps.{suffix}", gaussian(4))
    shared = [*LAYOUTS["prompt"], *SAMPLERS[sampler], "--noise", f"eps.{suffix}"]
    mix(*shared, "--noise-row", "1", "--seed", "7", "--count", "3")
    for row, name in ((1, "mix-7.png"), (3, "mix-9.png")):
        assert parameters(tmp_path / name)["noise_row"] == row and parameters(tmp_path / name)["seed"] == 6 + row
        assert magicmix.main(["--again", name, "-o", "again.png", "--quiet"]) == 0
        assert capfd.readouterr() == (f"noise: eps.{suffix}\n", "")
        assert abs(pixels(tmp_path / "again.png") - pixels(tmp_path / name)).max() <= 1, "alone or in a batch"
        mix(*shared, "--noise-row", row, "--seed", 6 + row, output="single.png")
        assert (tmp_path / "again.png").read_bytes() == (tmp_path / "single.png").read_bytes()
    assert abs(pixels(tmp_path / "mix-7.png") - pixels(tmp_path / "mix-8.png")).max() > 10


def test_the_noise_of_a_batch_is_kept_row_by_row(tmp_path, mix):
    mix(*LAYOUTS["prompt"], "--seed", "7", "--count", "3", "--keep-noise", "eps.npy")
    eps = read(tmp_path / "eps.npy")
    assert torch.equal(eps, magicmix.Noise([7, 8, 9], SHAPE[1:], torch.device("cpu"))())
    mix(*LAYOUTS["prompt"], "--noise", "eps.npy", "--noise-row", "1", "--keep-noise", "used.npy")
    assert torch.equal(read(tmp_path / "used.npy"), eps[1:2]), "what was used"


def test_a_changed_noise_is_noticed(tmp_path, mix):
    written(tmp_path / "eps.npy", gaussian())
    mix(*LAYOUTS["picture"], "--noise", "eps.npy", output="one.png")
    written(tmp_path / "eps.npy", gaussian(seed=1))
    message = "noise 'eps.npy' has changed; give the file to use with --noise"
    refused("--again", "one.png", cwd=tmp_path, message=message)
    again = run("--again", "one.png", "--noise", "eps.npy", "-o", "two.png", "--quiet", cwd=tmp_path)
    assert again.code == 0 and abs(pixels(tmp_path / "one.png") - pixels(tmp_path / "two.png")).max() > 10
    (tmp_path / "eps.npy").unlink()
    refused("--again", "one.png", cwd=tmp_path, message="noise 'eps.npy', named in the picture, does not exist")


# ------------------------------------------------------------------------------------------------------- bad files


def npy(descr, shape, body=b""):
    """An .npy file with that header."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


class Hostile:
    """Leaves a folder behind where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("opened",)


def pickled():
    file = io.BytesIO()
    np.save(file, np.full((1, *SHAPE), Hostile(), dtype=object), allow_pickle=True)
    return file.getvalue()


def zipped():
    file = io.BytesIO()
    np.savez(file, eps=gaussian().numpy())
    return file.getvalue()


def packed(shape, dtype="F32", size=0, name="eps"):
    """A .safetensors file of one tensor."""
    text = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * size


def arrays(array):
    """The same array as a file of either kind."""
    file = io.BytesIO()
    np.save(file, array)
    return {"eps.npy": file.getvalue(), "eps.safetensors": save({"eps": torch.from_numpy(array)})}


def spoilt(value):
    array = gaussian().numpy().astype(np.float64)
    array[0, 3, 5, 7] = value
    return array


SOUND = arrays(gaussian().numpy())
SOUND_NPY, SOUND_SAFETENSORS = SOUND.values()
FINITE = "save finite numbers of shape (B, 4, H, W)"
BAD = {  # what is wrong: the file's name and content, the line
    "empty npy": ("eps.npy", b"", "cannot be read"),
    "empty safetensors": ("eps.safetensors", b"", "cannot be read"),
    "text": ("eps.npy", b"some numbers: 1 2 3\n", "cannot be read"),
    "truncated in its header": ("eps.npy", SOUND_NPY[:40], "cannot be read"),
    "truncated in its numbers": ("eps.npy", SOUND_NPY[:-1], "cannot be read"),
    "a truncated safetensors": ("eps.safetensors", SOUND_SAFETENSORS[:-1], "cannot be read"),
    "a header that is no JSON": ("eps.safetensors", struct.pack("<Q", 4) + b"{{{{", "cannot be read"),
    "an absurd header": ("eps.safetensors", struct.pack("<Q", 2**63) + b"{}", "cannot be read"),
    "pickled objects": ("eps.npy", pickled(), "cannot be read"),
    "an npz": ("eps.npy", zipped(), "cannot be read"),
    "another tensor": ("eps.safetensors", packed([1, *SHAPE], size=768, name="x"), "cannot be read"),
    "text for numbers": ("eps.npy", npy("<U1", (1, 4, 1, 1), b"a\0\0\0" * 4), "cannot be read"),
    "fields": ("eps.npy", npy([("a", "<f4")], (1, 4, 1, 1), b"\0" * 16), "cannot be read"),
    "complex numbers": ("eps.npy", npy("<c8", (1, *SHAPE), b"\0" * 1536), "cannot be read"),
    "complex tensor": ("eps.safetensors", packed([1, *SHAPE], "C64", 1536), "cannot be read"),
    "dates": ("eps.npy", npy("<M8[s]", (1, *SHAPE), b"\0" * 1536), "cannot be read"),
    "4-bit numbers": ("eps.safetensors", packed([1, *SHAPE], "F4", 96), "cannot be read"),
    **{f"shape {shape}": ("eps.npy", npy("<f4", shape, b"\0" * 768), "cannot be read")
       for shape in ((2**40, *SHAPE), (2**62, *SHAPE), (2**63, *SHAPE), (10**30, *SHAPE), (0, 4, 2**62, 8),
                     (0, 4, 2**64, 8), (-1, *SHAPE), (1.5, *SHAPE), "a", 5)},
    "a header of brackets": ("eps.npy", npy("<f4", "(" * 9000), "cannot be read"),
    "a header of signs": ("eps.npy", npy("<f4", "-" * 9000 + "1"), "cannot be read"),
    "a long header": ("eps.npy", npy("<f4", "(1,)" + " " * 30_000), "cannot be read"),
    **{f"tensor {shape}": ("eps.safetensors", packed(shape), "cannot be read")
       for shape in ([0, 2**63], [0, 4, 2**62, 2**62])},
    **{f"{kind} {name}": (name, data, FINITE)
       for kind, array in (("no axis", np.array(1.0)), ("three axes", np.zeros(SHAPE)),
                           ("five axes", np.zeros((1, 1, *SHAPE))), ("three channels", np.zeros((1, 3, 6, 8))),
                           ("NaN", spoilt(np.nan)), ("Inf", spoilt(-np.inf)), ("too large", spoilt(1e300)))
       for name, data in arrays(array).items()},
    **{f"{kind} {name}": (name, data, f"has shape {array.shape}; (1, 4, 6, 8) from row 0 on are needed")
       for kind, array in (("another size", np.zeros((1, 4, 8, 6))), ("no row", np.zeros((0, *SHAPE))))
       for name, data in arrays(array).items()},
    "another suffix": ("eps.npz", zipped(), "let its name end in .npy or .safetensors"),
    "no suffix": ("eps", SOUND_NPY, "let its name end in .npy or .safetensors"),
    "a pickle": ("eps.pt", b"\x80\x04.", "let its name end in .npy or .safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_noise(name, tmp_path):
    file, content, message = BAD[name]
    (tmp_path / file).write_bytes(content)
    error = refused("a tiger", *LAYOUTS["prompt"], *FAST[:-1], "--noise", file, cwd=tmp_path, message=message)
    assert "needed" in message or f"noise '{file}'" in error
    with pytest.raises(ValueError, match="noise"):
        noise.read(tmp_path / file).rows(0, (1, *SHAPE))


def test_noise_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "folder.npy").mkdir()
    for path, message in {
        "gone.npy": "noise 'gone.npy' does not exist; give a .npy or .safetensors file",
        "pipe.npy": "noise 'pipe.npy' cannot be read: it is not a file",
        "folder.npy": "noise 'folder.npy' cannot be read: it is not a file",
        "/dev/zero": "noise '/dev/zero' cannot be read: it is not a file",
        "": "noise '' is no path",
        "x" * 300 + ".npy": "is too long (a name has up to 255 bytes, a path 4095)",
    }.items():
        refused("a tiger", *LAYOUTS["prompt"], *FAST, "--noise", path, cwd=tmp_path, message=message)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        noise.read(tmp_path / "gone.npy")


def test_rows_beyond_the_end(tmp_path, mix):
    written(tmp_path / "eps.npy", gaussian(2))
    shared = ["a tiger", *LAYOUTS["prompt"], *FAST, "--noise", "eps.npy"]
    for options, first, count in (
        (["--noise-row", "2"], 2, 1),
        (["--noise-row", "1", "--count", "2"], 1, 2),
        (["--count", "3"], 0, 3),
        (["--noise-row", str(2**63 - 1)], 2**63 - 1, 1),
    ):
        message = f"noise has shape (2, 4, 6, 8); ({count}, 4, 6, 8) from row {first} on are needed"
        refused(*shared, *options, cwd=tmp_path, message=message)
    refused(*shared, "--noise-row", "-1", cwd=tmp_path, message="noise_row -1 is out of range; use 0 to 92")
    mix(*LAYOUTS["prompt"], "--noise", "eps.npy", "--noise-row", "1")


def test_a_row_beyond_the_end_in_a_picture(tmp_path):
    written(tmp_path / "eps.npy", gaussian(2))
    recorded = {"prompt": "a tiger", "layout_prompt": "a car", "size": [48, 64], "noise": "eps.npy", "noise_row": 2}
    write_again(tmp_path / "old.png", {"parameters": recorded})
    refused("--again", "old.png", cwd=tmp_path, message="from row 2 on are needed")


# -------------------------------------------------------------------------------------------------- keeping it


def test_noise_that_cannot_be_kept(tmp_path):
    shared = ["a tiger", *LAYOUTS["prompt"], *FAST]
    for target, message in {
        "eps.npz": "noise 'eps.npz' is of no kind that is read; let its name end in .npy or .safetensors",
        "no/such/folder/eps.npy": "noise folder 'no/such/folder' does not exist; make it first",
        "mix.png/eps.npy": "noise folder 'mix.png' does not exist; make it first",
        "/proc/eps.npy": "noise folder '/proc' cannot be written to",
        "": "keep_noise '' is no path",
    }.items():
        refused(*shared, "--keep-noise", target, cwd=tmp_path, message=message)
    (tmp_path / "folder.npy").mkdir()
    message = "noise 'folder.npy' is not a file; give a name for the file"
    refused(*shared, "--keep-noise", "folder.npy", cwd=tmp_path, message=message)


@pytest.mark.parametrize("wrong", [["--token-weight", "lion=0"], ["--size", "60"], ["--k-max", "0.05"]])
def test_a_command_that_fails_keeps_no_noise(wrong, tmp_path):
    """Neither a new file nor in place of an old one."""
    (tmp_path / "old.npy").write_bytes(PRECIOUS)
    for name in ("new.npy", "old.npy"):
        shared = ["a tiger", *LAYOUTS["prompt"], *FAST, *wrong, "--keep-noise", name]
        refused(*shared, cwd=tmp_path, message=wrong[0].removeprefix("--").replace("-", "_")[:5])


# ------------------------------------------------------------------------------------------------------ in Python


class Counted:
    """Noise of the caller's own, which need not be Gaussian; keeps what it gave."""

    def __init__(self, count=1):
        self.count, self.given = count, []

    def __call__(self):
        self.given.append(0.5 * gaussian(self.count, seed=len(self.given)))
        return self.given[-1]


def steps_of(models, layout, noise_, **given):
    layout = fit(open_layout(LAYOUT).picture, (48, 64)) if layout == "picture" else "a car"
    return list(magicmix.magicmix(models, "a tiger", layout, noise=noise_, size=(48, 64), steps=8, **given))


@pytest.mark.parametrize("sampler", [{}, {"sampler": "ddpm"}, {"eta": 1.0}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_callable_is_noise(layout, sampler, models):
    """Its first draw is eps, which the first latent is made from; the samplers that need noise take the later ones."""
    noise_ = Counted(2)
    steps = steps_of(models, layout, noise_, k_max=1.0, k_min=0.5, nu=0.5, **sampler)
    eps, schedule = noise_.given[0], magicmix.Schedule(models.schedule, 8)
    assert steps[0].x.shape == (2, *SHAPE) and len(noise_.given) == 1 + (len(steps) if sampler else 0)
    if layout == "picture":
        x0 = models.vae.encode(fit(open_layout(LAYOUT).picture, (48, 64)))
        for step in [step for step in steps if step.phase == "mixing"]:
            assert torch.equal(step.layout, schedule.add_noise(x0, eps, step.k))
    o = magicmix.options.of_mix(models.defaults, {"steps": 8} | sampler)
    later = iter(noise_.given[1:])
    denoise = magicmix.Denoiser(models, schedule, o, lambda: next(later), "a tiger" if layout == "picture" else "a car")
    x_T = schedule.add_noise(x0, eps, 8) if layout == "picture" else eps
    with torch.no_grad():
        expected, _ = denoise(x_T.expand(2, -1, -1, -1), 8)
    assert torch.equal(steps[0].x_content, expected)


def test_text_to_image_takes_noise_too(models):
    given = magicmix.text_to_image(models, "a tiger", noise=Counted(2), steps=8)
    drawn = magicmix.text_to_image(models, "a tiger", seeds=[0, 1], size=(48, 64), steps=8)
    assert next(given).x.shape == next(drawn).x.shape == (2, *SHAPE)
    one, two = (
        next(magicmix.text_to_image(models, "a tiger", noise=noise_, steps=8)).x
        for noise_ in (lambda: gaussian(seed=3), lambda: gaussian(seed=4))
    )
    assert not torch.equal(one, two)


def test_noise_is_what_the_seeds_draw(models):
    for layout in LAYOUTS:
        drawn = steps_of(models, layout, None, seeds=[3, 4], eta=1.0)
        given = steps_of(models, layout, magicmix.Noise([3, 4], SHAPE[1:], torch.device("cpu")), eta=1.0)
        assert all(torch.equal(a.x, b.x) for a, b in zip(drawn, given, strict=True))


@pytest.mark.parametrize("shape", [(1, 3, 6, 8), SHAPE, (1, 4, 48), (1, 1, *SHAPE), (1, 4, 0, 8), (0, *SHAPE), ()])
def test_noise_of_a_wrong_shape(shape, models):
    eps = torch.zeros(shape)
    for steps in (
        magicmix.magicmix(models, "a tiger", torch.zeros(1, 3, 48, 64), noise=lambda: eps, steps=8),
        magicmix.magicmix(models, "a tiger", "a car", noise=lambda: eps, steps=8),
        magicmix.text_to_image(models, "a tiger", noise=lambda: eps, steps=8),
    ):
        with pytest.raises(ValueError, match="noise"):
            next(steps)


def test_noise_of_another_size_than_the_layout(models):
    for eps in (gaussian(shape=(4, 8, 6)), gaussian(shape=(4, 6, 7))):
        with pytest.raises(ValueError, match="noise"):
            next(magicmix.magicmix(models, "a tiger", torch.zeros(1, 3, 48, 64), noise=lambda: eps, steps=8))  # noqa: B023
    with pytest.raises(ValueError, match="does not fit"):
        next(magicmix.magicmix(models, "a tiger", torch.zeros(1, 3, 50, 64), noise=gaussian, steps=8))


def test_layouts_and_noise_of_different_numbers(models):
    """One layout for all pictures, or one for each."""
    mix = lambda layouts, count: next(
        magicmix.magicmix(models, "a tiger", torch.zeros(layouts, 3, 48, 64), noise=lambda: gaussian(count), steps=8)
    )
    assert mix(1, 3).x.shape == mix(3, 3).x.shape == (3, *SHAPE)
    with pytest.raises(ValueError, match="noise"):
        mix(3, 2)
