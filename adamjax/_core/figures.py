"""Figures of matplotlib as files."""

import io
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def png(figure: Any) -> bytes:
    """Return the content of a PNG file of a figure."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()


def suits_logarithm(y: ArrayLike) -> bool:
    """Return whether an axis of these values should be logarithmic: none is negative, and they span a decade."""
    y = np.asarray(y, np.float64)
    positive = y[np.isfinite(y) & (y > 0)]
    return not np.any(y < 0) and positive.size > 0 and bool(positive.max() >= 10 * positive.min())
