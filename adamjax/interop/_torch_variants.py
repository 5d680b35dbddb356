"""RAdam and NAdam as torch.optim has them: what differs from ours."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax import Array

from adamjax._core import checks, trees
from adamjax._core.numerics import Decay, abs2, correction, decay, divide, mix, sqrt
from adamjax._core.trees import PyTree
from adamjax._core.value import value
from adamjax._transforms.adam import Parts, epsilon
from adamjax._transforms.base import Extra, Transformation
from adamjax._transforms.moments import AdamState, Keep, Moments, Step
from adamjax._transforms.radam import RAdamScalars, ScaleByRAdam


@value
class ScaleByTorchRAdam(ScaleByRAdam):
    """RAdam whose eps is added to the root of the uncorrected second moment, and whose gate is rho > 5."""

    threshold: Any = math.nextafter(5.0, 6.0)

    def _scalars(self, t: Array) -> RAdamScalars:
        scalars = super()._scalars(t)
        return scalars._replace(adam=scalars.adam._replace(eps=scalars.adam.eps / jnp.sqrt(scalars.adam.c2)))


class NAdamState(NamedTuple):
    """State of torch's NAdam, for one parameter.

    Fields:
      count: int32 scalar, the number of its steps.
      mu: First moment.
      nu: Second moment.
      mu_product: The product of the rates of the first moment so far; float32 as in torch, whatever the parameter.
    """

    count: Array  # type: ignore[assignment]  # tuple.count, which nobody counts with
    mu: PyTree
    nu: PyTree
    mu_product: Array


jax.export.register_namedtuple_serialization(NAdamState, serialized_name="adamjax.NAdamState")


class NAdamScalars(NamedTuple):
    decay1: Decay
    decay2: Decay
    c2: Any
    eps: Any
    of_g: Array
    of_m: Array


def torch_nadam_step(g: Array, m: Array, v: Array, v_max: None, s: NAdamScalars, keep: Keep) -> Step:
    """One step of one array (Dozat, 2016, with his schedule of the momentum)."""
    m, v = keep.mu(mix(m, g, s.decay1)), keep.nu(mix(v, abs2(g), s.decay2))
    return divide(s.of_g * g + s.of_m * m, sqrt(v / s.c2) + s.eps), m, v, None


@value
class _NAdamMoments(Moments):
    """The moments of one step, given the product of the rates up to and with it."""

    b1: Any
    b2: Any
    eps: Any
    momentum_decay: Any
    product: Any
    mu_dtype = nu_dtype = None

    def _rule(self) -> tuple[Callable[..., Step], tuple[Any, ...]]:
        return torch_nadam_step, ()

    def _scalars(self, t: Array) -> NAdamScalars:
        decay2, product = decay("b2", self.b2, t.dtype), self.product.astype(t.dtype)
        now, following = rate(self, t), rate(self, t + 1)
        return NAdamScalars(
            decay("b1", self.b1, t.dtype),
            decay2,
            correction(t, decay2),
            epsilon(self.eps, t.dtype),
            (1 - now) / (1 - product),
            following / (1 - product * following),
        )


def rate(opt: Any, t: Array) -> Array:
    """mu_t, with which the first moment of step t counts."""
    b1, momentum_decay = (checks.scalar(n, getattr(opt, n), t.dtype) for n in ("b1", "momentum_decay"))
    return b1 * (1 - 0.5 * jnp.exp(t * momentum_decay * math.log(0.96)))


@value
class ScaleByTorchNAdam(Transformation):
    """NAdam with a schedule of the momentum, as in torch.optim.NAdam."""

    b1: Any
    b2: Any
    eps: Any
    momentum_decay: Any

    def __post_init__(self) -> None:
        self._check_numbers("b1", "b2", below=1.0)
        self._check_numbers("eps", "momentum_decay")

    def _moments(self, product: Any) -> _NAdamMoments:
        return _NAdamMoments(self.b1, self.b2, self.eps, self.momentum_decay, product)

    def parts(self, m: Array, v: Array, v_max: None, t: Array) -> Parts:
        """For who wants to see them: the two moments, without the part that the gradient itself has."""
        c1, c2 = (correction(t, decay(name, getattr(self, name), t.dtype)) for name in ("b1", "b2"))
        return Parts(divide(m, c1), sqrt(v / c2), epsilon(self.eps, t.dtype))

    def _init(self, params: PyTree) -> NAdamState:
        count, mu, nu, _ = self._moments(None)._init(params)
        return NAdamState(count, mu, nu, trees.fresh(lambda: jnp.ones((), jnp.float32), params))

    def _update(self, updates: PyTree, state: PyTree, params: PyTree | None, extra: Extra) -> tuple[PyTree, NAdamState]:
        checks.state(state, NAdamState, "torch's NAdam")
        t = trees.increment(state.count).astype(jnp.result_type(float))
        product = state.mu_product * rate(self, t).astype(state.mu_product.dtype)
        adam = AdamState(state.count, state.mu, state.nu)
        direction, (count, mu, nu, _) = self._moments(product)._update(updates, adam, params, extra)
        return direction, NAdamState(count, mu, nu, product)
