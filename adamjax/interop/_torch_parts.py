"""The optimizers that torch has too: their parts, their hyperparameters in torch's terms, and their states."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core import trees
from adamjax._core.packing import unpacked
from adamjax._core.typing import PyTree, ScalarOrSchedule
from adamjax._transforms.adam import ScaleByAdam
from adamjax._transforms.adamax import ScaleByAdamax
from adamjax._transforms.base import AveragesParams, Wrapper
from adamjax._transforms.chain import Chain
from adamjax._transforms.groups import Groups
from adamjax._transforms.learning_rate import ScaleByLearningRate
from adamjax._transforms.packed import Packed
from adamjax._transforms.weight_decay import AddDecayedWeights, CoupledDecay
from adamjax.interop._per_parameter import PerParameter
from adamjax.interop._torch_variants import ScaleByTorchNAdam, ScaleByTorchRAdam

# Our names of state fields, and torch's.
_NAMES = {
    ScaleByAdam: {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"},
    ScaleByTorchNAdam: {"mu": "exp_avg", "nu": "exp_avg_sq", "mu_product": "mu_product"},
    ScaleByTorchRAdam: {"mu": "exp_avg", "nu": "exp_avg_sq"},
    ScaleByAdamax: {"mu": "exp_avg", "nu": "exp_inf"},
}
_TORCH = {ScaleByAdam: "Adam", ScaleByTorchNAdam: "NAdam", ScaleByTorchRAdam: "RAdam", ScaleByAdamax: "Adamax"}

ParamState = Any  # our state of one parameter: a NamedTuple with a count


class Parts(NamedTuple):
    """The parts of a chain that torch has too."""

    moments: Any
    lr: ScalarOrSchedule
    per_parameter: bool = False
    maximize: bool = False
    coupled: ScalarOrSchedule = 0.0
    decoupled: ScalarOrSchedule = 0.0

    @property
    def names(self) -> dict[str, str]:
        """Our names of the fields of the state, and torch's."""
        amsgrad = getattr(self.moments, "amsgrad", None) is not None
        return {ours: x for ours, x in _NAMES[type(self.moments)].items() if ours != "nu_max" or amsgrad}

    @property
    def torch_name(self) -> str:
        """The class in torch."""
        return f"torch.optim.{_TORCH[type(self.moments)]}"

    def group(self, count: int | None) -> dict[str, Any]:
        """Return the hyperparameters in torch's terms, at step `count`; without a count, those that are constants."""
        decoupled = not (isinstance(self.decoupled, float) and self.decoupled == 0)
        found = {
            "lr": self.lr,
            "betas": (self.moments.b1, self.moments.b2),
            "eps": self.moments.eps,
            "weight_decay": self.decoupled if decoupled else self.coupled,
            "maximize": self.maximize,
        }
        if isinstance(self.moments, ScaleByAdam):
            found["amsgrad"] = self.moments.amsgrad is not None
        if isinstance(self.moments, ScaleByTorchNAdam):
            found["momentum_decay"] = self.moments.momentum_decay
        if not isinstance(self.moments, ScaleByAdamax):
            found["decoupled_weight_decay"] = decoupled
        if count is None:
            return {name: x for name, x in found.items() if is_constant(x)}
        return {name: _at_step(name, x, count) for name, x in found.items()}


def is_constant(x: Any) -> bool:
    """Return whether the value of a hyperparameter is known: it is no schedule, and not traced."""
    return not callable(x) and not isinstance(x, jax.core.Tracer)


def _at_step(name: str, x: Any, count: int) -> Any:
    if isinstance(x, bool):
        return x
    if isinstance(x, tuple):
        return tuple(_at_step(name, one, count) for one in x)
    found = np.asarray(x(jnp.int32(count)) if callable(x) else x)
    if found.size != 1:
        raise ValueError(
            f"{name} of opt has shape {found.shape}, and torch takes one number: export each of a population"
        )
    return float(found.reshape(()))


