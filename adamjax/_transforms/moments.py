"""Moments: the state of Adam and its kin, and the step of one leaf around the rule of one array."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple

import chex
import jax
import jax.export
import jax.numpy as jnp
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


class AdEMAMixState(NamedTuple):
    """The numbers that the next step of AdEMAMix needs from the last ones.

    Fields:
      count, mu, nu: Those of `AdamState`.
      mu_slow: The slow first moments, like `mu`, by `mu_slow_dtype`.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, which nobody counts with
    mu: PyTree
    nu: PyTree
    mu_slow: PyTree


jax.export.register_namedtuple_serialization(AdamState, serialized_name="adamjax.AdamState")
jax.export.register_namedtuple_serialization(AdEMAMixState, serialized_name="adamjax.AdEMAMixState")


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


# For each field of a state, the argument that says the format of its arrays.
_ARGUMENTS = {"mu": "mu_dtype", "mu_slow": "mu_slow_dtype", "nu": "nu_dtype", "nu_max": "nu_dtype"}


class Moments(Leafwise):
    """Base of the transformations that keep two moments per parameter.

    A member has the fields `mu_dtype` and `nu_dtype`, and says the rule of one array: an `AdamRule`, or a subclass.
    """

    state_type: ClassVar[Any] = AdamState

    mu_dtype: Any
    nu_dtype: Any

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields of the state that hold an array for each parameter: two moments, and perhaps a third array."""
        return "mu", "nu"

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
        def moments(name: str) -> PyTree:
            power = self.rule.power if name.startswith("mu") else 0
            return storage.init_moments(params, _ARGUMENTS[name], getattr(self, _ARGUMENTS[name]), power)

        return self.state_type(trees.zero_count(params), *map(moments, self.columns))

    def _leaf_transforms(self, updates: Leaves, state: PyTree, params: Leaves | None) -> list[LeafTransform]:
        state = checks.state(state, self.state_type, type(self).__name__)
        columns = self._columns(updates, state)
        return [StepMoments.of(self, state.count, columns, lambda column: updates.like(column).tree)]

    def _columns(self, updates: Leaves, state: PyTree) -> list[list[Any]]:
        """The moments in the order of the updates, if `state` fits those."""
        names = self.columns
        if len(names) == 2 and state.nu_max is not None:
            raise ValueError(
                f"{type(self).__name__} was given a state with nu_max, which AMSGrad keeps: this state belongs to "
                "another optimizer, call init(params)"
            )
        return list(map(partial(self._column, updates, state), names))

    def _column(self, updates: Leaves, state: PyTree, name: str) -> list[Any]:
        is_first, found, format = name.startswith("mu"), getattr(state, name), getattr(self, _ARGUMENTS[name])
        if isinstance(format, Quantized):
            found = storage.rebuild_quantized(found, updates, format, power=self.rule.power if is_first else 0)
        return checks.moments(updates, found, f"state.{name}", real=not is_first)


@dataclass(frozen=True)
class StepMoments(LeafTransform):
    """The step of the moments of each leaf."""

    rule: Any  # the rule of one array
    scalars: Callable[[np.dtype], Any]  # from a real dtype, the scalars of this step in it
    count: Array  # the number of this step
    finish: Callable[..., PyTree]  # makes the new state, called with lists of the new m, v and third arrays
    leaf_states: Sequence[Any]  # m, v and the third array (or None) of each leaf, and of each group
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

        `columns` are its mu, nu and third arrays, if it has those, taken apart; `rebuild` puts one of them together
        again.
        """
        count, kept = trees.increment(count), len(columns)
        if kept == 2:
            columns = [*columns, [None] * len(columns[0])]

        def finish(*new: list[Any]) -> PyTree:
            return member.state_type(count, *map(rebuild, new[:kept]))

        scalars = cache(lambda dtype: as_constants(member._scalars(count.astype(dtype)), count))
        return cls(member.rule, scalars, count, finish, list(zip(*columns, strict=True)), layout)

    def ops_for(self, index: int, dtype: np.dtype, p: Any) -> Sequence[LeafOp]:
        m, v, third = self.leaf_states[index]
        for x in (m, v, third):
            if isinstance(x, QuantizedArray):
                x.check()
        dtype = trees.compute_dtype(dtype, m.dtype, v.dtype)
        dithers = moment_dithers(self.count, index, m, v, third if self.rule.has_slow_mean else None)
        return (LeafOp(StepLeaf(self.rule), (self.scalars(trees.real_dtype(dtype)), dithers), dtype),)

    def new_state(self, leaf_states: list[Any]) -> PyTree:
        return self.finish(*([list(column) for column in zip(*leaf_states, strict=True)] or [[], [], []]))


