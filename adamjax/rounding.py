"""Half precision parameters that keep learning: three wrappers around any transformation.

Between 0.5 and 1 the numbers of bfloat16 lie 2**-8 apart. A step of 1e-5 is less than half of that, and
rounding to nearest loses it, every time. Each wrapper keeps what rounding would lose:

| wrapper | its state, in bytes a parameter | a step is lost |
|---|---|---|
| `stochastic_rounding` | 0 | never, on average |
| `kahan` | 2 | never, on average |
| `master_weights` | 4; for bfloat16, also 2 or 1 | below half the spacing of float32 |

The wrapped transformation sees gradients and parameters in float32, so that it rounds nothing itself. The
updates are float32: the update u of a half precision parameter p is the exact difference to the new parameter, so
p + u is that parameter, whether added by our `apply_updates`, optax's or flax's (not by equinox's, which
leaves the sum in float32). Parameters in float32 or wider pass through as if there were no wrapper, and keep nothing.

With ``fused=True``, the kernel rounds the parameters in the same pass.
"""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adamjax._core import checks, low_precision, trees
from adamjax._core.low_precision import Dither
from adamjax._core.trees import Leaves
from adamjax._core.typing import GradientTransformation, PyTree
from adamjax._core.value import static_field, value
from adamjax._transforms.param_rounding import ParamRounding, join_bits, kept_bits, to_float32
from adamjax._transforms.param_rounding import Rounding as Rounding
from adamjax._transforms.param_rounding import RoundingState as RoundingState

_FLOAT32 = jnp.dtype(jnp.float32)


def _upcast(p: Array, residual: Any) -> Array:
    return p.astype(_FLOAT32)


def _exact_update(start: Array, target: Array, dtype: np.dtype) -> tuple[Array, Array]:
    """Return the update that takes `start` to `target`, and the number that it really takes it to.

    The two differ only where the target is so near to 0, less than 2**-13 of `start`, that
    float32 does not hold the difference.
    """
    u = _difference(target, start)
    return u, low_precision.round_to_nearest(start + u, dtype)


def _difference(target: Array, start: Array) -> Array:
    """The update that takes `start` to `target`; an infinity stays one."""
    return jnp.where(target == start, 0.0, target - start)


@value
class StochasticRounding(Rounding):
    """See `stochastic_rounding`."""

    inner: Any
    seed: int | Array = 0

    def __post_init__(self) -> None:
        self._wrap("stochastic_rounding")
        if not (hasattr(self.seed, "dtype") and jnp.issubdtype(self.seed.dtype, jnp.integer)):
            self._replace_field("seed", checks.count("seed", self.seed, least=0))
            if self.seed >= 2**31:
                raise ValueError(f"Invalid seed value: {self.seed}; seed must be below 2**31")

    def _seed(self) -> Any:
        return self.seed

    @property
    def _rounding(self) -> ParamRounding:
        return ParamRounding("stochastic_rounding", _upcast, _stochastic_round)


def _stochastic_round(start: Array, u: Array, residual: None, dither: Dither, dtype: np.dtype) -> tuple[Array, None]:
    return _difference(low_precision.stochastic_round(start + u, dither, dtype), start), None


def stochastic_rounding(opt: GradientTransformation, seed: int | Array = 0) -> StochasticRounding:
    """Round half precision parameters stochastically: up or down, such that the mean is right.

    While its updates are steady, a parameter stays within a spacing or two of where float32 would be.
    The state is a count and a seed, 8 bytes. The random numbers come from seed, leaf and position. They are
    the same however the parameters are sharded, and are spread evenly over the steps.

    Args:
      opt: A transformation, ours or optax's.
      seed: An int of at least 0, or an integer scalar. It is kept in the state from `init` on.

    Returns:
      A transformation with state `RoundingState`, whose `update` needs `params` and emits float32
      updates for half precision parameters. In a chain it must be the last.

    Raises:
      TypeError, ValueError: `opt` is not a transformation, or rounds already; `seed` is no such int.

    References:
      Gupta et al., 2015, https://arxiv.org/abs/1502.02551.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.stochastic_rounding(adamjax.adamw(1e-5))
    >>> p = jnp.ones(10_000, jnp.bfloat16)
    >>> state = opt.init(p)
    >>> for _ in range(100):
    ...     p, state = opt.step(p, state, p)
    >>> print(p.dtype, f"{jnp.mean(p.astype(jnp.float32)):.4f}")
    bfloat16 0.9990
    """
    return StochasticRounding(opt, seed)


@value
class Kahan(Rounding):
    """See `kahan`."""

    inner: Any

    def __post_init__(self) -> None:
        self._wrap("kahan")

    def _init_residual(self, path: str, p: Any) -> Any:
        return trees.zeros_like(p, trees.dtype_of(p))

    @property
    def _rounding(self) -> ParamRounding:
        return ParamRounding("kahan", _upcast, _compensate)


def _compensate(start: Array, u: Array, residual: Array, dither: Dither, dtype: np.dtype) -> tuple[Array, Array]:
    wanted = u + residual.astype(_FLOAT32)
    u, landed = _exact_update(start, low_precision.round_to_nearest(start + wanted, dtype), dtype)
    # Round the residual stochastically: to nearest, a large residual would lose small steps.
    return u, low_precision.stochastic_round(wanted - (landed - start), dither, dtype).astype(dtype)


