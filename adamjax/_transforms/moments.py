"""Moments: the state of Adam and its kin, and the step of one leaf around the rule of one array."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import chex
import jax
import jax.export
import numpy as np
from jax import Array

from adamjax._core import checks, trees
from adamjax._core.low_precision import Dither, dither
from adamjax._core.packing import Layout, unpacked
from adamjax._core.quantization import QuantizedArray
from adamjax._core.trees import Leaves
from adamjax._core.typing import PyTree
from adamjax._transforms import moment_storage as storage
from adamjax._transforms.base import Leafwise
from adamjax._transforms.leafwise import LeafOp, LeafTransform, as_constants
from adamjax._transforms.moment_storage import Moment, Quantized


class AdamState(NamedTuple):
    """The numbers that the next step needs from the last ones.

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


def holds_moments(x: object) -> bool:
    """Return whether a node of a state holds moments, ours or optax's."""
    return {"count", "mu", "nu"} <= set(getattr(x, "_fields", ()))


def find_moments(state: PyTree) -> list[tuple[tuple[Any, ...], Any]]:
    """Find all nodes of a state that hold moments: each with its path, and unpacked."""
    nodes = jax.tree.leaves_with_path(state, is_leaf=holds_moments)
    return [(path, type(x)(*map(unpacked, x))) for path, x in nodes if holds_moments(x)]


class Parts(NamedTuple):
    """The parts of the direction of one array, for who wants to see them: m_hat / (root + eps)."""

    m_hat: Array
    root: Array
    eps: Any


class Moments(Leafwise):
    """Base of the transformations that keep two moments per parameter.

    A member has the fields `mu_dtype` and `nu_dtype`, and says the rule of one array: an `AdamRule`, or a subclass.
    """

    mu_dtype: Any
    nu_dtype: Any

    @property
    def tracks_max(self) -> bool:
        """Whether the state has `nu_max`."""
        return False

    @property
    def rule(self) -> Any:
        """The rule of one array."""
        raise NotImplementedError

    def _scalars(self, t: Array) -> Any:
        """The hyperparameters of step `t` (1 for the first) and what follows from them, in the dtype of `t`."""
        raise NotImplementedError

    def parts(self, m: Array, v: Array, v_max: Array | None, t: Array) -> Parts:
        """The parts of the direction at step `t`."""
        return self.rule.parts(m, v, v_max, self._scalars(t))

    def _check_dtypes(self) -> None:
        self._replace_field("mu_dtype", storage.moment_format("mu_dtype", self.mu_dtype, signed=True))
        self._replace_field("nu_dtype", storage.moment_format("nu_dtype", self.nu_dtype, signed=False))

    def _init(self, params: PyTree) -> AdamState:
        def second() -> PyTree:
            return storage.init_moments(params, "nu_dtype", self.nu_dtype, power=0)

        mu = storage.init_moments(params, "mu_dtype", self.mu_dtype, power=self.rule.power)
        return AdamState(trees.zero_count(params), mu, second(), second() if self.tracks_max else None)

    def _leaf_transforms(self, updates: Leaves, state: PyTree, params: Leaves | None) -> list[LeafTransform]:
        state = checks.state(state, AdamState, type(self).__name__)
        columns = self._columns(updates, state)
        return [StepMoments.of(self, state.count, columns, lambda column: updates.like(column).tree)]

    def _columns(self, updates: Leaves, state: PyTree) -> list[list[Any]]:
        """The moments in the order of the updates, if `state` fits those."""
        columns = [self._column(updates, state, "mu"), self._column(updates, state, "nu")]
        if self.tracks_max:
            return [*columns, self._column(updates, state, "nu_max")]
        if state.nu_max is not None:
            raise ValueError(
                f"{type(self).__name__} was given a state with nu_max, which AMSGrad keeps: this state belongs to "
                "another optimizer, call init(params)"
            )
        return [*columns, [None] * len(updates.leaves)]

    def _column(self, updates: Leaves, state: PyTree, name: str) -> list[Any]:
        signed, found = name == "mu", getattr(state, name)
        format = self.mu_dtype if signed else self.nu_dtype
        if isinstance(format, Quantized):
            found = storage.rebuild_quantized(found, updates, format, power=self.rule.power if signed else 0)
        return checks.moments(updates, found, f"state.{name}", real=not signed)


