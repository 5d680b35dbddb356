"""The description of a step: a JSON object with its key, its schemas, its digests, and a digest of itself."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core import checks, files, schema, trees
from adamjax._core.files import DamagedFileError
from adamjax._core.typing import GradientTransformation, PyTree
from adamjax._core.version import __version__
from adamjax._transforms.base import as_transformation
from adamjax.checkpoint import _step_folder

# Version of the on-disk format. Bump it when old checkpoints no longer load.
FORMAT = 1
# Quantised moments of version 0.1, whose third number was whether they had a sign.
_OLD_CODES = re.compile(r"QuantizedArray \(\d, (True|False)")

Description = dict[str, Any]
_TREES = ("optimizer", "params", "state", "model_state")
_BEFORE_DIGESTS = {"format", "versions", "key", *_TREES}
_UNREADABLE = "the step cannot be restored"


def describe(
    optimizer: GradientTransformation, params: PyTree, state: PyTree, model_state: PyTree, key: jax.Array | int | None
) -> Description:
    versions = {"adamjax": __version__, "jax": jax.__version__}
    header = {"format": FORMAT, "versions": versions, "key": _key_to_json(key)}
    return header | schemas(optimizer, params, state, model_state)


def schemas(
    optimizer: GradientTransformation, params: PyTree, state: PyTree, model_state: PyTree
) -> dict[str, schema.Schema]:
    optimizer = as_transformation(optimizer, "argument optimizer")
    # Hyperparameters are compared by their values, also those in arrays.
    numbers = jax.tree.map(lambda x: np.asarray(x).tolist() if hasattr(x, "dtype") else x, optimizer)
    described = zip(_TREES, (numbers, params, state, model_state), strict=True)
    return {name: schema.tree_schema(name, tree) for name, tree in described}


def write(folder: Path, description: Description, arrays: dict[str, str], sealed: _step_folder.FileDigests) -> None:
    """Write a description with digests of arrays and files, and of itself."""
    whole = description | {"digests": {"arrays": arrays, "files": sealed}}
    files.replace(folder / _step_folder.DESCRIPTION, json.dumps(whole | {"digest": _digest(whole)}))


def read(folder: Path, step: int) -> Description:
    """Return the description of a step; without "digests", if an earlier version of adamjax wrote it.

    Raises:
      DamagedFileError: It is not what was saved, or it is not that of a checkpoint of adamjax.
      ValueError: It is of a later format.
    """
    path = folder / _step_folder.DESCRIPTION
    try:
        found = files.json_object(files.read(path), path, _UNREADABLE)
    except (FileNotFoundError, IsADirectoryError) as error:
        message = (
            f"{folder} is not a checkpoint of adamjax: it has no description to be read, {_step_folder.DESCRIPTION}"
        )
        raise DamagedFileError(path, message, step) from error
    except DamagedFileError as error:
        raise DamagedFileError(path, str(error), step) from error
    version = found.get("format")
    later = f"{folder} has format {checks.shortened(str(version))}, expected {FORMAT}: update adamjax to restore it"
    is_whole = _is_whole(found)
    if is_whole and version != FORMAT:
        raise ValueError(later)
    if not is_whole and version != FORMAT:
        raise DamagedFileError(path, f"{later}; if no later version wrote it, {path} is damaged", step)
    # A description with more than those of earlier versions was sealed, and is damaged now.
    if not (_has_digests(found) if is_whole else found.keys() <= _BEFORE_DIGESTS):
        raise DamagedFileError(path, f"{path} is damaged (its content is not what was saved): {_UNREADABLE}", step)
    for name in _TREES:
        if not isinstance(found.setdefault(name, schema.tree_schema(name, None)), dict):
            raise DamagedFileError(path, f"{path} is damaged ({name} is not an object): {_UNREADABLE}", step)
    return found


def key_of(description: Description, folder: Path, step: int) -> jax.Array | int | None:
    """Return the key or seed of the run.

    Raises:
      DamagedFileError: There is none that can be read.
    """
    key = description.get("key")
    try:
        if key is None or isinstance(key, int):
            return key
        bits = jnp.asarray(key["bits"], key["dtype"])
        return bits if key["impl"] is None else jax.random.wrap_key_data(bits, impl=key["impl"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        path = folder / _step_folder.DESCRIPTION
        raise DamagedFileError(path, f"{path} is damaged (its key is not one of JAX): {_UNREADABLE}", step) from error


def refuse_others(folder: Path, there: Description, here: dict[str, schema.Schema], new_hyperparameters: bool) -> None:
    """Raise if a step is of another optimizer, or of other parameters or states."""
    optimizers = there["optimizer"], here["optimizer"]
    if (what := schema.first_difference(*optimizers, numbers=False)) is not None:
        raise ValueError(f"{folder} is of another optimizer: {what}; restore it with the one that was saved")
    if not new_hyperparameters and (what := schema.first_difference(*optimizers)) is not None:
        raise ValueError(
            f"{folder} is of an optimizer with other hyperparameters: {what}; "
            "if that is meant, restore it with new_hyperparameters=True"
        )
    for name in ("params", "state", "model_state"):
        if (what := schema.first_difference(there[name], here[name])) is not None:
            if _OLD_CODES.search(what):
                raise ValueError(
                    f"{folder} has moments that an earlier version quantised, in codes that are no longer read: "
                    "restore it with that version and save float32 moments, or begin with init(params)"
                )
            raise ValueError(
                f"{folder} does not fit: {what}; nothing is cast or reshaped, restore it into what was saved "
                "and convert that"
            )


def _is_whole(found: Description) -> bool:
    try:
        return found.get("digest") == _digest({name: x for name, x in found.items() if name != "digest"})
    except RecursionError:  # it nests deeper than any of ours
        return False


def _has_digests(found: Description) -> bool:
    try:
        sizes = [size for size, _ in found["digests"]["files"].values()]
        return all(isinstance(size, int) for size in sizes) and isinstance(found["digests"]["arrays"], dict)
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _digest(description: Description) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _key_to_json(key: jax.Array | int | None) -> dict[str, Any] | int | None:
    if key is None or isinstance(key, int):
        return key
    typed = isinstance(key, jax.Array) and trees.is_key(key)
    bits = np.asarray(jax.random.key_data(key) if typed else key)
    if not np.issubdtype(bits.dtype, np.integer):
        raise TypeError(f"Invalid key value: {key!r}; key must be a seed or a key of JAX")
    return {"bits": bits.tolist(), "dtype": bits.dtype.name, "impl": str(jax.random.key_impl(key)) if typed else None}
