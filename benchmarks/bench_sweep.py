"""Time of a sweep, compilation included, against alternatives:  python -m benchmarks.bench_sweep [--quick]

64 settings of AdamW train the digits classifier for 300 steps each, on as many CPU devices as there are cores. The
alternatives are: our own sweep on one device, one setting after another; torch with its fused AdamW and its best number
of threads, one setting after another; and optax, rebuilt and compiled again for each setting, as a change of a
hyperparameter requires. For torch and optax, an eighth of the settings is timed.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from adamjax.problems import digits
from adamjax.training import keys_of
from adamjax.tuning import Log, Space, sweep
from benchmarks._measure import cores, interleaved, ratio
from benchmarks._report import Bars, Table, command, show

SPACE = Space(learning_rate=Log(1e-4, 1e-1), one_minus_b1=Log(0.01, 0.3), weight_decay=Log(1e-5, 1e-1))
PROBLEM = digits()

Settings = list[dict[str, float]]
Sweep = Callable[[], tuple[str, float]]  # returns how it ran, and the lowest validation loss


def ours(settings: Settings, steps: int, execution: str) -> Sweep:
    def run() -> tuple[str, float]:
        found = sweep(PROBLEM, settings, steps=steps, execution=execution)
        return found.execution, float(np.nanmin(found.last))

    return run


def with_optax(settings: Settings, steps: int) -> Sweep:
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

    return lambda: ("compiled again for each", min(float(train(optax.adamw(**setting))) for setting in settings))


def with_torch(settings: Settings, steps: int, threads: int) -> Sweep:
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

    def run() -> tuple[str, float]:
        torch.set_num_threads(threads)
        return "one after another", min(train(setting) for setting in settings)

    return run


def tables(quick: bool) -> Iterator[Table]:
    jax.config.update("jax_num_cpu_devices", cores())
    settings, steps = SPACE.points(8 if quick else 64), 10 if quick else 300
    few = settings[::8]
    sweeps = {
        "adamjax, auto": ours(settings, steps, "auto"),
        "adamjax, one device": ours(settings, steps, "map"),
        "optax": with_optax(few, steps),
    }
    if importlib.util.find_spec("torch"):
        threads = sorted({1, 2, 4, cores()} & set(range(1, cores() + 1)))
        sweeps |= {f"torch, {n} thread{'s' * (n > 1)}": with_torch(few, steps, n) for n in threads}
    results: dict[str, tuple[str, float]] = {}

    def run(name: str) -> None:
        results[name] = sweeps[name]()

    seconds = interleaved({name: partial(run, name) for name in sweeps}, 0 if quick else 3)
    seconds |= {name: x * len(settings) / len(few) for name, x in seconds.items() if not name.startswith("adamjax")}
    first = "adamjax, auto"
    yield Table(
        "sweep",
        f"{len(settings)} settings x {steps} steps on {cores()} devices",
        ["", f"time / {first}", "run", "lowest validation loss"],
        [[name, ratio(x, seconds[first]), results[name][0], f"{results[name][1]:.4f}"] for name, x in seconds.items()],
        seconds,
        Bars(f"time / {first}"),
    )


if __name__ == "__main__":
    show(tables(command(__doc__).parse_args().quick))
