"""The style of the pictures: the same whatever the caller's, in colours that all readers tell apart."""

import itertools

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb

from adamjax._core import figures
from adamjax.tuning import LrRange

LINES = (figures.BLUE, figures.RED, figures.TEAL, figures.PURPLE, figures.AMBER)
# Linear RGB as readers see it, without anomaly and with a complete one of each kind (Machado et al., 2009).
SEEN = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear(colour):
    x = np.array(to_rgb(colour))
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    """A colour in coordinates whose distance is how different two colours look; black and white have 1."""
    cones = [
        [0.41222147, 0.53633254, 0.05144599],
        [0.2119035, 0.68069955, 0.10739696],
        [0.0883025, 0.28171884, 0.629979],
    ]
    opponents = [
        [0.21045426, 0.79361779, -0.00407205],
        [1.9779985, -2.428592, 0.4505937],
        [0.0259040, 0.78277177, -0.80867577],
    ]
    return np.array(opponents) @ np.cbrt(np.array(cones) @ np.clip(rgb, 0, 1))


def test_all_readers_tell_the_colours_of_lines_apart():
    for sight, seen in SEEN.items():
        for a, b in itertools.combinations(LINES, 2):
            distance = np.linalg.norm(oklab(seen @ linear(a)) - oklab(seen @ linear(b)))
            assert distance > 0.1, (sight, a, b, distance)
    for colour in LINES:  # 3 is the least that WCAG 2.1 allows graphics
        assert 1.05 / (linear(colour) @ [0.2126, 0.7152, 0.0722] + 0.05) >= 3, colour


def test_pictures_look_alike_whatever_the_style_of_the_caller():
    curve = LrRange(np.geomspace(1e-5, 1, 50), np.linspace(3, 1, 50))
    with mpl.rc_context({"xtick.labelsize": 30, "axes.facecolor": "black", "lines.linewidth": 9}):
        figure = curve.plot()
        FigureCanvasAgg(figure).draw()
        (axis,) = figure.axes
        assert axis.get_xticklabels()[1].get_fontsize() < 12
        assert to_hex(axis.get_facecolor()) == "#ffffff"
        assert axis.lines[1].get_linewidth() == 2
        assert mpl.rcParams["lines.linewidth"] == 9


def test_notebooks_and_the_package_have_the_same_colours():
    with figures.styled("demo", "a test"):
        cycle = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    assert cycle == [*LINES, figures.GREY]
