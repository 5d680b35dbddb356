"""How a moment is kept between steps: in which dtype or code, and how it is rounded to it.

The arithmetic of a step is in float32 or wider whatever the storage. A moment narrower than that
is rounded once, and stochastically: it is right on average. To half precision it is rounded before the
step uses it, to codes after that. Rounding to nearest would hold it where it is as soon as a step
changes it by less than half the spacing of what can be stored. For bfloat16 and b2 = 0.999 that is
always; and in 8 bits, the first moment of a parameter whose gradient has become zero would stay,
while the second one decays under it.
Only a running maximum is rounded to nearest: it has no decay that this could freeze.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core import checks
from adamjax._core.packing import PackedTree as PackedTree
from adamjax._core.quantization import QuantizedArray as QuantizedArray
from adamjax._core.typing import DTypeLike, GradientTransformation, PyTree
from adamjax._transforms.base import as_transformation
from adamjax._transforms.moment_storage import FLOATS, Quantized


def quantized(
    format: str, block_size: int | None = None, *, min_size: int = 4096, keep: Callable[[str], bool] | None = None
) -> Quantized:
    r"""A format for `mu_dtype` and `nu_dtype`: 8 or 4 bits a number, with a scale for each block.

    With s the largest magnitude in a block and :math:`y = |x| / s`, what is kept is the integer next to

    .. math::
        127 \sqrt{y}, \quad 7 \sqrt{y} \quad \text{(first moment, with its sign)}, \qquad
        255 \sqrt[4]{y}, \quad 16 \sqrt[4]{y} \quad \text{(second moment)}

    rounded stochastically, so that what is decoded is on average what was encoded, and no moment
    sticks. The random numbers come from leaf and position, and are spread evenly over the steps. No
    second moment above 0 decodes to 0.

    A moment stays in float32 (or as wide as its parameter) where the parameter has fewer than
    `min_size` elements or no axes, where the codes would not save half of the bytes (a last axis
    of 1 to 3 elements), and where `keep` says so; the first moment also where the parameter is
    complex.

    `mu_dtype` and `nu_dtype` may differ. Bytes of state a parameter, for large leaves: 2.06 with
    "int8" for both, 1.59 with "int4" for the first moment, 1.13 with "int4" for both. Sixteen codes are
    few for a second moment: its root comes out a fifth too large or too small, and what is smaller
    than 1/65536 of its block's largest, 0 included, counts as that. Training can end as well, but
    it takes another course.

    Args:
      format: "int8" or "int4".
      block_size: How many numbers along the last axis share a scale. None: 128 in 8 bits, 64 in 4.
      min_size: Leaves with fewer elements than this are not quantised.
      keep: Which leaves else are not: a function of a leaf's path, such as "layer_0/kernel".

    Returns:
      A hashable value to pass as `mu_dtype` or `nu_dtype`. In the state stands a `QuantizedArray` for
      each moment: codes shaped like the parameter (in 4 bits, two to a byte along the last axis), and
      float32 scales, the last axis divided by `block_size`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong kind. A derivative through
        the stored moments (a hypergradient over several steps) raises a TypeError when it is taken.

    >>> import adamjax, jax.numpy as jnp
    >>> int8 = adamjax.quantized("int8")
    >>> opt = adamjax.adam(mu_dtype=int8, nu_dtype=int8)
    >>> opt.init(jnp.zeros((256, 64)))[0].mu
    QuantizedArray(int8[256,64] in blocks of 128, 17408 bytes)
    """
    return Quantized(format, block_size, min_size, keep)


class Precision(NamedTuple):
    """What arithmetic in a dtype does to Adam; see `precision`.

    Fields:
      spacing: Distance of 1 to the next larger number. Of a parameter p, rounding to nearest loses
        every step smaller than |p| spacing / 4, and none larger than |p| spacing / 2.
      smallest_gradient: What a smaller one adds to the second moment, (1 - b2) g**2, is 0.
      largest_gradient: The square of a larger one is infinite, and its step 0.
      eps: What eps is in the dtype. If it is 0, a gradient of 0 gives 0 / 0, and a small one g / 0.
      magnified: How many learning rates long the first step can be: eps is all that is left of the
        denominator for a gradient just below `smallest_gradient`. At most 1 would be right.
    """

    spacing: float
    smallest_gradient: float
    largest_gradient: float
    eps: float
    magnified: float


def precision(dtype: DTypeLike, eps: float = 1e-8, b2: float = 0.999) -> Precision:
    """The facts that decide about eps, if Adam's arithmetic were in `dtype`.

    Here it never is below float32, whatever the parameters, so those of float32 hold. Elsewhere
    it is in the dtype of the gradients, and eps has to make up for second moments that are 0.

    Args:
      dtype: bfloat16, float16, float32 or float64.
      eps, b2: As given to an optimizer.

    Returns:
      A `Precision`.

    Raises:
      ValueError, TypeError: `dtype` is none of these, or `eps` or `b2` is out of range.

    >>> import adamjax
    >>> adamjax.storage.precision("float16").eps
    0.0
    >>> f"{adamjax.storage.precision('float16', eps=1e-4).magnified:.0f}"
    '55'
    """
    eps, b2 = checks.number("eps", eps), checks.number("b2", b2, below=1.0)
    found = checks.dtype("dtype", dtype, FLOATS, f"dtype must be one of {', '.join(FLOATS)}")
    info = jnp.finfo(found)
    rounded = float(np.asarray(eps, found))
    smallest = math.sqrt(float(info.smallest_subnormal) / 2 / (1 - b2))
    return Precision(
        spacing=float(info.eps),
        smallest_gradient=smallest,
        largest_gradient=math.sqrt(float(info.max)),
        eps=rounded,
        magnified=smallest / rounded if rounded else math.inf,
    )


def state_bytes(opt: GradientTransformation, params: PyTree) -> int:
    """How many bytes the state of `opt` takes, without allocating it.

    Args:
      opt: A transformation, ours or optax's.
      params: The parameters, or `jax.ShapeDtypeStruct`s.

    Returns:
      The bytes of all arrays in the state together; of sharded ones, over all devices.

    Raises:
      TypeError: `opt` is no transformation, or a leaf of `params` no floating point or complex array.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> params = jax.ShapeDtypeStruct((1_000_000, 1000), jnp.bfloat16)
    >>> int8 = adamjax.quantized("int8")
    >>> adamjax.storage.state_bytes(adamjax.adam(mu_dtype=int8, nu_dtype=int8), params) / 1e9
    2.064000004
    """
    checks.parameters(params)
    init = as_transformation(opt, "argument opt of state_bytes").init
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(init, params)))
