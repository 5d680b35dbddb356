"""Schedules: exact at their ends, and values."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from helpers import assert_equal

import adamjax
from adamjax import schedules

pytestmark = pytest.mark.numbers

# (schedule, {step: exact value}), the values as the numbers that were given.
EXACT = [
    (schedules.constant(0.1), {0: 0.1, 7: 0.1, 10**9: 0.1}),
    (schedules.linear(0.1, 0.7, 30), {0: 0.1, 30: 0.7, 31: 0.7, 10**9: 0.7}),
    (schedules.cosine(0.3, 70, end=0.1), {0: 0.3, 70: 0.1, 71: 0.1}),
    (schedules.warmup_cosine(0.3, 7, 70, end=0.1, init=0.05), {0: 0.05, 7: 0.3, 70: 0.1, 2**30: 0.1}),
    (schedules.warmup_cosine(0.3, warmup_steps=0, total_steps=9), {0: 0.3, 9: 0.0}),
    (schedules.warmup_cosine(0.3, warmup_steps=9, total_steps=9, end=0.1), {0: 0.0, 8: 0.3 * 8 / 9, 9: 0.1}),
    (
        schedules.warmup_stable_decay(0.3, 7, 70, 10, end=0.1),
        {0: 0.0, 7: 0.3, 33: 0.3, 60: 0.3, 65: 0.2, 70: 0.1, 99: 0.1},
    ),
    (schedules.warmup_stable_decay(0.3, 0, 70, 16, end=0.1, shape="sqrt"), {0: 0.3, 54: 0.3, 58: 0.2, 70: 0.1}),
    (schedules.inverse_sqrt(0.3, 16, init=0.1), {0: 0.1, 16: 0.3, 64: 0.15, 1600: 0.03}),
    (schedules.one_cycle(0.25, 100), {0: 0.01, 30: 0.25, 100: 1e-6, 200: 1e-6}),
]


@pytest.mark.parametrize(("schedule", "points"), EXACT, ids=lambda x: type(x).__name__)
def test_values(schedule, points):
    for step, expected in points.items():
        for count in (step, np.int32(step), jnp.int32(step)):
            found = jax.jit(schedule)(count)
            assert found.dtype == "float32"
            assert not found.weak_type
            np.testing.assert_allclose(found, expected, rtol=1e-6)
    counts = np.array(sorted(points))
    np.testing.assert_array_equal(jax.jit(schedule)(counts), [jax.jit(schedule)(c) for c in counts])


@pytest.mark.parametrize(("schedule", "points"), EXACT, ids=lambda x: type(x).__name__)
def test_ends_are_exact(schedule, points):
    """Not one unit in the last place away: what was given as start, peak and end is what comes out."""
    warmup, total = getattr(schedule, "warmup_steps", None), getattr(schedule, "total_steps", math.inf)
    if hasattr(schedule, "init") and warmup != 0:
        assert schedule(0) == np.float32(schedule.init)
    if hasattr(schedule, "end"):
        assert schedule(max(points)) == np.float32(schedule.end)
    if warmup != total:
        assert np.max(schedule(np.arange(200))) == np.float32(schedule.peak)


@pytest.mark.parametrize(("schedule", "points"), EXACT, ids=lambda x: type(x).__name__)
def test_are_values(schedule, points):
    twin = jax.tree.unflatten(*reversed(jax.tree.flatten(schedule)))
    assert twin == schedule
    assert hash(twin) == hash(schedule)
    halved = jax.tree.map_with_path(lambda path, x: x if path[-1].name.endswith("_steps") else x / 2, schedule)
    assert halved != schedule
    traces = []

    @jax.jit
    def at(schedule, count):
        traces.append(count)
        return schedule(count)

    at(schedule, 3), at(halved, 4)
    assert len(traces) == 1
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(jax.grad(lambda s: s(3) + s(0) + s(60))(schedule)))


def test_vmapped():
    counts = jnp.arange(20)
    rates = jnp.array([0.1, 0.2])
    together = jax.vmap(lambda rate: schedules.warmup_cosine(rate, 5, 20)(counts))(rates)
    for i, rate in enumerate((0.1, 0.2)):
        np.testing.assert_allclose(together[i], schedules.warmup_cosine(rate, 5, 20)(counts), rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("lenient")
def test_agree_with_optax():
    counts = np.arange(0, 130)
    for ours, theirs in [
        (schedules.linear(0.1, 0.7, 30), optax.linear_schedule(0.1, 0.7, 30)),
        (schedules.cosine(0.3, 70), optax.cosine_decay_schedule(0.3, 70)),
        (schedules.warmup_cosine(0.3, 7, 70, 0.1, 0.05), optax.warmup_cosine_decay_schedule(0.05, 0.3, 7, 70, 0.1)),
        (schedules.one_cycle(0.25, 100), optax.cosine_onecycle_schedule(100, 0.25)),
    ]:
        np.testing.assert_allclose(ours(counts), [theirs(t) for t in counts], rtol=1e-4, atol=1e-6)


def test_double_under_x64():
    with jax.enable_x64(True):
        schedule = schedules.warmup_cosine(0.3, 7, 70, end=0.1)
        assert schedule(3).dtype == "float64"
        np.testing.assert_allclose(schedule(33), 0.1 + 0.2 * (1 + math.cos(math.pi * 26 / 63)) / 2, rtol=1e-15)


@pytest.mark.parametrize("count", [2**31, 2**40, np.int64(2**40), np.uint64(2**32 + 1), np.array(2**33)])
def test_counts_beyond_int32(count):
    assert schedules.linear(0.1, 0.7, 30)(count) == np.float32(0.7)


def test_a_schedule_of_mixed_precision_parameters():
    """The rate reaches each leaf in the precision of its arithmetic."""
    with jax.enable_x64(True):
        opt = adamjax.scale_by_learning_rate(schedules.linear(1 / 3, 0.0, 3))
        u = {"half": jnp.ones(1, jnp.bfloat16), "double": jnp.ones(1, jnp.float64)}
        updates, _ = opt.update(u, opt.init(u))
        assert updates["double"][0] == -1 / 3
        assert_equal(updates["half"], jnp.full(1, -1 / 3, jnp.bfloat16))


def test_callable_pytrees_keep_their_leaves():
    rate = jax.tree_util.Partial(lambda base, count: base, jnp.float32(0.5))
    opt = adamjax.scale_by_learning_rate(rate)
    assert jax.tree.leaves(opt) == [jnp.float32(0.5)]
    plain = adamjax.scale_by_learning_rate(lambda count: jnp.float32(0.5))
    assert jax.tree.leaves(plain) == []
    for chosen in (opt, plain):
        assert_equal(chosen.update(jnp.ones(1), chosen.init(jnp.ones(1)))[0], jnp.array([-0.5]))


@pytest.mark.parametrize(("init", "end"), [(0.9, 0.9999), (0.5, 0.999999), (0.99, 0.99)])
def test_half_life(init, end):
    """Its distance to 1 as well, of which 1 - b has no digits left."""
    schedule, exact = schedules.half_life(init, end, 1000), oracle.half_life(init, end, 1000)
    counts = np.array([0, 1, 500, 999, 1000, 5000], np.int32)
    expected = np.array([exact(t) for t in counts.tolist()])
    np.testing.assert_allclose(jax.jit(schedule)(counts), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(schedule.below_one)(counts), 1 - expected, rtol=1e-6)


def test_half_life_under_vmap():
    """As a leaf of an optimizer, too: many ends in one program."""
    ends = jnp.asarray([0.99, 0.999])
    found = jax.jit(jax.vmap(lambda end: schedules.half_life(0.9, end, 10)(5)))(ends)
    np.testing.assert_allclose(found, [oracle.half_life(0.9, end, 10)(5) for end in (0.99, 0.999)], rtol=1e-6)
    p = jnp.ones(3)

    def slow(end):
        opt = adamjax.scale_by_ademamix(b3=schedules.half_life(0.9, end, 2))
        state = opt.init(p)
        for _ in range(2):
            _, state = opt.update(p, state)
        return state.mu_slow[0]

    rates = [[oracle.half_life(0.9, end, 2)(t) for t in (0, 1)] for end in (0.99, 0.999)]
    np.testing.assert_allclose(jax.jit(jax.vmap(slow))(ends), [1 - a * b for a, b in rates], rtol=1e-6)
