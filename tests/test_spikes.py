"""Steps whose gradient or loss spikes are skipped, and leave no trace; a higher level is accepted in the end."""

import shutil
import warnings
from functools import partial
from typing import Any, cast

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bowl import BOWL
from helpers import assert_close, assert_equal, by_step, by_update, make_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from specs import ROUNDED, STORED
from tolerances import ORACLE, RECOMPILED

import adamjax
from adamjax import checkpoint, sharding, training
from adamjax.kernels import _library

COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
QUICK: dict[str, Any] = {"warmup": 4, "window": 8}
SPIKES = {9: 40.0, 10: 25.0, 17: np.nan, 22: 1e30}  # by step, the factor of the gradients
STEPS = 26


def some_params(dtype="float32"):
    rng = np.random.default_rng(0)
    return {"kernel": jnp.asarray(rng.normal(size=(8, 16)), dtype), "bias": -jnp.zeros(8, dtype)}


def some_gradients(dtype="float32"):
    rng = np.random.default_rng(1)
    return [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), dtype), some_params()) for _ in range(STEPS)]


def scaled(grads, factor):
    return jax.tree.map(lambda g: g * jnp.asarray(factor, g.dtype), grads)


def assert_same_bits(a, b):
    assert_equal(a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def decisions(series, *, sigma, window, warmup, limit):
    """From the definition: which steps are skipped, and mean and deviation in the end, with a weight for each value.

    `series` has the numbers of each step in its columns.
    """
    skipped: list[bool] = []
    kept, weights, row = [], np.zeros(0, np.longdouble), 0
    for values in np.asarray(series, np.longdouble):
        made = np.asarray(kept, np.longdouble).reshape(-1, len(values))
        mean = weights @ made
        deviation = np.sqrt(weights @ (made - mean) ** 2)
        high = values - mean > sigma * np.maximum(deviation, np.abs(mean) / 100)
        spikes = len(kept) >= warmup and bool(np.any(high))
        accepts = limit is not None and row >= limit
        skips = not np.all(np.isfinite(values)) or (spikes and not accepts)
        skipped.append(skips)
        row = row + 1 if skips else 0
        if skips:
            continue
        if spikes:
            kept, weights = [], np.zeros(0, np.longdouble)
        kept.append(values)
        newest = max(np.longdouble(1) / len(kept), np.longdouble(1) / window)
        weights = np.append(weights * (1 - newest), newest)
    made = np.asarray(kept, np.longdouble)
    mean = weights @ made
    return skipped, mean, np.sqrt(weights @ (made - mean) ** 2)


@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("name", ["loss", "value", None])
def test_steps_are_judged_by_the_definition(name, limit):
    rng = np.random.default_rng(7)
    levels = np.where(np.arange(150) < 90, 1.0, 30.0)  # a level that rises for good
    norms = levels * np.exp(0.2 * rng.normal(size=150)) * np.where(rng.random(150) < 0.08, 20.0, 1.0)
    losses = 3 - np.arange(150) / 60 + 0.1 * rng.normal(size=150) + np.where(rng.random(150) < 0.05, 9.0, 0.0)
    norms[[20, 60]] = np.inf, np.nan
    losses[70] = np.nan
    series = np.stack([norms, losses], axis=1).astype(np.float32)
    opt = adamjax.skip_spikes(adamjax.adam(0.1), sigma=4, window=20, warmup=6, max_consecutive=limit)

    def advance(state, x):
        extra = {} if name is None else {name: x[1]}
        grads = {"a": x[0] * jnp.float32(0.6), "b": x[0] * jnp.full(4, 0.4, jnp.float32)}
        _, after = opt.step(grads, state, jax.tree.map(jnp.zeros_like, grads), **extra)
        return after, after.consecutive > 0

    state, found = jax.lax.scan(advance, opt.init({"a": jnp.zeros(()), "b": jnp.zeros(4)}), jnp.asarray(series))
    used = series if name else series[:, :1]
    expected, mean, deviation = decisions(used, sigma=4, window=20, warmup=6, limit=limit)
    assert 8 < sum(expected) < 80
    assert list(np.asarray(found)) == expected
    assert int(state.skipped) == sum(expected)
    stats = (state.norm, state.loss) if name else (state.norm,)
    tolerance = 10 * ORACLE["float32"]
    np.testing.assert_allclose([x.mean for x in stats], np.asarray(mean, float), rtol=tolerance)
    np.testing.assert_allclose([x.deviation for x in stats], np.asarray(deviation, float), rtol=tolerance)
    assert (int(state.loss.count) > 0) == (name is not None)


INNER = {
    "adamw": lambda: adamjax.adamw(1e-2),
    "int8": STORED["amsgrad int8"].make,
    "kahan": lambda: adamjax.kahan(adamjax.adamw(1e-2)),
    "groups": lambda: adamjax.groups({"bias": {"weight_decay": 0.0}}, default=adamjax.adamw(1e-2)),
    "packed": lambda: adamjax.packed(adamjax.adamw(1e-2)),
    "optax": lambda: optax.adamw(optax.linear_schedule(1e-2, 0.0, 20)),
    "clipped": lambda: adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.adamw(1e-2)),
}