Dithers = tuple[Dither | None, Dither | None, Dither | None]  # of the moments of one parameter


def moment_dithers(count: Array, index: int, m: Moment, v: Moment, slow: Moment | None = None) -> Dithers:
    """The dithers of the moments of parameter `index` at step `count`; None where they are not rounded."""
    first, second = storage.needs_dither(m), storage.needs_dither(v)
    third = slow is not None and storage.needs_dither(slow)
    if not (first or second or third):
        return None, None, None
    own = dither(count, index)
    return own if first else None, own.second_array() if second else None, own.third_array() if third else None


@dataclass(frozen=True)
class StepLeaf:
    """A `LeafFunction`: load the moments of one leaf, step in float32 or wider, and store them."""

    rule: Any

    def __call__(self, g: Array, p: Any, stored: Any, operands: Any) -> tuple[Array, Any]:
        scalars, (dither1, dither2, dither3) = operands
        m_stored, v_stored, third_stored = stored
        rule = self.rule
        chex.assert_equal_shape([x for x in (g, *stored) if x is not None])
        g, v_old, m, v = self._accumulated(g, stored, operands)
        third, factor = None, None
        # Real scalars times complex arrays are meant, even where promotion is strict.
        with jax.numpy_dtype_promotion("standard") if jnp.iscomplexobj(g) else contextlib.nullcontext():
            if third_stored is not None and rule.has_slow_mean:
                third = rule.third(g, v, storage.load_first(third_stored, v_old, g.dtype, g), scalars)
                third = storage.round_first_moment(third, third_stored, dither3)
            elif third_stored is not None:
                third = rule.third(g, v, storage.load(third_stored, v.dtype, g), scalars)
                third = storage.round_max(third, third_stored)
            direction = rule.direction(g, m, v, third, scalars)
            if rule.cautious:
                direction = rule.factor(g, m, v, scalars) * direction
            elif rule.keeps_factor:
                factor = rule.factor(g, m, v, scalars)
        v_new = storage.store(v, v_stored, dither2)
        v = rule.ratio_base(storage.storable(v, v_new), partial(storage.load, v_new, v.dtype, g), scalars)
        m_new = storage.store_first(m, v, m_stored, dither1, scalars.decay1.one_minus_b)
        third_new: Any = None
        if third is not None and rule.has_slow_mean:
            third_new = storage.store_first(third, v, third_stored, dither3, scalars.extra.decay3.one_minus_b)
        elif third is not None:
            third_new = storage.store(third, third_stored, None)
        new = m_new, v_new, third_new
        chex.assert_trees_all_equal_shapes_and_dtypes(new, stored)
        return direction, (*new, factor) if rule.keeps_factor else new

    def factor(self, g: Array, stored: Any, operands: Any) -> Array:
        """The factor of the rule, for who steps in another way."""
        g, _, m, v = self._accumulated(g, stored, operands)
        return self.rule.factor(g, m, v, operands[0])

    def _accumulated(self, g: Array, stored: Any, operands: Any) -> tuple[Array, Array, Array, Array]:
        """The gradient, limited, the old second moment, and both new ones, rounded if they are stored as floats."""
        scalars, (dither1, dither2, _) = operands
        m_stored, v_stored, _ = stored
        dtype = trees.compute_dtype(g.dtype, m_stored.dtype, v_stored.dtype)
        g = self.rule.limited(g.astype(dtype))
        old = storage.load(v_stored, trees.real_dtype(dtype), g)
        m = storage.load_first(m_stored, old, dtype, g)
        with jax.numpy_dtype_promotion("standard") if jnp.iscomplexobj(g) else contextlib.nullcontext():
            m, v = self.rule.accumulate(g, m, old, scalars)
        m = storage.round_first_moment(m, m_stored, dither1)
        return g, old, m, storage.round_second_moment(v, v_stored, dither2)
