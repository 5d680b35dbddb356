"""Hyperball: norms that stay, steps of a fixed length, on one device and many, in float32 and half precision."""

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
from helpers import assert_close, assert_equal, by_step, by_update, make_mesh
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from specs import ROUNDED
from tolerances import ORACLE, RECOMPILED

import adamjax
from adamjax import checkpoint, schedules, sharding
from adamjax.kernels import _library

LR, STEPS = 0.02, 50
HELD = 1e-6  # the relative change of a norm that is held, over all steps
COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")


def some_params(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = {"kernel": (16, 24), "conv": (3, 3, 2, 8), "bias": (16,)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def some_gradients(count=STEPS, dtype="float32"):
    rng = np.random.default_rng(1)
    like = some_params()
    return [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), dtype), like) for _ in range(count)]


def norms_of(params):
    return {name: np.linalg.norm(np.asarray(p, np.float64)) for name, p in params.items()}


def run(opt, params, grads, through=by_step):
    advance, state = jax.jit(through(opt)), opt.init(params)
    for g in grads:
        params, state = advance(params, state, g)
    assert advance._cache_size() == 1
    return params, state


def adam_h(params, grads, rates, b1=0.9, b2=0.999, eps=1e-8):
    """AdamH as published, in long double; the vectors go through Adam."""
    params = {name: np.asarray(p, np.longdouble) for name, p in params.items()}
    m, v = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    radius = {name: np.sqrt(np.sum(p * p)) for name, p in params.items()}
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        for name, p in params.items():
            x = np.asarray(g[name], np.longdouble)
            m[name] = b1 * m[name] + (1 - b1) * x
            v[name] = b2 * v[name] + (1 - b2) * x * x
            u = m[name] / (1 - b1**t) / (np.sqrt(v[name] / (1 - b2**t)) + eps)
            if p.ndim >= 2:
                moved = p - rate * radius[name] * u / np.sqrt(np.sum(u * u))
                params[name] = radius[name] * moved / np.sqrt(np.sum(moved * moved))
            else:
                params[name] = p - rate * u
    return {name: np.asarray(p, float) for name, p in params.items()}


@pytest.mark.parametrize("rate", [LR, schedules.warmup_cosine(LR, warmup_steps=5, total_steps=STEPS)])
@pytest.mark.parametrize("through", [by_step, by_update])
def test_it_is_adam_h(rate, through):
    b = {"b1": np.longdouble("0.9"), "b2": np.longdouble("0.999")}
    params, grads = some_params(), some_gradients()
    found, _ = run(adamjax.hyperball(adamjax.adam(rate)), params, grads, through)
    rates = [float(rate(t)) if callable(rate) else rate for t in range(STEPS)]
    assert_close(found, jax.tree.map(jnp.float32, adam_h(params, grads, rates, **b)), ORACLE["float32"])
    for name, length in norms_of(found).items():
        if name != "bias":
            assert abs(length / norms_of(params)[name] - 1) < HELD


def test_the_length_of_a_step_is_the_learning_rate():
    """Whatever the scale of the gradients, of the matrix, or of the rate of `opt`, which others still step by."""
    params, (grads,) = some_params(), some_gradients(1)
    angles = []
    for factor, own in ((1.0, 1e-3), (1e-6, 3.0), (1e6, 0.1)):
        opt = adamjax.hyperball(adamjax.chain(adamjax.scale_by_learning_rate(own)), learning_rate=LR)
        found, _ = opt.step(jax.tree.map(lambda g, f=factor: g * f, grads), opt.init(params), params)
        turned = np.vdot(found["kernel"], params["kernel"]) / norms_of(params)["kernel"] ** 2
        angles.append(np.arccos(turned))
        assert_close(found["bias"], params["bias"] - own * factor * grads["bias"], RECOMPILED)
    np.testing.assert_allclose(angles, np.arctan(LR), rtol=0.1)
    np.testing.assert_allclose(angles, angles[0], rtol=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: adamjax.hyperball(optax.sgd(0.1, momentum=0.9), learning_rate=LR),
        lambda: adamjax.hyperball(adamjax.adam(LR, mu_dtype=adamjax.quantized("int8", min_size=1))),
        lambda: adamjax.hyperball(adamjax.packed(adamjax.nadam(schedules.cosine(LR, STEPS)))),
        lambda: adamjax.hyperball(adamjax.adam(LR), learning_rate=optax.linear_schedule(0.0, LR, STEPS)),
        lambda: adamjax.hyperball(
            adamjax.groups({"bias": adamjax.adamw(1e-3)}, default=adamjax.adam(LR)), learning_rate=LR
        ),
        lambda: adamjax.hyperball(adamjax.adamw(LR, mask=lambda params: jax.tree.map(lambda p: p.ndim < 2, params))),
        lambda: adamjax.skip_spikes(
            adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.hyperball(adamjax.adam(LR)))
        ),
    ],
)
def test_norms_are_held_around_any_optimizer(make, lenient):
    params = some_params()
    found, _ = run(make(), params, some_gradients())
    before, after = norms_of(params), norms_of(found)
    for name in ("kernel", "conv"):
        assert abs(after[name] / before[name] - 1) < HELD
        assert not np.allclose(found[name], params[name])
    assert abs(after["bias"] / before["bias"] - 1) > HELD


