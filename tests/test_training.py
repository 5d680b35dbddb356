"""Problems, training runs and the command line."""

import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_equal

import adamjax
from adamjax import cli, problems, training
from adamjax._core import signals
from adamjax._core.optional import require
from adamjax.run_folder import RunFolder, claim
from adamjax.training import train


class Parabola:
    """A loss without data, whose parameter can be real or complex."""

    def __init__(self, target=3.0):
        self.target = target

    def init(self, key):
        return {"x": jnp.zeros(2, jnp.result_type(self.target, jnp.float32))}

    def batch(self, step, key):
        return jax.random.normal(jax.random.fold_in(key, step), (2,))

    def loss(self, params, batch, key):
        return jnp.sum(jnp.abs(params["x"] - self.target) ** 2)

    def evaluate(self, params):
        return {"loss": self.loss(params, None, None)}


def test_digits_learn():
    *_, report = train(problems.digits(), adamjax.adamw(3e-3), steps=400)
    assert report.step == 400
    assert report.metrics["accuracy"] > 0.95
    assert report.diverged_at is None


def test_digits_data():
    problem = problems.digits(hidden=(), batch_size=7)
    params = problem.init(jax.random.key(0))
    assert {k: v.shape for k, v in params["layer_0"].items()} == {"kernel": (64, 10), "bias": (10,)}
    images, labels = problem.batch(0, jax.random.key(0))
    assert images.shape == (7, 64)
    assert images.min() >= 0
    assert images.max() <= 1
    assert_equal(problem.batch(0, jax.random.key(0)), (images, labels))
    assert not np.array_equal(images, problem.batch(1, jax.random.key(0))[0])
    everything = np.concatenate([problem._train[1], problem._validation[1]])
    assert len(everything) == 1797
    assert set(everything) == set(range(10))
    deep = problems.digits(hidden=(8,) * 11).init(jax.random.key(0))
    assert problems.digits().loss(deep, problem.batch(0, jax.random.key(1)), None) < 20  # layer_10 after layer_9
    for bad in ({"hidden": (0,)}, {"hidden": (2.5,)}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"^Invalid {next(iter(bad))} value"):
            problems.digits(**bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": None}, "Parabola is not a problem: it has no method batch"),
        ({"init": lambda key: {"n": jnp.zeros(2, int)}}, r"params\['n'\] is int32\[2\], expected a floating point"),
        ({"loss": lambda p, b, k: p["x"]}, r"loss returns .*shape=\(2,\).*expected a real floating point scalar"),
        ({"loss": lambda p, b, k: jnp.zeros((), int)}, "loss returns .*int32.*expected a real"),
        ({"evaluate": lambda p: {"accuracy": p["x"][0]}}, 'evaluate returns .*expected a dict with "loss"'),
        ({"evaluate": lambda p: p["x"][0]}, "evaluate returns .*expected a dict"),
        ({"evaluate": lambda p: {"loss": p["x"]}}, "evaluate returns .* for 'loss', expected a scalar"),
    ],
)
def test_bad_problems(change, message):
    problem = Parabola()
    for name, method in change.items():
        setattr(problem, name, method)
    with pytest.raises(TypeError, match=message):
        problems.check(problem)
    with pytest.raises(TypeError, match=message):
        train(problem, adamjax.adam(), steps=1)


def test_a_class_is_no_problem():
    with pytest.raises(TypeError, match=r"Parabola is a class, and no problem: make one, Parabola\(...\)"):
        problems.check(Parabola)


def test_reports():
    reports = [
        (r.step, len(r.losses), r.metrics is not None)
        for r in train(Parabola(), adamjax.adam(0.1), steps=25, report_every=10, evaluate_every=15)
    ]
    assert reports == [(0, 0, True), (10, 10, False), (15, 5, True), (20, 5, False), (25, 5, True)]
    asked = iter([False] * 13)
    stopped = [
        (r.step, len(r.losses), r.metrics is not None, r.stopped)
        for r in train(Parabola(), adamjax.adam(0.1), steps=99, stop=lambda: next(asked, True))
    ]
    # The last one at once, and again with metrics.
    assert stopped == [(0, 0, True, False), (10, 10, False, False), (13, 3, False, True), (13, 3, True, True)]
    for bad in ({"steps": 0}, {"steps": 1, "report_every": 0}, {"steps": 1, "evaluate_every": -1}):
        with pytest.raises(ValueError, match="must be at least 1"):
            train(Parabola(), adamjax.adam(), **bad)


