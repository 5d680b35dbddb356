"""Schedule-Free AdamW: an average of the iterates in place of a schedule of the learning rate."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks, trees
from adamjax._core.low_precision import Dither, dither
from adamjax._core.numerics import Decay, bias_correction, decay, divide_by_real, is_zero
from adamjax._core.quantization import QuantizedArray
from adamjax._core.trees import Leaves
from adamjax._core.typing import Mask, PyTree, Scalar, ScalarOrSchedule
from adamjax._core.value import precise_field, static_field, value
from adamjax._transforms import moment_storage as storage
from adamjax._transforms.adam import AdamRule, epsilon
from adamjax._transforms.base import Leafwise
from adamjax._transforms.leafwise import LeafOp, LeafTransform, as_constants
from adamjax._transforms.moment_storage import Quantized
from adamjax._transforms.rates import as_rate
from adamjax._transforms.schedule import number_or_schedule
from adamjax._transforms.weight_decay import as_mask, mask_tree


class ScheduleFreeRule(AdamRule):
    """The part of the step of one array that is Adam's: the second moment and its root."""


_RULE = ScheduleFreeRule()


class ScheduleFreeState(NamedTuple):
    """State of `schedule_free_adamw`.

    The parameters that are trained are y, where gradients are taken. Those to evaluate at are x, which y and z say:
    y = (1 - b1) z + b1 x. `eval_params` computes them.

    Fields:
      count: int32 scalar, the number of steps done; stays at its largest value once there.
      z: The iterates of the base optimizer, like the parameters, but at least float32: a step moves them by a
        learning rate, which half precision would lose.
      nu: Second moments, as in `AdamState`.
      b1: The interpolation between z and x of the last step, a floating point scalar as the two below.
      weight_sum: The sum of the weights of all z in the average so far, in units of the last weight: for a constant
        learning rate, the number of steps.
      max_lr: The largest learning rate so far.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, which nobody counts with
    z: PyTree
    nu: PyTree
    b1: Array
    weight_sum: Array
    max_lr: Array


jax.export.register_namedtuple_serialization(ScheduleFreeState, serialized_name="adamjax.ScheduleFreeState")


class ScheduleFreeScalars(NamedTuple):
    """The numbers of a step: 0-d arrays in its dtype. Those of the second moment are named as in `AdamScalars`."""

    rate: Any  # the learning rate
    pull: Any  # the part of the way from y to z, c without a change of b1
    push: Any  # the factor of the direction in the step of y: the learning rate times 1 - b1 (1 - c)
    decay2: Decay
    c2: Any  # 1 - b2**t
    eps: Any
    eps_root: Any
    weight_decay: Any


@dataclass(frozen=True)
class StepScheduleFree:
    """A `LeafFunction`: the step of one array (Defazio et al., 2024, Algorithm 1), in float32 or wider.

    The parameter is y, and the leaf state z and the second moment v. The average x is not formed: of
    y = (1 - b1) z + b1 x, x' = (1 - c) x + c z' and z' = z - rate d follows
    y' = y + c (z - y) - rate (1 - b1 (1 - c)) d, without a division by b1.
    """

    rule: ClassVar[AdamRule] = _RULE

    decays: bool  # whether weight decay applies to this parameter

    def __call__(self, g: Array, p: Array, stored: Any, operands: Any) -> tuple[Array, Any]:
        s, dither = operands
        z_stored, v_stored = stored
        chex.assert_equal_shape([g, p, *stored])
        dtype = trees.compute_dtype(g.dtype, p.dtype, z_stored.dtype, v_stored.dtype)
        real = trees.real_dtype(dtype)
        g, y, z = _RULE.limited(g.astype(dtype)), p.astype(dtype), z_stored.astype(dtype)
        v = storage.load(v_stored, real, g)
        # Real scalars times complex arrays are meant, even where promotion is strict.
        with jax.numpy_dtype_promotion("standard") if dtype != real else contextlib.nullcontext():
            v = storage.round_second_moment(_RULE.second_moment(g, v, s), v_stored, dither)
            d = divide_by_real(g, _RULE.root(v, None, s) + s.eps)
            if self.decays:
                d = d + s.weight_decay * y
            u = s.pull * (z - y) - s.push * d
            z = z - s.rate * d
        new = z.astype(z_stored.dtype), storage.store(v, v_stored, dither)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, stored)
        return u, new


@dataclass(frozen=True)
class StepScheduleFreeLeaves(LeafTransform):
    """The step of each leaf."""

    scalars: Callable[[np.dtype], ScheduleFreeScalars]  # from a real dtype, the scalars of this step in it
    after: ScheduleFreeState  # the new state, but for z and nu
    like: Leaves
    decays: Sequence[bool | None]  # for each leaf whether weight decay applies
    leaf_states: Sequence[Any]  # z and v of each leaf

    def ops_for(self, index: int, dtype: np.dtype, p: Any) -> Sequence[LeafOp]:
        z, v = self.leaf_states[index]
        if isinstance(v, QuantizedArray):
            v.check()
        dtype = trees.compute_dtype(dtype, trees.dtype_of(p), z.dtype, v.dtype)
        operands = self.scalars(trees.real_dtype(dtype)), self._dither(index, v)
        return (LeafOp(StepScheduleFree(self.decays[index] is not False), operands, dtype),)

    def _dither(self, index: int, v: Any) -> Dither | None:
        # That of a second moment in an `AdamState`.
        return dither(self.after.count, index).second_array() if storage.needs_dither(v) else None

    def new_state(self, leaf_states: list[Any]) -> ScheduleFreeState:
        z, nu = ([column[k] for column in leaf_states] for k in (0, 1))
        return self.after._replace(z=self.like.like(z).tree, nu=self.like.like(nu).tree)


@value
class ScheduleFreeAdamW(Leafwise):
    """See `schedule_free_adamw`."""

    leads_to_params: ClassVar[bool] = True

    learning_rate: ScalarOrSchedule
    warmup_steps: Scalar
    b1: Scalar = precise_field()
    b2: Scalar = precise_field()
    eps: Scalar
    weight_decay: ScalarOrSchedule
    weight_lr_power: Scalar
    nu_dtype: Any = static_field(default=None)  # a `MomentFormat`
    mask: Mask = static_field(default=None)

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay"):
            self._replace_field(name, number_or_schedule(name, getattr(self, name)))
        self._check_whole("warmup_steps")
        self._check_numbers("b1", "b2", below=1.0)
        if is_zero(self.b1):
            raise ValueError(
                "Invalid beta parameter at index 0: 0.0; b1 must be above 0: at 0, the average x is in none of the "
                "arrays that are kept"
            )
        self._check_numbers("eps", "weight_lr_power")
        self._replace_field("nu_dtype", storage.moment_format("nu_dtype", self.nu_dtype, signed=False))
        self._replace_field("mask", as_mask(self.mask))

    def _init(self, params: PyTree) -> ScheduleFreeState:
        dtype = jnp.result_type(float)

        def scalars() -> tuple[Array, Array, Array]:
            return jnp.asarray(decay(self, "b1", dtype).b, dtype), jnp.zeros((), dtype), jnp.zeros((), dtype)

        z = jax.tree.map(lambda p: trees.copy(p, trees.compute_dtype(trees.dtype_of(p))), params)
        nu = storage.init_moments(params, "nu_dtype", self.nu_dtype, power=0)
        return ScheduleFreeState(trees.zero_count(params), z, nu, *trees.make_on_mesh_of(scalars, params))

    def _leaf_transforms(self, updates: Leaves, state: PyTree, params: Leaves | None) -> list[LeafTransform]:
        checks.params_given(params, updates, "schedule_free_adamw")
        params = params or updates  # without parameters, there are no gradients
        state = checks.state(state, ScheduleFreeState, "schedule_free_adamw")
        nu = state.nu
        if isinstance(self.nu_dtype, Quantized):
            nu = storage.rebuild_quantized(nu, updates, self.nu_dtype, power=0)
        columns = checks.moments(updates, state.z, "state.z"), checks.moments(updates, nu, "state.nu", real=True)
        scalars, after = self._scalars(state)
        decays: Sequence[bool | None] = [not is_zero(self.weight_decay)] * len(updates.leaves)
        if self.mask is not None:
            decays = updates.column(mask_tree(self.mask, params.tree))
        pairs = list(zip(*columns, strict=True))
        return [StepScheduleFreeLeaves(scalars, after, updates, decays, pairs)]

    def _scalars(self, state: ScheduleFreeState) -> tuple[Callable[[np.dtype], Any], ScheduleFreeState]:
        """The scalars of the next step, and the state after it, but for its arrays."""
        dtype = state.max_lr.dtype
        count = trees.increment(state.count)

        rate = self._rate(state)
        c, weight_sum, max_lr = self._weight(state, rate)
        b1 = decay(self, "b1", dtype)
        # The last y was formed with the last b1. The new one is right even if that was another number.
        pull = c + (1 - c) * (state.b1 - b1.b) / state.b1
        push = rate * (b1.one_minus_b + b1.b * c)
        weight_decay = self._now("weight_decay", state)

        @cache
        def scalars(real: np.dtype) -> Any:
            decay2 = decay(self, "b2", real)
            found = ScheduleFreeScalars(
                rate=rate.astype(real),
                pull=pull.astype(real),
                push=push.astype(real),
                decay2=decay2,
                c2=bias_correction(count.astype(real), decay2),
                eps=epsilon(self.eps, decay2),
                eps_root=np.zeros((), real),
                weight_decay=weight_decay.astype(real),
            )
            return as_constants(found, count)

        return scalars, ScheduleFreeState(count, None, None, jnp.asarray(b1.b, dtype), weight_sum, max_lr)

    def _now(self, name: str, state: ScheduleFreeState) -> Array:
        """A hyperparameter at the next step."""
        x = getattr(self, name)
        return checks.as_scalar(name, x(state.count) if callable(x) else x, state.max_lr.dtype)

    def _rate(self, state: ScheduleFreeState) -> Array:
        """The learning rate of the next step, with the warmup."""
        t = trees.increment(state.count).astype(state.max_lr.dtype)
        return self._now("learning_rate", state) * _part_of_warmup(t, self._now("warmup_steps", state))

    def _learning_rate(self, state: PyTree) -> Any:
        return as_rate(self._rate(checks.state(state, ScheduleFreeState, "schedule_free_adamw")))

    def _weight(self, state: ScheduleFreeState, rate: Array) -> tuple[Array, Array, Array]:
        """The weight c of the new z in the average, and the sum and the maximum behind it.

        The weight of a step is the largest rate so far to a power. The sum is kept relative to the last weight: so
        the numbers of steps at a constant rate are exact, and no power underflows.
        """
        power = checks.as_scalar("weight_lr_power", self.weight_lr_power, rate.dtype)
        largest = jnp.maximum(state.max_lr, rate)
        begun = largest > 0
        growth = jnp.where(begun, state.max_lr / jnp.where(begun, largest, 1), 1)
        total = state.weight_sum * growth**power + (begun | (power == 0)).astype(rate.dtype)
        # Without any weight yet, x stays.
        some = total > 0
        return jnp.where(some, 1 / jnp.where(some, total, 1), 0), total, largest


def _part_of_warmup(t: Array, steps: Any) -> Array:
    """The part of the learning rate at step t (1 for the first) of a linear warmup over so many steps, or none."""
    return jnp.minimum(t / jnp.maximum(steps, 1), 1)
