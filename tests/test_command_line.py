"""The command line: what PROBLEM can name, values and ranges of arguments, and objectives."""

import argparse
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bowl import BOWL, Bowl

import adamjax
from adamjax import cli, tuning
from adamjax._core.progress import progress_bar
from adamjax.run_folder import read_metrics
from adamjax.training import keys_of

pytestmark = pytest.mark.numbers


@jax.jit
def bowl_step(optimizer, params, state, step, key):
    grads = jax.grad(BOWL.loss)(params, BOWL.batch(step, key), None)
    updates, state = optimizer.update(grads, state, params)
    return adamjax.apply_updates(params, updates), state


def objective(optimizer, trial):
    """A loop of one's own, of the same updates as `adamjax train` does."""
    keys = keys_of(trial.seed)
    params = BOWL.init(keys.init)
    state = optimizer.init(params)
    for step in range(trial.budget or 20):
        params, state = bowl_step(optimizer, params, state, jnp.int32(step), keys.data)
        if step % 10 == 9:
            trial.report(step + 1, BOWL.evaluate(params)["loss"])
    return BOWL.evaluate(params)["loss"]


class Averages:
    """An objective that is an instance of a class, and that returns several metrics."""

    def __init__(self, batch_size):
        self.batch_size = batch_size

    def __call__(self, optimizer, trial):
        return {"loss": 1.0, "batch_size": self.batch_size}


def make_bowl(batch_size=64, wall=10.0):
    return Bowl(wall=wall)


def make_objective():
    return objective


def make_nothing():
    return None


def make_class():
    return Bowl


def not_finite(optimizer, trial):
    trial.report(0, {"loss": np.nan, "accuracy": 0.5})
    return {"loss": np.nan, "accuracy": 0.5}


def interrupted(optimizer, trial):
    trial.report(3, 0.5)
    raise KeyboardInterrupt


def wrong(optimizer, trial):
    return "loss"


def broken(optimizer, trial):
    trial.report(3, 0.5)
    raise OSError("no such file")


def three(optimizer, trial, epochs):
    return 0.0


NUMBER = 3


ERRORS = {
    "tune --lerning-rate 3": " tune: error: there is no flag --lerning-rate; did you mean --learning-rate?",
    "train --no-fusd": " train: error: there is no flag --no-fusd; did you mean --no-fused?",
    "lr-range --zzz=1": " lr-range: error: there is no flag --zzz; see adamjax lr-range --help",
    "tune --prolem bowl:BOWL": " tune: error: there is no flag --prolem; see adamjax tune --help",
    "tune digits more": " tune: error: more is one argument too many; see adamjax tune --help",
    "tune --steps 3x": " tune: error: argument --steps: invalid int value: '3x'; see adamjax tune --help",
    "kernels buld": " kernels: error: argument action: invalid choice: 'buld' (...); did you mean build?",
    "train --amsgrad tor": " train: error: argument --amsgrad: invalid choice: 'tor' (...); did you mean torch?",
    "report": " report: error: the following arguments are required: FOLDER; see adamjax report --help",
    "tuen": ": error: argument COMMAND: invalid choice: 'tuen' (...); did you mean tune?",
    "--verison": ": error: there is no flag --verison; did you mean --version?",
    "": ": error: no command is given; see adamjax --help",
    "train --fix b1": " train: error: --fix b1: expected NAME=VALUE, as in b1=0.9",
    "train mine": " train: error: problem mine is neither one of characters, digits, digits_convnet nor MODULE:OBJECT",
    "report /nowhere": " report: error: /nowhere holds no tuning: it has no tune.json",
}


def test_errors_are_one_line_with_a_hint(capsys):
    for words, said in ERRORS.items():
        assert cli.main(words.split()) == 2, words
        found = capsys.readouterr()
        assert found.out == ""
        assert re.sub(r"\(choose from .*?\)", "(...)", found.err) == f"adamjax{said}\n"


