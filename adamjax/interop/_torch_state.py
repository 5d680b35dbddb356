"""Convert states of torch.optim's Adam family to adamjax and back."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core import checks, trees
from adamjax._core.optional import require
from adamjax._core.typing import GradientTransformation, PyTree
from adamjax._transforms.base import Wrapper, as_transformation
from adamjax._transforms.groups import Groups
from adamjax._transforms.schedule import ScheduleState
from adamjax.interop import _adam_values
from adamjax.interop._torch_files import FileParam, StateDict, read, shortened
from adamjax.interop._torch_names import match
from adamjax.interop._torch_origin import check_origin, warn_of_differences
from adamjax.interop._torch_parts import ParamState, Parts, leaves_by_path, members, merge, parts_of, split
from adamjax.rounding import MasterWeights

_MOMENTS = ("mu", "nu", "nu_max")

Order = list[str] | None
Convert = Callable[[str, np.ndarray], np.ndarray] | None


def import_state(
    opt: GradientTransformation, params: PyTree, state_dict: StateDict, *, order: Order = None, convert: Convert = None
) -> PyTree:
    """Convert the state of a run of torch.optim to one with which `opt` continues it.

    Parameters are matched by their names if the file has any: in `param_names` (torch has them if the optimizer was
    made of `named_parameters()`), or as keys, as those of FSDP and torch.distributed.checkpoint. "layers.0.weight" is
    `{"layers": [{"weight": ...}]}` as well as "layers_0/kernel". Without names, they are matched by position.

    Args:
      opt: An optimizer of `adamjax.interop.torch`; or `adamjax.adam`, `adamw`, `amsgrad` or `adamax`, with options that
        torch has too, if all parameters have done the same number of steps; or `adamjax.groups` of such optimizers; or
        a wrapper around one, such as `adamjax.packed` or `adamjax.kahan`.
      params: The parameters, or `jax.ShapeDtypeStruct`s.
      state_dict: The result of torch's `optimizer.state_dict()`, with all its groups; NumPy arrays may replace its
        tensors. apex's, Transformer Engine's and DeepSpeed's FusedAdam, and the AdamW that transformers had, are taken
        like torch's. Keys may be flat, such as "state.layers.0.weight.exp_avg". Or the path of a file: written by
        `torch.save`, or safetensors with flat keys. A file that would run code is refused.
      order: The paths ("layer_0/kernel") of the parameters in torch's order, group after group. None:
        the order of the leaves of `params`; for `adamjax.groups`, member after member.
      convert: A function of path and array that converts each of torch's moments to the layout of `params`,
        such as `lambda path, x: x.T if path.endswith("kernel") else x`.

    Returns:
      The state. A parameter without state in torch, because it never had a gradient, starts from zero.

    Raises:
      ValueError, TypeError: The two do not fit: another optimizer, too many or too few parameters, other names, another
        shape, wider numbers, numbers that no run of Adam leaves, or step counts that differ if `opt` has only one.
        The message names the path. Or the file is damaged, or of another kind.
      ImportError: A file is given, and torch or safetensors is not installed.

    Warns:
      UserWarning: Hyperparameters of the file differ from those of `opt`, with which the run goes on; or a kernel of
        flax is square, so that its layout may be wrong.
    """
    found = read(state_dict)
    as_transformation(opt, "argument opt of import_state")
    if trees.any_abstract(params) and any(isinstance(x, MasterWeights) for x in _wrappers(opt)):
        raise ValueError("params are abstract, and master_weights keeps a copy of them in float32: give the parameters")
    params = trees.concrete(params)
    start = opt.init(params)
    parts = [(parts_of(member), part) for member, part, _ in members(opt, params, start)]
    matched = match(found, _paths(part for _, part in parts), _checked(order, parts))
    own = [(found, {path: matched[path] for path in leaves_by_path(part)}) for found, part in parts]
    for one, file_params in own:
        check_origin(one, file_params)
    state = _imported(opt, params, start, matched, convert)
    warn_of_differences(own, stacklevel=3)
    if convert is None and (square := [path for path, p in matched.items() if _may_be_transposed(path, p)]):
        warnings.warn(
            f"{shortened(square)} is square, and torch's weights are the kernels of flax transposed: if params are of "
            "flax, give convert=lambda path, x: x.T if path.endswith('kernel') else x",
            stacklevel=2,
        )
    return state


def _may_be_transposed(path: str, p: FileParam) -> bool:
    """Return whether a parameter is named as flax's here and as torch's there, and its shape does not tell."""
    shape: tuple[int, ...] = getattr(p.entry.get("exp_avg"), "shape", ())
    named = bool(re.search(r"(^|/)kernel(/|$)", path)) and (p.name or "").endswith("weight")
    return named and len(shape) == 2 and shape[0] == shape[1] > 1


def _imported(opt: Any, params: PyTree, start: PyTree, found: Mapping[str, FileParam], convert: Convert) -> PyTree:
    if isinstance(opt, Groups):
        rows = zip(opt.members_for(params), opt.split_params(params), start, strict=True)
        return tuple(_imported(*row, found, convert) for row in rows)
    if isinstance(opt, Wrapper):
        if not hasattr(start, "inner"):
            return _imported(opt.inner, params, start, found, convert)
        inner = _imported(opt.inner, params, start.inner, found, convert)
        return start._replace(inner=inner) if hasattr(start, "_replace") else dataclasses.replace(start, inner=inner)
    parts = parts_of(opt)
    states = split(parts, params, start[0])
    if not states:
        return start
    states |= {path: _filled(parts, path, s, found[path], convert) for path, s in states.items() if found[path].entry}
    count = jnp.int32(max(int(s.count) for s in states.values()))
    rest = [ScheduleState(count) if isinstance(s, ScheduleState) else s for s in start[1:]]
    merged = merge(parts, params, states)
    return (merged if parts.per_parameter else _adam_values.encoded(merged, start[0]), *rest)


def _filled(parts: Parts, path: str, start: ParamState, p: FileParam, convert: Convert) -> ParamState:
    """The state of one parameter, with the contents of the file."""
    where = f" of {path}"
    count = _adam_values.step_count(p.entry["step"], "step" + where)
    named = where if p.name in (None, path) else f"{where} (named {p.name!r} in the state_dict)"
    found: dict[str, Any] = {
        ours: _moment(path, theirs, named, p.entry[theirs], getattr(start, ours), convert)
        for ours, theirs in parts.names.items()
        if ours in _MOMENTS
    }
    names = parts.names["mu"], parts.names["nu"], "max_exp_avg_sq"
    is_norm = names[1] == "exp_inf"
    betas = _adam_values.known_betas(p.group.get("betas", (parts.moments.b1, parts.moments.b2)))
    _adam_values.check_moments(found["mu"], found["nu"], found.get("nu_max"), names, where, betas, is_norm=is_norm)
    if count == 0 and any(np.any(x) for x in found.values()):
        raise ValueError(
            f"step{where} is 0, but its moments are not: the count has been lost, and with it the bias corrections; "
            "set it to the number of steps done"
        )
    moments = {ours: _placed(x, getattr(start, ours)) for ours, x in found.items()}
    if "mu_product" in parts.names:
        moments["mu_product"] = _mu_product(p.entry["mu_product"], "mu_product" + where, count)
    return start._replace(count=jnp.int32(count), **moments)


def _moment(path: str, name: str, where: str, x: Any, like: Any, convert: Convert) -> np.ndarray:
    """Convert one array to our layout, and check that it fits in the place of `like`."""
    if not isinstance(like, jax.Array):
        raise TypeError(f"{name} of {path} cannot be imported into {like!r}: import into moments in float32")
    x = _adam_values.plain_array(x, name + where)
    if convert is not None:
        x = _adam_values.plain_array(convert(path, x), f"the result of convert for {name} of {path}")
    if x.dtype.kind not in "fc":
        raise TypeError(
            f"{name}{where} is {x.dtype}, and moments are floats: if it holds codes, decode them first (convert= can)"
        )
    if np.iscomplexobj(x) and not jnp.issubdtype(like.dtype, jnp.complexfloating):
        x = np.stack([x.real, x.imag], axis=-1)
    if x.shape != like.shape:
        raise ValueError(
            f"{name}{where} has shape {x.shape}, expected {like.shape}; convert= changes layouts, and order= says "
            "which parameter is which"
        )
    if trees.compute_dtype(x.dtype) != trees.compute_dtype(like.dtype):
        raise ValueError(
            f"{name}{where} is {x.dtype}, and opt keeps {like.dtype}: convert=lambda path, x: "
            f"x.astype({like.dtype.name!r}) if that is meant"
        )
    if _adam_values.overflows(x, like.dtype):
        raise ValueError(f"{name}{where} has numbers that {like.dtype} cannot hold: import into moments in float32")
    return x


def _placed(x: np.ndarray, like: jax.Array) -> jax.Array:
    # A copy: torch goes on in the memory of its tensors.
    made = jnp.array(x)
    return made if made.sharding == like.sharding else jax.device_put(made, like.sharding)


def _mu_product(x: Any, where: str, count: int) -> jax.Array:
    """NAdam's product of momentum rates; a Python number in older versions of torch."""
    found = _adam_values.plain_array(x, where)
    if found.shape != () or found.dtype.kind != "f":
        raise TypeError(f"{where} is {found.dtype} of shape {found.shape}, expected one float, of shape ()")
    if not (0 <= found <= 1) or (found == 1 and count > 0):
        raise ValueError(f"{where} is {found}, expected a product of rates below 1 after {count} steps")
    return jnp.float32(float(found))


