"""Convert states of torch.optim's Adam family to adamjax and back."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core import checks, trees
from adamjax._core.optional import require
from adamjax._core.typing import GradientTransformation, PyTree, ScalarOrSchedule
from adamjax._transforms.adam import ScaleByAdam
from adamjax._transforms.adamax import ScaleByAdamax
from adamjax._transforms.base import as_transformation
from adamjax._transforms.chain import Chain
from adamjax._transforms.groups import Groups
from adamjax._transforms.learning_rate import ScaleByLearningRate
from adamjax._transforms.schedule import ScheduleState
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
_MOMENTS = ("mu", "nu", "nu_max")

StateDict = Mapping[str, Any] | str | Path
Order = list[str] | None
Convert = Callable[[str, np.ndarray], np.ndarray] | None
Entry = Mapping[str, Any]  # torch's state of one parameter
Entries = Mapping[str, Entry]  # by our paths
ParamGroups = Sequence[Mapping[str, Any]] | None
ParamState = Any  # our state of one parameter: a NamedTuple with a count


class _Parts(NamedTuple):
    """The parts of a chain that torch has too."""

    moments: Any
    lr: ScalarOrSchedule
    per_parameter: bool = False
    maximize: bool = False
    coupled: ScalarOrSchedule = 0.0
    decoupled: ScalarOrSchedule = 0.0

    @property
    def names(self) -> dict[str, str]:
        amsgrad = getattr(self.moments, "amsgrad", None) is not None
        return {ours: x for ours, x in _NAMES[type(self.moments)].items() if ours != "nu_max" or amsgrad}

    @property
    def torch_name(self) -> str:
        return _TORCH[type(self.moments)]


def import_state(
    opt: GradientTransformation, params: PyTree, state_dict: StateDict, *, order: Order = None, convert: Convert = None
) -> PyTree:
    """Convert the state of a run of torch.optim to one with which `opt` continues it.

    Args:
      opt: An optimizer of `adamjax.interop.torch`; or `adamjax.adam`, `adamw`, `amsgrad` or `adamax`, with options that
        torch has too, if all parameters have done the same number of steps; or `adamjax.groups` of such optimizers.
      params: The parameters, or `jax.ShapeDtypeStruct`s.
      state_dict: The result of torch's `optimizer.state_dict()`, with all its groups; NumPy arrays may replace its
        tensors. Or the path of a file: written by `torch.save`, or safetensors with keys such as "state.0.exp_avg".
      order: The paths ("layer_0/kernel") of the parameters in torch's order, group after group. None:
        the order of the leaves of `params`; for `adamjax.groups`, member after member.
      convert: A function of path and array that converts each of torch's moments to the layout of `params`,
        such as `lambda path, x: x.T if path.endswith("kernel") else x`.

    Returns:
      The state. A parameter without state in torch, because it never had a gradient, starts from zero.

    Raises:
      ValueError, TypeError: The two do not fit: another optimizer, too many or too few parameters, another
        shape, wider numbers, or step counts that differ if `opt` has only one. The message names the path.
      ImportError: A file is given, and torch or safetensors is not installed.
    """
    state_dict = _read(state_dict)
    as_transformation(opt, "argument opt of import_state")
    params = trees.concrete(params)
    start = opt.init(params)
    entries = _entries(state_dict, _places(opt, params, start, order))
    return _imported(opt, params, start, entries, state_dict.get("param_groups"), convert)


def _imported(
    opt: Any, params: PyTree, start: PyTree, entries: Entries, groups: ParamGroups, convert: Convert
) -> PyTree:
    if isinstance(opt, Groups):
        rows = zip(opt.members_for(params), opt.split_params(params), start, strict=True)
        return tuple(_imported(*row, entries, groups, convert) for row in rows)
    parts = _parts(opt)
    states = _split(parts, params, start[0])
    entries = {path: entries[path] for path in states if path in entries}
    _check_names(parts, entries, groups)
    states |= {path: _filled(parts, path, states[path], entry, convert) for path, entry in entries.items()}
    count = jnp.int32(max((int(s.count) for s in states.values()), default=0))
    rest = [ScheduleState(count) if isinstance(s, ScheduleState) else s for s in start[1:]]
    return (_merge(parts, params, states) if states else start[0], *rest)


def export_state(
    opt: GradientTransformation, params: PyTree, state: PyTree, *, order: Order = None, convert: Convert = None
) -> dict[str, Any]:
    """Convert a state of `opt` to a `state_dict` with which torch's optimizer continues the run.

    Args:
      opt, params, order: As for `import_state`.
      state: The state of `opt`.
      convert: A function of path and array that converts each moment to torch's layout.

    Returns:
      A dict with "state" and "param_groups", of torch tensors. There is one group, or one for each member of
      `adamjax.groups`, with its hyperparameters; the value of a schedule is that of the next step.

    Raises:
      TypeError, ValueError: torch has no such optimizer, or `state` does not belong to `params`.
      ImportError: torch is not installed.
    """
    torch = require("torch", "torch", "exporting to torch")
    checks.parameters(params)
    start = jax.eval_shape(as_transformation(opt, "argument opt of export_state").init, params)
    checks.same_structure(state, start, "state")
    places = {path: i for i, path in enumerate(_places(opt, params, state, order))}
    exported: dict[int, dict[str, Any]] = {}
    groups = []
    for member, part, s in _members(opt, params, state):
        parts, leaves = _parts(member), _leaves(part)
        states = _split(parts, part, s[0])
        for path, one in states.items():
            if int(one.count) == 0:
                continue
            exported[places[path]] = entry = {"step": torch.tensor(float(one.count))}
            for ours, theirs in parts.names.items():
                x = np.array(getattr(one, ours))
                if ours in _MOMENTS:
                    x = x[..., 0] + 1j * x[..., 1] if jnp.iscomplexobj(leaves[path]) else x
                    x = x if convert is None else np.asarray(convert(path, x))
                entry[theirs] = torch.from_numpy(x.copy())
        count = max((int(one.count) for one in states.values()), default=0)
        groups.append(_group(parts, count) | {"params": sorted(places[path] for path in states)})
    return {"state": dict(sorted(exported.items())), "param_groups": groups}


def _members(opt: Any, params: PyTree, state: PyTree) -> list[tuple[Any, PyTree, PyTree]]:
    """Return the optimizers in `opt`, with their parameters and states."""
    if not isinstance(opt, Groups):
        return [(opt, params, state)]
    rows = zip(opt.members_for(params), opt.split_params(params), state, strict=True)
    return [found for row in rows for found in _members(*row)]


def _parts(opt: Any) -> _Parts:
    """Read the parts of a chain; raise if torch has no such optimizer."""
    found: dict[str, Any] = {}
    try:
        if not isinstance(opt, Chain):
            raise TypeError("it is not one of adamjax.interop.torch")
        moments, *decay, rate = opt.transforms
        if isinstance(moments, PerParameter):
            found["per_parameter"], moments = True, moments.inner
        if isinstance(moments, CoupledDecay):
            found |= {"maximize": moments.maximize, "coupled": moments.weight_decay}
            if moments.mask is not None:
                raise TypeError("its weight decay has a mask")
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
        raise TypeError(f"{opt!r} has no counterpart in torch.optim: {error}") from None
    return _Parts(moments, rate.learning_rate, **found)


def _leaves(params: PyTree) -> dict[str, Any]:
    return {trees.path_of(key): leaf for key, leaf in jax.tree.leaves_with_path(params)}


def _split(parts: _Parts, params: PyTree, state: PyTree) -> dict[str, ParamState]:
    """Return the states of the parameters, each with a count, by path."""
    structure: Any = jax.tree.structure(params)
    if parts.per_parameter:
        return dict(zip(_leaves(params), structure.flatten_up_to(state), strict=True))
    for path, leaf in _leaves(params).items():
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"{path} is complex, and torch keeps a second moment for each part of it: use an optimizer of "
                "adamjax.interop.torch, which does the same"
            )
    rows = zip(*(structure.flatten_up_to(getattr(state, name)) for name in parts.names), strict=True)
    states = [state._replace(**dict(zip(parts.names, row, strict=True))) for row in rows]
    return dict(zip(_leaves(params), states, strict=True))


def _merge(parts: _Parts, params: PyTree, states: dict[str, ParamState]) -> PyTree:
    """Undo `_split`."""
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


def _places(opt: Any, params: PyTree, state: PyTree, order: Order) -> list[str]:
    """Return the paths of the parameters in torch's order: by default that of the leaves, member after member."""
    paths = [path for _, part, _ in _members(opt, params, state) for path in _leaves(part)]
    if order is None:
        return paths
    order = list(order)
    for path in order:
        if path not in paths:
            raise ValueError(f"order names {path!r}, which is no parameter; those are {', '.join(paths)}")
    for path in paths:
        if order.count(path) != 1:
            raise ValueError(f"order names {path!r} {order.count(path)} times: it must name each parameter once")
    return order


