"""`adamjax lr-range`, `adamjax tune` and `adamjax report`."""

import argparse
import inspect
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import adamjax
from adamjax import schedules, tuning
from adamjax.cli import _flags
from adamjax.run_folder import next_free
from adamjax.tuning._question import name_of


def add_parsers(commands: Any) -> None:
    """Tell the command line of these commands."""
    _add_lr_range(commands)
    _add_tune(commands)
    report = commands.add_parser(
        "report",
        help="draw the report of a tuning again",
        description="Write the pictures and the page of a tuning, of one that was stopped as well, and show its table.",
    )
    report.add_argument("directory", type=Path, help="folder that adamjax tune wrote")
    _add_format(report)


def _add_lr_range(commands: Any) -> None:
    parser = commands.add_parser(
        "lr-range",
        help="find the range of usable learning rates",
        description="Train with learning rates from far too small to far too large, and watch the training loss.",
        argument_default=argparse.SUPPRESS,
    )
    _add_problem(parser)
    parser.add_argument("--min-lr", type=float, default=1e-6, help="the smallest (default: 1e-6)")
    parser.add_argument("--max-lr", type=float, default=1.0, help="the largest (default: 1)")
    parser.add_argument("--steps", type=int, default=200, help="updates of each run (default: 200)")
    parser.add_argument(
        "--mode", choices=("ramp", "constant"), default="ramp", help="one run, or one for each rate (default: ramp)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of parameters, data order and loss (default: 0)")
    parser.add_argument("--plot", type=Path, help="where to draw the curve, a .png, .pdf or .svg")
    _add_format(parser)
    _add_optimizer(parser, _flags.OPTIMIZER_HELP)


def _add_tune(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="find good hyperparameters",
        description="Try hyperparameters by validation performance, stage after stage, and the best again with "
        "fresh seeds, beside the defaults.",
        argument_default=argparse.SUPPRESS,
    )
    _add_problem(parser)
    parser.add_argument("--trials", type=int, default=64, help="settings to try (default: 64)")
    parser.add_argument("--steps", type=int, default=300, help="updates of each run (default: 300)")
    parser.add_argument("--metric", default="loss", help="which of the problem's metrics counts (default: loss)")
    parser.add_argument("--mode", choices=("min", "max"), help="which is better (default, of the loss: min)")
    parser.add_argument("--stages", nargs="+", metavar="NAMES", help="what to vary in each, as in: learning_rate b1,b2")
    parser.add_argument(
        "--confirm", type=int, nargs=2, default=(5, 3), metavar=("BEST", "SEEDS"), help="(default: 5 3)"
    )
    parser.add_argument(
        "--sampler", default="halton", help="halton, sobol, random, optuna or optuna:SAMPLER (default: halton)"
    )
    parser.add_argument("--storage", help="optuna: URL of its storage, for several machines to share")
    parser.add_argument("--seed", type=int, default=0, help="of the search; the seeds after it confirm (default: 0)")
    parser.add_argument("--out", type=Path, help="folder to write (default: the next free runs/tune-N)")
    parser.add_argument("--resume", action="store_true", default=False, help="go on with the tuning in --out")
    _add_format(parser)
    optimizer = _add_optimizer(parser, "Hyperparameters that are given are kept; the others are searched.")
    optimizer.add_argument(
        "--schedule", choices=_flags.SCHEDULES, help="course of the learning rate, of which the peak is searched"
    )
    _flags.add_flags(optimizer, _flags.SCHEDULE_OPTIONS)


def _add_problem(parser: Any) -> None:
    parser.add_argument("problem", nargs="?", default="digits", help=_flags.PROBLEM_HELP)
    _flags.add_flags(parser, _flags.PROBLEM_OPTIONS)


def _add_format(parser: Any) -> None:
    parser.add_argument("--format", choices=("table", "json"), default="table", help="of the output (default: table)")


def _add_optimizer(parser: Any, description: str) -> Any:
    group = parser.add_argument_group("the optimizer", description)
    group.add_argument("--optimizer", choices=_flags.OPTIMIZERS, default="adamw", help="which (default: adamw)")
    _flags.add_flags(group, _flags.HYPERPARAMETERS)
    return group


