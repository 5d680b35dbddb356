"""Read the state_dict of an optimizer of torch: from memory or a file, nested or flat, keyed by indices or by names."""

import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from adamjax._core import checks
from adamjax._core.files import DamagedFileError
from adamjax._core.optional import require

StateDict = Mapping[str, Any] | str | os.PathLike[str]

_DEEPSPEED = {"base_optimizer_state", "single_partition_of_fp32_groups", "fp32_flat_groups", "partition_count"}
_SAFETENSORS = {
    **{f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": "bfloat16",
    "BOOL": "bool",
    "C64": "complex64",
}


class FileParam(NamedTuple):
    """One parameter of a state_dict."""

    name: str | None
    entry: Mapping[str, Any]  # empty if it never had a gradient
    group: Mapping[str, Any]  # its hyperparameters, as far as they are known


class TorchState(NamedTuple):
    """The parameters of a state_dict."""

    params: list[FileParam]
    is_ordered: bool  # True if their order is that of torch's optimizer

    @property
    def names(self) -> list[str]:
        """The names of the parameters; none unless all have one."""
        names = [p.name for p in self.params if p.name is not None]
        return names if len(names) == len(self.params) else []


def shortened(names: Iterable[Any], limit: int = 3) -> str:
    """List names in words, the first of many."""
    names = [str(name) for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read(state_dict: StateDict) -> TorchState:
    """Read a state_dict, or the file of one."""
    found = _load(Path(state_dict)) if isinstance(state_dict, (str, os.PathLike)) else state_dict
    if not isinstance(found, Mapping):
        raise TypeError(f"state_dict is {checks.describe(found)}, expected what optimizer.state_dict() returns")
    is_flat = "state" not in found
    if is_flat:
        found = _nested(found)
    entries, groups = _entries(found["state"]), found.get("param_groups")
    if not groups:
        are_names = not all(isinstance(key, int) for key in entries)
        keys = list(entries) if are_names else sorted(entries)
        params = [FileParam(str(key) if are_names else None, entries[key], {}) for key in keys]
        return TorchState(params, is_ordered=not are_names)
    keys, params = [], []
    for i, group in enumerate(groups):
        own, names = _keys_and_names(group, i)
        shared = {name: x for name, x in group.items() if name not in ("params", "param_names")}
        keys += own
        params += [
            FileParam(n, _with_step(entries.get(k, {}), shared), shared) for k, n in zip(own, names, strict=True)
        ]
    _check_unique("lists parameter", keys)
    _check_unique("names", [p.name for p in params if p.name is not None])
    if stray := [key for key in entries if key not in set(keys)]:
        raise ValueError(
            f"the state_dict has a state of {shortened(map(repr, stray))}, but its param_groups list only "
            f"{shortened(map(repr, keys))}"
        )
    if len({p.name is None for p in params}) > 1:
        raise ValueError("some param_groups of the state_dict have param_names and others have none: give all or none")
    if is_flat and all(isinstance(key, int) for key in keys):
        rows = sorted(zip(keys, params, strict=True), key=lambda row: row[0])
        return TorchState([p for _, p in rows], is_ordered=True)
    return TorchState(params, is_ordered=not is_flat)


def _entries(state: Any) -> dict[Any, Mapping[str, Any]]:
    """The states of the parameters, by index or name."""
    for where, x in [('"state" of the state_dict', state), *(state.items() if isinstance(state, Mapping) else ())]:
        if not isinstance(x, Mapping):
            raise TypeError(f"{where} is a {type(x).__name__}, expected a dict, as optimizer.state_dict() has it")
    _check_unique("has the state of parameter", [_key(key) for key in state])
    return {_key(key): entry for key, entry in state.items()}


def _key(key: Any) -> int | str:
    """A parameter's index, even if a file format made a string of it; or its name."""
    return int(key) if str(key).isdecimal() else str(key)


def _keys_and_names(group: Any, i: int) -> tuple[list[Any], list[str | None]]:
    """The indices of the parameters of a group, or the names in place of those; and the names, if there are any."""
    params = group.get("params") if isinstance(group, Mapping) else None
    if not isinstance(params, (list, tuple)):
        raise TypeError(f'param_groups[{i}] of the state_dict has no list "params": give all of optimizer.state_dict()')
    keys = [_key(key) for key in params]
    names = group.get("param_names")
    if names is None:
        return keys, [key if isinstance(key, str) else None for key in keys]
    if len(names) != len(keys):
        raise ValueError(f"param_groups[{i}] of the state_dict has {len(keys)} params, but {len(names)} param_names")
    # Keys that are names are those of the model; param_names may be those of a wrapper around it.
    return keys, [key if isinstance(key, str) else str(name) for key, name in zip(keys, names, strict=True)]


def _with_step(entry: Mapping[str, Any], group: Mapping[str, Any]) -> Mapping[str, Any]:
    """Give an entry the count that apex's and Transformer Engine's FusedAdam keep in the group."""
    if not entry or "step" in entry or "step" not in group:
        return entry
    step = group["step"]
    return {**entry, "step": step.reshape(()) if getattr(step, "shape", ()) == (1,) else step}


def _check_unique(verb: str, names: list[Any]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"the state_dict {verb} {name!r} {count} times")


def _nested(flat: Mapping[Any, Any]) -> dict[str, Any]:
    """Nest a dict with keys such as "state.fc.weight.exp_avg" and "param_groups.fc.weight.lr"."""
    _refuse_other_contents(flat)
    keys = {str(key): x for key, x in flat.items()}
    heads = {
        match and match.group(1) for match in (re.match(r"((?:.*?\.)?)(?:state|param_groups)\.", key) for key in keys)
    }
    prefix = next(iter(heads)) if len(heads) == 1 else None
    sections: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "param_groups": {}}
    for key, x in keys.items():
        section, _, rest = ("state", "", key) if prefix is None else key.removeprefix(prefix).partition(".")
        name, _, field = rest.rpartition(".")
        sections[section].setdefault(name, {})[field] = x
    if sections["state"] and not any(
        {"step", "exp_avg", "momentum_buffer"} & set(x) for x in sections["state"].values()
    ):
        raise ValueError(
            f"the state_dict has {shortened(map(repr, keys))}, and no moments: it looks like the parameters of a "
            "model; give what optimizer.state_dict() returned"
        )
    # torch.distributed.checkpoint writes the param_names of a whole group for each parameter.
    groups = [{**group, "params": [name], "param_names": None} for name, group in sections["param_groups"].items()]
    return {"state": sections["state"], "param_groups": groups}


def _refuse_other_contents(found: Mapping[Any, Any]) -> None:
    """Raise for a checkpoint that is none of torch's optimizer, or has that in a part of it."""
    parts = [found, *(x for x in found.values() if isinstance(x, Mapping))]
    if any(_DEEPSPEED & set(map(str, part)) for part in parts):
        raise ValueError(
            "the state_dict is of DeepSpeed's ZeRO, which keeps a part of all parameters, flat, in each file: convert "
            "the checkpoint by deepspeed/checkpoint/ds_to_universal.py, which writes exp_avg.pt and exp_avg_sq.pt for "
            'each parameter, and give those as {"state": {name: {"step": ..., "exp_avg": ..., "exp_avg_sq": ...}}}'
        )
    if stray := [key for key in found if "." not in str(key)]:
        firsts = [(f"[{key!r}]", x) for key, x in found.items()]
        firsts += [(f"{key}[0]", x[0]) for key, x in firsts if isinstance(x, list) and x]
        inside = [key for key, x in firsts if isinstance(x, Mapping) and "state" in x]
        raise ValueError(
            f'the state_dict has {shortened(map(repr, stray))}, and no "state": give the part of it that '
            f"optimizer.state_dict() returned{f', here {inside[0]}' if inside else ''}"
        )


def _load(path: Path) -> Any:
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder: make one file of a checkpoint of torch.distributed by  python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE  and give the part of it that is the "
            "optimizer's"
        )
    with path.open("rb") as file:
        head = file.read(9)
    return _load_safetensors(path) if path.suffix == ".safetensors" or head[8:] == b"{" else _load_torch(path)


