"""Interleaved timing: candidates run in turns in one process, and their ratios are reported."""

import ctypes
import math
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Run = Callable[[], object]
Seconds = dict[str, np.ndarray]  # float[rounds], by name

# After each call, the OpenMP threads of torch and of the triad spin for about 5 ms, on cores that the next call needs.
# OMP_WAIT_POLICY=passive would prevent that, but torch would then wake its threads for each leaf, and take ten times as
# long for a thousand leaves.
PAUSE = 0.02

# For each float32 parameter: read g, p, m, v and write p, m, v.
TRIAD_BYTES = 28
TRIAD = """
#include <stddef.h>
void triad(const float *g, float *p, float *m, float *v, ptrdiff_t n) {
  #pragma omp parallel for simd schedule(static)
  for (ptrdiff_t i = 0; i < n; ++i) { m[i] += g[i]; v[i] += g[i]; p[i] += m[i] + v[i]; }
}
"""


class Ratio(NamedTuple):
    """The ratio of two times, taken round by round: its median and quartiles."""

    median: float
    low: float
    high: float


def interleaved(runs: dict[str, Run], rounds: int, *, at_least: float = 0.02) -> Seconds:
    """Measure the seconds of each run in each round, after a warm-up round. Without rounds, return the latter.

    In a round, each run has its turn, in an order that changes from round to round. A run that takes less than
    `at_least` seconds is repeated in its turn for about that long, after a first time that fills the caches and does
    not count. A pause before each turn lets the threads of the run before stop spinning.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order = np.random.default_rng(0)
    for _ in range(rounds + 1):
        for name in order.permutation(list(runs)):
            time.sleep(PAUSE)
            seconds[name].append(_turn(runs[name], at_least))
    return {name: np.array(times[1:] or times) for name, times in seconds.items()}


def _turn(run: Run, at_least: float) -> float:
    first = _seconds(run, 1)
    return first if first >= at_least else _seconds(run, math.ceil(at_least / max(first, 1e-6)))


def _seconds(run: Run, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def ratio(of: np.ndarray, to: np.ndarray) -> Ratio:
    """Return the ratio of the seconds of two interleaved runs."""
    median, low, high = np.quantile(of / to, (0.5, 0.25, 0.75)).tolist()
    return Ratio(median, low, high)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pool_of_cores() -> ProcessPoolExecutor:
    """Return a pool with a process for each core, each with a single thread: more would only wait for each other."""
    threads = {"OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    os.environ.update({name: x for name, x in threads.items() if name not in os.environ})
    return ProcessPoolExecutor(cores(), multiprocessing.get_context("spawn"))


def triads(size: int) -> dict[str, Run]:
    """Return triads: one pass in C over the bytes that a step of `size` float32 parameters must move; none without cc.

    One goes over NumPy arrays, for which NumPy asks Linux for huge pages if they are large; the other over JAX arrays,
    which have no huge pages, and are in the same memory as those of the steps.
    """
    function = _compiled()
    if function is None:
        return {}
    # Fill the arrays: unwritten pages of zeros are all the same page, which stays in the cache.
    of_numpy = [np.full(size, 0.1, np.float32) for _ in range(4)]
    of_jax = jax.block_until_ready([jnp.full(size, 0.1, jnp.float32) for _ in range(4)])
    return {
        "triad": _over(function, size, of_numpy, [x.ctypes.data for x in of_numpy]),
        "triad in JAX's memory": _over(function, size, of_jax, [x.unsafe_buffer_pointer() for x in of_jax]),
    }


def _compiled() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "triad.c", Path(folder) / "triad.so"
        source.write_text(TRIAD)
        # Without -ffast-math: a library linked with it makes the processor of its caller flush subnormals to 0.
        command = ["cc", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        try:
            subprocess.run([*command, str(source), "-o", str(library)], check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return ctypes.CDLL(str(library)).triad


def _over(function: Any, size: int, arrays: list[Any], pointers: list[int]) -> Run:
    arguments = (*map(ctypes.c_void_p, pointers), ctypes.c_ssize_t(size))

    def run() -> None:
        function(*arguments)
        assert len(arrays) == 4  # keeps them alive

    return run
