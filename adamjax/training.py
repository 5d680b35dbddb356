"""Training: one compiled step that works in place, and whole runs of a problem."""

import itertools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adamjax._core import checks, low_precision, signals, trees
from adamjax._core.typing import DTypeLike, GradientTransformation, PyTree
from adamjax._transforms.base import Transformation, as_transformation, contains_foreign, may_skip
from adamjax._transforms.eval_params import evaluated_params
from adamjax.diagnostics import AdamStats, measure
from adamjax.problems import Problem
from adamjax.problems._batches import AHEAD, prefetched, stacked
from adamjax.problems._check import checked
from adamjax.problems._task import Model, Task
from adamjax.safety import DynamicLossScale, check_skipped, was_skipped
from adamjax.sharding import init_sharded, state_sharding

LossAndAux = Callable[[PyTree, PyTree], tuple[Array, PyTree]]  # called as (params, batch)


def step_fn(
    loss_fn: Callable[[PyTree, PyTree], Any],
    opt: GradientTransformation,
    *,
    has_aux: bool = False,
    accumulate: int = 1,
    accumulate_dtype: DTypeLike | None = None,
) -> "TrainStep":
    """A compiled training step that updates parameters and state in place.

    The step takes `(params, state, batch)` and returns `(params, state, loss)`. It donates parameters and state, so
    continue with those that it returns. They come in the order of the arguments: JAX then gives each its own memory
    again, and copies nothing. A gradient is freed once its parameter is stepped, unless something must see all of them
    first, such as `clip_by_global_norm`. Each call of `step_fn` compiles anew: call it before the loop.

    Args:
      loss_fn: Called as `loss_fn(params, batch)`; returns a real floating point scalar. Parameters may be complex.
      opt: A transformation, ours or optax's. It gets the loss as `value`. With `dynamic_loss_scale`, which must be
        outermost, the scaled loss is differentiated; the returned loss is not scaled. Its hyperparameters are
        constants of the compiled step: use a schedule to change them during a run.
      has_aux: If True, `loss_fn` returns `(loss, aux)`, with any pytree of arrays, and the step also returns `aux`.
      accumulate: Number k of equal micro-batches to divide each batch into. They are computed one after another, to
        save memory; the step keeps one mean of their gradients. Loss and gradients are means over
        them, equal to those of the whole batch if the loss is a mean over its rows. All arrays of the batch must have
        the same first axis, divisible by k. Micro-batch i has rows i, i + k, i + 2k, ..., so a batch that is sharded
        by rows stays on its devices. Scalars, such as a key, go to all. `aux` gets a new first axis of length k.
      accumulate_dtype: "bfloat16" keeps that mean in 2 bytes instead of 4 for each number, rounded stochastically:
        it stays unbiased, where rounding to nearest would lose what the later micro-batches add. A fused step reads it
        as it is. None keeps it in float32 or wider. Parameters that are complex or float64 are not affected.

    Returns:
      The step. On a mesh, parameters and state keep the shardings that they have at its first call. Its parameters are
      those that are trained: with `schedule_free_adamw` or `average_params`, evaluate at `eval_params(state, params)`.

    Raises:
      TypeError, ValueError: `loss_fn` is not a function, `opt` not a transformation, `has_aux` not a bool,
        `accumulate` not an int of at least 1, or `accumulate_dtype` another dtype; `dynamic_loss_scale` is not around
        all of `opt`. At the first call of the step: `loss_fn` does not return a real floating point scalar, or
        `(loss, aux)` if `has_aux`; parameters and state are swapped; an array of the batch cannot be divided by
        `accumulate` (the message has its path).

    >>> import adamjax, jax.numpy as jnp
    >>> opt = adamjax.adam(0.1)
    >>> step = adamjax.training.step_fn(lambda params, batch: jnp.mean((batch @ params["w"] - 1) ** 2), opt)
    >>> params = {"w": jnp.zeros(2)}
    >>> state = opt.init(params)
    >>> for _ in range(100):
    ...     params, state, loss = step(params, state, jnp.eye(2))
    >>> bool(loss < 1e-3)
    True
    """
    checks.function("loss_fn", loss_fn)
    optimizer = as_transformation(opt, "argument opt of step_fn")
    _check_scale(optimizer)
    checks.choice("has_aux", has_aux, (False, True))
    checks.count("accumulate", accumulate)
    narrow: Any = accumulate_dtype
    if narrow is not None:
        narrow = checks.dtype("accumulate_dtype", narrow, ("bfloat16",), "accumulate_dtype must be bfloat16 or None")

    checked_loss = partial(_loss_and_aux, loss_fn, has_aux)

    def train_step(params: PyTree, state: PyTree, batch: PyTree) -> tuple[Any, ...]:
        _check_params(params, state)
        loss, aux, grads = _accumulated(checked_loss, optimizer, params, state, batch, accumulate, narrow)
        params, state = optimizer.step(grads, state, params, value=loss)
        return (params, state, loss, aux) if has_aux else (params, state, loss)

    return TrainStep(train_step, 2 if has_aux else 1, optimizer)


