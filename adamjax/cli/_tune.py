"""`adamjax lr-range`, `adamjax tune` and `adamjax report`."""

import argparse
import inspect
import json
import sys
from functools import partial
from pathlib import Path

import adamjax
from adamjax import schedules, tuning
from adamjax._core.typing import GradientTransformation, ScalarOrSchedule
from adamjax.cli import _flags
from adamjax.cli._flags import Options, Subparsers
from adamjax.run_folder import next_free
from adamjax.tuning._space import OptimizerFactory
from adamjax.tuning._spec import optimizer_name


def add_parsers(commands: Subparsers) -> None:
    _add_lr_range(commands)
    _add_tune(commands)
    report = commands.add_parser(
        "report",
        help="write the report of a tuning again",
        description="Write the plots and the page of a tuning, even of one that was stopped, and print its table.",
    )
    report.add_argument("directory", type=Path, help="folder that adamjax tune wrote")
    _add_format(report)


def _add_lr_range(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "lr-range",
        help="find the range of usable learning rates",
        description="Train with learning rates from far too small to far too large, and record the training loss.",
        argument_default=argparse.SUPPRESS,
    )
    _add_problem(parser)
    add = parser.add_argument
    add("--min-lr", type=float, default=1e-6, help="smallest learning rate (default: 1e-6)")
    add("--max-lr", type=float, default=1.0, help="largest learning rate (default: 1)")
    add("--steps", type=int, default=200, help="updates of each run (default: 200)")
    add("--mode", choices=("ramp", "constant"), default="ramp", help="one run, or one for each rate (default: ramp)")
    add("--seed", type=int, default=0, help="seed of parameters, data order and loss (default: 0)")
    add("--plot", type=Path, help="file to draw the curve to: .png, .pdf or .svg")
    _add_format(parser)
    _flags.add_optimizer(parser, _flags.OPTIMIZER_HELP)


def _add_tune(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "tune",
        help="find good hyperparameters",
        description="Search hyperparameters by validation performance, stage after stage, then run the best few and "
        "the defaults again with fresh seeds.",
        argument_default=argparse.SUPPRESS,
    )
    _add_problem(parser)
    add = parser.add_argument
    add("--trials", type=int, default=64, help="settings to try (default: 64)")
    add("--steps", type=int, default=300, help="updates of each run (default: 300)")
    add("--metric", default="loss", help="metric of the problem to judge by (default: loss)")
    add("--mode", choices=("min", "max"), help="better value of the metric (default for the loss: min)")
    add("--stages", nargs="+", metavar="NAMES", help="arguments to vary in each stage, as in: learning_rate b1,b2")
    confirm = "how many of the best to run again, and with how many fresh seeds (default: 5 3)"
    add("--confirm", type=int, nargs=2, default=(5, 3), metavar=("BEST", "SEEDS"), help=confirm)
    add("--sampler", default="halton", help="halton, sobol, random, optuna or optuna:SAMPLER (default: halton)")
    add("--storage", help="optuna: URL of a storage that several machines can share")
    add("--seed", type=int, default=0, help="seed of the search; the seeds after it confirm (default: 0)")
    add("--out", type=Path, help="folder to write (default: the next free runs/tune-N)")
    add("--resume", action="store_true", default=False, help="go on with the tuning in --out")
    _add_format(parser)
    optimizer = _flags.add_optimizer(parser, "Hyperparameters that are given are kept; the others are searched.")
    add = optimizer.add_argument
    add("--schedule", choices=_flags.SCHEDULES, help="schedule of the learning rate, whose peak is searched")
    _flags.add_flags(optimizer, _flags.SCHEDULE_OPTIONS)


def _add_problem(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("problem", nargs="?", default="digits", help=_flags.PROBLEM_HELP)
    _flags.add_flags(parser, _flags.PROBLEM_OPTIONS)


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("table", "json"), default="table", help="output format (default: table)")


