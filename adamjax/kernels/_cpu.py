"""The C++ kernel: which parameters it steps, and how it is called."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import trees
from adamjax._core.numerics import largest_square_root
from adamjax._core.quantization import QuantizedArray
from adamjax.kernels import _library
from adamjax.kernels._backend import Backend, LeafArrays, LeafSpec, StepScalars, StepVariant, results

# As in adam.cc.
_TILE = 1024
_ROUNDINGS = (None, "stochastic_rounding", "kahan", "master_weights", "low_bits")
_DTYPES = ("float32", "bfloat16", "float16")


def is_faster(leaf: LeafArrays) -> bool:
    """Return whether the kernel steps a parameter faster than XLA: here, any."""
    return True


def unsupported_reason(variant: StepVariant, leaf: LeafArrays, g: Array) -> str | None:
    """Return the reason why the kernel cannot step a parameter, or None."""
    p, m, v, *_ = leaf
    named = (("parameter", p), ("gradient", g), ("first moment", m), ("second moment", v))
    return next((said for name, x in named if (said := _unsupported_array(name, x)) is not None), None) or _missing()


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
    weight_m, weight_g = (
        (s.decay1.b / s.c1_next, s.decay1.one_minus_b / s.c1) if variant.nesterov else (one / s.c1, zero)
    )
    by_c2, max_by_c2 = (one, one / s.c2) if variant.amsgrad == "corrected" else (one / s.c2, one)
    mean = (s.decay1.old_weight, s.decay1.one_minus_b, s.decay1.undo, rate * weight_m, rate * weight_g)
    square = (s.decay2.old_weight, s.decay2.one_minus_b, s.decay2.undo, by_c2, s.eps_root, s.eps)
    float32 = np.dtype(np.float32)
    largest = jnp.float32(largest_square_root(float32))
    # With decay in it, a gradient is limited afterwards.
    limit = jnp.float32(np.finfo(float32).max) if variant.coupled else largest
    gradient = limit if scalars.limit is None else scalars.limit, scalars.sign, scalars.coupled
    cautious = -one if variant.cautious else one
    return (*mean, *square, *gradient, scalars.decay, cautious, max_by_c2, largest)


def attributes(variant: StepVariant) -> dict[str, Any]:
    """The attributes of a step that both handlers of the kernel take; see `Bound` there."""
    rounding = variant.rounding
    return {
        "nesterov": variant.nesterov,
        "maximum": variant.amsgrad is not None,
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


KERNEL = Backend(_scalars, _run)
