"""Fused updates: `update` is one pass too, so that the loops of frameworks and other wrappers take it."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import assert_close, make_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from same_step import ByUpdate, assert_same_steps
from test_fused import FORMATS, FORMS, GRADS, LR, PARAMS, RULES, added_by, gradients, numbers
from test_fused_rounding import WRAPPERS, assert_same, draw
from test_packed import MANY
from test_packed import numbers as many
from tolerances import RECOMPILED

import adamjax
import adamjax.interop.torch as optim
from adamjax import sharding
from adamjax.kernels import _fused, _library

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")


def kernels_in(function, *args):
    """How many kernels a lowered program has."""
    return jax.jit(function).lower(*args).as_text().count(f'custom_call @"{_library.target()}')


def three_updates(make, dtype="float32", coupled=0.0, added=None, **kw):
    fused, plain = make(fused=True, **kw), make(**kw)
    params = numbers(dtype=dtype)
    state = plain.init(params)
    assert kernels_in(fused.update, params, state, params) == 2
    grads = [gradients(i, dtype) for i in range(3)]
    assert_same_steps(ByUpdate(fused), ByUpdate(plain), state, params, grads, LR, coupled, added)


@pytest.mark.parametrize("form", ["adamw", "nesterov", "corrected", "coupled"])
def test_forms(form):
    three_updates(FORMS[form], coupled=0.1 if form == "coupled" else 0.0)


@pytest.mark.parametrize("form", ["cautious nesterov", "ademamix", "adopt", "atan2", "stable"])
def test_rules_since_adam(form):
    three_updates(RULES[form], added=added_by(form))


@pytest.mark.parametrize("format", ["bfloat16", "int8", pytest.param("int4 and int8", marks=pytest.mark.slow)])
def test_formats(format):
    three_updates(FORMS["adamw"], **FORMATS[format])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_updates_of_half_precision_are_rounded_once(dtype):
    fused, plain = (adamjax.adam(LR, **kw) for kw in ({"fused": True}, {}))
    params, grads = numbers(dtype=dtype), gradients(0, dtype)
    for given in ((params,), ()):  # without parameters, the dtype is that of the gradients
        found, expected = (jax.jit(opt.update)(grads, plain.init(params), *given)[0] for opt in (fused, plain))
        for name, u in found.items():
            assert u.dtype == expected[name].dtype == dtype
            assert np.mean(np.asarray(u != expected[name])) < 1e-3
            assert_close(u.astype("float32"), expected[name].astype("float32"), float(jnp.finfo(dtype).eps))


def test_without_parameters_as_long_as_nothing_decays():
    fused, plain = FORMS["amsgrad"](fused=True), FORMS["amsgrad"]()
    state = plain.init(PARAMS)
    assert kernels_in(fused.update, GRADS, state) == 2
    assert_close(*(jax.jit(opt.update)(GRADS, state) for opt in (fused, plain)), RECOMPILED)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_updates_that_wrappers_round(wrapper):
    make = lambda **kw: WRAPPERS[wrapper](adamjax.adamw(1e-3, weight_decay=0.1, **kw))  # noqa: E731
    fused, plain = ByUpdate(make(fused=True)), ByUpdate(make())
    params = draw(0) | {"matrix": draw(0)["matrix"].at[0, :8].set(jnp.asarray([0, -0.0, 1e-3, -1e-3] * 2, "bfloat16"))}
    state = plain.opt.init(params)
    assert kernels_in(fused.opt.update, params, state, params) == 2
    for i in range(3):
        grads = draw(i + 1, size=1e-3)
        found, expected = (jax.jit(opt.step)(grads, state, params) for opt in (fused, plain))
        assert_same(found, expected, params)
        params, state = expected


def stepped_by_nnx(opt):
    class Model(nnx.Module):
        def __init__(self):
            for name, p in PARAMS.items():
                setattr(self, name, nnx.Param(p))

    model = Model()
    graph, split = nnx.split((model, nnx.Optimizer(model, opt, wrt=nnx.Param)))

    def step(split, grads):
        model, optimizer = nnx.merge(graph, split)
        optimizer.update(
            model, jax.tree.map(lambda x, g: x.replace(g), nnx.state(model), nnx.State(grads), is_leaf=is_variable)
        )
        return nnx.split((model, optimizer))[1]

    return step, (split, GRADS)


def is_variable(x):
    return isinstance(x, nnx.Variable)


def stepped_by_flax(opt):
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=opt)
    return lambda state, grads: state.apply_gradients(grads=grads), (state, GRADS)


def stepped_by_optax(wrap):
    def of(opt):
        opt = wrap(opt)

        def step(grads, state, params):
            updates, state = opt.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return step, (GRADS, opt.init(PARAMS), PARAMS)

    return of


def mapped(opt):
    return lambda *args: jax.vmap(opt.update)(*args), jax.tree.map(
        lambda x: jnp.stack([x, 2 * x]), (GRADS, opt.init(PARAMS), PARAMS)
    )


PATHS = {
    "nnx.Optimizer": (stepped_by_nnx, 2),
    "TrainState": (stepped_by_flax, 2),
    "optax.chain": (stepped_by_optax(lambda opt: optax.chain(optax.clip_by_global_norm(0.1), opt)), 2),
    "optax.chain, first": (stepped_by_optax(lambda opt: optax.chain(opt, optax.scale(0.5))), 2),
    "optax.MultiSteps": (stepped_by_optax(lambda opt: optax.MultiSteps(opt, 1).gradient_transformation()), 2),
    "optax.masked": (stepped_by_optax(lambda opt: optax.masked(opt, {name: name != "cube" for name in PARAMS})), 1),
    "optax.apply_if_finite": (stepped_by_optax(lambda opt: optax.apply_if_finite(opt, 3)), 2),
    "optax.flatten": (stepped_by_optax(optax.flatten), 1),
    "jax.vmap": (mapped, 2),
}


@pytest.mark.parametrize("name", PATHS)
def test_paths_of_frameworks(name):
    make, count = PATHS[name]
    (fused, args), (plain, others) = make(FORMS["adamw"](fused=True)), make(FORMS["adamw"]())
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps adds integers and floats
        assert kernels_in(fused, *args) == count
        found, expected = jax.jit(fused)(*args), jax.jit(plain)(*others)
    assert_close(jax.tree.leaves(found), jax.tree.leaves(expected), 4 * RECOMPILED)


def grouped(opt):
    return adamjax.groups({"short|cube": {"weight_decay": 0.0}}, default=opt)


CLIP = adamjax.clip_by_global_norm(0.1)
AROUND = {
    "anywhere in a chain": lambda opt: adamjax.chain(CLIP, opt, adamjax.scale_by_learning_rate(0.5)),
    "before another one": lambda opt: adamjax.chain(adamjax.skip_nonfinite(opt), adamjax.scale_by_adam()),
    "after optax": lambda opt: adamjax.chain(optax.scale(2.0), CLIP, opt, optax.scale(0.5)),
    "clipped groups": lambda opt: adamjax.chain(CLIP, grouped(opt)),
    "groups, then one": lambda opt: adamjax.chain(grouped(opt), adamjax.scale_by_learning_rate(2.0)),
    "clipped twice": lambda opt: adamjax.chain(CLIP, adamjax.chain(CLIP, opt)),
    "checked": lambda opt: adamjax.skip_nonfinite(adamjax.chain(CLIP, opt)),
    "spikes": lambda opt: adamjax.skip_nonfinite(adamjax.skip_spikes(adamjax.chain(CLIP, opt))),
    "clipped, then checked": lambda opt: adamjax.chain(CLIP, adamjax.skip_nonfinite(opt)),
}


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("method", ["step", "update"])
def test_wrappers_of_ours(name, method):
    fused, plain = (AROUND[name](FORMS["adamw"](**kw)) for kw in ({"fused": True}, {}))
    state = plain.init(PARAMS)
    # All of a chain is run by the kernel, if any of it is.
    assert kernels_in(getattr(fused, method), GRADS, state, PARAMS) >= 2
    found, expected = (jax.jit(getattr(opt, method))(GRADS, state, PARAMS) for opt in (fused, plain))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert_close(found, expected, 8 * RECOMPILED)


@pytest.mark.parametrize(
    "around", [lambda opt: adamjax.chain(CLIP, opt), lambda opt: adamjax.chain(CLIP, grouped(opt))]
)
def test_clipping_writes_no_gradients(around):
    """The factor goes into the pass of the kernel: gradients are read for the norm, and by the kernel as they are."""
    opt = around(adamjax.adamw(LR, fused=True))
    params = {"cube": jnp.ones(1 << 20)}
    args = params, opt.init(params), params
    step = jax.jit(lambda params, state, grads: opt.step(grads, state, params), donate_argnums=(0, 1))
    memory = step.lower(params, opt.init(params), params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1 << 20
    assert kernels_in(opt.step, *args) == 1


@pytest.mark.parametrize("devices", ["one", "many"])
def test_clipping_before_a_factor_of_a_whole_array(devices, request):
    """The factor is that of clipped gradients; on one device the kernel clips what it reads for it, too."""
    if devices == "one":
        request.getfixturevalue("one_device")
    params, grads = {"cube": PARAMS["cube"]}, {"cube": GRADS["cube"]}
    for make in (RULES["cautious"], RULES["stable"]):
        fused, plain = (adamjax.chain(CLIP, make(**kw)) for kw in ({"fused": True}, {}))
        state = plain.init(params)
        step = jax.jit(lambda params, state, grads, opt=fused: opt.step(grads, state, params), donate_argnums=(0, 1))
        memory = step.lower(params, state, grads).compile().memory_analysis()
        assert devices == "many" or memory.temp_size_in_bytes < params["cube"].nbytes / 10
        found, expected = (jax.jit(opt.step)(grads, state, params) for opt in (fused, plain))
        assert_close(found, expected, 4 * RECOMPILED)


def test_clipping_is_limited_as_in_the_plain_step():
    g = jnp.full(1 << 15, 1e-3).at[:4].set(jnp.asarray([3e38, -1e25, 1e19, 5.0]))
    for wrong in (g, g.at[7].set(jnp.nan), g.at[7].set(jnp.inf)):
        made = [adamjax.chain(CLIP, adamjax.adam(LR, **kw)) for kw in ({"fused": True}, {})]
        found, expected = (jax.jit(opt.update)(wrong, made[1].init(g)) for opt in made)
        assert_close(found, expected, 4 * RECOMPILED)


def matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


@pytest.mark.parametrize("method", ["step", "update"])
@pytest.mark.parametrize("options", [{"mask": matrices}, {"maximize": True}])
def test_packed_groups(method, options, one_device):
    """Whether a leaf decays may differ in a group."""
    make = adamjax.adam if "mask" in options else adamjax.adamw
    fused, plain = (adamjax.packed(make(LR, weight_decay=0.1, **options, **kw)) for kw in ({"fused": True}, {}))
    params, grads = many(0, shapes=MANY), many(1, shapes=MANY)
    state = plain.init(params)
    lowered = jax.jit(getattr(fused, method)).lower(grads, state, params).as_text()
    assert lowered.count(f"{_library.target()}-group") == 2
    found, expected = (jax.jit(getattr(opt, method))(grads, state, params) for opt in (fused, plain))
    assert_close(found, expected, 4 * RECOMPILED)


@pytest.mark.parametrize("wrapper", ["kahan", "low_bits", "stochastic_rounding"])
@pytest.mark.parametrize("method", ["step", "update"])
def test_packed_groups_inside_of_wrappers(wrapper, method, one_device):
    fused, plain = (
        adamjax.chain(CLIP, WRAPPERS[wrapper](adamjax.packed(adamjax.adamw(LR, weight_decay=0.1, mask=matrices, **kw))))
        for kw in ({"fused": True}, {})
    )
    params, grads = many(0, "bfloat16", MANY), many(1, "bfloat16", MANY)
    state = plain.init(params)
    lowered = jax.jit(getattr(fused, method)).lower(grads, state, params).as_text()
    assert lowered.count(f"{_library.target()}-group") == 2
    found, expected = (jax.jit(getattr(opt, method))(grads, state, params) for opt in (fused, plain))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if a.dtype == jnp.uint16:  # low bits, which alone say nothing
            continue
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        # Where a last digit decides about the rounding, it may go the other way.
        assert np.mean(np.abs(a - b) > 4 * RECOMPILED * np.max(np.abs(b))) < 5e-3
    if wrapper == "low_bits":
        weights = [
            fused.transforms[1].weights(x if method == "step" else adamjax.apply_updates(params, x), state[1])
            for x, state in (found, expected)
        ]
        assert_close(*weights, 4 * RECOMPILED)


def test_packed_groups_inside_of_wrappers_where_jax_takes_them(one_device):
    def loss(rate, params, **kw):
        opt = adamjax.kahan(adamjax.packed(adamjax.adamw(rate, weight_decay=0.1, mask=matrices, **kw)))
        updates, _ = opt.update(params, opt.init(params), params)
        return sum(jnp.sum(u.astype(jnp.float32) ** 2) for u in jax.tree.leaves(updates))

    params = many(0, "bfloat16", MANY)
    found, expected = (jax.jit(jax.grad(lambda r, kw=kw: loss(r, params, **kw)))(0.1) for kw in ({"fused": True}, {}))
    assert_close(found, expected, 1e-3)

    def for_rates(**kw):
        return jax.jit(jax.vmap(lambda rate: loss(rate, params, **kw)))(jnp.asarray([0.1, 0.01]))

    assert_close(for_rates(fused=True), for_rates(), 1e-3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_each_device_delivers_its_part(kind):
    mesh = make_mesh(kind, (2, 4), ("data", "model"))
    opt = adamjax.chain(CLIP, adamjax.adamw(LR, weight_decay=0.1, fused=True))
    params, grads = {"w": PARAMS["cube"]}, {"w": GRADS["cube"]}
    expected = jax.jit(opt.update)(grads, opt.init(params), params)
    params, grads = jax.device_put((params, grads), NamedSharding(mesh, P("model", "data")))
    with jax.set_mesh(mesh):
        state = opt.init(params)
        advance = jax.jit(opt.update).lower(grads, state, params).compile()
        assert "all-gather" not in advance.as_text()
        found = advance(grads, state, params)
    assert_close(jax.device_get(found), expected, 4 * RECOMPILED)


@pytest.mark.parametrize("around", [lambda opt: opt, adamjax.kahan])
@pytest.mark.parametrize("method", ["step", "update"])
def test_around_zero1(around, method):
    """A wrapper that rounds is around the whole: the kernel delivers updates to it."""
    mesh = make_mesh(AxisType.Auto)
    params, grads = jax.device_put((draw(0), draw(1)), NamedSharding(mesh, P()))
    fused, plain = (
        around(sharding.zero1(adamjax.adamw(LR, weight_decay=0.1, **kw), mesh=mesh, axis="data"))
        for kw in ({"fused": True}, {})
    )
    state = plain.init(params)
    advance = jax.jit(getattr(fused, method)).lower(grads, state, params).compile()
    assert _library.target() in advance.as_text()
    found, expected = advance(grads, state, params), jax.jit(getattr(plain, method))(grads, state, params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.mean(np.abs(a - b) > 4 * RECOMPILED * np.max(np.abs(b), initial=0)) < 5e-3


@pytest.mark.parametrize("wrap", [adamjax.kahan, adamjax.skip_nonfinite])
def test_torchs_forms_inside_of_wrappers(wrap):
    dtype = "bfloat16" if wrap is adamjax.kahan else "float32"
    fused, plain = (wrap(optim.adamw(LR, weight_decay=0.1, **kw)) for kw in ({"fused": True}, {}))
    params, grads = numbers(dtype=dtype), gradients(0, dtype)
    state = plain.init(params)
    assert kernels_in(fused.update, grads, state, params) == kernels_in(fused.step, grads, state, params) == 2
    for method in ("update", "step"):
        found, expected = (jax.jit(getattr(opt, method))(grads, state, params) for opt in (fused, plain))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert_close(jnp.mean(a.astype("float32")), jnp.mean(b.astype("float32")), 1e-4)


def test_derivatives_of_updates_are_those_of_the_plain_ones():
    def loss(rate, params, **kw):
        opt = adamjax.chain(CLIP, adamjax.adamw(rate, weight_decay=0.1, **kw))
        updates, _ = opt.update(jax.tree.map(jnp.sin, params), opt.init(params), params)
        return sum(jnp.sum(jnp.cos(u)) for u in jax.tree.leaves(updates))

    found = jax.jit(jax.grad(lambda *x: loss(*x, fused=True), argnums=(0, 1)))(0.1, PARAMS)
    assert_close(found, jax.jit(jax.grad(loss, argnums=(0, 1)))(0.1, PARAMS), 4 * RECOMPILED)


def test_what_no_kernel_can_serve_is_said_by_path_and_reason():
    params = {"a": {"w": jnp.ones(1 << 15)}, "c": jnp.ones((200, 200), jnp.complex64)}
    opt = adamjax.adam(LR, fused=True)
    with pytest.raises(ValueError, match=r"fused=True cannot step params\['c'\]: its parameter is complex64"):
        opt.update(params, opt.init(params), params)
    auto = adamjax.adam(LR, fused="auto")
    _fused._warn_once.cache_clear()
    with pytest.warns(
        UserWarning, match=r"fused='auto' leaves params\['c'\] to XLA: its parameter is complex64"
    ) as said:
        found = [auto.update(params, auto.init(params), params) for _ in range(2)]
    assert len(said) == 1
    plain = adamjax.adam(LR)
    assert_close(found[1], plain.update(params, plain.init(params), params), RECOMPILED)


def test_gradients_that_are_still_needed_keep_their_memory(one_device):
    """Updates take it otherwise: of arrays that are passed, and of those that the program reads afterwards."""
    g = jnp.full(1 << 15, 2.0)
    for opt, grads in (
        (adamjax.adam(LR, fused=True), [g]),
        (adamjax.packed(adamjax.adam(LR, fused=True)), [g[:99]] * 9),
    ):
        state = opt.init(grads)
        eager, _ = opt.update(grads, state)
        compiled, total = jax.jit(lambda g, s, opt=opt: (opt.update(g, s)[0], jax.tree.map(jnp.sum, g)))(grads, state)
        assert_close(eager, jax.tree.map(lambda g: jnp.full_like(g, -LR), grads), RECOMPILED)
        assert_close(compiled, eager, RECOMPILED)
        assert_close(total, [jnp.float32(2.0 * x.size) for x in grads], RECOMPILED)
        assert_close(grads, [jnp.full_like(x, 2.0) for x in grads], RECOMPILED)