def _load_safetensors(path: Path) -> dict[str, np.ndarray]:
    safetensors = require("safetensors", "torch", "reading a safetensors file")
    try:
        # safetensors.numpy does not know bfloat16.
        return {
            key: np.frombuffer(x["data"], jnp.dtype(_SAFETENSORS[x["dtype"]])).reshape(x["shape"])
            for key, x in safetensors.deserialize(path.read_bytes())
        }
    except KeyError as error:
        raise ValueError(f"{path} has arrays of dtype {error}, which are no moments that can be read here") from None
    except safetensors.SafetensorError as error:
        raise DamagedFileError(path, f"{path} is damaged, or not a safetensors file: {error}") from None


def _load_torch(path: Path) -> Any:
    torch = require("torch", "torch", "reading a file of torch")
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's guesses at a file that is none of its own
            return torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        if unsafe := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} would run code of its own when it is loaded ({unsafe.group(1)}), and import_state runs none: "
                "if you trust it, give torch.load(path, weights_only=False) in place of the path"
            ) from None
        raise DamagedFileError(
            path,
            f"{path} is damaged, or not a file of torch.save or safetensors: give what torch.save(optimizer."
            "state_dict(), path) wrote",
        ) from None


def _check_archive(path: Path) -> None:
    """Check the checksums in a file of torch.save, as torch does not."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        damaged = []
        for name in archive.namelist():
            try:
                with archive.open(name) as file:
                    while file.read(1 << 24):
                        pass
            except zipfile.BadZipFile:
                damaged.append(name)
    # torch can write files without checksums, where none of them is right.
    if 0 < len(damaged) < len(archive.namelist()):
        raise ValueError(f"{damaged[0]} is damaged")