@dataclass(frozen=True)
class StepMoments(LeafTransform):
    """The step of the moments of each leaf."""

    rule: Any  # the rule of one array
    scalars: Callable[[np.dtype], Any]  # from a real dtype, the scalars of this step in it
    count: Array  # the number of this step
    finish: Callable[..., PyTree]  # makes the new state, called with lists of the new m, v and v_max
    leaf_states: Sequence[Any]  # m, v and v_max of each leaf, and of each group
    layout: Layout = ()  # the groups whose moments are packed

    @classmethod
    def of(
        cls,
        member: Moments,
        count: Array,
        columns: list[list[Any]],
        rebuild: Callable[[list[Any]], PyTree],
        layout: Layout = (),
    ) -> "StepMoments":
        """Make the next step of a `member` whose state has this `count`.

        `columns` are its mu, nu and nu_max taken apart (None for each leaf of nu_max, if it has none); `rebuild` puts
        one of them together again.
        """
        count = trees.increment(count)

        def finish(mu: list[Any], nu: list[Any], nu_max: list[Any]) -> AdamState:
            return AdamState(count, rebuild(mu), rebuild(nu), rebuild(nu_max) if member.tracks_max else None)

        scalars = cache(lambda dtype: as_constants(member._scalars(count.astype(dtype)), count))
        return cls(member.rule, scalars, count, finish, list(zip(*columns, strict=True)), layout)

    def ops_for(self, index: int, dtype: np.dtype, p: Any) -> Sequence[LeafOp]:
        m, v, v_max = self.leaf_states[index]
        for x in (m, v, v_max):
            if isinstance(x, QuantizedArray):
                x.check()
        dtype = trees.compute_dtype(dtype, m.dtype, v.dtype)
        operands = self.scalars(trees.real_dtype(dtype)), moment_dithers(self.count, index, m, v)
        return (LeafOp(StepLeaf(self.rule), operands, dtype),)

    def new_state(self, leaf_states: list[Any]) -> PyTree:
        return self.finish(*([list(column) for column in zip(*leaf_states, strict=True)] or [[], [], []]))


def moment_dithers(count: Array, index: int, m: Moment, v: Moment) -> tuple[Dither | None, Dither | None]:
    """The dithers of the moments of parameter `index` at step `count`; None where they are not rounded."""
    first, second = storage.needs_dither(m), storage.needs_dither(v)
    if not (first or second):
        return None, None
    both = dither(count, index)
    return both if first else None, both.second_array() if second else None


@dataclass(frozen=True)
class StepLeaf:
    """A `LeafFunction`: load the moments of one leaf, step in float32 or wider, and store them."""

    rule: Any

    def __call__(self, g: Array, p: Any, stored: Any, operands: Any) -> tuple[Array, Any]:
        scalars, (dither1, dither2) = operands
        m_stored, v_stored, max_stored = stored
        chex.assert_equal_shape([x for x in (g, *stored) if x is not None])
        dtype = trees.compute_dtype(g.dtype, m_stored.dtype, v_stored.dtype)
        real = trees.real_dtype(dtype)
        g = self.rule.limited(g.astype(dtype))
        v = storage.load(v_stored, real, g)
        m = storage.load_first(m_stored, v, dtype, g)
        v_max = None if max_stored is None else storage.load(max_stored, real, g)
        # Real scalars times complex arrays are meant, even where promotion is strict.
        with jax.numpy_dtype_promotion("standard") if dtype != real else contextlib.nullcontext():
            m, v = self.rule.accumulate(g, m, v, scalars)
            m = storage.round_first_moment(m, m_stored, dither1)
            v = storage.round_second_moment(v, v_stored, dither2)
            if v_max is not None:
                v_max = storage.round_max(self.rule.maximum(v, v_max, scalars), max_stored)
            direction = self.rule.direction(g, m, v, v_max, scalars)
        v_new = storage.store(v, v_stored, dither2)
        new = (
            storage.store_first(m, storage.storable(v, v_new), m_stored, dither1, scalars.decay1.one_minus_b),
            v_new,
            None if v_max is None else storage.store(v_max, max_stored, None),
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(new, stored)
        return direction, new
