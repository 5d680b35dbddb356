"""The folder of a run: one writer, measurements that survive, and a configuration that may be a stranger's."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

import adamjax
from adamjax import cli
from adamjax.diagnostics import History
from adamjax.run_folder import RunFolder, claim, read_metrics, read_stops

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}


def start(*arguments, cwd):
    command = [sys.executable, "-m", "adamjax", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=cwd, stdout=pipe, stderr=pipe, text=True)


def wait_for(there, process):
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_each_of_many_claims_a_folder(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "train-2").touch()
    (tmp_path / "runs" / "train-4").symlink_to("nowhere")
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: claim(tmp_path / "runs", "train"), range(16)))
    assert {path.name for path in claimed} == {f"train-{i}" for i in range(1, 19)} - {"train-2", "train-4"}
    assert all(path.is_dir() for path in claimed)


@pytest.mark.slow
def test_three_runs_at_once(tmp_path):
    flags = ["train", "bowl:BOWL", "--steps=20"]
    runs = [start(*flags, cwd=tmp_path) for _ in range(3)]
    said = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], said
    found = [(path / "metrics.jsonl").read_bytes() for path in (tmp_path / "runs").iterdir()]
    assert len(found) == 3
    assert found[0].count(b"\n") == 3
    assert found == found[:1] * 3
    # In one folder, one of them.
    runs = [start(*flags, "--out", "same", cwd=tmp_path) for _ in range(3)]
    said = [run.communicate(timeout=120)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2, 2]
    assert sum("same is in use by process" in x or "same already holds a run" in x for x in said) == 2
    assert (tmp_path / "same" / "metrics.jsonl").read_bytes() == found[0]


ENDLESS = ["train", "bowl:BOWL", "--steps=10000000", "--report-every=1000", "--evaluate-every=100000"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_run_with_a_checkpoint(tmp_path, number):
    run = start(*ENDLESS, "--out", "run", cwd=tmp_path)
    wait_for((tmp_path / "run" / "metrics.jsonl").exists, run)
    # Nobody else resumes it meanwhile.
    other = start("train", "--resume", "run", cwd=tmp_path)
    assert f"run is in use by process {run.pid} on" in other.communicate(timeout=120)[1]
    assert other.returncode == 2
    run.send_signal(number)
    run.send_signal(number)
    said = run.communicate(timeout=30)
    assert run.returncode == 130, said
    assert "adamjax train --resume run goes on" in said[1]
    (step,) = adamjax.checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert [r["step"] for r in read_metrics(tmp_path / "run")][-1] == step


@pytest.mark.slow
def test_a_run_that_is_to_ignore_hangups_does(tmp_path):
    command = ["nohup", sys.executable, "-m", "adamjax", *ENDLESS, "--out", "run"]
    run = subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for((tmp_path / "run" / "metrics.jsonl").exists, run)
    run.send_signal(signal.SIGHUP)
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes().count(b"\n")
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").read_bytes().count(b"\n") > lines + 2, run)
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=30)[0]
    assert run.returncode == 130


OBJECTIVE = """
import time
def endless(optimizer, trial):
    trial.report(1, 2.0)
    while True:
        time.sleep(0.1)
