"""Steps that are skipped, leaving every bit as it was, on every device; scaling the loss; telling."""

import warnings
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bowl import BOWL, Bowl
from helpers import assert_close, assert_equal, by_step, by_update, gradients
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from specs import ROUNDED, SPECS, STORED
from tolerances import RECOMPILED

import adamjax
from adamjax import training

BAD = {2: np.nan, 3: np.inf, 4: -np.inf, 9: 1e30}  # by step; the square of 1e30 is infinite
STEPS = 12
SHAPES = {"layer": {"kernel": (6, 16), "bias": (16,)}, "scale": ()}


def some_params(dtype="float32"):
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(size=s), SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    params["layer"]["kernel"][0, :2] = -0.0, 1e-42  # a sum with 0, and a processor that flushes, would change these
    return jax.tree.map(lambda p: jnp.asarray(p, dtype), params)


def some_gradients(dtype="float32"):
    trees = [
        {"layer": {"kernel": k, "bias": b}, "scale": s}
        for k, b, s in zip(
            *(gradients(shape, STEPS, seed=i) for i, shape in enumerate([(6, 16), (16,), ()])), strict=True
        )
    ]
    return [jax.tree.map(lambda g: jnp.asarray(g, dtype), tree) for tree in trees]


def spoilt(grads, x, leaf="bias", place=3):
    return {**grads, "layer": {**grads["layer"], leaf: grads["layer"][leaf].at[..., place].set(x)}}


by_optax = partial(by_update, apply=optax.apply_updates)


def assert_same_bits(a, b):
    assert_equal(a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


INNER = {
    **{name: SPECS[name].make for name in ("adamw schedules", "amsgrad torch")},
    **{name: STORED[name].make for name in ("amsgrad int8", "torch's nadam", *ROUNDED)},
    "optax": lambda: optax.adamw(optax.linear_schedule(1e-2, 0.0, 20)),
}


@pytest.mark.parametrize(
    ("name", "through"), [*((name, by_step) for name in INNER), ("amsgrad int8", by_optax), ("kahan", by_optax)]
)
def test_bad_steps_leave_no_trace(name, through, lenient):
    dtype = "bfloat16" if name in ROUNDED else "float32"
    opt = adamjax.skip_nonfinite(INNER[name]())
    advance = jax.jit(through(opt))
    runs = []
    for spoil in (True, False):
        params = some_params(dtype)
        state = opt.init(params)
        for i, grads in enumerate(some_gradients(dtype)):
            if i in BAD:
                if not spoil:
                    continue
                before = params, state.inner
                params, state = advance(params, state, spoilt(grads, BAD[i]))
                assert_same_bits((params, state.inner), before)
            else:
                params, state = advance(params, state, grads)
        runs.append((params, state))
    (params, state), (expected, clean) = runs
    assert_same_bits((params, state.inner), (expected, clean.inner))
    assert int(state.skipped) == len(BAD)
    assert int(clean.skipped) == 0
    assert dict(zip(state.nonfinite.paths, np.asarray(state.nonfinite.counts), strict=True)) == {
        "layer/bias": len(BAD),
        "layer/kernel": 0,
        "scale": 0,
    }


def under_jit(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    specs = {"layer": {"kernel": P(None, "data"), "bias": P("data")}, "scale": P()}

    def place(tree):
        return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)

    with jax.set_mesh(mesh):
        opt = adamjax.skip_nonfinite(adamjax.adamw(1e-2))
        params = place(some_params())
        return mesh, jax.jit(by_step(opt)), params, opt.init(params), place


def in_shard_map(check_vma, through=by_step):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"layer": {"kernel": P(None, "data"), "bias": P("data")}, "scale": P()}
    opt = adamjax.skip_nonfinite(adamjax.adamw(1e-2), axis_name="data")
    params = some_params()
    state = opt.init(params)
    of_state = jax.tree.map(lambda _: P(), state)
    adam = of_state.inner[0]._replace(mu=specs, nu=specs)
    of_state = of_state._replace(inner=(adam, *of_state.inner[1:]))
    advance = jax.shard_map(
        through(opt), mesh=mesh, in_specs=(specs, of_state, specs), out_specs=(specs, of_state), check_vma=check_vma
    )
    return mesh, jax.jit(advance), params, state, lambda g: g