class TrainStep:
    """A compiled training step, as `step_fn` returns it.

    New parameters and state take the memory of the old ones, and their shardings over a mesh.
    """

    def __init__(
        self, step: Callable[..., tuple[Any, ...]], results: int, optimizer: Transformation | None = None
    ) -> None:
        self._step = step
        self._optimizer = optimizer  # where the state may come from a file, in other nodes than the optimizer's
        self._results = results  # how many `step` returns after parameters and state
        self._jitted: jax.stages.Wrapped | None = None
        self._shardings: tuple[Any, ...] | None = None  # of the results of `_jitted`

    def __call__(self, params: PyTree, state: PyTree, batch: PyTree) -> tuple[Any, ...]:
        if self._jitted is None and self._optimizer is not None:
            state = self._optimizer._in_own_nodes(state, params)
        if _is_tracing():  # as a part of another program, which takes no options
            return self._jit_with(self._shardings or self._shardings_of(params, state))(params, state, batch)
        return (self._jitted or self._jit(params, state))(params, state, batch)

    def lower(self, params: PyTree, state: PyTree, batch: PyTree) -> jax.stages.Lowered:
        """Lower the step for these arguments, like the method of a jitted function."""
        if self._optimizer is not None:
            state = self._optimizer._in_own_nodes(state, params)
        return (self._jitted or self._jit(params, state)).lower(params, state, batch)

    def _jit(self, params: PyTree, state: PyTree) -> jax.stages.Wrapped:
        self._shardings = self._shardings_of(params, state)
        self._jitted = self._jit_with(self._shardings, compiler_options=_compiler_options(jax.default_backend()))
        return self._jitted

    def _jit_with(self, shardings: tuple[Any, ...], **options: Any) -> jax.stages.Wrapped:
        return jax.jit(self._step, donate_argnums=(0, 1), out_shardings=shardings, **options)

    def _shardings_of(self, params: PyTree, state: PyTree) -> tuple[Any, ...]:
        def sharding(x: Any) -> NamedSharding | None:
            found = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
            return found if isinstance(found, NamedSharding) else None

        # The compiler may shard results otherwise, and then the second step would compile again. In Auto mode
        # shardings are known only here, not while tracing.
        return (*jax.tree.map(sharding, (params, state)), *[None] * self._results)


def _is_tracing() -> bool:
    """Return whether a transformation of JAX traces the code that is running."""
    now = jax.extend.core.get_opaque_trace_state()
    with jax.core.eval_context():
        return bool(now != jax.extend.core.get_opaque_trace_state())


@cache
def _compiler_options(platform: str) -> dict[str, bool] | None:
    """Options for XLA to step a parameter in place once its gradient exists, and then to free the gradient.

    The backward pass still reads parameters whose gradients exist, and by default XLA on a CPU copies them all.
    With these options, it steps each parameter after the last operation that reads it.
    """
    options = {"xla_cpu_copy_insertion_use_region_analysis": True}
    if platform != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:  # a version of XLA without this option
        return None
    return options