@pytest.mark.parametrize("name", ROUNDED)
def test_half_precision_parameters_follow_float32(name):
    params, grads = some_params("bfloat16"), some_gradients()
    found, state = run(ROUNDED[name](adamjax.hyperball(adamjax.adam(LR))), params, grads)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    expected, _ = run(adamjax.hyperball(adamjax.adam(LR)), wide, grads)
    assert found["kernel"].dtype == jnp.bfloat16
    near = float(jnp.finfo(jnp.bfloat16).eps)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.max(np.abs(np.asarray(a, np.float32) - b)) < 3 * near * np.max(np.abs(b))
    for key in ("kernel", "conv"):
        assert abs(norms_of(found)[key] / norms_of(params)[key] - 1) < near / 4
    assert state.inner.norms["kernel"].dtype == jnp.float32


def test_x64():
    with jax.enable_x64(True):
        params = some_params("float64")
        found, state = run(adamjax.hyperball(adamjax.adam(LR)), params, some_gradients(dtype="float64"))
        assert state.norms["kernel"].dtype == jnp.float64
        expected = adam_h(params, some_gradients(dtype="float64"), [LR] * STEPS)
        assert_close(found, jax.tree.map(jnp.asarray, expected), ORACLE["float64"] * 10)
        wide = jax.tree.map(lambda p: p.astype(jnp.complex64), some_params("float32"))
        turned, _ = run(adamjax.hyperball(adamjax.adam(LR)), wide, some_gradients(5, "complex64"))
        assert abs(np.linalg.norm(turned["kernel"]) / np.linalg.norm(wide["kernel"]) - 1) < HELD


SPECS = {"kernel": P(None, "data"), "conv": P(None, None, None, "data"), "bias": P("data")}


def under_jit(axis_type):
    mesh = make_mesh(axis_type)

    def place(tree):
        return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, SPECS)

    opt = adamjax.hyperball(adamjax.adam(LR))
    with jax.set_mesh(mesh):
        params = place(some_params())
        return mesh, opt, jax.jit(by_step(opt)), params, opt.init(params), place


def with_zero1():
    mesh = make_mesh(AxisType.Auto)
    params = jax.device_put(some_params(), NamedSharding(mesh, P()))
    opt = sharding.zero1(adamjax.hyperball(adamjax.adam(LR)), axis="data", mesh=mesh)
    state = opt.init(params)
    assert state.inner.inner[0].mu["kernel"].sharding.shard_shape((16, 24)) == (2, 24)
    return mesh, opt, jax.jit(by_step(opt)), params, state, lambda g: g


def in_shard_map(check_vma):
    mesh = make_mesh(AxisType.Auto)
    opt = adamjax.hyperball(adamjax.adam(LR), axis_name="data")
    params = some_params()
    state = opt.init(params)
    adam = state.inner[0]._replace(count=P(), mu=SPECS, nu=SPECS)
    of_state = state._replace(count=P(), norms=jax.tree.map(lambda _: P(), state.norms), inner=(adam, *state.inner[1:]))
    advance = jax.shard_map(
        by_step(opt), mesh=mesh, in_specs=(SPECS, of_state, SPECS), out_specs=(SPECS, of_state), check_vma=check_vma
    )
    inside = jax.shard_map(opt.init, mesh=mesh, in_specs=(SPECS,), out_specs=of_state, check_vma=check_vma)(params)
    assert_close(inside.norms, state.norms, RECOMPILED)
    params, state = jax.device_put(
        (params, state), jax.tree.map(lambda spec: NamedSharding(mesh, spec), (SPECS, of_state))
    )
    return mesh, opt, jax.jit(advance), params, state, lambda g: g


