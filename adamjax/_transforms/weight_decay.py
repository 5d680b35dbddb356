"""What stands beside Adam in a chain: weight decay, learning rate, clipping, the objective."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks, collectives, trees
from adamjax._core.numerics import scale, sqrt
from adamjax._core.trees import PyTree
from adamjax._core.value import static_field, value
from adamjax._transforms.base import Extra, Leafwise, Transformation, chain
from adamjax._transforms.leafwise import Doing, Plan, carry_out, fixed
from adamjax.schedules import as_schedule


class ScheduleState(NamedTuple):
    """How far a schedule has come.

    Fields:
      count: int32 scalar, the number of steps done; stays at its largest value once there.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, which nobody counts with


jax.export.register_namedtuple_serialization(ScheduleState, serialized_name="adamjax.ScheduleState")


def number_or_schedule(name: str, x: Any, low: float = 0.0) -> Any:
    """Check a hyperparameter that may be a schedule; a plain function becomes one."""
    return as_schedule(x) if callable(x) else checks.number(name, x, low=low)


class Scheduled(Leafwise):
    """Base of the transformations by one hyperparameter that may be a schedule.

    The state is then a `ScheduleState`, else empty.
    """

    def _hyperparameter(self) -> Any:
        raise NotImplementedError

    def _init(self, params: PyTree) -> PyTree:
        return ScheduleState(trees.zero_count(params)) if callable(self._hyperparameter()) else ()

    def _advance(self, state: PyTree) -> tuple[Any, PyTree]:
        """The hyperparameter at this step, and the state after it."""
        x = self._hyperparameter()
        if not callable(x):
            return x, state
        checks.state(state, ScheduleState, type(self).__name__)
        return x(state.count), ScheduleState(trees.increment(state.count))


@value
class ScaleByLearningRate(Scheduled):
    """See `scale_by_learning_rate`."""

    learning_rate: Any
    flip_sign: bool = static_field(default=True)

    def __post_init__(self) -> None:
        self._replace_field("learning_rate", number_or_schedule("learning_rate", self.learning_rate))
        checks.choice("flip_sign", self.flip_sign, (False, True))

    def _hyperparameter(self) -> Any:
        return self.learning_rate

    def _plan(self, updates: PyTree, state: PyTree, params: PyTree | None) -> Plan:
        rate, state = self._advance(state)
        sign = -1 if self.flip_sign else 1
        factor = cache(lambda dtype: fixed(sign * checks.scalar("learning_rate", rate, dtype), updates))

        def at(place: int, dtype: np.dtype, p: Any, kept: tuple[Any, ...]) -> Doing:
            dtype = trees.compute_dtype(dtype)
            return Doing(_scale, factor(dtype), dtype)

        return Plan(at, lambda: state)


def scale_by_learning_rate(learning_rate: Any, *, flip_sign: bool = True) -> Transformation:
    """Multiply by the learning rate, and turn the direction of ascent into one of descent.

    Args:
      learning_rate: At least 0; or a schedule: any callable of the step count, which is 0 for the
        first update. None for no scaling (and no change of sign), as in optax.
      flip_sign: False to go on uphill.

    Returns:
      A transformation; its state counts the steps where the learning rate is a schedule.

    Raises:
      ValueError, TypeError: `learning_rate` is not such a number.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.scale_by_learning_rate(0.5)
    >>> opt.update(jnp.array([2.0, -4.0]), opt.init(jnp.zeros(2)))[0]
    Array([-1.,  2.], dtype=float32)
    """
    return chain() if learning_rate is None else ScaleByLearningRate(learning_rate, flip_sign)


@value
class AddDecayedWeights(Scheduled):
    """See `add_decayed_weights`; `flip_sign` subtracts, for after the learning rate."""

    weight_decay: Any
    mask: Any = static_field(default=None)
    flip_sign: bool = static_field(default=False)

    def __post_init__(self) -> None:
        self._replace_field("weight_decay", number_or_schedule("weight_decay", self.weight_decay, low=-math.inf))
        self._replace_field("mask", _as_mask(self.mask))

    def _hyperparameter(self) -> Any:
        return self.weight_decay

    def _plan(self, updates: PyTree, state: PyTree, params: PyTree | None) -> Plan:
        checks.given(params, updates, type(self).__name__)
        weight_decay, state = self._advance(state)
        sign = -1 if self.flip_sign else 1
        return Plan(_adding_weights(updates, params, weight_decay, self.mask, sign), lambda: state)


