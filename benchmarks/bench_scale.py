"""Savings and costs of ZeRO-1, on 1 to 8 virtual devices:  python -m benchmarks.bench_scale [--quick]

A network of 4.2 million float32 parameters in four leaves is trained with AdamW. The table has the bytes of state on a
device, the time of a training step divided by that of the replicated run on as many devices, and the collectives in the
compiled program. Virtual devices share the cores of one machine without a network: a step saves the work that the
devices no longer repeat, so the ratios show that nothing is done twice, not how fast a cluster is.

An extrapolation to 1000 devices: with N parameters, a device has 8 N / 1000 bytes of moments instead of 8 N (56 MB
instead of 56 GB for 7e9 parameters), and reads and writes a thousandth of the 28 N bytes of a step. With ring
collectives, it sends:

| | gradients | parameters | bytes |
|---|---|---|---|
| replicated | all-reduce, 2 x 4 N | | 8 N |
| zero1_mapped | reduce-scatter, 4 N | all-gather, 4 N | 8 N |
| zero1, if the backend makes a reduce-scatter | 4 N | all-gather, 4 N | 8 N |
| zero1, if it does not (as on the CPU) | all-reduce, 8 N | all-gather, 4 N | 12 N |

So ZeRO-1 sends as much as the replicated run or half as much again; with bfloat16 parameters, the all-gather is half as
large. There is one collective for each leaf, of 999 hops each, so small leaves cost latency. Few axes are divisible by
1000: choose a power of two, or shard over a part of the mesh (`zero1(opt, axis="data")` on a mesh ("replica", "data"));
`describe` reports which arrays are not sharded.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import adamjax
from adamjax import sharding
from benchmarks._measure import Seconds, interleaved, ratio
from benchmarks._report import Curves, Table, command, show

COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_ARRAY = re.compile(r"[a-z]+(\d+)\[([\d,]*)\]")
_BATCH = 8

Step = Any  # (params, state, batch) -> params, state


def loss(params: dict[str, jax.Array], batch: jax.Array) -> jax.Array:
    """Return the contribution of these rows to the mean over the whole batch."""
    for w in params.values():
        batch = jnp.tanh(batch @ w)
    return jnp.sum(batch**2) / _BATCH


def replicated(params: Any, mesh: Mesh) -> tuple[Step, Any]:
    opt = adamjax.adamw(1e-3)
    state = sharding.init_sharded(opt, params, sharding.state_sharding(opt, params))
    return lambda p, s, batch: opt.step(jax.grad(loss)(p, batch), s, p), state


def zero1(params: Any, mesh: Mesh) -> tuple[Step, Any]:
    opt = sharding.zero1(adamjax.adamw(1e-3), axis="data")
    return lambda p, s, batch: opt.step(jax.grad(loss)(p, batch), s, p), opt.init(params)


def zero1_mapped(params: Any, mesh: Mesh) -> tuple[Step, Any]:
    opt = sharding.zero1_mapped(adamjax.adamw(1e-3), axis="data")
    state = opt.init(params)
    specs = jax.tree.map(lambda x: x.sharding.spec, state)

    def step(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any]:
        own = jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params)
        return opt.step(jax.grad(loss)(own, batch), state, params)

    return jax.shard_map(step, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=(P(), specs)), state


class Run:
    """Training steps of a small network on a mesh, the batch divided among its devices."""

    def __init__(self, make: Any, mesh: Mesh, width: int) -> None:
        rng = np.random.default_rng(0)
        params = {f"w{i}": jnp.asarray(rng.normal(size=(width, width)) / width**0.5, jnp.float32) for i in range(4)}
        self.params = jax.device_put(params, NamedSharding(mesh, P()))
        rows = jnp.asarray(rng.normal(size=(_BATCH, width)), jnp.float32)
        self.batch = jax.device_put(rows, NamedSharding(mesh, P("data")))
        step, self.state = make(self.params, mesh)
        self._step = jax.jit(step, donate_argnums=(0, 1))
        self.text = self._step.lower(self.params, self.state, self.batch).compile().as_text() or ""
        self.bytes = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(self.state))

    def __call__(self) -> None:
        self.params, self.state = jax.block_until_ready(self._step(self.params, self.state, self.batch))


def collectives(text: str) -> str:
    """Return the number of each collective in compiled HLO, and the bytes of their results on a device."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for result, name in _OPERATION.findall(text):
        counts[name] += 1
        for bits, shape in _ARRAY.findall(result):
            sizes[name] += int(bits) // 8 * math.prod(int(n) for n in shape.split(",") if n)
    return ", ".join(f"{counts[name]} {name} {sizes[name] / 1e6:.3g} MB" for name in COLLECTIVES if counts[name])


def tables(quick: bool) -> Iterator[Table]:
    width, rounds = (128, 0) if quick else (1024, 15)
    jax.config.update("jax_num_cpu_devices", 8)
    rows: list[list[Any]] = []
    lines: dict[str, dict[float, float]] = {}
    raw: Seconds = {}
    for count in (1, 2, 4, 8):
        mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
        runs = {make.__name__: Run(make, mesh, width) for make in (replicated, zero1, zero1_mapped)}
        seconds = interleaved({name: run.__call__ for name, run in runs.items()}, rounds)
        raw |= {f"{name}, {count} devices": x for name, x in seconds.items()}
        for name, run in runs.items():
            of = ratio(seconds[name], seconds["replicated"])
            rows.append([count, name, run.bytes / 1e6, of, collectives(run.text)])
            lines.setdefault(name, {})[count] = of.median
    size = 4 * width * width
    yield Table(
        "scale",
        f"Training steps of {size / 1e6:.3g} million float32 parameters, {4 * size / 1e6:.3g} MB, on virtual devices",
        ["devices", "", "state a device, MB", "time / replicated", "collectives of a step"],
        rows,
        raw,
        Curves("devices", "time of a training step / replicated", lines),
    )


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
