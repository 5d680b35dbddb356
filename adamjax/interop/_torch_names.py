"""Find the parameters of a state_dict among ours: by their names if it has any, else by position."""

import re
from collections.abc import Iterator
from typing import NoReturn

from adamjax.interop._torch_files import FileParam, TorchState, shortened

Parts = tuple[str, ...]

# Wrappers of torch.compile, FSDP and activation checkpoints are parts of the names of what they wrap; frameworks of JAX
# have "value" (flax.nnx) and "~" (haiku) in theirs.
_NO_NAMES = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "~", ""}
_ENDS = {"value", "raw_value"}
# The names of frameworks of JAX for what torch calls weight and bias.
_ALIASES = dict.fromkeys(("kernel", "scale", "embedding", "gamma", "w"), "weight") | dict.fromkeys(
    ("beta", "b"), "bias"
)


def match(found: TorchState, paths: list[str], order: list[str] | None) -> dict[str, FileParam]:
    """Return the parameter of the state_dict that belongs to each path of ours.

    The `paths` are in the order that torch's would have by default, and `order` is the user's.
    """
    names = found.names
    if len(found.params) != len(paths):
        _refuse_count(found, paths)
    owners = _by_names(names, paths)
    if order is not None and found.is_ordered:
        _check_order(names, order, paths)
        owners = order
    elif not owners:
        owners = paths if order is None else order
        # A single parameter can only be the one.
        if names and len(paths) > 1 and not (found.is_ordered and all(map(_agrees, names, owners))):
            _refuse_names(found, paths)
    return dict(zip(owners, found.params, strict=True))


def _by_names(names: list[str], paths: list[str]) -> list[str]:
    """The path of each name; none if there is no way to match all of them with one path each."""
    for ours, theirs in _canonical_forms(paths, names):
        owners = dict(zip(ours, paths, strict=True))
        if len(owners) == len(paths) == len(set(theirs)) and owners.keys() == set(theirs):
            return [owners[name] for name in theirs]
    return []


def _canonical_forms(paths: list[str], names: list[str]) -> Iterator[tuple[list[Parts], list[Parts]]]:
    """Paths and names in forms that can be compared, from the strictest to the loosest."""
    for form in (_plain, _unwrapped, _aliased):
        yield [form(path) for path in paths], [form(name) for name in names]
    yield _without_common_head(list(map(_aliased, paths))), _without_common_head(list(map(_aliased, names)))


def _plain(name: str) -> Parts:
    return tuple(re.split(r"[./]", name))


def _unwrapped(name: str) -> Parts:
    """The parts without those of wrappers; "layers_0" is "layers", "0"."""
    parts = [part for part in _plain(name) if part not in _NO_NAMES]
    parts = parts[1:] if len(parts) > 1 and parts[0] == "module" else parts
    parts = parts[:-1] if len(parts) > 1 and parts[-1] in _ENDS else parts
    return tuple(piece for part in parts for piece in re.sub(r"_(\d+)$", r" \1", part).split(" "))


def _aliased(name: str) -> Parts:
    *parents, last = _unwrapped(name) or ("",)
    return (*parents, _ALIASES.get(last, last))


def _without_common_head(names: list[Parts]) -> list[Parts]:
    while names and all(len(name) > 1 and name[0] == names[0][0] for name in names):
        names = [name[1:] for name in names]
    return names


def _agrees(name: str, path: str) -> bool:
    """Return whether a path does not contradict a name: an index in the path stands for any name."""
    rest = iter(_aliased(name))
    return all(part in rest for part in _aliased(path) if part and not part.isdecimal())


def _check_order(names: list[str], order: list[str], paths: list[str]) -> None:
    exact: dict[Parts, str] = {_plain(path): path for path in paths}
    for i, (name, path) in enumerate(zip(names, order, strict=False)):
        if exact.get(_plain(name), path) != path:
            raise ValueError(
                f"order says that parameter {i} of the state_dict is {path!r}, but its name there is {name!r}: leave "
                "order= out, and the names decide"
            )


def _refuse_count(found: TorchState, paths: list[str]) -> NoReturn:
    count = len(found.params)
    kind = "few" if count < len(paths) else "many"
    message = f"the state_dict has {count} parameters, too {kind} for the {len(paths)} of params: {shortened(paths)}"
    if found.names:
        message += f"; it has {shortened(found.names)}"
    if kind == "few" and any(map(_is_flat, found.params)):
        message += (
            ". Its arrays are flat, each of many parameters: gather them by name, as "
            "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict does with full_state_dict=True"
        )
    raise ValueError(message)


def _is_flat(p: FileParam) -> bool:
    """Return whether an entry seems to hold many parameters, as those of FSDP and DeepSpeed do."""
    shape: tuple[int, ...] = getattr(p.entry.get("exp_avg"), "shape", ())
    return "flat_param" in p.name if p.name is not None else len(shape) == 1 and shape[0] > 1


def _refuse_names(found: TorchState, paths: list[str]) -> NoReturn:
    ours, theirs = set(map(_aliased, paths)), set(map(_aliased, found.names))
    unknown = [name for name in found.names if _aliased(name) not in ours] or found.names
    unnamed = [path for path in paths if _aliased(path) not in theirs] or paths
    cure = (
        "order= gives the paths in torch's order"
        if found.is_ordered
        else 'rename the keys of its "state" to the paths, since it has no order'
    )
    raise ValueError(
        f"the state_dict has parameters named {shortened(unknown)}, and params has {shortened(unnamed)} instead: {cure}"
    )
