"""A population: many runs of one problem in one compiled program, with their optimizers stacked in one pytree."""

import math
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adamjax._core import checks
from adamjax._core.typing import PyTree
from adamjax._transforms.base import Transformation
from adamjax.problems import Problem, check
from adamjax.training import Keys, keys_of, train_step

EXECUTIONS = ("auto", "map", "vmap", "sharded")

# Training losses, validation metrics by name, and `Member.diverged_at`: arrays of [seeds, settings].
Results = tuple[np.ndarray, Mapping[str, np.ndarray], np.ndarray]


class Member(NamedTuple):
    """A run of the population: one setting with one seed."""

    params: PyTree
    state: PyTree
    diverged_at: jax.Array  # int32: the first step, counted from 1, whose loss was not finite; 0 for none


def init_member(problem: Problem, opt: Transformation, keys: Keys, _: None) -> Member:
    params = problem.init(keys.init)
    return Member(params, opt.init(params), jnp.int32(0))


def advance_member(
    problem: Problem, first: jax.Array, last: jax.Array, opt: Transformation, keys: Keys, member: Member
) -> tuple[Member, jax.Array, Mapping[str, jax.Array]]:
    """Make the steps from `first` up to `last`; return the member, their mean loss, and the metrics after them."""

    def body(step: jax.Array, carry: tuple[Member, jax.Array]) -> tuple[Member, jax.Array]:
        (params, state, diverged_at), total = carry
        params, state, loss = train_step(problem, opt, keys, params, state, step)
        diverges = (diverged_at == 0) & ~jnp.isfinite(loss)
        return Member(params, state, jnp.where(diverges, step + 1, diverged_at)), total + loss.astype(jnp.float32)

    member, total = lax.fori_loop(first, last, body, (member, jnp.float32(0)))
    return member, total / (last - first).astype(jnp.float32), problem.evaluate(member.params)


def vmap_members(f: Callable[..., PyTree], opts: PyTree, keys: Keys, members: PyTree) -> PyTree:
    """Call `f(opt, keys, member)` for all members, [seeds, settings, ...], at once. A seed makes its batches once."""
    return jax.vmap(jax.vmap(f, in_axes=(0, None, 0)), in_axes=(None, 0, 0))(opts, keys, members)


def map_members(f: Callable[..., PyTree], opts: PyTree, keys: Keys, members: PyTree) -> PyTree:
    """Call `f(opt, keys, member)` for one member after another."""
    return lax.map(lambda row: lax.map(lambda x: f(x[0], row[0], x[1]), (opts, row[1])), (keys, members))


ORDERS = {"vmap": vmap_members, "map": map_members}


class Program(NamedTuple):
    """The compiled `init_member` and `advance_member` of `size` settings."""

    init: Callable[..., Member]
    advance: Callable[..., tuple[Member, jax.Array, Mapping[str, jax.Array]]]
    size: int
    seconds: float  # of compilation


