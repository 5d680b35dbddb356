"""Tell which optimizer a state_dict is of, and where its hyperparameters differ from ours."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from adamjax.interop._torch_files import FileParam, shortened
from adamjax.interop._torch_parts import Parts, is_constant

# Optimizers by a field of a parameter's state that only they have.
_BY_FIELD = {
    "exp_inf": "torch.optim.Adamax",
    "mu_product": "torch.optim.NAdam",
    "acc_delta": "torch.optim.Adadelta",  # which has a square_avg, too
    "square_avg": "torch.optim.RMSprop",
    "exp_avg_sq_row": "Adafactor",
    "exp_avg_diff": "Adan",
    "exp_avg_var": "AdaBelief",
    "hessian": "Sophia",
    "GG": "SOAP",
    "z": "a schedule-free optimizer",
}
# The same by a hyperparameter of a group.
_BY_GROUP = {
    "momentum_decay": "torch.optim.NAdam",
    "dampening": "torch.optim.SGD",
    "ns_steps": "torch.optim.Muon",
    "lr_decay": "torch.optim.Adagrad",
    "adaptive": "SAM",  # which has a rho, too
    "rho": "torch.optim.Adadelta",
    "beta2_decay": "torch.optim.Adafactor",
    "lambd": "torch.optim.ASGD",
    "etas": "torch.optim.Rprop",
    "grad_averaging": "LAMB",
    "rank": "GaLore",
    "d_coef": "Prodigy",
    "wd_ratio": "AdamP",
    "clip_lambda": "ADOPT",
    "final_lr": "AdaBound",
    "nus": "QHAdam",
    "correct_bias": "transformers' AdamW",
    "bias_correction": "FusedAdam",
    "amsgrad": "torch.optim.Adam",
}
_SAME_AS_ADAM = {"torch.optim.Adam", "FusedAdam", "transformers' AdamW"}
# The hyperparameters of a group of torch.optim.RAdam before version 2.1, and what schedulers and users add to it.
_PLAIN = {"lr", "betas", "eps", "weight_decay", "foreach", "differentiable", "capturable", "maximize", "name"}
_PLAIN |= {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "lr_scale"}
_SWITCHES = ("bias_correction", "correct_bias")

# The hyperparameters that torch's optimizers and ours share.
_COMPARED = ("lr", "betas", "eps", "weight_decay", "maximize", "momentum_decay", "decoupled_weight_decay", "amsgrad")


def check_origin(parts: Parts, params: Mapping[str, FileParam]) -> None:
    """Check that the state is of the same algorithm, and has the same fields."""
    for path, p in params.items():
        if any(str(key).startswith(("state1", "qmap", "absmax")) for key in p.entry):
            raise ValueError(
                "the state_dict is of bitsandbytes, which stores moments in codes of its own: decode state1 and state2 "
                "(by bitsandbytes.functional.dequantize_blockwise where they have an absmax1), and name them exp_avg "
                "and exp_avg_sq"
            )
        theirs, accepted = _origin(p), _SAME_AS_ADAM if parts.torch_name == "torch.optim.Adam" else {parts.torch_name}
        if theirs is not None and theirs not in accepted:
            hint = ", which skips moments where a sparse gradient has no entry" if "Sparse" in theirs else ""
            raise ValueError(
                f"the state_dict is of {theirs}{hint}, but opt is like {parts.torch_name}: take an optimizer of the "
                "same algorithm, or start with opt.init(params)"
            )
        for name in _SWITCHES:
            if name in p.group and not p.group[name]:
                raise ValueError(
                    f"the state_dict is of {theirs} with {name}=False, and {parts.torch_name} corrects the bias: no "
                    "optimizer here goes on with such a run; start with opt.init(params)"
                )
        if p.entry:
            _check_fields(parts, path, p, theirs)


def _origin(p: FileParam) -> str | None:
    """The optimizer that a parameter's state is of, or None if it does not tell."""
    for names, known in ((p.entry, _BY_FIELD), (p.group, _BY_GROUP)):
        for name, optimizer in known.items():
            if name in names:
                return optimizer
    if p.entry and not {"exp_avg", "exp_avg_sq"} <= set(p.entry):
        return f"an optimizer with the state {shortened(p.entry)}"
    if not p.entry and "lr" in p.group and "betas" not in p.group:
        return "an optimizer without betas"
    if not {"lr", "betas", "eps"} <= set(p.group):  # a file may have a part of them only
        return None
    if "weight_decay" not in p.group:
        return "torch.optim.SparseAdam"
    if "decoupled_weight_decay" in p.group:
        return "torch.optim.RAdam"
    if more := {str(name) for name in p.group} - _PLAIN:
        return f"an optimizer with the hyperparameter {shortened(sorted(more))}"
    # Without a state of a parameter, older RAdam and Adamax look alike.
    return "torch.optim.RAdam" if p.entry else None


