"""`adamjax train` of an objective: one call of it, with what it reports kept in a folder."""

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import adamjax
from adamjax._core import checks, signals
from adamjax._core.optional import require
from adamjax.cli import _flags, _train_setup
from adamjax.cli._diagnosis import Diagnosis
from adamjax.cli._flags import CommandError, Options
from adamjax.run_folder import Record, RunFolder, claim

_REPORTS = "it reports by trial.report(step, value)"
# Flags that only a problem can follow, and why.
_FOR_PROBLEMS = {
    "resume": "it starts from the beginning, unless it loads a checkpoint of its own",
    "checkpoint_every": "it saves its own checkpoints, if any",
    "distributed": "it chooses its own devices",
    "dtype": "it makes its own parameters",
    "report_every": _REPORTS,
    "evaluate_every": _REPORTS,
    "diagnose": "only it sees the updates, which adamjax.diagnostics measures",
}
_DEFAULTS: Options = {"schedule": "constant"}

Metrics = dict[str, float]
Log = Callable[[int, Metrics], None]


class Trial:
    """The second argument of the objective: like a `tuning.Trial`, but one that is never pruned."""

    number = 0

    def __init__(
        self, options: Options, optimizer: adamjax.Transformation, log: Callable[[int, Metrics], None]
    ) -> None:
        given = {name: options[name] for name in _flags.HYPERPARAMETERS if name in options}
        self.seed: int = options["seed"]
        self.arguments: dict[str, Any] = {"learning_rate": options["learning_rate"]} | given
        self.budget: int | None = options.get("steps")
        self.optimizer = optimizer
        self._log = log

    def report(self, step: int, value: Any) -> None:
        """Record the value, a number or a dict of numbers, after so many steps or epochs."""
        self._log(checks.count("step", step, 0), _metrics(value, "trial.report got"))


def run(objective: Callable[..., Any], options: Options) -> int:
    """Call the objective once; return the exit code."""
    with _flags.errors_for_users(options["problem"]):
        for name, reason in _FOR_PROBLEMS.items():
            if name in options:
                raise CommandError(
                    f"{_flags.flag(name)} is for problems; {options['problem']} is an objective: {reason}"
                )
        options = _DEFAULTS | options
        optimizer = _train_setup.make_optimizer(_train_setup.make_schedule(options), options)
        require("matplotlib", "demo", "drawing curves.png")
        folder = RunFolder(options["out"] if "out" in options else claim(Path("runs"), "train"))
        folder.begin()
        diagnosis = Diagnosis(folder.path, options)
        _train_setup.write_config(folder, options, optimizer)

    def log(step: int, metrics: Metrics) -> None:
        record = _record(step, metrics)
        with _flags.errors_for_users():
            folder.log(record)
            diagnosis.add(step, record, None)
        print(f"step {step}: {_listed(metrics)}", flush=True)

    stopped = f"adamjax: stopped; what was reported is in {folder.path}"
    try:
        with signals.interrupted_in_time(lambda: stopped):
            value = objective(optimizer, Trial(options, optimizer, log))
        with _flags.errors_for_users():
            metrics = _metrics(value, f"{options['problem']} returned")
            reported: int = folder.records[-1]["step"] if folder.records else options.get("steps", 0)
            record = _record(reported, metrics)
            if record not in folder.records[-1:]:
                folder.log(record)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return signals.STOPPED
    finally:
        with _flags.without("curves.png"):
            folder.plot(_train_setup.title(options, optimizer))
        diagnosis.finish()
        folder.close()
    print(f"the objective returned {_listed(metrics)}")
    print(f"wrote config.json, metrics.jsonl and curves.png to {folder.path}")
    if all(map(math.isfinite, metrics.values())):
        return 0
    bad = [name for name, x in metrics.items() if not math.isfinite(x)]
    if math.isfinite(metrics.get("loss", math.nan)):
        advice = f"{', '.join(bad)} is not finite, though the loss is: look at how it is computed"
        print(f"adamjax: {advice}.", file=sys.stderr)
        return 1
    lower = f"a --learning-rate below {options['learning_rate']:g} (a tenth, say)"
    print(f"adamjax: the objective returned a number that is not finite. Try {lower}.", file=sys.stderr)
    return 1


def _metrics(value: Any, where: str) -> Metrics:
    """Return metrics by name; a number is the loss."""
    metrics = value if isinstance(value, Mapping) else {"loss": value}
    try:
        return {str(name): float(x) for name, x in metrics.items()}
    except (TypeError, ValueError) as error:
        raise TypeError(f"{where} {value!r}, expected a number or a dict of numbers") from error


def _record(step: int, metrics: Metrics) -> Record:
    return {"step": step} | {f"val_{name}": x for name, x in metrics.items()}


def _listed(metrics: Metrics) -> str:
    return ", ".join(f"{name} {x:.4g}" for name, x in metrics.items())
