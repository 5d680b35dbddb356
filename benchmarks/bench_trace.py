"""Time until a step can run, by the number of leaves:  python -m benchmarks.bench_trace [--quick]

Seconds of tracing, lowering and compiling a step of AdamW, and of all three, with empty caches, as ratios to optax's.
The figures are medians of three rounds; of one round for 3000 leaves and in the last column. Leaves have about 4096
elements, of four shapes; in the last column all shapes differ, so that tracing once per shape saves nothing. Leaves of
fused optimizers have 16384 elements. Rounded moments are measured for few leaves only: each leaf has its own random
numbers, so XLA compiles its kernel anew, which takes minutes for a thousand.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._measure import Seconds
from benchmarks._report import Curves, Table, command, show
from benchmarks._steps import FUSED, OPTAX, PACKED, PLAIN, Make, advance, is_refused

STAGES = ("trace", "lower", "compile", "all three")


class Row(NamedTuple):
    """An optimizer, the largest number of leaves to measure it for, and their first axis."""

    make: Make
    most: int = 3000
    axis: int = 64

    def leaves(self, count: int, shapes: int) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct((self.axis, 64 + i % shapes), jnp.float32) for i in range(count)]


ROWS = {
    "adamjax": Row(PLAIN["adamjax"]),
    "adamjax fused": Row(FUSED["adamjax fused"], axis=256),
    **{name: Row(make) for name, make in PACKED.items()},
    "adamjax, bfloat16 moments": Row(PLAIN["adamjax, bfloat16 moments"], most=30),
    "adamjax, int8 moments": Row(PLAIN["adamjax, int8 moments"], most=30),
    "optax": Row(OPTAX["optax"]),
}


def tables(quick: bool) -> Iterator[Table]:
    counts, unlike = ((2, 5), 5) if quick else ((10, 30, 100, 300, 1000, 3000), 100)
    rows = {name: row for name, row in ROWS.items() if not is_refused(row.make(), row.leaves(1, 1))}
    for row in rows.values():
        stages(row, 2, 2)  # warm up: the first compilation of a process is slow
    seconds = {str(count): in_turns(rows, count, 4, 1 if quick or count > 1000 else 3) for count in counts}
    seconds[f"{unlike}, all unlike"] = in_turns(rows, unlike, unlike, 1)
    yield table(seconds)


def in_turns(rows: dict[str, Row], count: int, shapes: int, rounds: int) -> Seconds:
    """Return the seconds of each row and stage, in each round."""
    found = [
        {
            f"{name}: {stage}": x
            for name, row in rows.items()
            if count <= row.most
            for stage, x in stages(row, count, shapes).items()
        }
        for _ in range(rounds)
    ]
    return {name: np.array([turn[name] for turn in found]) for name in found[0]}


def stages(row: Row, count: int, shapes: int) -> dict[str, float]:
    """Return the seconds of each stage, for a step of `count` leaves of `shapes` shapes."""
    params, opt = row.leaves(count, shapes), row.make()
    state = jax.eval_shape(opt.init, params)
    jax.clear_caches()
    times = [time.perf_counter()]
    traced = jax.jit(advance(opt), donate_argnums=(1, 2)).trace(params, params, state)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    return dict(zip(STAGES, [*np.diff(times).tolist(), times[-1] - times[0]], strict=True))


def table(seconds: dict[str, Seconds]) -> Table:
    """Return the table of seconds, by case and by row and stage, each divided by optax's in the same case."""
    medians = {case: {name: float(np.median(x)) for name, x in of.items()} for case, of in seconds.items()}

    def over_optax(of: dict[str, float], row: str, stage: str) -> float | None:
        return of[f"{row}: {stage}"] / of[f"optax: {stage}"] if f"{row}: {stage}" in of else None

    rows: list[list[Any]] = [
        [f"{row}: {stage}", *(over_optax(of, row, stage) for of in medians.values())]
        for row in ROWS
        for stage in STAGES
        if row != "optax"
    ]
    counted = {float(case): of for case, of in medians.items() if case.isdigit()}
    first = min(counted)
    unit = counted[first]["optax: all three"]
    drawn = [f"{row}: {stage}" for row in ROWS for stage in ("trace", "compile") if f"{row}: {stage}" in counted[first]]
    lines = {name: {count: of[name] / unit for count, of in counted.items() if name in of} for name in drawn}
    return Table(
        "trace",
        "Time until a step can run, by the number of leaves",
        ["/ optax, leaves", *seconds],
        rows,
        {f"{name}, {case}": x for case, of in seconds.items() for name, x in of.items()},
        Curves("leaves", f"time / all that optax needs for {first:g} leaves", lines),
    )


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
