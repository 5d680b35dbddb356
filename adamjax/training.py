"""One training run: a problem, an optimizer, and a jitted step."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adamjax._core import checks
from adamjax._transforms.base import Transformation, as_transformation, may_skip
from adamjax.diagnostics import AdamStats, measure
from adamjax.problems import Problem, check
from adamjax.safety import DynamicLossScale, check_skipped
from adamjax.sharding import init_sharded, state_sharding


class Report(NamedTuple):
    """Where a run is.

    Fields:
      step: Updates done.
      losses: float64[.], the training losses of the updates since the last report.
      metrics: What `problem.evaluate` says, as floats; None where it was not asked.
      params: The parameters. The next step takes their memory: copy what is to be kept.
      state: The optimizer's state, likewise.
      diverged_at: The first step (counted from 1) whose loss was not finite, which ends the run; None if
        there was none, or the optimizer skips such steps.
      stats: Figures of the next update, if `diagnose` asked for them, and there is one.
    """

    step: int
    losses: np.ndarray
    metrics: dict[str, float] | None
    params: Any
    state: Any
    diverged_at: int | None = None
    stats: AdamStats | None = None


def train(
    problem: Problem,
    optimizer: Any,
    *,
    steps: int,
    seed: int = 0,
    dtype: Any = None,
    report_every: int = 10,
    evaluate_every: int = 100,
    stop: Callable[[], bool] = lambda: False,
    start: Any = None,
    diagnose: bool = False,
    mesh: Mesh | None = None,
) -> Iterator[Report]:
    """Train, and report on the way.

    Args:
      problem: What to train.
      optimizer: One of this package's, or optax's. The loss of the batch is what one that watches it gets as `value`.
      steps: Number of updates, those before `start` among them.
      seed: Of the parameters, the data order and the keys of the loss.
      dtype: Dtype of the parameters; None for what `problem.init` gives.
      report_every: Updates between reports.
      evaluate_every: Updates between evaluations.
      stop: Asked at each report; the run ends when it says so. With many processes, it must say the same in all.
      start: Where to go on: a `Report` of the same run, or a `checkpoint.Checkpoint` of one. The next step takes
        its memory, and what comes is what would have come then, to the last bit.
      diagnose: Measure, at each report, the update that comes next (see `adamjax.diagnostics`). It is computed
        twice for that, so that the run is the same, to the last bit, as one that is not measured.
      mesh: Devices to train on, of this process or, after `jax.distributed.initialize`, of many that all call this.
        Each takes an equal part of each batch, along the first axis of its arrays. The problem's methods
        see all of it, as on one device. The parameters are on all of them, and the state where `optimizer`
        has it: an n-th on each with `adamjax.sharding.zero1`, all of it without. None: one device.

    Returns:
      An iterator: a `Report` before the first step (but not at `start`), then as often as asked for. The last
      one has metrics; it comes early if `stop` says so, or a loss was not finite. With
      `skip_nonfinite` or `dynamic_loss_scale` around the optimizer such steps are skipped.

    Raises:
      TypeError: `problem` is not a `Problem`, `optimizer` no transformation, or `start` no report or checkpoint.
      ValueError, TypeError: A number of steps is less than 1, or not an int; `seed` is none either, or has more than
        64 bits; `mesh` is none in Auto mode, or its devices cannot share a batch equally. In the iterator:
        `dynamic_loss_scale` is not around all of the optimizer.
      FloatingPointError: In the iterator: as many steps were skipped in a row as the optimizer allows.

    >>> import adamjax
    >>> from adamjax.training import train
    >>> for report in train(adamjax.problems.digits(), adamjax.adam(3e-3), steps=200):
    ...     pass
    >>> report.step, report.metrics["accuracy"] > 0.9
    (200, True)
    """
    for name, x in (("steps", steps), ("report_every", report_every), ("evaluate_every", evaluate_every)):
        checks.count(name, x)
    check(problem)
    optimizer = as_transformation(optimizer, "argument optimizer of train")
    checks.integer("seed", seed)
    checks.function("stop", stop)
    checks.choice("diagnose", diagnose, (False, True))
    if start is not None and not all(hasattr(start, name) for name in ("step", "params", "state")):
        raise TypeError(f"Invalid start value: {start!r}; start must be a Report of train, or a Checkpoint of one")
    shared = None if mesh is None else Shared(problem, mesh)
    return _run(shared or problem, optimizer, steps, seed, dtype, report_every, evaluate_every, stop, start, diagnose)


class Shared:
    """A problem on the devices of a mesh: parameters on all of them, of each batch an equal part on each.

    Raises:
      TypeError, ValueError: It is no mesh in Auto mode, or its devices cannot share a batch equally.
    """

    def __init__(self, problem: Problem, mesh: Mesh) -> None:
        if not isinstance(mesh, Mesh) or set(mesh.axis_types) != {AxisType.Auto}:
            raise TypeError(f"Invalid mesh value: {mesh!r}; mesh must be a jax.sharding.Mesh with axes in Auto mode")
        batch = jax.eval_shape(problem.batch, np.int32(0), jax.random.key(0))
        for path, x in jax.tree.leaves_with_path(batch):
            if x.ndim and x.shape[0] % mesh.size:
                raise ValueError(
                    f"batch{jax.tree_util.keystr(path)} has shape {x.shape}, and {mesh.size} devices cannot share "
                    f"{x.shape[0]} rows equally: choose a batch size that is a multiple of {mesh.size}"
                )
        self._problem = problem
        self._parts = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self.everywhere: NamedSharding = NamedSharding(mesh, PartitionSpec())

    def init(self, key: jax.Array) -> Any:
        """The parameters, on all devices."""
        return jax.lax.with_sharding_constraint(self._problem.init(key), self.everywhere)

    def batch(self, step: jax.Array, key: jax.Array) -> Any:
        """The whole batch, of which each device has its rows; scalars are on all."""

        def share(x: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(x, self._parts if x.ndim else self.everywhere)

        return jax.tree.map(share, self._problem.batch(step, key))

    def loss(self, params: Any, batch: Any, key: jax.Array) -> jax.Array:
        """The problem's own."""
        return self._problem.loss(params, batch, key)

    def evaluate(self, params: Any) -> Mapping[str, jax.Array]:
        """The problem's own."""
        return self._problem.evaluate(params)