@pytest.mark.parametrize(
    "make",
    [
        lambda: under_jit(AxisType.Auto),
        lambda: under_jit(AxisType.Explicit),
        lambda: in_shard_map(True),
        lambda: in_shard_map(False),
        lambda: in_shard_map(True, by_update),
    ],
    ids=["jit", "jit explicit", "shard_map", "shard_map unchecked", "shard_map by update"],
)
def test_all_devices_agree(make):
    mesh, advance, first_params, first_state, place = make()

    def run(grads):
        params, state = first_params, first_state
        with jax.set_mesh(mesh):
            for g in grads:
                params, state = advance(params, state, place(g))
        return params, state

    grads = some_gradients()
    spoilt_grads = [
        spoilt(g, BAD[i], leaf="kernel" if i % 2 else "bias", place=(5 * i) % 16) if i in BAD else g
        for i, g in enumerate(grads)
    ]
    params, state = run(spoilt_grads)
    expected, clean = run([g for i, g in enumerate(grads) if i not in BAD])
    assert_same_bits(params, expected)
    assert_same_bits(state.inner, clean.inner)
    assert int(state.skipped) == len(BAD)


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_devices_of_a_pmap_agree():
    opt = adamjax.skip_nonfinite(adamjax.adam(0.1), axis_name="data", max_consecutive=1)
    params = jnp.arange(16.0).reshape(8, 2)
    state = jax.pmap(opt.init)(params)
    grads = jnp.ones((8, 2)).at[5, 1].set(jnp.nan)  # one device alone
    after, state = jax.pmap(by_step(opt), axis_name="data")(params, state, grads)
    assert_equal(np.asarray(after), np.asarray(params))
    np.testing.assert_array_equal(state.skipped, np.ones(8))
    with pytest.raises(FloatingPointError, match="1 steps were skipped"):
        adamjax.check(state)


def test_members_of_a_population_skip_by_themselves():
    grads = jnp.ones((3, 2)).at[1, 0].set(jnp.nan)

    def advance(lr, g):
        opt = adamjax.skip_nonfinite(adamjax.adam(lr))
        params = jnp.zeros(2)
        return opt.step(g, opt.init(params), params)

    params, state = jax.vmap(advance)(jnp.array([0.1, 0.2, 0.3]), grads)
    assert_close(params, jnp.array([[-0.1, -0.1], [0.0, 0.0], [-0.3, -0.3]]), RECOMPILED)
    np.testing.assert_array_equal(state.skipped, [0, 1, 0])


def test_a_hypergradient_passes_a_skipped_step():
    def loss(lr):
        opt = adamjax.skip_nonfinite(adamjax.adam(lr))
        params = jnp.ones(2)
        state = opt.init(params)
        for g in (params, params * jnp.nan, params):
            params, state = opt.step(g, state, params)
        return jnp.sum(params)

    assert_close(jax.grad(loss)(0.1), jnp.float32(-4.0), RECOMPILED)


def test_the_state_says_when_it_is_too_much_and_goes_on_skipping():
    opt = adamjax.skip_nonfinite(adamjax.adam(0.1), max_consecutive=2)
    params = some_params()
    state = opt.init(params)
    good = some_gradients()[0]
    history = []
    for g in (spoilt(good, np.nan), good, spoilt(good, np.nan), spoilt(good, np.inf, leaf="kernel"), good):
        params, state = opt.step(g, state, params)
        history.append((int(state.consecutive), bool(state.exceeded)))
        if not state.exceeded:
            adamjax.check((state, {"other": 1.0}))
    assert history == [(1, False), (0, False), (1, False), (2, True), (0, True)]
    assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(params))
    with pytest.raises(FloatingPointError) as error:
        adamjax.check({"optimizer": (state,)})
    assert "3 steps were skipped" in str(error.value)
    assert "layer/bias at 2, layer/kernel at 1" in str(error.value)


@pytest.mark.parametrize("make", [adamjax.adam, optax.adam])
def test_check_finds_a_spoilt_moment(make, lenient):
    opt, params = make(0.1), {"kernel": jnp.ones(2), "bias": jnp.ones(1)}
    state = opt.init(params)
    adamjax.check(state)
    _, state = opt.update({"kernel": jnp.array([1.0, jnp.nan]), "bias": jnp.ones(1)}, state, params)
    with pytest.raises(FloatingPointError, match="not finite at 0/mu/kernel, and never will be again"):
        adamjax.check(state)


def test_a_parameter_without_gradient_keeps_every_bit():
    for opt in (adamjax.adam(0.1), adamjax.skip_nonfinite(adamjax.adam(0.1))):
        params = {"a": -jnp.zeros(2), "b": jnp.ones(2)}
        after, _ = opt.step({"a": None, "b": jnp.ones(2)}, opt.init(params), params)
        assert_same_bits(after["a"], params["a"])


HUGE = 1e20  # finite, and its square is not


