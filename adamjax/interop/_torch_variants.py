"""RAdam and NAdam as torch.optim has them: what differs from ours."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamjax._core import checks, trees
from adamjax._core.numerics import bias_correction, decay
from adamjax._core.trees import Leaves
from adamjax._core.typing import PyTree, Scalar
from adamjax._core.value import precise_field, value
from adamjax._transforms.adam import AdamRule, AdamScalars, epsilon
from adamjax._transforms.base import Leafwise
from adamjax._transforms.leafwise import LeafTransform
from adamjax._transforms.moments import AdamState, Moments, Parts, StepMoments
from adamjax._transforms.radam import ScaleByRAdam


@value
class ScaleByTorchRAdam(ScaleByRAdam):
    """RAdam whose eps is added to the root of the uncorrected second moment, and whose gate is rho > 5."""

    threshold: Scalar = math.nextafter(5.0, 6.0)

    def _scalars(self, t: Array) -> AdamScalars:
        scalars = super()._scalars(t)
        return scalars._replace(eps=scalars.eps / jnp.sqrt(scalars.c2))


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


class TorchNAdamRule(AdamRule):
    """The step of one array (Dozat, 2016, with his schedule of the momentum)."""

    def m_hat(self, g: Array, m: Array, s: Any) -> Array:
        """The first moment, with a look ahead and without its bias."""
        grad_weight, moment_weight = s.extra
        return grad_weight * g + moment_weight * m


@value
class _NAdamMoments(Moments):
    """The moments of one step of `opt`, given the product of the rates up to and with it."""

    opt: Any
    product: Any
    mu_dtype = nu_dtype = None

    @property
    def rule(self) -> TorchNAdamRule:
        return TorchNAdamRule()

    def _scalars(self, t: Array) -> AdamScalars:
        decay1, decay2 = decay(self.opt, "b1", t.dtype), decay(self.opt, "b2", t.dtype)
        product, now, following = self.product.astype(t.dtype), self.opt.rate(t), self.opt.rate(t + 1)
        c1, c2 = bias_correction(t, decay1), bias_correction(t, decay2)
        weights = (1 - now) / (1 - product), following / (1 - product * following)
        return AdamScalars(decay1, decay2, c1, None, c2, epsilon(self.opt.eps, decay2), np.zeros((), t.dtype), weights)


@value
class ScaleByTorchNAdam(Leafwise):
    """NAdam with a schedule of the momentum, as in torch.optim.NAdam."""

    b1: Scalar = precise_field()
    b2: Scalar = precise_field()
    eps: Scalar
    momentum_decay: Scalar

    def __post_init__(self) -> None:
        self._check_numbers("b1", "b2", below=1.0)
        self._check_numbers("eps", "momentum_decay")

    def rate(self, t: Array) -> Array:
        """mu_t, with which the first moment of step t counts."""
        b1, momentum_decay = (checks.as_scalar(n, getattr(self, n), t.dtype) for n in ("b1", "momentum_decay"))
        return b1 * (1 - 0.5 * jnp.exp(t * momentum_decay * math.log(0.96)))

    def parts(self, m: Array, v: Array, v_max: None, t: Array) -> Parts:
        return _NAdamMoments(self, jnp.zeros_like(t)).parts(m, v, v_max, t)

    def _init(self, params: PyTree) -> NAdamState:
        count, mu, nu, _ = _NAdamMoments(self, None)._init(params)
        return NAdamState(count, mu, nu, trees.make_on_mesh_of(lambda: jnp.ones((), jnp.float32), params))

    def _leaf_transforms(self, updates: Leaves, state: PyTree, params: Leaves | None) -> list[LeafTransform]:
        state = checks.state(state, NAdamState, "torch's NAdam")
        t = trees.increment(state.count).astype(jnp.result_type(float))
        product = state.mu_product * self.rate(t).astype(state.mu_product.dtype)
        moments = _NAdamMoments(self, product)
        columns = moments._columns(updates, AdamState(state.count, state.mu, state.nu))
        step = StepMoments.of(moments, state.count, columns, lambda column: updates.like(column).tree)

        def finish(*new: list[Any]) -> NAdamState:
            count, mu, nu, _ = step.finish(*new)
            return NAdamState(count, mu, nu, product)

        return [replace(step, finish=finish)]