class Keys(NamedTuple):
    """Where the randomness of a run comes from: keys of the parameters, the data and the loss."""

    init: jax.Array
    data: jax.Array
    loss: jax.Array


def keys_of(seed: Any) -> Keys:
    """The keys of the run that a seed names.

    Args:
      seed: An int, or an integer scalar.

    Returns:
      `Keys`, which are the same for the same seed in every process.

    Raises:
      TypeError, ValueError: `seed` is no such int, or has more than 64 bits.
    """
    return Keys(*jax.random.split(jax.random.key(checks.integer("seed", seed)), 3))


def initial(problem: Problem, optimizer: Transformation, dtype: Any, keys: Keys) -> tuple[Any, Any]:
    """The parameters and the state before the first step."""
    params = first_params(problem, dtype, keys)
    return params, optimizer.init(params)


def first_params(problem: Problem, dtype: Any, keys: Keys) -> Any:
    """The parameters before the first step, of that dtype; None for what the problem gives."""
    params = jax.tree.map(jnp.asarray, problem.init(keys.init))
    if dtype is None:
        return params
    for path, p in jax.tree.leaves_with_path(params):
        if jnp.iscomplexobj(p) and not jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"Invalid dtype value: {dtype!r}; params{jax.tree_util.keystr(path)} is {p.dtype}, "
                "and would lose its imaginary part"
            )
    return jax.tree.map(lambda p: p.astype(dtype), params)


def train_step(
    problem: Problem, optimizer: Transformation, keys: Keys, params: Any, state: Any, step: Any
) -> tuple[Any, Any, jax.Array]:
    """Update number `step` (0 for the first): the new parameters and state, and the loss before it."""
    loss, grads = gradients(problem, optimizer, keys, params, state, step)
    return *optimizer.step(grads, state, params, value=loss), loss  # for those that watch it


