"""An AdamW step on a GPU, against what its memory allows:  python -m benchmarks.bench_gpu [--quick]

Seconds of one jitted, donated step of large leaves, all kinds in turns. `roofline` is the bytes that a step has to
move (gradients, parameters and state once in, parameters and state once out) over the bandwidth that x + 1 over
4 gigabytes reaches: 1 is as fast as memory allows. Whether the steps are right, `pytest tests/test_pallas.py` says.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

# Torch is to have its part of the memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import optax

import adamjax
from benchmarks._measure import interleaved

LR, DECAY = 1e-3, 1e-2
LEAVES, REPEATS = 4, 10
INT8, INT4 = adamjax.quantized("int8"), adamjax.quantized("int4")
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"},
    "int8": {"mu_dtype": INT8, "nu_dtype": INT8},
    "int4": {"mu_dtype": INT4, "nu_dtype": INT4},
    "int4 and int8": {"mu_dtype": INT4, "nu_dtype": INT8},
}


class Steps:
    """So many steps of an optimizer, in place: what a call costs is hidden behind the one before."""

    def __init__(self, opt: Any, shape: tuple[int, int]):
        keys = jax.random.split(jax.random.key(0), 2 * LEAVES)
        self.grads, params = ([jax.random.normal(key, shape) for key in part] for part in (keys[::2], keys[1::2]))
        self.held = [params, jax.jit(opt.init)(params)]
        self.bytes = sum(x.nbytes for x in self.grads) + 2 * sum(x.nbytes for x in jax.tree.leaves(self.held))

        def step(grads: Any, params: Any, state: Any) -> tuple[Any, Any]:
            if isinstance(opt, adamjax.Transformation):
                return opt.step(grads, state, params)
            updates, state = opt.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.step = jax.jit(step, donate_argnums=(1, 2)).lower(self.grads, *self.held).compile()
        memory: Any = self.step.memory_analysis()
        self.temporary = memory.temp_size_in_bytes

    def __call__(self) -> None:
        for _ in range(REPEATS):
            self.held[:] = self.step(self.grads, *self.held)
        jax.block_until_ready(self.held)


def torch_steps(size: int) -> Callable[[], None] | None:
    try:
        import torch
    except ImportError:
        return None
    params = [torch.nn.Parameter(torch.randn(size, device="cuda")) for _ in range(LEAVES)]
    for p in params:
        p.grad = torch.randn_like(p)
    opt = torch.optim.AdamW(params, LR, weight_decay=DECAY, fused=True)

    def run() -> None:
        for _ in range(REPEATS):
            opt.step()
        torch.cuda.synchronize()

    return run


def bandwidth(gigabytes: float, rounds: int) -> float:
    """Bytes a second, read and written, of x + 1."""
    held = [jnp.ones(int(gigabytes * 2**28), jnp.float32)]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def run() -> None:
        for _ in range(REPEATS):
            held[0] = add(held[0])
        held[0].block_until_ready()

    return REPEATS * 2 * held[0].nbytes / interleaved({"x + 1": run}, rounds)["x + 1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that it runs")
    quick = parser.parse_args().quick
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise SystemExit(f"no GPU here, but {device}")
    shape, rounds = (512 if quick else 8192, 8192), 3 if quick else 15
    speed = bandwidth(0.25 if quick else 4, rounds)
    print(f"{device.device_kind}, jax {jax.__version__}: x + 1 moves {speed / 1e12:.2f} TB/s")

    runs: dict[str, Steps] = {"optax": Steps(optax.adamw(LR, weight_decay=DECAY), shape)}
    for name, options in FORMATS.items():
        runs[name] = Steps(adamjax.adamw(LR, weight_decay=DECAY, **options), shape)
        if "int" in name:
            runs[f"{name}, fused"] = Steps(adamjax.adamw(LR, weight_decay=DECAY, fused=True, **options), shape)
    others = {"torch, fused": torch_steps(shape[0] * shape[1])}
    calls = {name: run for name, run in (runs | others).items() if run is not None}
    seconds = interleaved(calls, rounds)

    print(f"{LEAVES} leaves of {shape[0] * shape[1]} float32 parameters, {rounds} rounds of {REPEATS} steps")
    print(f"  {'':22} {'ms':>8} {'/ optax':>8} {'roofline':>9} {'temporary MB':>13}")
    for name, x in seconds.items():
        line = f"  {name:22} {1e3 * x / REPEATS:8.3f} {x / seconds['optax']:8.2f}"
        if name in runs:
            least = REPEATS * runs[name].bytes / speed
            line += f" {least / x:9.2f} {runs[name].temporary / 1e6:13.2f}"
        print(line)


if __name__ == "__main__":
    main()
