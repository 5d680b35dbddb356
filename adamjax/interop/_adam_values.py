"""The moments of Adam as plain arrays, and checks that they are such that a run of Adam can have left them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core import low_precision
from adamjax._core.packing import packed_like, unpacked
from adamjax._core.quantization import is_quantized
from adamjax._transforms import moment_storage as storage
from adamjax._transforms.moments import AdamState

_TINY = float(np.finfo(np.float32).tiny)
# Moments are refused if their ratio is as many times as large as any gradients can make it: they have been rounded to
# codes, perhaps, or the decay rates have changed.
_MARGIN = 1000.0
_ALMOST = 0.99  # a maximum that was rounded down may be less than what it is the maximum of


def decoded(state: AdamState) -> AdamState:
    """Return `state` with its moments as trees of plain arrays, in float32 or wider."""
    mu, nu, nu_max = map(unpacked, state[1:])
    firsts = jax.tree.map(storage.decoded_first, mu, nu, is_leaf=is_quantized)
    seconds = jax.tree.map(storage.decoded, (nu, nu_max), is_leaf=is_quantized)
    return AdamState(state.count, *jax.tree.map(_to_float32, (firsts, *seconds)))


def _to_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if low_precision.is_low_precision(x.dtype) else x


def encoded(plain: AdamState, like: AdamState) -> AdamState:
    """Undo `decoded`: store plain moments as those of `like` are stored, in dtypes of floats."""

    def moments(x: Any, name: str) -> Any:
        to_store = getattr(like, name)
        return packed_like(to_store, jax.tree.map(lambda a, b: a.astype(b.dtype), x, unpacked(to_store)))

    return AdamState(plain.count, *(moments(x, name) for x, name in zip(plain[1:], plain._fields[1:], strict=True)))


def plain_array(x: Any, where: str) -> np.ndarray:
    """Convert a tensor of torch, or anything like an array, to a NumPy array; the message of an error says `where`."""
    try:
        if hasattr(x, "detach"):
            x = x.full_tensor() if hasattr(x, "full_tensor") else x
            x = x.detach().cpu()
            x = (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()  # NumPy has no bfloat16
        found = np.asarray(x)
    except Exception as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise TypeError(f"{where} is a {type(x).__name__}, and no plain array: convert it first ({reason})") from None
    if found.dtype.kind in "OSU":
        raise TypeError(f"{where} is {_shown(x)}, expected an array of numbers")
    is_narrow = jnp.issubdtype(found.dtype, np.floating) and low_precision.is_low_precision(found.dtype)
    return found.astype(np.float32) if is_narrow else found


def overflows(x: np.ndarray, dtype: np.dtype) -> bool:
    """Return whether a finite number of a moment is infinite in `dtype`."""
    with np.errstate(over="ignore", under="ignore"):
        return bool(np.any(np.isinf(x.astype(dtype)) & np.isfinite(x)))


def step_count(x: Any, where: str) -> int:
    """Check a count of steps."""
    if x is None or isinstance(x, (str, bytes)):
        raise TypeError(f"{where} is {_shown(x)}, expected a number of steps")
    found = plain_array(x, where)
    if found.shape != () or found.dtype.kind not in "iuf":
        raise TypeError(f"{where} is {found.dtype} of shape {found.shape}, expected one number of steps, of shape ()")
    count = float(found)
    if not (0 <= count <= np.iinfo(np.int32).max and count == int(count)):
        raise ValueError(f"{where} is {found}, expected a whole number of steps from 0 to 2147483647")
    return int(count)


def known_betas(betas: Any) -> tuple[float, float] | None:
    """Return decay rates as Python numbers; None if they are schedules, traced or those of a population."""
    try:
        b1, b2 = (float(np.asarray(b).reshape(())) for b in betas if not isinstance(b, jax.core.Tracer))
    except (TypeError, ValueError):
        return None
    return b1, b2


def check_moments(
    m: np.ndarray,
    v: np.ndarray,
    v_max: np.ndarray | None,
    names: tuple[str, str, str],
    where: str,
    betas: tuple[float, float] | None,
    is_norm: bool = False,
) -> None:
    """Check that a run of Adam can have left these moments of one parameter.

    Args:
      m, v, v_max: The moments; `v` is Adamax' norm if `is_norm`.
      names: Their names, for messages.
      where: What they belong to, for messages.
      betas: The decay rates of the run, if they are known.
      is_norm: See `v`.

    Raises:
      ValueError: It cannot; the message has the likely reason.
    """
    for x, name in zip((m, v, v_max), names, strict=True):
        if x is None:
            continue
        if not np.all(np.isfinite(x)):
            _refuse(x, ~np.isfinite(x), name + where, ": the run had diverged, or was saved in float16")
        if x is not m and np.any(x < 0):
            _refuse(x, x < 0, name + where, ", and none can be below 0: the arrays may have been mixed up")
    if v_max is not None and np.any(too_small := v_max < _ALMOST * v):
        reason = (
            f" where {names[1]} is larger, and it is the maximum of that: it was probably saved in half precision, or "
            "the arrays have been mixed up"
        )
        _refuse(v_max, too_small, names[2] + where, reason)
    if betas is None:
        return
    allowed = _largest_first_moment(v, betas, is_norm)
    if allowed is None or not np.any(too_large := np.abs(m) > allowed):
        return
    if np.any(lost := too_large & (v == 0)):
        reason = (
            f" where {names[0]} is not, which no gradients give: it was probably saved in half precision, where small "
            "squares are 0. Save the moments in float32, or start with opt.init(params)"
        )
        _refuse(v, lost, names[1] + where, reason)
    m_there = m[tuple(np.argwhere(too_large)[0])]
    reason = (
        f" where {names[0]} is {m_there:.3g}, more than any gradients give: the arrays may have been scaled or mixed up"
    )
    _refuse(v, too_large, names[1] + where, reason)


def _largest_first_moment(v: np.ndarray, betas: tuple[float, float], is_norm: bool) -> np.ndarray | None:
    """The largest first moment beside these second ones, with a margin; None if there is no limit.

    By the inequality of Cauchy and Schwarz, m**2 is at most (1 - b1)**2 / (1 - b2) / (1 - b1**2 / b2) times v, and m at
    most (1 - b1) / (1 - b1 / b2) times the norm of Adamax. What has underflowed in v on the way is added.
    """
    b1, b2 = betas
    decay = b1 / b2 if is_norm and b2 > 0 else b1**2 / b2 if b2 > 0 else 1.0
    if not (0 <= b1 < 1 and 0 <= b2 < 1 and decay < 1):
        return None
    if is_norm:
        return _MARGIN * (1 - b1) / (1 - decay) * (v + 2 * _TINY)
    return _MARGIN * (1 - b1) / ((1 - b2) * (1 - decay)) ** 0.5 * np.sqrt(v + 2 * _TINY / (1 - b2))


def _refuse(x: np.ndarray, bad: np.ndarray, name: str, reason: str) -> None:
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    at = f" at {list(first)}" if first else ""
    more = f" and at {np.count_nonzero(bad) - 1} more" if np.count_nonzero(bad) > 1 else ""
    raise ValueError(f"{name} is {x[first]:.3g}{at}{more}{reason}")


def _shown(x: Any) -> str:
    return repr(x) if len(repr(x)) < 40 else f"a {type(x).__name__}"
