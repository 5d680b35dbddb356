"""What it costs to skip bad steps, and to measure one:  python -m benchmarks.bench_safety [--quick]

Seconds of a jitted, donated step as multiples of those of the same step without: of the optimizer alone,
and of whole training steps of a multilayer perceptron. "noise" is the plain step against itself. What
`measure` takes comes on top of a step, when it is called. All buffers are donated and, with `step`, aliased.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import adamjax
from adamjax.diagnostics import measure
from benchmarks._measure import interleaved

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


def runner(step: Callable[..., Any], opt: Any, params: Tree, data: Tree) -> Callable[[], None]:
    jitted = jax.jit(lambda params, state, data: step(opt, params, state, data), donate_argnums=(0, 1))
    held = [jax.tree.map(jnp.copy, params), opt.init(params)]

    def run() -> None:
        held[:] = jax.block_until_ready(jitted(*held, data))

    return run


def measuring(params: Tree, grads: Tree) -> Callable[[], None]:
    updates, state = PLAIN.update(grads, PLAIN.init(params), params)
    jitted = jax.jit(lambda *trees: measure(*trees, opt=PLAIN))
    return lambda: jax.block_until_ready(jitted(grads, updates, state, params))


def report(title: str, runs: dict[str, Callable[[], None]], rounds: int) -> None:
    seconds = interleaved(runs, rounds)
    ratios = ", ".join(f"{name} {x / seconds['plain']:.3f}" for name, x in seconds.items() if name != "plain")
    print(f"{title}: {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    quick = parser.parse_args().quick
    width, rounds = (256, 5) if quick else (2048, 41)

    params = [jnp.ones((width, width))] * 4
    grads = [jnp.full((width, width), 0.1)] * 4
    for title, step in {"step": alone, "update and apply_updates": through_updates}.items():
        runs = {name: runner(step, opt, params, grads) for name, opt in VARIANTS.items()}
        if step is alone:
            runs["measure"] = measuring(params, grads)
        report(f"{title}, 4 leaves of {width} x {width}", runs, rounds)

    count = 20 if quick else 1000
    params, grads = [jnp.ones((64, 64))] * count, [jnp.full((64, 64), 0.1)] * count
    report(
        f"step, {count} leaves of 64 x 64",
        {name: runner(alone, opt, params, grads) for name, opt in VARIANTS.items()},
        rounds,
    )

    for layer, batch in ((width // 4, 64), (width // 2, 512)):
        kernels = list(jax.random.normal(jax.random.key(0), (3, layer, layer)) / layer**0.5)
        data = jnp.ones((batch, layer)), jnp.zeros((batch, layer))
        runs = {name: runner(training, opt, kernels, data) for name, opt in VARIANTS.items()}
        report(f"training, 3 layers of {layer} x {layer}, batches of {batch}", runs, rounds)


if __name__ == "__main__":
    main()
