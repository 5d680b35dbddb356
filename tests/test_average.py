"""Schedule-free steps and averages of parameters, and the parameters to evaluate at that they say."""

import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from bowl import Bowl
from helpers import assert_close, assert_equal, assert_same_types, by_step, by_update, gradients, make_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from same_step import assert_near
from specs import LR, RISE_AND_FALL
from tolerances import AVERAGE, ORACLE, RECOMPILED, SWEEP

import adamjax
from adamjax import interop, sharding, tuning
from adamjax.kernels import _library
from adamjax.training import train

pytestmark = pytest.mark.numbers

STEPS = 50
SHAPE = (6, 7)
GRADS = gradients(SHAPE, STEPS)
START = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
PARAMS = {"a": jnp.linspace(-1, 1, 64).reshape(8, 8), "b": [jnp.ones(8), jnp.linspace(2, 3, 16)]}


def some_grads(seed, params=PARAMS):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def after(opt, params=PARAMS, steps=10, through=by_step):
    """Parameters and state after some steps."""
    state, advance = opt.init(params), jax.jit(through(opt))
    for i in range(steps):
        params, state = advance(params, state, some_grads(i, params))
    return params, state


def followed(opt, p=START, grads=GRADS):
    """Parameters and state after all steps of one array."""
    p = jnp.asarray(p)
    state, step = opt.init(p), jax.jit(opt.step)
    for g in grads:
        p, state = step(jnp.asarray(g), state, p)
    return p, state


OPTIONS = {"b1": 0.9, "b2": 0.99, "weight_decay": 0.1}


@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_schedule_free_is_that_of_the_authors(warmup_steps):
    torch = pytest.importorskip("torch")
    schedulefree = pytest.importorskip("schedulefree")
    y = torch.nn.Parameter(torch.tensor(START))
    theirs = schedulefree.AdamWScheduleFree(
        [y], lr=LR, betas=(0.9, 0.99), weight_decay=0.1, warmup_steps=warmup_steps, foreach=False
    )
    theirs.train()
    for g in GRADS:
        y.grad = torch.tensor(g)
        theirs.step()
    found, state = followed(adamjax.schedule_free_adamw(LR, warmup_steps, **OPTIONS))
    assert_close(found, y.detach().numpy(), RECOMPILED)
    assert_close(state[0].z, theirs.state[y]["z"].numpy(), RECOMPILED)
    theirs.eval()
    assert_close(adamjax.eval_params(state, found), y.detach().numpy(), RECOMPILED)


