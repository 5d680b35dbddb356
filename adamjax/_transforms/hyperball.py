"""Hyperball: matrices keep the norm that they had at first, instead of weight decay."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks, collectives, trees
from adamjax._core.numerics import scale
from adamjax._core.trees import Leaves
from adamjax._core.typing import AxisName, GradientTransformation, Mask, PyTree, ScalarOrSchedule
from adamjax._core.value import static_field, value
from adamjax._transforms.base import (
    Result,
    StepContext,
    Transformation,
    Wrapper,
    may_skip,
    rounds_params,
)
from adamjax._transforms.chain import Chain
from adamjax._transforms.leafwise import LeafOp, LeafTransform, run_leafwise
from adamjax._transforms.learning_rate import ScaleByLearningRate
from adamjax._transforms.rates import as_rate
from adamjax._transforms.schedule import number_or_schedule
from adamjax._transforms.weight_decay import as_mask, mask_tree
from adamjax._transforms.whole_array import norm


class HyperballState(NamedTuple):
    """State of `hyperball`.

    Fields:
      count: int32 scalar, the number of steps done.
      norms: A tree like the parameters: the norm of each matrix at init, a scalar in float32 or wider; None for
        the others.
      inner: The state of the wrapped transformation.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, which nobody counts with
    norms: PyTree
    inner: PyTree


jax.export.register_namedtuple_serialization(HyperballState, serialized_name="adamjax.HyperballState")


@dataclass(frozen=True)
class Turn:
    """A `LeafFunction`: the update that turns a matrix by `rate`, in the direction of the given one."""

    axis_name: AxisName

    def __call__(self, u: Array, p: Array, state: Any, operands: tuple[Array, Array]) -> tuple[Array, Any]:
        rate, radius = operands
        dtype = trees.compute_dtype(u.dtype, p.dtype)
        u, p = u.astype(dtype), p.astype(dtype)
        length = norm(u, self.axis_name)
        moves = (length != 0) & (radius > 0)  # a NaN moves, so that it shows
        along = rate * radius / jnp.where(moves, length, 1)
        moved_length = norm(p + scale(u, along.astype(dtype)), self.axis_name)
        moved_length = jnp.where(moves & (moved_length != 0), moved_length, 1)
        # As a sum, for the difference of two matrices would round each element to the spacing of the matrix.
        shrink = (radius - moved_length) / moved_length
        update = scale(p, shrink.astype(dtype)) + scale(u, (along * (radius / moved_length)).astype(dtype))
        return jnp.where(moves, update, u), state


@dataclass(frozen=True)
class TurnLeaves(LeafTransform):
    """Turn the leaves that have a norm; leave the others as they are."""

    rate: Any  # from a real dtype, the learning rate in it
    norms: Sequence[Any]
    function: Turn

    def ops_for(self, index: int, dtype: np.dtype, p: Any) -> Sequence[LeafOp]:
        if self.norms[index] is None:
            return ()
        dtype = trees.compute_dtype(dtype, trees.dtype_of(p))
        real = trees.real_dtype(dtype)
        return (LeafOp(self.function, (self.rate(real), self.norms[index].astype(real)), dtype),)


