"""Rounding of half precision parameters: the delivery of a step inside a wrapper that keeps their residuals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, NoReturn

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adamjax._core import checks, low_precision, trees
from adamjax._core.low_precision import Dither
from adamjax._core.trees import Leaves
from adamjax._core.typing import PyTree
from adamjax._transforms.base import (
    Result,
    RoundsParams,
    StepContext,
    averages_params,
    contains_foreign,
    may_skip,
    rounds_params,
    run_inside,
)
from adamjax._transforms.delivery import AddToParam, AsUpdate, Delivery
from adamjax._transforms.leafwise import LeafOp

_FLOAT32 = jnp.dtype(jnp.float32)


class ParamRounding(NamedTuple):
    """The way a half precision parameter takes an update."""

    name: str  # its name, to a kernel that has it compiled
    # From the parameter and its residual: the parameter in float32, as the wrapped transformation sees it.
    to_float32: Callable[[Array, Any], Array]
    # From the parameter itself in float32, the update, the residual, a dither and the parameter's dtype: the exact
    # difference to the new parameter, and the new residual.
    update_rule: Callable[..., tuple[Array, Any]]


@dataclass(frozen=True)
class RoundParam:
    """A `LeafFunction` that delivers a half precision parameter; its leaf state is the parameter and its residual."""

    rounding: ParamRounding  # the way the parameter takes the update
    as_update: bool  # True to deliver the exact difference in float32, False to deliver the new parameter

    def __call__(self, u: Array, seen: Any, state: tuple[Array, Any], dither: Dither) -> tuple[Array, Any]:
        p, residual = state
        wide = p.astype(_FLOAT32)
        u, residual = self.rounding.update_rule(wide, u.astype(_FLOAT32), residual, dither, p.dtype)
        return u if self.as_update else (wide + u).astype(p.dtype), (p, residual)


class RoundParams(Delivery):
    """Deliver half precision parameters by a `ParamRounding`, and the others as the wrapper is asked to."""

    def __init__(
        self, rounding: ParamRounding, plain: Delivery, leaf_states: Sequence[Any], dither: Callable[[int], Dither]
    ) -> None:
        self.leaf_states = self._pairs = leaf_states
        self._function = RoundParam(rounding, isinstance(plain, AsUpdate))
        self._plain = plain
        self._dither = dither

    def ops_for(self, index: int, dtype: np.dtype, p: Any) -> Sequence[LeafOp]:
        own, _ = self._pairs[index]
        if not is_low_precision(own):
            return self._plain.ops_for(index, dtype, own)
        return (LeafOp(self._function, self._dither(index), _FLOAT32 if self._function.as_update else own.dtype),)

    def unchanged(self, index: int, p: Any) -> Any:
        return None if self._function.as_update else self._pairs[index][0]


class RoundingState(NamedTuple):
    """State of the three wrappers.

    Fields:
      count: int32 scalar, the number of steps done.
      seed: uint32 scalar; with `count`, the source of the random bits.
      kept: The residuals, which the parameters themselves cannot hold: trees like them, with None where a parameter
        is float32 or wider. `kahan`: what they lack, in their dtype. `master_weights`: the parameters
        in float32, or lower bits of those in uint16 or uint8. `stochastic_rounding`: None.
      inner: The state of the wrapped transformation.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, which nobody counts with
    seed: Array
    kept: PyTree
    inner: PyTree


jax.export.register_namedtuple_serialization(RoundingState, serialized_name="adamjax.RoundingState")