@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_schedule_free_is_that_of_optax(warmup_steps, lenient):
    """Optax evaluates the schedule of the base optimizer one step before that of the weights."""

    def rate(before):
        return lambda count: LR * jnp.minimum((count + before) / max(warmup_steps, 1), 1)

    base = optax.chain(
        optax.scale_by_rms(0.99, 1e-8, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(rate(1)),
    )
    theirs = optax.contrib.schedule_free(base, rate(0), b1=0.9)
    p = jnp.asarray(START)
    their_state, update = theirs.init(p), jax.jit(theirs.update)
    for g in GRADS:
        updates, their_state = update(g, their_state, p)
        p = optax.apply_updates(p, updates)
    found, state = followed(adamjax.schedule_free_adamw(LR, warmup_steps, **OPTIONS))
    assert_close(found, p, 2 * RECOMPILED)
    assert_close(state[0].z, their_state.z, RECOMPILED)
    assert_close(
        adamjax.eval_params(their_state, p), optax.contrib.schedule_free_eval_params(their_state, p), RECOMPILED
    )
    assert_close(
        adamjax.eval_params(state, found), optax.contrib.schedule_free_eval_params(state[0], found), RECOMPILED
    )


@pytest.mark.parametrize(
    "keywords",
    [{"learning_rate": LR, "weight_decay": 0.1}, {"learning_rate": LR, "warmup_steps": 7, "b1": 0.98}],
)
def test_the_average_follows_the_oracle(keywords):
    with jax.enable_x64(True):
        p, state = followed(adamjax.schedule_free_adamw(**keywords), START.astype(np.float64))
        y, x = oracle.schedule_free(START.astype(np.float64), GRADS, **keywords)[-1]
        for found, exact in ((p, y), (adamjax.eval_params(state, p), x)):
            assert np.max(np.abs(oracle.long(found) - exact)) <= ORACLE["float64"] * STEPS


def test_the_average_of_a_scheduled_rate_follows_the_oracle():
    """Its weights are those of the largest rate so far."""
    ours = adamjax.schedule_free_adamw(lambda t: LR * jnp.abs(10 - t.astype(float)) / 10)
    p, state = followed(ours)
    _, x = oracle.schedule_free(START, GRADS, learning_rate=lambda t: LR * abs(10 - t) / 10)[-1]
    assert_close(adamjax.eval_params(state, p), np.asarray(x, np.float32), STEPS * ORACLE["float32"])


@pytest.mark.parametrize("power", [0.0, 2.0, 8.0])
def test_weights_neither_underflow_nor_lose_steps(power):
    """The weight of a rate of 1e-20 to the 8th is none in float32; and a million equal weights sum to a million."""
    opt = adamjax.schedule_free_adamw(1e-20, weight_lr_power=power)
    p = jnp.ones(3)
    state = opt.init(p)
    for n in (1, 2, 3):
        _, state = opt.step(p, state, p)
        assert state[0].weight_sum == n
    many = (state[0]._replace(weight_sum=jnp.float32(2.0**23)),)
    assert opt.step(p, many, p)[1][0].weight_sum == 2.0**23 + 1


def test_a_rate_of_zero_moves_nothing():
    p, state = followed(adamjax.schedule_free_adamw(adamjax.schedules.constant(0.0)))
    assert_equal(p, jnp.asarray(START))
    assert_equal(adamjax.eval_params(state, p), jnp.asarray(START))


def test_x_is_right_after_a_change_of_b1():
    """Hyperparameters are leaves: a step with another b1 goes on from the same x."""
    first, second = (adamjax.schedule_free_adamw(LR, b1=b1) for b1 in (0.9, 0.97))
    p, state = followed(first)
    x = adamjax.eval_params(state, p)
    p, state = second.step(GRADS[0], state, p)
    c = 1 / (STEPS + 1)
    assert_close(adamjax.eval_params(state, p), (1 - c) * x + c * state[0].z, RECOMPILED)


def test_a_step_is_differentiated_by_b1_and_by_the_rate():
    hyperparameters = {"learning_rate": LR, "b1": 0.8}

    def loss(opt):
        p = jnp.asarray(START, jnp.float64)
        state = opt.init(p)
        for g in GRADS[:3]:
            p, state = opt.step(jnp.asarray(g), state, p)
        return jnp.sum(adamjax.eval_params(state, p) ** 2 + p**2)

    with jax.enable_x64(True):
        found = jax.grad(loss)(jax.tree.map(jnp.float64, adamjax.schedule_free_adamw(**hyperparameters)))
        for name, x in hyperparameters.items():
            ends = [loss(adamjax.schedule_free_adamw(**hyperparameters | {name: x + h})) for h in (-1e-5, 1e-5)]
            np.testing.assert_allclose(getattr(found.transforms[0], name), (ends[1] - ends[0]) / 2e-5, rtol=RECOMPILED)


# What eval_params finds, wherever it is: each with what it evaluates to in the plain run of the same steps.
WITHIN = {
    "chain": lambda opt: adamjax.chain(optax.identity(), adamjax.chain(opt)),
    "skip_nonfinite": adamjax.skip_nonfinite,
    "groups": lambda opt: adamjax.groups({"a|b": opt}),
    "MultiSteps": lambda opt: optax.MultiSteps(interop.optax.wrap(opt), 1),
    "partition": lambda opt: optax.partition({"x": opt, "y": opt}, {"a": "x", "b": "y"}),
    "master_weights": adamjax.master_weights,  # of float32 parameters, which it does not touch
    "flax": lambda opt: optax.chain(optax.identity(), optax.masked(opt, {"a": True, "b": True})),
}
MAKES = {
    "schedule free": lambda: adamjax.schedule_free_adamw(LR, weight_decay=0.1),
    "average": lambda: adamjax.average_params(adamjax.adamw(LR), 0.9),
}


@pytest.mark.parametrize("name", WITHIN)
@pytest.mark.parametrize("make", MAKES)
def test_it_is_found_wherever_it_is(name, make, lenient):
    if (name, make) == ("master_weights", "average"):
        pytest.skip("is refused")
    params, state = after(MAKES[make]())
    expected = adamjax.eval_params(state, params)
    assert not np.allclose(expected["a"], params["a"])
    found, state = after(WITHIN[name](MAKES[make]()), through=partial(by_update, apply=optax.apply_updates))
    assert_close(found, params, RECOMPILED)
    assert_close(adamjax.eval_params(state, found), expected, RECOMPILED)
    assert_close(jax.jit(adamjax.eval_params)(state, found), expected, RECOMPILED)


def test_parameters_without_an_average_are_those_that_are_trained():
    opt = adamjax.groups({"a": adamjax.schedule_free_adamw(LR)}, default=adamjax.adamw(LR))
    params, state = after(opt)
    found = adamjax.eval_params(state, params)
    assert_equal(found["b"], params["b"])
    assert not np.allclose(found["a"], params["a"])


ROUNDS = {
    "master_weights": adamjax.master_weights,
    "low_bits": partial(adamjax.master_weights, low_bits=True),
    "kahan": adamjax.kahan,
    "stochastic_rounding": adamjax.stochastic_rounding,
    "low_bits=8": partial(adamjax.master_weights, low_bits=8),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_x_of_rounded_parameters_is_that_of_float32(name):
    """To the last bit where the digits of y are kept; to a few spacings of bfloat16 where rounding moves it."""
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), half)
    grads = [jax.tree.map(lambda g: g.astype(jnp.bfloat16), some_grads(i)) for i in range(30)]
    results = []
    for opt, params in ((ROUNDS[name](adamjax.schedule_free_adamw(LR)), half), (adamjax.schedule_free_adamw(LR), wide)):
        state, advance = opt.init(params), jax.jit(opt.step)
        for g in grads:
            params, state = advance(g, state, params)
        results.append(adamjax.eval_params(state, params))
    found, expected = results
    assert_same_types(found, half)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected)
    if name in ("master_weights", "low_bits"):
        assert_equal(found, expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x.astype(np.float32), y.astype(np.float32), rtol=4 * 2**-8, atol=4 * 2**-8)


