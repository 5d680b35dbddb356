"""Interleaved timing: what is compared runs in turns, in one process, and ratios are what is reported."""

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

TRIAD = """
#include <stddef.h>
void triad(const float *g, float *p, float *m, float *v, ptrdiff_t n) {
  #pragma omp parallel for simd schedule(static)
  for (ptrdiff_t i = 0; i < n; ++i) { m[i] += g[i]; v[i] += g[i]; p[i] += m[i] + v[i]; }
}
"""


def interleaved(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each, over `rounds` in which each runs once, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(times[1:])) for name, times in seconds.items()}


def triad(size: int) -> Callable[[], None]:
    """The memory limit of a step in float32: read g, p, m, v and write p, m, v, in one pass of C.

    Needs a C compiler with OpenMP.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "triad.c", Path(folder) / "triad.so"
        source.write_text(TRIAD)
        command = ["cc", "-O3", "-march=native", "-fopenmp", "-ffast-math", "-shared", "-fPIC"]
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).triad
    # Written once: pages of zeros that nobody wrote are all the same one, and come from the cache.
    arrays = [np.full(size, 0.1, np.float32) for _ in range(4)]
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in arrays]

    def run() -> None:
        function(*pointers, ctypes.c_ssize_t(size))
        assert arrays[0].size == size  # keeps the arrays alive

    return run
