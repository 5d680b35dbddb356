"""Libraries that take optax's optimizers, with ours in their place:  python tests/client_suites.py [NAME ...]

The tests are those in each library's sdist on PyPI; for libraries without such tests, a few are in clients.py. The
libraries are installed into a temporary folder. A test that fails must fail with optax's optimizers too, or be listed
here with the reason. `NAME --checkout FOLDER` runs tests that only the library's repository has, from a checkout of it.
"""

import argparse
import datetime
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import NamedTuple

import optax
import pytest

import adamjax
from adamjax._transforms.base import Transformation

TESTS = Path(__file__).parent
NAMES = [
    *("adam", "adamw", "amsgrad", "nadam", "nadamw", "radam", "adamax", "adamaxw"),
    *("scale_by_adam", "scale_by_radam", "scale_by_adamax", "add_decayed_weights", "scale_by_learning_rate"),
]


def numpyro_adam(library):
    """Put the library's Adam in the place of NumPyro's own."""
    optim = importlib.import_module("numpyro.optim")

    def adam(step_size=1e-3, b1=0.9, b2=0.999, eps=1e-8):
        return optim.optax_to_numpyro(library.adam(step_size, b1, b2, eps))

    optim.Adam = adam


def fixed_seed(library):
    """BlackJAX' tests take the date for a seed: make that the same every day."""
    fixtures = importlib.import_module("tests.fixtures")
    fixtures.datetime = SimpleNamespace(date=SimpleNamespace(today=lambda: datetime.date(2026, 1, 1)))


class Client(NamedTuple):
    version: str
    packages: tuple[str, ...] = ()  # what it imports, beside our own test requirements
    sdist: tuple[str, ...] = ()  # tests in the sdist
    ours: tuple[str, ...] = ()  # tests in clients.py
    checkout: tuple[str, ...] = ()  # tests in the repository
    but: str = ""  # those that are left out, as pytest's -k takes them
    prepare: Callable[[ModuleType], None] | None = None  # given the library whose optimizers are used
    differs: Mapping[str, str] = MappingProxyType({})  # tests that fail on purpose, and the reason


CLIENTS = {
    "flax": Client(
        "0.12.8",
        sdist=(
            "tests/nnx/optimizer_test.py",
            "tests/nnx/ema_test.py",
            "tests/nnx/graph_utils_test.py::TestGraphUtils::test_cached_partial_docstring_example",
            "tests/nnx/graph_utils_test.py::TestUnpack::test_unpack_with_nnx_grad_and_optimizer",
            "tests/nnx/integration_test.py::TestIntegration::test_tree_mode_train_step",
            "tests/nnx/mutable_array_test.py::TestOptimizer",
            "tests/nnx/spmd_test.py::TestSPMD::test_separate_opt_sharding",
            "tests/nnx/spmd_test.py::TestSPMD::test_shard_optimizer_state",
            "tests/linen/linen_test.py::Fp8Test",
            "tests/cursor_test.py::CursorTest::test_set_and_build",
        ),
        but="linesearch",
        differs={"CursorTest::test_set_and_build": "parameters that are Python ints are refused"},
    ),
    "numpyro": Client(
        "0.22.0",
        packages=("multipledispatch==1.0.0",),
        sdist=("test/test_optimizers.py", "test/test_handlers.py::test_subsample_gradient"),
        ours=("test_numpyro_svi",),
        checkout=("test/infer/test_svi.py::test_beta_bernoulli", "test/infer/test_svi.py::test_stable_run"),
        prepare=numpyro_adam,
    ),
    "optimistix": Client(
        "0.1.0",
        packages=("diffrax==0.7.2", "lineax==0.1.1"),
        ours=("test_optimistix_minimise",),
        checkout=("tests/test_minimise.py::test_optax_recompilation",),
        differs={
            "tests/test_minimise.py::test_optax_recompilation": "optimistix sees no hyperparameters in optax.chain"
        },
    ),
    "blackjax": Client(
        "1.7.1",
        sdist=("tests/vi/test_meanfield_vi.py", "tests/vi/test_fullrank_vi.py", "tests/vi/test_svgd.py"),
        but="test_recover_posterior",  # one is of optax.sgd, the other takes long
        prepare=fixed_seed,
    ),
    "gpjax": Client(
        "1.0.0",
        packages=("beartype==0.23.1", "lineax==0.1.1", "multipledispatch==1.0.0", "numpyro==0.22.0", "paramax==0.0.5"),
        sdist=(
            "tests/test_fit.py::test_fit_gp_regression",
            "tests/test_fit.py::test_fitters_hold_frozen_parameter_constant",
            "tests/test_fit.py::test_fit_natgrads_simple",
            "tests/test_fit.py::test_fit_constant_mean_function_with_parameter",
            "tests/test_fit.py::test_check_optim_valid",
            "tests/test_fit.py::test_check_optim_invalid",
            "tests/test_integration_equinox.py::test_full_gp_training_roundtrip",
            "tests/test_integration_equinox.py::test_parameter_freezing_with_non_trainable",
        ),
        but="True or fit_scipy or fit_lbfgs",
    ),
    "keras": Client(
        "3.15.1",
        packages=("h5py==3.16.0", "namex==0.1.0", "optree==0.20.0"),
        ours=("test_keras_stateless_call",),
    ),
    "maxtext": Client("0.2.5", ours=("test_maxtext_factory",)),
}


