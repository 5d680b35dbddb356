"""A population: many runs of one problem in one compiled program, their optimizers a stacked pytree."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adamjax._core import checks
from adamjax.problems import Problem, check
from adamjax.training import Keys, run_keys, train_step

EXECUTIONS = ("auto", "map", "vmap", "sharded")


class Member(NamedTuple):
    """One run: of a setting, from a seed."""

    params: Any
    state: Any
    diverged_at: jax.Array  # int32: the first step, counted from 1, whose loss was not finite; 0 for none


def start(problem: Problem, opt: Any, keys: Keys, _: None) -> Member:
    params = problem.init(keys.init)
    return Member(params, opt.init(params), jnp.int32(0))


def advance(
    problem: Problem, first: jax.Array, last: jax.Array, opt: Any, keys: Keys, member: Member
) -> tuple[Member, jax.Array, Mapping[str, jax.Array]]:
    """Do the steps from `first` up to `last`; also their mean loss, and the metrics after them."""

    def body(step: jax.Array, carry: tuple[Member, jax.Array]) -> tuple[Member, jax.Array]:
        (params, state, diverged_at), total = carry
        params, state, loss = train_step(problem, opt, keys, params, state, step)
        diverges = (diverged_at == 0) & ~jnp.isfinite(loss)
        return Member(params, state, jnp.where(diverges, step + 1, diverged_at)), total + loss.astype(jnp.float32)

    member, total = lax.fori_loop(first, last, body, (member, jnp.float32(0)))
    return member, total / (last - first).astype(jnp.float32), problem.evaluate(member.params)


def _of_one(f: Callable[..., Any], numbered: tuple[Any, Any], keys: Keys, member: Any) -> Any:
    return f(numbered[0], keys, member)


def by_vmap(f: Callable[..., Any], opts: Any, keys: Keys, members: Any) -> Any:
    """`f(opt, keys, member)` for all members at once; the arrays of members are [seeds, settings, ...].

    The settings share the batches of their seed: those are made once.
    """
    return jax.vmap(jax.vmap(f, in_axes=(0, None, 0)), in_axes=(None, 0, 0))(opts, keys, members)


def by_map(f: Callable[..., Any], opts: Any, keys: Keys, members: Any) -> Any:
    """The same, one after another."""
    return lax.map(lambda row: lax.map(lambda x: f(x[0], row[0], x[1]), (opts, row[1])), (keys, members))


ORDERS = {"vmap": by_vmap, "map": by_map}


class Program(NamedTuple):
    """`start` and `advance` for `size` settings at once, compiled."""

    start: Any
    advance: Any
    size: int
    seconds: float  # of compilation


class Runner:
    """Compiles and runs populations of one problem; programs are kept for populations alike.

    Args:
      problem: What to train.
      metric: Which of its metrics counts.
      execution, mesh, memory: As for `sweep`.
    """

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
            # Where axes are explicit, members could not be moved between devices by their numbers.
            mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
        self.problem, self.mesh = problem, mesh
        self.memory = None if memory is None else checks.number("memory", memory, low=1)
        self.order = execution if execution in ORDERS else None
        self.probe: dict[str, float] = {}
        key = jax.eval_shape(jax.random.key, 0)
        self.metrics: list[str] = sorted(jax.eval_shape(lambda k: problem.evaluate(problem.init(k)), key))
        if metric not in self.metrics:
            raise ValueError(
                f"Invalid metric value: {metric!r}; the problem's evaluate returns {', '.join(self.metrics)}"
            )
        self.metric = metric
        self._programs: dict[Any, Program] = {}
        self._made: dict[tuple[int, ...], Keys] = {}

    @property
    def _devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    def _whole(self, settings: float) -> int:
        """At least so many settings, as many on each device."""
        return math.ceil(settings / self._devices) * self._devices

    @property
    def execution(self) -> str:
        """What was decided on, in words."""
        where = "" if self.mesh is None else f" on each of {self.mesh.size} devices"
        return f"{self.order}{where}"

    def run(
        self,
        opts: Sequence[Any],
        seeds: np.ndarray,
        marks: np.ndarray,
        *,
        room: int | None = None,
        wanted: np.ndarray | None = None,
        keep: Callable[[np.ndarray, int], np.ndarray] | None = None,
    ) -> Iterator[tuple[np.ndarray, int, Any]]:
        """Train one run for each of `opts` (alike in structure) and `seeds`, up to each step of `marks`.

        Yields, chunk by chunk and mark by mark, the indices of the settings, that of the mark, and
        (losses, metrics, diverged_at), arrays of [seeds, settings].

        Args:
          opts, seeds, marks: What to train.
          room: How many settings the program is made for, at least their number, which is the default.
          wanted: Which (bool) are of interest; where none of a chunk is, it is left out. The others only
            keep their places, for where in a program a member is can change its last digits.
          keep: Called after each mark with the indices and the mark; says which (bool) to go on with.
            Where half of the program's room is enough for them, they move to a program of that size.
        """
        room = len(opts) if room is None else room
        keys = self._keys(seeds)
        order = self._order(opts, keys, int(marks[-1]), room)
        chunk = self._program(opts, keys, order, room)
        for low in range(0, len(opts), chunk.size):
            program, indices = chunk, np.arange(low, min(low + chunk.size, len(opts)))
            if wanted is not None and not wanted[indices].any():
                continue
            inputs = self._place(_stack(opts, indices, program.size)), keys
            members = program.start(*inputs)
            slots = np.arange(len(indices))
            for point, last in enumerate(marks):
                first = marks[point - 1] if point else 0
                members, losses, metrics = program.advance(np.int32(first), np.int32(last), *inputs, members)
                yield indices, point, _gather((losses, metrics, members.diverged_at), slots)
                if keep is None:
                    continue
                kept = keep(indices, point)
                indices, slots = indices[kept], slots[kept]
                if not len(indices):
                    break
                half = self._whole(program.size / 2)
                if len(indices) <= half < program.size and last < marks[-1]:
                    program = self._program(opts, keys, order, half)
                    members = self._take(members, _filled(slots, program.size))
                    inputs = self._place(_stack(opts, indices, program.size)), keys
                    slots = np.arange(len(indices))

    def cost(self, opts: Sequence[Any], seeds: np.ndarray, steps: int, room: int) -> tuple[float, float, bool]:
        """Measured seconds of a step of `room` settings and of compilation, and whether they fit at once."""
        keys = self._keys(seeds)
        order = self._order(opts, keys, steps, room)
        program = self._program(opts, keys, order, room)
        if order not in self.probe:
            self._time(opts, keys, order, steps, room)
        return self.probe[order], _agreed(program.seconds), program.size >= room

    def _keys(self, seeds: np.ndarray) -> Keys:
        seeds_ = tuple(seeds.tolist())
        if seeds_ not in self._made:
            self._made[seeds_] = jax.jit(jax.vmap(run_keys), out_shardings=self._sharding())(seeds)
        return self._made[seeds_]

    def _order(self, opts: Sequence[Any], keys: Keys, steps: int, room: int) -> str:
        """By a few timed steps of each order; another is compiled only where half the time would pay for it."""
        if self.order is None:
            for order in ORDERS:
                self._time(opts, keys, order, steps, room)
                if self.probe[order] * steps / 2 < _agreed(self._program(opts, keys, order, room).seconds):
                    break
            self.order = min(self.probe, key=lambda order: self.probe[order])
        return self.order

    def _time(self, opts: Sequence[Any], keys: Keys, order: str, steps: int, room: int) -> None:
        """Measure the seconds of a step, of all chunks together."""
        few = min(max(steps // 50, 1), 10)
        program = self._program(opts, keys, order, room)
        inputs = self._place(_stack(opts, np.arange(min(program.size, len(opts))), program.size)), keys
        members, *_ = program.advance(np.int32(0), np.int32(1), *inputs, program.start(*inputs))
        jax.block_until_ready(members)
        begin = time.perf_counter()
        jax.block_until_ready(program.advance(np.int32(1), np.int32(1 + few), *inputs, members))
        chunks = -(-room // program.size)
        self.probe[order] = _agreed((time.perf_counter() - begin) / few * chunks)

    def _program(self, opts: Sequence[Any], keys: Keys, order: str, room: int) -> Program:
        structure: Any = jax.tree.structure(opts[0])
        shapes = tuple(np.shape(x) for x in jax.tree.leaves(opts[0]))
        key = (structure, shapes, room, len(keys.init), order)
        if key not in self._programs:
            size = self._whole(room)
            limit = _agreed(_free_memory() if self.memory is None else self.memory)
            while True:
                program, needed = self._compile(_stack(opts, np.arange(1), size), keys, order)
                if needed <= limit or size == self._devices:
                    break
                size = max(int(size * limit / needed) // self._devices, 1) * self._devices
            self._programs[key] = program
        return self._programs[key]

    def _compile(self, population: Any, keys: Keys, order: str) -> tuple[Program, float]:
        """The program, and the bytes it needs on each device."""
        begin = time.perf_counter()
        over = ORDERS[order]

        def start_all(opts: Any, keys: Keys) -> Member:
            return over(partial(_of_one, partial(start, self.problem)), opts, keys, None)

        def advance_all(first: jax.Array, last: jax.Array, opts: Any, keys: Keys, members: Member) -> Any:
            return over(partial(_of_one, partial(advance, self.problem, first, last)), opts, keys, members)

        inputs = self._place(population), keys
        if self.mesh is not None:
            whole, settings = PartitionSpec(), PartitionSpec(self.mesh.axis_names)
            each = PartitionSpec(None, self.mesh.axis_names)
            # What a member does is local to its device, so there is nothing to be checked.
            shard = partial(jax.shard_map, mesh=self.mesh, check_vma=False)
            start_all = shard(start_all, in_specs=(settings, whole), out_specs=each)
            advance_all = shard(advance_all, in_specs=(whole, whole, settings, whole, each), out_specs=each)
        sharding = self._sharding(None, True)
        shapes = jax.eval_shape(start_all, *inputs)
        members = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
        started = jax.jit(start_all, out_shardings=sharding).lower(*inputs).compile()
        advanced = jax.jit(advance_all, donate_argnums=4).lower(np.int32(0), np.int32(1), *inputs, members).compile()
        memory: Any = advanced.memory_analysis()
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        size = len(jax.tree.leaves(population)[0])
        return Program(started, advanced, size, time.perf_counter() - begin), needed

    def _sharding(self, *dimensions: bool | None) -> NamedSharding | None:
        """Of arrays of which the dimensions that are True run over the settings."""
        if self.mesh is None:
            return None
        names = [self.mesh.axis_names if over_settings else None for over_settings in dimensions]
        return NamedSharding(self.mesh, PartitionSpec(*names))

    def _place(self, population: Any) -> Any:
        sharding = self._sharding(True)
        if sharding is None:
            return jax.tree.map(jnp.asarray, population)
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i]), population)

    def _take(self, members: Member, slots: np.ndarray) -> Member:
        """The members in `slots` of the dimension of the settings."""
        take = partial(jax.tree.map, lambda x: x[:, slots])
        taken: Member = jax.jit(take, out_shardings=self._sharding(None, True))(members)
        return taken


def _filled(indices: np.ndarray, size: int) -> np.ndarray:
    """`indices`, the last repeated up to `size`."""
    return np.concatenate([indices, np.repeat(indices[-1:], size - len(indices))])


def _stack(opts: Sequence[Any], indices: np.ndarray, size: int) -> tuple[Any, np.ndarray]:
    """One optimizer whose leaves are those of `opts`, the last repeated up to `size`.

    With a number for each, since optimizers without leaves would have no axis to map over.
    """
    chosen = [opts[i] for i in _filled(indices, size)]
    return jax.tree.map(lambda *leaves: np.stack(leaves).astype(jnp.result_type(float)), *chosen), np.arange(size)


def _gather(x: Any, slots: np.ndarray) -> Any:
    """Those in `slots` of each [seeds, settings] array, as NumPy arrays, on every process."""
    if jax.process_count() > 1:
        x = multihost_utils.process_allgather(x, tiled=True)
    return jax.tree.map(lambda x: np.asarray(x)[:, slots], x)


def _agreed(x: float) -> float:
    """What the first process found: all must run the same programs."""
    return float(multihost_utils.broadcast_one_to_all(np.float32(x))) if jax.process_count() > 1 else x


def _free_memory() -> float:
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return 0.9 * (stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    # The host's, shared by its devices.
    return 0.8 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(jax.local_devices())