@pytest.mark.parametrize(
    ("name", "through"), [*((name, by_step) for name in INNER), ("kahan", by_update), ("int8", by_update)]
)
def test_spikes_leave_no_trace(name, through, lenient):
    """Parameters, moments, counts and statistics are those of a run without these steps, bit for bit."""
    dtype = "bfloat16" if name in ROUNDED else "float32"
    opt = adamjax.skip_spikes(INNER[name](), **QUICK)
    advance = jax.jit(through(opt), donate_argnums=(0, 1))
    runs = []
    for spoil in (True, False):
        params = some_params(dtype)
        state = opt.init(params)
        for i, grads in enumerate(some_gradients(dtype)):
            if i in SPIKES:
                if not spoil:
                    continue
                before = jax.tree.map(np.array, (params, state.inner))
                params, state = advance(params, state, scaled(grads, SPIKES[i]))
                assert_same_bits(jax.tree.map(np.array, (params, state.inner)), before)
                assert int(state.consecutive) > 0
            else:
                params, state = advance(params, state, grads)
        runs.append((params, state))
    (params, state), (expected, clean) = runs
    assert_same_bits((params, state.inner, state.norm, state.loss), (expected, clean.inner, clean.norm, clean.loss))
    assert (int(state.skipped), int(clean.skipped)) == (len(SPIKES), 0)
    assert advance._cache_size() == 1


@COMPILER
def test_a_kernel_runs_where_a_step_is_made():
    opt, params = adamjax.skip_spikes(adamjax.adamw(1e-2, fused=True)), {"w": jnp.ones((256, 256))}
    lowered = jax.jit(by_step(opt), donate_argnums=(0, 1)).lower(params, opt.init(params), params)
    assert lowered.as_text().count(_library.target()) == 1
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < params["w"].nbytes  # nothing is kept beside the moments


def under_jit(axis_type):
    mesh = make_mesh(axis_type)
    specs = {"kernel": P(None, "data"), "bias": P("data")}

    def place(tree):
        return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)

    with jax.set_mesh(mesh):
        opt = adamjax.skip_spikes(adamjax.adamw(1e-2), **QUICK)
        params = place(some_params())
        return mesh, jax.jit(by_step(opt)), params, opt.init(params), place


def with_zero1():
    mesh = make_mesh(AxisType.Auto)
    params = jax.device_put(some_params(), NamedSharding(mesh, P()))
    opt = sharding.zero1(adamjax.skip_spikes(adamjax.adamw(1e-2), **QUICK), axis="data", mesh=mesh)
    return mesh, jax.jit(by_step(opt)), params, opt.init(params), lambda g: g


def in_shard_map(check_vma):
    mesh = make_mesh(AxisType.Auto)
    specs = {"kernel": P(None, "data"), "bias": P("data")}
    opt = adamjax.skip_spikes(adamjax.adamw(1e-2), axis_name="data", **QUICK)
    params = some_params()
    state = opt.init(params)
    of_state = jax.tree.map(lambda _: P(), state)
    adam = of_state.inner[0]._replace(mu=specs, nu=specs)
    of_state = of_state._replace(inner=(adam, *of_state.inner[1:]))

    def advance(params, state, grads):
        loss = 1.0 + jax.lax.axis_index("data").astype(jnp.float32)  # another one on each device
        return opt.step(grads, state, params, loss=loss)

    advance = jax.shard_map(
        advance, mesh=mesh, in_specs=(specs, of_state, specs), out_specs=(specs, of_state), check_vma=check_vma
    )
    return mesh, jax.jit(advance), params, state, lambda g: g