class PopulationRunner:
    """Compiles and runs populations of one problem, and keeps the programs for further populations; see `sweep`."""

    def __init__(
        self, problem: Problem, metric: str, *, execution: str, mesh: Mesh | None, memory: float | None
    ) -> None:
        checks.choice("execution", execution, EXECUTIONS)
        check(problem)
        if mesh is None and (execution == "sharded" or (execution == "auto" and jax.device_count() > 1)):
            mesh = jax.make_mesh((jax.device_count(),), ("settings",))
        if mesh is not None:
            if not isinstance(mesh, Mesh):
                raise TypeError(f"Invalid mesh value: {mesh!r}; mesh must be a jax.sharding.Mesh, or None")
            # With explicit axes, `_take` could not index members on other devices.
            mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
        self.problem, self.mesh = problem, mesh
        self.memory = None if memory is None else checks.number("memory", memory, low=1)
        self.order = execution if execution in ORDERS else None
        self.probe: dict[str, float] = {}
        key = jax.eval_shape(jax.random.key, 0)
        self.metrics: list[str] = sorted(jax.eval_shape(lambda k: problem.evaluate(problem.init(k)), key))
        if metric not in self.metrics:
            known = ", ".join(self.metrics)
            raise ValueError(f"Invalid metric value: {metric!r}; the problem's evaluate returns {known}")
        self.metric = metric
        self._programs: dict[Hashable, Program] = {}
        self._keys_of_seeds: dict[tuple[int, ...], Keys] = {}

    @property
    def _devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    def _round_up(self, settings: float) -> int:
        return math.ceil(settings / self._devices) * self._devices

    @property
    def execution(self) -> str:
        return str(self.order) + ("" if self.mesh is None else f" on each of {self.mesh.size} devices")

    def run(
        self,
        opts: Sequence[Transformation],
        seeds: np.ndarray,
        eval_steps: np.ndarray,
        *,
        capacity: int | None = None,
        wanted: np.ndarray | None = None,
        survivors: Callable[[np.ndarray, int], np.ndarray] | None = None,
    ) -> Iterator[tuple[np.ndarray, int, Results]]:
        """Train each of `opts` (equal in structure) with each of `seeds`, and evaluate them at `eval_steps`.

        Yields, for each evaluation of each chunk of settings, their indices, its number and the results.

        Args:
          capacity: Number of settings to compile the program for, at least that of `opts`, its default.
          wanted: bool[.], the settings of interest. A chunk without any is skipped; in others, unwanted settings
            still run, since the last digits of a run can depend on its position in the program.
          survivors: Called after each evaluation with the indices of the settings and its number; returns which of
            them go on (bool). If half of the program's capacity is enough for them, they move to such a program.
        """
        capacity = len(opts) if capacity is None else capacity
        keys = self._keys(seeds)
        order = self._order(opts, keys, int(eval_steps[-1]), capacity)
        chunk = self._program(opts, keys, order, capacity)
        for low in range(0, len(opts), chunk.size):
            program, indices = chunk, np.arange(low, min(low + chunk.size, len(opts)))
            if wanted is not None and not wanted[indices].any():
                continue
            inputs = self._place(_stack(opts, indices, program.size)), keys
            members = program.init(*inputs)
            slots = np.arange(len(indices))
            for point, last in enumerate(eval_steps):
                first = eval_steps[point - 1] if point else 0
                members, losses, metrics = program.advance(np.int32(first), np.int32(last), *inputs, members)
                yield indices, point, _gather((losses, metrics, members.diverged_at), slots)
                if survivors is None:
                    continue
                stays = survivors(indices, point)
                indices, slots = indices[stays], slots[stays]
                if not len(indices):
                    break
                half = self._round_up(program.size / 2)
                if len(indices) <= half < program.size and last < eval_steps[-1]:
                    program = self._program(opts, keys, order, half)
                    members = self._take(members, _padded(slots, program.size))
                    inputs = self._place(_stack(opts, indices, program.size)), keys
                    slots = np.arange(len(indices))

    def cost(
        self, opts: list[Transformation], seeds: np.ndarray, steps: int, capacity: int
    ) -> tuple[float, float, bool]:
        """Measure the seconds of a step of `capacity` settings and of compilation, and whether they fit at once."""
        keys = self._keys(seeds)
        order = self._order(opts, keys, steps, capacity)
        program = self._program(opts, keys, order, capacity)
        if order not in self.probe:
            self._time(opts, keys, order, steps, capacity)
        return self.probe[order], _broadcast(program.seconds), program.size >= capacity

    def _keys(self, seeds: np.ndarray) -> Keys:
        key = tuple(seeds.tolist())
        if key not in self._keys_of_seeds:
            self._keys_of_seeds[key] = jax.jit(jax.vmap(keys_of), out_shardings=self._sharding())(seeds)
        return self._keys_of_seeds[key]

    def _order(self, opts: Sequence[Transformation], keys: Keys, steps: int, capacity: int) -> str:
        """Choose by a few timed steps of each order; compile the other only if halving the time would pay for that."""
        if self.order is None:
            for order in ORDERS:
                self._time(opts, keys, order, steps, capacity)
                if self.probe[order] * steps / 2 < _broadcast(self._program(opts, keys, order, capacity).seconds):
                    break
            self.order = min(self.probe, key=self.probe.__getitem__)
        return self.order

    def _time(self, opts: Sequence[Transformation], keys: Keys, order: str, steps: int, capacity: int) -> None:
        few = min(max(steps // 50, 1), 10)
        program = self._program(opts, keys, order, capacity)
        inputs = self._place(_stack(opts, np.arange(min(program.size, len(opts))), program.size)), keys
        members, *_ = program.advance(np.int32(0), np.int32(1), *inputs, program.init(*inputs))
        jax.block_until_ready(members)
        begin = time.perf_counter()
        jax.block_until_ready(program.advance(np.int32(1), np.int32(1 + few), *inputs, members))
        chunks = -(-capacity // program.size)
        self.probe[order] = _broadcast((time.perf_counter() - begin) / few * chunks)

    def _program(self, opts: Sequence[Transformation], keys: Keys, order: str, capacity: int) -> Program:
        key = (structure_of(opts[0]), capacity, len(keys.init), order)
        if key not in self._programs:
            size = self._round_up(capacity)
            limit = _broadcast(_free_memory() if self.memory is None else self.memory)
            while True:
                program, needed = self._compile(_stack(opts, np.arange(1), size), keys, order)
                if needed <= limit or size == self._devices:
                    break
                size = max(int(size * limit / needed) // self._devices, 1) * self._devices
            self._programs[key] = program
        return self._programs[key]

    def _compile(self, population: PyTree, keys: Keys, order: str) -> tuple[Program, float]:
        """Return the program, and the bytes that it needs on each device."""
        begin = time.perf_counter()

        def for_members(f: Callable[..., PyTree], *inputs: PyTree) -> PyTree:
            return ORDERS[order](lambda numbered, *others: f(numbered[0], *others), *inputs)

        def init_all(opts: PyTree, keys: Keys) -> Member:
            return for_members(partial(init_member, self.problem), opts, keys, None)

        def advance_all(first: jax.Array, last: jax.Array, *inputs: PyTree) -> PyTree:
            return for_members(partial(advance_member, self.problem, first, last), *inputs)

        inputs = self._place(population), keys
        if self.mesh is not None:
            replicated, settings = PartitionSpec(), PartitionSpec(self.mesh.axis_names)
            members_spec = PartitionSpec(None, self.mesh.axis_names)
            # Each member is computed on its own device, so there are no varying axes to check.
            shard = partial(jax.shard_map, mesh=self.mesh, check_vma=False)
            init_all = shard(init_all, in_specs=(settings, replicated), out_specs=members_spec)
            in_specs = (replicated, replicated, settings, replicated, members_spec)
            advance_all = shard(advance_all, in_specs=in_specs, out_specs=members_spec)
        sharding = self._sharding(None, True)
        shapes = jax.eval_shape(init_all, *inputs)
        members = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
        init = jax.jit(init_all, out_shardings=sharding).lower(*inputs).compile()
        advance = jax.jit(advance_all, donate_argnums=4).lower(np.int32(0), np.int32(1), *inputs, members).compile()
        memory: Any = advance.memory_analysis()
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        size = len(jax.tree.leaves(population)[0])
        return Program(init, advance, size, time.perf_counter() - begin), needed

    def _sharding(self, *dimensions: bool | None) -> NamedSharding | None:
        """Return the sharding of arrays whose dimensions are over the settings where they are True."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, PartitionSpec(*(self.mesh.axis_names if x else None for x in dimensions)))

    def _place(self, population: PyTree) -> PyTree:
        sharding = self._sharding(True)
        if sharding is None:
            return jax.tree.map(jnp.asarray, population)
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i]), population)

    def _take(self, members: Member, slots: np.ndarray) -> Member:
        take = partial(jax.tree.map, lambda x: x[:, slots])
        return Member(*jax.jit(take, out_shardings=self._sharding(None, True))(members))


def structure_of(opt: Transformation) -> Hashable:
    """Return the structure and the shapes that optimizers must share to be stacked."""
    leaves, structure = jax.tree.flatten(opt)
    return structure, tuple(map(np.shape, leaves))


def _padded(indices: np.ndarray, size: int) -> np.ndarray:
    """Repeat the last of `indices` up to `size` indices."""
    return np.concatenate([indices, np.repeat(indices[-1:], size - len(indices))])


def _stack(opts: Sequence[Transformation], indices: np.ndarray, size: int) -> tuple[PyTree, np.ndarray]:
    """Stack the leaves of the chosen optimizers, the last repeated up to `size`.

    Each gets a number, since optimizers without leaves would have no axis to map over.
    """
    chosen = [opts[i] for i in _padded(indices, size)]
    return jax.tree.map(lambda *leaves: np.stack(leaves).astype(jnp.result_type(float)), *chosen), np.arange(size)


def _gather(results: PyTree, slots: np.ndarray) -> Results:
    """Return the settings in `slots` of each [seeds, settings] array, as NumPy arrays, on every process."""
    if jax.process_count() > 1:
        results = multihost_utils.process_allgather(results, tiled=True)
    losses, metrics, diverged_at = jax.tree.map(lambda x: np.asarray(x)[:, slots], results)
    return losses, metrics, diverged_at


def _broadcast(x: float) -> float:
    """Return the first process's value: all must run the same programs."""
    return float(multihost_utils.broadcast_one_to_all(np.float32(x))) if jax.process_count() > 1 else x


def _free_memory() -> float:
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return 0.9 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    # A backend without statistics uses the host's memory, which its devices share.
    return 0.8 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(jax.local_devices())