def _loss_and_aux(loss_fn: Callable[..., Any], has_aux: bool, params: PyTree, batch: PyTree) -> tuple[Array, PyTree]:
    returned = loss_fn(params, batch)
    if has_aux and not (isinstance(returned, tuple) and len(returned) == 2):
        raise TypeError(f"loss_fn returned {_shown(returned)}, and has_aux=True expects (loss, aux)")
    loss, aux = returned if has_aux else (returned, None)
    if not (getattr(loss, "shape", None) == () and jnp.issubdtype(loss.dtype, jnp.floating)):
        remedy = "; for (loss, aux), take has_aux=True" if isinstance(loss, tuple) else ""
        raise TypeError(
            f"the loss that loss_fn returned is {_shown(loss)}, expected a real floating point scalar{remedy}"
        )
    return loss, aux


def _shown(x: Any) -> str:
    return str(jax.typeof(x)) if hasattr(x, "dtype") else f"a {type(x).__name__}"


def _check_params(params: PyTree, state: PyTree) -> None:
    """Refuse parameters that cannot be differentiated, and a state in their place."""
    try:
        checks.parameters(params)
    except TypeError as error:
        # Nearly every state has an integer count.
        if all(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(state)):
            raise TypeError(f"{error}. Are they swapped? The order is step(params, state, batch)") from None
        raise


def _accumulated(
    loss_fn: LossAndAux,
    optimizer: Transformation,
    params: PyTree,
    state: PyTree,
    batch: PyTree,
    count: int,
    narrow: np.dtype | None,
) -> tuple[Array, PyTree, PyTree]:
    """The loss, `aux` and gradients of a batch: means over `count` micro-batches, but all of their `aux`."""
    if count == 1:
        return _loss_and_gradients(loss_fn, optimizer, params, state, batch)
    micro_batch = _divided(batch, count)

    def add_one(means: list[Array], i: Array) -> tuple[list[Array], PyTree]:
        loss, aux, grads = _loss_and_gradients(loss_fn, optimizer, params, state, micro_batch(i))
        # Other losses give other random numbers, at the next step, too.
        seed = jax.lax.bitcast_convert_type(loss.astype(jnp.float32), jnp.uint32)
        pairs = enumerate(zip(means, jax.tree.leaves(grads), strict=True))
        return [_added(x, g, count, low_precision.dither(i, number, seed)) for number, (x, g) in pairs], (loss, aux)

    leaves: list[Array] = jax.tree.leaves(params)
    structure: Any = jax.tree.structure(params)
    wide = [trees.compute_dtype(p.dtype) for p in leaves]
    kept = [narrow if narrow is not None and dtype == jnp.float32 else dtype for dtype in wide]
    # The means are the carry of the loop, so that only one micro-batch's gradients exist beside them.
    zeros = [jnp.zeros_like(p, dtype) for p, dtype in zip(leaves, kept, strict=True)]
    means, (losses, aux) = jax.lax.scan(add_one, zeros, jnp.arange(count))
    # In their usual dtype, as without micro-batches: some of optax's states take on the dtype of the gradients.
    as_usual = narrow is None or contains_foreign(optimizer)
    rows = zip(means, leaves, strict=True)
    grads = structure.unflatten([x.astype(p.dtype) if as_usual else x for x, p in rows])
    return losses.mean(dtype=trees.compute_dtype(losses.dtype)).astype(losses.dtype), aux, grads


def _added(mean: Array, g: Array, count: int, dither: low_precision.Dither) -> Array:
    """One micro-batch of `count` more in a mean."""
    wide = trees.compute_dtype(mean.dtype)
    new = mean.astype(wide) + g.astype(wide) / count
    return new if mean.dtype == wide else low_precision.stochastic_round(new, dither, mean.dtype).astype(mean.dtype)