@value
class Hyperball(Wrapper):
    """See `hyperball`."""

    inner: Any
    learning_rate: ScalarOrSchedule | None = None
    mask: Mask = static_field(default=None)
    axis_name: AxisName = static_field(default=None, described=False)

    def __post_init__(self) -> None:
        self._wrap("hyperball")
        if rounds_params(self.inner) or may_skip(self.inner):
            raise ValueError(
                f"hyperball around {checks.shown(self.inner)}, which delivers the parameters itself, or skips steps: "
                "put hyperball inside of that"
            )
        if self.learning_rate is not None:
            self._replace_field("learning_rate", number_or_schedule("learning_rate", self.learning_rate))
        elif not isinstance(_last(self.inner), ScaleByLearningRate):
            raise ValueError(
                f"hyperball does not see the learning rate of {checks.shown(self.inner)}, which is no chain that ends "
                "with one: give learning_rate=, by which the matrices turn"
            )
        self._replace_field("mask", as_mask(self.mask))
        collectives.check_axis_name(self.axis_name)
        if any(member.mask is None for member in _decaying(self.inner)):
            raise ValueError(
                "hyperball holds the norm of each matrix, so weight decay inside of it would change no norm, but the "
                "direction of the steps: take weight_decay=0, or a mask= that leaves the matrices out"
            )

    def _init(self, params: PyTree) -> HyperballState:
        leaves = Leaves.of(params)
        held = leaves.column(self._mask(params))
        for member in _decaying(self.inner):
            decays = leaves.column(mask_tree(member.mask, params))
            for path, decay, hold in zip(leaves.paths(), decays, held, strict=True):
                if decay and hold:
                    raise ValueError(
                        f"{checks.at('params', path)} is held on its norm by hyperball, and the mask of the weight "
                        "decay inside has it: weight decay would change no norm, but the direction of the steps"
                    )
        norms = leaves.map(lambda p, hold: self._norm_of(p, params) if hold else None, held)
        return HyperballState(trees.zero_count(params), norms.tree, self.inner._init(params))

    def _mask(self, params: PyTree) -> PyTree:
        """Return a bool for each parameter: whether its norm is held."""
        if self.mask is None:
            return jax.tree.map(lambda p: np.ndim(p) >= 2, params)
        return mask_tree(self.mask, params)

    def _norm_of(self, p: Any, params: PyTree) -> Any:
        """The norm of a parameter before the first step, on the mesh of the parameters."""
        if trees.any_abstract(params):
            return jax.ShapeDtypeStruct((), _norm_dtype(p))
        wide = jnp.asarray(p).astype(trees.compute_dtype(trees.dtype_of(p)))
        found = norm(wide, collectives.bound_axes(self.axis_name))
        return found if isinstance(found, jax.core.Tracer) else trees.make_on_mesh_of(lambda: found, params)

    def _run(self, updates: Leaves, state: PyTree, context: StepContext) -> Result:
        checks.params_given(context.params, updates, "hyperball")
        state = checks.state(state, HyperballState, "hyperball")
        params = context.params or updates  # without parameters, there are no gradients
        rate = self._current_rate(state)
        norms = _checked_norms(params, state.norms)
        found, _, inner = self.inner._run(updates, state.inner, context._replace(delivery=None))
        turn = TurnLeaves(
            cache(lambda dtype: checks.as_scalar("learning_rate", rate, dtype)),
            norms,
            Turn(self.axis_name),
        )
        delivery = [] if context.delivery is None else [context.delivery]
        found, states = run_leafwise([turn, *delivery], found, context.params)
        delivered = states[-1] if delivery else []
        return found, delivered, HyperballState(trees.increment(state.count), params.like(norms).tree, inner)

    def _learning_rate(self, state: PyTree) -> Any:
        others = super()._learning_rate(state)
        if self.learning_rate is None:
            return others
        own = as_rate(self._current_rate(checks.state(state, HyperballState, "hyperball")))
        if others is None:
            return own
        return {"hyperball": own, **(others if isinstance(others, dict) else {"default": others})}

    def _current_rate(self, state: HyperballState) -> Any:
        if self.learning_rate is not None:
            return self.learning_rate(state.count) if callable(self.learning_rate) else self.learning_rate
        opt, inner = self.inner, state.inner
        while isinstance(opt, Chain):
            checks.member_states(inner, len(opt.transforms), "a chain")
            opt, inner = opt.transforms[-1], inner[-1]
        rate, _ = opt._current_value(inner)
        return rate


