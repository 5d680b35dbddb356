"""`adamjax train --distributed`: processes of their own, which meet on this machine."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from bowl import BOWL
from helpers import assert_close, assert_equal, free_port, make_mesh
from jax.sharding import AxisType
from kill_and_resume import Train
from tolerances import PROCESSES, RECOMPILED

import adamjax
from adamjax import cli, problems, sharding, training
from adamjax.run_folder import read_metrics

RUN = ["--steps=60", "--report-every=5", "--evaluate-every=20", "--checkpoint-every=20"]
RUN += ["--dtype=bfloat16", "--rounding=kahan", "--mu-dtype=int8", "--skip-nonfinite=5", "--diagnose"]


def start(arguments, processes=2, devices=1, slurm=False, only=range):
    """Processes with so many devices each, which are one run: told so by flags, or as Slurm tells.

    `only` says which of them, and when each.
    """
    command = [sys.executable, "-m", "adamjax", "train", "--distributed", *arguments]
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": paths}
    port, started = free_port(), []
    for i in only(processes):
        place = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes), "--process-id", str(i)]
        job = {"JOB_ID": str(port), "NTASKS": str(processes), "PROCID": str(i), "LOCALID": str(i)}
        job["STEP_NODELIST"] = "localhost"
        told = {f"SLURM_{name}": x for name, x in job.items()} if slurm else {}
        started.append(
            subprocess.Popen(
                command if slurm else command + place,
                env=environment | told,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def finish(started, timeout=300):
    """Wait for them: their exit codes, and what they said."""
    said = [process.communicate(timeout=timeout) for process in started]
    return [process.returncode for process in started], said


def wait_for(there, started, timeout=300):
    """Until there is something, while they run."""
    deadline = time.monotonic() + timeout
    while not there():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in started), finish(started)
        time.sleep(0.02)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of a run of one process with two devices."""
    folder = tmp_path_factory.mktemp("one") / "run"
    codes, said = finish(start([*RUN, "--out", str(folder)], processes=1, devices=2))
    assert codes == [0], said
    return folder


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(("number", "heard_by"), [(signal.SIGINT, 1), (signal.SIGTERM, 0)])
def test_two_processes_that_a_signal_stops_are_one_with_two_devices(one, tmp_path, number, heard_by):
    """One of them gets the signal; two others go on, to what would have come."""
    out = tmp_path / "run"
    started = start([*RUN, "--out", str(out)])
    wait_for(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") > 1, started)
    started[heard_by].send_signal(number)
    codes, said = finish(started, timeout=30)
    assert codes == [130, 130], said
    assert f"adamjax train --resume {out} goes on" in said[0][1]
    codes, said = finish(start(["--resume", str(out)]))
    assert codes == [0, 0], said
    assert "validation after 60 steps" in said[0][0]
    assert "validation" not in said[1][0]
    assert Train().result(out) == Train().result(one)
    assert (out / "diagnostics.png").exists()


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(("killed", "after"), [(1, 1), (0, 4)])
def test_a_killed_process_ends_the_other_and_another_number_goes_on(tmp_path, killed, after):
    """To the loss of one device, without any of this."""
    out = tmp_path / "run"
    started = start(["--steps=30", "--checkpoint-every=10", "--out", str(out)])
    wait_for((out / "checkpoints" / "10").exists, started)
    started[killed].kill()
    codes, said = finish(started, timeout=90)
    assert codes[killed] == -signal.SIGKILL
    for i, (code, (_, errors)) in enumerate(zip(codes, said, strict=True)):
        assert code != 0
        assert f"adamjax: process {i} of 2 ended before the run did" in errors.splitlines()[-1]
        assert f"Started again with --resume {out}" in errors.splitlines()[-1]
    codes, said = finish(start(["--resume", str(out)], processes=after))
    assert codes == [0] * after, said
    arguments = ["train", "--steps=30", "--out", str(tmp_path / "alone")]
    assert cli.main(arguments) == 0
    found, expected = read_metrics(out), read_metrics(tmp_path / "alone")
    assert found[-1]["step"] == 30
    assert_close(found, expected, PROCESSES)


@pytest.mark.slow
@pytest.mark.processes
def test_a_pause_changes_nothing(one, tmp_path):
    out = tmp_path / "run"
    started = start([*RUN, "--out", str(out)])
    wait_for((out / "metrics.jsonl").exists, started)
    started[0].send_signal(signal.SIGSTOP)
    time.sleep(15)
    started[0].send_signal(signal.SIGCONT)
    codes, said = finish(started, timeout=120)
    assert codes == [0, 0], said
    assert Train().result(out) == Train().result(one)


@pytest.mark.slow
@pytest.mark.processes
def test_a_process_that_comes_late_is_waited_for_and_one_that_does_not_is_not(tmp_path):
    def late(processes):
        for i in range(processes):
            yield i
            time.sleep(5 * (i + 1 < processes))

    codes, said = finish(start(["--steps=2", "--out", str(tmp_path / "run")], only=late))
    assert codes == [0, 0], said
    for i in range(2):
        (code,), ((_, errors),) = finish(start(["--start-timeout=3"], only=lambda _, i=i: [i]), timeout=60)
        assert code != 0
        assert f"adamjax: process {i} of 2 did not meet the others within 3 s: start all of" in errors.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.processes
def test_a_process_that_hangs_ends_all(tmp_path):
    out = tmp_path / "run"
    flags = ["--steps=40", "--report-every=1", "--checkpoint-every=5", "--stall-timeout=20", "--out", str(out)]
    codes, said = finish(start(["fed:HangsInTheSecondProcess", *flags]), timeout=120)
    assert all(codes)
    for i, (_, errors) in enumerate(said):
        assert f"adamjax: process {i} of 2 ended before the run did" in errors.splitlines()[-1]
        assert f"Started again with --resume {out}" in errors.splitlines()[-1]
    assert any("made no update for 20 s, so one of them hangs" in errors for _, errors in said)
    assert adamjax.checkpoint.steps(out / "checkpoints")


@pytest.mark.slow
def test_what_one_refuses_ends_all(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    codes, said = finish(start([*RUN, "--out", str(tmp_path)], slurm=True), timeout=60)
    assert codes[0] == 2
    assert codes[1] != 0
    assert "already holds a run" in said[0][1]
    assert "process 1 of 2 ended before the run did" in said[1][1]
    assert not (tmp_path / "config.json").exists()


MESH = make_mesh(AxisType.Auto, (4, 2), ("a", "b"))


def losses(*arguments, **options):
    reports = list(training.train(*arguments, steps=30, **options))
    return np.concatenate([report.losses for report in reports]), reports[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "spread",
    [
        lambda opt: opt,
        lambda opt: sharding.zero1(opt, axis=("a", "b"), mesh=MESH),
        lambda opt: adamjax.skip_nonfinite(sharding.zero1(opt, axis="a", mesh=MESH)),
    ],
)
def test_train_on_a_mesh(spread):
    problem, opt = problems.digits(batch_size=40), adamjax.adamw(1e-3)
    found, last = losses(problem, spread(opt), mesh=MESH)
    expected, alone = losses(problem, opt)
    assert_close(found, expected, RECOMPILED)
    assert_close(last.metrics, alone.metrics, RECOMPILED)
    assert all(p.sharding.is_fully_replicated and p.sharding.mesh == MESH for p in jax.tree.leaves(last.params))
    whole = [x.sharding.is_fully_replicated for x in jax.tree.leaves(last.state) if x.shape == (64, 128)]
    assert whole == [spread(opt) is opt] * 2


@pytest.mark.slow
def test_all_go_on_from_the_same_whole_step(tmp_path):
    out = tmp_path / "run"
    run = ["--steps=40", "--report-every=10", "--checkpoint-every=10", "--out", str(out)]
    codes, said = finish(start(run))
    assert codes == [0, 0], said
    expected = Train().result(out)
    damaged = max((out / "checkpoints" / "40").rglob("d/*"), key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    codes, said = finish(start(["--resume", str(out)]))
    assert codes == [0, 0], said
    assert f"adamjax: {damaged} is damaged (its size is wrong): going on from step 30" in said[0][1]
    assert "damaged" not in said[1][1]
    assert Train().result(out) == expected


def test_a_run_on_a_mesh_goes_on():
    mesh = make_mesh(AxisType.Auto, (4,), ("a",))
    opt = sharding.zero1(adamjax.adamw(1e-2), axis="a", mesh=mesh)
    _, whole = losses(BOWL, opt, mesh=mesh, diagnose=True)
    *_, half = training.train(BOWL, opt, steps=15, mesh=mesh)
    _, rest = losses(BOWL, opt, mesh=mesh, start=half)
    assert_equal((rest.params, rest.state), (whole.params, whole.state))


@pytest.mark.parametrize(
    ("problem", "mesh", "error", "message"),
    [
        (BOWL, MESH, ValueError, r"batch has shape \(4,\), and 8 devices cannot share 4 rows equally: choose a batch"),
        (problems.digits(batch_size=6), MESH, ValueError, r"batch\[0\] has shape \(6, 64\), and 8 devices"),
        (BOWL, make_mesh(AxisType.Explicit), TypeError, "with axes in Auto mode"),
        (BOWL, "data", TypeError, "Invalid mesh value: 'data'"),
    ],
)
def test_bad_meshes(problem, mesh, error, message):
    with pytest.raises(error, match=message):
        training.train(problem, adamjax.adam(), steps=1, mesh=mesh)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--processes 2", "--processes is for --distributed, which was not given"),
        ("--distributed", "it needs --coordinator, --processes and --process-id"),
        ("--distributed --processes 0", "Invalid processes value: 0"),
        ("--distributed --processes 2 --process-id 2", "Invalid process_id value: 2; it must be below --processes, 2"),
        ("--distributed --processes 1 bowl:BOWL", "8 devices cannot share 4 rows"),
    ],
)
def test_bad_flags(flags, said, tmp_path, capsys):
    assert cli.main(["train", "--out", str(tmp_path / "run"), *flags.split()]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_how_a_run_is_distributed_is_no_part_of_it(tmp_path, capsys):
    """But that it is: the state is another one then."""
    flags = ["--steps=4", "--checkpoint-every=2", "--batch-size=8", "--out", str(tmp_path / "run")]
    assert cli.main(["train", "--distributed", "--processes=1", *flags]) == 0
    config = (tmp_path / "run" / "config.json").read_text()
    assert '"distributed": true' in config
    assert "processes" not in config
    assert cli.main(["train", "--resume", str(tmp_path / "run"), "--processes=1"]) == 0
    assert "is finished" in capsys.readouterr().out
    flags[-1] = str(tmp_path / "alone")
    assert cli.main(["train", *flags]) == 0
    assert cli.main(["train", "--resume", str(tmp_path / "alone"), "--distributed", "--processes=1"]) == 2
    assert "--distributed was not given, here it is True" in capsys.readouterr().err
