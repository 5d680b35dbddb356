"""Spaces of hyperparameters, and points in them."""

import math

import numpy as np
import pytest

from adamjax.tuning import Choice, Linear, Log, Space

SPACE = Space(
    learning_rate=Log(1e-4, 1e-1),
    one_minus_b1=Log(0.01, 0.5),
    weight_decay=Linear(0.0, 0.2),
    amsgrad=Choice(False, "torch", "paper"),
    eps=1e-8,
)


@pytest.mark.parametrize("method", ["halton", "sobol", "random"])
def test_points_fill_the_space_evenly(method):
    points = SPACE.points(256, method=method)
    assert len(points) == 256
    assert all(set(p) == {"learning_rate", "b1", "weight_decay", "amsgrad", "eps"} for p in points)
    fractions = {
        "learning_rate": [math.log(p["learning_rate"] / 1e-4) / math.log(1e3) for p in points],
        "b1": [math.log((1 - p["b1"]) / 0.01) / math.log(50) for p in points],
        "weight_decay": [p["weight_decay"] / 0.2 for p in points],
    }
    # A quarter of the points in each quarter of each range; quasi-random points nearly to the point.
    slack = 30 if method == "random" else 3
    for values in fractions.values():
        counts, _ = np.histogram(values, bins=4, range=(0, 1))
        assert counts.sum() == 256
        assert abs(counts - 64).max() <= slack
    for form in (False, "torch", "paper"):
        assert abs(sum(p["amsgrad"] == form for p in points) - 256 / 3) <= slack
    assert {p["eps"] for p in points} == {1e-8}


def test_points_are_reproducible():
    assert SPACE.points(5, seed=1) == SPACE.points(5, seed=1) != SPACE.points(5, seed=2)


def test_grid_has_every_combination_and_the_ends():
    points = SPACE.points(3, method="grid")
    assert len(points) == len({tuple(p.values()) for p in points}) == 3**4
    for name, values in {
        "learning_rate": [1e-4, 10**-2.5, 1e-1],
        "b1": [0.5, 1 - math.sqrt(0.005), 0.99],
        "weight_decay": [0, 0.1, 0.2],
    }.items():
        np.testing.assert_allclose(sorted({p[name] for p in points}), values, rtol=1e-12)


@pytest.mark.parametrize("r", [Log(1e-3, 10.0), Linear(-1.0, 3.0), Choice("a", "b", "c")])
def test_fraction_is_the_inverse_of_at(r):
    for u in (0.0, 0.3, 0.99, 1.0):
        x = r.at(u)
        assert r.at(r.fraction(x)) == (x if isinstance(r, Choice) else pytest.approx(x, rel=1e-12))


def test_repr_is_what_was_written():
    assert (
        repr(Space(one_minus_b1=Log(0.01, 0.5), eps=1e-8)) == "Space(one_minus_b1=Log(low=0.01, high=0.5), eps=1e-08)"
    )
    assert eval(repr(SPACE)).points(4) == SPACE.points(4)


BAD = [
    (lambda: SPACE.points(2, seed=-1), "Invalid seed value: -1; seed must be at least 0"),
    (lambda: Log(1e-1, 1e-4), r"^Invalid range: Log\(low=0.1, high=0.0001\); low must be below high"),
    (lambda: Linear(1.0, 1.0), r"low must be below high"),
    (lambda: Log(0.0, 1.0), r"a logarithmic range starts above 0"),
    (lambda: Linear(0.0, math.inf), r"high must be a finite number"),
    (lambda: Linear(True, 1.0), r"low must be a finite number"),
    (lambda: Choice(), r"a choice needs at least one value"),
    (lambda: Space(), r"^Invalid space: it has no range"),
    (lambda: Space(learning_rate=1e-3), r"^Invalid space: it has no range"),
    (lambda: Space(b1=Linear(0.5, 0.9), one_minus_b1=Log(0.1, 0.5)), r"both b1 and one_minus_b1"),
    (lambda: Space(one_minus_b1=0.1, b2=Linear(0, 0.9)), r"one_minus_b1 must be a Log or a Linear"),
    (lambda: SPACE.points(0), r"^Invalid count value: 0"),
    (lambda: SPACE.points(1, method="grid"), r"a grid 2 along each range"),
    (lambda: SPACE.points(8, method="latin"), r"^Invalid method value: 'latin'.*'halton', 'sobol'"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_bad_spaces(call, message):
    with pytest.raises(ValueError, match=message):
        call()
