"""What it costs to skip bad steps, and to measure one:  python -m benchmarks.bench_safety [--quick]

Seconds of a jitted, donated step as multiples of those of the same step without: of the optimizer alone,
and of whole training steps of a multilayer perceptron. "noise" is the plain step against itself. What
`measure` takes comes on top of a step, when it is called. All buffers are donated and, with `step`, aliased.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import adamjax
from adamjax.diagnostics import measure
from benchmarks._measure import Run, Seconds, interleaved, ratio
from benchmarks._report import Table, command, show

PLAIN = adamjax.adamw(1e-3)
VARIANTS = {
    "plain": PLAIN,
    "noise": PLAIN,
    "skip_nonfinite": adamjax.skip_nonfinite(PLAIN),
    "dynamic_loss_scale": adamjax.dynamic_loss_scale(PLAIN),
}
Tree = Any


def alone(opt: Any, params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
    """The optimizer's step, in place."""
    return opt.step(grads, state, params)


def through_updates(opt: Any, params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
    """The same, in optax's two calls."""
    updates, state = opt.update(grads, state, params)
    return adamjax.apply_updates(params, updates), state


def training(opt: Any, params: Tree, state: Tree, batch: tuple[jax.Array, jax.Array]) -> tuple[Tree, Tree]:
    """Forwards, backwards, and the optimizer."""

    def loss(params: Tree) -> jax.Array:
        x, y = batch
        for kernel in params:
            x = jnp.tanh(x @ kernel)
        found = jnp.mean((x - y) ** 2)
        return opt.scale(found, state) if isinstance(opt, adamjax.safety.DynamicLossScale) else found

    return opt.step(jax.grad(loss)(params), state, params)


def runner(step: Callable[..., Any], opt: Any, params: Tree, data: Tree) -> Run:
    jitted = jax.jit(lambda params, state, data: step(opt, params, state, data), donate_argnums=(0, 1))
    held = [jax.tree.map(jnp.copy, params), opt.init(params)]

    def run() -> None:
        held[:] = jax.block_until_ready(jitted(*held, data))

    return run


def measuring(params: Tree, grads: Tree) -> Run:
    updates, state = PLAIN.update(grads, PLAIN.init(params), params)
    jitted = jax.jit(lambda *trees: measure(*trees, opt=PLAIN))
    return lambda: jax.block_until_ready(jitted(grads, updates, state, params))


def tables(quick: bool) -> Iterator[Table]:
    width, rounds = (256, 0) if quick else (2048, 41)
    count = 5 if quick else 1000
    large, large_grads = [jnp.ones((width, width))] * 4, [jnp.full((width, width), 0.1)] * 4
    many, many_grads = [jnp.ones((64, 64))] * count, [jnp.full((64, 64), 0.1)] * count

    def cases() -> Iterator[tuple[str, dict[str, Run]]]:
        for layer, batch in ((width // 2, 512), (width // 4, 64)):
            kernels = list(jax.random.normal(jax.random.key(0), (3, layer, layer)) / layer**0.5)
            data = jnp.ones((batch, layer)), jnp.zeros((batch, layer))
            runs = {name: runner(training, opt, kernels, data) for name, opt in VARIANTS.items()}
            yield f"training, 3 layers of {layer} x {layer}, batches of {batch}", runs
        runs = {name: runner(alone, opt, large, large_grads) for name, opt in VARIANTS.items()}
        yield f"`step`, 4 leaves of {width} x {width}", runs | {"measure": measuring(large, large_grads)}
        runs = {name: runner(alone, opt, many, many_grads) for name, opt in VARIANTS.items()}
        yield f"`step`, {count} leaves of 64 x 64", runs
        runs = {name: runner(through_updates, opt, large, large_grads) for name, opt in VARIANTS.items()}
        yield f"`update` and `apply_updates`, 4 leaves of {width} x {width}", runs

    columns = ["noise", "skip_nonfinite", "dynamic_loss_scale", "measure"]
    rows: list[list[Any]] = []
    raw: Seconds = {}
    for title, runs in cases():
        seconds = interleaved(runs, rounds)
        rows.append([title, *(ratio(seconds[c], seconds["plain"]) if c in seconds else None for c in columns)])
        raw |= {f"{title}, {name}": x for name, x in seconds.items()}
    yield Table("safety", "Time with / without", ["", *columns], rows, raw)


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