def with_zero1_mapped():
    mesh = make_mesh(AxisType.Auto)
    params = jax.device_put(some_params(), NamedSharding(mesh, P()))
    opt = sharding.zero1_mapped(adamjax.hyperball(adamjax.adam(LR), axis_name="data"), axis="data")
    state = opt.init(params)
    specs = jax.tree.map(lambda x: x.sharding.spec, state)
    # Each device has an eighth of the gradient.
    advance = jax.shard_map(
        lambda p, s, g: opt.step(jax.tree.map(lambda x: jax.lax.pcast(x / 8, "data", to="varying"), g), s, p),
        mesh=mesh,
        in_specs=(P(), specs, P()),
        out_specs=(P(), specs),
    )
    return mesh, opt, jax.jit(advance), params, state, lambda g: g


@pytest.mark.parametrize(
    "make",
    [
        partial(under_jit, AxisType.Auto),
        partial(under_jit, AxisType.Explicit),
        with_zero1,
        partial(in_shard_map, True),
        partial(in_shard_map, False),
        with_zero1_mapped,
    ],
    ids=["jit", "jit explicit", "zero1", "shard_map", "shard_map unchecked", "zero1_mapped"],
)
def test_sharded_as_whole(make):
    mesh, _, advance, params, state, place = make()
    expected, alone = run(adamjax.hyperball(adamjax.adam(LR)), some_params(), some_gradients(12))
    with jax.set_mesh(mesh):
        for grads in some_gradients(12):
            params, state = advance(params, state, place(grads))
    assert_close(params, expected, 8 * RECOMPILED)
    inner = state.inner if isinstance(state, sharding.Zero1State) else state
    assert_close(inner.norms, alone.norms, RECOMPILED)
    assert advance._cache_size() == 1


def test_a_norm_of_parts_needs_the_axis():
    mesh, params = make_mesh(AxisType.Auto), some_params()
    opt = adamjax.hyperball(adamjax.chain(adamjax.scale_by_learning_rate(LR)))
    state = opt.init(params)
    step = jax.shard_map(
        lambda p, g: opt.step(g, state, p)[0], mesh=mesh, in_specs=(SPECS, SPECS), out_specs=SPECS, check_vma=True
    )
    with pytest.raises(ValueError, match=r"differs over the mapped axes 'data'.* give axis_name="):
        jax.jit(step)(params, some_gradients(1)[0])


@COMPILER
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kernel_delivers_the_directions(dtype):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(160, 128)), dtype)}
    grads = [{"w": jnp.asarray(rng.normal(size=(160, 128)), dtype)} for _ in range(5)]
    wrap = adamjax.kahan if dtype == "bfloat16" else lambda opt: opt
    fused, plain = (wrap(adamjax.hyperball(adamjax.adam(LR, fused=mode))) for mode in (True, False))
    text = jax.jit(by_step(fused)).lower(params, fused.init(params), grads[0]).as_text()
    assert text.count(_library.target()) == 1
    found, expected = (run(opt, params, grads)[0] for opt in (fused, plain))
    assert_close(found, expected, 8 * RECOMPILED if dtype == "float32" else ORACLE["bfloat16"])


def test_what_has_no_sphere_or_no_update():
    """A matrix that is 0 at first goes by Adam; one whose gradient is 0, or missing, stays as it is."""
    params = {"zero": jnp.zeros((4, 4)), "still": jnp.ones((4, 4)), "frozen": jnp.ones((4, 4)), "w": jnp.ones((4, 4))}
    opt = adamjax.hyperball(adamjax.adam(0.1))
    grads = {"zero": jnp.ones((4, 4)), "still": jnp.zeros((4, 4)), "frozen": None, "w": jnp.eye(4)}
    found, _ = jax.jit(opt.step)(grads, opt.init(params), params)
    assert_close(found["zero"], jnp.full((4, 4), -0.1), RECOMPILED)
    assert_equal({k: found[k] for k in ("still", "frozen")}, {k: params[k] for k in ("still", "frozen")})
    bad = {**grads, "w": jnp.eye(4) * jnp.nan}
    found, _ = jax.jit(opt.step)(bad, opt.init(params), params)
    assert np.all(np.isnan(found["w"][0]))  # not hidden


def test_a_mask_says_which_norms_are_held():
    params = some_params()
    opt = adamjax.hyperball(adamjax.adam(LR), mask={"kernel": False, "conv": True, "bias": True})
    state = opt.init(params)
    assert jax.tree.map(np.shape, state.norms) == {"kernel": None, "conv": (), "bias": ()}
    found, _ = run(opt, params, some_gradients(8))
    plain, _ = run(adamjax.adam(LR), params, some_gradients(8))
    assert_equal(found["kernel"], plain["kernel"])
    assert abs(norms_of(found)["bias"] / norms_of(params)["bias"] - 1) < HELD


