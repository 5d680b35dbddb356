"""Half precision parameters that keep learning: three wrappers around any transformation.

Between 0.5 and 1 the numbers of bfloat16 lie 2**-8 apart. A step of 1e-5 is less than half of that, and
rounding to nearest loses it, every time. Each wrapper keeps what rounding would lose:

| wrapper | its state, in bytes a parameter | a step is lost |
|---|---|---|
| `stochastic_rounding` | 0 | never, on average |
| `kahan` | 2 | never, on average |
| `master_weights` | 4, or 2 for bfloat16 | below half the spacing of float32 |

The wrapped transformation sees gradients and parameters in float32, so that it rounds nothing itself. The
updates that come out are float32: for each half precision parameter p the difference u to what p is to
become, and p + u is exactly that, whether added by our `apply_updates`, optax's or flax's (not by equinox's, which
leaves the sum in float32). Parameters in float32 or wider pass through as if there were no wrapper, and keep nothing.

What an optimizer with ``fused=True`` steps on a CPU, its kernel lands as well, in the same pass.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from adamjax._core import checks, low_precision, trees
from adamjax._core.low_precision import Dither
from adamjax._core.trees import PyTree
from adamjax._core.value import static_field, value
from adamjax._transforms.base import Extra, Wrapper, apply_updates, say_unfused, widened
from adamjax._transforms.param_rounding import Landing, Narrow, Rule

_FLOAT32 = jnp.dtype(jnp.float32)


class RoundingState(NamedTuple):
    """State of the three wrappers.

    Fields:
      count: int32 scalar, the number of steps done.
      seed: uint32 scalar; with `count`, where the random bits come from.
      kept: What the parameters themselves cannot hold: trees like them, with None where a parameter is
        float32 or wider. `kahan`: what they lack, in their dtype. `master_weights`: the parameters
        in float32, or the lower halves of their bits in uint16. `stochastic_rounding`: None.
      inner: The state of the wrapped transformation.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, which nobody counts with
    seed: Array
    kept: PyTree
    inner: PyTree


jax.export.register_namedtuple_serialization(RoundingState, serialized_name="adamjax.RoundingState")


class Rounding(Wrapper):
    """Base of the wrappers: a member says what it keeps, and how it lands one array."""

    lands = True

    def _wrap(self, name: str) -> None:
        super()._wrap(name)
        if self.inner.lands:
            raise ValueError(f"{name} around {self.inner!r}, which rounds the parameters already: take one of the two")
        if not self.inner.fuses_narrow:
            say_unfused(self.inner, f"inside of {name}")
        if self.inner.holds:
            raise ValueError(
                f"{name} around {self.inner!r} would count the steps that are skipped, and round: put it inside of that"
            )

    def _seed(self) -> Any:
        return 0

    def _keep(self, path: str, p: Any) -> Any:
        """What is kept of a half precision parameter at first."""
        return None

    @property
    def _landing(self) -> Landing:
        raise NotImplementedError

    def _init(self, params: PyTree) -> RoundingState:
        seed = trees.fresh(lambda: jnp.asarray(self._seed()).astype(jnp.uint32), params)
        return RoundingState(trees.zero_count(params), seed, self._kept(params), self.inner._init(widened(params)))

    def _kept(self, params: PyTree) -> PyTree:
        return jax.tree.map_with_path(
            lambda path, p: self._keep("params" + jax.tree_util.keystr(path), p) if _is_narrow(p) else None, params
        )

    def _check_widths(self, kept: PyTree, params: PyTree) -> None:
        """Refuse parameters that were half precision at `init`, and have become wider since."""
        kept_at = {path for path, _ in jax.tree.leaves_with_path(kept)}
        for path, p in jax.tree.leaves_with_path(params):
            if path in kept_at and not _is_narrow(p):
                raise ValueError(
                    f"params{jax.tree_util.keystr(path)} is {trees.dtype_of(p)}, and was half precision at init: add "
                    "the float32 updates with adamjax.apply_updates or optax's, which keep the dtype"
                )

    def _update(self, updates: PyTree, state: PyTree, params: PyTree | None, extra: Extra) -> tuple[PyTree, PyTree]:
        self._check(updates, state, params)
        seen = self._seen(params, state.kept)
        updates, inner = self.inner._update(widened(updates), state.inner, seen, extra)
        state = state._replace(count=trees.increment(state.count), inner=inner)
        updates, kept = self._landed(updates, params, state)
        return updates, state._replace(kept=kept)

    def step(self, grads: PyTree, state: PyTree, params: PyTree, **extra: Any) -> tuple[PyTree, PyTree]:
        """One whole step, that of the wrapped transformation if it is one pass; see `Transformation.step`."""
        checks.given(params, grads, "step", "step(grads, state, params)")
        checks.updates(grads, params)
        self._check(grads, state, params)
        after = state._replace(count=trees.increment(state.count))

        def land(updates: PyTree) -> tuple[PyTree, PyTree]:
            updates, kept = self._landed(updates, params, after)
            return apply_updates(params, updates), kept

        narrow = Narrow(params, state.kept, self._landing, _dithers(after), land)
        seen = self._seen(params, state.kept)
        params, kept, inner = self.inner._step_narrow(grads, state.inner, seen, narrow, extra)
        return params, after._replace(kept=kept, inner=inner)

    def _check(self, updates: PyTree, state: PyTree, params: PyTree | None) -> None:
        checks.state(state, RoundingState, type(self).__name__)
        checks.given(params, updates, type(self).__name__)
        self._check_widths(state.kept, params)
        checks.alike(state.kept, self._kept(trees.shapes_of(params)), "state.kept")

    def _seen(self, params: PyTree, kept: PyTree) -> PyTree:
        """The parameters as the wrapped transformation sees them."""
        read = self._landing.read
        return trees.map_leaves(lambda p, kept: read(p, kept) if _is_narrow(p) else p, params, kept)

    def _landed(self, updates: PyTree, params: PyTree, state: RoundingState) -> tuple[PyTree, PyTree]:
        """The updates that land the parameters, and what is kept; of `state`, count and seed are those after it."""
        structure, rows = trees.flatten(updates, params, state.kept)
        dither = _dithers(state)
        landed: list[tuple[Any, Any]] = []
        for i, (u, p, kept) in enumerate(rows):
            if u is None:
                landed.append((None, kept))
            elif _is_narrow(p):
                landed.append(_land(p, u, kept, dither(i), rule=self._landing.rule))
            else:
                landed.append((trees.cast(u, trees.dtype_of(p)), None))
        updates, kept = trees.unflatten(structure, landed, 2)
        return updates, kept