def lr_range(options: Options) -> int:
    with _flags.errors_for_users(options["problem"]):
        result = tuning.lr_range_test(
            _flags.make_problem(options),
            num_steps=options["steps"],
            optimizer=_optimizer_factory(options),
            **{name: options[name] for name in ("min_lr", "max_lr", "mode", "seed")},
        )
        if "plot" in options:
            result.plot(options["plot"])
    suggestions = result.suggestions
    if options["format"] == "json":
        band = result.band if suggestions else None
        print(json.dumps({"suggestions": suggestions, "band": band, "warnings": result.warnings}))
    else:
        for method, rate in suggestions.items():
            print(f"{method:12} {rate:.3g}")
        if suggestions:
            print(f"{'usable':12} {result.band[0]:.3g} to {result.band[1]:.3g}")
        for warning in result.warnings:
            print(f"adamjax: {warning}", file=sys.stderr)
    return 0 if suggestions else 1


def tune(options: Options) -> int:
    if options["resume"] and "out" not in options:
        raise _flags.CommandError("--resume needs --out, the folder to go on with")
    out = options["out"] if "out" in options else next_free(Path("runs"), "tune")
    try:
        with _flags.errors_for_users(options["problem"]):
            report = tuning.tune(
                _flags.make_problem(options),
                optimizer=_optimizer_factory(options),
                stages=[names.split(",") for names in options["stages"]] if "stages" in options else "adam",
                storage=options.get("storage"),
                mode=options.get("mode"),
                out=out,
                progress=True,
                **{k: options[k] for k in ("trials", "steps", "sampler", "confirm", "resume", "metric", "seed")},
            )
    except KeyboardInterrupt:
        print(f"adamjax: stopped; the same command with --out {out} --resume goes on", file=sys.stderr)
        return 130
    return _show(report, out, options["format"])


def report(options: Options) -> int:
    with _flags.errors_for_users():
        loaded = tuning.Report.load(options["directory"])
        loaded.save(options["directory"])
    return _show(loaded, options["directory"], options["format"])


def _show(report: tuning.Report, out: Path, output_format: str) -> int:
    if output_format == "json":
        print(report.to_json())
    else:
        print(report.table())
        if report.ranking:
            print(f"\n{report.best}\n")
        for warning in report.warnings:
            print(f"adamjax: {warning}", file=sys.stderr)
        print(f"wrote report.html, its pictures and trials.jsonl to {out}")
    return 0 if report.ranking else 1


def _optimizer_factory(options: Options) -> OptimizerFactory:
    """Return the chosen optimizer, with the schedule and the hyperparameters that are given."""
    make = getattr(adamjax, options["optimizer"])
    given = _flags.hyperparameters(make, options)
    if "schedule" in options:
        make = Scheduled(make, options["schedule"], _flags.schedule_options(options))
    else:
        _flags.accepted(make, options, _flags.SCHEDULE_OPTIONS, f"{options['optimizer']} without --schedule")
    return partial(make, **given) if given else make


class Scheduled:
    """An optimizer whose learning rate is the peak of a schedule; its `repr` is an expression."""

    def __init__(self, make: OptimizerFactory, schedule: str, options: Options) -> None:
        self._make, self._schedule, self._options = make, schedule, options
        self.__signature__ = inspect.signature(make)

    def __call__(self, learning_rate: ScalarOrSchedule, **others: object) -> GradientTransformation:
        if not callable(learning_rate):  # a range test brings its own schedule
            learning_rate = getattr(schedules, self._schedule)(learning_rate, **self._options)
        return self._make(learning_rate, **others)

    def __repr__(self) -> str:
        given = "".join(f", {name}={x!r}" for name, x in self._options.items())
        make, rate = optimizer_name(self._make), f"adamjax.schedules.{self._schedule}(learning_rate{given})"
        return f"(lambda learning_rate, **others: {make}({rate}, **others))"
