"""Runs that are killed and resumed end as others do:  python tests/kill_and_resume.py --times 20

Starts `adamjax train` and `adamjax tune`, kills them at random moments by SIGKILL and resumes them, until each has
been killed that often, and compares what they leave with what an uninterrupted run leaves: parameters, optimizer
state, measurements, picture and report, to the last bit.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

TESTS = Path(__file__).parent
TRAIN = [
    *("train", "bowl:BOWL", "--steps=200", "--report-every=5", "--evaluate-every=20"),
    *("--checkpoint-every=5", "--dtype=bfloat16", "--rounding=kahan"),
]
TUNE = ["tune", "bowl:BOWL", "--steps=20", "--trials=10", "--stages", "learning_rate", "b1,b2", "--confirm", "2", "2"]


class Train:
    """`adamjax train`."""

    name = "train"

    def command(self, folder):
        """What starts it; what goes on with it, once it can be gone on with."""
        started = (folder / "config.json").exists()
        return ["train", "--resume", str(folder)] if started else [*TRAIN, "--out", str(folder)]

    def result(self, folder):
        """What is to be the same."""
        directory = folder / "checkpoints"
        step = max(ocp.utils.checkpoint_steps(directory))
        handlers = {"arrays": ocp.StandardCheckpointHandler(), "description": ocp.JsonCheckpointHandler()}
        with ocp.CheckpointManager(directory, item_handlers=handlers) as manager:
            # Where the arrays were may be nowhere here.
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), manager.item_metadata(step)["arrays"]
            )
            items = ocp.args.Composite(arrays=ocp.args.StandardRestore(like), description=ocp.args.JsonRestore())
            saved = manager.restore(step, args=items)
        arrays = {f"{tree} {path}": x for tree, part in saved["arrays"].items() for path, x in part.items()}
        files = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "curves.png")}
        bits = {path: (str(x.dtype), x.shape, np.asarray(x).tobytes()) for path, x in arrays.items()}
        # Files of equal arrays have other names in each run.
        description = {name: x for name, x in saved["description"].items() if name != "digest"}
        description["digests"] = description["digests"]["arrays"]
        return {"last checkpoint": step, "description": description} | files | bits

    def decided(self, folder):
        """A file with what a run decides by measuring time, which its results may depend on."""
        return None

    def stage(self, folder):
        """Where in its life it was killed."""
        if list(folder.glob("checkpoints/*tmp*")):
            return "in a save"
        directory = folder / "checkpoints"
        steps = ocp.utils.checkpoint_steps(directory) if directory.exists() else []
        return f"after step {max(steps, default=0)}"


class Tune:
    """`adamjax tune`."""

    name = "tune"

    def command(self, folder):
        return [*TUNE, "--out", str(folder), "--resume"]

    def result(self, folder):
        return json.loads((folder / "report.json").read_text())

    def decided(self, folder):
        return folder / "tune.json"

    def stage(self, folder):
        trials = folder / "trials.jsonl"
        return f"after {len(trials.read_text().splitlines()) if trials.exists() else 0} trials"


def has_written(folder, since):
    """Whether there is a file in the folder that is so new."""
    try:
        return any(path.stat().st_mtime > since for path in folder.rglob("*") if path.is_file())
    except FileNotFoundError:  # it has just removed one
        return True


def run(arguments, kill_after=None, once_it_writes_to=None):
    """Run adamjax; whether it ended by itself before so many seconds were over, else it was killed.

    They are counted from its start, or from when it writes into a folder.
    """
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    command = [sys.executable, "-m", "adamjax", *arguments]
    with tempfile.TemporaryFile() as said:
        begun = time.time()
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stdout=said, stderr=said)
        while once_it_writes_to and process.poll() is None and not has_written(once_it_writes_to, begun):
            time.sleep(0.01)
        try:
            code = process.wait(kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return False
        if code != 0:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{said.read().decode()}")
    return True


class Uninterrupted:
    """What runs leave that are not killed: one for each that decides otherwise."""

    def __init__(self, program, scratch):
        self.program, self.scratch, self.results = program, scratch, {}

    def __call__(self, decided=None):
        text = decided.read_text() if decided else ""
        if text not in self.results:
            folder = self.scratch / f"{self.program.name}-whole-{len(self.results)}"
            folder.mkdir()
            if decided:
                shutil.copy(decided, folder)
            run(self.program.command(folder))
            decided = self.program.decided(folder)
            text = decided.read_text() if decided else ""
            self.results[text] = self.program.result(folder)
        return self.results[text]


def kill_and_resume(program, scratch, *, times, seed=0, say=print):
    """Kill runs of a program `times` in all; the first difference to one that was not killed, or None."""
    rng, uninterrupted = np.random.default_rng(seed), Uninterrupted(program, scratch)
    begun = time.time()
    uninterrupted()
    life = time.time() - begun
    say(f"{program.name}: {life:.1f} s without being killed")
    # One in each part of its life, of which there are as many as kills. Every other one is counted from the first
    # file it writes, at about half its life: before that there is little to damage.
    moments = life / times * (rng.permutation(times) + rng.random(times))
    moments[::2] /= 2
    kills = runs = 0
    while kills < times:
        folder, runs = scratch / f"{program.name}-{runs}", runs + 1
        folder.mkdir()
        while True:
            begun, moment = time.time(), moments[kills] if kills < times else None
            writing = folder if kills % 2 == 0 and moment else None
            if run(program.command(folder), moment, writing):
                # The next run may be no longer than this one.
                moments[kills : kills + 1] /= 2
                break
            kills += 1
            stage = program.stage(folder) if has_written(folder, begun) else "before it wrote anything"
            after = f"{moment:.2f} s after its {'first file' if writing else 'start'}"
            say(f"{program.name}: kill {kills}, {after}, {stage}")
        found, expected = program.result(folder), uninterrupted(program.decided(folder))
        for name in expected | found:
            if expected.get(name) != found.get(name):
                return f"{folder}: {name} is {found.get(name)}, expected {expected.get(name)}"
    say(f"{program.name}: {kills} kills of {runs} runs, which end as if there had been none")
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="kills of each program (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    for program in (Train(), Tune()):
        difference = kill_and_resume(program, scratch, times=options.times, seed=options.seed)
        if difference is not None:
            print(difference)
            return 1
    shutil.rmtree(scratch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