@pytest.mark.parametrize(
    "make",
    [
        partial(under_jit, AxisType.Auto),
        partial(under_jit, AxisType.Explicit),
        with_zero1,
        partial(in_shard_map, True),
        partial(in_shard_map, False),
    ],
    ids=["jit", "jit explicit", "zero1", "shard_map", "shard_map unchecked"],
)
def test_all_devices_agree(make):
    mesh, advance, params, state, place = make()
    alone = adamjax.skip_spikes(adamjax.adamw(1e-2), **QUICK)
    expected = some_params()
    by_itself, clean = jax.jit(by_step(alone)), alone.init(expected)
    with jax.set_mesh(mesh):
        for i, grads in enumerate(some_gradients()[:14]):
            one = {"kernel": grads["kernel"].at[:, 3].multiply(SPIKES.get(i, 1.0)), "bias": grads["bias"]}
            params, state = advance(params, state, place(one))
            expected, clean = by_itself(expected, clean, one)
    assert_close(params, expected, 4 * RECOMPILED)
    assert adamjax.safety.skipped(state) == adamjax.safety.skipped(clean) == 2
    found = state.inner if isinstance(state, sharding.Zero1State) else state
    if int(found.loss.count):
        assert_close(found.loss.mean, jnp.float32(4.5), RECOMPILED)


def test_members_of_a_population_skip_by_themselves():
    sizes = jnp.array([1.0, 1.0, 1.0, 9.0])

    def run(sigma):
        opt = adamjax.skip_spikes(adamjax.adam(0.1), sigma=sigma, warmup=2)
        state = opt.init(jnp.zeros(2))
        return jax.lax.scan(lambda s, x: (opt.step(jnp.full(2, x), s, jnp.zeros(2))[1], None), state, sizes)[0].skipped

    np.testing.assert_array_equal(jax.vmap(run)(jnp.array([2.0, 1e4, 6.0])), [1, 0, 1])


def test_a_hypergradient_passes_a_skipped_step():
    def loss(lr):
        opt = adamjax.skip_spikes(adamjax.adam(lr), warmup=2)
        params = jnp.ones(2)
        state = opt.init(params)
        for g in (params, params, params * 99, params):
            params, state = opt.step(g, state, params, loss=jnp.sum(params**2))
        return jnp.sum(params)

    assert_close(jax.grad(loss)(0.1), jnp.float32(-6.0), RECOMPILED)


def test_a_level_that_has_risen_for_good_is_accepted():
    opt = adamjax.skip_spikes(adamjax.adam(0.1), warmup=3, max_consecutive=4)
    params, rows = jnp.ones(2), []
    state = opt.init(params)
    for size in [1.0] * 5 + [7.0] * 8:
        params, state = opt.step(jnp.full(2, size), state, params)
        rows.append(int(state.consecutive))
    assert rows == [0] * 5 + [1, 2, 3, 4] + [0] * 4
    assert int(state.norm.count) == 4  # begun anew
    adamjax.check(state)
    for _ in range(5):  # but never a NaN
        params, state = opt.step(jnp.full(2, jnp.nan), state, params)
    assert bool(jnp.all(jnp.isfinite(params)))
    with pytest.raises(FloatingPointError, match="9 steps were skipped, more than max_consecutive of them in a row"):
        adamjax.check(state)


def test_endless_skipping_that_is_allowed_is_said():
    opt = adamjax.skip_spikes(adamjax.adam(0.1), warmup=3, max_consecutive=None)
    params = jnp.ones(2)
    state, step = opt.init(params), jax.jit(opt.step)
    for size in [1.0] * 5 + [7.0] * 30:
        params, state = step(jnp.full(2, size), state, params)
    with pytest.warns(UserWarning, match="30 steps were skipped, many in a row .* far above its mean"):
        adamjax.check(state)


