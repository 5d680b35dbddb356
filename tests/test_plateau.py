"""reduce_on_plateau: what optax's does on positive values, and the same on negative ones; or what torch's does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from bowl import BOWL
from helpers import assert_equal, assert_same_types
from tolerances import SWEEP

import adamjax
from adamjax import training, tuning
from adamjax.schedules import reduce_on_plateau

pytestmark = pytest.mark.numbers

OPTIONS = [
    {},
    {"factor": 0.5, "patience": 2},
    {"factor": 0.5, "patience": 3, "cooldown": 2},
    {"factor": 0.3, "patience": 2, "rtol": 0.1, "atol": 0.05},
    {"factor": 0.5, "patience": 2, "accumulation_size": 2},
    {"factor": 0.1, "patience": 1, "min_scale": 0.05},
]


def scales(opt, values):
    """The scale after each value."""
    g = jnp.ones(2)

    def body(state, x):
        updates, state = opt.update(g, state, value=x)
        return state, updates[0]

    return np.asarray(jax.lax.scan(body, opt.init(g), jnp.asarray(values, jnp.float32))[1])


def falling(seed):
    """A loss that falls in stairs, with noise."""
    rng = np.random.default_rng(seed)
    return np.repeat(2.0 ** -np.arange(10), 8) * rng.uniform(0.9, 1.1, 80)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_optax(options, seed, lenient):
    expected = scales(optax.contrib.reduce_on_plateau(**options), falling(seed))
    found = scales(reduce_on_plateau(**options), falling(seed))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    if options:
        assert expected[-1] < 1


@pytest.mark.parametrize("options", OPTIONS[1:])
def test_sign_and_mode(options):
    """A constant added to the loss does not matter if improvement is absolute; nor does turning it over."""
    absolute = options | {"rtol": 0.0, "atol": 0.01}
    values = falling(0)
    expected = scales(reduce_on_plateau(**absolute), values)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(scales(reduce_on_plateau(**absolute), values - 16), expected)
    np.testing.assert_array_equal(scales(reduce_on_plateau(**absolute, mode="max"), -values), expected)


def test_negative_losses_where_optax_fails(lenient):
    """A loss that rests at -1 is a plateau; optax takes each step for an improvement."""
    options = {"factor": 0.5, "patience": 2, "rtol": 0.01}
    assert scales(optax.contrib.reduce_on_plateau(**options), np.full(9, -1.0))[-1] == 1
    np.testing.assert_array_equal(
        scales(reduce_on_plateau(**options), np.full(9, -1.0)), [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625]
    )
    np.testing.assert_array_equal(scales(reduce_on_plateau(**options), -1 - 0.1 * np.arange(9)), np.ones(9))


TORCH_OPTIONS = [
    {},
    {"factor": 0.5, "patience": 0},
    {"factor": 0.5, "patience": 1, "min_lr": 0.05},
    {"factor": 0.3, "patience": 2, "threshold": 0.05, "cooldown": 3},
    {"factor": 0.5, "patience": 3, "threshold": 0.01, "threshold_mode": "abs"},
    {"factor": 0.5, "patience": 0, "cooldown": 1, "mode": "max"},
    {"factor": 0.5, "patience": 1, "threshold": 0.05, "mode": "max", "threshold_mode": "abs"},
    {"factor": 0.5, "patience": 2, "threshold": 0.05, "mode": "max"},
]


@pytest.mark.parametrize("options", TORCH_OPTIONS)
@pytest.mark.parametrize("shift", [0.0, -2.0])
def test_torchs_variant_agrees_with_torch(options, shift):
    """Also on negative values, at which torch's relative threshold is easier."""
    torch = pytest.importorskip("torch")
    values = falling(2) + shift
    values[[7, 40, 41]] = np.nan
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options, eps=0.0)
    expected = []
    for x in values.astype(np.float32):
        scheduler.step(float(x))
        expected.append(optimizer.param_groups[0]["lr"])
    names = {"min_lr": "min_scale", "factor": "factor", "patience": "patience", "cooldown": "cooldown", "mode": "mode"}
    ours = {names[name]: x for name, x in options.items() if name in names}
    threshold = options.get("threshold", 1e-4)
    ours |= {"rtol": 0.0, "atol": threshold} if "threshold_mode" in options else {"rtol": threshold}
    found = scales(reduce_on_plateau(**ours, variant="torch"), values)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    if options and not shift:
        assert 0 < expected[-1] < 1


