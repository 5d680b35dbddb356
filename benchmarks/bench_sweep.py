"""Time of a sweep, compilation included, against the alternatives:  python -m benchmarks.bench_sweep [--quick]

64 settings of AdamW, 300 steps each, on the digits classifier; on as many CPU devices as there are
cores. Alternatives: our own sweep on one device, setting after setting; torch with its fused AdamW
and its best number of threads, one setting after another; optax, rebuilt and compiled again for each
setting, as changing a hyperparameter does. Of torch and optax an eighth of the settings is timed.
"""

import argparse
import contextlib
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from adamjax.problems import digits
from adamjax.training import keys_of
from adamjax.tuning import Log, Space, sweep
from benchmarks._measure import interleaved

SPACE = Space(learning_rate=Log(1e-4, 1e-1), one_minus_b1=Log(0.01, 0.3), weight_decay=Log(1e-5, 1e-1))
PROBLEM = digits()


def ours(settings: list[dict[str, float]], steps: int, execution: str) -> Callable[[], None]:
    def run() -> None:
        best[execution] = float(np.nanmin(sweep(PROBLEM, settings, steps=steps, execution=execution).last))

    return run


best: dict[str, float] = {}


def with_optax(settings: list[dict[str, float]], steps: int) -> Callable[[], None]:
    keys = keys_of(0)

    def train(opt: Any) -> Any:
        @jax.jit
        def run(params: Any) -> Any:
            def body(step: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
                params, state = carry
                grads = jax.grad(PROBLEM.loss)(params, PROBLEM.batch(step, keys.data), keys.loss)
                updates, state = opt.update(grads, state, params)
                return optax.apply_updates(params, updates), state

            params, _ = jax.lax.fori_loop(0, steps, body, (params, opt.init(params)))
            return PROBLEM.evaluate(params)["loss"]

        return run(PROBLEM.init(keys.init))

    def run() -> None:
        best["optax"] = min(float(train(optax.adamw(**setting))) for setting in settings)

    return run


def with_torch(settings: list[dict[str, float]], steps: int, threads: int) -> Callable[[], None]:
    import torch

    (images, labels), validation = PROBLEM._train, PROBLEM._validation
    x, y = torch.tensor(images), torch.tensor(labels, dtype=torch.long)
    loss = torch.nn.functional.cross_entropy

    def train(setting: dict[str, float]) -> float:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
        opt = torch.optim.AdamW(
            model.parameters(),
            setting["learning_rate"],
            betas=(setting["b1"], 0.999),
            weight_decay=setting["weight_decay"],
            fused=True,
        )
        for _ in range(steps):
            chosen = torch.randint(0, len(y), (PROBLEM.batch_size,))
            opt.zero_grad()
            loss(model(x[chosen]), y[chosen]).backward()
            opt.step()
        with torch.no_grad():
            images, labels = validation
            return loss(model(torch.tensor(images)), torch.tensor(labels, dtype=torch.long)).item()

    def run() -> None:
        torch.set_num_threads(threads)
        best["torch"] = min(train(setting) for setting in settings)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that it runs")
    quick = parser.parse_args().quick
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", cores)
    settings, steps = SPACE.points(8 if quick else 64), 10 if quick else 300
    few = settings[::8]
    candidates = {
        "adamjax, auto": ours(settings, steps, "auto"),
        "adamjax, one device, one after another": ours(settings, steps, "map"),
        "optax": with_optax(few, steps),
    }
    with contextlib.suppress(ImportError):
        for threads in range(1, cores + 1):
            candidates[f"torch, {threads} threads"] = with_torch(few, steps, threads)
    seconds = interleaved(candidates, 1 if quick else 5)
    seconds |= {name: x * len(settings) / len(few) for name, x in seconds.items() if not name.startswith("adamjax")}
    reference = seconds["adamjax, auto"]
    print(f"{len(settings)} settings x {steps} steps on {cores} devices; seconds, and as multiples of the first")
    print(f"(which is {sweep(PROBLEM, settings, steps=steps).execution}):")
    for name, x in seconds.items():
        print(f"  {name:40} {x:7.2f} {x / reference:7.2f}")
    print("lowest validation loss: " + ", ".join(f"{name} {x:.4f}" for name, x in best.items()))


if __name__ == "__main__":
    main()