@partial(jax.jit, static_argnames="rule")
def _land(p: Array, u: Array, kept: Any, dither: Dither, *, rule: Rule) -> tuple[Array, Any]:
    return rule(p.astype(_FLOAT32), u.astype(_FLOAT32), kept, dither, p.dtype)


def _dithers(state: RoundingState) -> Callable[[int], Dither]:
    """That of each parameter, by its place among the leaves; of `state`, count and seed are those after the step."""
    return partial(low_precision.dither, state.count, seed=state.seed)


def _is_narrow(p: Any) -> bool:
    return p is not None and low_precision.is_narrow(trees.dtype_of(p))


def _as_it_is(p: Array, kept: Any) -> Array:
    return p.astype(_FLOAT32)


def _towards(start: Array, target: Array, dtype: np.dtype) -> tuple[Array, Array]:
    """The update that takes `start` to `target`, and where it really does.

    That is somewhere else only where the target is so near to 0, less than 2**-13 of `start`, that
    float32 does not hold the difference.
    """
    u = target - start
    return u, low_precision.to_nearest(start + u, dtype)


@value
class StochasticRounding(Rounding):
    """See `stochastic_rounding`."""

    inner: Any
    seed: Any = 0

    def __post_init__(self) -> None:
        self._wrap("stochastic_rounding")
        if not (hasattr(self.seed, "dtype") and jnp.issubdtype(self.seed.dtype, jnp.integer)):
            self._replace_field("seed", checks.count("seed", self.seed, least=0))
            if self.seed >= 2**31:
                raise ValueError(f"Invalid seed value: {self.seed}; seed must be below 2**31")

    def _seed(self) -> Any:
        return self.seed

    @property
    def _landing(self) -> Landing:
        return Landing("stochastic_rounding", _as_it_is, _round_stochastically)


def _round_stochastically(start: Array, u: Array, kept: None, dither: Dither, dtype: np.dtype) -> tuple[Array, None]:
    return low_precision.stochastically(start + u, dither, dtype) - start, None