def test_starts_that_are_no_reports_are_refused():
    with pytest.raises(TypeError, match="Invalid start value: 3; start must be a Report of train, or a Checkpoint"):
        train(Parabola(), adamjax.adam(), steps=1, start=3)


def test_seeds_of_more_than_64_bits_are_refused():
    with pytest.raises(ValueError, match="Invalid seed value: 18446744073709551616; seed must fit into 64 bits"):
        train(Parabola(), adamjax.adam(), steps=1, seed=2**64)


def test_runs_are_reproducible():
    first, same, other = (
        np.concatenate([r.losses for r in train(problems.digits(), adamjax.adam(), steps=20, seed=seed)])
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_parameters(dtype):
    *_, report = train(problems.digits(), adamjax.adam(3e-3), steps=200, dtype=dtype)
    assert all(p.dtype == dtype for p in jax.tree.leaves(report.params))
    assert report.metrics["accuracy"] > 0.9


@pytest.mark.usefixtures("lenient")
def test_a_dtype_for_numbers_of_python_and_for_complex_parameters():
    class Plain(Parabola):
        def init(self, key):
            return {"x": 0.5}

    *_, report = train(Plain(), adamjax.adam(0.1), steps=1, dtype="bfloat16")
    assert report.params["x"].dtype == "bfloat16"
    with pytest.raises(TypeError, match=r"dtype value: 'bfloat16'; params\['x'\] is complex64, and would lose"):
        next(train(Parabola(1 + 2j), adamjax.adam(), steps=1, dtype="bfloat16"))


@pytest.mark.usefixtures("lenient")
def test_complex_parameters_and_optax_descend():
    for problem, optimizer in ((Parabola(1 + 2j), adamjax.adam(0.1)), (Parabola(), optax.adam(0.1))):
        *_, report = train(problem, optimizer, steps=200)
        assert report.metrics["loss"] < 1e-2


def test_divergence_is_reported_at_its_step():
    class Cliff(Parabola):
        def batch(self, step, key):
            return jnp.where(step == 17, jnp.nan, 0.0)

        def loss(self, params, batch, key):
            return super().loss(params, batch, key) + (0.0 if batch is None else batch)

    reports = list(train(Cliff(), adamjax.adam(0.1), steps=99))
    assert reports[-1].step == 20
    assert reports[-1].diverged_at == 18  # the 18th step, with the batch of count 17
    assert [r.diverged_at for r in reports[:-1]] == [None, None]


def read(folder):
    config = json.loads((folder / "config.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    return config, metrics


def test_train_command(tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--optimizer=radam", "--b1=0.8", "--nesterov", "--schedule=linear", "--end=1e-4", "--batch-size=32"]
    flags += ["--steps=60", "--seed=3"]
    assert cli.main(["train", *flags, "--out", str(out)]) == 0
    config, metrics = read(out)
    assert config["flags"]["optimizer"] == "radam"
    assert "ScaleByRAdam(b1=0.8" in config["optimizer"]
    assert "nesterov=True" in config["optimizer"]
    assert [m["step"] for m in metrics] == [0, 10, 20, 30, 40, 50, 60]
    assert {"step", "loss", "learning_rate", "val_loss", "val_accuracy"} == metrics[-1].keys()
    np.testing.assert_allclose(metrics[1]["learning_rate"], 3e-3 + (1e-4 - 3e-3) * 9 / 60, rtol=1e-5)
    assert "validation after 60 steps: accuracy" in capsys.readouterr().out
    # config.json is enough to run again, to the last digit; other flags override it.
    assert cli.main(["train", "--config", str(out / "config.json"), "--out", str(tmp_path / "again")]) == 0
    again, same = read(tmp_path / "again")
    assert (again, same) == (config, metrics)
    shorter = ["train", "--config", str(out / "config.json"), "--steps", "20", "--out", str(tmp_path / "shorter")]
    assert cli.main(shorter) == 0
    assert read(tmp_path / "shorter")[1][-1]["step"] == 20


@pytest.mark.parametrize("schedule", cli.SCHEDULES)
def test_train_command_with_every_schedule(tmp_path, schedule):
    arguments = ["train", "test_training:PARABOLA", "--steps=9", f"--schedule={schedule}"]
    assert cli.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert len(read(tmp_path / "run")[1]) == 2


@pytest.mark.parametrize("optimizer", cli.OPTIMIZERS)
def test_train_command_with_every_optimizer(tmp_path, optimizer):
    arguments = ["train", "test_training:PARABOLA", "--steps=5", "--dtype=bfloat16"]
    assert cli.main([*arguments, f"--optimizer={optimizer}", "--out", str(tmp_path / "run")]) == 0
    assert read(tmp_path / "run")[0]["flags"]["dtype"] == "bfloat16"


@pytest.mark.slow
def test_train_command_in_low_precision(tmp_path):
    arguments = [
        "train",
        "--steps",
        "5",
        "--mu-dtype",
        "int4",
        "--nu-dtype",
        "int8",
        "--dtype",
        "bfloat16",
        "--rounding",
        "kahan",
        "--out",
    ]
    assert cli.main([*arguments, str(tmp_path / "run")]) == 0
    written = read(tmp_path / "run")[0]["optimizer"]
    assert written.startswith("Kahan(inner=Chain((ScaleByAdam(")
    assert "mu_dtype=adamjax.quantized('int4'), nu_dtype=adamjax.quantized('int8')" in written


def test_every_hyperparameter_has_a_flag():
    named = {name for o in cli.OPTIMIZERS for name in inspect.signature(getattr(adamjax, o)).parameters}
    # The steps of warmup are a flag of the schedule, for schedule_free_adamw, too.
    assert named - {"learning_rate", "mask", "warmup_steps", "axis_name"} == set(cli.HYPERPARAMETERS)
    assert all(callable(getattr(adamjax.schedules, name)) for name in cli.SCHEDULES)


BAD_COMMANDS = [
    ("--learning-rate -1", "Invalid learning rate: -1.0"),
    ("--learning-rate nan", "Invalid learning rate: nan"),
    ("--b1 1.5", "Invalid beta parameter at index 0: 1.5"),
    ("--steps 0", "Invalid total_steps value: 0"),
    ("--steps 0 --schedule constant", "Invalid steps value: 0"),
    ("--warmup-steps 200 --steps 100", "Invalid warmup_steps value: 200"),
    ("--threshold 6", "--threshold means nothing to adamw"),
    ("--optimizer adamax --amsgrad torch", "--amsgrad means nothing to adamax"),
    ("--schedule constant --warmup-steps 5", "--warmup-steps means nothing to the schedule constant"),
    ("--batch-size 0", "Invalid batch_size value: 0"),
    ("mnist", "problem mnist is neither one of characters, digits, digits_convnet nor MODULE:OBJECT"),
    ("nowhere:thing", "problem nowhere:thing: No module named 'nowhere'"),
    ("json:nothing", "problem json:nothing: module 'json' has no attribute 'nothing'"),
    ("json:__name__", "json:__name__ is 'json', expected a problem, an objective(optimizer, trial), or a factory"),
    ("test_training:PARABOLA --batch-size 3", "--batch-size means nothing to test_training:PARABOLA"),
    ("test_training:Parabola --batch-size 3", "--batch-size means nothing to test_training:Parabola"),
    ("builtins:dict", "problem builtins:dict made {}, expected a problem or an objective(optimizer, trial)"),
    ("--config nowhere.json", "--config nowhere.json is not the config.json of a run"),
    ("--evaluate-every 0", "Invalid evaluate_every value: 0"),
]
PARABOLA = Parabola()


@pytest.mark.parametrize(("flags", "message"), BAD_COMMANDS)
def test_bad_commands(tmp_path, capsys, flags, message):
    assert cli.main(["train", "--out", str(tmp_path / "run"), *flags.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class Broken(Parabola):
    def loss(self, params, batch, key):
        return jnp.sum(params["x"][:, None] @ batch)  # of two shapes that do not fit


@pytest.mark.parametrize("command", ["train", "tune", "lr-range"])
def test_errors_of_ones_own_problem_say_where(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command.split(), "test_training:Broken"]) == 2
    line = inspect.getsourcelines(Broken.loss)[1] + 1
    assert f"({__file__}, line {line}, in loss)" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lerning_rate": 3}, "has a flag lerning_rate, which train does not know: remove it"),
        ({"optimizer": "sgd"}, ": --optimizer is 'sgd', expected one of adam, adam_atan2, adamax, "),
        ({"dtype": "float8"}, ": --dtype is 'float8', expected one of bfloat16, float16, float32"),
        ({"b1": 1.5}, "Invalid beta parameter at index 0: 1.5"),
    ],
)
def test_edited_configs(tmp_path, capsys, flags, message):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"flags": {"steps": 3} | flags}))
    assert cli.main(["train", "--config", str(config), "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_named_problems(tmp_path):
    for name in cli.PROBLEMS:
        problems.check(getattr(problems, name)())
    assert cli.main(["train", "digits_convnet", "--steps", "3", "--out", str(tmp_path / "run")]) == 0
    assert "val_accuracy" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_own_problems(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("PARABOLA", "Parabola"), start=1):
        assert cli.main(["train", f"test_training:{name}", "--steps", "20", "--learning-rate", "0.3"]) == 0
        assert {"step", "loss", "learning_rate", "val_loss"} == read(tmp_path / "runs" / f"train-{i}")[1][-1].keys()


def test_nothing_is_overwritten(tmp_path, capsys):
    arguments = ["train", "test_training:PARABOLA", "--steps=5", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert cli.main(arguments) == 2
    assert "already holds a run: choose another --out" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


class Explosion(Parabola):
    def loss(self, params, batch, key):
        return jnp.sum(jnp.exp(params["x"] * 1e3))


def test_divergence_ends_the_command(tmp_path, capsys):
    flags = ["--steps", "99", "--learning-rate", "0.5", "test_training:Explosion", "--maximize"]
    assert cli.main(["train", *flags, "--out", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().err
    assert "the loss was not finite at step 4 (learning rate 0.15)" in message
    assert "Try a --learning-rate below 0.5 (a tenth, say), or more --warmup-steps." in message
    _, metrics = read(tmp_path / "run")
    assert metrics[-1]["step"] == 10
    assert metrics[-1]["loss"] is None


class NeverFinite(Parabola):
    def loss(self, params, batch, key):
        return super().loss(params, batch, key) * jnp.nan


def test_a_loss_that_never_was_finite_is_not_the_learning_rates(tmp_path, capsys):
    command = ["train", "--steps", "9", "test_training:NeverFinite", "--out", str(tmp_path / "run")]
    assert cli.main(command) == 1
    assert "the loss was not finite before the first update: look at the problem's" in capsys.readouterr().err


SLOW = """
import time
import test_training

class Slow(test_training.Parabola):
    def loss(self, params, batch, key):
        import jax
        jax.debug.callback(lambda: time.sleep(0.02))
        return super().loss(params, batch, key)
"""


@pytest.mark.slow
def test_ctrl_c_leaves_a_usable_folder(tmp_path):
    (tmp_path / "slow.py").write_text(textwrap.dedent(SLOW))
    command = [sys.executable, "-m", "adamjax", "train", "slow:Slow", "--steps", "100000", "--out", "run"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "validation after" in output
    _, lines = read(tmp_path / "run")
    assert "val_loss" in lines[-1]
    assert 0 < lines[-1]["step"] < 100000


def test_version_and_help(capsys):
    for arguments, text in ((["--version"], "adamjax 0."), (["train", "--help"], "--learning-rate")):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 0
        assert text in capsys.readouterr().out


def test_missing_extras_name_the_command(monkeypatch, capsys, tmp_path):
    with pytest.raises(ImportError, match=r"drawing needs nothing_like_it: run  pip install 'adamjax\[demo\]'"):
        require("nothing_like_it.at_all", "demo", "drawing")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    command = ["train", "bowl:BOWL", "--steps", "1", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as terminal:
        terminal.setattr(sys.stderr, "isatty", lambda: True)
        terminal.setenv("TERM", "xterm")
        assert cli.main(command) == 2
        assert "pip install 'adamjax[demo]'" in capsys.readouterr().err
    assert cli.main(command) == 0  # a log has no bar


def wait_while_interrupted_in_a_finalizer():
    class Interrupted:
        def __del__(self):  # which Python lets raise nothing
            os.kill(os.getpid(), signal.SIGTERM)

    Interrupted()
    time.sleep(60)


def test_signals_stop_a_run_in_python():
    """Ctrl-C also where a shell has had it ignored, for a command in the background."""
    handlers = {number: signal.getsignal(number) for number in signals.STOPS}
    for number in signals.STOPS:
        with training.stop_on_signals() as stop:
            assert not stop()
            reports = []
            for report in train(Parabola(), adamjax.adam(0.1), steps=99, stop=stop):
                reports.append((report.step, report.stopped, report.metrics is not None))
                if len(reports) == 2:
                    os.kill(os.getpid(), number)
            assert stop()
        assert reports == [(0, False, True), (10, False, False), (11, True, False), (11, True, True)]
    with training.stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # who is asked twice does not wait
            os.kill(os.getpid(), signal.SIGINT)
    with signals.interrupted(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    with signals.interrupted(), pytest.raises(KeyboardInterrupt):
        wait_while_interrupted_in_a_finalizer()
    assert {number: signal.getsignal(number) for number in signals.STOPS} == handlers


def test_run_folder_writes_as_it_goes(tmp_path):
    folder = RunFolder(claim(tmp_path, "train"))
    folder.log({"step": 1, "loss": float("inf")})
    assert (tmp_path / "train-1" / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n'
    assert claim(tmp_path, "train") == tmp_path / "train-2"
    folder.plot()
    assert (tmp_path / "train-1" / "curves.png").exists()


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        *(((20, 2, 0), "log"), ((np.nan, 1, 0.1), "log"), ((2, 1, 0), "linear"), ((-1, -30), "linear")),
        *(((0.5, -0.05), "linear"), ((0, 0), "linear"), ((np.nan, np.inf), "linear")),
    ],
)
def test_curves_of_any_sign_are_drawn(tmp_path, monkeypatch, losses, scale):
    scales = []
    figures = require("matplotlib.figure", "demo", "drawing")
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: scales.append(self.axes[0].get_yscale()))
    folder = RunFolder(tmp_path / "run")
    for step, loss in enumerate(losses):
        folder.log({"step": step, "loss": float(loss)})
    folder.plot()
    assert scales == [scale]


def test_lr_range_command(tmp_path, capsys):
    arguments = ["lr-range", "digits", "--steps", "100", "--optimizer", "adam", "--b1", "0.8"]
    assert cli.main([*arguments, "--plot", str(tmp_path / "range.png")]) == 0
    table = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(table) == ["valley", "steep", "minimum/10", "usable"]
    assert (tmp_path / "range.png").stat().st_size > 1000
    assert cli.main([*arguments, "--format", "json", "--plot", str(tmp_path / "nowhere" / "range.png")]) == 2
    said = capsys.readouterr()
    assert "adamjax lr-range: error: [Errno 2] No such file or directory" in said.err
    found = json.loads(said.out)  # the result is printed all the same
    assert {name: f"{rate:.3g}" for name, rate in found["suggestions"].items()} == {
        name: table[name] for name in ("valley", "steep", "minimum/10")
    }
    direct = adamjax.tuning.lr_range_test(
        problems.digits(), num_steps=100, optimizer=lambda learning_rate: adamjax.adam(learning_rate, b1=0.8)
    )
    assert found["suggestions"] == direct.suggestions
    assert found["band"] == list(direct.band)


def test_lr_range_command_without_an_answer(capsys):
    assert cli.main(["lr-range", "--max-lr", "1e-4"]) == 1
    assert "the minimum lies on the edge of the range: raise max_lr" in capsys.readouterr().err
    assert cli.main(["lr-range", "--min-lr", "2"]) == 2
    assert "min_lr must be below max_lr" in capsys.readouterr().err
    assert cli.main(["lr-range", "mnist"]) == 2
    assert "problem mnist is neither one of" in capsys.readouterr().err
