"""The C++ kernel: which parameters it steps, and how it is called."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import trees
from adamjax.kernels import _compile
from adamjax.kernels._backend import Call, Form, Kernel, Leaf, Numbers, changed
from adamjax.storage import QuantizedArray

# As in adam.cc.
_TILE = 256
_LANDINGS = (None, "stochastic_rounding", "kahan", "master_weights", "low_bits")
_DTYPES = ("float32", "bfloat16", "float16")


def gains(leaf: Leaf) -> bool:
    """Whether the step of a parameter is faster by the kernel than by XLA: here, of all."""
    return True


def why_not(leaf: Leaf, g: Array) -> str | None:
    """Why the kernel cannot step a parameter, if it cannot."""
    p, m, v, *_ = leaf
    named = (("parameter", p), ("gradient", g), ("first moment", m), ("second moment", v))
    return next((said for name, x in named if (said := _why_not_of(name, x)) is not None), None) or _missing()


def _why_not_of(name: str, x: Any) -> str | None:
    if isinstance(x, QuantizedArray):
        if _TILE % x.block_size == 0:
            return None
        return f"its {name} is quantised in blocks of {x.block_size}, and the kernel steps {_TILE} numbers at a time"
    dtype = trees.dtype_of(x).name
    return None if dtype in _DTYPES else f"its {name} is {dtype}, and the kernel steps {', '.join(_DTYPES)}"


@cache
def _missing() -> str | None:
    """Why there is no kernel at all, if there is none."""
    try:
        _compile.target()
    except RuntimeError as error:
        return str(error)
    return None


def _scalars(form: Form, numbers: Numbers) -> tuple[Any, ...]:
    """The first operand of the kernel; see `Scalars` there."""
    s = numbers.adam
    one, zero = jnp.float32(1), jnp.float32(0)
    of_m, of_g = (s.decay1.b / s.c1_next, s.decay1.a / s.c1) if form.nesterov else (one / s.c1, zero)
    of_m, of_g = numbers.rate * of_m, numbers.rate * of_g
    by_c2, kept_by_c2 = (one, one / s.c2) if form.amsgrad == "corrected" else (one / s.c2, one)
    mean = (s.decay1.keep, s.decay1.a, s.decay1.undo, of_m, of_g)
    square = (s.decay2.keep, s.decay2.a, s.decay2.undo, by_c2, s.eps_root, s.eps)
    rest = (numbers.sign, numbers.coupled, numbers.decay, kept_by_c2)
    return (*mean, *square, *rest)


def attributes(form: Form) -> dict[str, bool]:
    """What both forms of the kernel are told of a step; see `Bound` there."""
    return {
        "nesterov": form.nesterov,
        "maximum": form.amsgrad is not None,
        "coupled": form.coupled,
        "decays": form.decays,
    }


def _run(call: Call, scalars: Array, places: Array, *arrays: Array) -> Any:
    like = jax.eval_shape(lambda *arrays: changed(arrays), *arrays)
    # In place: scalars and places come first, and of the arrays the second, the gradient, has no result.
    aliases = {2: 0} | {i + 3: i for i in range(1, len(like))}
    bits, block = zip(*call.formats, strict=True)
    return jax.ffi.ffi_call(_compile.target(), like, input_output_aliases=aliases)(
        scalars,
        places,
        *arrays,
        **attributes(call.form),
        landing=np.int64(_LANDINGS.index(None if call.form.landing is None else call.form.landing.name)),
        whole=np.asarray(call.shape, np.int64),
        bits=np.asarray(bits, np.int64),
        block=np.asarray(block, np.int64),
    )


KERNEL = Kernel(_scalars, _run)
