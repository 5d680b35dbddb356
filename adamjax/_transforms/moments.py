"""What makes a transformation of a pytree out of the step of one array: state, dtypes, storage."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import chex
import jax
import jax.export
import numpy as np
from jax import Array

from adamjax import storage
from adamjax._core import checks, trees
from adamjax._core.low_precision import Dither, dither
from adamjax._core.packing import unpacked
from adamjax._core.trees import PyTree
from adamjax._transforms.base import Leafwise
from adamjax._transforms.leafwise import Doing, Plan, fixed

Step = tuple[Array, Array, Array, Any]  # the direction, and the new m, v, v_max (or None)


class AdamState(NamedTuple):
    """What the next step needs of the last ones.

    Fields:
      count: int32 scalar, the number of steps done; stays at its largest value once there.
      mu: First moments, shaped and sharded like the parameters, in `mu_dtype`; without one in the
        parameters' own dtype, but at least float32. Quantised, a `storage.QuantizedArray` each.
      nu: Second moments (Adamax: infinity norms), likewise by `nu_dtype`; real throughout.
      nu_max: Running maxima of the second moments, like `nu`; None unless AMSGrad.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, which nobody counts with
    mu: PyTree
    nu: PyTree
    nu_max: PyTree | None = None


jax.export.register_namedtuple_serialization(AdamState, serialized_name="adamjax.AdamState")


def find(state: PyTree) -> list[tuple[tuple[Any, ...], Any]]:
    """All nodes of a state that hold moments, ours or optax's, each with its path; none of their trees is packed."""

    def holds_moments(x: Any) -> bool:
        return {"count", "mu", "nu"} <= set(getattr(x, "_fields", ()))

    nodes = jax.tree.leaves_with_path(state, is_leaf=holds_moments)
    return [(path, type(x)(*map(unpacked, x))) for path, x in nodes if holds_moments(x)]


class Keep(NamedTuple):
    """What a step goes on with of each of its new moments: see `storage.settle_signed`."""

    mu: Callable[[Array], Array]
    nu: Callable[[Array], Array]
    nu_max: Callable[[Array], Array]


class Moments(Leafwise):
    """Base of the transformations that keep two moments per parameter.

    A member has the fields `mu_dtype` and `nu_dtype`, and says what the step of one array is.
    """

    mu_dtype: Any
    nu_dtype: Any

    @property
    def keeps_maximum(self) -> bool:
        """Whether the state has `nu_max`."""
        return False

    def _rule(self) -> tuple[Callable[..., Step], tuple[Any, ...]]:
        """The step of one array, called as `rule(g, m, v, v_max, scalars, keep, *options)`."""
        raise NotImplementedError

    def _scalars(self, t: Array) -> Any:
        """What the rule needs of the hyperparameters at step `t` (1 for the first), in its dtype."""
        raise NotImplementedError

    def _check_dtypes(self) -> None:
        self._replace_field("mu_dtype", storage.moment_format("mu_dtype", self.mu_dtype, signed=True))
        self._replace_field("nu_dtype", storage.moment_format("nu_dtype", self.nu_dtype, signed=False))

    def _init(self, params: PyTree) -> AdamState:
        def empty_nu() -> PyTree:
            return storage.empty(params, "nu_dtype", self.nu_dtype, signed=False)

        mu = storage.empty(params, "mu_dtype", self.mu_dtype, signed=True)
        return AdamState(trees.zero_count(params), mu, empty_nu(), empty_nu() if self.keeps_maximum else None)

    def checked(self, updates: PyTree, state: PyTree) -> AdamState:
        """`state`, if it is one of these moments for such gradients; whole, where a framework took it apart."""
        checks.state(state, AdamState, type(self).__name__)
        state = AdamState(
            state.count,
            storage.revive(state.mu, updates, self.mu_dtype, signed=True),
            *(storage.revive(x, updates, self.nu_dtype, signed=False) for x in (state.nu, state.nu_max)),
        )
        checks.moments(updates, state.mu, "state.mu")
        checks.moments(updates, state.nu, "state.nu", real=True)
        if self.keeps_maximum:
            checks.moments(updates, state.nu_max, "state.nu_max", real=True)
        elif state.nu_max is not None:
            raise ValueError(
                f"{type(self).__name__} was given a state with nu_max, which AMSGrad keeps: this state belongs to "
                "another optimizer, call init(params)"
            )
        return state

    def _plan(self, updates: PyTree, state: PyTree, params: PyTree | None) -> Plan:
        state = self.checked(updates, state)
        count = trees.increment(state.count)
        step = _LeafStep(*self._rule())
        scalars = cache(lambda dtype: fixed(self._scalars(count.astype(dtype)), count))

        def at(place: int, dtype: np.dtype, p: Any, kept: tuple[Any, ...]) -> Doing:
            m, v, _ = kept
            storage.check(*kept)
            dtype = trees.compute_dtype(dtype, m.dtype, v.dtype)
            return Doing(step, (scalars(trees.real_dtype(dtype)), dithers_of(count, place, m, v)), dtype)

        def after(mu: PyTree, nu: PyTree, nu_max: PyTree) -> AdamState:
            return AdamState(count, mu, nu, nu_max if self.keeps_maximum else None)

        return Plan(at, after, (state.mu, state.nu, state.nu_max))


@dataclass(frozen=True)
class _LeafStep:
    """`step_leaf` by a rule, for a `Plan`."""

    rule: Callable[..., Step]
    options: tuple[Any, ...]

    def __call__(self, u: Array, p: Any, kept: tuple[Any, ...], numbers: tuple[Any, Any]) -> tuple[Any, Any]:
        m, v, v_max = kept
        direction, *new = step_leaf(u, m, v, v_max, *numbers, rule=self.rule, options=self.options)
        return direction, tuple(new)


def dithers_of(count: Array, number: int, m: Any, v: Any) -> tuple[Dither | None, Dither | None]:
    """By what the moments of parameter `number` are rounded at step `count`; None where they are not."""
    first, second = map(storage.is_rounded, (m, v))
    if not (first or second):
        return None, None
    both = dither(count, number)
    return both if first else None, both.other() if second else None


def step_leaf(
    g: Array,
    m: Any,
    v: Any,
    v_max: Any,
    scalars: Any,
    dithers: tuple[Dither | None, ...],
    *,
    rule: Callable[..., Step],
    options: tuple[Any, ...],
) -> Step:
    """Load the moments of one leaf, step in float32 or wider, store them."""
    stored = (m, v, v_max)
    chex.assert_equal_shape([x for x in (g, *stored) if x is not None])
    dtype = trees.compute_dtype(g.dtype, m.dtype, v.dtype)
    real = trees.real_dtype(dtype)
    g = g.astype(dtype)
    m, v = storage.load(m, dtype, g), storage.load(v, real, g)
    v_max = None if v_max is None else storage.load(v_max, real, g)
    keep = Keep(
        lambda x: storage.settle_signed(x, stored[0], dithers[0]),
        lambda x: storage.settle_decaying(x, stored[1], dithers[1]),
        lambda x: storage.settle_growing(x, stored[2]),
    )
    # Real scalars times complex arrays are meant, even where promotion is strict.
    with jax.numpy_dtype_promotion("standard") if dtype != real else contextlib.nullcontext():
        direction, m, v, v_max = rule(g, m, v, v_max, scalars, keep, *options)
    kept = (
        storage.store(m, stored[0], dithers[0]),
        storage.store(v, stored[1], dithers[1]),
        None if v_max is None else storage.store(v_max, stored[2], None),
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(kept, stored)
    return direction, *kept
