"""Errors of Adam's steps with stored moments and parameters:  python -m benchmarks.bench_storage

Adam in each format takes the same gradients as Adam in float32, and its updates are compared with those. Errors are the
norm of all differences divided by that of all updates.

- `storage`: gradients of the transformer of `adamjax.problems.characters`, recorded while it trains in float32 for 300
  steps; the updates from step 100 on, and also the median of the relative errors. Only leaves with two axes count,
  embeddings included; those of fewer than 4096 elements stay in float32.
- `spread`: normal noise times a scale of each element, whose logarithm is normal with standard deviation `sigma`; the
  update after 60 steps.
- `mixtures`: a constant gradient, one element of 64 large and the others smaller by a ratio; the largest single step
  in 20, in learning rates. The same in 60 with constant gradients whose logarithms are normal, with standard deviation
  2. And a regression with 64 outputs, one of them 1000 times larger than the others: the loss of the others after
  600 steps, which begins at 64.
- `parameters`: bfloat16 parameters between 1 and 2 take 1000 equal steps of a part of themselves; the norm of the
  errors of the parameters, as the wrapper knows them, divided by that of their changes.

The codes of other libraries are those of `_reference_codes`.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adamjax
from adamjax import problems
from adamjax.rounding import Kahan
from adamjax.training import keys_of
from benchmarks._reference_codes import REFERENCES, FlashWeights, Nearest, Stored
from benchmarks._report import Table, command, show

INT8, INT4 = adamjax.quantized("int8"), adamjax.quantized("int4")
FORMATS = {"float32": None, "bfloat16": jnp.bfloat16, "int8": INT8, "int4": INT4}
MIXTURES = [(mu, nu) for mu in FORMATS for nu in FORMATS]
LAYER = jax.ShapeDtypeStruct((8192, 8192), jnp.float32)
RATIOS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
NEAREST = (Nearest(), Nearest())
PARTS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
# For each row, the wrapper, and its bytes per parameter.
WRAPPERS: dict[str, tuple[Any, int]] = {
    "rounded to nearest": (lambda opt: opt, 0),
    "stochastic_rounding": (adamjax.stochastic_rounding, 0),
    "kahan": (adamjax.kahan, 2),
    "master_weights, low_bits=8": (partial(adamjax.master_weights, low_bits=8), 1),
    "FlashOptim's 8 bits": (FlashWeights, 1),
    "master_weights, low_bits": (partial(adamjax.master_weights, low_bits=True), 2),
    "master_weights": (adamjax.master_weights, 4),
}


def adam(mu: str, nu: str, learning_rate: Any = 1.0) -> Any:
    return adamjax.adam(learning_rate, mu_dtype=FORMATS[mu], nu_dtype=FORMATS[nu])


def peer(codes: Any, learning_rate: Any = 1.0) -> Any:
    return Stored(adamjax.adam(learning_rate), codes)


def rows() -> dict[str, tuple[Any, float]]:
    """The optimizers, and the bytes of their state per parameter."""
    ours = {
        "bfloat16": ("bfloat16",) * 2,
        "int8": ("int8",) * 2,
        "int4 and int8": ("int4", "int8"),
        "int4": ("int4",) * 2,
    }
    theirs = {"bfloat16, rounded to nearest": NEAREST, **REFERENCES}
    return {
        name: (opt := adam(*formats), adamjax.storage.state_bytes(opt, LAYER) / LAYER.size)
        for name, formats in ours.items()
    } | {name: (peer(codes), sum(code.bytes for code in codes)) for name, codes in theirs.items()}


def recorded_gradients(steps: int) -> list[jax.Array]:
    problem, opt, keys = problems.characters(), adamjax.adam(3e-3), keys_of(0)

    @jax.jit
    def run(params: Any) -> Any:
        def body(carry: Any, t: jax.Array) -> tuple[Any, Any]:
            params, state = carry
            grads = jax.grad(problem.loss)(params, problem.batch(t, keys.data), keys.loss)
            return opt.step(grads, state, params), [g for g in jax.tree.leaves(grads) if g.ndim > 1]

        return jax.lax.scan(body, (params, opt.init(params)), jnp.arange(steps))[1]

    return run(problem.init(keys.init))


def updates(opt: Any, all_grads: list[Any], first: int) -> list[np.ndarray]:
    """The updates of a run along each of `all_grads`, from step `first` on, in one array."""

    @jax.jit
    def run(grads: Any) -> Any:
        zeros = jax.tree.map(lambda g: jnp.zeros(g.shape[1:]), grads)

        def body(state: Any, g: Any) -> Any:
            found, state = opt.update(g, state, zeros)
            return state, found

        return jax.tree.map(lambda x: x[first:], jax.lax.scan(body, opt.init(zeros), grads)[1])

    return [
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(run(grads))]).astype(np.float64) for grads in all_grads
    ]


def norm_of_errors(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def spread_gradients(sigma: float, steps: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    scale = np.exp(sigma * rng.normal(size=(64, 512)))
    return (scale * rng.normal(size=(steps, 64, 512))).astype(np.float32)


def percent(x: float) -> str:
    return f"{100 * x:.{1 if x < 0.1 else 0}f} %"


def along_a_run(quick: bool) -> Table:
    grads, first = recorded_gradients(30 if quick else 300), 10 if quick else 100
    (exact,) = updates(adam("float32", "float32"), [grads], first)

    def row(opt: Any) -> list[str]:
        (found,) = updates(opt, [grads], first)
        return [percent(float(np.median(np.abs(found / exact - 1)))), percent(norm_of_errors(found, exact))]

    return Table(
        "storage",
        "Error of the update with stored moments, against float32",
        ["", "bytes a parameter", "median of the relative errors", "norm of the errors"],
        [[name, f"{size:.2f}", *row(opt)] for name, (opt, size) in rows().items()],
    )


def with_spread_scales(quick: bool) -> Table:
    steps, sigmas = 5 if quick else 60, (0, 1, 2)
    all_grads = [spread_gradients(sigma, steps) for sigma in sigmas]
    exact = updates(adam("float32", "float32"), all_grads, steps - 1)

    def row(opt: Any) -> list[str]:
        found = updates(opt, all_grads, steps - 1)
        return [percent(norm_of_errors(x, y)) for x, y in zip(found, exact, strict=True)]

    return Table(
        "spread",
        "Error of the update, by the spread of the gradients in a block",
        ["", "bytes a parameter", *(f"sigma {sigma}" for sigma in sigmas)],
        [[name, f"{size:.2f}", *row(opt)] for name, (opt, size) in rows().items()],
    )


def with_one_large(ratio: float) -> np.ndarray:
    return np.tile(np.where(np.arange(64) == 0, 1.0, ratio), (256, 1))


def lognormal() -> np.ndarray:
    return np.exp(2 * np.random.default_rng(0).normal(size=(256, 64)))


def largest_steps(opt: Any, all_grads: list[np.ndarray], steps: int) -> list[float]:
    """The largest step of any number with each of some constant gradients."""

    def with_gradient(g: jax.Array) -> jax.Array:
        p = jnp.zeros_like(g)

        def body(state: Any, _: None) -> Any:
            found, state = opt.update(g, state, p)
            return state, jnp.max(jnp.abs(found))

        return jnp.max(jax.lax.scan(body, opt.init(p), length=steps)[1])

    return jax.jit(lambda grads: jax.lax.map(with_gradient, grads))(jnp.float32(np.stack(all_grads))).tolist()


def regression(make: Any, steps: int) -> float:
    """The mean loss of the outputs of ordinary size."""
    opt = make(adamjax.schedules.cosine(1e-2, steps))
    size = jnp.ones(64).at[0].set(1000.0)
    target = jax.random.normal(jax.random.key(0), (64, 64)) * size

    def body(carry: Any, key: jax.Array) -> Any:
        w, state = carry
        x = jax.random.normal(key, (64, 64))
        return opt.step(x.T @ (x @ (w - target)) / 64, state, w), None

    @jax.jit
    def run(w: jax.Array) -> jax.Array:
        (w, _), _ = jax.lax.scan(body, (w, opt.init(w)), jax.random.split(jax.random.key(1), steps))
        return jnp.mean(jnp.sum((w - target)[:, 1:] ** 2, axis=0))

    return float(run(jnp.zeros((64, 64))))


def in_mixtures(quick: bool) -> Table:
    mixtures = [("float32", "float32"), ("int4", "int8")] if quick else MIXTURES
    makes: dict[str, Any] = {f"{mu} and {nu}": lambda lr, mu=mu, nu=nu: adam(mu, nu, lr) for mu, nu in mixtures}
    makes |= {name: lambda lr, codes=codes: peer(codes, lr) for name, codes in REFERENCES.items()}
    steps = 20 if quick else 600
    exact = regression(makes["float32 and float32"], steps)

    def row(make: Any) -> list[str]:
        found = largest_steps(make(1.0), [*map(with_one_large, RATIOS)], 20)
        found += largest_steps(make(1.0), [lognormal()], 60)
        return [f"{x:.3g}" for x in (*found, regression(make, steps) / exact)]

    return Table(
        "mixtures",
        "Largest step in learning rates, by the ratio of small to large gradients in a block; loss of the small "
        f"outputs of a regression, over that in float32, {exact:.2f}",
        ["first and second moment", *(f"{ratio:.0e}" for ratio in RATIOS), "lognormal", "loss"],
        [[name, *row(make)] for name, make in makes.items()],
    )


def drift(wrap: Any, part: float, steps: int) -> str:
    opt = wrap(adamjax.scale_by_learning_rate(1.0))
    start = jnp.linspace(1, 2, 4096, endpoint=False).astype(jnp.bfloat16)
    step = jnp.float32(part) * start.astype(jnp.float32)

    @jax.jit
    def run() -> Any:
        carry = jax.lax.fori_loop(
            0, steps, lambda _, carry: opt.step(-step, carry[1], carry[0]), (start, opt.init(start))
        )
        return known(opt, *carry)

    change = steps * np.asarray(step, np.float64)
    return percent(norm_of_errors(np.asarray(run(), np.float64) - np.asarray(start, np.float64), change))


def known(opt: Any, params: jax.Array, state: Any) -> jax.Array:
    """The parameters as the wrapper knows them, in float32."""
    if hasattr(opt, "weights"):
        return opt.weights(params, state)
    wide = params.astype(jnp.float32)
    return wide + state.kept.astype(jnp.float32) if isinstance(opt, Kahan) else wide


def of_parameters(quick: bool) -> Table:
    steps = 10 if quick else 1000
    return Table(
        "parameters",
        f"Error of bfloat16 parameters after {steps} steps, by the size of a step in parts of the parameter",
        ["", "bytes a parameter", *(f"{part:.0e}" for part in PARTS)],
        [[name, size, *(drift(wrap, part, steps) for part in PARTS)] for name, (wrap, size) in WRAPPERS.items()],
    )


def tables(quick: bool) -> Iterator[Table]:
    yield of_parameters(quick)
    yield with_spread_scales(quick)
    yield in_mixtures(quick)
    yield along_a_run(quick)


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
