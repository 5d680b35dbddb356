"""`adamjax lr-range`, `adamjax tune` and `adamjax report`."""

import argparse
import inspect
import json
import sys
import textwrap
from functools import partial
from itertools import chain
from pathlib import Path

import adamjax
from adamjax import schedules, tuning
from adamjax._core import files, signals
from adamjax._core.optional import require
from adamjax._core.text import printable
from adamjax._core.typing import GradientTransformation, ScalarOrSchedule
from adamjax.cli import _arguments, _flags, _subject, _transfer
from adamjax.cli._flags import STOPPED, CommandError, Options, Subparsers
from adamjax.cli._subject import Subject
from adamjax.run_folder import claim
from adamjax.tuning import Space
from adamjax.tuning._ranges import WHEN_ASKED, default_ranges
from adamjax.tuning._space import OptimizerFactory, Range
from adamjax.tuning._spec import has_half_precision, optimizer_name
from adamjax.tuning._strategy import Stages, stage_groups


def add_parsers(commands: Subparsers) -> None:
    _add_lr_range(commands)
    _add_tune(commands)
    report = commands.add_parser(
        "report",
        help="write the report of a tuning again",
        description="Write the plots and the page of a tuning, even of one that was stopped, and print its table.",
    )
    report.add_argument("directory", type=Path, metavar="FOLDER", help="folder that adamjax tune wrote")
    _add_format(report)


def _add_lr_range(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "lr-range",
        help="find the range of usable learning rates",
        description="Train with learning rates from far too small to far too large, record the training loss, and "
        f"suggest learning rates. {_subject.KINDS} An objective is called with each of a few constant learning rates, "
        "until its first report.",
        argument_default=argparse.SUPPRESS,
    )
    _subject.add_argument(parser)
    add = parser.add_argument_group("the range test").add_argument
    add("--min-lr", type=float, help="smallest learning rate (default: 1e-6, or 1e-9 if that is too large)")
    add("--max-lr", type=float, help="largest learning rate (default: 1, or up to 1e3 until the loss blows up)")
    add("--steps", type=int, help="updates of each run of a problem, at least 10 (default: 200)")
    modes = "ramp: one run whose learning rate grows; constant: a run for each (default: ramp; an objective: constant)"
    add("--mode", choices=("ramp", "constant"), help=modes)
    add("--rates", type=int, help="constant: number of learning rates, at least 10 (default: 32; an objective: 12)")
    add("--seed", type=int, help="seed of parameters, data order and dropout (default: 0)")
    output = parser.add_argument_group("the output")
    output.add_argument(
        "--plot", type=Path, metavar="FILE", help="file to draw the curve to: .png, .pdf or .svg (default: none)"
    )
    _add_format(output)
    _arguments.add_fix(_flags.add_optimizer(parser, _flags.OPTIMIZER_HELP))


def _add_tune(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "tune",
        help="find good hyperparameters",
        description=textwrap.fill(
            "Search hyperparameters by validation performance: try the settings of a learned list, then those that a "
            f"model of the results proposes, then the best few and the defaults with fresh seeds. {_subject.KINDS}",
            78,
        ),
        epilog="example:\n  adamjax tune mine:objective --trials 32 --range learning_rate=1e-4..1e-1 --fix b1=0.9",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    _subject.add_argument(parser)
    add = parser.add_argument_group("the search").add_argument
    add("--trials", type=int, help="settings to try (default: 64)")
    budget = "default: 300; an objective finds them in trial.budget, by default None"
    add("--steps", type=int, help=f"updates of each run ({budget})")
    add("--metric", help="metric to judge by (default: loss)")
    add("--mode", choices=("min", "max"), help="better value of the metric (default for the loss: min)")
    stages = "arguments to vary in each stage, as in: learning_rate b1,b2 (default: the sampler decides)"
    add("--stages", nargs="+", metavar="NAMES", help=stages)
    confirm = "how many of the best to run again, and with how many fresh seeds (default: (8, 2) (5, 4) (3, 8), a race)"
    add("--confirm", type=int, nargs=2, metavar=("BEST", "SEEDS"), help=confirm)
    add("--sampler", help="auto, halton, sobol, random, optuna or optuna:SAMPLER (default: auto)")
    add("--storage", metavar="URL", help="optuna: storage that several machines can share (default: memory)")
    add("--seed", type=int, help="seed of the search; the seeds after it confirm (default: 0)")
    output = parser.add_argument_group("the output")
    output.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder to write (default: the next free runs/tune-N)"
    )
    output.add_argument("--resume", action="store_true", default=False, help="continue the tuning in --out")
    _transfer.add_flag(output)
    _add_format(output)
    optimizer = _flags.add_optimizer(parser, "Arguments that are given keep their values; the others are searched.")
    _arguments.add_fix(optimizer)
    _arguments.add_range(optimizer)
    rate = parser.add_argument_group("the learning rate")
    add = rate.add_argument
    add("--learning-rate", "--lr", type=float, help="learning rate, at its peak (default: searched)")
    schedule = "course of the learning rate, whose peak is searched (default: warmup and cosine, searched as well)"
    add("--schedule", choices=_flags.SCHEDULES, help=schedule)
    _flags.add_flags(rate, _flags.SCHEDULE_OPTIONS)