def add_decayed_weights(weight_decay: Any = 0.0, mask: Any = None) -> AddDecayedWeights:
    """Add `weight_decay * params` to the updates.

    After Adam and before the learning rate, this is decoupled weight decay (Loshchilov & Hutter,
    2019); before Adam it would be L2 regularisation.

    Args:
      weight_decay: A number or a schedule of the step count. This building block takes a negative
        one too (it drives the parameters away from 0); the optimizers refuse it.
      mask: Which leaves decay: a tree of True and False with the structure of the parameters (or a
        prefix of it), or a function that makes one of them. None for all.

    Returns:
      A transformation that needs `params`; its state counts the steps where `weight_decay` is a
      schedule.

    Raises:
      ValueError, TypeError: `weight_decay` is not such a number, or the mask holds something else;
        at the first update, if the mask does not fit the parameters, or those are missing.

    >>> import adamjax, jax.numpy as jnp
    >>> params = {"kernel": jnp.array([[10.0]]), "bias": jnp.array([10.0])}
    >>> opt = adamjax.add_decayed_weights(0.5, mask={"kernel": True, "bias": False})
    >>> opt.update({"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}, opt.init(params), params)[0]
    {'bias': Array([1.], dtype=float32), 'kernel': Array([[6.]], dtype=float32)}
    """
    return AddDecayedWeights(weight_decay, mask)


@value
class Objective(Transformation):
    """`inner`, given the gradient of the objective that torch.optim's coupled options describe.

    That is f(params) + weight_decay / 2 * |params|^2, or, to maximize f, the same with -f. The
    state is `inner`'s, whose count a schedule of the weight decay follows.
    """

    inner: Transformation
    weight_decay: Any
    mask: Any = static_field(default=None)
    maximize: bool = static_field(default=False)

    def __post_init__(self) -> None:
        self._replace_field("weight_decay", number_or_schedule("weight_decay", self.weight_decay))
        self._replace_field("mask", _as_mask(self.mask))
        checks.choice("maximize", self.maximize, (False, True))

    def _init(self, params: PyTree) -> PyTree:
        return self.inner._init(params)

    def _update(self, updates: PyTree, state: PyTree, params: PyTree | None, extra: Extra) -> tuple[PyTree, PyTree]:
        plans = [Plan(_negate_at, tuple)] if self.maximize else []
        # optax.inject_hyperparams makes arrays of all numbers: a 0 among them needs no parameters.
        if not (params is None and _is_zero(self.weight_decay)):
            checks.given(params, updates, "coupled weight decay")
            weight_decay = self.weight_decay
            if callable(weight_decay):
                checks.counted(state, "coupled weight decay")
                weight_decay = weight_decay(state.count)
            plans.append(Plan(_adding_weights(updates, params, weight_decay, self.mask, 1), tuple))
        if isinstance(self.inner, Leafwise):
            plans.append(self.inner._plan(updates, state, params))
            updates, states = carry_out(plans, updates, params)
            return updates, states[-1]
        updates, _ = carry_out(plans, updates, params)
        return self.inner._update(updates, state, params, extra)


@value
class ClipByGlobalNorm(Transformation):
    """See `clip_by_global_norm`."""

    max_norm: Any
    axis_name: Any = static_field(default=None)

    def __post_init__(self) -> None:
        self._check_numbers("max_norm")
        collectives.check_axis_name(self.axis_name)

    def _update(self, updates: PyTree, state: PyTree, params: PyTree | None, extra: Extra) -> tuple[PyTree, PyTree]:
        leaves = jax.tree.leaves(updates)
        dtype = trees.real_dtype(trees.compute_dtype(*map(trees.dtype_of, leaves)))
        norm = sqrt(collectives.total([collectives.sum_of_squares(x) for x in leaves], self.axis_name, dtype))
        limit = checks.scalar("max_norm", self.max_norm, norm.dtype)
        # Not `norm > limit`: a NaN must reach all updates, instead of passing unclipped.
        exceeds = ~(norm <= limit)
        shrink = jnp.where(exceeds, limit / jnp.where(exceeds, norm, 1.0), 1.0)
        factor = cache(lambda dtype: shrink.astype(dtype))
        return trees.map_leaves(lambda u: scale(u, factor(_compute_dtype(u))), updates), state