class Rounding(RoundsParams):
    """Base of the wrappers: a member says the residual that it keeps, and how a parameter takes an update."""

    takes_first: ClassVar[bool] = True

    def _wrap(self, name: str) -> None:
        super()._wrap(name)
        if rounds_params(self.inner):
            raise ValueError(
                f"{name} around {checks.shown(self.inner)}, which rounds the parameters already: take one of the two"
            )
        if averages_params(self.inner):
            raise ValueError(
                f"{name} around {checks.shown(self.inner)}, whose average would be of parameters that are not rounded "
                "yet: put it inside of that"
            )
        if may_skip(self.inner):
            raise ValueError(
                f"{name} around {checks.shown(self.inner)} would count the steps that are skipped, and round: "
                "put it inside of that"
            )

    def _seed(self) -> Any:
        return 0

    def _init_residual(self, path: str, p: Any) -> Any:
        """The residual of a half precision parameter before the first step."""
        return None

    @property
    def _rounding(self) -> ParamRounding:
        raise NotImplementedError

    def _init_residuals(self, params: PyTree) -> PyTree:
        def of_leaf(path: Any, p: Any) -> Any:
            return self._init_residual("params" + jax.tree_util.keystr(path), p) if is_low_precision(p) else None

        return jax.tree.map_with_path(of_leaf, params)

    def _init(self, params: PyTree) -> RoundingState:
        seed = trees.make_on_mesh_of(lambda: jnp.asarray(self._seed()).astype(jnp.uint32), params)
        inner = self.inner._init(jax.tree.map(to_float32, params))
        return RoundingState(trees.zero_count(params), seed, self._init_residuals(params), inner)

    def _run(self, updates: Leaves, state: PyTree, context: StepContext) -> Result:
        state = checks.state(state, RoundingState, type(self).__name__)
        checks.params_given(context.params, updates, type(self).__name__)
        params = context.params or updates  # without parameters, there are no gradients
        residuals = self._checked_residuals(updates, params, state.kept)
        after = state._replace(count=trees.increment(state.count))
        rounded = RoundParams(
            self._rounding,
            context.delivery or AddToParam(),
            list(zip(params.leaves, residuals, strict=True)),
            partial(low_precision.dither, after.count, seed=after.seed),
        )
        inside = context._replace(params=self._float32_params(params, residuals), delivery=rounded)
        # Ours take gradients in any dtype, and a kernel is faster with narrow ones; others compute in that dtype.
        grads = updates.map(to_float32) if contains_foreign(self.inner) else updates
        found, delivered, inner = run_inside(self.inner, grads, state.inner, inside)
        kept = params.like([residual for _, residual in delivered]).tree
        return found, [], after._replace(kept=kept, inner=inner)

    def _float32_params(self, params: Leaves, residuals: list[Any]) -> Leaves:
        read = self._rounding.to_float32
        return params.map(lambda p, residual: read(p, residual) if is_low_precision(p) else p, residuals)

    def _checked_residuals(self, updates: Leaves, params: Leaves, kept: PyTree) -> list[Any]:
        """The residuals in the order of the parameters, if they are those of such parameters."""
        try:
            residuals = params.column(kept)
            for u, p, residual in zip(updates.leaves, params.leaves, residuals, strict=True):
                expected = self._init_residual("", trees.abstract_like(p)) if is_low_precision(p) else None
                if u is not None and _kind(residual) != _kind(expected):
                    raise ValueError
        except ValueError:
            self._raise_misfit(params.tree, kept)
        return residuals

    def _raise_misfit(self, params: PyTree, kept: PyTree) -> NoReturn:
        kept_at = {path for path, _ in jax.tree.leaves_with_path(kept)}
        for path, p in jax.tree.leaves_with_path(params):
            if path in kept_at and not is_low_precision(p):
                raise ValueError(
                    f"{checks.at('params', path)} is {trees.dtype_of(p)}, and was half precision at init: add "
                    "the float32 updates with adamjax.apply_updates or optax's, which keep the dtype"
                )
        checks.same_structure(kept, self._init_residuals(trees.abstract_like(params)), "state.kept")
        raise AssertionError("the residuals fit after all")


def is_low_precision(p: Any) -> bool:
    """Return whether `p` is an array of half precision, and not an absent parameter or a part of the tree."""
    return hasattr(p, "dtype") and low_precision.is_low_precision(p.dtype)


def to_float32(x: Any) -> Any:
    """Convert an array, or a `jax.ShapeDtypeStruct`, of half precision to float32; return others as they are."""
    if not is_low_precision(x):
        return x
    if trees.is_abstract(x):
        return jax.ShapeDtypeStruct(x.shape, _FLOAT32, sharding=x.sharding)
    return x.astype(_FLOAT32)


def exact_param(p: Any, residual: Any) -> Any:
    """The parameter in float32, with all that a rounding wrapper keeps of it: the dtype of that says which one it is.

    A parameter that is not half precision is returned as it is.
    """
    if not is_low_precision(p):
        return p
    if residual is None:  # stochastic rounding
        return to_float32(p)
    if residual.dtype == _FLOAT32:
        return residual
    if residual.dtype in (jnp.uint8, jnp.uint16):
        return join_bits(p, residual)
    return to_float32(p) + residual.astype(_FLOAT32)


def kept_bits(low: Array) -> int:
    """The number of lower bits of float32 that a residual keeps."""
    return 8 * low.dtype.itemsize


def join_bits(p: Array, low: Array) -> Array:
    """The float32 that rounds to the bfloat16 `p`, half away from 0, and whose lower half begins with `low`."""
    width, low = kept_bits(low), low.astype(jnp.uint32)
    bits = ((lax.bitcast_convert_type(p.astype(_FLOAT32), jnp.uint32) >> 16) - (low >> (width - 1))) << 16
    return lax.bitcast_convert_type(bits | low << (16 - width), jnp.float32)


def _kind(x: Any) -> Any:
    return None if x is None else (getattr(x, "shape", None), getattr(x, "dtype", None))