def test_every_flag_says_what_it_does_and_its_default():
    root, commands = cli.parsers()
    assert commands.keys() == cli.COMMANDS.keys()
    for command, parser in {"": root, **commands}.items():
        assert parser.description, command
        assert "%(" not in parser.format_help(), command
        for action in parser._actions:
            where, default, said = f"{command} {action.option_strings or action.dest}", action.default, action.help
            if action.dest == "problem_flag":  # the old spelling
                assert said == argparse.SUPPRESS
                continue
            assert re.fullmatch(r"\S.*[^.\s]", said), where
            if default not in (None, False, argparse.SUPPRESS):
                shown = re.search(r"\(default: ([^;,) ]+)", said)
                assert shown is not None, where
                assert (action.type or str)(shown[1]) == default, where
            elif action.option_strings and action.nargs != 0 and "can be repeated" not in said:
                assert "default" in said, where
    # Those of the optimizers are the numbers in their signatures.
    for name, keywords in cli.HYPERPARAMETERS.items():
        signatures = [inspect.signature(getattr(adamjax, x)).parameters for x in cli.OPTIMIZERS]
        defaults = {x[name].default for x in signatures if name in x}
        shown = " ".join(re.findall(r"\(default[^)]*\)", keywords["help"]))
        numbers = {float(number) for number in re.findall(r"(?<=: )\d[\d.]*(?:e-?\d+)?", shown)}
        assert numbers == {x for x in defaults if type(x) is float}, name


