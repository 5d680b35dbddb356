"""Hyperparameters for another batch size."""

import math

import numpy as np
import pytest

import adamjax
from adamjax.tuning import scale_for_batch

GOOD = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("factor", [0.25, 0.5, 1, 2, 9])
def test_square_root_rule(factor):
    found = scale_for_batch(GOOD, old=64, new=64 * factor)
    assert found["learning_rate"] == pytest.approx(1e-3 * math.sqrt(factor))
    assert 1 - found["b1"] == pytest.approx(0.1 * factor)
    assert 1 - found["b2"] == pytest.approx(0.01 * factor)
    assert found["eps"] == pytest.approx(1e-8 / math.sqrt(factor))
    assert found["weight_decay"] == 0.1
    back = scale_for_batch(found, old=64 * factor, new=64)
    assert all(back[name] == pytest.approx(GOOD[name], rel=1e-9) for name in GOOD)
    assert adamjax.adamw(**found).transforms[0].b1 == found["b1"]


@pytest.mark.parametrize(("old", "new"), [(512, 1), (1, 512), (64, 64)])
def test_half_life_rule(old, new):
    found = scale_for_batch(GOOD, old=old, new=new, rule="beta2_half_life")
    # Half of the second moment is forgotten after as many examples as before.
    half_lives = [math.log(0.5) / math.log(b2) * size for b2, size in ((0.99, old), (found["b2"], new))]
    np.testing.assert_allclose(*half_lives, rtol=1e-9)
    assert {**found, "b2": 0.99} == GOOD


def test_what_is_not_given_is_the_default():
    assert scale_for_batch({}, old=1, new=4) == {"learning_rate": 2e-3, "b1": 0.6, "b2": 0.996, "eps": 5e-9}
    assert scale_for_batch({"b1": 0.5}, old=1, new=1, rule="beta2_half_life") == {"b1": 0.5, "b2": 0.999}


def test_half_life():
    """What is raised to the power of the factor keeps its half-life in examples; the rest is the square root rule's."""
    found = scale_for_batch(GOOD, old=64, new=256, rule="half_life")
    assert found == GOOD | {
        "learning_rate": 2 * GOOD["learning_rate"],
        "eps": GOOD["eps"] / 2,
        "b1": GOOD["b1"] ** 4,
        "b2": GOOD["b2"] ** 4,
    }
    assert scale_for_batch({}, old=1, new=1000, rule="half_life")["b1"] == 0.9**1000


def test_no_momentum_goes_with_the_same_batch_size():
    assert scale_for_batch({"b1": 0.0}, old=8, new=8)["b1"] == 0
    assert scale_for_batch({"b1": 0.0}, old=8, new=4)["b1"] == 0.5
    assert all(type(x) is float for x in scale_for_batch({}, old=np.int32(4), new=np.float32(8)).values())


BAD = [
    ({"b1": 0.0}, {"old": 4, "new": 8}, ValueError, r"would make b1 -1: with b1=0, .* for factors below 1$"),
    ({"b1": 0.9}, {"old": 32, "new": 320}, ValueError, r"would make b1 0: with b1=0.9, .* for factors below 10$"),
    ({"b1": 0.5, "b2": 0.4}, {"old": 1, "new": 4}, ValueError, r"would make b2 -1.4: .* below 1.66667$"),
    ({}, {"old": 0, "new": 4}, ValueError, r"^Invalid old value: 0; old must be a positive batch size"),
    ({}, {"old": 4, "new": "8"}, ValueError, r"^Invalid new value: '8'"),
    ({}, {"old": 4, "new": 8, "rule": "linear"}, ValueError, r"^Invalid rule value: 'linear'.*'beta2_half_life'"),
    ({"b2": 1.5}, {"old": 4, "new": 8}, ValueError, r"^Invalid beta parameter at index 1: 1.5"),
    ({"learning_rate": np.ones(2)}, {"old": 4, "new": 8}, TypeError, r"only a number can be scaled"),
    (
        {"learning_rate": adamjax.schedules.constant(1.0)},
        {"old": 4, "new": 8},
        TypeError,
        r"only a number .*: scale its peak",
    ),
]


@pytest.mark.parametrize(("hparams", "arguments", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(hparams, arguments, error, message):
    with pytest.raises(error, match=message):
        scale_for_batch(hparams, **arguments)
