"""Figures of matplotlib as files."""

import io
from typing import Any


def png(figure: Any) -> bytes:
    """Return the content of a PNG file of a figure."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