def test_text_degrades_where_the_encoding_lacks_characters(monkeypatch):
    for encoding, said in (("ascii", "m\\xfc->:x+-..."), ("cp1252", "mü->:x±…"), ("utf-8", "mü→:x±…")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stderr", stream)
        assert cli.main(["train", "mü→:x±…"]) == 2
        stream.flush()
        found = stream.buffer.getvalue().decode(encoding)
        assert found.startswith(f"adamjax train: error: problem {said}: ")
        assert "\x1b" not in found


def test_a_log_has_a_line_for_each_tenth_and_a_terminal_a_bar(tmp_path, monkeypatch, capsys):
    def trained(name):
        assert cli.main(["train", "bowl:BOWL", "--steps", "40", "--out", str(tmp_path / name)]) == 0
        return capsys.readouterr().err

    def check_lines(said):
        pattern = r"adamjax: (\d+) of 40 steps after \d+ s: loss [\d.]+, learning_rate [\d.e-]+"
        assert [int(re.fullmatch(pattern, line)[1]) for line in said.splitlines()] == [10, 20, 30, 40]

    check_lines(trained("log"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    check_lines(trained("dumb"))
    monkeypatch.setenv("TERM", "xterm")
    said = trained("terminal")
    assert "\r" in said
    assert "40/40" in said
    monkeypatch.undo()
    with progress_bar(60, "trial", "tune", done=29) as progress:
        for n in (1, 5, 20):
            progress.update(n)
    lines = ["adamjax: 30 of 60 trials", "adamjax: 55 of 60 trials"]
    assert re.sub(r" after \d+ s", "", capsys.readouterr().err).splitlines() == lines
    notebook = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr(sys, "stderr", notebook)
    with progress_bar(250_000, "step", "demo") as bar:
        bar.update(250_000)
    assert "250k/250k" in notebook.getvalue()


@pytest.mark.parametrize("command", ["completion bash", "kernels status", "doctor"])
def test_output_that_cannot_be_written_ends_a_command(command, monkeypatch, capsys):
    reads, unread = os.pipe()
    os.close(reads)
    full = os.open("/dev/full", os.O_WRONLY) if os.path.exists("/dev/full") else None
    error = f"adamjax {command.split()[0]}: error: the output cannot be written: [Errno 28] No space left on device\n"
    for descriptor, status, said in ((unread, 141, ""), (full, 1, error)):
        if descriptor is not None:
            with open(descriptor, "w") as output, monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", output)
                assert cli.main(command.split()) == status
                print("more")  # which does not fail when the file is closed
            assert capsys.readouterr().err == said


COMPLETED = {
    "adamjax t": {"train", "tune"},
    "adamjax train --optimizer ada": {"adam", "adam_atan2", "adamax", "adamaxw", "adamw"},
    "adamjax train dig": {"digits", "digits_convnet"},
    "adamjax tune --le": {"--learning-rate"},
    "adamjax tune --prob": set(),
    "adamjax train --out fol": {"folder"},
    "adamjax train --config fil": {"file"},
    "adamjax report fol": {"folder"},
}


def test_a_shell_completes_commands_flags_and_values(tmp_path, capsys, monkeypatch):
    pytest.importorskip("shtab")
    scripts = {}
    for shell in ("bash", "zsh", "fish", "tcsh"):
        assert cli.main(["completion", shell]) == 0
        scripts[shell] = capsys.readouterr().out
        assert "schedule_free_adamw" in scripts[shell], "a value of --optimizer"
    if bash := shutil.which("bash"):
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").touch()
        tries = [
            f'COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _shtab_adamjax; echo "${{COMPREPLY[*]}}"'
            for line in COMPLETED
        ]
        command = [bash, "--norc", "-c", "\n".join([scripts["bash"], *tries])]
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert [set(line.split()) for line in said.splitlines()] == list(COMPLETED.values())
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "needs shtab: run  pip install 'adamjax[completion]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["BOWL", "Bowl", "make_bowl"])
@pytest.mark.parametrize("command", ["train", "tune", "lr-range"])
def test_problems_and_their_factories(name, command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extra = {"train": ["--lr", "0.1"], "tune": ["--trials", "2", "--confirm", "1", "1"], "lr-range": []}[command]
    assert cli.main([command, f"test_command_line:{name}", "--steps", "10", *extra]) in (0, 1)
    assert "error" not in capsys.readouterr().err


def test_the_old_flag_of_train_is_the_argument(tmp_path, capsys):
    found = []
    for i, name in enumerate((["bowl:BOWL"], ["--problem", "bowl:BOWL"])):
        assert cli.main(["train", *name, "--steps", "5", "--out", str(tmp_path / str(i))]) == 0
        found.append(json.loads((tmp_path / str(i) / "config.json").read_text()))
    assert found[0] == found[1]
    assert found[0]["flags"]["problem"] == "bowl:BOWL"
    assert cli.main(["train", "bowl:BOWL", "--problem", "digits"]) == 2
    assert "argument --problem: not allowed with argument PROBLEM" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    assert "--problem" not in capsys.readouterr().out


def test_a_config_names_the_problem(tmp_path, capsys):
    for problem in (["bowl:BOWL"], ["--problem=bowl:CLOSED"]):
        config = tmp_path / "config.json"
        config.write_text(json.dumps({"flags": {"problem": "json:nothing", "steps": 3}}))
        assert cli.main(["train", "--config", str(config), "--out", str(tmp_path / "none")]) == 2
        assert "problem json:nothing" in capsys.readouterr().err
        out = tmp_path / problem[0]
        assert cli.main(["train", "--config", str(config), *problem, "--out", str(out)]) in (0, 1)
        assert json.loads((out / "config.json").read_text())["flags"]["problem"] == problem[0].removeprefix(
            "--problem="
        )


def test_a_resumed_run_keeps_its_problem(tmp_path, capsys):
    assert cli.main(["train", "bowl:BOWL", "--steps", "5", "--out", str(tmp_path)]) == 0
    assert cli.main(["train", "bowl:BOWL", "--resume", str(tmp_path)]) == 0
    for other in (["digits"], ["--problem", "bowl:CLOSED"]):
        assert cli.main(["train", *other, "--resume", str(tmp_path)]) == 2
        said = f"the problem was bowl:BOWL, here it is {other[-1]}: a run that is resumed goes on as it began; "
        assert f"{said}for another one, train --config {tmp_path}/config.json {other[-1]}" in capsys.readouterr().err


def test_a_factory_gets_the_options_of_a_problem(tmp_path, capsys):
    assert cli.main(["train", "test_command_line:Averages", "--batch-size", "8", "--out", str(tmp_path)]) == 0
    assert "the objective returned loss 1, batch_size 8" in capsys.readouterr().out


EXPECTED = (
    "expected a problem, an objective(optimizer, trial), or a factory, which has no required arguments but batch_"
)


@pytest.mark.parametrize("command", ["train", "tune", "lr-range"])
@pytest.mark.parametrize(
    ("problem", "said"),
    [
        ("NUMBER", f"test_command_line:NUMBER is 3, {EXPECTED}"),
        ("three", f"test_command_line:three takes epochs, optimizer, trial, {EXPECTED}"),
        ("Averages", "test_command_line:Averages needs --batch-size"),
        ("make_nothing", "test_command_line:make_nothing made None, expected a problem or an objective"),
        ("make_class", "test_command_line:make_class made <class 'bowl.Bowl'>, expected a problem or an"),
        ("make_objective --batch-size 8", "--batch-size means nothing to test_command_line:make_objective: leave it"),
        (
            "objective --batch-size 8",
            "--batch-size means nothing to test_command_line:objective, which is an objective",
        ),
        (
            "BOWL --batch-size 8",
            "--batch-size means nothing to test_command_line:BOWL, which is a problem already made",
        ),
    ],
)
def test_what_problem_cannot_name(command, problem, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, *f"test_command_line:{problem}".split()]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def train_objective(out, *flags, name="objective"):
    return cli.main(["train", f"test_command_line:{name}", "--out", str(out), *flags])


def test_train_calls_an_objective_once(tmp_path, capsys):
    flags = ["--lr", "0.1", "--fix", "b1=0.5", "--b2", "0.9", "--seed", "3"]
    assert train_objective(tmp_path / "own", *flags) == 0
    said = capsys.readouterr().out
    records = read_metrics(tmp_path / "own")
    assert [r.keys() for r in records] == [{"step", "val_loss"}] * 2
    assert [r["step"] for r in records] == [10, 20]
    assert f"step 10: loss {records[0]['val_loss']:.4g}" in said
    assert f"the objective returned loss {records[1]['val_loss']:.4g}" in said
    assert (tmp_path / "own" / "curves.png").read_bytes().startswith(b"\x89PNG")
    # The optimizer is that of a problem with these flags.
    same = ["--steps=20", "--schedule=constant", "--evaluate-every=10", "--out", str(tmp_path / "problem")]
    assert cli.main(["train", "bowl:BOWL", *flags, *same]) == 0
    expected = [r["val_loss"] for r in read_metrics(tmp_path / "problem") if r["step"]]
    np.testing.assert_allclose([r["val_loss"] for r in records], expected, rtol=1e-6)
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert "ScaleByAdam(b1=0.5, b2=0.9" in config["optimizer"]
    again = ["train", "--config", str(tmp_path / "own" / "config.json"), "--out", str(tmp_path / "again")]
    assert cli.main(again) == 2
    again.append("--allow-import")
    assert cli.main(again) == 0
    assert read_metrics(tmp_path / "again") == records


def test_an_objective_gets_its_arguments_and_its_budget(tmp_path):
    got = {}

    def look(optimizer, trial):
        names = ("number", "seed", "arguments", "budget", "optimizer")
        got.update({name: getattr(trial, name) for name in names}, given=optimizer)
        return 0.0

    options = {"problem": "look", "optimizer": "adam", "learning_rate": 0.1, "b1": 0.5, "seed": 2}
    for i, more in enumerate(({}, {"steps": 30, "schedule": "cosine"})):
        assert cli._train._train_objective.run(look, options | more | {"out": tmp_path / str(i)}) == 0
        assert got["budget"] == more.get("steps")
        assert (got["number"], got["seed"], got["arguments"]) == (0, 2, {"learning_rate": 0.1, "b1": 0.5})
        rate = adamjax.schedules.cosine(0.1, 30) if more else adamjax.schedules.constant(0.1)
        assert got["optimizer"] == got["given"] == adamjax.adam(rate, b1=0.5)
        assert read_metrics(tmp_path / str(i)) == [{"step": more.get("steps", 0), "val_loss": 0.0}]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--checkpoint-every 5", "test_command_line:objective is an objective: it saves its own checkpoints, if any"),
        ("--distributed --processes 1", "it chooses its own devices"),
        ("--diagnose", "only it sees the updates, which adamjax.diagnostics measures"),
        ("--dtype bfloat16", "it makes its own parameters"),
        ("--report-every 10", "it reports by trial.report(step, value)"),
        ("--evaluate-every 10", "it reports by trial.report(step, value)"),
        ("--schedule cosine", "--schedule cosine needs --steps, the number of updates that the objective does"),
        ("--lr -1", "Invalid learning rate: -1.0"),
    ],
)
def test_what_an_objective_cannot_follow(flags, said, tmp_path, capsys):
    assert train_objective(tmp_path / "run", *flags.split()) == 2
    error = capsys.readouterr().err
    assert said in error
    assert said.startswith(("--", "Invalid")) or f"{flags.split()[0]} is for problems; " in error
    assert not (tmp_path / "run").exists()


def test_an_objective_is_not_resumed(tmp_path, capsys):
    assert train_objective(tmp_path) == 0
    assert cli.main(["train", "--resume", str(tmp_path)]) == 2
    assert "it starts from the beginning, unless it loads a checkpoint of its own" in capsys.readouterr().err


def test_objectives_that_end_badly_leave_what_they_reported(tmp_path, capsys):
    assert train_objective(tmp_path / "a", name="not_finite") == 1
    assert "a number that is not finite. Try a --learning-rate below 0.003" in capsys.readouterr().err
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 1  # reported and returned
    assert train_objective(tmp_path / "b", name="interrupted") == 130
    assert f"stopped; what was reported is in {tmp_path / 'b'}" in capsys.readouterr().err
    with pytest.raises(OSError, match="no such file"):
        train_objective(tmp_path / "c", name="broken")
    for name in ("b", "c"):
        assert read_metrics(tmp_path / name) == [{"step": 3, "val_loss": 0.5}]
        assert (tmp_path / name / "curves.png").exists()
    assert train_objective(tmp_path / "d", name="wrong") == 2
    said = "test_command_line:wrong returned 'loss', expected a number or a dict of numbers"
    assert said in capsys.readouterr().err
    assert train_objective(tmp_path / "a") == 2
    assert "already holds a run" in capsys.readouterr().err


class Loader(Bowl):
    """A problem whose data cannot be read from step 30 on."""

    def batch(self, step, key):
        def read(step):
            if step == 30:
                raise OSError("the disk is gone")
            return np.zeros(4, np.float32)

        return super().batch(step, key) + jax.pure_callback(read, jax.ShapeDtypeStruct((4,), jnp.float32), step)


def test_an_error_of_the_loader_says_how_to_resume(tmp_path, capsys):
    command = ["train", "test_command_line:Loader", "--steps", "50", "--out"]
    assert cli.main([*command, str(tmp_path / "run"), "--checkpoint-every", "10"]) == 1
    said = capsys.readouterr().err
    assert "OSError: the disk is gone" in said
    assert f"adamjax train --resume {tmp_path / 'run'} goes on" in said.splitlines()[-1]
    assert adamjax.checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert (tmp_path / "run" / "curves.png").exists()
    with pytest.raises(Exception, match="the disk is gone"):
        cli.main([*command, str(tmp_path / "none")])


def searched(monkeypatch, *flags, problem="bowl:BOWL"):
    """The arguments that the command gives to `tune` and `lr_range_test`."""
    found = {}

    def called(subject, **arguments):
        found.update(arguments, subject=subject)
        raise ValueError("seen")

    for name in ("tune", "lr_range_test"):
        monkeypatch.setattr(tuning, name, called)
    command, *others = flags
    assert cli.main([command, problem, *others]) == 2
    return found


RANGES = [
    ("learning_rate=1e-4..1e-1", {"learning_rate": tuning.Log(1e-4, 1e-1)}),
    ("weight_decay=0..0.5", {"weight_decay": tuning.Linear(0, 0.5)}),
    ("b1=0.8..0.95", {"b1": tuning.Linear(0.8, 0.95)}),
    ("b1=0.05..0.5", {"b1": tuning.Log(0.05, 0.5)}),
    ("b1=lin:0.05..0.5", {"b1": tuning.Linear(0.05, 0.5)}),
    ("eps=log:1e-8..2e-8", {"eps": tuning.Log(1e-8, 2e-8)}),
    ("b1=log:.1..0.9", {"b1": tuning.Log(0.1, 0.9)}),
    ("one_minus_b1=0.01..0.3", {"one_minus_b1": tuning.Log(0.01, 0.3)}),
    ("one_minus_b2=lin:0.01..0.3", {"one_minus_b2": tuning.Linear(0.01, 0.3)}),
    ("amsgrad=false,torch", {"amsgrad": tuning.Choice(False, "torch")}),
    ("nesterov=true,false", {"nesterov": tuning.Choice(True, False)}),
    ("b2=0.9,0.99,0.999", {"b2": tuning.Choice(0.9, 0.99, 0.999)}),
    ("mu_dtype=int8,bfloat16", {"mu_dtype": tuning.Choice(adamjax.quantized("int8"), "bfloat16")}),
]


@pytest.mark.parametrize(("written", "ranges"), RANGES, ids=[written for written, _ in RANGES])
def test_a_range_replaces_the_default_one_of_its_argument(written, ranges, monkeypatch):
    found = searched(monkeypatch, "tune", "--range", written)["space"].ranges
    expected = tuning.Space(**ranges).ranges
    default = searched(monkeypatch, "tune", "--range", "b1=0.8..0.9")["space"].ranges
    assert default.keys() == {"learning_rate", "b1", "b2", "weight_decay", "amsgrad"}
    assert found == {"b1": tuning._strategy.RANGES["b1"]} | {n: r for n, r in default.items() if n != "b1"} | expected


def test_eps_keeps_its_range_where_it_is_searched_without_ranges(monkeypatch):
    flags = ["tune", "--range", "b1=0.8..0.9"]
    half = searched(monkeypatch, *flags, problem="test_command_line:HALF")["space"]
    asked = searched(monkeypatch, *flags, "--stages", "learning_rate", "b1,eps")["space"]
    assert half.ranges["eps"] == asked.ranges["eps"] == tuning._strategy.RANGES["eps"]


HALF = Bowl(dtype="bfloat16")


def test_an_objective_is_not_compiled_again_unless_it_is_asked_for(monkeypatch):
    flags = ["tune", "--range", "b1=0.8..0.9"]
    space = searched(monkeypatch, *flags, problem="test_command_line:objective")["space"]
    asked = searched(monkeypatch, *flags, "--stages", "b1,amsgrad", problem="test_command_line:objective")["space"]
    assert "amsgrad" not in space.ranges
    assert "amsgrad" in asked.ranges


def test_a_range_of_the_one_argument_that_is_searched(monkeypatch):
    fixed = ["--lr", "1e-3", "--fix", "b1=0.9", "--b2", "0.9", "--weight-decay", "0", "--amsgrad", "false"]
    assert searched(monkeypatch, "tune", *fixed, "--range", "eps=1e-9..1e-3")["space"].free == ["eps"]


def test_without_a_range_the_range_test_places_the_learning_rate(monkeypatch):
    assert searched(monkeypatch, "tune")["space"] is None


def test_values_that_are_kept(monkeypatch):
    for kept in (["--b1", "0.5", "--amsgrad", "torch"], ["--fix", "b1=0.5", "--fix", "amsgrad=torch"]):
        found = searched(monkeypatch, "tune", *kept, "--lr", "0.1", "--range", "b2=0.5..0.9")
        assert found["optimizer"].keywords == {"b1": 0.5, "amsgrad": "torch", "learning_rate": 0.1}
        assert found["space"].ranges.keys() == {"b2", "weight_decay"}
    assert searched(monkeypatch, "tune", "--fix", "amsgrad=false")["optimizer"].keywords == {"amsgrad": False}
    assert searched(monkeypatch, "lr-range", "--fix", "nesterov=true")["optimizer"].keywords == {"nesterov": True}
    assert searched(monkeypatch, "lr-range", "--mu-dtype", "int8")["optimizer"].keywords == {
        "mu_dtype": adamjax.quantized("int8")
    }


def test_flags_that_are_not_given_are_not_passed(monkeypatch):
    for problem in ("bowl:BOWL", "test_command_line:objective"):
        found = searched(monkeypatch, "tune", problem=problem)
        steps = {"steps"} if problem == "bowl:BOWL" else set()
        assert found.keys() == {"subject", "optimizer", "space", "stages", "out", "progress", "resume"} | steps
        assert searched(monkeypatch, "lr-range", problem=problem).keys() == {"subject", "optimizer"}
    objective_steps = searched(monkeypatch, "tune", "--steps", "7", problem="test_command_line:objective")
    assert objective_steps["steps"] == 7


def test_flags_have_the_defaults_that_their_help_says(capsys):
    """Those which the functions that are called have."""
    for command, function, names in (
        (
            "tune",
            tuning.tune,
            {"trials": "64", "confirm": "(8, 2) (5, 4) (3, 8)", "sampler": "auto", "metric": "loss", "seed": "0"},
        ),
        ("lr-range", tuning.lr_range_test, {"seed": "0"}),
    ):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        text = re.sub(r"\s+", " ", capsys.readouterr().out)
        for name, said in names.items():
            default = inspect.signature(function).parameters[name].default
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            assert type(default)(said) == default or said == shown
            written = "--" + name.removeprefix("num_").replace("_", "-")
            assert re.search(rf"{written} [^-]*\(default: {re.escape(said)}", text), name


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--range b1", "--range b1: expected NAME=LOW..HIGH, as in learning_rate=1e-4..1e-1, with log: or lin: before"),
        ("--range b1=0.9", "--range b1=0.9: expected NAME=LOW..HIGH"),
        ("--range b1=low..0.9", "--range b1=low..0.9: expected NAME=LOW..HIGH"),
        ("--range b1=cube:0.1..0.9", "--range b1=cube:0.1..0.9: expected NAME=LOW..HIGH"),
        ("--range one_minus_b1=0.1,0.2", "--range one_minus_b1=0.1,0.2: expected NAME=LOW..HIGH"),
        ("--range b1=0.9..0.1", "low must be below high"),
        ("--range b1=log:0..0.1", "a logarithmic range starts above 0"),
        ("--range momentum=0..1", "momentum is not an argument of an optimizer, expected one of learning_rate, b1, b2"),
        ("--range amsgrad=0..1", "amsgrad is not a number; list its values, as in amsgrad=false,true"),
        (
            "--range amsgrad=false,yes",
            "yes is not a value of amsgrad, expected one of false, true, torch, corrected, paper",
        ),
        ("--range b1=0.9,x", "x is not a number, as b1 must be"),
        ("--range threshold=3..9", "--range of threshold means nothing to adamw: leave it out"),
        ("--range b1=0..0.5 --b1 0.3", "a range of b1, which is also kept at 0.3: leave one out"),
        ("--range b1=0..0.5 --range one_minus_b1=0.1..0.5", "--range gives two ranges of b1: leave one out"),
        ("--fix b1", "--fix b1: expected NAME=VALUE, as in b1=0.9"),
        ("--fix b1=", "--fix b1=: nothing is not a number, as b1 must be"),
        ("--fix momentum=0.9", "momentum is not an argument of an optimizer"),
        ("--fix nesterov=1", "1 is not a value of nesterov, expected one of false, true"),
        ("--fix threshold=5", "--threshold means nothing to adamw"),
        ("--transfer-to width", "--transfer-to width: nothing is not a number, as width must be"),
        ("--transfer-to height=2", "height=2 is not a factor of width, depth, batch, steps, data, as in width=4"),
        ("--transfer-to width=2,width=4", "width is given twice"),
        ("--transfer-to width=-1", "width must be above 0, and finite"),
        (
            "--transfer-to width=4 --optimizer adam",
            "no rule for the weight decay of adam, which is part of the gradient",
        ),
    ],
)
def test_bad_values_and_ranges(flags, said, tmp_path, capsys):
    assert cli.main(["tune", "bowl:BOWL", "--out", str(tmp_path / "run"), *flags.split()]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_lr_range_varies_the_learning_rate(capsys):
    assert cli.main(["lr-range", "bowl:BOWL", "--fix", "learning_rate=0.1"]) == 2
    assert "--fix learning_rate means nothing to lr-range, which varies it: leave it out" in capsys.readouterr().err


def test_tune_over_given_ranges(tmp_path, capsys):
    flags = ["--trials", "6", "--steps", "8", "--confirm", "1", "1", "--range", "one_minus_b1=0.3..0.5", "--lr", "0.1"]
    assert cli.main(["tune", "bowl:BOWL", *flags, "--out", str(tmp_path), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "one_minus_b1=Linear(low=0.3, high=0.5)" in found["question"]["space"]
    assert all("learning_rate" not in t["setting"] for t in found["trials"])


def test_tune_for_a_larger_model(tmp_path, capsys):
    flags = ["--trials", "4", "--steps", "8", "--confirm", "1", "1", "--fix", "b1=0.9", "--fix", "weight_decay=0.1"]
    flags += ["--lr", "0.1", "--transfer-to", "width=4,depth=2,batch=16,steps=10", "--out", str(tmp_path)]
    assert cli.main(["tune", "bowl:BOWL", *flags, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["transfer"]
    assert found == json.loads((tmp_path / "transfer.json").read_text())
    assert found["b1"] == pytest.approx(0.9**16)
    # 16 times the batch: 4 times the learning rate. lr * decay * steps stays the same.
    hidden, norm, *_ = found["parameters"].values()
    assert hidden == pytest.approx(
        {
            "learning_rate": 0.1,
            "weight_decay": 0.01,
            "eps": 1e-8 / 4 / 2 / 4,
            "init_std": 0.5,
            "output": 1,
            "residual": 0.5,
        }
    )
    assert norm["learning_rate"] == pytest.approx(0.4)
    assert found["call"].startswith("adamjax.transfer(functools.partial(adamjax.adamw, b1=0.9")
    assert found["call"].endswith(', small, large, blocks="block_[0-9]+", batch=16, steps=10)')
    assert cli.main(["tune", "bowl:BOWL", *flags, "--resume"]) == 0
    said = capsys.readouterr().out
    assert "transferred to width x 4, depth x 2, batch x 16, steps x 10, with b1 = 0.1853" in said
    assert f"opt = {found['call']}" in said


@pytest.mark.parametrize("name", ["objective", "make_objective"])
def test_tune_an_objective(name, tmp_path, capsys):
    flags = ["--trials", "4", "--steps", "20", "--confirm", "1", "1", "--range", "learning_rate=1e-2..1.0"]
    assert cli.main(["tune", f"test_command_line:{name}", *flags, "--out", str(tmp_path), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["question"]["steps"] == 20
    assert found["best"]["learning_rate"] > 1e-2
    assert found["best"].keys() == {"learning_rate", "b1", "b2", "weight_decay"}


def test_lr_range_says_why_it_determines_nothing(capsys):
    for output, shown in (("table", "err"), ("json", "out")):
        assert cli.main(["lr-range", "bowl:CLOSED", "--steps", "20", "--format", output]) == 1
        said = getattr(capsys.readouterr(), shown)
        assert "the range test determines no learning rate: the loss blows up after 0 points" in said


def test_lr_range_of_an_objective(capsys):
    flags = ["--rates", "10", "--min-lr", "1e-3", "--format", "json"]
    assert cli.main(["lr-range", "test_command_line:objective", *flags]) in (0, 1)
    assert "suggestions" in json.loads(capsys.readouterr().out)
    assert cli.main(["lr-range", "test_command_line:objective", "--steps", "20"]) == 2
    assert "--steps is for problems; test_command_line:objective is an objective" in capsys.readouterr().err
