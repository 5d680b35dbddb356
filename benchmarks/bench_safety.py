"""Cost of skipping bad steps, and of measuring a step:  python -m benchmarks.bench_safety [--quick]

Seconds of a jitted, donated step, divided by those of the plain step: for the optimizer alone, and for whole training
steps of a multilayer perceptron. "noise" is the plain step against itself. The time of `measure` adds to that of a step
when it is called. All buffers are donated and, with `step`, aliased.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import adamjax
from adamjax.diagnostics import measure
from adamjax.training import step_fn
from benchmarks._measure import Run, Seconds, interleaved, ratio
from benchmarks._report import Table, command, show

PLAIN = adamjax.adamw(1e-3)
VARIANTS = {
    "plain": PLAIN,
    "noise": PLAIN,
    "skip_nonfinite": adamjax.skip_nonfinite(PLAIN),
    "skip_spikes": adamjax.skip_spikes(PLAIN),
    "dynamic_loss_scale": adamjax.dynamic_loss_scale(PLAIN),
}
Tree = Any
Step = Callable[[Tree, Tree, Tree], tuple[Tree, ...]]  # jitted, from (params, state, data) to (params, state, ...)


def alone(opt: Any) -> Step:
    """The optimizer's step, in place."""
    return jax.jit(lambda params, state, grads: opt.step(grads, state, params), donate_argnums=(0, 1))


def through_updates(opt: Any) -> Step:
    """The same, in optax's two calls."""

    def step(params: Tree, state: Tree, grads: Tree) -> tuple[Tree, Tree]:
        updates, state = opt.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def training(opt: Any) -> Step:
    """Forwards, backwards, and the optimizer."""

    def loss(params: Tree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, y = batch
        for kernel in params:
            x = jnp.tanh(x @ kernel)
        return jnp.mean((x - y) ** 2)

    return step_fn(loss, opt)


def runner(make: Callable[[Any], Step], opt: Any, params: Tree, data: Tree) -> Run:
    step = make(opt)
    held = [jax.tree.map(jnp.copy, params), opt.init(params)]

    def run() -> None:
        held[:] = jax.block_until_ready(step(held[0], held[1], data))[:2]

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

    columns = ["noise", "skip_nonfinite", "skip_spikes", "dynamic_loss_scale", "measure"]
    rows: list[list[Any]] = []
    raw: Seconds = {}
    for title, runs in cases():
        seconds = interleaved(runs, rounds)
        rows.append([title, *(ratio(seconds[c], seconds["plain"]) if c in seconds else None for c in columns)])
        raw |= {f"{title}, {name}": x for name, x in seconds.items()}
    yield Table("safety", "Time with / without", ["", *columns], rows, raw)


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
