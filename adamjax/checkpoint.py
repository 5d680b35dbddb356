"""Checkpoints of a training run: parameters, optimizer state and step, written by orbax.

A step is on disk completely or not at all, even if the process dies while it writes. It records its optimizer, and the
path, shape and dtype of every array. `restore` compares these first and raises if they differ; orbax would cast.
"""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from adamjax._core import checks, schema, trees
from adamjax._core.optional import require
from adamjax._core.typing import GradientTransformation, PyTree
from adamjax._core.version import __version__
from adamjax._transforms.base import as_transformation

# Version of the on-disk format. Bump it when old checkpoints no longer load.
FORMAT = 1
# Quantised moments of version 0.1, whose third number was whether they had a sign.
_OLD_CODES = re.compile(r"QuantizedArray \(\d, (True|False)")


class _Fields(NamedTuple):
    step: int
    params: PyTree
    state: PyTree
    key: jax.Array | int | None


class Checkpoint(_Fields):
    """The contents of a step on disk: a tuple of the first four fields.

    Fields:
      step: The number of updates done.
      params: The parameters.
      state: The state of the optimizer.
      key: The key or seed of the run; None if none was saved.
      model_state: The state of the model, such as batch statistics; None if none was saved.
    """

    model_state: PyTree = None  # not in the tuple, which is unpacked into four

    def __new__(
        cls, step: int, params: PyTree, state: PyTree, key: jax.Array | int | None, model_state: PyTree = None
    ) -> Self:
        self = super().__new__(cls, step, params, state, key)
        self.model_state = model_state
        return self


def save(
    directory: str | os.PathLike[str],
    optimizer: GradientTransformation,
    params: PyTree,
    state: PyTree,
    *,
    step: int,
    key: jax.Array | int | None = None,
    keep: int | None = 3,
    model_state: PyTree = None,
) -> None:
    """Save a step, and wait until it is on disk.

    Args:
      directory: The directory of the run's checkpoints; each step is a folder in it.
      optimizer: A transformation of adamjax or optax. Its hyperparameters are saved as far as they can be read.
      params: The parameters: any pytree of arrays, with any sharding. With many processes, all must call `save`.
      state: The state of the optimizer, likewise.
      step: The number of updates done; more than at every saved step.
      key: The source of the run's randomness: a seed or a JAX key.
      keep: The number of most recent steps to keep. None: all.
      model_state: The state of the model, if it has one: any pytree of arrays and keys.

    Raises:
      ImportError: orbax is not installed; the message has the command to run.
      TypeError, ValueError: `step`, `keep` or `key` is invalid, or this step or a later one is saved already.

    >>> import adamjax, tempfile, jax.numpy as jnp
    >>> opt, params = adamjax.adamw(1e-3), {"w": jnp.arange(3.0)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     adamjax.checkpoint.save(folder, opt, params, opt.init(params), step=100, key=0)
    ...     found = adamjax.checkpoint.restore(folder, opt, params)
    >>> found.step, found.params
    (100, {'w': Array([0., 1., 2.], dtype=float32)})
    """
    checks.count("step", step, least=0)
    if keep is not None:
        checks.count("keep", keep)
    params, state, model_state = _as_arrays(params), _as_arrays(state), _as_arrays(model_state)
    versions = {"adamjax": __version__, "jax": jax.__version__}
    header = {"format": FORMAT, "versions": versions, "key": _key_to_json(key)}
    description = header | _schemas(optimizer, params, state, model_state)
    there = steps(directory)
    if there and step <= there[-1]:
        raise ValueError(
            f"Invalid step value: {step}; {directory} has step {there[-1]} already: "
            "remove that and those after it, or choose another directory"
        )
    ocp = _orbax()
    arrays = {"params": _by_path(params), "state": _by_path(state)}
    if model_state is not None:
        arrays["model_state"] = _by_path(model_state)
    items = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), description=ocp.args.JsonSave(description))
    with _manager(directory, max_to_keep=keep, cleanup_tmp_directories=True) as manager:
        manager.save(step, args=items, force=True)


