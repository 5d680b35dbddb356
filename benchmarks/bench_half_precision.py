"""What half precision parameters do to Adam's state and steps:  python -m benchmarks.bench_half_precision

The second moment of bfloat16 parameters after 1000 gradients of 1 (exactly: 1 - 0.999**1000; the mean of a
thousand of them), and the first step of a float16 parameter whose gradient is 0 (exactly: 0).
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

import adamjax

STEPS = 1000


def moment_of_jax(opt: Any) -> float:
    ones = jnp.ones(1000, jnp.bfloat16)

    def body(state: Any, _: None) -> tuple[Any, None]:
        return opt.update(ones, state, ones)[1], None

    return float(jax.lax.scan(body, opt.init(ones), length=STEPS)[0][0].nu.astype(jnp.float32).mean())


def step_of_jax(opt: Any) -> float:
    zero = jnp.zeros((), jnp.float16)
    return abs(float(opt.update(zero, opt.init(zero), zero)[0]))


def of_torch(fused: bool) -> tuple[float, float]:
    import torch

    def after(steps: int, gradient: float, dtype: torch.dtype) -> tuple[float, float]:
        p = torch.nn.Parameter(torch.zeros((), dtype=dtype))
        opt = torch.optim.Adam([p], fused=fused)
        for _ in range(steps):
            p.grad = torch.full_like(p, gradient)
            opt.step()
        return opt.state[p]["exp_avg_sq"].item(), abs(p.item())

    return after(STEPS, 1.0, torch.bfloat16)[0], after(1, 0.0, torch.float16)[1]


def main() -> None:
    stored = adamjax.adam(nu_dtype=jnp.bfloat16)
    rows = {
        "exactly": (1 - 0.999**STEPS, 0.0),
        "adamjax": (moment_of_jax(adamjax.adam()), step_of_jax(adamjax.adam())),
        "adamjax, nu_dtype=bfloat16": (moment_of_jax(stored), step_of_jax(stored)),
        "optax": (moment_of_jax(optax.adam(1e-3)), step_of_jax(optax.adam(1e-3))),
    }
    with contextlib.suppress(ImportError):
        rows |= {"torch": of_torch(fused=False), "torch fused": of_torch(fused=True)}
    print(f"{'':28}  nu, bfloat16   step, float16")
    for name, (moment, step) in rows.items():
        print(f"{name:28}  {moment:<12.3f}   {step:g}")


if __name__ == "__main__":
    main()
