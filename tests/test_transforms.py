"""Weight decay and its masks, learning rate, clipping: alone and on many devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_equal
from jax.sharding import AxisType, PartitionSpec
from tolerances import RECOMPILED

import adamjax
from adamjax import schedules

PARAMS = {"dense": {"kernel": jnp.ones((2, 2)) * 10, "bias": jnp.ones(2) * 10}, "norm": [jnp.ones(3) * 10]}
ZERO = jax.tree.map(jnp.zeros_like, PARAMS)
NOT_VECTORS = {"dense": {"kernel": True, "bias": False}, "norm": [False]}


@pytest.mark.parametrize(
    "mask",
    [
        NOT_VECTORS,
        lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        {"dense": {"kernel": np.True_, "bias": False}, "norm": False},
        lambda params: {"dense": {"kernel": True, "bias": False}, "norm": False},
    ],
    ids=["tree", "function", "prefix", "function of a prefix"],
)
@pytest.mark.parametrize("jit", [False, True])
def test_masks(mask, jit):
    opt = adamjax.add_decayed_weights(0.5, mask)
    update = jax.jit(opt.update) if jit else opt.update
    updates, _ = update(ZERO, opt.init(PARAMS), PARAMS)
    assert_equal(updates, {"dense": {"kernel": jnp.ones((2, 2)) * 5, "bias": jnp.zeros(2)}, "norm": [jnp.zeros(3)]})
    # In the optimizers, the mask concerns the decay and nothing else.
    for make in (adamjax.adam, adamjax.adamw, adamjax.adamaxw, adamjax.nadamw):
        masked, plain, whole = (make(0.1, weight_decay=w, mask=m) for w, m in ((0.5, mask), (0.0, None), (0.5, None)))
        masked, plain, whole = (opt.update(PARAMS, opt.init(PARAMS), PARAMS)[0] for opt in (masked, plain, whole))
        assert_close(masked["norm"], plain["norm"], RECOMPILED)
        assert_close(masked["dense"]["kernel"], whole["dense"]["kernel"], RECOMPILED)


def test_a_mask_that_is_a_callable_pytree_is_a_tree():
    class Model(tuple):
        __slots__ = ()

        def __call__(self, x):
            return x

    jax.tree_util.register_pytree_node(Model, lambda m: (tuple(m), None), lambda _, leaves: Model(leaves))
    params = Model([jnp.ones(2), jnp.ones(3)])
    opt = adamjax.add_decayed_weights(1.0, Model([True, False]))
    updates, _ = opt.update(Model([jnp.zeros(2), jnp.zeros(3)]), (), params)
    assert_equal(updates, Model([jnp.ones(2), jnp.zeros(3)]))


def test_schedules_start_at_zero_and_count():
    decay = adamjax.add_decayed_weights(schedules.linear(1.0, 0.0, 10))
    rate = adamjax.scale_by_learning_rate(lambda count: count.astype(jnp.float32) * 0.5)
    decay_state, rate_state = decay.init(PARAMS), rate.init(PARAMS)
    assert decay_state.count == rate_state.count == 0
    for t in range(3):
        decayed, decay_state = jax.jit(decay.update)(ZERO, decay_state, PARAMS)
        scaled, rate_state = jax.jit(rate.update)(PARAMS, rate_state)
        np.testing.assert_allclose(decayed["norm"][0], 10 * (1 - t / 10), rtol=1e-6)
        np.testing.assert_allclose(scaled["norm"][0], -10 * 0.5 * t, rtol=1e-6)
    assert decay_state.count == rate_state.count == 3


def test_learning_rate_none_is_the_identity():
    opt = adamjax.scale_by_learning_rate(None)
    assert_equal(opt.update(PARAMS, opt.init(PARAMS))[0], PARAMS)


def test_independent_decay():
    """The same decay whatever the learning rate's level: only the shape of its schedule counts."""
    for peak in (1e-1, 1e-4):
        opt = adamjax.adamw(
            schedules.warmup_cosine(peak, warmup_steps=2, total_steps=10),
            weight_decay=0.01,
            decay_schedule="independent",
        )
        params, state = PARAMS, opt.init(PARAMS)
        factors = []
        for _ in range(4):
            before = params["norm"][0][0]
            params, state = opt.step(ZERO, state, params)
            factors.append(float(params["norm"][0][0] / before))
        expected = 1 - 0.01 * np.array([0, 0.5, 1, (1 + np.cos(np.pi / 8)) / 2])
        np.testing.assert_allclose(factors, expected, rtol=1e-6)
    opt = adamjax.adamw(0.0, weight_decay=0.01, decay_schedule="independent")
    np.testing.assert_allclose(opt.step(ZERO, opt.init(PARAMS), PARAMS)[0]["norm"][0], 9.9, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_clipping(dtype):
    updates = {"a": jnp.array([3.0, 0.0], dtype), "b": (None, jnp.array(4.0, dtype))}
    for limit, factor in ((10.0, 1.0), (5.0, 1.0), (1.0, 0.2), (0.0, 0.0)):
        clipped, _ = jax.jit(adamjax.clip_by_global_norm(limit).update)(updates, ())
        expected = jax.tree.map(lambda u, f=factor: u * jnp.asarray(f, dtype), updates)
        assert_close(jax.tree.map(np.complex64, clipped), jax.tree.map(np.complex64, expected), 4e-3)
        assert clipped["a"].dtype == dtype


def test_clipping_at_the_edges():
    clip = adamjax.clip_by_global_norm(1.0)
    zero = jnp.zeros(2)
    assert_equal(clip.update(zero, ())[0], zero)
    assert np.all(np.isfinite(jax.grad(lambda u: jnp.sum(clip.update(u, ())[0]))(zero)))
    # In float16, 300**2 overflows; the norm is taken in float32.
    assert_close(clip.update(jnp.array([300.0, 400.0], jnp.float16), ())[0], jnp.array([0.6, 0.8], jnp.float16), 1e-3)
    poisoned, _ = clip.update({"a": jnp.array([1.0]), "b": jnp.array([jnp.nan])}, ())
    assert np.isnan(poisoned["a"][0])  # a NaN does not pass as "not larger than the limit"
    assert clip.update((), ()) == ((), ())


W = jnp.arange(16.0).reshape(8, 2) / 10
B = jnp.arange(3.0)


@pytest.mark.parametrize("check_vma", [False, True])
def test_clipping_in_shard_map(check_vma):
    """Sharded leaves: the norm of the whole, where without axis_name each shard has its own."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    expected, _ = adamjax.clip_by_global_norm(1.0).update(W, ())

    def clip(w, axis_name):
        return adamjax.clip_by_global_norm(1.0, axis_name=axis_name).update(w, ())[0]

    def shard(axis_name):
        spec = PartitionSpec("data")
        return jax.jit(
            jax.shard_map(lambda w: clip(w, axis_name), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
        )

    assert_close(shard("data")(W), expected, RECOMPILED)
    assert not np.allclose(shard(None)(W), expected)


def test_clipping_counts_replicated_leaves_once():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    expected, _ = adamjax.clip_by_global_norm(1.0).update({"w": W, "b": B}, ())
    opt = adamjax.clip_by_global_norm(1.0, axis_name=("data", "model"))
    spec = {"w": PartitionSpec("data"), "b": PartitionSpec()}
    clip = jax.jit(jax.shard_map(lambda u: opt.update(u, ())[0], mesh=mesh, in_specs=(spec,), out_specs=spec))
    assert_close(clip({"w": W, "b": B}), expected, RECOMPILED)


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_clipping_in_pmap():
    expected, _ = adamjax.clip_by_global_norm(1.0).update(W, ())
    opt = adamjax.clip_by_global_norm(1.0, axis_name="data")
    assert_close(jax.pmap(lambda w: opt.update(w, ())[0], axis_name="data")(W), expected, RECOMPILED)


def test_coupled_decay_of_a_maximum_pulls_to_zero():
    """As in torch: the sign of the gradient is turned, that of the decay is not."""
    p = jnp.array([5.0])
    opt = adamjax.adam(0.1, weight_decay=1.0, maximize=True)
    assert opt.step(jnp.array([0.0]), opt.init(p), p)[0] < p
    opt = adamjax.adam(0.1, maximize=True)
    assert opt.step(jnp.array([1.0]), opt.init(p), p)[0] > p