def export_state(
    opt: GradientTransformation, params: PyTree, state: PyTree, *, order: Order = None, convert: Convert = None
) -> dict[str, Any]:
    """Convert a state of `opt` to a `state_dict` with which torch's optimizer continues the run.

    Moments in half precision, in 8 or in 4 bits become float32.

    Args:
      opt, params, order: As for `import_state`. The residuals that `adamjax.kahan` and `adamjax.master_weights` keep
        belong to the parameters, and are not exported: give torch the parameters in float32.
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
    found = [(parts_of(member), part, s) for member, part, s in members(opt, params, state)]
    parts = [(one, part) for one, part, _ in found]
    paths = _checked(order, parts) or _paths(part for _, part in parts)
    places = {path: i for i, path in enumerate(paths)}
    exported: dict[int, dict[str, Any]] = {}
    groups = []
    for one, part, s in found:
        leaves = leaves_by_path(part)
        states = split(one, part, s[0] if one.per_parameter else _adam_values.decoded(s[0]))
        for path, of_param in states.items():
            if int(of_param.count) == 0:
                continue
            exported[places[path]] = entry = {"step": torch.tensor(float(of_param.count))}
            for ours, theirs in one.names.items():
                x = np.array(getattr(of_param, ours))
                if ours in _MOMENTS:
                    x = x[..., 0] + 1j * x[..., 1] if jnp.iscomplexobj(leaves[path]) else x
                    x = x if convert is None else convert(path, x)
                entry[theirs] = torch.from_numpy(np.array(x))
        count = max((int(of_param.count) for of_param in states.values()), default=0)
        groups.append(_group(one, count) | {"params": sorted(places[path] for path in states)})
    return {"state": dict(sorted(exported.items())), "param_groups": groups}


def _group(parts: Parts, count: int) -> dict[str, Any]:
    options = {"foreach": None, "capturable": False, "differentiable": False}
    fused = {"fused": None} if parts.torch_name == "torch.optim.Adam" else {}
    return parts.group(count) | options | fused


def _paths(trees_of_params: Any) -> list[str]:
    return [path for part in trees_of_params for path in leaves_by_path(part)]


def _checked(order: Order, parts: list[tuple[Parts, PyTree]]) -> Order:
    """Check that `order` names each parameter once."""
    if order is None:
        return None
    order, paths = list(order), _paths(part for _, part in parts)
    for path in order:
        if path not in paths:
            raise ValueError(f"order names {path!r}, which is no parameter; those are {shortened(paths)}")
    for path in paths:
        if order.count(path) != 1:
            raise ValueError(f"order names {path!r} {order.count(path)} times: it must name each parameter once")
    return order


def _wrappers(opt: Any) -> list[Any]:
    """The wrappers in `opt`, at any depth."""
    if isinstance(opt, Groups):
        return [x for member in opt.members for x in _wrappers(member)]
    return [opt, *_wrappers(opt.inner)] if isinstance(opt, Wrapper) else []
