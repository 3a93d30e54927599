"""Several pictures on one."""

import math

from PIL import Image, ImageDraw, ImageFont

CELL, MARGIN, LABEL = 256, 4, 18  # pixels: a picture's longer side at most, between two pictures, of a line of text


def contact_sheet(pictures: list[Image.Image], labels: list[str] | None = None, columns: int = 0) -> Image.Image:
    """Pictures of one size, row by row on white, larger ones scaled down to CELL pixels.

    Args:
        pictures: one or more.
        labels: a line of text below each; None for no lines.
        columns: pictures in a row; 0 for as many as there are rows, or one more.
    """
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    scale = min(1, CELL / max(width, height))
    width, height = max(1, round(scale * width)), max(1, round(scale * height))
    across, down = width + MARGIN, height + MARGIN + (LABEL if labels else 0)
    rows = -(-len(pictures) // columns)  # rounded up
    canvas = Image.new("RGB", (MARGIN + columns * across, MARGIN + rows * down), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(LABEL - 6)
    for i, picture in enumerate(pictures):
        x, y = MARGIN + i % columns * across, MARGIN + i // columns * down
        canvas.paste(picture.resize((width, height), Image.Resampling.LANCZOS) if scale < 1 else picture, (x, y))
        if labels:
            draw.text((x + width // 2, y + height + LABEL // 2), labels[i], "black", font, anchor="mm")
    return canvas
