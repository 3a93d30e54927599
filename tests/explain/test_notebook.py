"""The walk-through: it runs in a clean kernel, and what it stores is the output of such a run."""

import base64
import io
import re

import nbformat
import numpy as np
import pytest
from PIL import Image

from lab.explain.notebook import PATH, executed

NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(PATH, as_version=4)


def outputs(cell):
    """The texts and the pictures of a cell's output."""
    texts = [output.text for output in cell.outputs if output.output_type == "stream"]
    data = [output.data for output in cell.outputs if output.output_type != "stream"]
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(d["image/png"]))).convert("RGB") for d in data if "image/png" in d
    ]
    return texts, pictures


def test_short_cells_each_with_a_question_and_an_answer(stored):
    assert len(stored.cells) <= 30 and nbformat.validate(stored) is None
    kinds = [cell.cell_type for cell in stored.cells]
    assert kinds == ["markdown", "code"] * (len(kinds) // 2), "a question, then its answer"
    for question, answer in zip(stored.cells[::2], stored.cells[1::2]):
        assert re.search(r"\*\*.*\?\*\*", question.source.splitlines()[-1]) and len(question.source) < 800
        texts, pictures = outputs(answer)
        assert len(texts) + len(pictures) == 1 == len(answer.outputs), "one number or picture"
        assert len(answer.source.splitlines()) <= 24
    counts = [cell.execution_count for cell in stored.cells[1::2]]
    assert counts == list(range(1, len(counts) + 1)), "stored output of one run, from top to bottom"


def test_the_stored_output_is_that_of_a_run(stored):
    """Texts word for word but for the last digits of numbers, pictures within two grey levels."""
    again = executed()
    for old, new in zip(stored.cells, again.cells, strict=True):
        assert old.source == new.source
        if old.cell_type == "code":
            (old_texts, old_pictures), (new_texts, new_pictures) = outputs(old), outputs(new)
            for a, b in zip(old_texts, new_texts, strict=True):
                assert NUMBER.sub("#", a) == NUMBER.sub("#", b)
                numbers = [[float(n) for n in NUMBER.findall(text)] for text in (a, b)]
                assert numbers[0] == pytest.approx(numbers[1], abs=0.011)
            for a, b in zip(old_pictures, new_pictures, strict=True):
                assert abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 2
    texts = "".join(text for cell in again.cells if cell.cell_type == "code" for text in outputs(cell)[0])
    assert "[True, True, True]" in texts and "largest difference: 0.0\n" in texts