def _divided(batch: PyTree, count: int) -> Callable[[Array], PyTree]:
    """From the index of a micro-batch to its rows: every `count`-th, so that each device finds its part of them."""
    arrays = [(f"batch{jax.tree_util.keystr(path)}", x) for path, x in jax.tree.leaves_with_path(batch) if x.ndim]
    for name, x in arrays:
        if x.shape[0] % count:
            raise ValueError(
                f"{name} has {x.shape[0]} rows along its first axis, which accumulate={count} does not divide: choose "
                f"a batch size that is a multiple of {count}"
            )
        if x.shape[0] != arrays[0][1].shape[0]:
            raise ValueError(
                f"{name} has {x.shape[0]} rows along its first axis, and {arrays[0][0]} has {arrays[0][1].shape[0]}: "
                "accumulate divides this axis, so all arrays of the batch must have the same number"
            )
    columns = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]) if x.ndim else x, batch)

    def micro_batch(i: Array) -> PyTree:
        # A slice, where a transposed batch would be a copy of it.
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False) if x.ndim else x, columns)

    return micro_batch


def _loss_and_gradients(
    loss_fn: LossAndAux, optimizer: Transformation, params: PyTree, state: PyTree, batch: PyTree
) -> tuple[Array, PyTree, PyTree]:
    """The loss, `aux`, and the gradients that `optimizer` takes: scaled, if it scales the loss."""

    def objective(params: PyTree) -> tuple[Array, tuple[Array, PyTree]]:
        loss, aux = loss_fn(params, batch)
        return optimizer.scale(loss, state) if isinstance(optimizer, DynamicLossScale) else loss, (loss, aux)

    grads, (loss, aux) = jax.grad(objective, has_aux=True)(params)
    # JAX's gradient of a complex parameter is the conjugate of the direction of steepest ascent.
    return loss, aux, jax.tree.map(jnp.conj, grads)


def _check_scale(optimizer: Transformation) -> None:
    """Refuse a loss scale inside another transformation: nobody could scale the loss by it."""
    parts = jax.tree.leaves(optimizer, is_leaf=lambda x: isinstance(x, DynamicLossScale))
    if not isinstance(optimizer, DynamicLossScale) and any(isinstance(x, DynamicLossScale) for x in parts):
        raise ValueError(
            f"dynamic_loss_scale is within {type(optimizer).__name__}, where the loss cannot be scaled: "
            "put it around all the others, dynamic_loss_scale(chain(...))"
        )


class Report(NamedTuple):
    """The progress of a run.

    Fields:
      step: Number of updates done.
      losses: float64[n], the training losses of the n updates since the last report.
      metrics: The results of `problem.evaluate`, at `eval_params`, as floats; None if this report has no evaluation.
      params: The parameters that are trained. The next step reuses their memory, so copy them to keep them.
      state: The optimizer's state; the next step reuses its memory, too.
      diverged_at: The first step (counted from 1) whose loss was not finite, which ends the run; None if
        there was none, or if the optimizer skips such steps.
      stats: Figures of the next update, if `diagnose` is True and there is a next update.
      model_state: The state of the model, if the problem is `stateful`; the next step reuses its memory, too.
      stopped: Whether `stop` ends the run here. The report then comes twice: at once, so that it can be saved, and
        again with metrics, when they are evaluated.
    """

    step: int
    losses: np.ndarray
    metrics: dict[str, float] | None
    params: PyTree
    state: PyTree
    diverged_at: int | None = None
    stats: AdamStats | None = None
    model_state: PyTree = None
    stopped: bool = False

    @property
    def eval_params(self) -> PyTree:
        """The parameters to evaluate at: those of `adamjax.eval_params` if the optimizer averages, else `params`."""
        return evaluated_params(self.state, self.params)


