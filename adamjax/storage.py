"""How a moment is kept between steps: in which dtype or code, and how it is rounded to it.

The arithmetic of a step is in float32 or wider whatever the storage. A moment narrower than that
is rounded once, and stochastically: it is right on average. To half precision it is rounded before the
step uses it, to codes after that. Rounding to nearest would hold it where it is as soon as a step
changes it by less than half the spacing of what can be stored. For bfloat16 and b2 = 0.999 that is
always; and in 8 bits, the first moment of a parameter whose gradient has become zero would stay,
while the second one decays under it.
Only a running maximum is rounded to nearest: it has no decay that this could freeze.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks, low_precision, quantization, trees
from adamjax._core.low_precision import Dither
from adamjax._core.packing import PackedTree as PackedTree
from adamjax._core.quantization import QuantizedArray as QuantizedArray
from adamjax._core.trees import PyTree
from adamjax._core.value import Value, name_of, static_field, value
from adamjax._transforms.base import as_transformation

_FLOATS = ("bfloat16", "float16", "float32", "float64")
_COMPLEX = ("complex64", "complex128")
_BLOCK_SIZES = {"int8": 128, "int4": 64}


@value
class Quantized(Value):
    """A format for moments; see `quantized`."""

    name: str = static_field()
    block_size: Any = static_field(default=None)
    min_size: int = static_field(default=4096)
    keep: Callable[[str], bool] | None = static_field(default=None)

    def __post_init__(self) -> None:
        checks.choice("format", self.name, tuple(_BLOCK_SIZES))
        block_size = _BLOCK_SIZES[self.name] if self.block_size is None else self.block_size
        self._replace_field("block_size", checks.count("block_size", block_size))
        self._replace_field("min_size", checks.count("min_size", self.min_size, least=0))
        if self.keep is not None and not callable(self.keep):
            raise TypeError(f"Invalid keep value: {self.keep!r}; keep must be a function of a path, or None")

    def __repr__(self) -> str:
        block_size = f", block_size={self.block_size}" if self.block_size != _BLOCK_SIZES[self.name] else ""
        min_size = f", min_size={self.min_size}" if self.min_size != 4096 else ""
        keep = f", keep={name_of(self.keep)}" if self.keep is not None else ""
        return f"adamjax.quantized({self.name!r}{block_size}{min_size}{keep})"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return int(self.name.removeprefix("int"))

    def takes(self, p: Any, path: str, *, signed: bool) -> bool:
        """Whether the moment of parameter `p` is quantised, or else kept in float32 or wider."""
        shape = np.shape(p)
        if not shape or math.prod(shape) < max(self.min_size, 1) or (self.keep is not None and self.keep(path)):
            return False
        if signed and jnp.iscomplexobj(p):
            return False
        n, scales = shape[-1], -(-shape[-1] // self.block_size)
        return -(-n * self.bits // 8) + 4 * scales <= 2 * n


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


def moment_format(name: str, found: Any, *, signed: bool) -> np.dtype | Quantized | None:
    """Check the argument `mu_dtype` (`signed`: may be complex) or `nu_dtype`; None is kept."""
    if found is None or isinstance(found, Quantized):
        return found
    allowed = _FLOATS + _COMPLEX if signed else _FLOATS
    expected = f"{name} must be one of {', '.join(allowed)}, or adamjax.quantized('int8') or ('int4')"
    return _dtype(name, found, allowed, expected)


def _dtype(name: str, found: Any, allowed: tuple[str, ...], expected: str) -> np.dtype:
    try:
        dtype = jnp.dtype("None" if found is None else found)  # which would be float64 to NumPy
    except TypeError:
        raise TypeError(f"Invalid {name} value: {found!r}; {expected}") from None
    if dtype.name not in allowed:
        raise ValueError(f"Invalid {name} value: {dtype.name}; {expected}")
    return dtype


def empty(params: PyTree, name: str, format: np.dtype | Quantized | None, *, signed: bool) -> PyTree:
    """The moments of `params` before the first step: zeros of their shapes and shardings.

    Without a `format` they have the parameters' own dtypes, but at least float32; real unless `signed`.
    """

    def of_leaf(path: Any, p: Any) -> Any:
        if isinstance(format, Quantized):
            if format.takes(p, trees.path_of(path), signed=signed):
                return _empty_codes(p, format, signed)
        elif format is not None:
            if jax.dtypes.canonicalize_dtype(format) != format:
                raise ValueError(f"{name}={format.name} needs 64-bit JAX: set jax_enable_x64, or choose {name}=float32")
            return trees.zeros_like(p, format)
        dtype = trees.compute_dtype(trees.dtype_of(p))
        return trees.zeros_like(p, dtype if signed else trees.real_dtype(dtype))

    return jax.tree.map_with_path(of_leaf, params)


def _empty_codes(p: Any, format: Quantized, signed: bool) -> QuantizedArray:
    zeros = trees.zeros_like(p, jnp.dtype(jnp.float32))
    if trees.is_abstract(p):
        return quantization.abstract(zeros, format.bits, signed, format.block_size)
    return _encode(zeros, format.bits, signed, format.block_size)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _encode(x: Array, bits: int, signed: bool, block_size: int) -> QuantizedArray:
    return quantization.encode(x, bits, signed, block_size, None)


def revive(moments: PyTree, updates: PyTree, format: Any, *, signed: bool) -> PyTree:
    """`moments`, with a `QuantizedArray` where there is a mapping of its codes and scales.

    flax's nnx.Optimizer makes such mappings: it keeps the state of each parameter in a Variable, and takes
    apart what it finds there. What is lost is known from the `format` and the shape of the gradient.
    """
    if not isinstance(format, Quantized) or moments is None:
        return moments
    try:
        structure, rows = trees.flatten(updates, moments)
    except ValueError:  # Whoever checks the trees says where they differ.
        return moments
    revived = [
        QuantizedArray(x["codes"], x["scales"], format.bits, signed, format.block_size, g.shape[-1])
        if isinstance(x, Mapping) and x.keys() == {"codes", "scales"} and g is not None
        else x
        for g, x in rows
    ]
    return jax.tree.unflatten(structure, revived)


def check(*stored: Any) -> None:
    """Check that what is quantised among moments is whole."""
    for x in stored:
        if isinstance(x, QuantizedArray):
            x.check()


def is_rounded(stored: Any) -> bool:
    """Whether storing a moment as `stored` is rounds it."""
    return isinstance(stored, QuantizedArray) or low_precision.is_narrow(stored.dtype)


def load(stored: Any, dtype: np.dtype, like: Array) -> Array:
    """A stored moment for arithmetic in `dtype`, sharded as `like`."""
    if isinstance(stored, QuantizedArray):
        return quantization.sharded_like(stored.decode(), like).astype(dtype)
    return stored.astype(dtype)


def settle_signed(x: Array, like: Any, dither: Dither | None) -> Array:
    """What a new first moment is from now on: rounded stochastically, if `like` is stored in a narrow dtype.

    The step goes on with that: a moment that it needed both before and after rounding would be computed
    twice, from old ones that had to be copied. Rounding to codes is too coarse for it, and `store` does that
    afterwards. It takes a `dither` where `is_rounded`. How the array is sharded does not matter.
    """
    return _as_stored(_rounded(x, like, dither), x, like)


def settle_decaying(x: Array, like: Any, dither: Dither | None) -> Array:
    """A second moment likewise; what is not 0 stays above 0."""
    return _as_stored(_keep_positive(x, _rounded(x, like, dither), like), x, like)


def settle_growing(x: Array, like: Any) -> Array:
    """A running maximum likewise, but to nearest; what is not 0 stays above 0."""
    if _is_wide(like):
        return x
    nearest = low_precision.to_nearest(_saturate(x, like.dtype).astype(jnp.float32), like.dtype)
    return _as_stored(_keep_positive(x, nearest, like), x, like)


def store(x: Array, like: Any, dither: Dither | None) -> Any:
    """A moment that is settled, as `like` is stored: in codes by a `dither`, or to nearest without one."""
    if isinstance(like, QuantizedArray):
        made = quantization.encode(x.astype(jnp.float32), like.bits, like.signed, like.block_size, dither)
        return dataclasses.replace(made, size=like.size)
    return x.astype(like.dtype)


def spacing(stored: Any) -> Array | None:
    """How far apart, in float32, the numbers around a stored moment are; None where none are left out."""
    if isinstance(stored, QuantizedArray):
        return stored.spacing()
    return low_precision.spacing(stored.astype(jnp.float32), stored.dtype) if is_rounded(stored) else None


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


def precision(dtype: Any, eps: float = 1e-8, b2: float = 0.999) -> Precision:
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
    found = _dtype("dtype", dtype, _FLOATS, f"dtype must be one of {', '.join(_FLOATS)}")
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


def state_bytes(opt: Any, params: PyTree) -> int:
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


def _is_wide(stored: Any) -> bool:
    return isinstance(stored, QuantizedArray) or not low_precision.is_narrow(stored.dtype)


def _rounded(x: Array, like: Any, dither: Dither | None) -> Array:
    if _is_wide(like) or dither is None:
        return x
    return low_precision.stochastically(_saturate(x, like.dtype).astype(jnp.float32), dither, like.dtype)


def _as_stored(rounded: Array, x: Array, like: Any) -> Array:
    """`rounded` to what `like` can hold, by way of its dtype: so XLA sees that the step reads what it has stored."""
    return x if _is_wide(like) else rounded.astype(like.dtype).astype(x.dtype)


def _saturate(x: Array, dtype: np.dtype) -> Array:
    """Stay finite where float16 would overflow: its infinity would never leave the moment."""
    if dtype != jnp.float16:
        return x
    largest = float(jnp.finfo(dtype).max)
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)


def _keep_positive(x: Array, rounded: Array, like: Any) -> Array:
    """The smallest number instead of 0 where `x` is not 0: its root is a divisor."""
    if _is_wide(like):
        return rounded
    smallest = jnp.float32(low_precision.spacing_at_zero(like.dtype))
    return jnp.where((x > 0) & (rounded < smallest), smallest, rounded)
