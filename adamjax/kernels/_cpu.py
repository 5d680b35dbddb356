"""The C++ kernel: which parameters it steps, and how it is called."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import trees
from adamjax._core.numerics import Decay, largest_square_root
from adamjax._core.quantization import QuantizedArray
from adamjax._transforms.adam import AdamRule
from adamjax._transforms.ademamix import AdEMAMixRule, SimplifiedAdEMAMixRule
from adamjax._transforms.adopt import ADOPTRule
from adamjax._transforms.atan2 import AdamAtan2Rule
from adamjax._transforms.schedule_free import ScheduleFreeRule
from adamjax.kernels import _library
from adamjax.kernels._backend import Backend, LeafArrays, LeafSpec, StepScalars, StepVariant, results

# As in adam.cc.
_TILE = 1024
_ROUNDINGS = (None, "stochastic_rounding", "kahan", "master_weights", "low_bits")
_OTHER_RULES = (AdEMAMixRule, ADOPTRule, AdamAtan2Rule, ScheduleFreeRule)  # behind Adam's own, and the cautious one
_DTYPES = ("float32", "bfloat16", "float16")


def is_faster(leaf: LeafArrays) -> bool:
    """Return whether the kernel steps a parameter faster than XLA: here, any."""
    return True


def unsupported_reason(variant: StepVariant, leaf: LeafArrays, g: Array) -> str | None:
    """Return the reason why the kernel cannot step a parameter, or None."""
    p, m, v, third, _ = leaf
    named = [("parameter", p), ("gradient", g), ("first moment", m), ("second moment", v)]
    if third is not None:
        named.append(("slow mean" if variant.rule.has_slow_mean else "maximum", third))
    reasons = (_unsupported_array(name, x) for name, x in named)
    return next((x for x in reasons if x is not None), None) or _unsupported_rule(variant, m) or _missing()


def _unsupported_rule(variant: StepVariant, m: Any) -> str | None:
    if isinstance(variant.rule, ADOPTRule) and isinstance(m, QuantizedArray):
        return "its first moment is quantised, and the kernel steps ADOPT with one of floats"
    return None


def _unsupported_array(name: str, x: Any) -> str | None:
    if isinstance(x, QuantizedArray):
        if _TILE % x.block_size == 0:
            return None
        return f"its {name} is quantised in blocks of {x.block_size}, and the kernel steps {_TILE} numbers at a time"
    dtype = trees.dtype_of(x).name
    return None if dtype in _DTYPES else f"its {name} is {dtype}, and the kernel steps {', '.join(_DTYPES)}"


@cache
def _missing() -> str | None:
    try:
        _library.target()
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def _scalars(variant: StepVariant, scalars: StepScalars) -> tuple[Any, ...]:
    """The first operand of the kernel; see `Scalars` there."""
    s, rate = scalars.adam, scalars.rate
    one, zero = jnp.float32(1), jnp.float32(0)
    weight_m, weight_g, slow, angle = _numerator(variant.rule, s, rate)
    eps_root, c2 = (zero, one) if isinstance(variant.rule, ADOPTRule) else (s.eps_root, s.c2)
    by_c2, max_by_c2 = (one, one / c2) if variant.rule.amsgrad == "corrected" else (one / c2, one)
    is_free = isinstance(variant.rule, ScheduleFreeRule)
    mean = (*((zero,) * 3 if is_free else _ema(s.decay1)), weight_m, weight_g)
    free = (s.pull, s.push, s.rate) if is_free else (zero,) * 3
    square = (*_ema(s.decay2), by_c2, eps_root, s.eps)
    float32 = np.dtype(np.float32)
    largest = jnp.float32(largest_square_root(float32))
    # With decay in it, a gradient is limited afterwards.
    limit = jnp.float32(np.finfo(float32).max) if variant.coupled else largest
    gradient = limit if scalars.limit is None else scalars.limit, scalars.sign, scalars.coupled
    cautious = -one if variant.cautious else one
    most = s.extra if isinstance(variant.rule, ADOPTRule) else zero
    other = (*slow, jnp.sign(rate), *angle, most, *free)
    return (*mean, *square, *gradient, scalars.decay, cautious, max_by_c2, largest, *other)


def _ema(d: Decay) -> tuple[Any, ...]:
    return d.old_weight, d.one_minus_b, d.undo


def _numerator(rule: AdamRule, s: Any, rate: Any) -> tuple[Any, Any, tuple[Any, ...], tuple[Any, ...]]:
    """The weights of the first moment and the gradient, those of a slow mean, and those of an angle."""
    one, zero = jnp.float32(1), jnp.float32(0)
    no_slow, no_angle = (zero,) * 4, (zero, zero)
    if isinstance(rule, ADOPTRule | ScheduleFreeRule):
        return rate, zero, no_slow, no_angle
    if isinstance(rule, SimplifiedAdEMAMixRule):
        return rate / s.decay1.one_minus_b, rate * s.extra, no_slow, no_angle
    weight_m, weight_g = (s.decay1.b / s.c1_next, s.decay1.one_minus_b / s.c1) if rule.nesterov else (one / s.c1, zero)
    if isinstance(rule, AdamAtan2Rule):  # the angle is of a quotient without the learning rate
        a, b = s.extra
        return weight_m, weight_g, no_slow, (rate * a, b)
    slow = (*_ema(s.extra.decay3), rate * s.extra.alpha) if isinstance(rule, AdEMAMixRule) else no_slow
    return rate * weight_m, rate * weight_g, slow, no_angle


def attributes(variant: StepVariant) -> dict[str, Any]:
    """The attributes of a step that both handlers of the kernel take; see `Bound` there."""
    rounding = variant.rounding
    rule = variant.rule
    kind = next((i for i, kind in enumerate(_OTHER_RULES) if isinstance(rule, kind)), -1)
    return {
        "rule": np.int64(2 + kind if kind >= 0 else rule.cautious),
        "nesterov": rule.nesterov or isinstance(rule, SimplifiedAdEMAMixRule),
        "third": rule.amsgrad is not None or rule.has_slow_mean,
        "as_update": variant.update is not None,
        "landing": np.int64(_ROUNDINGS.index(None if rounding is None else rounding.name)),
    }


def _run(leaf: LeafSpec, scalars: Array, integers: Array, *arrays: Array) -> Any:
    variant, like = leaf.variant, results(leaf.variant, arrays)
    operands = arrays if variant.reads_param else arrays[1:]  # then the gradient stands in place of the parameter, too
    # In place. Scalars and integers come before the operands. An update takes the memory of its gradient, which most
    # programs need no more: XLA copies it if they do.
    first = 2 + len(operands) - len(like)
    aliases = {first + i: i for i in range(1, len(like))}
    if variant.update is None:
        aliases[2] = 0
    elif variant.update == arrays[1].dtype:
        aliases[first] = 0
    bits, block = zip(*leaf.formats, strict=True)
    return jax.ffi.ffi_call(_library.target(), like, input_output_aliases=aliases)(
        scalars,
        integers,
        *operands,
        **attributes(variant),
        coupled=variant.coupled,
        decays=variant.decays,
        whole=np.asarray(leaf.shape, np.int64),
        bits=np.asarray(bits, np.int64),
        block=np.asarray(block, np.int64),
    )


def _sum(leaf: LeafSpec, scalars: Array, integers: Array, g: Array, *moments: Array) -> Array:
    batch = g.ndim - len(leaf.shape)
    like = jax.eval_shape(lambda g: jnp.sum(g, axis=tuple(range(batch, g.ndim)), dtype=jnp.float32), g)
    bits, block = zip(*leaf.formats, strict=True)
    return jax.ffi.ffi_call(f"{_library.target()}-sum", like)(
        scalars,
        integers,
        g,
        *moments,
        rule=attributes(leaf.variant)["rule"],
        whole=np.asarray(leaf.shape, np.int64),
        bits=np.asarray(bits, np.int64),
        block=np.asarray(block, np.int64),
    )


KERNEL = Backend(_scalars, _run, _sum)