def install(names, folder):
    """Unpack the sdists of clients whose tests are in them; install the other clients, and what they all import."""
    sdists = [name for name in names if CLIENTS[name].sdist]
    wheels = {f"{name}=={CLIENTS[name].version}" for name in names if name not in sdists}
    wheels.update(*(CLIENTS[name].packages for name in names))
    # MaxText asks for a newer Python than its factory needs.
    options = ["--no-deps", "--ignore-requires-python"]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if wheels:
        subprocess.run([*pip, "install", *options, "--target", folder / "packages", *sorted(wheels)], check=True)
    if sdists:
        pinned = [f"{name}=={CLIENTS[name].version}" for name in sdists]
        no_binary = f"--no-binary={','.join(sdists)}"
        subprocess.run([*pip, "download", *options, no_binary, "--dest", folder, *pinned], check=True)
    for archive in folder.glob("*.tar.gz"):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")


class Plugin:
    """Keeps the outcome of each test, and the tests that use an optimizer of ours."""

    def __init__(self):
        self.running, self.outcomes, self.use_ours = "", {}, set()

    def pytest_runtest_logstart(self, nodeid):
        self.running = nodeid

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            self.outcomes[report.nodeid] = report.outcome

    def watch(self):
        init = Transformation.init

        def watched(opt, params):
            self.use_ours.add(self.running)
            return init(opt, params)

        Transformation.init = watched


def run_here(name, library, root, tests):
    """Run tests about a client in this process.

    `library` is "adamjax" or "optax", whose optimizers the client's own tests get, or "both" for ours, which compare.
    """
    client, plugin = CLIENTS[name], Plugin()
    options = ["-q", "--tb=short", "-W", "ignore", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["-c", os.devnull, "--rootdir", root]
    if library != "both":
        optimizers = {"adamjax": adamjax, "optax": optax}[library]
        for optimizer in NAMES:
            setattr(optax, optimizer, getattr(optimizers, optimizer))
        if client.prepare:
            client.prepare(optimizers)
        if client.but:
            options += ["-k", f"not ({client.but})"]
    plugin.watch()
    return pytest.main([*options, *tests], plugins=[plugin]), plugin


def command(name, library, root, tests):
    return [sys.executable, str(Path(__file__).resolve()), *tests, "--here", name, library, str(root)]


def report(name, library, root, tests):
    """Run tests in this process, print the figures, and return what is wrong."""
    start = time.monotonic()
    code, plugin = run_here(name, library, root, tests)
    wrong = [] if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else [f"pytest ended with {code!r}"]
    if not plugin.use_ours and library != "optax":
        wrong.append("no test uses our optimizers")
    differs = CLIENTS[name].differs
    for test, outcome in plugin.outcomes.items():
        short = "::".join(test.split("::")[-2:])
        if short in differs:
            print(f"{short} differs on purpose: {differs[short]}")
            if outcome != "failed":
                wrong.append(f"{short} no longer differs")
        elif outcome == "failed":
            rerun = command(name, "optax", root, [test])
            if library == "adamjax" and subprocess.run(rerun, capture_output=True).returncode:
                print(f"{short} fails with optax's optimizers, too")
            else:
                wrong.append(f"{short} fails")
    outcomes = list(plugin.outcomes.values())
    counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))
    whose = "our lines" if library == "both" else "its own tests"
    seconds = time.monotonic() - start
    title = f"{name} {CLIENTS[name].version}, {whose}"
    print(f"{title}: {counts}; {len(plugin.use_ours)} use our optimizers; {seconds:.0f} s", *wrong, sep="\n  ")
    return wrong


def main(names, checkout):
    """Run the tests of clients, each in a process of its own, and return 1 if any are wrong."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        install(names, folder)
        runs = []
        for name in names:
            client = CLIENTS[name]
            if checkout:
                runs.append((name, "adamjax", checkout, client.checkout))
                continue
            if client.sdist:
                runs.append((name, "adamjax", folder / f"{name}-{client.version}", client.sdist))
            if client.ours:
                runs.append((name, "both", TESTS, [f"clients.py::{test}" for test in client.ours]))
        failed = False
        for name, library, root, tests in runs:
            paths = [str(root), str(folder / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "KERAS_BACKEND": "jax"}
            failed |= subprocess.run(command(name, library, root, tests), cwd=root, env=environment).returncode != 0
    return int(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(CLIENTS)}; all by default")
    parser.add_argument("--checkout", type=Path, help="of the repository of the one client that is named")
    parser.add_argument("--here", nargs=3, metavar=("NAME", "LIBRARY", "ROOT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:  # in a process that `main` started
        name, library, root = arguments.here
        sys.exit(bool(report(name, library, root, arguments.names)))
    if unknown := sorted(set(arguments.names) - CLIENTS.keys()):
        parser.error(f"{unknown} are not among {list(CLIENTS)}")
    if arguments.checkout and (len(arguments.names) != 1 or not CLIENTS[arguments.names[0]].checkout):
        parser.error(f"--checkout is for one of {[name for name in CLIENTS if CLIENTS[name].checkout]}")
    sys.exit(main(arguments.names or list(CLIENTS), arguments.checkout and arguments.checkout.resolve()))