def gradients(
    problem: Problem, optimizer: Transformation, keys: Keys, params: Any, state: Any, step: Any
) -> tuple[jax.Array, Any]:
    """The loss of update number `step`, and the gradients that the optimizer takes: scaled, if it scales the loss."""
    batch = problem.batch(step, keys.data)
    _check_scale(optimizer)

    def objective(params: Any) -> tuple[jax.Array, jax.Array]:
        loss = problem.loss(params, batch, jax.random.fold_in(keys.loss, step))
        return optimizer.scale(loss, state) if isinstance(optimizer, DynamicLossScale) else loss, loss

    grads, loss = jax.grad(objective, has_aux=True)(params)
    # Of a complex parameter, JAX's gradient is the conjugate of the direction of ascent.
    return loss, jax.tree.map(jnp.conj, grads)


def _check_scale(optimizer: Transformation) -> None:
    """Refuse an optimizer that scales the loss somewhere within: it would divide by a scale that nobody sees."""

    def scales(x: Any) -> bool:
        return isinstance(x, DynamicLossScale)

    if not scales(optimizer) and any(map(scales, jax.tree.leaves(optimizer, is_leaf=scales))):
        raise ValueError(
            f"dynamic_loss_scale is within {type(optimizer).__name__}, where the loss cannot be scaled: "
            "put it around all the others, dynamic_loss_scale(chain(...))"
        )


def measured_step(
    problem: Problem, optimizer: Transformation, keys: Keys, params: Any, state: Any, step: Any
) -> AdamStats:
    """Figures of update number `step`, without making it."""
    loss, grads = gradients(problem, optimizer, keys, params, state, step)
    updates, after = optimizer.update(grads, state, params, value=loss)
    if isinstance(optimizer, DynamicLossScale):
        grads = optimizer.unscale(grads, state)
    return measure(grads, updates, after, params, opt=optimizer)


def _run(
    problem: Problem | Shared,
    optimizer: Transformation,
    steps: int,
    seed: int,
    dtype: Any,
    report_every: int,
    evaluate_every: int,
    stop: Callable[[], bool],
    start: Any,
    diagnose: bool,
) -> Iterator[Report]:
    keys = keys_of(seed)
    skips = may_skip(optimizer)
    first = 0 if start is None else start.step + 1
    if start is not None:
        params, state = start.params, start.state
    elif isinstance(problem, Shared):
        params = jax.jit(partial(first_params, problem, dtype))(keys)
        state = init_sharded(optimizer, params, state_sharding(optimizer, params))
    else:
        params, state = jax.jit(partial(initial, problem, optimizer, dtype))(keys)
    # Of one device, JAX does not ask.
    everywhere = problem.everywhere if isinstance(problem, Shared) else None
    places = None if everywhere is None else (*jax.tree.map(lambda x: x.sharding, (params, state)), everywhere)
    advance = jax.jit(partial(train_step, problem, optimizer, keys), donate_argnums=(0, 1), out_shardings=places)
    measure_next = jax.jit(partial(measured_step, problem, optimizer, keys), out_shardings=everywhere)
    evaluate = jax.jit(problem.evaluate, out_shardings=everywhere)
    losses: list[jax.Array] = []
    for step in range(first, steps + 1):
        if step:
            params, state, loss = advance(params, state, np.int32(step - 1))
            losses.append(loss)
        if step % report_every and step % evaluate_every and step < steps:
            continue
        found = np.asarray(jax.device_get(losses), np.float64)
        losses.clear()
        diverged_at = None if skips else _first_not_finite(found, step)
        report = Report(step, found, None, params, state, diverged_at)
        last = step == steps or diverged_at is not None or stop()
        if diagnose and not last:
            report = report._replace(stats=measure_next(params, state, np.int32(step)))
        if last or step % evaluate_every == 0:
            report = report._replace(metrics={k: float(x) for k, x in evaluate(params).items()})
        yield report
        check_skipped(state)
        if last:
            return


def _first_not_finite(losses: np.ndarray, step: int) -> int | None:
    """The number of the step, if `step` was the last one."""
    bad = np.flatnonzero(~np.isfinite(losses))
    return step - len(losses) + int(bad[0]) + 1 if len(bad) else None