"""


@pytest.mark.slow
def test_signals_end_an_objective(tmp_path):
    (tmp_path / "mine.py").write_text(OBJECTIVE)
    run = start("train", "mine:endless", "--out", "run", cwd=tmp_path)
    wait_for((tmp_path / "run" / "metrics.jsonl").exists, run)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=30)
    assert run.returncode == 130
    assert "stopped; what was reported is in run" in said[1]
    assert read_metrics(tmp_path / "run") == [{"step": 1, "val_loss": 2.0}]


def write(path, content):
    (path / "metrics.jsonl").write_bytes(content)
    return read_metrics(path)


ONE, TWO = b'{"step": 1, "loss": 0.5}', b'{"step": 2, "loss": null}'


@pytest.mark.parametrize(
    "content",
    [
        b"\n".join([ONE, TWO, b""]),
        b"\r\n".join([ONE, TWO, b""]),
        b"\n".join([ONE, TWO, b'{"step": 3, "lo']),
        b"\n".join([ONE, TWO, b"\0" * 99, b"\0"]),  # a crash of the machine
        b"\n".join([ONE, b"", TWO, b"\xff", b""]),
        b"\n".join([ONE, ONE, TWO, TWO, b""]),
        b"\n".join([ONE, b'{"step": 2}', TWO, b"[1]", b'{"step": 10000000000000000000000000', b""]),
    ],
)
def test_measurements_are_read_whatever_a_crash_left(tmp_path, content):
    one, two = write(tmp_path, content)
    assert one == {"step": 1, "loss": 0.5}
    assert two["step"] == 2
    assert np.isnan(two["loss"])


@pytest.mark.parametrize(
    "line",
    [
        *(b"\xff", b"[1]", b"1", b"{", b'{"loss": 1}', b'{"step": "1"}', b'{"step": true}', b'{"step": -1}'),
        *(b'{"step": 1.0}', b'{"step": 1, "loss": "x"}', b'{"step": 1, "loss": [1]}'),
        *(b'{"step": 1, "loss": 1' + b"0" * 400 + b"}", b"[" * 99_999),
    ],
)
def test_lines_that_are_no_measurements_are_named(tmp_path, line):
    with pytest.raises(adamjax.DamagedFileError, match=r"line 2 of .*metrics.jsonl is not a record of a run") as caught:
        write(tmp_path, b"\n".join([ONE, line, TWO, b""]))
    assert caught.value.path == tmp_path / "metrics.jsonl"
    assert write(tmp_path, b"") == []
    (tmp_path / "metrics.jsonl").unlink()
    assert read_metrics(tmp_path) == []


def test_the_losses_between_two_reports_are_kept_to_the_last_bit(tmp_path):
    losses = [1 / 3, float("nan"), float(np.float32(0.1)), 1e-300]
    folder = RunFolder(tmp_path)
    assert read_stops(tmp_path) == {}
    folder.keep_losses(4, losses)
    folder.keep_losses(7, [1.0])
    found = read_stops(tmp_path)
    assert found.keys() == {4, 7}
    np.testing.assert_array_equal(found[4], losses)
    for content in ("", "[]", '{"x": [1]}', '{"4": 1}', '{"4": ["x"]}', '{"4": [1' + "0" * 400 + "]}"):
        (tmp_path / "stops.json").write_text(content)
        with pytest.raises(adamjax.DamagedFileError, match=r"stops.json is damaged \(.*\): remove it"):
            read_stops(tmp_path)


def test_names_of_metrics_are_drawn_as_they_are(tmp_path):
    folder = RunFolder(tmp_path)
    folder.log({"step": 1, "loss": 1.0, "val_$\\frac{$": 2.0})
    folder.plot("mine:$\\frac{$")
    assert (tmp_path / "curves.png").exists()


def test_curves_name_the_problem_and_the_optimizer(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    flags = ["--steps=2", "--b1=0.125", "--schedule=cosine", f"--out={tmp_path / 'run'}"]
    assert cli.main(["train", "bowl:BOWL", *flags]) == 0
    (figure,) = drawn
    FigureCanvasAgg(figure).draw()
    title = figure._suptitle
    assert title.get_text().startswith("bowl:BOWL, adamw\n")
    assert "b1=0.125" in title.get_text()
    assert title.get_window_extent().width < figure.bbox.width
    assert title.get_window_extent().y0 > max(axis.get_window_extent().y1 for axis in figure.axes)


def fail(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("flags", [[], ["--checkpoint-every=20"]])
def test_a_full_disk_is_said_in_a_line(tmp_path, monkeypatch, capsys, flags):
    command = ["train", "bowl:BOWL", "--steps=40", "--out", str(tmp_path / "run"), *flags]

    def log(self, record):
        if record["step"] == 30:
            fail()
        before(self, record)

    before = RunFolder.log
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", log)
        patch.setattr(RunFolder, "plot", fail)
        assert cli.main(command) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "adamjax train: error: [Errno 28] No space left on device" in said
    assert "adamjax: curves.png was not written: [Errno 28]" in said
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == [0, 10, 20, 30, 40]


@pytest.mark.parametrize(
    ("command", "failing", "said"),
    [
        ("bowl:BOWL --diagnose", (History, "save"), "adamjax: diagnostics.html was not written: [Errno 28]"),
        ("test_run_folder:one", (RunFolder, "plot"), "adamjax: curves.png was not written: [Errno 28]"),
        ("test_run_folder:one", (RunFolder, "write_config"), "adamjax train: error: [Errno 28]"),
        ("test_run_folder:one", (RunFolder, "log"), "adamjax train: error: [Errno 28]"),
    ],
)
def test_a_full_disk_at_the_end_is_said_in_a_line(command, failing, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(*failing, fail)
    status = cli.main(["train", *command.split(), "--steps=2", "--out", str(tmp_path / "run")])
    assert status == (1 if "error" in said else 0)
    printed = capsys.readouterr().err
    assert [line for line in printed.splitlines() if line.startswith(f"{said} No space left on device")]
    assert "Traceback" not in printed


def one(optimizer, trial):
    return 1.0


@pytest.fixture
def config(tmp_path):
    """A function that writes the config.json of somebody else."""

    def make(**flags):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"flags": {"problem": "bowl:BOWL", "steps": 3} | flags}))
        return path

    return make


def test_a_config_does_not_say_where_to_write(tmp_path, config, capsys):
    evil = {"out": str(tmp_path / "evil"), "resume": "x", "coordinator": "host\x1b[31m:1", "allow_import": True}
    command = ["train", "--config", str(config(**evil)), "--out", str(tmp_path / "good")]
    assert cli.main(command) == 2
    assert "importing bowl runs its code: if you trust it, pass --allow-import" in capsys.readouterr().err
    assert not (tmp_path / "good").exists()
    assert cli.main([*command, "--allow-import"]) == 0
    said = capsys.readouterr().err
    for name in ("--out", "--resume", "--coordinator", "--allow-import"):
        assert f"adamjax: {name} " in said
        assert "is not obeyed: pass it yourself" in said
    assert "\x1b[31m" not in said
    assert not (tmp_path / "evil").exists()
    assert json.loads((tmp_path / "good" / "config.json").read_text())["flags"].keys().isdisjoint(evil)


def test_nothing_is_imported_that_nobody_named(tmp_path, config, capsys, monkeypatch):
    (tmp_path / "planted.py").write_text("raise SystemExit('planted')")
    monkeypatch.chdir(tmp_path)
    path = config(problem="planted:X")
    for command in (["--config", str(path)], ["--config", str(path), "digits", "--steps=3"], ["--resume", "."]):
        if "--resume" in command:  # others may have written it
            path.chmod(0o666)
        code = cli.main(["train", *command])
        said = capsys.readouterr().err
        assert "planted" not in sys.modules
        assert (code, "importing planted runs its code" in said) in ((2, True), (0, False))
        assert code == (0 if "digits" in command else 2)
    with pytest.raises(SystemExit, match="planted"):
        cli.main(["train", "--config", str(path), "--allow-import"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"steps": "3"}, "--steps is '3', expected an integer"),
        ({"steps": 3.5}, "--steps is 3.5, expected an integer"),
        ({"steps": True}, "--steps is True, expected an integer"),
        ({"steps": 10**400}, "expected an integer of at most 2**53"),
        ({"learning_rate": "1"}, "--learning-rate is '1', expected a number"),
        ({"learning_rate": [1e-3]}, "--learning-rate is [0.001], expected a number"),
        ({"learning_rate": None}, "--learning-rate is None, expected a number"),
        ({"nesterov": "yes"}, "--nesterov is 'yes', expected true or false"),
        ({"diagnose": 1}, "--diagnose is 1, expected true or false"),
        ({"problem": 3}, "--problem is 3, expected a text"),
        ({"problem": ["bowl:BOWL"]}, "--problem is ['bowl:BOWL'], expected a text"),
        ({"optimizer": ["adam"]}, "--optimizer is ['adam'], expected one of"),
        ({"amsgrad": 1}, "--amsgrad is 1, expected one of"),
        ({"fix": [["b1", 2]]}, "has a flag fix, which train does not know"),
        ({"problem_flag": "bowl:BOWL"}, "has a flag problem_flag, which train does not know"),
        ({"x" * 999: 1}, "which train does not know"),
        ({"report_every": "a" * 9999}, "..., expected an integer"),
    ],
)
def test_values_of_a_config_have_the_right_type(tmp_path, config, capsys, flags, message):
    command = ["train", "--config", str(config(**flags)), "--out", str(tmp_path / "run"), "--allow-import"]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said) < 600
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"flags": []}', b'{"flags": null}', b"\xff", b'{"a":' * 99_999, b" " * (1 << 21)],
)
def test_damaged_configs(tmp_path, capsys, content):
    (tmp_path / "config.json").write_bytes(content)
    for command in (["--config", str(tmp_path / "config.json")], ["--resume", str(tmp_path)]):
        assert cli.main(["train", *command]) == 2
        said = capsys.readouterr().err
        assert f"{tmp_path / 'config.json'} is not the config.json of a run (" in said
        assert len(said) < 600


def test_what_was_written_is_on_disk_before_its_checkpoint(tmp_path, monkeypatch):
    """The measurements up to it, since a resumed run counts on them."""
    seen = []

    def recorded(name, call):
        def f(*arguments, **options):
            seen.append(name)
            return call(*arguments, **options)

        return f

    for owner, name in ((RunFolder, "sync"), (RunFolder, "log"), (adamjax.checkpoint, "save")):
        monkeypatch.setattr(owner, name, recorded(name, getattr(owner, name)))
    flags = ["--steps=20", "--report-every=5", "--evaluate-every=20", "--checkpoint-every=10"]
    assert cli.main(["train", "bowl:BOWL", *flags, "--out", str(tmp_path / "run")]) == 0
    assert seen == ["log", "log", "log", "sync", "save", "log", "log", "sync", "save"]
