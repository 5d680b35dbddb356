"""Time of a step of AdamW against optax, torch and the memory limit:  python -m benchmarks.bench_step [--quick]

Seconds of one jitted, donated step, as ratios. Large leaves are compared with the triad, one pass in C that moves the
28 bytes a parameter of a float32 step; `limit` is the bytes that the format must move, divided by these 28. The triad
goes over NumPy's arrays, which lie in huge pages if Linux has them; JAX's arrays do not, so the second ratio is to a
triad over JAX's arrays. Many and tiny leaves are compared with optax. Ratios are taken round by round; the table has
their medians and, in brackets, their quartiles.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks import _steps
from benchmarks._machine import memory
from benchmarks._measure import Seconds, interleaved, ratio, triads
from benchmarks._report import Bars, Table, command, show

# Bytes for each parameter that all rows together need, temporary arrays included.
BYTES_HELD = 190


def tables(quick: bool) -> Iterator[Table]:
    rounds = 0 if quick else 9
    millions = 1 if quick else fitting()
    large = [(millions * 256, 1024)] * 4
    mixed = transformer(1, 64, 512) if quick else transformer(8, 512, 16384)
    count = 5 if quick else 1000
    title = f"{millions} M float32 parameters in 4 leaves"
    yield measured("large", title, large, _steps.EVERY, rounds, in_torch=[*_steps.IN_TORCH, *_steps.CODES_IN_TORCH])
    title = f"{millions} M bfloat16 parameters in 4 leaves; the moments of optax and torch are bfloat16, too"
    of_bfloat16 = _steps.OF_BFLOAT16 | {"flashoptim-jax, 24 and 8 bits": _steps.flash_adamw} | _steps.OPTAX
    yield measured("bfloat16", title, large, of_bfloat16, rounds, dtype="bfloat16")
    title = f"{millions} M float32 parameters in 4 leaves, stepped by frameworks and behind wrappers"
    yield measured("paths", title, large, _steps.PATHS, rounds)
    part = max(millions // 4, 1)
    title = f"{part} M float32 parameters in 4 leaves: what came after Adam"
    yield measured("family", title, [(part * 256, 1024)] * 4, _steps.FAMILY | _steps.OPTAX, rounds, in_torch=())
    title = f"A transformer's {elements(mixed) / 1e6:.3g} million float32 parameters in {len(mixed)} leaves"
    yield measured("mixed", title, mixed, {n: make for n, make in _steps.EVERY.items() if "int4" not in n}, rounds)
    for name, shape in (("many", (64, 64)), ("tiny", (64,))):
        title = f"{count} float32 leaves of {math.prod(shape)}"
        yield measured(name, title, [shape] * count, _steps.MANY, rounds, to="optax")


def measured(
    name: str,
    title: str,
    shapes: _steps.Shapes,
    makes: dict[str, _steps.Make],
    rounds: int,
    *,
    dtype: str = "float32",
    to: str = "triad",
    in_torch: Iterable[str] = _steps.IN_TORCH,
) -> Table:
    """Time the steps of these optimizers and of torch's, of leaves of these shapes, relative to `to` above all."""
    grads = _steps.gradients(shapes, dtype)
    steps = {label: _steps.of_jax(make, grads) for label, make in makes.items()}
    steps |= {label: _steps.of_torch(label, grads) for label in in_torch}
    runs = {label: step.run for label, step in steps.items() if step is not None}
    if to == "triad":
        runs |= triads(elements(shapes))
    return table(name, title, steps, interleaved(runs, rounds))


def table(name: str, title: str, steps: dict[str, _steps.Step | None], seconds: Seconds) -> Table:
    """Return a table with a row for each step; `seconds` has no entry for steps that are None."""
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
    """Return 64 millions of parameters, or as many as fit into the memory of the machine."""
    return next((m for m in (64, 32, 16) if m * 2**20 * BYTES_HELD < 0.6 * memory()), 8)


def elements(shapes: _steps.Shapes) -> int:
    return sum(map(math.prod, shapes))


def transformer(layers: int, width: int, tokens: int) -> list[tuple[int, ...]]:
    """Return the shapes of the leaves of a decoder like GPT-2's."""
    norm: list[tuple[int, ...]] = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    perceptron = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(tokens, width), *(norm + attention + norm + perceptron) * layers, *norm]


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