def _checked_norms(params: Leaves, norms: PyTree) -> list[Any]:
    """The norms in the order of the parameters, each in the dtype that `init` gave it."""
    column = checks.nodes_at(params, norms, "state.norms")
    for i, (path, p, x) in enumerate(zip(params.paths(), params.leaves, column, strict=True)):
        if x is None:
            continue
        if np.shape(x) or not jnp.issubdtype(getattr(x, "dtype", np.void), np.floating):
            raise ValueError(
                f"{checks.at('state.norms', path)} is {checks.describe(x)}, expected a floating point array of shape "
                "(): the state comes from init(params) or update"
            )
        column[i] = x.astype(_norm_dtype(p))
    return column


def _norm_dtype(p: Any) -> np.dtype:
    return trees.real_dtype(trees.compute_dtype(trees.dtype_of(p)))


def _last(opt: Transformation) -> Transformation:
    """The last member of a chain, of nested ones the innermost; `opt` itself if it is none."""
    return _last(opt.transforms[-1]) if isinstance(opt, Chain) and opt.transforms else opt


def _decaying(opt: Any) -> Iterator[Any]:
    """The members of a chain that have a weight decay."""
    if isinstance(opt, Chain):
        for member in opt.transforms:
            yield from _decaying(member)
    elif hasattr(opt, "weight_decay"):
        decay = opt.weight_decay
        if not (isinstance(decay, float) and decay == 0):
            yield opt


def hyperball(
    opt: GradientTransformation,
    *,
    learning_rate: ScalarOrSchedule | None = None,
    mask: Mask = None,
    axis_name: AxisName = None,
) -> Hyperball:
    r"""Hold the Frobenius norm of each matrix, instead of weight decay, and fix the length of its steps: Hyperball.

    For a matrix :math:`W` with norm :math:`R` at init, and the direction :math:`u` of `opt`,

    .. math:: W \leftarrow R \, \frac{W'}{\lVert W' \rVert}, \quad
        W' = W - \eta R \, \frac{u}{\lVert u \rVert}.

    Only the direction of the updates of `opt` counts for matrices, not their length: :math:`\eta` is the learning
    rate that the chain `opt` ends with, or `learning_rate`. ``hyperball(adam(lr))`` is AdamH: `lr` is the distance that
    a matrix goes, in units of its norm, so values near 0.01 are usual. Other parameters go through `opt` as they
    are. They often need a lower rate; give `opt` that, and `learning_rate=` for the matrices.

    This is the published update, with the norm at init (others take the norm before each step, which drifts by
    rounding). A matrix that is 0 at init has no sphere to stay on, and goes through `opt` as it is. So does any array
    whose update is 0. The norm is that of the whole array, of layers stacked in one array together.

    Args:
      opt: A transformation, ours or optax's, without weight decay on the matrices.
      learning_rate: At least 0, a number or a schedule of the step count. None: that of `opt`, a chain of ours that
        ends with a learning rate, as each of our optimizers does.
      mask: The arrays whose norm is held: a tree of True and False with the structure of the parameters (or a prefix of
        it), or a function that makes one of them. None: all with two axes or more. The paper holds the matrices
        between embedding and output, and leaves these two to Adam.
      axis_name: Where `update` runs inside `jax.shard_map` or `jax.pmap`: the mapped axis (or axes) that parameters are
        spread over; () if they are whole on each device. Sharded arrays under `jax.jit` need none. With
        `check_vma=False`, all arrays count as spread.

    Returns:
      A transformation with state `HyperballState`, whose `update` needs `params`.

    Raises:
      TypeError, ValueError: `opt` is not a transformation, has a weight decay (also at `init`, if its mask has a
        matrix), rounds parameters or skips steps (put this inside), or its learning rate is not seen; another argument
        is not as above.

    References:
      Wen et al., 2026, Hyperball Optimization, https://arxiv.org/abs/2606.16899.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.hyperball(adamjax.adam(0.1))
    >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]]), "bias": jnp.zeros(2)}
    >>> state = opt.init(params)
    >>> params, state = opt.step({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, state, params)
    >>> print(f"{jnp.linalg.norm(params['kernel']):.4f}", params["bias"])
    5.0000 [-0.1 -0.1]
    """
    return Hyperball(opt, learning_rate, mask, axis_name)
