"""Errors of Adam's direction with stored moments:  python -m benchmarks.bench_storage

The gradients of the transformer of `adamjax.problems.characters` are recorded while it trains in float32 for 300
steps. Then Adam is run on them again with moments that are stored and loaded at each step, and its directions from
step 100 on are compared with those in float32. The figures are the median of the relative errors, and the norm of all
errors divided by that of all directions. Only leaves with two axes count, embeddings included; the reference
implementations keep leaves of fewer than 4096 elements in float32.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adamjax
from adamjax import problems
from adamjax._core import quantization
from adamjax._core.low_precision import Dither, dither
from adamjax._transforms import moment_storage
from adamjax.training import keys_of
from benchmarks._reference_codes import REFERENCES, Reference
from benchmarks._report import Table, command, show

STEPS, FROM = 300, 100

# A function from a moment, the step and the number of the moment to the moment as stored and loaded.
Trip = Callable[[jax.Array, jax.Array, int], jax.Array]


def evenly(t: jax.Array, number: int) -> Dither:
    return dither(t, number)


def independently(t: jax.Array, number: int) -> Dither:
    return Dither(dither(t * 1000 + number, 0).phase * jnp.uint32(0x7FEB352D), jnp.uint32(0))


def coded(bits: int, signed: bool, block_size: int, numbers: Callable[..., Dither] = evenly) -> Trip:
    return lambda x, t, number: quantization.encode(x, bits, signed, block_size, numbers(t, number)).decode()


def bfloat16(x: jax.Array, t: jax.Array, number: int) -> jax.Array:
    return moment_storage.round_second_moment(x, jnp.zeros((), jnp.bfloat16), dither(t, number))


def nearest(x: jax.Array, t: jax.Array, number: int) -> jax.Array:
    return jax.lax.reduce_precision(x, 8, 7)


def reference(code: Reference) -> Trip:
    return lambda x, t, number: code.round_trip(x)


def pair(mu_bits: int, nu_bits: int, numbers: Callable[..., Dither] = evenly) -> tuple[Trip, Trip]:
    block_size = {8: 128, 4: 64}
    return coded(mu_bits, True, block_size[mu_bits], numbers), coded(nu_bits, False, block_size[nu_bits], numbers)


ROWS: dict[str, tuple[Trip, Trip]] = {
    "bfloat16": (bfloat16, bfloat16),
    "bfloat16, to nearest": (nearest, nearest),
    "int8": pair(8, 8),
    "int8, independent random numbers": pair(8, 8, independently),
    "int4 and int8": pair(4, 8),
    "int4 and int8, independent": pair(4, 8, independently),
    "int4": pair(4, 4),
    **{name: (reference(mu), reference(nu)) for name, (mu, nu) in REFERENCES.items()},
}


def recorded_gradients() -> list[jax.Array]:
    problem, opt, keys = problems.characters(), adamjax.adam(3e-3), keys_of(0)

    @jax.jit
    def run(params: Any) -> Any:
        def body(carry: Any, t: jax.Array) -> tuple[Any, Any]:
            params, state = carry
            grads = jax.grad(problem.loss)(params, problem.batch(t, keys.data), keys.loss)
            return opt.step(grads, state, params), [g for g in jax.tree.leaves(grads) if g.ndim > 1]

        return jax.lax.scan(body, (params, opt.init(params)), jnp.arange(STEPS))[1]

    return run(problem.init(keys.init))


def errors(grads: list[jax.Array], trips: tuple[Trip, Trip]) -> tuple[float, float]:
    """Return the median relative error of the directions, and the norm of the errors over that of the directions."""

    def directions(g: jax.Array, number: int, stored: bool) -> jax.Array:
        def body(carry: Any, g_t: Any) -> tuple[Any, jax.Array]:
            (m, v), (g, t) = carry, g_t
            m, v = m + 0.1 * (g - m), v + 0.001 * (g * g - v)
            d = m / (1 - 0.9**t) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)
            count = t.astype(jnp.int32)
            kept = (trips[0](m, count, 2 * number), trips[1](v, count, 2 * number + 1)) if stored else (m, v)
            return kept, d

        zeros = jnp.zeros(g.shape[1:])
        steps = jnp.arange(1, STEPS + 1, dtype=jnp.float32)
        return jax.lax.scan(body, (zeros, zeros), (g, steps))[1][FROM:]

    exact, found = (
        np.concatenate(
            [np.ravel(jax.jit(directions, static_argnums=(1, 2))(g, i, stored)) for i, g in enumerate(grads)]
        ).astype(np.float64)
        for stored in (False, True)
    )
    error = np.abs(found - exact)
    return float(np.median(error / np.abs(exact))), float(np.linalg.norm(error) / np.linalg.norm(exact))


def tables(quick: bool) -> Iterator[Table]:
    grads = recorded_gradients()
    yield Table(
        "storage",
        "Error of the direction with stored moments, against float32",
        ["", "median of the relative errors", "norm of the errors"],
        [[name, *(f"{error:.3f}" for error in errors(grads, trips))] for name, trips in ROWS.items()],
    )


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
