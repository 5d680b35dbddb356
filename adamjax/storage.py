"""The storage of moments between steps: dtypes, 8- and 4-bit codes, and the rounding to them.

A step computes in float32 or wider, whatever the storage. A moment stored with less precision is rounded
once per step, stochastically, so it is right on average: to half precision before the step uses it, to
codes afterwards. Rounding to nearest would freeze a moment as soon as a step changes it by less than half
the spacing of the format. For bfloat16 and b2 = 0.999 that is always; in 8 bits, the first moment of a
parameter whose gradient has become zero would stay, while its second moment decays.
Only a running maximum is rounded to nearest: it does not decay, so rounding cannot freeze a decay.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core import checks
from adamjax._core.packing import PackedTree as PackedTree
from adamjax._core.quantization import QuantizedArray as QuantizedArray
from adamjax._core.quantization import is_quantized
from adamjax._core.typing import DTypeLike, GradientTransformation, PyTree
from adamjax._transforms.base import as_transformation
from adamjax._transforms.moment_storage import FLOATS, decoded, decoded_first
from adamjax._transforms.moment_storage import MomentFormat as MomentFormat
from adamjax._transforms.moment_storage import Quantized as Quantized
from adamjax._transforms.moments import find_moments, holds_moments


def quantized(
    format: str, block_size: int | None = None, *, min_size: int = 4096, keep: Callable[[str], bool] | None = None
) -> Quantized:
    r"""A format for `mu_dtype` and `nu_dtype`: 8 or 4 bits per number, with a scale of 16 bits per block.

    A first moment is stored as its ratio to the root of the second, :math:`r = m / \sqrt{v}` (Adamax: to the
    norm). Its size does not depend on that of the gradients, so blocks may hold parameters with small and
    with large ones, and no rounding makes a step larger than the largest of its block, whatever the other
    format is. With s the largest :math:`|r|` of a block and L = 127 or 7, the code q stands for

    .. math:: r = s\, t\, (2 + |t|) / 3, \qquad t = q / L.

    A second moment is stored as a float without sign: exponent and as many bits of the mantissa as the
    range of its block allows, 7 of them where it is that of a factor of 2, and 3 over a factor of
    :math:`10^9`. In 4 bits, it is a power of 2 over a factor of :math:`2^{12}`, of 4 over :math:`2^{24}`,
    of 16 over :math:`2^{48}`; smaller ones become the smallest. No second moment above 0 decodes to 0.

    Both are rounded stochastically, second moments so that the expected decoded value is the encoded one,
    first moments with a dither that is narrower where a decay has no need of it. No moment gets stuck. The
    random numbers depend on leaf and position, and are spread evenly over the steps.

    A moment stays in float32 (or as wide as its parameter) if the parameter has fewer than `min_size`
    elements or no axes, if its last axis has fewer than 4 elements, if the codes would not save half of the
    bytes, or if `keep` returns True. So does the first moment of a complex parameter.

    `mu_dtype` and `nu_dtype` may differ. The state of large leaves takes 2.09 bytes per parameter with
    "int8" for both, 1.56 with "int4" for the first moment, and 1.06 with "int4" for both. Sixteen codes
    are few for a second moment: its root is off by up to two fifths, and up to a factor of 2 or 4 where gradients
    in a block differ by more than 64 or 4096. Training can end as well, but takes
    another path.

    Args:
      format: "int8" or "int4".
      block_size: The number of elements along the last axis that share a scale. None: 32 for first
        moments in 8 bits, else 64.
      min_size: Leaves with fewer elements than this are not quantised.
      keep: A function of a leaf's path, such as "layer_0/kernel", that returns True for further
        leaves that are not to be quantised.

    Returns:
      A hashable value to pass as `mu_dtype` or `nu_dtype`. The state then has a `QuantizedArray` for
      each moment: codes shaped like the parameter (in 4 bits, two per byte along the last axis), and
      uint16 scales, whose last axis is divided by `block_size`.

    Raises:
      ValueError, TypeError: An argument is out of range or of the wrong kind. A derivative through
        the stored moments (a hypergradient over several steps) raises a TypeError when it is taken.

    >>> import adamjax, jax.numpy as jnp
    >>> int8 = adamjax.quantized("int8")
    >>> opt = adamjax.adam(mu_dtype=int8, nu_dtype=int8)
    >>> opt.init(jnp.zeros((256, 64)))[0].mu
    QuantizedArray(int8[256,64] in blocks of 32, 17408 bytes)
    """
    return Quantized(format, block_size, min_size, keep)


def decode(state: PyTree) -> PyTree:
    """Decode the quantised moments of a state, to look at them.

    Args:
      state: A state, or any tree that holds `AdamState`s.

    Returns:
      `state` with moments in float32 in place of codes. Moments that are not quantised stay as they are.

    Raises:
      ValueError: There are no moments in the state.

    >>> import adamjax, jax.numpy as jnp
    >>> int8 = adamjax.quantized("int8", min_size=1)
    >>> opt, p = adamjax.adam(mu_dtype=int8, nu_dtype=int8), jnp.zeros(8)
    >>> _, state = opt.step(jnp.ones(8), opt.init(p), p)
    >>> f"{adamjax.storage.decode(state)[0].mu.mean():.2f}"
    '0.10'
    """
    if not find_moments(state):
        raise ValueError("there are no moments in the state: decode takes what init or update of Adam returned")

    def of_node(x: Any) -> Any:
        if not holds_moments(x):
            return x
        fields = x._asdict()
        first = {
            name: jax.tree.map(decoded_first, y, x.nu, is_leaf=is_quantized)
            for name, y in fields.items()
            if name.startswith("mu")
        }
        second = {name: y for name, y in fields.items() if name in ("nu", "nu_max")}
        return x._replace(**first, **jax.tree.map(decoded, second, is_leaf=is_quantized))

    return jax.tree.map(of_node, state, is_leaf=holds_moments)


class Precision(NamedTuple):
    """The effects on Adam of arithmetic in a dtype; see `precision`.

    Fields:
      spacing: The distance from 1 to the next larger number. Rounding a parameter p to nearest loses
        every step smaller than |p| spacing / 4, and none larger than |p| spacing / 2.
      smallest_gradient: Smaller gradients add 0 to the second moment: (1 - b2) g**2 underflows.
      largest_gradient: The square of a larger gradient is infinite, and its step 0.
      eps: The value of eps in the dtype. If it is 0, a gradient of 0 gives 0 / 0, and a small one g / 0.
      magnified: The largest first step, in learning rates. For a gradient just below
        `smallest_gradient`, only eps is left of the denominator. It should be at most 1.
    """

    spacing: float
    smallest_gradient: float
    largest_gradient: float
    eps: float
    magnified: float


def precision(dtype: DTypeLike, eps: float = 1e-8, b2: float = 0.999) -> Precision:
    """Return the figures that a choice of eps depends on, for Adam with arithmetic in `dtype`.

    adamjax always computes in float32 or wider, so the figures of float32 hold here. Other libraries
    compute in the dtype of the gradients, where eps has to make up for second moments that are 0.

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
    """Return the bytes that the state of `opt` takes, without allocating it.

    Args:
      opt: A transformation of adamjax or optax.
      params: The parameters, or `jax.ShapeDtypeStruct`s.

    Returns:
      The total bytes of all arrays in the state, summed over all devices if they are sharded.

    Raises:
      TypeError: `opt` is not a transformation, or a leaf of `params` is not a floating point or complex
        array.

    >>> import adamjax, jax, jax.numpy as jnp
    >>> params = jax.ShapeDtypeStruct((1_000_000, 1000), jnp.bfloat16)
    >>> int8 = adamjax.quantized("int8")
    >>> adamjax.storage.state_bytes(adamjax.adam(mu_dtype=int8, nu_dtype=int8), params) / 1e9
    2.096000004
    """
    checks.parameters(params)
    init = as_transformation(opt, "argument opt of state_bytes").init
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(init, params)))
