"""Time of an AdamW step against optax, torch and the memory:  python -m benchmarks.bench_step [--quick]

Large leaves: seconds of one jitted, donated step, as multiples of the triad (one pass over the same
bytes in C). Many leaves: seconds of tracing and lowering, and of compiling, as multiples of optax's.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adamjax
from benchmarks._measure import interleaved, triad

LR, DECAY = 1e-3, 1e-2


def jax_step(opt: Any, sizes: list[int]) -> Callable[[], None]:
    def advance(grads: Any, params: Any, state: Any) -> tuple[Any, Any]:
        if isinstance(opt, adamjax.Transformation):
            return opt.step(grads, state, params)
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(advance, donate_argnums=(1, 2))
    grads = [jnp.full(n, 0.1, jnp.float32) for n in sizes]
    params = [jnp.ones(n, jnp.float32) for n in sizes]
    held = [params, opt.init(params)]

    def run() -> None:
        held[:] = jax.block_until_ready(step(grads, *held))

    return run


def torch_step(sizes: list[int], **options: Any) -> Callable[[], None] | None:
    try:
        import torch
    except ImportError:
        return None
    params = [torch.nn.Parameter(torch.ones(n)) for n in sizes]
    for p in params:
        p.grad = torch.full_like(p, 0.1)
    opt = torch.optim.AdamW(params, LR, weight_decay=DECAY, **options)
    return lambda: opt.step()


def large_leaves(millions: int, rounds: int) -> None:
    sizes = [millions * 2**20 // 4] * 4
    bfloat16: Any = {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"}
    candidates = {
        "triad": triad(sum(sizes)),
        "adamjax": jax_step(adamjax.adamw(LR, weight_decay=DECAY), sizes),
        "adamjax fused": jax_step(adamjax.adamw(LR, weight_decay=DECAY, fused=True), sizes),
        "the same with moments in bfloat16": jax_step(
            adamjax.adamw(LR, weight_decay=DECAY, fused=True, **bfloat16), sizes
        ),
        "optax": jax_step(optax.adamw(LR, weight_decay=DECAY), sizes),
        "torch fused": torch_step(sizes, fused=True),
        "torch foreach": torch_step(sizes, foreach=True),
    }
    seconds = interleaved({name: run for name, run in candidates.items() if run is not None}, rounds)
    print(f"{millions} M float32 parameters in 4 leaves, {rounds} rounds: step / triad")
    for name, time_ in seconds.items():
        print(f"  {name:33} {time_ / seconds['triad']:.2f}")


def many_leaves(count: int, rounds: int) -> None:
    # Four distinct shapes: what is traced once per distinct leaf must not be traced a thousand times.
    params = [jnp.ones(64 + i % 4, jnp.float32) for i in range(count)]
    stages: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for name, opt, apply in (
            ("adamjax", adamjax.adamw(LR), adamjax.apply_updates),
            ("optax", optax.adamw(LR), optax.apply_updates),
        ):

            def step(grads: Any, params: Any, state: Any, opt: Any = opt, apply: Any = apply) -> tuple[Any, Any]:
                updates, state = opt.update(grads, state, params)
                return apply(params, updates), state

            state = opt.init(params)
            jax.clear_caches()
            start = time.perf_counter()
            lowered = jax.jit(step).lower(params, params, state)
            middle = time.perf_counter()
            lowered.compile()
            end = time.perf_counter()
            times = stages.setdefault(name, {"trace and lower": [], "compile": []})
            times["trace and lower"].append(middle - start)
            times["compile"].append(end - middle)
    print(f"{count} leaves of 4 shapes, {rounds} rounds: adamjax / optax")
    for stage in ("trace and lower", "compile"):
        ours, theirs = (np.median(stages[name][stage]) for name in ("adamjax", "optax"))
        print(f"  {stage:16} {ours / theirs:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that it runs")
    quick = parser.parse_args().quick
    large_leaves(1 if quick else 64, 3 if quick else 15)
    many_leaves(20 if quick else 1000, 1 if quick else 3)


if __name__ == "__main__":
    main()
