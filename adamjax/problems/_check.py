"""The check of a problem: methods, shapes, and that its functions are functions of their arguments."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core import checks, trees
from adamjax._core.typing import PyTree
from adamjax.problems._batches import BatchStream
from adamjax.problems._purity import calls_host, depends_on_arguments, equal, impurity, traced
from adamjax.problems._task import Task, check_metrics

_BATCHES = (
    "give the problem a method `batches(seed)`, which returns an iterable of batches, in place of `batch(step, key)`"
)
_REMEDIES = {
    "batch": f"for data of a loader, a generator or a file, {_BATCHES}; for random data, use jax.random with the key",
    "init": "draw the parameters from the key by jax.random",
    "loss": f"use jax.random with the key for noise, and take data from the batch; for data of a loader, {_BATCHES}",
    "evaluate": "keep the validation data in arrays, read before; for metrics on the host, set on_host = True",
}


def check(problem: Any) -> None:
    """Check that an object is a `Problem`, without training it.

    Its methods are traced twice, which computes nothing. Of batches from the host, the first is taken.

    Args:
      problem: The object.

    Raises:
      TypeError: The object is a class, lacks a method, or a method does not return what the protocol says.
      ValueError: A method would be frozen when it is traced: it draws from a loader or a generator, or reads a clock;
        or `batch` returns the same for all steps and keys, and the problem does not say `full_batch = True`.
    """
    checked(problem, 0)


def checked(problem: Any, seed: int) -> Task:
    """Check a problem, and return it as a `Task`. It keeps the batch from the host for a run with this seed."""
    name = type(problem).__name__
    if isinstance(problem, type):
        raise TypeError(f"{problem.__name__} is a class, and no problem: make one, {problem.__name__}(...)")
    given = [method for method in ("init", "batch", "loss", "evaluate", "batches") if _has(problem, method)]
    stands_for = given + ["batch"] * ("batches" in given)
    if missing := [method for method in ("init", "batch", "loss", "evaluate") if method not in stands_for]:
        or_else = "; batches(seed) may stand for batch" if "batch" in missing else ""
        raise TypeError(
            f"{name} is not a problem: it has no method {', '.join(missing)}{or_else} (see adamjax.problems.Problem)"
        )
    if "batch" in given and "batches" in given:
        raise TypeError(f"{name} has both batch and batches: keep the one that training is to use")
    for flag in ("stateful", "on_host", "full_batch"):
        if not isinstance(found := getattr(problem, flag, False), bool):
            raise TypeError(f"{name}.{flag} is {found!r}, expected True or False")
    task = Task(problem, BatchStream(problem, seed) if _has(problem, "batches") else None)
    key = trees.abstract_key()
    params, state = _init(task, key)
    batch = task.batch_like if task.is_fed else _batch(problem, key)
    _loss(task, params, state, batch, key)
    if not task.evaluates_on_host:
        arguments = (params, state) if task.is_stateful else (params,)
        check_metrics(problem, _pure(problem, "evaluate", *arguments), jax.ShapeDtypeStruct)
    return task


def _has(problem: Any, method: str) -> bool:
    return callable(getattr(problem, method, None))


def _init(task: Task, key: PyTree) -> tuple[PyTree, PyTree]:
    shapes = _pure(task.problem, "init", key)
    if not task.is_stateful:
        checks.parameters(shapes)
        return shapes, None
    if not (isinstance(shapes, tuple) and len(shapes) == 2):
        found = type(shapes).__name__ + (f" of {len(shapes)}" if isinstance(shapes, tuple) else "")
        name = type(task.problem).__name__
        raise TypeError(f"{name}.init returns a {found}; with stateful = True it returns (params, model_state)")
    params, state = shapes
    checks.parameters(params)
    return params, state


def _batch(problem: Any, key: PyTree) -> PyTree:
    step = jax.ShapeDtypeStruct((), jnp.int32)
    program, shapes = traced(problem.batch, step, key)
    if not (getattr(problem, "full_batch", False) or depends_on_arguments(program)):
        raise ValueError(
            f"{type(problem).__name__}.batch returns the same batch for all steps and keys, so that all of a run would "
            f"train on it: {_REMEDIES['batch']}; if the batch is all the data, set full_batch = True"
        )
    _refuse_impure(problem, "batch", program, step, key, traces=3)
    if calls_host(program):
        # No trace shows what a callback does, so it is called twice for the same batch.
        compute = jax.jit(problem.batch)
        first, again = (compute(np.int32(0), jax.random.key(0)) for _ in range(2))
        if any(not equal(x, y) for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True)):
            raise ValueError(
                f"{type(problem).__name__}.batch gives different batches for the same step and key, so that no run "
                f"could be repeated: {_REMEDIES['batch']}"
            )
    return shapes


def _loss(task: Task, params: PyTree, state: PyTree, batch: PyTree, key: PyTree) -> None:
    problem, name = task.problem, type(task.problem).__name__
    if not task.is_stateful:
        loss = _pure(problem, "loss", params, batch, key)
    else:
        returned = _pure(problem, "loss", params, state, batch, key)
        if not (isinstance(returned, tuple) and len(returned) == 2):
            raise TypeError(f"{name}.loss returns {returned}; with stateful = True it returns (loss, model_state)")
        loss, after = returned
        _check_state(name, state, after)
    if not (isinstance(loss, jax.ShapeDtypeStruct) and loss.shape == () and jnp.issubdtype(loss.dtype, jnp.floating)):
        raise TypeError(f"{name}.loss returns {loss}, expected a real floating point scalar")


def _check_state(name: str, before: PyTree, after: PyTree) -> None:
    there, here = (str(jax.tree.structure(state)) for state in (before, after))
    if there != here:
        raise TypeError(
            f"{name}.loss returns a model_state of {here}, and init one of {there}: it must keep its structure"
        )
    for (path, x), y in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True):
        inexact = jnp.issubdtype(x.dtype, jnp.inexact) and jnp.issubdtype(y.dtype, jnp.inexact)
        if x.shape != y.shape or (x.dtype != y.dtype and not inexact):
            where = f"model_state{jax.tree_util.keystr(path)}"
            raise TypeError(
                f"{name}.loss returns {y.dtype}{list(y.shape)} for {where}, and init {x.dtype}{list(x.shape)}: "
                "the state must keep its shapes and kinds of dtype"
            )


def _pure(problem: Any, method: str, *args: PyTree) -> PyTree:
    """Return the shapes of what a method returns; refuse one that is not a function of its arguments."""
    program, shapes = traced(getattr(problem, method), *args)
    _refuse_impure(problem, method, program, *args)
    return shapes


def _refuse_impure(problem: Any, method: str, program: Any, *args: PyTree, traces: int = 1) -> None:
    if how := impurity(getattr(problem, method), program, *args, traces=traces):
        raise ValueError(
            f"{type(problem).__name__}.{method} {how}, but it is compiled once, and then would stay as it was: "
            f"{_REMEDIES[method]}"
        )
