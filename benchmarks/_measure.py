"""Interleaved timing: what is compared runs in turns, in one process, and ratios are what is reported."""

import ctypes
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Run = Callable[[], object]
Seconds = dict[str, np.ndarray]  # float[rounds] of each

# OpenMP's threads, torch's and the triad's, spin for about 5 ms after each call, on cores that the next needs. With
# OMP_WAIT_POLICY=passive they would not, but then torch wakes them for each leaf: a thousand leaves take ten times
# as long as torch is by default.
PAUSE = 0.02

# Of each parameter, in float32: read g, p, m, v and write p, m, v.
TRIAD_BYTES = 28
TRIAD = """
#include <stddef.h>
void triad(const float *g, float *p, float *m, float *v, ptrdiff_t n) {
  #pragma omp parallel for simd schedule(static)
  for (ptrdiff_t i = 0; i < n; ++i) { m[i] += g[i]; v[i] += g[i]; p[i] += m[i] + v[i]; }
}
"""


class Ratio(NamedTuple):
    """Of two times, round by round: the median and the quartiles."""

    median: float
    low: float
    high: float


def interleaved(runs: dict[str, Run], rounds: int, *, at_least: float = 0.02) -> Seconds:
    """The seconds of each in each of `rounds`, after one that warms up; without rounds, those of that one.

    In a round each has its turn, in an order that changes: nothing follows always the same. What takes less than
    `at_least` seconds is repeated in its turn until that has passed, after a first time that does not count: the caches
    are then its own. Before each turn is a pause: threads that another left spinning sleep.
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
    """Of the seconds of two that were interleaved."""
    median, low, high = np.quantile(of / to, (0.5, 0.25, 0.75)).tolist()
    return Ratio(median, low, high)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def triads(size: int) -> dict[str, Run]:
    """The memory limit of a step of so many parameters in float32, in one pass of C; none without such a compiler.

    Twice: over arrays of NumPy's, which asks Linux for huge pages where they are large, and over arrays of JAX's, which
    does not, and whose memory is that of the steps.
    """
    function = _compiled()
    if function is None:
        return {}
    # Written once: pages of zeros that nobody wrote are all the same one, and come from the cache.
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
        # Not -ffast-math: a library linked with that sets its caller's processor to flush subnormals to 0.
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
