"""Turn figures into findings: the problem, its place, its size and the remedy."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from adamjax.diagnostics._measure import AdamStats, LeafStats, check_stats

ALL = "all parameters"
ROUNDING_ERROR = 1e-5  # of gradients in float32, relative to those of the terms that cancel


class Finding(NamedTuple):
    """One problem.

    Fields:
      severity: "error" if the run cannot succeed, "warning" if training suffers.
      rule: The name of the rule that found it, such as "eps".
      path: The path of the parameter, or "all parameters".
      figure: The number that the rule looked at.
      message: The problem, in words.
      remedy: The advice.
    """

    severity: str
    rule: str
    path: str
    figure: float
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.message}: {self.remedy}"


class Series(NamedTuple):
    """The figures of a parameter, or of all together, over time: float64[number of measurements] each."""

    path: str
    shape: tuple[int, ...] | None
    dtype: str
    counts: np.ndarray
    of: LeafStats

    def usual(self, name: str) -> float:
        """Return the median over time of the figure `name`, ignoring NaN."""
        x = getattr(self.of, name)
        x = x[~np.isnan(x)]
        return float(np.median(x)) if len(x) else math.nan


def series(stats: Iterable[AdamStats]) -> tuple[Series, list[Series]]:
    """Return the series of all parameters together, and of each parameter."""
    measured = [jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(check_stats(x))) for x in stats]
    if not measured:
        raise ValueError("nothing has been measured: pass what measure returned, or several of them")
    first = measured[0]
    for x in measured:
        if np.ndim(x.count):
            raise ValueError(
                f"these figures are of {np.shape(x.count)} runs at once: take those of one, by jax.tree.map"
            )
        if x.paths != first.paths:
            raise ValueError(f"figures of other parameters: {', '.join(x.paths)} after {', '.join(first.paths)}")
    dtype = first.dtypes[0] if len(set(first.dtypes)) == 1 else "mixed"
    over_time = jax.tree.map(lambda *x: np.stack(x), *measured)
    leaves = [
        Series(path, first.shapes[i], first.dtypes[i], over_time.count, LeafStats(*(x[:, i] for x in over_time.leaves)))
        for i, path in enumerate(first.paths)
    ]
    return Series(ALL, None, dtype, over_time.count, over_time.overall), leaves


def explain(stats: AdamStats | Iterable[AdamStats]) -> list[Finding]:
    """Explain in words what is wrong with a run.

    With many measurements, the rules look at the median over time, so that an unusual start or end does not count.

    | rule | condition |
    |---|---|
    | nonfinite | a gradient is NaN or infinite |
    | no_gradient | the gradients of a parameter are all 0 |
    | underflow | a third of the gradients of a float16 parameter are 0 |
    | rounding | rounding to the parameters' dtype discards a third of the updates |
    | eps | eps is larger than the root of the second moment for half of the elements |
    | zero_but_for_rounding | the same, but the gradients are below 1e-5 of those of a larger parameter beside it |
    | rate_high | an update is more than a tenth of the parameters, or the first one more than a third |
    | rate_low | no update is more than 1e-5 of the parameters |
    | warm_up | the run has at least 100 steps, but less than a fifteenth of the window of b2 |
    | uphill | updates point uphill |
    | storage | storing the moments in few bits changes the direction by half |

    Args:
      stats: The result of `measure`, or those of several steps of one run; a `History`.

    Returns:
      The findings, errors first; an empty list if all is well.

    Raises:
      ValueError: `stats` is empty, or has figures of different parameters or of several runs at once.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.adam(1e-3)
    >>> params = {"w": jnp.ones(4)}
    >>> grads = {"w": jnp.array([1e-9, 2e-9, -1e-9, 1e-9])}
    >>> updates, state = opt.update(grads, opt.init(params), params)
    >>> for finding in adamjax.diagnostics.explain(adamjax.diagnostics.measure(grads, updates, state, params)):
    ...     print(finding)
    warning: eps (1e-08) dominates 100 % of w, whose gradients are about 1e-09: lower eps, or scale the loss
    """
    overall, leaves = series(stats if isinstance(stats, Iterable) else [stats])
    findings = []
    for name, rule in RULES.items():
        severity = "error" if name in _ERRORS else "warning"
        findings += _limited([Finding(severity, name, *found) for found in rule(overall, leaves)])
    return sorted(findings, key=lambda finding: finding.severity)


def _limited(found: list[Finding], most: int = 5) -> list[Finding]:
    """Sum up the findings beyond the first `most`, so that a thousand parameters do not give a thousand lines."""
    rest = found[most:]
    if len(rest) < 2:
        return found
    others = f"{len(rest)} other parameters"
    return [*found[:most], rest[0]._replace(path=others, message=f"the same holds for {others} ({rest[0].rule})")]


Found = Iterator[tuple[str, float, str, str]]  # path, figure, message and remedy of each finding of a rule


def _nonfinite(overall: Series, leaves: list[Series]) -> Found:
    for leaf in leaves:
        bad = leaf.of.nonfinite_gradients > 0
        if bad.any():
            times, first = f"{bad.sum()} of {len(bad)}", int(leaf.counts[np.argmax(bad)])
            message = f"the gradient of {leaf.path} was not finite in {times} measured steps, first at step {first}"
            remedy = (
                "wrap the optimizer in skip_nonfinite (float16: dynamic_loss_scale), and look for a division by 0 "
                "or a logarithm of it in the loss"
            )
            yield leaf.path, float(bad.mean()), message, remedy


def _uphill(overall: Series, leaves: list[Series]) -> Found:
    cosine = overall.usual("cosine")
    if cosine > 0.2:
        message = f"updates point uphill: the cosine of their angle to the gradient is {cosine:.2f}"
        remedy = "leave out maximize=True, or one of two changes of sign in the chain"
        yield overall.path, cosine, message, remedy


def _no_gradient(overall: Series, leaves: list[Series]) -> Found:
    for leaf in leaves:
        if np.all(leaf.of.zero_gradients == 1) and leaf.dtype != "float16":
            message = f"{leaf.path} never got a gradient but 0"
            remedy = (
                "connect it to the loss (no stop_gradient, no rounding, no saturated activation before it), make its "
                "gradient None, or leave it out if the loss cannot depend on it"
            )
            yield leaf.path, 1.0, message, remedy


def _underflow(overall: Series, leaves: list[Series]) -> Found:
    for leaf in leaves:
        zero = leaf.usual("zero_gradients")
        if leaf.dtype == "float16" and zero > 1 / 3:
            message = f"{_percent(zero)} of the gradients of {leaf.path} are 0: float16 has nothing below 6e-08"
            yield leaf.path, zero, message, "scale the loss: dynamic_loss_scale"


def _rounding(overall: Series, leaves: list[Series]) -> Found:
    for leaf, share in _worst(leaves, "lost", above=1 / 3):
        message = f"rounding to {leaf.dtype} discards {_percent(share)} of the updates of {leaf.path}"
        low = leaf.dtype in ("bfloat16", "float16")
        remedy = "use stochastic_rounding, kahan or master_weights" if low else "raise the learning rate"
        yield leaf.path, share, message, remedy


def _zero_but_for_rounding(overall: Series, leaves: list[Series]) -> Found:
    for leaf, _ in _worst(leaves, "eps_dominated", above=0.5):
        if (other := _far_above(leaf, leaves)) is not None:
            size = _gradient(leaf)
            message = (
                f"the gradients of {leaf.path}, about {size:.0e}, are rounding errors of 0: those of {other.path} are "
                f"{_gradient(other) / size:.0e} times as large"
            )
            remedy = (
                "leave it out if the loss cannot depend on it, as on a bias before a normalization or on that of "
                "the keys in attention; it does no harm"
            )
            yield leaf.path, size, message, remedy


def _gradient(leaf: Series) -> float:
    """Return the usual root mean square of the gradients."""
    return leaf.usual("gradient_norm") / math.sqrt(leaf.of.size[-1])


def _far_above(leaf: Series, leaves: list[Series]) -> Series | None:
    """Return a neighbour whose gradients say that those of `leaf` are rounding errors; None if there is none.

    Neighbours are the larger parameters of the same layer, or else of the closest that has any. The one with the
    smallest gradients counts, so that gradients that vanish with depth are not taken for rounding errors.
    """
    keys = leaf.path.split("/")
    for depth in range(len(keys) - 1, -1, -1):
        near = [x for x in leaves if x.path.split("/")[:depth] == keys[:depth] and x.of.size[-1] > leaf.of.size[-1]]
        if near:
            least = min(near, key=_gradient)
            return least if _gradient(leaf) < ROUNDING_ERROR * _gradient(least) else None
    return None


def _eps(overall: Series, leaves: list[Series]) -> Found:
    for leaf, share in _worst(leaves, "eps_dominated", above=0.5):
        if _far_above(leaf, leaves) is not None:
            continue
        eps, gradient = leaf.of.eps[-1], _gradient(leaf)
        message = (
            f"eps ({eps:.0e}) dominates {_percent(share)} of {leaf.path}, whose gradients are about {gradient:.0e}"
        )
        yield leaf.path, share, message, "lower eps, or scale the loss"


def _rate_high(overall: Series, leaves: list[Series]) -> Found:
    # Look at matrices and at all parameters together: biases start at 0, where any step is relatively large.
    for one in [overall, *(leaf for leaf in leaves if len(leaf.shape or ()) > 1)]:
        ratio = one.usual("update_ratio")
        if one.counts[0] == 1 and 0.3 < one.of.update_ratio[0] < math.inf:
            ratio = float(one.of.update_ratio[0])  # later ratios are smaller: steps that are too long inflate params
        if ratio > 0.1:
            times = "" if math.isinf(ratio) else f" about {_round(ratio / 1e-3)}x"
            message = (
                f"an update is {ratio:.2g} of {one.path}, where 0.001 is usual: the learning rate is{times} too high"
            )
            yield one.path, ratio, message, "lower it, or warm up"
            return


def _rate_low(overall: Series, leaves: list[Series]) -> Found:
    ratio = float(np.max(overall.of.update_ratio, initial=0, where=~np.isnan(overall.of.update_ratio)))
    if 0 < ratio < 1e-5:
        message = (
            f"no update is more than {ratio:.0e} of the parameters, where 0.001 is usual: "
            f"the learning rate is about {_round(1e-3 / ratio)}x too low"
        )
        yield overall.path, ratio, message, "raise it"


def _warm_up(overall: Series, leaves: list[Series]) -> Found:
    steps, b2 = int(overall.counts[-1]), float(overall.of.b2[-1])
    needed = 1 / (1 - b2) if b2 < 1 else math.inf
    if 100 <= steps < needed / 15:  # too few steps to judge below 100
        wanted = f"b2={b2:.7g} needs about {_round(needed)} steps, the run has {steps}"
        message = f"the second moment has not warmed up: {wanted}"
        remedy = f"lower b2 (to {1 - 1 / max(steps / 10, 2):.3g}, say), or train longer"
        yield overall.path, steps / needed, message, remedy


def _storage(overall: Series, leaves: list[Series]) -> Found:
    for leaf, change in _worst(leaves, "storage_error", above=0.5):
        message = f"storing the moments of {leaf.path} changes its direction by {_percent(change)}"
        remedy = (
            "keep them in more bits (bfloat16 in place of float16), or in smaller blocks (quantized(..., block_size=), "
            "or keep=)"
        )
        yield leaf.path, change, message, remedy


RULES: dict[str, Callable[[Series, list[Series]], Found]] = {
    "nonfinite": _nonfinite,
    "uphill": _uphill,
    "no_gradient": _no_gradient,
    "underflow": _underflow,
    "rounding": _rounding,
    "zero_but_for_rounding": _zero_but_for_rounding,
    "eps": _eps,
    "rate_high": _rate_high,
    "rate_low": _rate_low,
    "warm_up": _warm_up,
    "storage": _storage,
}
_ERRORS = ("nonfinite", "uphill")  # the others are warnings


def _worst(leaves: list[Series], name: str, above: float) -> list[tuple[Series, float]]:
    """Return the series whose median is above a bound, with that, the largest first."""
    found = [(leaf, x) for leaf in leaves if (x := leaf.usual(name)) > above]
    return sorted(found, key=lambda row: -row[1])


def _percent(x: float) -> str:
    return f"{100 * x:.0f} %"


def _round(x: float) -> str:
    return f"{float(f'{x:.0e}'):.0f}"
