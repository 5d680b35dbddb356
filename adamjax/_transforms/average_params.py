"""An average of the parameters over the steps, for evaluation."""

from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks, low_precision, trees
from adamjax._core.low_precision import Dither
from adamjax._core.numerics import decay
from adamjax._core.trees import Leaves
from adamjax._core.typing import DTypeLike, GradientTransformation, PyTree, Scalar
from adamjax._core.value import precise_field, static_field, value
from adamjax._transforms.base import AveragesParams, Result, StepContext, Transformation, may_skip, run_inside
from adamjax._transforms.delivery import AsUpdate
from adamjax._transforms.schedule_free import ScheduleFreeAdamW

_SEED = 0x41564721  # of the random numbers of averages: not 0, as of moments and parameters by default


class AverageState(NamedTuple):
    """State of `average_params`.

    Fields:
      count: int32 scalar, the number of steps done.
      average: The average of the parameters, shaped and sharded like them.
      inner: The state of the wrapped transformation.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, which nobody counts with
    average: PyTree
    inner: PyTree


jax.export.register_namedtuple_serialization(AverageState, serialized_name="adamjax.AverageState")


@value
class AverageParams(AveragesParams):
    """See `average_params`."""

    takes_first: ClassVar[bool] = True

    inner: Any
    decay: Scalar = precise_field()
    warmup: bool = static_field(default=True)
    dtype: Any = static_field(default=None)

    def __post_init__(self) -> None:
        self._wrap("average_params")
        if _averages(self.inner):
            raise ValueError(
                f"average_params around {checks.shown(self.inner)}, which averages the parameters already: take one "
                "of the two"
            )
        if may_skip(self.inner):
            raise ValueError(
                f"average_params around {checks.shown(self.inner)} would count the steps that are skipped: put it "
                "inside of that"
            )
        self._check_numbers("decay", below=1.0)
        checks.choice("warmup", self.warmup, (False, True))
        if self.dtype is not None:
            expected = "dtype must be bfloat16 or float32, or None for that of the parameters, but at least float32"
            self._replace_field("dtype", checks.dtype("dtype", self.dtype, ("bfloat16", "float32"), expected))

    def _init(self, params: PyTree) -> AverageState:
        average = jax.tree.map_with_path(self._first, params)
        return AverageState(trees.zero_count(params), average, self.inner._init(params))

    def _first(self, path: Any, p: Any) -> Any:
        """The average of a parameter before the first step: the parameter."""
        if self.dtype is None:
            return trees.copy(p, trees.compute_dtype(trees.dtype_of(p)))
        if jnp.issubdtype(trees.dtype_of(p), jnp.complexfloating):
            raise ValueError(
                f"{checks.at('params', path)} is {trees.dtype_of(p)}, and an average in {self.dtype} would lose its "
                "imaginary part: take dtype=None"
            )
        return trees.copy(p, self.dtype)

    def _run(self, updates: Leaves, state: PyTree, context: StepContext) -> Result:
        state = checks.state(state, AverageState, "average_params")
        checks.params_given(context.params, updates, "average_params")
        params = context.params or updates  # without parameters, there are no gradients
        averages = checks.moments(params, state.average, "state.average")
        found, delivered, inner = run_inside(self.inner, updates, state.inner, context)
        count, as_update = trees.increment(state.count), isinstance(context.delivery, AsUpdate)

        def averaged(index: int, average: Any, p: Any, new: Any) -> Any:
            if average is None or p is None:
                return average
            narrow = low_precision.is_low_precision(average.dtype)
            dither = low_precision.dither(count, index, _SEED) if narrow else None
            real = trees.real_dtype(trees.compute_dtype(average.dtype, trees.dtype_of(p)))
            return _averaged(average, p, new, self._weight(count.astype(real)), dither, as_update=as_update)

        rows = zip(averages, params.leaves, found.leaves, strict=True)
        average = params.like([averaged(i, *row) for i, row in enumerate(rows)]).tree
        return found, delivered, AverageState(count, average, inner)

    def _weight(self, t: Array) -> Array:
        """The weight of the parameters after step t (1 for the first) in the average."""
        one_minus_decay = decay(self, "decay", t.dtype).one_minus_b
        # 1 - (1 + steps before) / (10 + steps before)
        return jnp.maximum(one_minus_decay, 9 / (9 + t)) if self.warmup else jnp.asarray(one_minus_decay)


@partial(jax.jit, static_argnames="as_update")
def _averaged(average: Array, p: Array, new: Any, weight: Array, dither: Dither | None, *, as_update: bool) -> Array:
    """The average after a step to `new`: the new parameter, or its update; None if it is frozen."""
    dtype = trees.compute_dtype(average.dtype, p.dtype)
    if new is None:
        x = p.astype(dtype)
    elif as_update:
        wide = trees.compute_dtype(p.dtype, new.dtype)
        x = _as_stored(p.astype(wide) + new.astype(wide), p.dtype).astype(dtype)
    else:
        x = _as_stored(new, p.dtype).astype(dtype)
    with jax.numpy_dtype_promotion("standard"):  # a real weight times a complex parameter
        x = average.astype(dtype) + weight * (x - average.astype(dtype))
    if dither is not None:
        x = low_precision.stochastic_round(x.astype(np.float32), dither, average.dtype)
    return x.astype(average.dtype)


def _as_stored(x: Array, dtype: np.dtype) -> Array:
    """A parameter as it will be stored; XLA leaves out a conversion to half precision and back."""
    if not low_precision.is_low_precision(dtype):
        return x.astype(dtype)
    return low_precision.round_to_nearest(x.astype(np.float32), dtype)


def _averages(opt: Transformation) -> bool:
    """Return whether a part of `opt` has parameters of its own to evaluate at."""
    kinds = AveragesParams | ScheduleFreeAdamW
    parts = jax.tree.leaves(opt, is_leaf=lambda x: isinstance(x, kinds))
    return any(isinstance(x, kinds) for x in parts)


def average_params(
    opt: GradientTransformation, decay: Scalar = 0.999, *, warmup: bool = True, dtype: DTypeLike | None = None
) -> AverageParams:
    """Keep an exponential moving average of the parameters, to evaluate at.

    After each step, the average moves by 1 - decay of the way to the new parameters. The steps of `opt` do not see it.
    `eval_params(state, params)` returns it, in the dtypes of the parameters; `training.train` and `tuning` evaluate at
    it by themselves. A parameter that a None freezes is averaged on.

    Put it around everything that rounds parameters, `average_params(kahan(opt))`: it averages the parameters as they
    are stored. Put it inside of what skips steps, `skip_nonfinite(average_params(opt))`, which leaves the average alone
    at such steps, and inside of `sharding.zero1`, which divides it.

    Args:
      opt: A transformation, ours or optax's.
      decay: The part of the average that a step keeps, in [0, 1). 0.999 averages over about the last 1000 steps.
      warmup: If True, the decay after t steps is at most (1 + t) / (10 + t), t from 0: the first parameters are soon
        forgotten. If False, it is constant, and a part decay**t of the average are the parameters of `init`.
      dtype: The storage of the average: float32 or bfloat16. None: as the parameters, but at least float32. An average
        in bfloat16 is rounded stochastically, since to nearest it would stand still.

    Returns:
      A transformation with state `AverageState`, whose `update` needs `params`. In a chain it must be the last.

    Raises:
      TypeError, ValueError: `opt` is not a transformation, averages already or may skip steps; an argument is not as
        above; at `init`, a parameter is complex, and `dtype` is not.

    References:
      Polyak & Juditsky, 1992, https://doi.org/10.1137/0330046; Morales-Brotons et al., 2024,
      https://arxiv.org/abs/2411.18704.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.average_params(adamjax.adam(0.1), decay=0.9)
    >>> params = jnp.ones(2)
    >>> state = opt.init(params)
    >>> for _ in range(3):
    ...     params, state = opt.step(jnp.ones(2), state, params)
    >>> print(f"{params[0]:.3f} {adamjax.eval_params(state, params)[0]:.3f}")
    0.700 0.730
    """
    return AverageParams(opt, decay, warmup, dtype)
