"""From picture files to tensors and back, against Pillow's own resampling and diffusers' rounding."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from command import pictures


def noise_picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("width", "height", "box"),  # what is left of width x height when it is cropped to 3 : 2, in closed form
    [(90, 60, (0, 0, 90, 60)), (100, 40, (20, 0, 80, 40)), (30, 80, (0, 30, 30, 50)), (48, 32, (0, 0, 48, 32))],
)
def test_a_layout_is_cropped_in_the_middle_and_resized_by_lanczos(width, height, box):
    picture = noise_picture(width, height)
    expected = np.asarray(picture.resize((48, 32), Image.Resampling.LANCZOS, box=box), dtype=np.float32) / 127.5 - 1
    found = pictures.fit(picture, (32, 48))
    assert found.shape == (1, 3, 32, 48) and found.dtype == torch.float32
    # At most one grey level, since a box may be resized in one pass or in two, and hardly anywhere.
    difference = (found[0].permute(1, 2, 0) - torch.from_numpy(expected)).abs() * 127.5
    assert difference.max() <= 1.01 and difference.mean() <= 0.05


def test_grey_levels_become_exact_numbers():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3))
    found = pictures.fit(ramp, (1, 256))
    assert torch.equal(found[0, 0, 0], torch.arange(256) / 127.5 - 1)
    assert found.min() == -1 and found.max() == 1
    assert np.array_equal(np.asarray(pictures.to_images(found)[0]), np.asarray(ramp)), "and back"


@given(st.integers(0, 2**31))
def test_pictures_are_rounded_as_diffusers_does(seed):
    """Equal, not only within one grey level; values beyond [-1, 1] are clipped."""
    y = 1.3 * torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(seed))
    expected = VaeImageProcessor().postprocess(y, output_type="pil")
    found = pictures.to_images(y)
    assert len(found) == 2 and found[0].size == (12, 8)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(found, expected, strict=True))
