"""Saving a step."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import jax

from adamjax._core import checks, files, processes
from adamjax._core.locks import FolderInUseError, FolderLock
from adamjax._core.typing import GradientTransformation, PyTree
from adamjax.checkpoint import _array_digests, _arrays, _description, _orbax, _step_folder


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
      FolderInUseError: Another process saves to this directory.
      OSError: The step could not be written, for instance because the disk is full. The steps before stay.

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
    params, state, model_state = map(_arrays.as_arrays, (params, state, model_state))
    description = _description.describe(optimizer, params, state, model_state, key)
    items = _arrays.by_path(params, state, model_state)
    final = _step_folder.folder_of(directory, step)
    folder, ocp = _step_folder.unfinished(final), _orbax.orbax()
    with ExitStack() as until_saved, _in_one_sentence(final):
        with processes.together():
            if processes.is_first():
                files.make_folder(final.parent)
                until_saved.enter_context(FolderLock(final.parent))
                _refuse_earlier(directory, step)
                _step_folder.remove_unfinished(final.parent)
        digests = _array_digests.array_digests(_arrays.flat(items))
        arguments = {_step_folder.ARRAYS: ocp.args.StandardSave(items), "description": ocp.args.JsonSave(description)}
        handler = ocp.CompositeCheckpointHandler(*arguments)
        with _orbax.without_error_logs(), ocp.Checkpointer(handler) as checkpointer:
            # It returns when the files are complete: the next training step reuses the memory of the donated arrays.
            checkpointer.save(folder, args=ocp.args.Composite(**arguments))
        sealed = _step_folder.seal(folder)
        with processes.together():
            if processes.is_first():
                _description.write(folder, description, digests, sealed)
                _step_folder.commit(folder, final)
                if keep is not None:
                    _step_folder.remove_before(final.parent, keep)


def _refuse_earlier(directory: str | os.PathLike[str], step: int) -> None:
    there = _step_folder.steps(directory)
    if there and step <= there[-1]:
        raise ValueError(
            f"Invalid step value: {step}; {directory} has step {there[-1]} already: if another run writes there, "
            "choose another directory; if it is an earlier run of yours, go on from that step, or remove it and "
            "those after yours"
        )


@contextmanager
def _in_one_sentence(final: Path) -> Iterator[None]:
    """Remove what was written if the step cannot be saved, and say so if that is because of the machine."""
    try:
        yield
    except FolderInUseError:
        raise
    except BaseException as error:
        if processes.is_first():
            for unfinished in final.parent.glob(f"{_step_folder.unfinished(final).name}*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        number = _orbax.os_error(error)
        if number is None or not isinstance(error, Exception):
            raise
        rest = ""
        with suppress(OSError):
            rest = "".join(f"; step {last} stays whole" for last in _step_folder.steps(final.parent)[-1:])
        message = f"step {final.name} was not saved: {os.strerror(number)}, in {final.parent}{rest}"
        raise _orbax.sentence(number, message) from error
