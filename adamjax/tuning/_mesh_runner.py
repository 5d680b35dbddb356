"""Runs over a whole mesh, one after another: for models that fill its devices."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adamjax._transforms.base import Transformation
from adamjax.problems import Problem
from adamjax.problems._check import checked
from adamjax.sharding import state_sharding
from adamjax.training import Keys, ShardedTask, data_mesh, evaluator, first_model, keys_of, model_like
from adamjax.tuning._blocks import BatchSource, Block, mean_losses
from adamjax.tuning._population import (
    Member,
    PopulationRunner,
    Results,
    SeedInputs,
    advance_member,
    check_metric,
    metric_names,
    structure_of,
)
from adamjax.tuning._stop import Check, go_on


class MeshRunner:
    """Runs settings one after another, each with each seed, and each run over all devices of a mesh, as in `train`.

    The optimizer is an argument of the compiled functions, so settings that differ in numbers alone share them.
    """

    probe: dict[str, float] = {}  # noqa: RUF012 - nothing is to be chosen
    order = "mesh"

    def __init__(self, problem: Problem, metric: str, *, seed: int, mesh: Mesh | None) -> None:
        self.mesh = data_mesh() if mesh is None else mesh
        self.task = ShardedTask(checked(problem, seed), self.mesh)
        self.metrics = metric_names(self.task)
        self.metric = check_metric(metric, self.metrics)
        self._functions: dict[Any, tuple[Callable[..., Member], Callable[..., tuple[Member, jax.Array]]]] = {}
        self._evaluate = evaluator(self.task)

    @property
    def execution(self) -> str:
        return f"one after another, each over {self.mesh.size} devices"

    def cost(
        self, opts: Sequence[Transformation], seeds: np.ndarray, steps: int, capacity: int
    ) -> tuple[float, float, bool]:
        """Say that settings do not run at once; there is nothing to measure."""
        return 0.0, 0.0, False

    def run(
        self,
        opts: Sequence[Transformation],
        seeds: np.ndarray,
        eval_steps: np.ndarray,
        *,
        capacity: int | None = None,
        wanted: np.ndarray | None = None,
        survivors: Callable[[np.ndarray, int], np.ndarray] | None = None,
        check: Check = go_on,
    ) -> Iterator[tuple[np.ndarray, int, Results]]:
        """Train and evaluate each of `opts` with each of `seeds`; yield as `PopulationRunner.run` does.

        `survivors` is told each evaluation after the whole run, since no other setting runs beside it.
        """
        for i, opt in enumerate(opts):
            if wanted is not None and not wanted[i]:
                continue
            curves = [list(self._run(opt, int(seed), eval_steps, check)) for seed in seeds]
            for point in range(len(eval_steps)):
                losses, metrics, diverged_at = zip(*(curve[point] for curve in curves), strict=True)
                named = {name: np.asarray([[m[name]] for m in metrics]) for name in self.metrics}
                yield np.asarray([i]), point, (np.asarray(losses)[:, None], named, np.asarray(diverged_at)[:, None])
                if survivors is not None and not survivors(np.asarray([i]), point).any():
                    break

    def _run(
        self, opt: Transformation, seed: int, eval_steps: np.ndarray, check: Check
    ) -> Iterator[tuple[float, dict[str, float], int]]:
        init, advance = self._compiled(opt)
        numbers = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(float)), opt)
        keys = keys_of(seed)
        member = init(numbers, keys)

        def advance_block(member: Member, block: Block) -> tuple[Member, jax.Array]:
            first, last, batches = block
            fed = self.task.place(jax.tree.map(lambda x: x[0], batches), blocked=True)
            return advance(np.int32(first), np.int32(last), numbers, SeedInputs(keys, fed), member)

        for blocks in BatchSource(self.task, np.asarray([seed]), eval_steps).blocks():
            check()
            member, loss = mean_losses(advance_block, member, blocks)
            yield float(loss), self._evaluate(member.model, member.state), int(member.diverged_at)

    def _compiled(self, opt: Transformation) -> tuple[Callable[..., Member], Callable[..., tuple[Member, jax.Array]]]:
        """Return the compiled functions of optimizers that differ from `opt` in numbers alone."""
        if (key := structure_of(opt)) not in self._functions:
            everywhere = self.task.replicated
            like = model_like(self.task.problem, None, self.mesh)
            model_sharding = jax.tree.map(lambda x: x.sharding, like)
            placed: Any = Member(model_sharding, state_sharding(opt, like.params), cast(Any, everywhere))
            shardings, structure = jax.tree.flatten(placed)

            # The leaves alone, since a state may have the shardings of its parameters, which a trace does not have.
            @partial(jax.jit, out_shardings=shardings)
            def init(opt: Transformation, keys: Keys) -> list[jax.Array]:
                model = first_model(self.task, None, keys)
                return jax.tree.leaves(Member(model, opt.init(model.params), jnp.int32(0)))

            advance = jax.jit(partial(advance_member, self.task), donate_argnums=4, out_shardings=(placed, everywhere))
            self._functions[key] = lambda opt, keys: jax.tree.unflatten(structure, init(opt, keys)), advance
        return self._functions[key]


Runner = PopulationRunner | MeshRunner


def make_runner(
    problem: Problem, metric: str, *, seed: int, execution: str, mesh: Mesh | None, memory: float | None
) -> Runner:
    """Return what runs the settings of a search as `execution` says; see `sweep`."""
    if execution == "mesh":
        return MeshRunner(problem, metric, seed=seed, mesh=mesh)
    return PopulationRunner(problem, metric, seed=seed, execution=execution, mesh=mesh, memory=memory)