def stochastic_rounding(opt: Any, seed: Any = 0) -> StochasticRounding:
    """Round half precision parameters stochastically: up or down, such that the mean is right.

    While its updates are steady, a parameter stays within a spacing or two of where float32 would be.
    No state but a count and a seed, 8 bytes. The random numbers come from seed, leaf and position,
    the same however the parameters are sharded, and are spread evenly over the steps.

    Args:
      opt: A transformation, ours or optax's.
      seed: An int of at least 0, or an integer scalar. It is kept in the state from `init` on.

    Returns:
      A transformation with state `RoundingState`, whose `update` needs `params` and emits float32
      updates for half precision parameters. In a chain it must be the last.

    Raises:
      TypeError, ValueError: `opt` is no transformation, or rounds already; `seed` is no such int.

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

    def _keep(self, path: str, p: Any) -> Any:
        return trees.zeros_like(p, trees.dtype_of(p))

    @property
    def _landing(self) -> Landing:
        return Landing("kahan", _as_it_is, _compensate)


def _compensate(start: Array, u: Array, kept: Array, dither: Dither, dtype: np.dtype) -> tuple[Array, Array]:
    wanted = u + kept.astype(_FLOAT32)
    u, landed = _towards(start, low_precision.to_nearest(start + wanted, dtype), dtype)
    # To nearest, a residual that has grown would itself lose small steps.
    return u, low_precision.stochastically(wanted - (landed - start), dither, dtype).astype(dtype)


def kahan(opt: Any) -> Kahan:
    """Add to half precision parameters with Kahan's compensated summation.

    What rounding to nearest takes from a parameter is kept, in the parameter's dtype, and added to
    its next update. Parameter and residual together have about twice the digits of the parameter.

    Args:
      opt: A transformation, ours or optax's.

    Returns:
      A transformation with state `RoundingState`, whose `update` needs `params` and emits float32
      updates for half precision parameters. In a chain it must be the last.

    Raises:
      TypeError, ValueError: `opt` is no transformation, or rounds already.

    References:
      Kahan, 1965, https://doi.org/10.1145/363707.363723; for training,
      Zamirai et al., 2020, https://arxiv.org/abs/2010.06192.
    """
    return Kahan(opt)


@value
class MasterWeights(Rounding):
    """See `master_weights`."""

    inner: Any
    low_bits: bool = static_field(default=False)

    def __post_init__(self) -> None:
        self._wrap("master_weights")
        checks.choice("low_bits", self.low_bits, (False, True))

    def _keep(self, path: str, p: Any) -> Any:
        if not self.low_bits:
            return widened(p)
        if trees.dtype_of(p) != jnp.bfloat16:
            raise ValueError(
                f"{path} is {trees.dtype_of(p)}: low_bits completes bfloat16 parameters only, whose bits are "
                "the upper half of a float32's; use low_bits=False"
            )
        return trees.zeros_like(p, jnp.dtype(jnp.uint16))

    @property
    def _landing(self) -> Landing:
        if self.low_bits:
            return Landing("low_bits", _join, _add_to_bits)
        return Landing("master_weights", _master, _add_to_master)

    def weights(self, params: PyTree, state: RoundingState) -> PyTree:
        """The parameters in full precision: in float32 where they are half precision, else as they are."""
        return self._seen(params, state.kept)


def _master(p: Array, kept: Array) -> Array:
    return kept


def _add_to_master(start: Array, u: Array, kept: Array, dither: Dither, dtype: np.dtype) -> tuple[Array, Array]:
    kept = kept + u
    return low_precision.to_nearest(kept, dtype) - start, kept


def _add_to_bits(start: Array, u: Array, kept: Array, dither: Dither, dtype: np.dtype) -> tuple[Array, Array]:
    master = _join(start, kept) + u
    # Where float32 or bfloat16 would be subnormal, some processors say 0: there are no bits to keep.
    master = jnp.where(jnp.abs(master) < jnp.finfo(_FLOAT32).tiny, 0.0, master)
    # Of what is no number, there are bits that rounding would carry over.
    master = jnp.where(jnp.isnan(master), jnp.nan, master)
    target = _upper_half(master)
    u = target - start
    low = lax.bitcast_convert_type(master, jnp.uint32).astype(jnp.uint16)
    # They are of use only beside the parameter that they belong to; see `_towards`.
    return u, jnp.where(_upper_half(start + u) == target, low, np.uint16(0))


def _upper_half(x: Array) -> Array:
    """The bfloat16 next to `x`, in float32; half away from 0, so that the lower half says which way it went."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000), jnp.float32)


def _join(p: Array, low: Array) -> Array:
    """The float32 whose `_upper_half` is `p` and whose lower half is `low`."""
    up = (low >> 15).astype(jnp.uint32)
    bits = ((lax.bitcast_convert_type(p.astype(_FLOAT32), jnp.uint32) >> 16) - up) << 16
    return lax.bitcast_convert_type(bits | low.astype(jnp.uint32), jnp.float32)


def master_weights(opt: Any, *, low_bits: bool = False) -> MasterWeights:
    """Keep a float32 copy of half precision parameters, step it, and round it to them.

    Args:
      opt: A transformation, ours or optax's.
      low_bits: Of bfloat16 parameters, keep only the 16 bits of float32 that bfloat16 does not have: the
        same float32 copy, in 2 bytes instead of 4. A parameter that is changed from outside then
        stays changed, while a whole copy would overwrite it at the next step.

    Returns:
      A transformation with state `RoundingState`, whose `update` needs `params` and emits float32
      updates for half precision parameters. In a chain it must be the last. Its method
      `weights(params, state)` gives the parameters in float32.

    Raises:
      TypeError, ValueError: `opt` is no transformation, or rounds already; at `init`, a parameter is
        float16 with `low_bits`.

    References:
      Micikevicius et al., 2018, https://arxiv.org/abs/1710.03740.
    """
    return MasterWeights(opt, low_bits)
