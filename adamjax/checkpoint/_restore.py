"""Restoring a step."""

import os
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax

from adamjax._core.files import DamagedFileError
from adamjax._core.typing import GradientTransformation, PyTree
from adamjax._transforms.base import as_transformation
from adamjax.checkpoint import _array_digests, _arrays, _description, _orbax, _step_folder


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


def restore(
    directory: str | os.PathLike[str],
    optimizer: GradientTransformation,
    params: PyTree,
    *,
    state: PyTree = None,
    model_state: PyTree = None,
    step: int | None = None,
    new_hyperparameters: bool = False,
    verify: bool = True,
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
      verify: False to restore without comparing files and arrays with their digests, which takes less time. Damage
        may then be restored as if it were right.

    Returns:
      A `Checkpoint`.

    Raises:
      ImportError: orbax is not installed; the message has the command to run.
      FileNotFoundError: The directory does not have this step, or has none.
      DamagedFileError: The step is damaged, or is not one of adamjax. The message has the file, and the newest step
        that is whole.
      ValueError: The step is of another optimizer, other parameters or a later format. The message has the first path
        that differs.
      OSError: The step cannot be read.
    """
    _orbax.orbax()
    there = _step_folder.steps(directory)
    if not there or step not in (None, *there):
        has = f"it has {', '.join(map(str, there))}" if there else "it has none at all"
        raise FileNotFoundError(f"{directory} has no {'checkpoint' if step is None else f'step {step}'}: {has}")
    step = there[-1] if step is None else step
    sharding = _arrays.default_sharding(params)
    params = _arrays.abstract(params, sharding)
    state = as_transformation(optimizer, "argument optimizer").init(params) if state is None else state
    state, model_state = (_arrays.abstract(tree, sharding) for tree in (state, model_state))
    here = _description.schemas(optimizer, params, state, model_state)
    folder = _step_folder.folder_of(directory, step)
    try:
        description = _description.read(folder, step)
        _description.refuse_others(folder, description, here, new_hyperparameters)
        if not (folder / _step_folder.ARRAYS).is_dir():
            raise DamagedFileError(folder / _step_folder.ARRAYS, f"{folder} is damaged: it has no arrays", step)
        _verify_files(folder, step, description, content=verify)
        items = _read_arrays(folder, step, _arrays.by_path(params, state, model_state), is_whole=verify)
        if verify:
            _verify_arrays(folder, step, description, items)
        key = _description.key_of(description, folder, step)
    except DamagedFileError as error:
        if not folder.is_dir():
            raise FileNotFoundError(f"{directory} has no step {step} any more: another process removed it") from error
        raise DamagedFileError(error.path, str(error) + _other_step(directory, step), step) from error
    params, state = _arrays.from_paths(items["params"], params), _arrays.from_paths(items["state"], state)
    if model_state is not None:
        model_state = _arrays.from_paths(items["model_state"], model_state)
    return Checkpoint(step, params, state, key, model_state)


def _other_step(directory: str | os.PathLike[str], damaged: int) -> str:
    """Return the end of the message about a damaged step: the newest of the others that is whole."""
    for step in reversed(_step_folder.steps(directory)):
        if step != damaged and _is_whole(_step_folder.folder_of(directory, step), step):
            return f"; step {step} is whole: restore(..., step={step})"
    return "; no other step there is whole"


def _is_whole(folder: Path, step: int) -> bool:
    try:
        digests = _description.read(folder, step).get("digests", {"files": {}})
        return _step_folder.is_whole(folder, digests["files"]) and (folder / _step_folder.ARRAYS).is_dir()
    except (ValueError, OSError):
        return False


def _verify_files(folder: Path, step: int, description: _description.Description, *, content: bool) -> None:
    if "digests" not in description:  # an earlier version saved it
        if (path := _step_folder.unreadable_file(folder)) is not None:
            raise DamagedFileError(path, f"{path} is damaged (it is not a file)", step)
        return
    found = _step_folder.first_damaged(folder, description["digests"]["files"], content=content)
    if found is not None:
        path = folder / found[0]
        raise DamagedFileError(path, f"{path} is damaged ({found[1]})", step)


def _read_arrays(
    folder: Path, step: int, like: dict[str, _arrays.ByPath], *, is_whole: bool
) -> dict[str, _arrays.ByPath]:
    ocp, path = _orbax.orbax(), folder / _step_folder.ARRAYS
    try:
        with _orbax.without_error_logs(), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path, args=ocp.args.StandardRestore(like))
    except Exception as error:
        if _orbax.is_damage(error) or (isinstance(error, MemoryError) and not is_whole):
            raise DamagedFileError(path, f"{path} is damaged ({_first_line(error)})", step) from error
        if (number := _orbax.os_error(error)) is not None:
            raise _orbax.sentence(number, f"{folder} cannot be read: {os.strerror(number)}") from error
        raise


def _verify_arrays(
    folder: Path, step: int, description: _description.Description, items: dict[str, _arrays.ByPath]
) -> None:
    if "digests" not in description:
        return
    saved = description["digests"]["arrays"]
    for name, digest in _array_digests.array_digests(_arrays.flat(items)).items():
        if saved.get(name) != digest:
            path = folder / _step_folder.ARRAYS
            raise DamagedFileError(path, f"{path} is damaged ({name} is not what was saved)", step)


def _first_line(error: Exception) -> Any:
    text = str(error).split("\n")[0]
    return f"{type(error).__name__}: {text[:200]}"