def train(
    problem: Problem,
    optimizer: GradientTransformation,
    *,
    steps: int,
    seed: int = 0,
    dtype: DTypeLike | None = None,
    report_every: int = 10,
    evaluate_every: int = 100,
    stop: Callable[[], bool] = lambda: False,
    start: Any = None,
    diagnose: bool = False,
    mesh: Mesh | None = None,
) -> Iterator[Report]:
    """Train a problem, with reports on the way.

    Args:
      problem: The problem to train.
      optimizer: A transformation, ours or optax's. The loss of the batch is passed to it as `value`.
      steps: Number of updates, including those before `start`.
      seed: Seed of the parameters, the order of the data and the keys of the loss.
      dtype: Dtype of the parameters; None for the dtypes that `problem.init` returns.
      report_every: Updates between reports.
      evaluate_every: Updates between evaluations.
      stop: Called after each update, with the same result in all processes; the run ends when it returns True. See
        `stop_on_signals`.
      start: A `Report` or `checkpoint.Checkpoint` of the same run, to continue from. The next step reuses its memory.
        The continued run equals the uninterrupted one to the last bit; batches from the host are skipped up to there.
        If `stop` ended the run between two reports, only a `Report` has the losses that belong to the next one.
      diagnose: If True, measure the next update at each report (see `adamjax.diagnostics`). That update is then
        computed twice, so that measuring does not change a bit of the run.
      mesh: Devices to train on, with axes in Auto mode: of this process or, after `jax.distributed.initialize`, of many
        that all call this. Each device takes an equal part of each batch, along the first axis of its arrays, but the
        methods of the problem see the whole batch. A batch from the host is that of one process: the whole batch has
        those of all. The parameters are replicated, unless the problem has `param_shardings`; the state is as they
        are, unless `adamjax.sharding.zero1` around the optimizer divides it. None: one device.

    Returns:
      An iterator of reports: one before the first step (but not at `start`), then as often as asked for. Metrics are
      those of `Report.eval_params`: of an average, if the optimizer keeps one. The last report has metrics; it comes
      early if `stop` returns True, or if a loss is not finite and no `skip_nonfinite` or `dynamic_loss_scale` skips
      such steps.

    Raises:
      TypeError: `problem` is not a `Problem`, `optimizer` not a transformation, or `start` not a report or checkpoint.
      ValueError, TypeError: A number of steps is less than 1, or not an int; `seed` is not an int, or has more than
        64 bits; `mesh` is not a mesh in Auto mode, or its devices cannot share a batch equally; a method of the problem
        is not a function of its arguments, see `adamjax.problems.check`. In the iterator: `dynamic_loss_scale` is not
        around all of the optimizer; the batches from the host end before the run does, or change their shapes.
      FloatingPointError: In the iterator: as many steps were skipped in a row as the optimizer allows.
      Exception: In the iterator: an error of the problem's loader, with a note of the step.

    >>> import adamjax
    >>> from adamjax.training import train
    >>> for report in train(adamjax.problems.digits(), adamjax.adam(3e-3), steps=200):
    ...     pass
    >>> report.step, report.metrics["accuracy"] > 0.9
    (200, True)
    """
    for name, x in (("steps", steps), ("report_every", report_every), ("evaluate_every", evaluate_every)):
        checks.count(name, x)
    task = checked(problem, seed)
    transformation = as_transformation(optimizer, "argument optimizer of train")
    keys = keys_of(seed)
    checks.function("stop", stop)
    checks.choice("diagnose", diagnose, (False, True))
    if start is not None and not all(hasattr(start, name) for name in ("step", "params", "state")):
        raise TypeError(f"Invalid start value: {start!r}; start must be a Report of train, or a Checkpoint of one")
    if start is not None and task.is_stateful and getattr(start, "model_state", None) is None:
        raise ValueError("Invalid start value: it has no model_state, and the problem is stateful: save it, too")
    if mesh is not None:
        task = ShardedTask(task, mesh)

    def is_due(step: int) -> bool:
        return step == steps or not (step % report_every and step % evaluate_every)

    def reports() -> Iterator[Report]:
        advance = TrainStep(partial(update_model, task, transformation, keys), 1)
        measure_next = jax.jit(partial(measured_step, task, transformation, keys), out_shardings=_everywhere(task))
        evaluate = evaluator(task)
        if start is None:
            first, (model, state) = 0, initial(task, transformation, dtype, keys)
        else:
            first, state = start.step + 1, start.state
            model = Model(start.params, start.model_state if task.is_stateful else None)
        feed = _Feed(task, seed, max(first, 1) - 1, steps)
        pending: Any = () if start is None or is_due(start.step) else getattr(start, "losses", ())
        losses: list[Array] = []
        for step in range(first, steps + 1):
            if step:
                model, state, loss = advance(model, state, (np.int32(step - 1), feed.take()))
                losses.append(loss)
                if task.is_fed and len(losses) > AHEAD:  # or batches would wait for the device, and fill its memory
                    losses[-1 - AHEAD].block_until_ready()
            stopped = step < steps and stop()
            if not (stopped or is_due(step)):
                continue
            found = np.asarray([*pending, *jax.device_get(losses)], np.float64)
            pending = ()
            losses.clear()
            bad = np.flatnonzero(~np.isfinite(found))
            diverged_at = step - len(found) + int(bad[0]) + 1 if len(bad) and not may_skip(transformation) else None
            report = Report(step, found, None, model.params, state, diverged_at, None, model.state, stopped)
            if stopped:
                yield report
            last = step == steps or diverged_at is not None or stopped
            if diagnose and not last:
                report = report._replace(stats=measure_next(model, state, (np.int32(step), feed.peek())))
            if last or step % evaluate_every == 0:
                report = report._replace(metrics=evaluate(model, state))
            yield report
            check_skipped(state)
            if last:
                return

    return reports()


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Stop `train` at a signal: Ctrl-C, SIGTERM, by which schedulers preempt a job, or SIGHUP.

    The run ends after the update that is running, and its last reports can be saved. A second Ctrl-C interrupts at
    once. A SIGHUP that the process ignores, as under nohup, stays ignored. After `jax.distributed.initialize`, a signal
    to any process stops all of them after the same update, by JAX's preemption service, which hears SIGTERM until the
    process ends. In a thread other than the main one, signals are left as they are.

    Returns:
      A context manager that gives the `stop` of `train` or `tune`. All processes must call it equally often.

    Raises:
      RuntimeError: There are many processes, and JAX's preemption service is switched off
        (jax_enable_preemption_service).

    >>> import adamjax
    >>> from adamjax import training
    >>> with training.stop_on_signals() as stop:
    ...     for report in training.train(adamjax.problems.digits(), adamjax.adam(), steps=20, stop=stop):
    ...         pass  # save it if report.stopped
    >>> report.stopped
    False
    """
    if jax.process_count() == 1:
        stopped = threading.Event()
        with signals.calls_on_signals(stopped.set):
            yield stopped.is_set
        return
    asked = itertools.count()
    # The service hears SIGTERM by itself.
    others = [number for number in signals.STOPS if number != signal.SIGTERM]
    with signals.calls_on_signals(lambda: os.kill(os.getpid(), signal.SIGTERM), others):
        yield lambda: multihost_utils.reached_preemption_sync_point(next(asked))


class ShardedTask(Task):
    """A task on the devices of a mesh: batches are divided along their first axis, parameters as the problem says.

    Raises:
      TypeError, ValueError: The mesh is not one in Auto mode, or its devices cannot share a batch equally.
    """

    def __init__(self, task: Task, mesh: Mesh) -> None:
        vars(self).update(vars(task))
        if not isinstance(mesh, Mesh) or set(mesh.axis_types) != {AxisType.Auto}:
            raise TypeError(f"Invalid mesh value: {mesh!r}; mesh must be a jax.sharding.Mesh with axes in Auto mode")
        axes = tuple(getattr(task.problem, "batch_axes", mesh.axis_names))
        batch, parts = task.batch_like, math.prod(mesh.shape[axis] for axis in axes)
        if task.is_fed:
            parts = max(parts // jax.process_count(), 1)
        else:
            batch = jax.eval_shape(task.problem.batch, np.int32(0), jax.random.key(0))
        for path, x in jax.tree.leaves_with_path(batch):
            if x.ndim and x.shape[0] % parts:
                raise ValueError(
                    f"batch{jax.tree_util.keystr(path)} has shape {x.shape}, and {parts} devices cannot share "
                    f"{x.shape[0]} rows equally: choose a batch size that is a multiple of {parts}"
                )
        self._mesh = mesh
        self._by_rows = NamedSharding(mesh, PartitionSpec(axes))
        self.replicated: NamedSharding = NamedSharding(mesh, PartitionSpec())

    def init(self, key: Array) -> Model:
        """The model: its parameters in their shardings, its state on all devices."""
        model = super().init(key)
        shardings = model_shardings(self.problem, self._mesh, jax.eval_shape(lambda: model))
        return jax.lax.with_sharding_constraint(model, shardings)

    def batch(self, step: Array, key: Array, fed: PyTree) -> PyTree:
        """The whole batch, its arrays divided by rows; scalars are on all devices."""
        batch = super().batch(step, key, fed)
        return jax.lax.with_sharding_constraint(batch, jax.tree.map(self._sharding_of, batch))

    def place(self, batch: PyTree, *, blocked: bool = False) -> PyTree:
        """The whole batch, from the part that this process has; or a block of batches, along a first axis."""

        def placed(x: np.ndarray) -> Array:
            sharding = self._sharding_of(x[0] if blocked else x)
            if blocked:
                sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
            return jax.make_array_from_process_local_data(sharding, x)

        return jax.tree.map(placed, batch)

    def _sharding_of(self, x: Array | np.ndarray) -> NamedSharding:
        return self._by_rows if x.ndim else self.replicated


def model_shardings(problem: Problem, mesh: Mesh, model: Model) -> Model:
    """The sharding of each array of an abstract model: replicated, unless the problem has `param_shardings`."""
    specs = jax.tree.map(lambda _: PartitionSpec(), model)
    if callable(rule := getattr(problem, "param_shardings", None)):
        specs = Model(rule(mesh, model.params), specs.state)

    def is_spec(x: object) -> bool:
        return isinstance(x, PartitionSpec)

    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def data_mesh() -> Mesh:
    """All devices of all processes in one row, over which batches are divided."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def evaluator(task: Task) -> Callable[[Model, PyTree], dict[str, float]]:
    """Return a function that evaluates a model, given the optimizer's state, and gives floats.

    It does so on the device or on the host, as the problem asks.
    """

    def evaluate(model: Model, state: PyTree) -> Mapping[str, Any]:
        return task.evaluate(evaluated_model(model, state))

    compiled = evaluate if task.evaluates_on_host else jax.jit(evaluate, out_shardings=_everywhere(task))
    return lambda model, state: {name: float(x) for name, x in compiled(model, state).items()}


