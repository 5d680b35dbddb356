"""Time of a step of AdamW on a GPU, against its memory limit:  python -m benchmarks.bench_gpu [--quick]

Seconds of one jitted, donated step of large leaves, with all optimizers in turns. `roofline` is the time in which x + 1
over 4 gigabytes moves the bytes that a step must move (it reads gradients, parameters and state once, and writes
parameters and state once), divided by the time of the step: 1 is as fast as the memory allows. `pytest
tests/test_pallas.py` tests that the steps are correct.
"""

import os
from collections.abc import Iterator
from typing import Any

# Leave memory for torch.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

import adamjax
from benchmarks import _steps
from benchmarks._measure import Run, interleaved, ratio
from benchmarks._report import Bars, Table, command, show

LEAVES, REPEATS = 4, 10
FORMATS = {
    "": (None, None),
    ", bfloat16 moments": (jnp.bfloat16, jnp.bfloat16),
    ", int8 moments": (_steps.INT8, _steps.INT8),
    ", int4 and int8 moments": (_steps.INT4, _steps.INT8),
    ", int4 moments": (_steps.INT4, _steps.INT4),
}


class Steps:
    """`REPEATS` steps of an optimizer, in place: the overhead of a call overlaps with the step before."""

    def __init__(self, opt: Any, shape: tuple[int, int]):
        keys = jax.random.split(jax.random.key(0), 2 * LEAVES)
        self.grads, params = ([jax.random.normal(key, shape) for key in part] for part in (keys[::2], keys[1::2]))
        self.held = [params, jax.jit(opt.init)(params)]
        self.bytes = _steps.nbytes(self.grads) + 2 * _steps.nbytes(self.held)
        lowered = jax.jit(_steps.advance(opt), donate_argnums=(1, 2)).lower(self.grads, *self.held)
        self.step = lowered.compile()
        memory: Any = self.step.memory_analysis()
        self.temporary = memory.temp_size_in_bytes

    def __call__(self) -> None:
        for _ in range(REPEATS):
            self.held[:] = self.step(self.grads, *self.held)
        jax.block_until_ready(self.held)


def torch_steps(size: int) -> Run | None:
    try:
        import torch
    except ImportError:
        return None
    params = [torch.nn.Parameter(torch.randn(size, device="cuda")) for _ in range(LEAVES)]
    for p in params:
        p.grad = torch.randn_like(p)
    opt = torch.optim.AdamW(params, _steps.LR, weight_decay=_steps.DECAY, fused=True)

    def run() -> None:
        for _ in range(REPEATS):
            opt.step()
        torch.cuda.synchronize()

    return run


def bandwidth(gigabytes: float, rounds: int) -> float:
    """Return the bytes a second that x + 1 reads and writes."""
    held = [jnp.ones(int(gigabytes * 2**28), jnp.float32)]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run() -> None:
        for _ in range(REPEATS):
            held[0] = add(held[0])
        held[0].block_until_ready()

    return REPEATS * 2 * held[0].nbytes / float(np.median(interleaved({"x + 1": run}, rounds)["x + 1"]))


def tables(quick: bool) -> Iterator[Table]:
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit(f"no GPU here, but {device}")
    shape, rounds = (512 if quick else 8192, 8192), 3 if quick else 15
    speed = bandwidth(0.25 if quick else 4, rounds)

    runs: dict[str, Steps] = {}
    for name, (mu, nu) in FORMATS.items():
        runs[f"adamjax{name}"] = Steps(_steps.adamw(mu, nu), shape)
        if isinstance(mu, adamjax.storage.Quantized):
            runs[f"adamjax fused{name}"] = Steps(_steps.adamw(mu, nu, fused=True), shape)
    runs["optax"] = Steps(_steps.OPTAX["optax"](), shape)
    if (flash := _steps.flash_adamw()) is not None:
        runs["flashoptim-jax, 8 bits"] = Steps(flash, shape)
    calls: dict[str, Run] = dict(runs)
    if (of_torch := torch_steps(shape[0] * shape[1])) is not None:
        calls["torch fused"] = of_torch
    seconds = interleaved(calls, rounds)

    rows = []
    for name, x in seconds.items():
        # Torch's moments are float32, like optax's.
        of = runs.get(name, runs["optax"])
        share = ratio(np.full_like(x, REPEATS * of.bytes / speed), x)
        temporary = of.temporary / 1e6 if name in runs else None
        rows.append([name, 1e3 * float(np.median(x)) / REPEATS, ratio(x, seconds["optax"]), share, temporary])
    where = f"{device.device_kind}, where x + 1 moves {speed / 1e12:.2f} TB/s"
    yield Table(
        "gpu",
        f"AdamW, {LEAVES} leaves of {shape[0] * shape[1]} float32 parameters on {where}",
        ["", "ms", "/ optax", "roofline", "temporary MB"],
        rows,
        seconds,
        Bars("/ optax"),
    )


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
