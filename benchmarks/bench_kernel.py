"""Time until the first step of a process, by where its kernel comes from:  python -m benchmarks.bench_kernel [--quick]

Seconds of tracing, compiling and running the first step of AdamW on four matrices, in a fresh process, after JAX is
there. `prebuilt`: by the kernel of a wheel for this machine; only where the package that is installed has one. `kept`:
by a kernel that an earlier process compiled. `compiled`: by one that this process compiles. Medians.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from adamjax.kernels import _prebuilt
from benchmarks._report import Table, command, show

FIRST_STEP = """
import sys, time
import jax, jax.numpy as jnp
import adamjax
from adamjax.kernels import _prebuilt

fused, prebuilt = (word == "True" for word in sys.argv[1:])
if not prebuilt:
    _prebuilt.files = dict
opt = adamjax.adamw(1e-3, fused=fused)
params = jax.block_until_ready([jnp.ones((256, 256 + i)) for i in range(4)])
state = jax.block_until_ready(opt.init(params))
start = time.perf_counter()
jax.block_until_ready(jax.jit(opt.step)(params, state, params))
print(time.perf_counter() - start)
"""


def tables(quick: bool) -> Iterator[Table]:
    rounds = 1 if quick else 5
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "kept"
        rows: list[list[Any]] = [["XLA, plain", median(rounds, kept, fused=False)]]
        rows.append(["compiled", median(1 if quick else 2, None, fused=True)])
        first_step(kept, fused=True)
        rows.append(["kept", median(rounds, kept, fused=True)])
    has_prebuilt = bool(_prebuilt.files())
    rows.append(["prebuilt", median(rounds, None, fused=True, prebuilt=True) if has_prebuilt else None])
    yield Table("kernel", "Time until the first step, by where the kernel comes from", ["", "seconds"], rows)


def median(rounds: int, cache: Path | None, *, fused: bool, prebuilt: bool = False) -> float:
    return float(np.median([first_step(cache, fused=fused, prebuilt=prebuilt) for _ in range(rounds)]))


def first_step(cache: Path | None, *, fused: bool, prebuilt: bool = False) -> float:
    """Return the seconds of the first step of a process, with this folder of kept kernels, or an empty one."""
    with tempfile.TemporaryDirectory() as empty:
        env = os.environ | {"ADAMJAX_CACHE_DIR": str(cache or empty), "JAX_ENABLE_COMPILATION_CACHE": "false"}
        done = subprocess.run(
            [sys.executable, "-c", FIRST_STEP, str(fused), str(prebuilt)],
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return float(done.stdout)


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