def evaluated_model(model: Model, state: PyTree) -> Model:
    """The model to evaluate, where the optimizer's state says other parameters than those that are trained."""
    return model._replace(params=evaluated_params(state, model.params))


def _everywhere(task: Task) -> NamedSharding | None:
    """The sharding of figures, which every process reads."""
    return task.replicated if isinstance(task, ShardedTask) else None


class Keys(NamedTuple):
    """Keys for all the randomness of a run: of the parameters, the data and the loss."""

    init: Array
    data: Array
    loss: Array


def keys_of(seed: int | Array) -> Keys:
    """Make the keys of the run with this seed.

    Args:
      seed: An int, or an integer scalar.

    Returns:
      `Keys`, the same in every process for the same seed.

    Raises:
      TypeError, ValueError: `seed` is not such an int, or has more than 64 bits.
    """
    return Keys(*jax.random.split(jax.random.key(checks.integer("seed", seed)), 3))


def first_model(task: Task, dtype: DTypeLike | None, keys: Keys) -> Model:
    """The model before the first step, its parameters in `dtype`, or as `init` returns them if it is None."""
    params, state = jax.tree.map(jnp.asarray, task.init(keys.init))
    if dtype is None:
        return Model(params, state)
    for path, p in jax.tree.leaves_with_path(params):
        if jnp.iscomplexobj(p) and not jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"Invalid dtype value: {dtype!r}; params{jax.tree_util.keystr(path)} is {p.dtype}, "
                "and would lose its imaginary part"
            )
    return Model(jax.tree.map(lambda p: p.astype(dtype), params), state)


