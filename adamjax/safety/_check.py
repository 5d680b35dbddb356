"""A look at a state on the host: whether training has gone wrong, and how many steps were skipped."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks, trees
from adamjax._core.typing import PyTree
from adamjax._transforms.eval_params import averaging_arrays
from adamjax._transforms.moments import find_moments
from adamjax.safety._nonfinite import SkipState
from adamjax.safety._skipping import MAX_OF_SCALE
from adamjax.safety._spikes import SpikeState


def check(state: PyTree) -> None:
    """Raise if training has gone wrong, as far as a state shows it.

    Call it on the host, now and then: it waits for the device.

    Args:
      state: A state that `init` or `update` returned, or any tree that holds one; also with a leading axis of
        devices or of a population.

    Raises:
      FloatingPointError: `max_consecutive` steps in a row were skipped (the message has the counts,
        and the parameters whose gradients were not finite), or a moment or an average is NaN or infinite (its path).

    Warns:
      UserWarning: No `max_consecutive` was given, and 25 steps in a row or more were skipped just now.

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.skip_nonfinite(adamjax.adam(), max_consecutive=2)
    >>> params = {"kernel": jnp.ones(2)}
    >>> state = opt.init(params)
    >>> for _ in range(2):
    ...     params, state = opt.step({"kernel": jnp.array([1.0, jnp.inf])}, state, params)
    >>> try:
    ...     adamjax.check(state)
    ... except FloatingPointError as error:
    ...     print(str(error)[:58])
    2 steps were skipped, at least max_consecutive of them in
    """
    check_skipped(state)
    for path, node in [*find_moments(state), *averaging_arrays(state)]:
        for below, x in jax.tree.leaves_with_path(node):
            if jnp.issubdtype(jnp.result_type(x), jnp.inexact) and not jnp.all(jnp.isfinite(x)):
                raise FloatingPointError(
                    f"the state is not finite at {trees.path_of((*path, *below))}, and never will be again: a "
                    "gradient was not. Start from an earlier state, with adamjax.skip_nonfinite around the optimizer"
                )


def check_skipped(state: PyTree) -> None:
    """Raise if too many steps were skipped: the part of `check` that costs nothing."""
    for found in _skip_states(state):
        if np.any(found.exceeded):
            raise FloatingPointError(_message(found, True))
        if np.max(found.consecutive) >= MAX_OF_SCALE:
            warnings.warn(_message(found, False), stacklevel=3)


def was_skipped(state: PyTree) -> Array:
    """Return, as a bool scalar, whether the step that led to this state was skipped; it can be traced."""
    return jnp.any(jnp.stack([jnp.any(found.consecutive > 0) for found in _skip_states(state)]))


def skipped(state: PyTree) -> int | None:
    """Return how many steps were skipped by wrappers of this module; None if the state has none of them."""
    totals = [int(np.max(found.skipped)) + (skipped(found.inner) or 0) for found in _outermost(state)]
    return max(totals, default=None)


def _skip_states(state: PyTree) -> list[SkipState | SpikeState]:
    """The states of all wrappers that skip, those inside of others too."""
    return [x for found in _outermost(state) for x in (found, *_skip_states(found.inner))]


def _outermost(state: PyTree) -> list[SkipState | SpikeState]:
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SkipState | SpikeState))
    return [x for x in nodes if isinstance(x, SkipState | SpikeState)]


def _message(state: SkipState | SpikeState, exceeded: bool) -> str:
    now = f"({np.max(state.consecutive)} just now)"
    if isinstance(state, SpikeState):
        reason = (
            "more than max_consecutive of them in a row {}: gradients or losses are not finite. Put "
            "adamjax.skip_nonfinite around skip_spikes to learn of which parameters"
            if exceeded
            else "many in a row {}: the norm of the gradients or the loss is far above its mean, or not finite. "
            "Lower the learning rate, or give max_consecutive to accept a level that has risen for good"
        )
        return f"{np.max(state.skipped)} steps were skipped, {reason.format(now)}"
    counts = np.asarray(state.nonfinite.counts)
    counts = counts.reshape(-1, counts.shape[-1]).max(axis=0)
    where = checks.listed(
        f"{state.nonfinite.paths[i] or 'the parameter'} at {counts[i]}" for i in np.argsort(-counts) if counts[i]
    )
    many = "at least max_consecutive of them" if exceeded else "many"
    return (
        f"{np.max(state.skipped)} steps were skipped, {many} in a row {now}: the gradients are not finite of {where}. "
        "Lower the learning rate, clip, or look for a division by 0 or the logarithm of one in the loss"
    )