def restore(
    directory: str | os.PathLike[str],
    optimizer: GradientTransformation,
    params: PyTree,
    *,
    state: PyTree = None,
    model_state: PyTree = None,
    step: int | None = None,
    new_hyperparameters: bool = False,
) -> Checkpoint:
    """Restore a step, bit for bit.

    Args:
      directory: The directory it was saved to.
      optimizer: The optimizer that was saved.
      params: A template of the parameters: arrays, or `jax.ShapeDtypeStruct`s. The arrays are restored to its
        shardings, whatever they were when the step was saved; without one, to the default device.
      state: A template of the state, for shardings that differ from those of the parameters. Default: `init`'s result.
      model_state: A template of the state of the model, if one was saved: arrays, or `jax.ShapeDtypeStruct`s.
      step: The step to restore. Default: the last.
      new_hyperparameters: True to take the numbers of `optimizer`, such as its learning rate, if others were saved.

    Returns:
      A `Checkpoint`.

    Raises:
      ImportError: orbax is not installed; the message has the command to run.
      FileNotFoundError: The directory does not have this step, or has none.
      ValueError: The step is of another optimizer, other parameters or a later format, or it is damaged. The
        message has the first path that differs.
    """
    ocp = _orbax()
    there = steps(directory)
    if not there or step not in (None, *there):
        has = f"it has {', '.join(map(str, there))}" if there else "it has none at all"
        raise FileNotFoundError(f"{directory} has no {'checkpoint' if step is None else f'step {step}'}: {has}")
    step = there[-1] if step is None else step
    where = Path(directory) / str(step)
    sharding = _default_sharding(params)
    params = _abstract(params, sharding)
    state = as_transformation(optimizer, "argument optimizer").init(params) if state is None else state
    state, model_state = _abstract(state, sharding), _abstract(model_state, sharding)
    with _manager(directory) as manager:
        described = ocp.args.Composite(description=ocp.args.JsonRestore())
        try:
            description = manager.restore(step, args=described)["description"]
        except (KeyError, FileNotFoundError, ValueError) as error:  # from JSON, or from orbax if it is not our step
            raise ValueError(f"{where} is not a checkpoint of adamjax: it has no description to be read") from error
        _refuse_others(where, description, _schemas(optimizer, params, state, model_state), new_hyperparameters)
        like = {"params": _by_path(params), "state": _by_path(state)}
        if model_state is not None:
            like["model_state"] = _by_path(model_state)
        try:
            arrays = manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(like)))["arrays"]
        except KeyError as error:
            raise ValueError(
                f"{where} is damaged: it has no arrays; restore another step, or remove this one"
            ) from error
    params, state = _from_paths(arrays["params"], params), _from_paths(arrays["state"], state)
    if model_state is not None:
        model_state = _from_paths(arrays["model_state"], model_state)
    return Checkpoint(step, params, state, _key_from_json(description["key"]), model_state)


def steps(directory: str | os.PathLike[str]) -> list[int]:
    """Return the steps that are saved in a directory.

    Args:
      directory: The directory of a run's checkpoints; it need not exist.

    Returns:
      Their numbers, in ascending order.

    Raises:
      ImportError: orbax is not installed; the message has the command to run.
    """
    ocp = _orbax()
    return sorted(ocp.utils.checkpoint_steps(os.path.abspath(directory))) if os.path.isdir(directory) else []


def _orbax() -> Any:
    return require("orbax.checkpoint", "checkpoint", "a checkpoint")


def _manager(directory: str | os.PathLike[str], **options: Any) -> Any:
    ocp = _orbax()
    # Save synchronously: the next training step reuses the memory of the donated arrays.
    chosen = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **options)
    return ocp.CheckpointManager(os.path.abspath(directory), options=chosen)


def _schemas(
    optimizer: GradientTransformation, params: PyTree, state: PyTree, model_state: PyTree
) -> dict[str, schema.Schema]:
    optimizer = as_transformation(optimizer, "argument optimizer")
    # Hyperparameters are compared by their values, also those in arrays.
    numbers = jax.tree.map(lambda x: np.asarray(x).tolist() if hasattr(x, "dtype") else x, optimizer)
    return {
        "optimizer": schema.tree_schema("optimizer", numbers),
        "params": schema.tree_schema("params", params),
        "state": schema.tree_schema("state", state),
        "model_state": schema.tree_schema("model_state", model_state),
    }


