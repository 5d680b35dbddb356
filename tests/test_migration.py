"""What the guide says of coming from torch, optax and Keras, row by row."""

import importlib.util
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import gradients

import adamjax
from adamjax.interop import torch as optim

pytestmark = pytest.mark.usefixtures("lenient")

G = jnp.array([0.5, -2.0])
GRADS = [jnp.asarray(g) for g in gradients((4,), 12)]


def course(opt, grads, p):
    state, step = opt.init(p), jax.jit(opt.step)
    for g in grads:
        p, state = step(g, state, p)
    return np.asarray(p, np.float64)


def default(function, name):
    return inspect.signature(function).parameters[name].default


def keras_adam(grads, p, *, lr=1e-3, b1=0.9, b2=0.999, eps=1e-7, amsgrad=False, weight_decay=0.0):
    """Keras 3.15's Adam (`keras/src/optimizers/adam.py`, `base_optimizer.py`), in NumPy."""
    p = np.asarray(p, np.float64)
    m, v, v_hat = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        p = p - lr * weight_decay * p
        alpha = lr * np.sqrt(1 - b2**t) / (1 - b1**t)
        m, v = m + (g - m) * (1 - b1), v + (g**2 - v) * (1 - b2)
        v_hat = np.maximum(v_hat, v)
        p = p - alpha * m / (np.sqrt(v_hat if amsgrad else v) + eps)
    return p


def test_default_weight_decay_of_adamw():
    assert default(adamjax.adamw, "weight_decay") == default(optax.adamw, "weight_decay") == 1e-4
    assert default(optim.adamw, "weight_decay") == 1e-2


def test_weight_decay_of_adam():
    """Ours and torch's is L2, optax's has none; Keras's is decoupled."""
    assert "weight_decay" not in inspect.signature(optax.adam).parameters
    p = jnp.ones(2)
    coupled = course(adamjax.adam(1e-2, weight_decay=0.1), [G], p)
    np.testing.assert_allclose(course(adamjax.adam(1e-2), [G + 0.1 * p], p), coupled, rtol=1e-6)
    np.testing.assert_allclose(course(optim.adam(1e-2, weight_decay=0.1), [G], p), coupled, rtol=1e-6)
    keras = keras_adam([np.asarray(G)], np.ones(2), lr=1e-2, weight_decay=0.1)
    np.testing.assert_allclose(course(adamjax.adamw(1e-2, eps=1e-7, weight_decay=0.1), [G], p), keras, rtol=1e-4)


def test_where_eps_is_added():
    """Keras's eps is to the uncorrected root: the same as 1 / sqrt(1 - b2) = 32 times as much at first."""
    small, zero = jnp.full(3, 1e-6), jnp.zeros(3)
    keras = keras_adam([np.full(3, 1e-6)], np.zeros(3), lr=1.0)
    ours = course(adamjax.adam(1.0, eps=1e-7 / np.sqrt(1 - 0.999)), [small], zero)
    np.testing.assert_allclose(ours, keras, rtol=1e-4)
    assert np.all(np.abs(course(adamjax.adam(1.0, eps=1e-7), [small], zero)) > 3 * np.abs(keras))
    # RAdam of torch has it there too, as soon as it divides.
    grads, p = [1e-5 * g for g in GRADS], jnp.zeros(4)
    torchs, ours = optim.radam(1.0, eps=1e-6), adamjax.radam(1.0, eps=1e-6)
    assert np.max(np.abs(course(torchs, grads, p) - course(ours, grads, p))) > 1e-2


def test_forms_of_amsgrad():
    p = jnp.zeros(4)

    def of(variant):
        return course(adamjax.amsgrad(1e-2, variant=variant), GRADS, p)

    np.testing.assert_allclose(course(optim.adam(1e-2, amsgrad=True), GRADS, p), of("torch"), rtol=1e-5)
    theirs = course(Stepped(optax.amsgrad(1e-2)), GRADS, p)
    np.testing.assert_allclose(theirs, of("corrected"), rtol=1e-4)
    keras = keras_adam([np.asarray(g, np.float64) for g in GRADS], np.zeros(4), lr=1e-2, eps=1e-8, amsgrad=True)
    np.testing.assert_allclose(keras, of("torch"), rtol=1e-4)
    assert np.max(np.abs(of("torch") - of("corrected"))) > 1e-4


class Stepped:
    """A transformation of optax with `step`."""

    def __init__(self, opt):
        self.init, self._update = opt.init, opt.update

    def step(self, g, state, p):
        updates, state = self._update(g, state, p)
        return p + updates, state


def test_nadam_with_and_without_a_schedule_of_momentum():
    p = jnp.zeros(4)
    ours, torchs = course(adamjax.nadam(1e-2), GRADS, p), course(optim.nadam(1e-2), GRADS, p)
    np.testing.assert_allclose(course(Stepped(optax.nadam(1e-2)), GRADS, p), ours, rtol=1e-4, atol=1e-6)
    assert np.max(np.abs(ours - torchs)) > 1e-3


@pytest.mark.parametrize("make", [adamjax.adam, optax.adam])
def test_one_second_moment_of_a_complex_parameter(make):
    p = jnp.ones(2, jnp.complex64)
    assert make(1e-2).init(p)[0].nu.dtype in ("float32", "complex64")
    updates, _ = make(1e-2).update(jnp.array([3 + 4j, 1j]), make(1e-2).init(p), p)
    np.testing.assert_allclose(np.abs(updates), 1e-2, rtol=1e-4)


def test_two_second_moments_of_a_complex_parameter():
    p, opt = jnp.ones(2, jnp.complex64), optim.adam(1e-2)
    updates, state = opt.update(jnp.array([3 + 4j, 1j]), opt.init(p), p)
    assert state[0].nu.shape == (2, 2)
    np.testing.assert_allclose(updates, [-0.01 - 0.01j, -0.01j], rtol=1e-4)


def test_missing_gradients_and_counts():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    grads = {"a": jnp.ones(2), "b": None}
    for opt, counts in ((adamjax.adam(), None), (optim.adam(), (1, 0))):
        stepped, state = opt.step(grads, opt.init(params), params)
        np.testing.assert_array_equal(stepped["b"], 1)
        if counts:
            assert (int(state[0]["a"].count), int(state[0]["b"].count)) == counts
    with pytest.raises(ValueError, match="None"):
        optax.adam(1e-3).update(grads, optax.adam(1e-3).init(params), params)


def test_dtypes_of_half_precision_moments():
    p = jnp.ones(2, jnp.bfloat16)
    assert adamjax.adam().init(p)[0].nu.dtype == optim.adam().init(p)[0].nu.dtype == "float32"
    assert optax.adam(1e-3).init(p)[0].nu.dtype == "bfloat16"


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RAdam", "Adamax"])
def test_signatures_are_torchs(name):
    import torch

    theirs = inspect.signature(getattr(torch.optim, name).__init__).parameters
    ours = inspect.signature(getattr(optim, name.lower())).parameters
    assert list(ours) == [parameter for parameter in theirs if parameter not in ("self", "params")]
    for parameter, content in ours.items():
        assert content.default == theirs[parameter].default
        assert content.kind == theirs[parameter].kind