def clip_by_global_norm(max_norm: Any, *, axis_name: str | tuple[str, ...] | None = None) -> ClipByGlobalNorm:
    """Scale all updates by one factor, so that their joint norm is at most `max_norm`.

    Args:
      max_norm: At least 0.
      axis_name: Where `update` runs inside `jax.shard_map` or `jax.pmap` on shards of the gradients:
        the mapped axis (or axes) over which they are sharded. Without it each shard would be
        clipped by its own norm. Under `jax.shard_map` a leaf that is replicated over the axis is
        recognised and counted once; under `jax.pmap`, or with `check_vma=False`, every leaf is taken for
        a shard. Gradients that are whole, and sharded arrays under `jax.jit`, need no axis.

    Returns:
      A transformation without state.

    Raises:
      ValueError, TypeError: An argument is not as above.

    References:
      Pascanu et al., 2013, https://arxiv.org/abs/1211.5063.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.clip_by_global_norm(1.0)
    >>> opt.update({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, ())[0]
    {'a': Array([0.6], dtype=float32), 'b': Array([0.8], dtype=float32)}
    """
    return ClipByGlobalNorm(max_norm, axis_name)


def _compute_dtype(x: Any) -> Any:
    return trees.compute_dtype(trees.dtype_of(x))


def _scale(u: Array, p: Any, kept: Any, factor: Array) -> tuple[Array, Any]:
    return scale(u, factor), kept


def _add_scaled(u: Array, p: Array, kept: Any, factor: Array) -> tuple[Array, Any]:
    return u.astype(factor.dtype) + factor * p.astype(factor.dtype), kept


def _negate_at(place: int, dtype: np.dtype, p: Any, kept: tuple[Any, ...]) -> Doing:
    return Doing(_negate, None, dtype)


def _negate(u: Array, p: Any, kept: Any, numbers: None) -> tuple[Array, Any]:
    return -u, kept


def _adding_weights(updates: PyTree, params: PyTree, weight_decay: Any, mask: Any, sign: int) -> Any:
    """Add `sign * weight_decay * params` where the mask is True."""
    factor = cache(lambda dtype: fixed(sign * checks.scalar("weight_decay", weight_decay, dtype), updates))
    _, rows = trees.flatten(updates, None if mask is None else mask_tree(mask, params))

    def at(place: int, dtype: np.dtype, p: Any, kept: tuple[Any, ...]) -> Doing | None:
        if rows[place][1] is False:
            return None
        dtype = trees.compute_dtype(dtype, trees.dtype_of(p))
        return Doing(_add_scaled, factor(dtype), dtype)

    return at


class TreeMask:
    """A mask given as a tree of True and False, as a hashable value."""

    def __init__(self, tree: PyTree) -> None:
        checks.mask(tree)
        self.tree = jax.tree.map(bool, tree)

    def __call__(self, params: PyTree) -> PyTree:
        return self.tree

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TreeMask) and jax.tree.flatten(self.tree) == jax.tree.flatten(other.tree)

    def __hash__(self) -> int:
        leaves, structure = jax.tree.flatten(self.tree)
        return hash((structure, *leaves))

    def __repr__(self) -> str:
        return repr(self.tree)


def _as_mask(mask: Any) -> Callable[[PyTree], PyTree] | None:
    # A model that is a pytree may be callable too: what it holds decides whether it is a tree.
    if mask is None or isinstance(mask, TreeMask) or (callable(mask) and all(map(callable, jax.tree.leaves(mask)))):
        return mask
    return TreeMask(mask)


def mask_tree(mask: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """The bools that a mask stands for, one for each parameter."""
    tree = mask(params)
    checks.mask(tree)
    checks.prefix(tree, params)
    return jax.tree.map(bool, jax.tree.broadcast(tree, params))


def _is_zero(x: Any) -> bool:
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
        x = x.item() if x.ndim == 0 else x
    return isinstance(x, (int, float)) and x == 0