def members(opt: Any, params: PyTree, state: PyTree) -> Iterator[tuple[Any, PyTree, PyTree]]:
    """Yield the optimizers in `opt` that torch may have, with their parameters and states."""
    if isinstance(opt, Groups):
        for row in zip(opt.members_for(params), opt.split_params(params), state, strict=True):
            yield from members(*row)
    elif isinstance(opt, AveragesParams):
        raise TypeError(
            f"torch's state has no place for the average of {opt!r}: convert the state without it, by opt.inner and "
            "state.inner"
        )
    elif isinstance(opt, Wrapper):
        yield from members(opt.inner, params, getattr(state, "inner", state))
    else:
        yield opt, params, state


def parts_of(opt: Any) -> Parts:
    """Read the parts of a chain; raise if torch has no such optimizer."""
    found: dict[str, Any] = {}
    try:
        if not isinstance(opt, Chain):
            raise TypeError("it is not one of adamjax.interop.torch")
        if len(opt.transforms) < 2:
            raise TypeError("it is another chain than moments, weight decay, learning rate")
        moments, *decay, rate = opt.transforms
        if isinstance(moments, PerParameter):
            found["per_parameter"], moments = True, moments.inner
        if isinstance(moments, CoupledDecay):
            found |= {"maximize": moments.maximize, "coupled": moments.weight_decay}
            if moments.mask is not None:
                raise TypeError("its weight decay has a mask")
            moments = moments.inner
        if isinstance(moments, Packed):
            moments = moments.inner
        if type(moments) not in _NAMES:
            raise TypeError(f"torch has nothing like {moments!r}")
        if isinstance(moments, ScaleByAdam) and (moments.nesterov or moments.amsgrad not in (None, "torch")):
            raise TypeError("torch's Adam has another Nesterov momentum, and AMSGrad in one form only")
        if getattr(moments, "eps_root", 0.0) != 0.0:
            raise TypeError("torch has no eps_root")
        if not isinstance(rate, ScaleByLearningRate) or not rate.flip_sign or len(decay) > 1:
            raise TypeError("it is another chain than moments, weight decay, learning rate")
        if decay:
            if not isinstance(decay[0], AddDecayedWeights) or decay[0].mask is not None:
                raise TypeError(f"torch has nothing like {decay[0]!r}")
            found["decoupled"] = decay[0].weight_decay
    except TypeError as error:
        raise TypeError(
            f"{opt!r} has no counterpart in torch.optim: {error}. Convert the part that torch has"
        ) from None
    return Parts(moments, rate.learning_rate, **found)


def leaves_by_path(params: PyTree) -> dict[str, Any]:
    """The parameters by path."""
    return {trees.path_of(key): leaf for key, leaf in jax.tree.leaves_with_path(params)}


def split(parts: Parts, params: PyTree, state: PyTree) -> dict[str, ParamState]:
    """Return the states of the parameters, each with a count, by path."""
    structure: Any = jax.tree.structure(params)
    if parts.per_parameter:
        return dict(zip(leaves_by_path(params), structure.flatten_up_to(state), strict=True))
    for path, leaf in leaves_by_path(params).items():
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"{path} is complex, and torch keeps a second moment for each part of it: use an optimizer of "
                "adamjax.interop.torch, which does the same"
            )
    rows = zip(*(structure.flatten_up_to(unpacked(getattr(state, name))) for name in parts.names), strict=True)
    states = [state._replace(**dict(zip(parts.names, row, strict=True))) for row in rows]
    return dict(zip(leaves_by_path(params), states, strict=True))


def merge(parts: Parts, params: PyTree, states: Mapping[str, ParamState]) -> PyTree:
    """Undo `split`, but for packing."""
    structure: Any = jax.tree.structure(params)
    if parts.per_parameter:
        return structure.unflatten(states.values())
    first = next(iter(states))
    for path, s in states.items():
        if s.count != states[first].count:
            raise ValueError(
                f"{path} has done {s.count} steps and {first} {states[first].count}, but opt has one count for "
                "all: import into an optimizer of adamjax.interop.torch, which counts for each"
            )
    columns = {name: structure.unflatten([getattr(s, name) for s in states.values()]) for name in parts.names}
    return states[first]._replace(**columns)