def kahan(opt: GradientTransformation) -> Kahan:
    """Add to half precision parameters with Kahan's compensated summation.

    The residual that rounding to nearest takes from a parameter is kept, in the parameter's dtype, and added to
    its next update. Parameter and residual together have about twice the digits of the parameter.

    Args:
      opt: A transformation, ours or optax's.

    Returns:
      A transformation with state `RoundingState`, whose `update` needs `params` and emits float32
      updates for half precision parameters. In a chain it must be the last.

    Raises:
      TypeError, ValueError: `opt` is not a transformation, or rounds already.

    References:
      Kahan, 1965, https://doi.org/10.1145/363707.363723; for training,
      Zamirai et al., 2020, https://arxiv.org/abs/2010.06192.
    """
    return Kahan(opt)


@value
class MasterWeights(Rounding):
    """See `master_weights`."""

    inner: Any
    low_bits: bool | Literal[8, 16] = static_field(default=False)

    def __post_init__(self) -> None:
        self._wrap("master_weights")
        checks.choice("low_bits", self.low_bits, (False, True, 8, 16))
        if self.low_bits == 16:
            self._replace_field("low_bits", True)  # the same value, with the name that it has in checkpoints

    def _init_residual(self, path: str, p: Any) -> Any:
        if not self.low_bits:
            return to_float32(p)
        if trees.dtype_of(p) != jnp.bfloat16:
            raise ValueError(
                f"{path} is {trees.dtype_of(p)}: low_bits completes bfloat16 parameters only, whose bits are "
                "the upper half of a float32's; use low_bits=False"
            )
        return trees.zeros_like(p, jnp.dtype(jnp.uint8 if self.low_bits == 8 else jnp.uint16))

    @property
    def _rounding(self) -> ParamRounding:
        if self.low_bits:
            return ParamRounding("low_bits", join_bits, _add_to_bits)
        return ParamRounding("master_weights", _master, _add_to_master)

    def weights(self, params: PyTree, state: RoundingState) -> PyTree:
        """The parameters as they are stepped: in float32 where they are half precision, else as they are."""
        leaves = Leaves.of(params)
        return self._float32_params(leaves, leaves.column(state.kept)).tree


def _master(p: Array, residual: Array) -> Array:
    return residual


def _add_to_master(start: Array, u: Array, residual: Array, dither: Dither, dtype: np.dtype) -> tuple[Array, Array]:
    master = residual + u
    return _difference(low_precision.round_to_nearest(master, dtype), start), master


def _add_to_bits(start: Array, u: Array, residual: Array, dither: Dither, dtype: np.dtype) -> tuple[Array, Array]:
    master = join_bits(start, residual) + u
    # Flush subnormal numbers, as some processors do: they have no lower bits to keep.
    master = jnp.where(jnp.abs(master) < jnp.finfo(_FLOAT32).tiny, 0.0, master)
    # Normalise NaNs: rounding would carry into their payload bits.
    master = jnp.where(jnp.isnan(master), jnp.nan, master)
    cut = 16 - kept_bits(residual)
    if cut:
        # Round the master stochastically: to nearest, it would lose steps below 2**-17 of its size.
        random = low_precision.random(low_precision.index_of(master), dither) >> np.uint32(32 - cut)
        bits = (lax.bitcast_convert_type(master, jnp.uint32) + random) & np.uint32(2**32 - 2**cut)
        master = lax.bitcast_convert_type(bits, jnp.float32)
    target = _upper_half(master)
    u = _difference(target, start)
    low = lax.bitcast_convert_type(master, jnp.uint32) >> np.uint32(cut)
    # Keep the lower bits only where the update takes the parameter to its upper half; see `_exact_update`.
    return u, jnp.where(_upper_half(start + u) == target, low, np.uint32(0)).astype(residual.dtype)


def _upper_half(x: Array) -> Array:
    """The bfloat16 next to `x`, in float32; half away from 0, so that the lower half says which way it went."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000), jnp.float32)


def master_weights(opt: GradientTransformation, *, low_bits: bool | Literal[8, 16] = False) -> MasterWeights:
    """Keep a float32 copy of half precision parameters, step it, and round it to them.

    Args:
      opt: A transformation, ours or optax's.
      low_bits: For bfloat16 parameters, keep only bits of float32 that bfloat16 does not have. True or 16: all of
        them, and so the same float32 copy, in 2 bytes instead of 4. 8: the upper half of them, in 1 byte. The
        copy then has 24 bits, and is rounded to them stochastically at each step, so that no step is lost on
        average. A parameter that is changed from outside then stays changed, while a whole copy would overwrite it
        at the next step.

    Returns:
      A transformation with state `RoundingState`, whose `update` needs `params` and emits float32
      updates for half precision parameters. In a chain it must be the last. Its method
      `weights(params, state)` gives the copy in float32.

    Raises:
      TypeError, ValueError: `opt` is not a transformation, or rounds already; `low_bits` is another number; at
        `init`, a parameter is float16 with `low_bits`.

    References:
      Micikevicius et al., 2018, https://arxiv.org/abs/1710.03740.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.master_weights(adamjax.adamw(1e-5), low_bits=8)
    >>> p = jnp.ones(10_000, jnp.bfloat16)
    >>> state = opt.init(p)
    >>> for _ in range(100):
    ...     p, state = opt.step(p, state, p)
    >>> print(state.kept.dtype, f"{jnp.mean(opt.weights(p, state)):.5f}")
    uint8 0.99900
    """
    return MasterWeights(opt, low_bits)
