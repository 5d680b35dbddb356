"""The compiled training step: its numbers, its memory and its shardings."""

import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, assert_equal, make_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerances import RECOMPILED

import adamjax
from adamjax import sharding, training
from adamjax.training import step_fn

COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")

ROWS, STEPS = 16, 3
ADAMW = adamjax.adamw(1e-2)


def loss_fn(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["up"] + params["inner"][None])
    return jnp.mean((hidden @ params["down"] - y) ** 2)


def some_params(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = {"up": (8, 64), "inner": (64,), "down": (64, 24)}
    return {name: jnp.asarray(0.1 * rng.normal(size=shape), dtype) for name, shape in shapes.items()}


BATCH = tuple(np.float32(np.random.default_rng(1).normal(size=(ROWS, n))) for n in (8, 24))


def course(step, params, state, batch=BATCH):
    """The losses of some steps, then parameters and state."""
    losses = []
    for _ in range(STEPS):
        params, state, loss = step(params, state, batch)
        losses.append(np.asarray(loss))
    return losses, params, state


def by_hand(opt):
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        return *opt.step(grads, state, params), loss

    return jax.jit(step)


@functools.cache
def expected():
    params = some_params()
    return course(by_hand(ADAMW), params, ADAMW.init(params))


def successors(compiled):
    """From each result to the argument whose memory it takes."""
    header = compiled.as_text().splitlines()[0]
    return {int(result): int(argument) for result, argument in re.findall(r"\{(\d+)\}: \((\d+), ", header)}


def test_numbers_are_those_of_a_step_by_hand():
    params = some_params()
    assert_equal(course(step_fn(loss_fn, ADAMW), params, ADAMW.init(params)), expected())


@pytest.mark.parametrize("accumulate", [1, 4])
def test_all_memory_goes_to_its_own_successor(accumulate):
    params = some_params()
    state = ADAMW.init(params)
    compiled = step_fn(loss_fn, ADAMW, accumulate=accumulate).lower(params, state, BATCH).compile()
    held = jax.tree.leaves((params, state))
    assert successors(compiled) == {i: i for i in range(len(held))}
    assert compiled.memory_analysis().alias_size_in_bytes == sum(x.nbytes for x in held)


def test_arguments_by_name_keep_their_memory_too():
    """JAX sorts them by name: `params` comes before `state`, as in the results."""
    params = some_params()
    state = ADAMW.init(params)
    step = jax.jit(ADAMW.step, donate_argnames=("params", "state"))
    n = len(params)
    assert successors(step.lower(grads=params, state=state, params=params).compile())[0] == n  # the first of params
    step = step_fn(loss_fn, ADAMW)
    assert_equal(
        step(batch=BATCH, state=state, params=params)[0], by_hand(ADAMW)(some_params(), ADAMW.init(params), BATCH)[0]
    )


@pytest.mark.parametrize("accumulate", [2, 16])
def test_micro_batches_make_the_step_of_the_whole_batch(accumulate):
    params = some_params()
    found = course(step_fn(loss_fn, ADAMW, accumulate=accumulate), params, ADAMW.init(params))
    assert_close(found, expected(), RECOMPILED)


def test_micro_batches_keep_one_sum_of_gradients_and_those_of_a_leaf():
    wide = [jnp.zeros((256, 256))] * 8
    state, rows = ADAMW.init(wide), jnp.zeros((64, 256))

    def deep(params, batch):
        return jnp.mean(functools.reduce(lambda x, w: jnp.tanh(x @ w), params, batch))

    temporary = {
        k: step_fn(deep, ADAMW, accumulate=k).lower(wide, state, rows).compile().memory_analysis().temp_size_in_bytes
        for k in (1, 4)
    }
    leaf, activations = wide[0].nbytes, 9 * rows.nbytes
    assert temporary[1] > leaf  # that compilers say what they use
    assert temporary[4] < 8 * leaf + 2 * leaf + activations


def test_sums_are_wider_than_half_precision():
    """In bfloat16, a sum of 512 ones stays at 256."""
    opt = adamjax.scale_by_learning_rate(1.0)
    params = {"x": jnp.zeros(2, jnp.bfloat16)}
    step = step_fn(lambda params, batch: -jnp.mean(params["x"][None] * batch), opt, accumulate=512)
    params, _, loss = step(params, opt.init(params), jnp.ones((512, 2), jnp.bfloat16))
    np.testing.assert_array_equal(np.float32(params["x"]), 0.5)
    assert loss.dtype == jnp.bfloat16


def test_a_mean_in_bfloat16_is_unbiased_and_read_as_it_is():
    """To nearest, no micro-batch after the 256th would count."""
    params = {"x": jnp.zeros(1 << 15)}
    opt = adamjax.scale_by_learning_rate(1.0)
    narrow = {"accumulate_dtype": jnp.bfloat16}
    step = step_fn(lambda p, batch: -jnp.sum(p["x"]) * jnp.mean(batch), opt, accumulate=512, **narrow)
    moved = step(params, opt.init(params), jnp.ones(512))[0]["x"]
    assert abs(jnp.mean(moved) - 1) < 1e-3
    assert 1e-3 < jnp.std(moved) < 0.05  # each is rounded by itself

    fused = adamjax.adam(0.1, fused="auto")
    params = {"x": jnp.zeros(1 << 15)}
    state, batch = fused.init(params), jnp.ones(4)
    lowered = step_fn(lambda p, x: jnp.sum(p["x"] * jnp.mean(x)), fused, accumulate=4, **narrow)
    assert re.search(r"custom_call @.adam.*tensor<32768xbf16>", lowered.lower(params, state, batch).as_text())
    assert lowered(params, state, batch)[0]["x"].dtype == jnp.float32
    # Others get the dtype of the parameters.
    optax_adam = step_fn(lambda p, x: jnp.sum(p["x"] * x[0]), optax.adam(0.1), accumulate=2, **narrow)
    with jax.numpy_dtype_promotion("standard"):
        _, state, _ = optax_adam({"x": jnp.zeros(2)}, optax.adam(0.1).init({"x": jnp.zeros(2)}), jnp.ones((2, 2)))
    assert state[0].mu["x"].dtype == jnp.float32


def test_rows_are_dealt_in_turns_and_every_aux_is_kept():
    opt = adamjax.adam(0.1)

    def with_aux(params, batch):
        return jnp.mean(params * batch["x"]), {"rows": batch["x"], "once": batch["once"]}

    batch = {"x": jnp.arange(6.0), "once": jnp.float32(7), "nothing": None}
    params = jnp.ones(())
    _, _, loss, aux = step_fn(with_aux, opt, has_aux=True, accumulate=3)(params, opt.init(params), batch)
    assert loss == 2.5
    np.testing.assert_array_equal(aux["rows"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(aux["once"], [7, 7, 7])
    params = jnp.ones(())
    _, _, loss, aux = step_fn(with_aux, opt, has_aux=True)(params, opt.init(params), batch)
    assert loss == 2.5
    np.testing.assert_array_equal(aux["rows"], batch["x"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_is_scaled_for_the_gradient_alone(accumulate):
    """Unscaled, the gradient is below what float16 has."""
    opt = adamjax.dynamic_loss_scale(adamjax.master_weights(adamjax.adam(0.1, eps=1e-12)))
    params = jnp.ones(2, jnp.float16)

    def faint(params, batch):
        return jnp.mean(params[None] * batch * jnp.float16(1e-4)) * jnp.float16(1e-4)

    step = step_fn(faint, opt, accumulate=accumulate)
    params, state, loss = step(params, opt.init(params), jnp.ones((2, 2), jnp.float16))
    assert params.tolist() == pytest.approx([0.9, 0.9], rel=1e-3)
    assert (loss.dtype, float(loss)) == (jnp.float16, 0)
    params, state, loss = step(params, state, jnp.full((2, 2), jnp.inf, jnp.float16))
    assert params.tolist() == pytest.approx([0.9, 0.9], rel=1e-3)
    assert int(state.inner.skipped) == 1


WATCHERS = {
    "ours": adamjax.chain(adamjax.scale_by_learning_rate(1.0), adamjax.schedules.reduce_on_plateau(0.5, patience=1)),
    "optax's": adamjax.chain(
        adamjax.scale_by_learning_rate(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
    ),
    "ours in optax's": optax.chain(
        optax.sgd(1.0), adamjax.interop.optax.wrap(adamjax.schedules.reduce_on_plateau(0.5, patience=1))
    ),
}


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("name", WATCHERS)
def test_a_schedule_that_watches_the_loss_gets_it(name):
    """A falling loss, then twice the same: the third step is half as long."""
    opt, x = WATCHERS[name], jnp.zeros(())
    step, state = step_fn(lambda x, batch: jnp.mean(batch) + x - jax.lax.stop_gradient(x), opt), opt.init(jnp.zeros(()))
    places = [0.0]
    for loss in (2.0, 1.0, 1.0):
        x, state, _ = step(x, state, jnp.full(2, loss))
        places.append(float(x))
    np.testing.assert_array_equal(np.diff(places), [-1, -1, -0.5])


@pytest.mark.usefixtures("lenient")
def test_complex_parameters_descend():
    opt = adamjax.adam(0.3)
    step = step_fn(lambda z, batch: jnp.mean(jnp.abs(z - batch) ** 2), opt, accumulate=2)
    z = jnp.zeros((), jnp.complex64)
    state = opt.init(z)
    for _ in range(100):
        z, state, loss = step(z, state, jnp.full(2, 1 + 2j))
    assert loss < 1e-2


PLACES = {
    "replicated": {"up": P(), "inner": P(), "down": P()},
    # Without a word about it, the compiler would divide the bias as the hidden units are.
    "by model": {"up": P(None, "model"), "inner": P(), "down": P("model")},
}
MAKES = {"plain": lambda mesh: ADAMW, "zero1": lambda mesh: sharding.zero1(ADAMW, axis="data", mesh=mesh)}


@pytest.mark.parametrize(
    ("kind", "places", "make", "accumulate"),
    [
        (AxisType.Auto, "replicated", "plain", 2),
        (AxisType.Auto, "by model", "plain", 1),
        (AxisType.Auto, "by model", "zero1", 2),
        (AxisType.Explicit, "replicated", "plain", 1),
        (AxisType.Explicit, "replicated", "zero1", 2),
    ],
)
def test_on_a_mesh(kind, places, make, accumulate):
    """The numbers of one device; all is sharded as before, its memory reused, and compiled once."""
    mesh = make_mesh(kind, (4, 2), ("data", "model"))
    specs = PLACES[places]
    params = {name: jax.device_put(p, NamedSharding(mesh, specs[name])) for name, p in some_params().items()}
    opt = MAKES[make](mesh)
    state = opt.init(params)
    batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
    before = jax.tree.map(lambda x: x.sharding, (params, state))
    step = step_fn(loss_fn, opt, accumulate=accumulate)
    jax.eval_shape(step, params, state, batch)  # tells no shardings, so it must not settle them
    held = jax.tree.leaves((params, state))
    compiled = step.lower(params, state, batch).compile()
    assert successors(compiled) == {i: i for i in range(len(held))}
    if (places, make) == ("replicated", "plain"):  # no row moves
        assert not re.search("all-gather|all-to-all|collective-permute", compiled.as_text())
    losses, params, state = course(step, params, state, batch)
    assert jax.tree.map(lambda x: x.sharding, (params, state)) == before
    assert step._jitted._cache_size() == 1
    assert_close((losses, jax.device_get(params)), expected()[:2], RECOMPILED)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_within_another_compiled_function(is_compiled):
    params = some_params()
    step = step_fn(loss_fn, ADAMW)
    if is_compiled:  # as a whole program, with options that only such a one takes
        step(some_params(), ADAMW.init(params), BATCH)

    @jax.jit
    def two_steps(params, state):
        for _ in range(2):
            params, state, _ = step(params, state, BATCH)
        return step(params, state, BATCH)[2]

    loss = two_steps(params, ADAMW.init(params))
    np.testing.assert_allclose(loss, expected()[0][2], rtol=RECOMPILED)
    state = ADAMW.init(params)
    for first in (
        jax.jit(lambda: step(params, state, BATCH)[2])(),
        jax.jit(lambda x: step(params, state, x)[2])(BATCH),
    ):
        np.testing.assert_allclose(first, expected()[0][0], rtol=RECOMPILED)


LAYERS, WIDTH = 24, 128  # of 16384 elements, which the kernel steps
INT8 = adamjax.quantized("int8")
DEEP = {
    "plain": ADAMW,
    "fused": pytest.param(adamjax.adamw(1e-2, fused=True), marks=COMPILER),
    "fused int8": pytest.param(adamjax.adamw(1e-2, mu_dtype=INT8, nu_dtype=INT8, fused=True), marks=COMPILER),
}


@pytest.mark.parametrize("opt", DEEP.values(), ids=DEEP)
def test_gradients_are_freed_as_parameters_are_stepped(opt):
    """Of 24 layers, no more than five have a gradient at a time, and XLA copies no parameter."""

    def deep_loss(params, x):
        return jnp.mean(functools.reduce(lambda x, w: jnp.tanh(x @ w), params, x) ** 2)

    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5, jnp.float32) for _ in range(LAYERS)]
    batch, state, layer = jnp.ones((1, WIDTH)), opt.init(params), params[0].nbytes
    step = step_fn(deep_loss, opt)
    compiled = step.lower(params, state, batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * layer
    assert "copy(%params" not in compiled.as_text()
    grads = jax.grad(deep_loss)(params, batch)
    expected, _ = jax.jit(opt.step)(grads, state, params)
    assert_close(step(params, state, batch)[0], expected, RECOMPILED)


def test_a_version_of_xla_without_the_option(monkeypatch):
    def refuse(function, **options):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option")

    assert training._compiler_options("cpu")
    training._compiler_options.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(jax, "jit", refuse)
        assert training._compiler_options("cpu") is None
    training._compiler_options.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((3, ADAMW), {}, "Invalid loss_fn value: 3; loss_fn must be a function"),
        ((loss_fn, 3), {}, "argument opt of step_fn is 3, expected a transformation with init and update"),
        ((loss_fn, ADAMW), {"has_aux": 1}, "Invalid has_aux value: 1; has_aux must be one of False, True"),
        ((loss_fn, ADAMW), {"accumulate": 0}, "Invalid accumulate value: 0; accumulate must be at least 1"),
        ((loss_fn, ADAMW), {"accumulate_dtype": "int8"}, "accumulate_dtype must be bfloat16 or None"),
        ((loss_fn, ADAMW), {"accumulate": 2.0}, "Invalid accumulate value: 2.0; accumulate must be an int"),
        (
            (loss_fn, adamjax.chain(adamjax.dynamic_loss_scale(ADAMW))),
            {},
            "dynamic_loss_scale is within Chain, where the loss cannot be scaled: put it around all the others",
        ),
    ],
)
def test_wrong_calls(arguments, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        step_fn(*arguments, **options)


@pytest.mark.parametrize(
    ("loss_fn", "options", "message"),
    [
        (
            lambda p, b: p,
            {},
            r"the loss that loss_fn returned is float32\[2\], expected a real floating point scalar\n",
        ),
        (lambda p, b: p[0].astype(complex), {}, r"returned is complex64\[\], expected a real"),
        (lambda p, b: 0, {}, "returned is a int, expected a real"),
        (
            lambda p, b: (p[0], b),
            {},
            r"returned is a tuple, expected a real .* scalar; for \(loss, aux\), take has_aux=",
        ),
        (lambda p, b: p[0], {"has_aux": True}, r"returned float32\[\], and has_aux=True expects \(loss, aux\)"),
        (lambda p, b: (b, p[0]), {"has_aux": True}, "returned is a dict, expected a real"),
        (lambda p, b: p[0], {"accumulate": 3}, r"batch\['x'\] has 4 rows .* accumulate=3 does not divide: choose a"),
        (lambda p, b: p[0], {"accumulate": 2}, r"batch\['y'\] has 2 rows .*, and batch\['x'\] has 4: accumulate div"),
    ],
)
def test_wrong_losses_and_batches(loss_fn, options, message):
    opt, params = adamjax.scale_by_learning_rate(0.1), jnp.ones(2)
    with pytest.raises((TypeError, ValueError), match=message):
        step_fn(loss_fn, opt, **options)(params, opt.init(params), {"x": jnp.ones(4), "y": jnp.ones(2)})
    assert not params.is_deleted()


def test_swapped_parameters_and_state():
    params = some_params()
    with pytest.raises(
        TypeError, match=r"params\[0\].count is int32.*swapped\? The order is step\(params, state, batch"
    ):
        step_fn(loss_fn, ADAMW)(ADAMW.init(params), params, BATCH)
    with pytest.raises(TypeError, match=r"params\['n'\] is int32\[2\], expected a floating point.*and gradients\n"):
        step_fn(loss_fn, ADAMW)({"n": jnp.zeros(2, int)}, ADAMW.init(params), BATCH)