def model_like(problem: Problem, dtype: DTypeLike | None, mesh: Mesh | None) -> Model:
    """The abstract model of a run, with its shardings on a mesh: the template to restore a checkpoint to."""
    model = jax.eval_shape(partial(first_model, Task(problem), dtype), jax.eval_shape(keys_of, 0))
    if mesh is None:
        return model
    shardings = model_shardings(problem, mesh, model)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), model, shardings)


def train_step(
    problem: Problem, optimizer: Transformation, keys: Keys, params: PyTree, state: PyTree, step: Array
) -> tuple[PyTree, PyTree, Array]:
    """Make update number `step` (0 is the first); return the new parameters and state, and the loss before it.

    The problem has a `batch` and no state of the model: this is for programs that train in loops of their own.
    """
    model, state, loss = update_model(Task(problem), optimizer, keys, Model(params, None), state, (step, None))
    return model.params, state, loss


def update_model(
    task: Task, optimizer: Transformation, keys: Keys, model: Model, state: PyTree, numbered: tuple[Array, PyTree]
) -> tuple[Model, PyTree, Array]:
    """Make an update, `numbered` from 0 and with its batch if that is from the host.

    Returns the new model and state, and the loss before it.
    """
    loss, grads, model_state = gradients(task, optimizer, keys, model, state, numbered)
    params, after = optimizer.step(grads, state, model.params, value=loss)
    if may_skip(optimizer) and model_state is not None:
        # A skipped step changes nothing: what made the gradients not finite may be in the statistics as well.
        skipped = was_skipped(after)
        model_state = jax.tree.map(lambda old, new: jnp.where(skipped, old, new), model.state, model_state)
    return Model(params, model_state), after, loss