def test_z_does_not_lose_small_steps():
    """At a rate of 1e-5, z moves beside parameters of size 1, where bfloat16 would not; y and x with master weights."""
    opt = adamjax.master_weights(adamjax.schedule_free_adamw(1e-5, b2=0.9))
    params = jnp.ones(100, jnp.bfloat16)
    state = opt.init(params)
    assert state.inner[0].z.dtype == jnp.float32
    step = jax.jit(opt.step)
    for _ in range(200):
        params, state = step(jnp.ones(100, jnp.bfloat16), state, params)
    assert_close(state.inner[0].z, jnp.full(100, 1 - 200e-5), 1e-5)


BAD = [
    (lambda: adamjax.eval_params(adamjax.adamw().init(PARAMS), PARAMS), "neither a ScheduleFreeState of schedule_free"),
    (lambda: adamjax.eval_params((), PARAMS), "no parameters to evaluate at in the state, a tuple"),
    (
        lambda: adamjax.eval_params(adamjax.schedule_free_adamw().init(PARAMS), {"a": PARAMS["a"]}),
        r"the state averages float32\[8\] at params\['b'\]\[0\], and there is None",
    ),
    (
        lambda: adamjax.eval_params(adamjax.schedule_free_adamw().init({"a": jnp.ones(3)}), {"a": jnp.ones(4)}),
        r"the state averages float32\[3\] at params\['a'\], and there is float32\[4\]",
    ),
    (
        lambda: adamjax.eval_params([adamjax.schedule_free_adamw().init(PARAMS)] * 2, PARAMS),
        r"two averages of params\['a'\]",
    ),
    (
        lambda: adamjax.eval_params(
            jax.vmap(lambda b1: adamjax.schedule_free_adamw(b1=b1).init(jnp.ones(2)))(jnp.array([0.8, 0.9])),
            jnp.ones((2, 2)),
        ),
        r"b1 in the state has shape \(2,\).*jax\.vmap",
    ),
    (lambda: adamjax.schedule_free_adamw(b1=0.0), "Invalid beta parameter at index 0: 0.0; b1 must be above 0"),
    (lambda: adamjax.schedule_free_adamw(warmup_steps=2.5), "warmup_steps must be a whole number of steps"),
    (lambda: adamjax.chain(adamjax.schedule_free_adamw(), optax.scale(2.0)), "must be the last of a chain"),
    (lambda: adamjax.chain(adamjax.average_params(adamjax.adam()), optax.scale(2.0)), "must be the last of a chain"),
    (lambda: adamjax.average_params(adamjax.schedule_free_adamw()), "which averages the parameters already"),
    (lambda: adamjax.average_params(adamjax.average_params(adamjax.adam())), "which averages the parameters already"),
    (lambda: adamjax.average_params(adamjax.skip_nonfinite(adamjax.adam())), "put it inside of that"),
    (lambda: adamjax.kahan(adamjax.average_params(adamjax.adam())), "not rounded yet: put it inside of that"),
    (lambda: adamjax.average_params(adamjax.adam(), 1.0), "Invalid decay value: 1.0"),
    (lambda: adamjax.average_params(adamjax.adam(), dtype="float16"), "dtype must be bfloat16 or float32"),
    (
        lambda: adamjax.average_params(adamjax.adam(), dtype="bfloat16").init({"w": jnp.ones(2, complex)}),
        r"params\['w'\] is complex64, and an average in bfloat16",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_what_would_be_wrong_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("make", MAKES)
def test_what_has_no_place_for_it_is_refused(make):
    pytest.importorskip("torch")
    opt = MAKES[make]()
    state = opt.init(PARAMS)
    with pytest.raises(TypeError, match=r"has no place for the average|has no counterpart in torch"):
        interop.torch.export_state(opt, PARAMS, state)
    with pytest.raises(TypeError, match=r"optax has nothing like|is not one of adamjax's optimizers"):
        interop.optax.export_state(opt, state)
    if make == "schedule free":
        with pytest.raises(TypeError, match="packed found nothing to pack"):
            adamjax.packed(opt)


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("through", [by_step, by_update])
def test_the_average_is_that_of_the_parameters(warmup, through):
    """Against the definition, in float64."""
    opt = adamjax.average_params(adamjax.adamw(0.1), 0.8, warmup=warmup)
    p = jnp.asarray(START)
    state, advance = opt.init(p), jax.jit(through(opt))
    expected = START.astype(np.float64)
    for t, g in enumerate(GRADS):
        p, state = advance(p, state, jnp.asarray(g))
        decay = min(0.8, (1 + t) / (10 + t)) if warmup else 0.8
        expected = decay * expected + (1 - decay) * np.asarray(p, np.float64)
        assert_close(adamjax.eval_params(state, p), expected.astype(np.float32), RECOMPILED)
    plain, _ = followed(adamjax.adamw(0.1))
    assert_close(p, plain, RECOMPILED)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_average_in_low_precision_moves(dtype):
    """Towards parameters that stand still, by the thousandth of a spacing at a step, and without a bias."""
    opt = adamjax.average_params(adamjax.adam(0.0), 0.999, warmup=False, dtype=dtype)
    p = jnp.full(4096, 1.5)
    state = opt.init(p)._replace(average=jnp.ones(4096, dtype))

    def body(_, carry):
        return opt.step(p, carry[1], carry[0])

    _, state = jax.jit(lambda s: jax.lax.fori_loop(0, 1000, body, (p, s)))(state)
    assert state.average.dtype == dtype
    errors = state.average.astype(jnp.float32) - (1.5 - 0.5 * 0.999**1000)
    worst, bias = AVERAGE[dtype]
    assert jnp.max(jnp.abs(errors)) < worst
    assert abs(jnp.mean(errors)) < bias


def test_a_frozen_parameter_is_averaged_on():
    opt = adamjax.average_params(adamjax.adam(0.1), 0.5, warmup=False)
    params, state = after(opt, steps=3)
    frozen = some_grads(7) | {"a": None}
    for through in (by_step, by_update):
        new, moved = jax.jit(through(opt))(params, state, frozen)
        assert_equal(new["a"], params["a"])
        assert_close(moved.average["a"], (state.average["a"] + params["a"]) / 2, RECOMPILED)
        assert_close(
            moved.average["b"], jax.tree.map(lambda x, p: (x + p) / 2, state.average["b"], new["b"]), RECOMPILED
        )
    free = adamjax.schedule_free_adamw(0.1)
    params, state = after(free, steps=3)
    new, moved = jax.jit(free.step)(frozen, state, params)
    assert_equal((new["a"], moved[0].z["a"]), (params["a"], state[0].z["a"]))
    assert_equal(adamjax.eval_params(moved, new)["a"], adamjax.eval_params(state, params)["a"])


@pytest.mark.parametrize("make", MAKES)
def test_a_skipped_step_leaves_the_average(make):
    opt = adamjax.skip_nonfinite(MAKES[make]())
    params, state = after(opt, steps=3)
    expected = adamjax.eval_params(state, params)
    bad = some_grads(0) | {"a": PARAMS["a"] * np.nan}
    new, state = jax.jit(opt.step)(bad, state, params)
    assert_equal((new, adamjax.eval_params(state, new)), (params, expected))


def test_a_bad_average_is_named():
    free, average = (make() for make in MAKES.values())
    bad = some_grads(0) | {"a": PARAMS["a"] * np.nan}
    _, state = free.step(bad, free.init(PARAMS), PARAMS)
    with pytest.raises(FloatingPointError, match=r"not finite at 0/z/a|not finite at 0/nu/a"):
        adamjax.check(state)
    state = average.init(PARAMS)
    state = state._replace(average=state.average | {"a": PARAMS["a"] * np.inf})
    with pytest.raises(FloatingPointError, match="not finite at average/a"):
        adamjax.check(state)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("make", MAKES)
def test_zero1_divides_the_average(kind, make):
    mesh, opt = make_mesh(kind), MAKES[make]()
    spread = sharding.zero1(opt, axis="data")
    expected, plain = after(opt)
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
        params, state = after(spread, params)
        array = state.inner[0].z["a"] if make == "schedule free" else state.inner.average["a"]
        assert array.sharding.spec[0] == "data"
        found = adamjax.eval_params(state, params)
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(found))
        assert_close(jax.device_get(jax.jit(adamjax.eval_params)(state, params)), jax.device_get(found), RECOMPILED)
    assert_close(
        jax.device_get((params, found)), jax.device_get((expected, adamjax.eval_params(plain, expected))), RECOMPILED
    )


@pytest.mark.parametrize("make", MAKES)
def test_an_average_in_host_memory(make):
    opt, plain = sharding.offload(MAKES[make]()), MAKES[make]()
    *_, found = train(Bowl(), opt, steps=5)
    *_, expected = train(Bowl(), plain, steps=5)
    assert found.eval_params["x"].sharding.memory_kind == "device"
    assert_close((found.metrics, found.eval_params), (expected.metrics, expected.eval_params), RECOMPILED)


def test_a_new_state_shares_no_buffer_and_keeps_the_sharding():
    mesh = make_mesh(AxisType.Auto)
    params = {"a": jax.device_put(PARAMS["a"], NamedSharding(mesh, P("data")))}
    for make in MAKES.values():
        for init in (make().init, jax.jit(make().init)):
            state = init(params)
            copy = state[0].z["a"] if isinstance(state[0], adamjax.ScheduleFreeState) else state.average["a"]
            assert copy.sharding.is_equivalent_to(params["a"].sharding, 2)
            assert copy.addressable_shards[0].data.unsafe_buffer_pointer() != (
                params["a"].addressable_shards[0].data.unsafe_buffer_pointer()
            )


def test_the_average_of_a_fused_step():
    opt = adamjax.average_params(adamjax.adamw(LR, fused=True), 0.9)
    params = {"a": jnp.linspace(-1, 1, 1024)}
    found, expected = after(opt, params), after(adamjax.average_params(adamjax.adamw(LR), 0.9), params)
    assert_close(adamjax.eval_params(*found[::-1]), adamjax.eval_params(*expected[::-1]), RECOMPILED)


class OnHost(Bowl):
    on_host = True

    def evaluate(self, params):
        return {name: float(x) for name, x in super().evaluate(params).items()}


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("problem", [Bowl(), OnHost()])
def test_training_evaluates_at_the_average(make, problem):
    opt = MAKES[make]()
    *_, report = train(problem, opt, steps=20)
    assert_equal(report.eval_params, adamjax.eval_params(report.state, report.params))
    expected = problem.evaluate(report.eval_params)
    assert_close(report.metrics, {name: float(x) for name, x in expected.items()}, RECOMPILED)
    assert abs(report.metrics["loss"] - float(problem.evaluate(report.params)["loss"])) > 1e-3
    *_, whole = train(problem, opt, steps=30)
    *_, continued = train(problem, opt, steps=30, start=report)
    assert_equal((continued.params, continued.state), (whole.params, whole.state))
    assert continued.metrics == whole.metrics


def test_training_evaluates_at_the_average_of_optax(lenient):
    *_, report = train(Bowl(), optax.contrib.schedule_free_adamw(0.1), steps=20)
    expected = Bowl().evaluate(optax.contrib.schedule_free_eval_params(report.state, report.params))
    assert_close(report.metrics["loss"], float(expected["loss"]), RECOMPILED)


def test_training_evaluates_other_parameters_where_they_are():
    *_, report = train(Bowl(), adamjax.adamw(0.1), steps=5)
    assert report.eval_params is report.params


@pytest.mark.parametrize(
    ("problem", "make"),
    [
        (Bowl(), partial(adamjax.schedule_free_adamw, warmup_steps=5)),
        (OnHost(), lambda learning_rate: adamjax.average_params(adamjax.adamw(learning_rate), 0.9)),
    ],
)
def test_sweeps_evaluate_at_the_average(problem, make):
    found = tuning.sweep(problem, [{"learning_rate": 0.05}, {"learning_rate": 0.1}], optimizer=make, steps=20)
    *_, report = train(problem, make(learning_rate=0.1), steps=20)
    np.testing.assert_allclose(np.ravel(found.metrics["loss"][-1])[-1], report.metrics["loss"], rtol=SWEEP)


def test_the_rate_of_a_schedule_free_search_is_constant():
    search = tuning.Search(optimizer=adamjax.schedule_free_adamw, problem=Bowl(), trials=4, steps=20)
    assert search.spec.question["schedule"] == "constant"
    assert set(search.spec.space.free) == {"learning_rate", "b1", "b2", "weight_decay"}
    with pytest.raises(ValueError, match="warmup_steps of its own"):
        tuning.Search(optimizer=adamjax.schedule_free_adamw, problem=Bowl(), trials=4, steps=20, schedule="cosine")


def test_types_are_stable_with_schedules_and_warmup_in_both_widths():
    for x64 in (False, True):
        with jax.enable_x64(x64):
            opt = adamjax.schedule_free_adamw(RISE_AND_FALL, 3, nu_dtype=jnp.bfloat16)
            state = opt.init(PARAMS)
            assert_same_types(jax.eval_shape(opt.step, PARAMS, state, PARAMS)[1], state)


FUSED_FORMS = {
    "float32": ({}, "float32", lambda opt: opt),
    "int8": ({"nu_dtype": adamjax.quantized("int8"), "weight_decay": 0.1}, "float32", lambda opt: opt),
    "master_weights": ({"nu_dtype": "bfloat16"}, "bfloat16", adamjax.master_weights),
}


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
@pytest.mark.parametrize("form", FUSED_FORMS)
def test_schedule_free_steps_in_one_pass(form):
    options, dtype, wrap = FUSED_FORMS[form]
    fused, plain = (
        wrap(adamjax.schedule_free_adamw(LR, warmup_steps=2, fused=fused, **options)) for fused in (True, False)
    )
    params = some_grads(9, jnp.ones((131, 257), dtype))
    state = plain.init(params)
    steps = jax.jit(fused.step), jax.jit(plain.step)
    assert _library.target() in steps[0].lower(params, state, params).as_text()
    for i in range(3):
        g = some_grads(i, params)
        (found, found_state), (expected, expected_state) = (step(g, state, params) for step in steps)
        own, free = (inner_state(x) for x in (found_state, expected_state))
        terms = np.abs(np.asarray(params, np.float64)) + 10 * LR
        assert_near(found, expected, terms, "y")
        assert_near(own.z, free.z, np.abs(np.asarray(free.z)) + 10 * LR, "z")
        assert_near(own.nu, free.nu, 10.0, "nu")
        params, state = expected, expected_state


def inner_state(state):
    """The schedule-free part of a state."""
    found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, adamjax.ScheduleFreeState))
    return next(x for x in found if isinstance(x, adamjax.ScheduleFreeState))