def _read(state_dict: StateDict) -> Mapping[str, Any]:
    """Load a state_dict from a file, if it is a path, and nest it if its keys are flat."""
    if isinstance(state_dict, (str, Path)):
        if Path(state_dict).suffix == ".safetensors":
            state_dict = require("safetensors.numpy", "torch", "reading a safetensors file").load_file(state_dict)
        else:
            torch = require("torch", "torch", "reading a file of torch")
            state_dict = torch.load(state_dict, map_location="cpu", weights_only=True)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}, expected what optimizer.state_dict() returns")
    if "state" in state_dict:
        return state_dict
    if stray := [key for key in state_dict if "." not in str(key)]:
        raise ValueError(
            f'the state_dict has {", ".join(map(repr, stray))}, and no "state": give the part of it that '
            "optimizer.state_dict() returned"
        )
    nested: dict[Any, dict[str, Any]] = {}
    for key, x in state_dict.items():
        *_, parameter, name = ("state", *str(key).split("."))
        nested.setdefault(int(parameter) if parameter.isdigit() else parameter, {})[name] = x
    return {"state": nested}


def _entries(state_dict: Mapping[str, Any], places: list[str]) -> Entries:
    groups = state_dict.get("param_groups")
    indices = [i for group in groups for i in group["params"]] if groups else sorted(state_dict["state"])
    if len(indices) != len(places):
        kind = "few" if len(indices) < len(places) else "many"
        raise ValueError(
            f"the state_dict has {len(indices)} parameters, too {kind} for the {len(places)} of params: "
            f"{', '.join(places)}"
        )
    return {path: state_dict["state"][i] for i, path in zip(indices, places, strict=True) if i in state_dict["state"]}