def test_torchs_patience_is_one_less():
    values = falling(0)
    ours = scales(reduce_on_plateau(0.5, patience=3, cooldown=1), values)
    np.testing.assert_array_equal(ours, scales(reduce_on_plateau(0.5, patience=2, cooldown=1, variant="torch"), values))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_does_not_improve(bad):
    found = scales(reduce_on_plateau(0.5, 2), [1.0, bad, bad, 0.5, 0.5, 0.5])
    np.testing.assert_array_equal(found, [1, 1, 0.5, 0.5, 0.5, 0.25])


def test_in_a_chain():
    opt = adamjax.chain(adamjax.adamw(0.1), reduce_on_plateau(0.5, patience=1))
    params = {"w": jnp.ones((2, 2), jnp.bfloat16), "z": jnp.ones(2, jnp.complex64), "none": None}
    state = opt.init(params)
    assert_same_types(jax.eval_shape(opt.init, params), state)
    assert_same_types(opt.init(jax.eval_shape(lambda: params)), state)
    step = jax.jit(lambda state, value: opt.update(params, state, params, value=value), donate_argnums=0)
    updates, state = step(state, jnp.float32(1))
    halved, state = step(state, jnp.float32(1))
    assert step._cache_size() == 1
    assert_same_types(state, opt.init(params))
    assert_same_types(updates, params)
    full, _ = adamjax.adamw(0.1).update(
        params, adamjax.adamw(0.1).update(params, adamjax.adamw(0.1).init(params), params)[1], params
    )
    assert_equal(halved, jax.tree.map(lambda x: (x / 2).astype(x.dtype), full))


def test_is_a_value():
    assert reduce_on_plateau(0.5) == reduce_on_plateau(factor=0.5) != reduce_on_plateau(0.4)
    assert "factor=0.5, patience=10.0" in repr(reduce_on_plateau(0.5))
    many = jax.vmap(lambda factor: scales_of_constant(reduce_on_plateau(factor, patience=1)))(jnp.array([0.5, 0.25]))
    np.testing.assert_array_equal(many, [0.5, 0.25])


def scales_of_constant(opt):
    state = opt.init(jnp.zeros(1))
    for _ in range(2):
        updates, state = opt.update(jnp.ones(1), state, value=1.0)
    return updates[0]


def test_bad_input():
    for options, message in [
        ({"factor": 1.0}, r"^Invalid factor value: 1\.0; factor must be at least 0 and below 1"),
        (
            {"patience": 0},
            r"^Invalid patience value: 0.0; patience must be at least 1.*patience=0 with variant",
        ),
        ({"patience": np.array([3.0, 0.0])}, r"^Invalid patience value: \[3\. 0\.\]; patience must be at least 1"),
        ({"patience": -1, "variant": "torch"}, r"^Invalid patience value: -1; patience must be"),
        ({"variant": "keras"}, r"^Invalid variant value: 'keras'"),
        ({"rtol": -1.0}, r"^Invalid rtol value"),
        ({"accumulation_size": 0}, r"^Invalid accumulation_size value"),
        ({"mode": "least"}, r"^Invalid mode value: 'least'"),
    ]:
        with pytest.raises(ValueError, match=message):
            reduce_on_plateau(**options)
    opt = adamjax.chain(adamjax.adam(0.1), reduce_on_plateau())
    with pytest.raises(ValueError, match=r"call update\(grads, state, params, value=loss\)"):
        opt.update(jnp.ones(1), opt.init(jnp.ones(1)))
    with pytest.raises(ValueError, match=r"^value has shape \(2,\)"):
        opt.update(jnp.ones(1), opt.init(jnp.ones(1)), value=jnp.ones(2))


@pytest.mark.usefixtures("lenient")
def test_training_gives_it_the_loss():
    """And sweeps do."""
    problem, options = BOWL, {"factor": 0.5, "patience": 1, "rtol": 0.9}
    opt = adamjax.chain(adamjax.adamw(1e-3), reduce_on_plateau(**options))
    *_, last = training.train(problem, opt, steps=20)
    assert last.state[1].scale < 1
    optaxs = optax.chain(optax.adamw(1e-3), optax.contrib.reduce_on_plateau(**options))
    *_, theirs = training.train(problem, optaxs, steps=20)
    assert last.state[1].scale == theirs.state[1].scale
    found = tuning.sweep(problem, [{"learning_rate": 1e-3}], steps=20, optimizer=lambda learning_rate: opt)
    np.testing.assert_allclose(found.metrics["loss"][0, 0, -1], last.metrics["loss"], rtol=SWEEP)