def test_what_a_huge_gradient_does(lenient):
    """To optax: the second moment is infinite from then on, and the parameter stands still."""
    params = jnp.ones(2)
    grads = [jnp.array([HUGE, 1.0]), jnp.ones(2), jnp.ones(2)]

    def after(opt):
        p, state = params, opt.init(params)
        for g in grads:
            updates, state = opt.update(g, state, p)
            p = adamjax.apply_updates(p, updates)
        return p

    np.testing.assert_array_equal(after(optax.apply_if_finite(optax.adam(0.1), 5)) == 1, [True, False])
    assert_close(after(adamjax.skip_nonfinite(adamjax.adam(0.1))), jnp.full(2, 0.8), RECOMPILED)


def test_optax_lets_through_what_comes_too_often():
    opt, bad = optax.apply_if_finite(optax.sgd(0.1), 2), jnp.array([jnp.nan])
    state = opt.init(bad)
    for step in range(3):
        updates, state = opt.update(bad, state)
        assert np.isnan(updates[0]) == (step == 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: adamjax.skip_nonfinite(adamjax.adam), TypeError, "argument opt of skip_nonfinite is"),
        (lambda: adamjax.skip_nonfinite(adamjax.adam(), max_consecutive=0), ValueError, "max_consecutive must be at"),
        (
            lambda: adamjax.skip_nonfinite(adamjax.adam(), max_consecutive=cast(Any, 2.5)),
            TypeError,
            "max_consecutive must be an int",
        ),
        (
            lambda: adamjax.skip_nonfinite(adamjax.adam(), axis_name=cast(Any, 0)),
            TypeError,
            "Invalid axis_name value: 0",
        ),
        (lambda: adamjax.dynamic_loss_scale(adamjax.adam(), initial=3.0), ValueError, "Invalid initial value: 3.0"),
        (
            lambda: adamjax.dynamic_loss_scale(adamjax.adam(), growth_interval=2**31),
            ValueError,
            "Invalid growth_interval value: 2147483648; growth_interval must be below 2147483648",
        ),
        (
            lambda: adamjax.skip_nonfinite(adamjax.adam(), max_consecutive=10**14),
            ValueError,
            "max_consecutive must be below 2147483648",
        ),
        (
            lambda: adamjax.dynamic_loss_scale(adamjax.adam(), growth_interval=0),
            ValueError,
            "growth_interval must be at",
        ),
        (lambda: adamjax.kahan(adamjax.skip_nonfinite(adamjax.adam())), ValueError, "put it inside of that"),
        (
            lambda: adamjax.chain(adamjax.skip_nonfinite(adamjax.kahan(adamjax.adam())), adamjax.chain()),
            ValueError,
            "must be the last of a chain",
        ),
        (
            lambda: adamjax.skip_nonfinite(adamjax.adam()).update({"a": jnp.ones(1)}, ()),
            TypeError,
            "skip_nonfinite was given a tuple for its state, expected SkipState",
        ),
        (
            lambda: adamjax.skip_nonfinite(adamjax.adam()).update(
                {"b": jnp.ones(1)}, adamjax.skip_nonfinite(adamjax.adam()).init({"a": jnp.ones(1), "c": jnp.ones(1)})
            ),
            ValueError,
            "there is a gradient for b, which the state of skip_nonfinite does not know",
        ),
        (
            lambda: adamjax.dynamic_loss_scale(optax.adam(1e-3)).init({"a": jnp.ones(1, jnp.float16)}),
            ValueError,
            r"params\['a'\] is float16",
        ),
        (
            lambda: adamjax.dynamic_loss_scale(adamjax.adam()).scale(jnp.ones(()), adamjax.adam().init(jnp.ones(1))),
            TypeError,
            "dynamic_loss_scale was given a tuple for its state",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_scale_halves_on_overflow_and_grows():
    opt = adamjax.dynamic_loss_scale(adamjax.adam(0.1), initial=4.0, growth_interval=3)
    params = jnp.ones(2)
    state = opt.init(params)
    advance = jax.jit(by_step(opt))
    scales = []
    for x in (1, 1, 1, 1, np.inf, np.nan, np.nan, np.nan, np.nan, 1, 1, 1):
        before = params
        params, state = advance(params, state, jnp.full(2, x, jnp.float32))
        scales.append(float(state.scale))
        assert np.array_equal(before, params) == (not np.isfinite(x))
    assert scales == [4, 4, 8, 8, 4, 2, 1, 1, 1, 1, 1, 2]
    assert int(state.inner.skipped) == 5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scaling_changes_nothing_that_does_not_overflow(dtype):
    params = jnp.asarray(np.linspace(-2, 2, 9), dtype)
    plain = adamjax.master_weights(adamjax.adam(0.01))
    opt = adamjax.dynamic_loss_scale(plain, initial=2.0**10)
    state, expected, plain_state = opt.init(params), params, plain.init(params)

    def loss(p):
        return jnp.sum(p.astype(jnp.float32) ** 2)

    for _ in range(5):
        grads = jax.grad(lambda p, state=state: opt.scale(loss(p), state))(params)
        assert_equal(opt.unscale(grads, state), jax.grad(loss)(params).astype(jnp.float32))
        params, state = opt.step(grads, state, params)
        expected, plain_state = plain.step(jax.grad(loss)(expected), plain_state, expected)
    assert_close(params, expected, RECOMPILED)


class Faint:
    """The bowl in float16, with a loss whose gradients that dtype does not have."""

    init, batch, evaluate = Bowl("float16").init, BOWL.batch, BOWL.evaluate

    def loss(self, params, batch, key):
        return jnp.mean((params["x"] - 3) ** 2 * jnp.float16(1e-4)).astype(jnp.float32) * 1e-4


def test_float16_converges_where_it_would_not():
    opt = adamjax.adam(0.05, eps=1e-12)
    ends = {}
    for name, tried in {"plain": opt, "scaled": adamjax.dynamic_loss_scale(opt)}.items():
        *_, report = training.train(Faint(), tried, steps=200, evaluate_every=200)
        ends[name] = report.metrics["loss"]
    *_, start = training.train(Faint(), opt, steps=1, stop=lambda: True)
    assert ends["plain"] == start.metrics["loss"]
    assert ends["scaled"] < start.metrics["loss"] / 100


def test_a_run_goes_on_where_the_loss_was_not_finite_and_ends_when_it_is_hopeless():
    class Holed:
        init, batch, evaluate = BOWL.init, BOWL.batch, BOWL.evaluate
        until = 1.0

        def loss(self, params, batch, key):
            return BOWL.loss(params, batch, key) * jnp.where(batch[0] > self.until, jnp.nan, 1.0)

    problem = Holed()
    opt = adamjax.skip_nonfinite(adamjax.adam(0.1), max_consecutive=7)
    *_, report = training.train(problem, opt, steps=60, evaluate_every=60)
    assert report.step == 60
    assert report.diverged_at is None
    assert 0 < int(report.state.skipped) < 60
    assert report.metrics["loss"] < 1
    problem.until = -9.0
    with pytest.raises(FloatingPointError, match="gradients are not finite of x at"):
        list(training.train(problem, opt, steps=60))


def test_parameters_whose_paths_print_alike_are_not_exchanged():
    params = {"a/b": jnp.ones(2), "a": {"b": 2 * jnp.ones(2)}}
    opt = adamjax.skip_nonfinite(adamjax.adam(0.1))
    _, state = opt.step(params, opt.init(params), params)
    bad = jax.tree.map(lambda p: p * jnp.nan, params)
    _, after = jax.jit(opt.step)(bad, state, params)
    assert_equal(after.inner, state.inner)


def spoil(opt, steps, bad=jnp.nan):
    params = {"w": jnp.ones(2)}
    step = jax.jit(opt.step)
    state = opt.init(params)
    for _ in range(steps):
        params, state = step({"w": jnp.array([1.0, bad])}, state, params)
    return state


@pytest.mark.parametrize("around", [lambda opt: opt, lambda opt: adamjax.chain(opt)])
def test_a_loss_scale_does_not_skip_for_ever_in_silence(around):
    opt = around(adamjax.dynamic_loss_scale(adamjax.adam(), initial=2.0**24))
    adamjax.check(spoil(opt, 24))  # the scale has just come down to 1
    with pytest.raises(FloatingPointError, match=r"25 steps were skipped.*not finite of w at 25"):
        adamjax.check(spoil(opt, 25))


@pytest.mark.parametrize("wrap", [adamjax.skip_nonfinite, adamjax.dynamic_loss_scale])
def test_endless_skipping_that_is_allowed_is_said(wrap):
    opt = wrap(adamjax.adam(), max_consecutive=None)
    with pytest.warns(UserWarning, match="30 steps were skipped, many in a row"):
        adamjax.check(spoil(opt, 30))


def test_the_order_of_a_loss_scale_and_others():
    scaled = adamjax.dynamic_loss_scale(adamjax.adam())
    before = r"before dynamic_loss_scale in a chain, and is given gradients that are multiplied"
    for first in (adamjax.clip_by_global_norm(1.0), adamjax.add_decayed_weights(0.1), optax.clip(1.0)):
        with pytest.warns(UserWarning, match=before):
            adamjax.chain(first, scaled)
    with pytest.warns(UserWarning, match=before):
        adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.chain(scaled))
    with pytest.warns(UserWarning, match="skip_nonfinite around dynamic_loss_scale skips the steps"):
        adamjax.skip_nonfinite(scaled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adamjax.chain(scaled, adamjax.scale_by_learning_rate(0.1))
        adamjax.dynamic_loss_scale(adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.adam()))