def test_an_export_and_a_checkpoint_go_on(tmp_path):
    opt, params = adamjax.skip_spikes(adamjax.adamw(1e-2), **QUICK), some_params()
    first, second = some_gradients()[:9], some_gradients()[9:14]
    state = opt.init(params)
    step = jax.jit(by_step(opt))
    exported = jax.export.deserialize(jax.export.export(step)(params, state, first[0]).serialize()).call
    for grads in first:
        params, state = exported(params, state, grads)
    checkpoint.save(tmp_path / "run", opt, params, state, step=9)
    found = checkpoint.restore(tmp_path / "run", opt, params)
    again, there = found.params, found.state
    for i, grads in enumerate(second, start=9):
        grads = scaled(grads, SPIKES.get(i, 1.0))
        params, state = step(params, state, grads)
        again, there = exported(again, there, grads)
    assert_same_bits((params, state), (again, there))
    assert int(state.skipped) == 2


def test_a_run_with_bad_batches_ends_where_one_without_does():
    class Spiky:
        init, evaluate = BOWL.init, BOWL.evaluate
        bad: tuple[int, ...] = ()

        def batch(self, step, key):
            return BOWL.batch(step, key), jnp.isin(step, jnp.asarray(self.bad, jnp.int32))

        def loss(self, params, batch, key):
            data, is_bad = batch
            return BOWL.loss(params, data, key) * jnp.where(is_bad, 1e4, 1.0)

    def loss_after(problem, opt):
        *_, report = training.train(problem, opt, steps=120, evaluate_every=120)
        return report.metrics["loss"], report

    clean, spoilt = Spiky(), Spiky()
    spoilt.bad = (70, 71, 90)
    opt = adamjax.adam(0.1)
    guarded, report = loss_after(spoilt, adamjax.skip_spikes(opt, warmup=16))
    assert {int(report.state.skipped)} == {3}
    assert guarded < 2 * loss_after(clean, opt)[0] < loss_after(spoilt, opt)[0]


def test_the_order_of_wrappers():
    opt = adamjax.skip_spikes(adamjax.adam())
    with pytest.warns(UserWarning, match=r"skip_spikes around dynamic_loss_scale skips .* put skip_spikes inside"):
        adamjax.skip_spikes(adamjax.dynamic_loss_scale(adamjax.adam()))
    with pytest.warns(UserWarning, match=r"exchange them, skip_nonfinite\(skip_spikes"):
        adamjax.skip_spikes(adamjax.skip_nonfinite(adamjax.adam()))
    with pytest.raises(ValueError, match="put it inside of that"):
        adamjax.kahan(opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adamjax.dynamic_loss_scale(opt)
        both = adamjax.skip_nonfinite(adamjax.skip_spikes(adamjax.adam(0.1), warmup=2))
    params = {"w": jnp.ones(2)}
    state = both.init(params)
    for x in (1.0, 1.0, jnp.nan, 50.0, 1.0):
        params, state = both.step({"w": jnp.full(2, x)}, state, params)
        last = adamjax.safety.was_skipped(state)
        assert bool(last) == (x != 1.0)
    assert adamjax.safety.skipped(state) == 2
    assert int(state.skipped) == int(state.inner.skipped) == 1
    assert_close(params, {"w": jnp.full(2, 0.7)}, RECOMPILED)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: adamjax.skip_spikes(cast(Any, adamjax.adam)), TypeError, "argument opt of skip_spikes is"),
        (lambda: adamjax.skip_spikes(adamjax.adam(), sigma=-1.0), ValueError, "Invalid sigma value: -1.0"),
        (lambda: adamjax.skip_spikes(adamjax.adam(), window=1), ValueError, "window must be at least 2"),
        (lambda: adamjax.skip_spikes(adamjax.adam(), warmup=0), ValueError, "warmup must be at least 2"),
        (lambda: adamjax.skip_spikes(adamjax.adam(), max_consecutive=0), ValueError, "max_consecutive must be at"),
        (lambda: adamjax.skip_spikes(adamjax.adam(), axis_name=cast(Any, 0)), TypeError, "Invalid axis_name value"),
        (
            lambda: adamjax.skip_spikes(adamjax.adam()).update(jnp.ones(1), ()),
            TypeError,
            "skip_spikes was given a tuple for its state, expected SpikeState",
        ),
        (
            lambda: adamjax.skip_spikes(adamjax.adam()).update(
                jnp.ones(1), adamjax.skip_spikes(adamjax.adam()).init(jnp.ones(1)), loss=jnp.ones(2)
            ),
            ValueError,
            "loss has shape",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