def _check_names(parts: _Parts, entries: Entries, groups: ParamGroups) -> None:
    """Check that torch's optimizer is the same, and has the same fields in its state."""
    theirs = _torch_name(groups, entries)
    if theirs not in (None, parts.torch_name):
        raise ValueError(f"the state_dict is of torch.optim.{theirs}, but opt is like torch.optim.{parts.torch_name}")
    expected = {"step", *parts.names.values()}
    for path, entry in entries.items():
        if missing := expected - set(entry):
            hint = ": it was made without amsgrad" if "max_exp_avg_sq" in missing else ""
            raise ValueError(f"the state of {path} lacks {', '.join(sorted(missing))}{hint}")
        if more := set(entry) - expected:
            hint = ": it was made with amsgrad, and opt is without" if "max_exp_avg_sq" in more else ""
            raise ValueError(f"the state of {path} has {', '.join(sorted(more))}, which opt has no place for{hint}")


def _torch_name(groups: ParamGroups, entries: Entries) -> str | None:
    """Return the class of the optimizer of a state_dict, or None if it does not tell."""
    keys = {name for entry in entries.values() for name in entry}
    if "exp_inf" in keys:
        return "Adamax"
    if not groups:
        return None
    if "momentum_decay" in groups[0]:
        return "NAdam"
    return "Adam" if "amsgrad" in groups[0] else "RAdam" if keys or "betas" in groups[0] else None


def _filled(parts: _Parts, path: str, state: ParamState, entry: Entry, convert: Convert) -> ParamState:
    arrays = {
        ours: _moment(path, theirs, entry[theirs], getattr(state, ours), convert if ours in _MOMENTS else None)
        for ours, theirs in parts.names.items()
    }
    return state._replace(count=jnp.int32(int(_array(entry["step"]))), **arrays)


def _moment(path: str, name: str, x: Any, like: Any, convert: Convert) -> jax.Array:
    """Convert one array to our layout, and check that it fits in the place of `like`."""
    if not isinstance(like, jax.Array):
        raise TypeError(f"{name} of {path} cannot be imported into {like!r}: import into moments in float32")
    x = _array(x) if convert is None else np.asarray(convert(path, _array(x)))
    if np.iscomplexobj(x) and not jnp.issubdtype(like.dtype, jnp.complexfloating):
        x = np.stack([x.real, x.imag], axis=-1)
    if x.shape != like.shape:
        raise ValueError(
            f"{name} of {path} has shape {x.shape}, expected {like.shape}; convert= changes layouts, "
            "and order= says which parameter is which"
        )
    if trees.compute_dtype(x.dtype) != trees.compute_dtype(like.dtype):
        raise ValueError(
            f"{name} of {path} is {x.dtype}, and opt keeps {like.dtype}: convert=lambda path, x: "
            f"x.astype({like.dtype.name!r}) if that is meant"
        )
    return jnp.asarray(x).astype(like.dtype)


def _array(x: Any) -> np.ndarray:
    """Convert a torch tensor, or anything like an array, to a NumPy array."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.float() if str(x.dtype) == "torch.bfloat16" else x  # NumPy has no bfloat16
        x = x.numpy()
    return np.asarray(x)


def _group(parts: _Parts, count: int) -> dict[str, Any]:

    def number(x: Any) -> float:
        return float(x(jnp.int32(count)) if callable(x) else x)

    decoupled = not (isinstance(parts.decoupled, float) and parts.decoupled == 0)
    group = {
        "lr": number(parts.lr),
        "betas": (number(parts.moments.b1), number(parts.moments.b2)),
        "eps": number(parts.moments.eps),
        "weight_decay": number(parts.decoupled if decoupled else parts.coupled),
        "maximize": parts.maximize,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
    }
    if isinstance(parts.moments, ScaleByAdam):
        group |= {"amsgrad": parts.moments.amsgrad is not None, "fused": None}
    if isinstance(parts.moments, ScaleByTorchNAdam):
        group["momentum_decay"] = number(parts.moments.momentum_decay)
    if not isinstance(parts.moments, ScaleByAdamax):
        group["decoupled_weight_decay"] = decoupled
    return group