def gradients(
    task: Task, optimizer: Transformation, keys: Keys, model: Model, state: PyTree, numbered: tuple[Array, PyTree]
) -> tuple[Array, PyTree, PyTree]:
    """The loss at an update, the gradients for `optimizer`, and the state of the model after the update.

    The gradients are scaled, if `optimizer` scales the loss.
    """
    _check_scale(optimizer)
    step, fed = numbered

    def loss_fn(params: PyTree, batch: PyTree) -> tuple[Array, PyTree]:
        return task.loss(params, model.state, batch, jax.random.fold_in(keys.loss, step))

    batch = task.batch(step, keys.data, fed)
    loss, model_state, grads = _loss_and_gradients(loss_fn, optimizer, model.params, state, batch)
    return loss, grads, model_state


def measured_step(
    task: Task, optimizer: Transformation, keys: Keys, model: Model, state: PyTree, numbered: tuple[Array, PyTree]
) -> AdamStats:
    """Figures of an update, `numbered` and with its batch if that is from the host, without making it."""
    loss, grads, _ = gradients(task, optimizer, keys, model, state, numbered)
    updates, after = optimizer.update(grads, state, model.params, value=loss)
    if isinstance(optimizer, DynamicLossScale):
        grads = optimizer.unscale(grads, state)
    return measure(grads, updates, after, model.params, opt=optimizer)


class _Feed:
    """The batches of steps `first` (from 0) to `last` that come from the host; None for each if they do not.

    Each is copied to the device when it is asked for, which is while the device computes the steps before.
    """

    def __init__(self, task: Task, seed: int, first: int, last: int) -> None:
        self._items: Iterator[PyTree] = itertools.repeat(None)
        self._held: PyTree = None
        if task.is_fed:
            ranges = ((step, step + 1) for step in range(first, last))
            ready = prefetched(stacked([task.stream(seed, first)], ranges, 1))
            self._items = (task.place(jax.tree.map(lambda x: x[0, 0], batches)) for _, _, batches in ready)

    def peek(self) -> PyTree:
        """Return the next batch, which is still the next one afterwards."""
        if self._held is None:
            self._held = next(self._items)
        return self._held

    def take(self) -> PyTree:
        batch, self._held = self.peek(), None
        return batch


def initial(task: Task, optimizer: Transformation, dtype: DTypeLike | None, keys: Keys) -> tuple[Model, PyTree]:
    """The model and the state of the optimizer before the first step."""
    if isinstance(task, ShardedTask):
        model = jax.jit(partial(first_model, task, dtype))(keys)
        return model, init_sharded(optimizer, model.params, state_sharding(optimizer, model.params))

    def make(keys: Keys) -> tuple[Model, PyTree]:
        model = first_model(task, dtype, keys)
        return model, optimizer.init(model.params)

    return jax.jit(make)(keys)
