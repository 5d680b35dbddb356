"""Time of an AdamW step against optax, torch and the memory:  python -m benchmarks.bench_step [--quick]

Seconds of one jitted, donated step, as ratios. Large leaves: to the triad, which moves the 28 bytes a parameter that a
step in float32 must, in one pass of C; the limit is what a format must move of these. NumPy's arrays, over which
the triad goes, lie in huge pages where Linux has them, JAX's do not: the second ratio is to a triad over arrays of
JAX's. Many and tiny leaves: to optax. Ratios are taken round by round: the median and, in brackets, the quartiles.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks._machine import memory
from benchmarks._measure import Seconds, interleaved, ratio, triads
from benchmarks._report import Bars, Table, command, show
from benchmarks._steps import (
    CODES_IN_TORCH,
    EVERY,
    IN_TORCH,
    MANY,
    OF_BFLOAT16,
    OPTAX,
    Make,
    Shapes,
    Step,
    gradients,
    of_jax,
    of_torch,
)

# What all rows together keep of a parameter, temporary arrays included.
BYTES_HELD = 190


def tables(quick: bool) -> Iterator[Table]:
    rounds = 0 if quick else 9
    millions = 1 if quick else fitting()
    large = [(millions * 256, 1024)] * 4
    mixed = transformer(1, 64, 512) if quick else transformer(8, 512, 16384)
    count = 5 if quick else 1000
    title = f"{millions} M float32 parameters in 4 leaves"
    yield measured("large", title, large, EVERY, rounds, in_torch=[*IN_TORCH, *CODES_IN_TORCH])
    title = f"{millions} M bfloat16 parameters in 4 leaves; the moments of optax and torch are bfloat16, too"
    yield measured("bfloat16", title, large, OF_BFLOAT16 | OPTAX, rounds, dtype="bfloat16")
    title = f"A transformer's {elements(mixed) / 1e6:.3g} million float32 parameters in {len(mixed)} leaves"
    yield measured("mixed", title, mixed, {n: make for n, make in EVERY.items() if "int4" not in n}, rounds)
    for name, shape in (("many", (64, 64)), ("tiny", (64,))):
        title = f"{count} float32 leaves of {math.prod(shape)}"
        yield measured(name, title, [shape] * count, MANY, rounds, to="optax")


def measured(
    name: str,
    title: str,
    shapes: Shapes,
    makes: dict[str, Make],
    rounds: int,
    *,
    dtype: str = "float32",
    to: str = "triad",
    in_torch: Iterable[str] = IN_TORCH,
) -> Table:
    """The steps of these optimizers and of those in torch, of leaves of these shapes, above all over those of `to`."""
    grads = gradients(shapes, dtype)
    steps = {label: of_jax(make, grads) for label, make in makes.items()}
    steps |= {label: of_torch(label, grads) for label in in_torch}
    runs = {label: step.run for label, step in steps.items() if step is not None}
    if to == "triad":
        runs |= triads(elements(shapes))
    return table(name, title, steps, interleaved(runs, rounds))


def table(name: str, title: str, steps: dict[str, Step | None], seconds: Seconds) -> Table:
    """A row for each step; `seconds` lacks those that there are not."""
    to, *others = [peer for peer in ("triad", "triad in JAX's memory", "optax", "torch fused") if peer in seconds]
    limited = to == "triad"
    columns = ["", f"step / {to}", *["limit"] * limited, *(f"/ {peer}" for peer in others)]
    rows: list[list[Any]] = []
    for label, step in steps.items():
        if step is None:
            rows.append([label, *[None] * (len(columns) - 1)])
        else:
            of = seconds[label]
            medians = [ratio(of, seconds[peer]).median for peer in others]
            rows.append([label, ratio(of, seconds[to]), *[step.limit] * limited, *medians])
    return Table(name, title, columns, rows, seconds, Bars(columns[1], "limit" if limited else None))


def fitting() -> int:
    """64 millions, or what the memory of the machine has room for."""
    return next((m for m in (64, 32, 16) if m * 2**20 * BYTES_HELD < 0.6 * memory()), 8)


def elements(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes))


def transformer(layers: int, width: int, tokens: int) -> list[tuple[int, ...]]:
    """The leaves of a decoder like GPT-2's."""
    norm: list[tuple[int, ...]] = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    perceptron = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(tokens, width), *(norm + attention + norm + perceptron) * layers, *norm]


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
