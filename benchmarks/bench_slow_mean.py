"""Errors of AdEMAMix' slow mean, by its storage:  python -m benchmarks.bench_slow_mean

Gradients are normal noise around constants: each element has its own constant, from a normal distribution, and the
noise is a multiple of their deviation. AdEMAMix with `b3=0.9999` takes the same gradients with its slow mean in
float32 and in each format of `mu_slow_dtype`. The figures are the root mean square of the differences of the slow
means, divided by that of the slow mean in float32. The other moments are in float32.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adamjax
from adamjax.storage import decode
from benchmarks._report import Table, command, show

FORMATS = {"bfloat16": jnp.bfloat16, "int8": adamjax.quantized("int8"), "int4": adamjax.quantized("int4")}
SIZE = 8192
NOISES = (0.0, 1.0, 10.0)
STEPS = (100, 1000, 3000, 10_000)


def slow_means(mu_slow_dtype: Any, noise: float, steps: tuple[int, ...]) -> list[np.ndarray]:
    """Return the slow mean after each number of steps."""
    opt = adamjax.ademamix(1e-3, b3=0.9999, mu_slow_dtype=mu_slow_dtype)
    constants_key, noise_key = jax.random.split(jax.random.key(0))
    constants = jax.random.normal(constants_key, (SIZE,))

    def body(t: Any, state: Any) -> Any:
        grads = constants + noise * jax.random.normal(jax.random.fold_in(noise_key, t), (SIZE,))
        return opt.update(grads, state, constants)[1]

    @jax.jit
    def advance(state: Any, start: Any, end: Any) -> Any:
        return jax.lax.fori_loop(start, end, body, state)

    state, found = opt.init(constants), []
    for start, end in zip((0, *steps), steps, strict=False):
        state = advance(state, start, end)
        found.append(np.asarray(decode(state)[0].mu_slow, np.float64))
    return found


def errors(name: str, noise: float, steps: tuple[int, ...]) -> list[float]:
    pairs = zip(slow_means(FORMATS[name], noise, steps), slow_means(None, noise, steps), strict=True)
    return [float(np.linalg.norm(stored - exact) / np.linalg.norm(exact)) for stored, exact in pairs]


def tables(quick: bool) -> Iterator[Table]:
    steps = STEPS[:1] if quick else STEPS
    yield Table(
        "slow-mean",
        "Relative error of the slow mean, by its storage, the noise of the gradients and the number of steps",
        ["storage", "noise", *(f"{n} steps" for n in steps)],
        [
            [name, f"{noise:g}", *(f"{error:.1%}" for error in errors(name, noise, steps))]
            for name in FORMATS
            for noise in NOISES
        ],
    )


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
