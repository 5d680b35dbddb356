"""Muon for matrices and Adam for the rest: optax's numbers, in steps of ours."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_equal, by_step, make_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerances import RECOMPILED

import adamjax
from adamjax import checkpoint, sharding
from adamjax.interop.optax import MuonState, muon

LR, STEPS = 1e-3, 50


def some_params(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (16, 24), "tall": (32, 8), "embed": (40, 16), "bias": (16,), "layers": (3, 8, 16)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def some_gradients(count=STEPS):
    rng = np.random.default_rng(1)
    like = some_params()
    return [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), "float32"), like) for _ in range(count)]


def run(opt, params, grads):
    step, state = jax.jit(by_step(opt), donate_argnums=(0, 1)), opt.init(params)
    params = jax.tree.map(jnp.copy, params)
    for g in grads:
        params, state = step(params, state, g)
    assert step._cache_size() == 1
    return params, state


@pytest.mark.parametrize(
    ("rms", "stacked", "nesterov"), [(0.2, None, False), (None, "layers", False), (0.2, "layers", True)]
)
def test_it_is_muon_of_optax(rms, stacked, nesterov, lenient):
    """There, `nesterov` holds for Adam, too."""
    numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
    on = {"kernel": numbers, "tall": numbers, "embed": None, "bias": None, "layers": numbers if stacked else None}
    theirs = optax.contrib.muon(
        LR, weight_decay=0.1, adam_weight_decay=0.1, adam_b2=0.95, consistent_rms=rms, adam_learning_rate=2 * LR,
        muon_weight_dimension_numbers=on, nesterov=nesterov,
    )  # fmt: skip
    ours = muon(LR, consistent_rms=rms, stacked=stacked, nesterov=nesterov, adam_learning_rate=2 * LR)
    params, state = some_params(), theirs.init(some_params())
    update = jax.jit(theirs.update)
    for g in some_gradients():
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    found, (adam, (momentum, *_)) = run(ours, some_params(), some_gradients())
    compared = [name for name, p in params.items() if momentum.mu[name] is not None or not nesterov]
    assert_close({name: found[name] for name in compared}, {name: params[name] for name in compared}, RECOMPILED)
    assert isinstance(momentum, MuonState)
    assert adam[0].mu["kernel"] is None
    assert momentum.mu["embed"] is momentum.mu["bias"] is None


def test_a_step_of_a_matrix_is_as_long_as_one_of_adam():
    params, (grads,) = some_params(), some_gradients(1)
    opt = muon(LR, weight_decay=0.0)
    updates, _ = opt.update(grads, opt.init(params), params)
    for name in ("kernel", "tall"):
        size = float(jnp.sqrt(jnp.mean(updates[name] ** 2)))
        assert 0.1 * LR < size < 0.4 * LR


def test_it_is_a_value_and_its_numbers_are_leaves():
    assert muon(LR) == muon(LR)
    assert hash(muon(LR)) == hash(muon(LR))
    assert muon(LR) != muon(LR, ns_steps=4)
    params, (grads,) = some_params(), some_gradients(1)
    step = jax.jit(lambda opt, s: opt.step(grads, s, params))
    for opt in (muon(LR), muon(2 * LR, beta=0.9, weight_decay=0.2, consistent_rms=0.3)):
        step(opt, opt.init(params))
    assert step._cache_size() == 1


def test_half_precision_parameters_and_codes():
    params, grads = some_params("bfloat16"), some_gradients(10)
    opt = adamjax.kahan(muon(LR, mu_dtype=adamjax.quantized("int8", min_size=1), momentum_dtype="bfloat16"))
    found, state = run(opt, params, grads)
    assert found["kernel"].dtype == jnp.bfloat16
    assert state.inner[1][0].mu["kernel"].dtype == jnp.bfloat16
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    expected, state = run(muon(LR), wide, grads)
    assert state[1][0].mu["kernel"].dtype == jnp.float32
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.max(np.abs(np.asarray(a, np.float32) - b)) < 3 * 2**-8 * np.max(np.abs(b))


def test_zero1_a_checkpoint_and_an_export(tmp_path, lenient):
    mesh = make_mesh(AxisType.Auto)
    params = jax.device_put(some_params(), NamedSharding(mesh, P()))
    grads = [jax.device_put(g, NamedSharding(mesh, P())) for g in some_gradients(8)]
    opt = sharding.zero1(muon(LR), axis="data", mesh=mesh)
    found, state = run(opt, params, grads[:4])
    assert state.inner[1][0].mu["kernel"].sharding.shard_shape((16, 24)) == (2, 24)
    checkpoint.save(tmp_path / "run", opt, found, state, step=4)
    restored = checkpoint.restore(tmp_path / "run", opt, params)
    step = jax.jit(by_step(opt))
    again, there = restored.params, restored.state
    for g in grads[4:]:
        again, there = step(again, there, g)
    expected, alone = run(muon(LR), some_params(), some_gradients(8))
    assert_close(again, expected, 8 * RECOMPILED)
    plain = muon(LR)
    exported = jax.export.export(jax.jit(plain.step))(some_gradients(1)[0], alone, expected).serialize()
    assert_close(
        jax.export.deserialize(exported).call(some_gradients(1)[0], alone, expected),
        plain.step(some_gradients(1)[0], alone, expected),
        RECOMPILED,
    )


def test_a_gradient_that_is_missing_freezes_its_matrix():
    params, (grads,) = some_params(), some_gradients(1)
    opt = muon(LR)
    found, state = jax.jit(opt.step)(grads | {"kernel": None}, opt.init(params), params)
    assert_equal(found["kernel"], params["kernel"])
    assert_equal(state[1][0].mu["kernel"], jnp.zeros((16, 24)))


def test_it_is_tuned():
    problem = adamjax.problems.digits()
    report = adamjax.tuning.tune(problem, optimizer=muon, trials=3, steps=6, confirm=None, range_test=None)
    assert {"learning_rate", "b1", "b2", "weight_decay"} <= report.best.arguments.keys()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: muon(LR, adam="("), "Invalid adam value"),
        (lambda: muon(LR, adam="nothing").init(some_params()), "Invalid adam value: 'nothing' matches no parameter"),
        (lambda: muon(LR, beta=1.0), "Invalid beta value: 1.0"),
        (lambda: muon(LR, ns_steps=0), "ns_steps must be at least 1"),
        (lambda: muon(LR, momentum_dtype="int8"), "Invalid momentum_dtype value: int8"),
        (lambda: muon(-1.0), "Invalid learning rate: -1.0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