def lr_range(options: dict[str, Any]) -> int:
    """Suggest learning rates."""
    with _flags.refusals(options["problem"]):
        found = tuning.lr_range_test(
            _flags.problem(options),
            min_lr=options["min_lr"],
            max_lr=options["max_lr"],
            num_steps=options["steps"],
            mode=options["mode"],
            optimizer=_optimizer(options),
            seed=options["seed"],
        )
        if "plot" in options:
            found.plot(options["plot"])
    suggestions = found.suggestions
    if options["format"] == "json":
        band = found.band if suggestions else None
        print(json.dumps({"suggestions": suggestions, "band": band, "warnings": found.warnings}))
    else:
        for method, rate in suggestions.items():
            print(f"{method:12} {rate:.3g}")
        if suggestions:
            print(f"{'usable':12} {found.band[0]:.3g} to {found.band[1]:.3g}")
        for warning in found.warnings:
            print(f"adamjax: {warning}", file=sys.stderr)
    return 0 if suggestions else 1


def tune(options: dict[str, Any]) -> int:
    """Find good hyperparameters, and leave a folder."""
    if options["resume"] and "out" not in options:
        raise _flags.CommandError("--resume needs --out, the folder to go on with")
    out = options["out"] if "out" in options else next_free(Path("runs"), "tune")
    try:
        with _flags.refusals(options["problem"]):
            report = tuning.tune(
                _flags.problem(options),
                trials=options["trials"],
                steps=options["steps"],
                optimizer=_optimizer(options),
                stages=[names.split(",") for names in options["stages"]] if "stages" in options else "adam",
                sampler=options["sampler"],
                storage=options.get("storage"),
                confirm=options["confirm"],
                out=out,
                resume=options["resume"],
                metric=options["metric"],
                mode=options.get("mode"),
                seed=options["seed"],
                progress=True,
            )
    except KeyboardInterrupt:
        print(f"adamjax: stopped; the same command with --out {out} --resume goes on", file=sys.stderr)
        return 130
    return _show(report, out, options["format"])


def report(options: dict[str, Any]) -> int:
    """Write the report of a folder again."""
    with _flags.refusals():
        found = tuning.Report.load(options["directory"])
        found.save(options["directory"])
    return _show(found, options["directory"], options["format"])


def _show(report: tuning.Report, out: Path, form: str) -> int:
    if form == "json":
        print(report.to_json())
    else:
        print(report.table())
        if report.ranking:
            print(f"\n{report.best}\n")
        for warning in report.warnings:
            print(f"adamjax: {warning}", file=sys.stderr)
        print(f"wrote report.html, its pictures and trials.jsonl to {out}")
    return 0 if report.ranking else 1


def _optimizer(options: dict[str, Any]) -> Any:
    """The optimizer that is named, with the schedule and the hyperparameters that are given."""
    make = getattr(adamjax, options["optimizer"])
    given = _flags.hyperparameters(make, options)
    if "schedule" in options:
        make = Scheduled(make, options["schedule"], _flags.schedule_options(options))
    else:
        _flags.accepted(make, options, _flags.SCHEDULE_OPTIONS, f"{options['optimizer']} without --schedule")
    return partial(make, **given) if given else make


class Scheduled:
    """An optimizer whose learning rate is the peak of a schedule; it prints as an expression."""

    def __init__(self, make: Any, schedule: str, options: dict[str, Any]) -> None:
        self._make, self._schedule, self._options = make, schedule, options
        self.__signature__ = inspect.signature(make)

    def __call__(self, learning_rate: Any, **others: Any) -> Any:
        # A range test brings a schedule of its own.
        rate = learning_rate
        if not callable(rate):
            rate = getattr(schedules, self._schedule)(learning_rate, **self._options)
        return self._make(rate, **others)

    def __repr__(self) -> str:
        given = "".join(f", {name}={x!r}" for name, x in self._options.items())
        make, rate = name_of(self._make), f"adamjax.schedules.{self._schedule}(learning_rate{given})"
        return f"(lambda learning_rate, **others: {make}({rate}, **others))"