def _refuse_others(
    where: Path, there: dict[str, Any], here: dict[str, schema.Schema], new_hyperparameters: bool
) -> None:
    if there.get("format") != FORMAT:
        raise ValueError(f"{where} has format {there.get('format')}, expected {FORMAT}: update adamjax to restore it")
    optimizers = there["optimizer"], here["optimizer"]
    if (what := schema.first_difference(*optimizers, numbers=False)) is not None:
        raise ValueError(f"{where} is of another optimizer: {what}; restore it with the one that was saved")
    if not new_hyperparameters and (what := schema.first_difference(*optimizers)) is not None:
        raise ValueError(
            f"{where} is of an optimizer with other hyperparameters: {what}; "
            "if that is meant, restore it with new_hyperparameters=True"
        )
    without = {"model_state": schema.tree_schema("model_state", None)}  # of older checkpoints
    for name in ("params", "state", "model_state"):
        if (what := schema.first_difference((without | there)[name], here[name])) is not None:
            if _OLD_CODES.search(what):
                raise ValueError(
                    f"{where} has moments that an earlier version quantised, in codes that are no longer read: "
                    "restore it with that version and save float32 moments, or begin with init(params)"
                )
            raise ValueError(
                f"{where} does not fit: {what}; nothing is cast or reshaped, restore it into what was saved "
                "and convert that"
            )


def _as_arrays(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x if isinstance(x, (jax.Array, jax.ShapeDtypeStruct)) else jnp.asarray(x), tree)


def _sharding(x: jax.Array | jax.ShapeDtypeStruct) -> Sharding | None:
    """Return the sharding of `x`, or None if `x` is an uncommitted array."""
    return x.sharding if getattr(x, "committed", True) else None


def _default_sharding(params: PyTree) -> Sharding:
    """Return the sharding of arrays that have none, such as the step count: all devices of the parameters."""
    known = [sharding for x in jax.tree.leaves(_as_arrays(params)) if (sharding := _sharding(x)) is not None]
    meshes = [sharding.mesh for sharding in known if isinstance(sharding, NamedSharding)]
    return NamedSharding(meshes[0], PartitionSpec()) if meshes else (known or [jnp.zeros(()).sharding])[0]


def _abstract(tree: PyTree, default: Sharding) -> PyTree:
    tree = _as_arrays(tree)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x) or default), tree)


# A flat dict by path makes orbax independent of the tree's node types. Leave out empty arrays, which orbax rejects.
def _by_path(tree: PyTree) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): _key_data(x) for path, x in jax.tree.leaves_with_path(tree) if x.size}


def _from_paths(arrays: dict[str, jax.Array], like: PyTree) -> PyTree:
    def of_leaf(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        if not x.size:
            return jnp.zeros(x.shape, x.dtype, device=x.sharding)
        found = arrays[jax.tree_util.keystr(path)]
        return jax.random.wrap_key_data(found, impl=_key_impl(x)) if trees.is_key(x) else found

    return jax.tree.map_with_path(of_leaf, like)


def _key_data(x: Any) -> Any:
    """Return the bits of keys, since orbax does not save keys; other arrays as they are."""
    if not trees.is_key(x):
        return x
    if isinstance(x, jax.Array):
        return jax.random.key_data(x)
    bits = jax.eval_shape(jax.random.key_data, x)
    return jax.ShapeDtypeStruct(bits.shape, bits.dtype, sharding=x.sharding)


def _key_impl(like: jax.ShapeDtypeStruct) -> Any:
    found = []
    jax.eval_shape(lambda keys: found.append(jax.random.key_impl(keys)), like)  # it takes no abstract keys itself
    return found[0]


def _key_to_json(key: jax.Array | int | None) -> dict[str, Any] | int | None:
    if key is None or isinstance(key, int):
        return key
    typed = isinstance(key, jax.Array) and trees.is_key(key)
    bits = np.asarray(jax.random.key_data(key) if typed else key)
    if not np.issubdtype(bits.dtype, np.integer):
        raise TypeError(f"Invalid key value: {key!r}; key must be a seed or a key of JAX")
    return {"bits": bits.tolist(), "dtype": bits.dtype.name, "impl": str(jax.random.key_impl(key)) if typed else None}


def _key_from_json(key: dict[str, Any] | int | None) -> jax.Array | int | None:
    if not isinstance(key, dict):
        return key
    bits = jnp.asarray(key["bits"], key["dtype"])
    return bits if key["impl"] is None else jax.random.wrap_key_data(bits, impl=key["impl"])