def test_a_population_derivatives_and_a_scan():
    params, grads = some_params(), jax.tree.map(lambda *g: jnp.stack(g), *some_gradients(6))

    def end(rate):
        opt = adamjax.hyperball(adamjax.adam(rate))
        (found, _), _ = jax.lax.scan(lambda c, g: (by_step(opt)(*c, g), None), (params, opt.init(params)), grads)
        return found

    found = jax.vmap(end)(jnp.array([LR, 2 * LR]))
    assert_close(jax.tree.map(lambda x: x[1], found), jax.jit(end)(2 * LR), 8 * RECOMPILED)
    slope = jax.grad(lambda rate: jnp.sum(end(rate)["kernel"] ** 3))(LR)
    h = 1e-3
    sides = [float(jnp.sum(end(LR + s)["kernel"] ** 3)) for s in (-h, h)]
    np.testing.assert_allclose(slope, (sides[1] - sides[0]) / (2 * h), rtol=1e-2)


def test_an_export_and_a_checkpoint_go_on(tmp_path):
    opt, params = adamjax.hyperball(adamjax.adam(schedules.cosine(LR, 20))), some_params()
    grads = some_gradients(8)
    state = opt.init(params)
    step = jax.jit(by_step(opt), donate_argnums=(0, 1))
    exported = jax.export.deserialize(jax.export.export(jax.jit(by_step(opt)))(params, state, grads[0]).serialize())
    for g in grads[:4]:
        params, state = exported.call(params, state, g)
    checkpoint.save(tmp_path / "run", opt, params, state, step=4)
    found = checkpoint.restore(tmp_path / "run", opt, params)
    again, there = found.params, found.state
    for g in grads[4:]:
        params, state = exported.call(params, state, g)
        again, there = step(again, there, g)
    assert_close((again, there), (params, state), RECOMPILED)
    assert step._cache_size() == 1


def test_the_diagnosis_sees_through_it():
    opt, params = adamjax.hyperball(adamjax.adam(LR)), some_params()
    (grads,) = some_gradients(1)
    state = opt.init(params)
    updates, after = opt.update(grads, state, params)
    stats = adamjax.diagnostics.measure(grads, updates, after, params, opt=opt)
    ratio = float(stats["kernel"].update_ratio)
    assert abs(ratio / LR - 1) < 0.1


DECAYS = adamjax.adamw(LR, mask={"kernel": True, "bias": False})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: adamjax.hyperball(cast(Any, adamjax.adam)), TypeError, "argument opt of hyperball is"),
        (lambda: adamjax.hyperball(adamjax.adamw(LR)), ValueError, "weight decay inside of it would change no norm"),
        (lambda: adamjax.hyperball(adamjax.adam(LR, weight_decay=0.1)), ValueError, "take weight_decay=0, or a mask="),
        (
            lambda: adamjax.hyperball(DECAYS).init({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}),
            ValueError,
            r"params\['kernel'\] is held on its norm by hyperball, and the mask",
        ),
        (lambda: adamjax.hyperball(optax.adam(LR)), ValueError, "does not see the learning rate of .* give learning_r"),
        (lambda: adamjax.hyperball(adamjax.scale_by_adam()), ValueError, "does not see the learning rate"),
        (lambda: adamjax.hyperball(adamjax.adam(LR), learning_rate=-1.0), ValueError, "Invalid learning rate: -1.0"),
        (lambda: adamjax.hyperball(adamjax.kahan(adamjax.adam(LR))), ValueError, "put hyperball inside of that"),
        (lambda: adamjax.hyperball(adamjax.skip_nonfinite(adamjax.adam(LR))), ValueError, "put hyperball inside"),
        (lambda: adamjax.hyperball(adamjax.adam(LR), axis_name=cast(Any, 0)), TypeError, "Invalid axis_name value"),
        (lambda: adamjax.hyperball(adamjax.adam(LR), mask={"a": 1.0}), TypeError, "mask"),
        (
            lambda: adamjax.hyperball(adamjax.adam(LR)).update(jnp.ones((2, 2)), ()),
            ValueError,
            "params",
        ),
        (
            lambda: adamjax.hyperball(adamjax.adam(LR)).update(jnp.ones((2, 2)), (), jnp.ones((2, 2))),
            TypeError,
            "hyperball was given a tuple for its state, expected HyperballState",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_state_of_other_parameters():
    opt = adamjax.hyperball(adamjax.adam(LR))
    state, params = opt.init({"w": jnp.ones((2, 2))}), {"v": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="state"):
        opt.step(params, state, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adamjax.hyperball(adamjax.adamw(LR, weight_decay=0.0))
