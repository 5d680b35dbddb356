"""Whether a step by a kernel is the plain one, but for the last digits."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_equal, by_step, decoded
from tolerances import FUSED, FUSED_ROUNDED

import adamjax
from adamjax.storage import QuantizedArray


class ByUpdate:
    """A step that applies what `update` returns."""

    def __init__(self, opt, **extra):
        self.opt, self.extra = opt, extra

    def step(self, grads, state, params):
        updates, state = self.opt.update(grads, state, params, **self.extra)
        return adamjax.apply_updates(params, updates), state


def units(x, dtype):
    """The distance between neighbours around the numbers of an array, in a dtype."""
    info = jnp.finfo(dtype)
    return np.maximum(np.abs(np.asarray(x, np.float64)), float(info.tiny)) * float(info.eps)


def integers(x):
    """The codes of a quantised moment, one per number."""
    codes = np.asarray(x.codes, int)
    halves = codes if x.bits == 8 else np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)
    return halves[..., : x.size]


def assert_near(found, expected, terms, name):
    """Within so many units in the last place; what is stored narrowly, equal but for a few."""
    if isinstance(found, QuantizedArray):
        # A scale is rounded, too. The codes of a block count from it.
        same = np.asarray(found.scales == expected.scales)
        assert np.sum(~same) <= max(1, FUSED_ROUNDED * same.size), name
        same = np.repeat(same, found.block_size, -1)[..., : found.size]
        apart = np.abs(integers(found) - integers(expected))[same]
        assert np.mean(apart > 0) <= FUSED_ROUNDED, name
        assert np.max(apart, initial=0) <= 1, name
        return
    assert found.dtype == expected.dtype
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b), err_msg=name)
    apart = np.where((a == b) | np.isnan(a), 0, np.abs(a - b)) / units(terms, found.dtype)
    if found.dtype == jnp.float32:
        assert np.max(apart) <= FUSED, name
    else:
        assert np.mean(apart > 0) <= FUSED_ROUNDED, name
        assert np.max(apart) <= 1, name


def halves_of(step, name):
    """The moments of a parameter that are floats narrower than float32."""
    _, (state, *_) = step
    moments = [x[name] for x in state[1:] if x is not None]
    return [np.asarray(x) for x in moments if x.dtype.itemsize == 2] or [np.zeros(moments[0].shape)]


def assert_same_steps(fused, plain, state, params, all_grads, rate, coupled=0.0, added=None):
    """Go on with the plain steps, which learn at a rate and may add `coupled` times parameters to gradients.

    `added` makes of the magnitudes of a gradient, and the second moment, those of what is added to the first.
    """
    steps = jax.jit(fused.step), jax.jit(plain.step)
    for grads in all_grads:
        found, expected = (step(grads, state, params) for step in steps)
        assert_near_steps(found, expected, grads, state, params, rate, coupled, added)
        params, state = expected


def assert_near_steps(found, expected, grads, state, params, rate, coupled=0.0, added=None):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    before, after, wide = state[0], expected[1][0], decoded(state[0])
    for name, g in grads.items():
        p, m, v = params[name], wide.mu[name], wide.nu[name]
        if g is None:
            assert_equal((found[0][name], found[1][0].mu[name]), (p, before.mu[name]))
            continue
        g = np.abs(np.asarray(g, np.float64)) + coupled * np.abs(np.asarray(p, np.float64))
        # A direction is a sum whose terms cancel: they may be that much longer. Where a first moment was rounded up, or
        # a second one down, longer still.
        longer = 10.0
        if any(isinstance(x[name], QuantizedArray) for x in (before.mu, before.nu)):
            longer = np.maximum(longer, (np.abs(m) + g) / np.sqrt(v + 1e-3 * g * g + 1e-30))
        # Where one is rounded the other way, by its last digit, the step goes on with that.
        same = np.logical_and.reduce(
            [a == b for a, b in zip(halves_of(found, name), halves_of(expected, name), strict=True)]
        )
        terms = np.broadcast_to(np.abs(np.asarray(p, np.float64)) + longer * rate, g.shape)
        got, want = np.asarray(found[0][name]), np.asarray(expected[0][name])
        assert_near(got[same], want[same], terms[same], name)
        assert_near_moments(name, g, found[1][0], after, wide, added)
    assert_equal(found[1][0].count, after.count)
    assert_equal(found[1][1:], expected[1][1:])


def assert_near_moments(name, g, found, expected, before, added=None):
    """Those of one parameter; `g` are the magnitudes of its gradient."""
    m, v = before.mu[name], before.nu[name]
    assert_near(found.mu[name], expected.mu[name], np.abs(m) + (g if added is None else added(g, v)), f"mu {name}")
    largest = v + g * g
    assert_near(found.nu[name], expected.nu[name], largest, f"nu {name}")
    if getattr(expected, "mu_slow", None) is not None:
        slow = np.abs(before.mu_slow[name]) + g
        assert_near(found.mu_slow[name], expected.mu_slow[name], slow, f"mu_slow {name}")
    if getattr(expected, "nu_max", None) is not None:
        largest = np.maximum(largest, before.nu_max[name])
        assert_near(found.nu_max[name], expected.nu_max[name], 1e3 * largest, f"nu_max {name}")


def assert_in_place(opt, params, grads):
    """Of donated parameters and states, a step copies nothing, and is compiled once."""
    advance = jax.jit(by_step(opt), donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.copy, (params, opt.init(params)))
    memory = advance.lower(params, state, grads).compile().memory_analysis()
    size = sum(p.nbytes for p in jax.tree.leaves(params))
    assert memory.temp_size_in_bytes < size / 100
    assert memory.alias_size_in_bytes >= size
    for _ in range(3):
        params, state = advance(params, state, grads)
    assert advance._cache_size() == 1