def _add_format(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--format", choices=("table", "json"), default="table", help="output format (default: table)")


def lr_range(options: Options) -> int:
    if "learning_rate" in options:
        raise CommandError("--fix learning_rate means nothing to lr-range, which varies it: leave it out")
    with signals.interrupted_in_time(lambda: STOPPED), _flags.errors_for_users(options["problem"]):
        subject, make = _subject.load(options), getattr(adamjax, options["optimizer"])
        if _subject.is_objective(subject) and "steps" in options:
            raise CommandError(
                f"--steps is for problems; {options['problem']} is an objective: it ends when it reports"
            )
        if "plot" in options:
            require("matplotlib", "tune", "plotting a range test")
        named = {"steps": "num_steps", "rates": "num_rates"} | {k: k for k in ("min_lr", "max_lr", "mode", "seed")}
        result = tuning.lr_range_test(
            subject,
            optimizer=_with_arguments(make, _flags.hyperparameters(make, options)),
            **{argument: options[name] for name, argument in named.items() if name in options},
        )
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
            print(printable(f"adamjax: {warning}"), file=sys.stderr)
    if "plot" in options:  # last, since it may not be possible to write it
        with _flags.errors_for_users():
            result.plot(options["plot"])
    return 0 if suggestions else 1


def tune(options: Options) -> int:
    if options["resume"] and "out" not in options:
        raise CommandError("--resume needs --out, the folder to go on with")
    if "transfer_to" in options:
        _transfer.check(options)
    folders = list[Path]()

    def folder() -> Path:
        folders.append(options["out"] if "out" in options else claim(Path("runs"), "tune"))
        return folders[0]

    def stopped() -> str:
        goes_on = "".join(f"; the same command with --out {path} --resume goes on" for path in folders)
        return printable(f"adamjax: stopped{goes_on}")

    try:
        with signals.interrupted_in_time(stopped):
            with _flags.errors_for_users(options["problem"]):
                subject = _subject.load(options)
                if not _subject.is_objective(subject):
                    options = {"steps": 300} | options
                stages = [names.split(",") for names in options["stages"]] if "stages" in options else "adam"
                optimizer = _tuned_optimizer(options)
                names = ("trials", "steps", "sampler", "storage", "confirm", "resume", "metric", "mode", "seed")
                given: Options = {name: options[name] for name in names if name in options}
                if "schedule" in options:  # which is part of the optimizer
                    given["schedule"] = "constant"
                report = tuning.tune(
                    subject,
                    optimizer=optimizer,
                    space=_space(subject, optimizer, stages, options),
                    stages=stages,
                    out=folder,
                    progress=True,
                    **given,
                )
            asked = report.ranking and "transfer_to" in options
            found = _transfer.transferred(report.best, options) if asked else None
            _show(report, found, options)
            if found is not None:
                with _flags.errors_for_users():  # after the results are shown, since writing may fail
                    files.replace(folders[0] / "transfer.json", json.dumps(found, indent=1) + "\n")
            _say_written(folders[0], found, options)
            return 0 if report.ranking else 1
    except KeyboardInterrupt:
        raise KeyboardInterrupt(stopped()) from None


def report(options: Options) -> int:
    with _flags.errors_for_users():
        loaded = tuning.Report.load(options["directory"])
    _show(loaded, None, options)
    with _flags.errors_for_users():  # after the results are shown, since writing may fail
        loaded.save(options["directory"])
    _say_written(options["directory"], None, options)
    return 0 if loaded.ranking else 1


def _show(report: tuning.Report, transferred: Options | None, options: Options) -> None:
    if options["format"] == "json":
        shown = report.to_json()
        print(shown if transferred is None else json.dumps(json.loads(shown) | {"transfer": transferred}))
        return
    print(printable(report.table()))
    if report.ranking:
        print(printable(f"\n{report.best}\n{report.horizon}\n"))
    if transferred is not None:
        print(printable(f"{_transfer.table(transferred)}\n"))
    for warning in report.warnings:
        print(printable(f"adamjax: {warning}"), file=sys.stderr)


def _say_written(out: Path, transferred: Options | None, options: Options) -> None:
    if options["format"] != "json":
        also = ", transfer.json" if transferred is not None else ""
        print(printable(f"wrote report.html, its pictures{also} and trials.jsonl to {out}"))


def _tuned_optimizer(options: Options) -> OptimizerFactory:
    """Return the chosen optimizer, with the schedule and the arguments that are given."""
    make = getattr(adamjax, options["optimizer"])
    given = _flags.hyperparameters(make, options)
    if "learning_rate" in options:
        given["learning_rate"] = options["learning_rate"]
    if warmup := _flags.own_warmup(options):
        given["warmup_steps"] = warmup
    if "schedule" in options:
        make = Scheduled(make, options["schedule"], _flags.schedule_options(options))
    else:
        _flags.accepted(make, options, _flags.SCHEDULE_OPTIONS, f"{options['optimizer']} without --schedule")
    return _with_arguments(make, given)


def _with_arguments(make: OptimizerFactory, given: Options) -> OptimizerFactory:
    return partial(make, **given) if given else make


def _space(subject: Subject, optimizer: OptimizerFactory, stages: Stages, options: Options) -> Space | None:
    """Return the ranges that are given, and the default ranges of the other arguments; None if none is given."""
    given = dict[str, Range]()
    for name, r in options.get("range", ()):
        if name in given:
            raise CommandError(f"--range gives two ranges of {name}: leave one out")
        if name in options:
            raise CommandError(f"--range gives a range of {name}, which is also kept at {options[name]}: leave one out")
        if name not in inspect.signature(optimizer).parameters:
            raise CommandError(f"--range of {name} means nothing to {options['optimizer']}: leave it out")
        given[name] = r
    if not given:
        return None
    default = {n: r for n, r in default_ranges(optimizer).items() if n not in options}
    # As without ranges, eps is searched where it matters, and AMSGrad where it costs no other compilation.
    asked, objective = set(chain(*stage_groups(stages))), _subject.is_objective(subject)
    rules = {"eps": not objective and has_half_precision(subject), "amsgrad": not objective}
    for name, searched in (rules | dict.fromkeys(WHEN_ASKED, False)).items():
        if not searched and name not in asked:
            default.pop(name, None)
    return Space.of(default | given)


class Scheduled:
    """An optimizer whose learning rate is the peak of a schedule; its `repr` is an expression."""

    def __init__(self, make: OptimizerFactory, schedule: str, options: Options) -> None:
        self._make, self._schedule, self._options = make, schedule, options
        self.__signature__ = inspect.signature(make)
        self.__wrapped__ = make

    def __call__(self, learning_rate: ScalarOrSchedule, **others: object) -> GradientTransformation:
        if not callable(learning_rate):  # a range test brings its own schedule
            learning_rate = getattr(schedules, self._schedule)(learning_rate, **self._options)
        return self._make(learning_rate, **others)

    def __repr__(self) -> str:
        given = "".join(f", {name}={x!r}" for name, x in self._options.items())
        make, rate = optimizer_name(self._make), f"adamjax.schedules.{self._schedule}(learning_rate{given})"
        return f"(lambda learning_rate, **others: {make}({rate}, **others))"