def _check_fields(parts: Parts, path: str, p: FileParam, theirs: str | None) -> None:
    expected, found = {"step", *parts.names.values()}, set(p.entry)
    if missing := expected - found:
        hint = "it was made without amsgrad" if "max_exp_avg_sq" in missing else "give all that torch saved"
        raise ValueError(f"the state of {path} lacks {', '.join(sorted(missing))}: {hint}")
    if theirs == "FusedAdam":
        found -= {"master_param"}  # a copy of the parameter; see warn_of_differences
    if more := found - expected:
        hint = ": it was made with amsgrad, and opt is without" if "max_exp_avg_sq" in more else ""
        raise ValueError(f"the state of {path} has {shortened(sorted(more))}, which opt has no place for{hint}")


def warn_of_differences(members: Iterable[tuple[Parts, Mapping[str, FileParam]]], stacklevel: int) -> None:
    """Say in one warning which hyperparameters of the file differ from those of the optimizer."""
    where: dict[str, list[str]] = {}
    total = 0
    for parts, params in members:
        ours = parts.group(None)
        total += len(params)
        for path, p in params.items():
            for said in _differences(ours, p):
                where.setdefault(said, []).append(path)
    if not where:
        return
    places = [said + (f" ({shortened(paths, 1)})" if len(paths) < total else "") for said, paths in where.items()]
    shown = [place for i, place in enumerate(places) if sum(map(len, places[: i + 1])) < 450]
    more = f"; and {len(places) - len(shown)} more" if len(shown) < len(places) else ""
    warnings.warn(
        f"the state_dict was made with {'; '.join(shown)}{more}. The run goes on with those of opt",
        stacklevel=stacklevel,
    )


def _differences(ours: Mapping[str, Any], p: FileParam) -> list[str]:
    """The differences of one parameter's hyperparameters, in words."""
    both = [name for name in _COMPARED if name in ours and name in p.group]
    if not any(_positive(group.get("weight_decay", 0)) for group in (ours, p.group)):
        both = [name for name in both if name != "decoupled_weight_decay"]
    if p.entry:
        both = [name for name in both if name != "amsgrad"]  # its fields have told
    said = [
        f"{name}={_shown(p.group[name])} where opt has {_shown(ours[name])}"
        for name in both
        if not _equal(ours[name], p.group[name])
    ]
    if "correct_bias" in p.group:
        said.append("eps added to the uncorrected root, by transformers' AdamW, where opt corrects first")
    if "master_param" in p.entry:
        said.append("master_param, the parameters in float32, which are no part of a state here")
    return said


def _equal(a: Any, b: Any) -> bool:
    """Return whether two hyperparameters are equal up to the digits of float32, or cannot be compared."""
    a, b = _numbers(a), _numbers(b)
    if a is None or b is None or a.shape != b.shape:
        return True
    return bool(np.allclose(a, b, rtol=1e-6, atol=0.0))


def _positive(x: Any) -> bool:
    found = _numbers(x)
    return found is None or bool(np.any(found > 0))


def _numbers(x: Any) -> np.ndarray | None:
    """A hyperparameter as an array of double numbers, or None if its value is not known."""
    xs = x if isinstance(x, (tuple, list)) else [x]
    if None in xs or not all(map(is_constant, xs)):
        return None
    try:
        return np.asarray(
            [np.asarray(one.tolist() if hasattr(one, "tolist") else one, float).reshape(-1) for one in xs]
        )
    except (TypeError, ValueError):
        return None


def _shown(x: Any) -> str:
    found = _numbers(x)
    if found is None or isinstance(x, bool):
        return str(x)
    numbers = [f"{one:.6g}" for one in found.reshape(-1)]
    return numbers[0] if len(numbers) == 1 else f"({', '.join(numbers)})"
