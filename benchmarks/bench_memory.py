"""Memory that a step of AdamW keeps, and needs temporarily:  python -m benchmarks.bench_memory [--quick]

For one jitted step with donated buffers, XLA reports of the compiled program: the state, in bytes a parameter; the
temporary arrays, in percent of the bytes of the parameters; and how much of parameters and state is updated in place.
Linux reports of the process: how far its peak during a step is above the memory it held before, in percent of the bytes
of the parameters.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from benchmarks import _steps
from benchmarks._measure import Run
from benchmarks._report import Table, command, show

COLUMNS = ["", "state, bytes a parameter", "temporaries, %", "in place, %", "peak of the process, %"]


def tables(quick: bool) -> Iterator[Table]:
    # Large enough that freed memory goes back to the system, where the peak is measured.
    large: _steps.Shapes = [(64 if quick else 8192, 4096)] * 2
    many: _steps.Shapes = [(64, 64)] * (5 if quick else 300)
    size = f"{2 * large[0][0] / 256:.3g} M"
    yield measured("memory", f"A step of {size} float32 parameters in 2 leaves", large, _steps.EVERY)
    title = f"A step of {size} bfloat16 parameters in 2 leaves"
    yield measured("memory-bfloat16", title, large, _steps.OF_BFLOAT16 | _steps.OPTAX, dtype="bfloat16")
    # Without torch: the process keeps the memory of its small arrays when they are freed, so that no peak shows.
    title = f"A step of {len(many)} float32 leaves of 4096"
    yield measured("memory-many", title, many, _steps.MANY, torch=())


def measured(
    name: str,
    title: str,
    shapes: _steps.Shapes,
    makes: dict[str, _steps.Make],
    *,
    dtype: str = "float32",
    torch: Iterable[str] = _steps.IN_TORCH,
) -> Table:
    grads = _steps.gradients(shapes, dtype)
    rows = [[label, *of_jax(make, grads)] for label, make in makes.items()]
    rows += [[label, *with_torch(label, grads)] for label in torch]
    return Table(name, title, COLUMNS, rows)


def of_jax(make: _steps.Make, grads: list[jax.Array]) -> list[Any]:
    opt = make()
    if _steps.is_refused(opt, grads):
        return [None] * 4
    params = _steps.parameters(grads)
    state = jax.block_until_ready(opt.init(params))
    kept, size, elements = _steps.nbytes(state), _steps.nbytes(params), sum(p.size for p in params)
    compiled: Any = jax.jit(_steps.advance(opt), donate_argnums=(1, 2)).lower(grads, params, state).compile()
    said = compiled.memory_analysis()
    held = [params, state]
    del params, state

    def run() -> None:
        held[:] = jax.block_until_ready(compiled(grads, *held))

    in_place = percent(said.alias_size_in_bytes, kept + size)
    return [kept / elements, percent(said.temp_size_in_bytes, size), in_place, percent(peak(run), size)]


def with_torch(label: str, grads: list[jax.Array]) -> list[Any]:
    step = _steps.of_torch(label, grads)
    if step is None:
        return [None] * 4
    step.run()  # creates the state
    size = _steps.nbytes(grads)
    return [2 * size / sum(g.size for g in grads), None, None, percent(peak(step.run), size)]


def peak(run: Run) -> int | None:
    """Return by how many bytes the process grew while `run` ran; None if the system does not report it."""
    time.sleep(0.1)  # let pending frees finish
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return None
    before = _peak_until_now()
    run()
    return _peak_until_now() - before


def _peak_until_now() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def percent(part: int | None, whole: int) -> float | None:
    return None if part is None else 100 * part / whole


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
