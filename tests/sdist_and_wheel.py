"""The sdist and the wheel hold what they should, and the wheel works alone:  python tests/sdist_and_wheel.py --out dist

Builds both, looks into them, installs the wheel with the lowest versions it allows into a fresh virtual environment,
trains there outside the checkout, by plain steps and by fused ones if there is a C++ compiler, and has pyright find
public names that have no type.
"""

import argparse
import email
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

from adamjax import __version__ as VERSION  # noqa: N812

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STEM = f"adamjax-{VERSION}"
# What the wheel is to have beside Python; without them, no fused step, and no types for those who import it.
DATA = {"adamjax/kernels/adam.cc", "adamjax/py.typed"}
# Of each folder of the sdist, a file that it would be useless without.
SOURCES = [
    *("LICENSE", "PKG-INFO", "README.md", "pyproject.toml", ".ci/run", ".docs/conf.py", ".github/CHANGELOG.md"),
    *("adamjax/kernels/adam.cc", "benchmarks/__main__.py", "notebooks/quickstart.ipynb", "tests/conftest.py"),
    "tests/golden/torch.npz",
]
TRAIN = """
import sys
import jax
import numpy as np
import adamjax

assert adamjax.__file__.startswith(sys.prefix), f"what is imported is {adamjax.__file__}"
problem = adamjax.problems.characters()


def trained(**options):
    *_, report = adamjax.training.train(problem, adamjax.adamw(1e-3, **options), steps=2)
    return jax.tree.leaves(report.params)


plain = trained()
try:
    adamjax.kernels.build()
except RuntimeError as error:
    print(error)
else:
    for x, y in zip(plain, trained(fused=True), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
"""


def packed(out):
    """Build both; the paths of the sdist and the wheel."""
    run(sys.executable, "-m", "build", "--outdir", out, ROOT)
    return out / f"{STEM}.tar.gz", out / f"{STEM}-py3-none-any.whl"


def check_sdist(path):
    with tarfile.open(path) as file:
        names = {name.removeprefix(f"{STEM}/") for name in file.getnames()}
    equal("what the sdist has not", set(SOURCES) - names, set())
    folders = {name.split("/")[0] for name in names}
    equal("top level of the sdist", folders, {name.split("/")[0] for name in SOURCES} | {".gitignore"})


def check_wheel(path):
    with zipfile.ZipFile(path) as file:
        names = set(file.namelist())
        about = email.message_from_bytes(file.read(f"{STEM}.dist-info/METADATA"))
        licence = file.read(f"{STEM}.dist-info/licenses/LICENSE")
    modules = {str(module.relative_to(ROOT)) for module in (ROOT / "adamjax").rglob("*.py")}
    equal("files of the wheel", {name for name in names if ".dist-info/" not in name}, modules | DATA)
    expected = {
        "Name": "adamjax",
        "Version": VERSION,
        "Summary": PROJECT["description"],
        "License-Expression": "Apache-2.0",
        "Requires-Python": PROJECT["requires-python"],
        "Description-Content-Type": "text/markdown",
    }
    equal("metadata", {name: about[name] for name in expected}, expected)
    equal("it has the licence", licence == (ROOT / "LICENSE").read_bytes(), True)
    readme = (ROOT / "README.md").read_bytes()
    equal("the description is the README", about.get_payload(decode=True) == readme, True)
    equal("extras", set(about.get_all("Provides-Extra")), set(PROJECT["optional-dependencies"]))


def check_readme():
    """The version stands in adamjax/_core/version.py; what quotes it follows."""
    newest = r"\n## (\d\S*)", ".github/CHANGELOG.md", "newest version of the changelog"
    cited = r"\n  version = \{(\S+)\}", "README.md", "cited version"
    for pattern, file, place in (newest, cited):
        equal(place, re.search(pattern, (ROOT / file).read_text())[1], VERSION)


def check_installed(wheel, folder):
    """In an environment that has the wheel and the lowest it requires, and from a folder that is not the checkout."""
    environment, elsewhere = folder / "environment", folder / "elsewhere"
    venv.create(environment, with_pip=True)
    elsewhere.mkdir()
    python, command = environment / "bin" / "python", environment / "bin" / "adamjax"
    lowest = [requirement.replace(">=", "==") for requirement in PROJECT["dependencies"]]
    run(python, "-m", "pip", "install", "--quiet", wheel, *lowest)
    equal("adamjax --version", run(command, "--version", cwd=elsewhere), f"adamjax {VERSION}\n")
    print(run(python, "-I", "-W", "error", "-c", TRAIN, cwd=elsewhere), end="")
    # It looks at what `python` imports, whatever --pythonpath says; it fails if a name has no type.
    here = os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    said = run("pyright", "--verifytypes", "adamjax", "--ignoreexternal", cwd=elsewhere, env=here)
    equal("type completeness", re.search("Type completeness score: (.*)", said)[1], "100%")


def equal(what, found, expected):
    if found != expected:
        if isinstance(found, set):
            found, expected = found - expected, expected - found
        raise SystemExit(f"{what}: found {found!r}, expected {expected!r}")


def run(*command, **options):
    """Its output, if it succeeds."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}\nfailed: {' '.join(map(str, command))}")
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder for both (default: dist)")
    out = parser.parse_args().out.resolve()
    check_readme()
    sdist, wheel = packed(out)
    check_sdist(sdist)
    check_wheel(wheel)
    with tempfile.TemporaryDirectory() as folder:
        check_installed(wheel, Path(folder))
    print(f"{sdist.name} and {wheel.name} are as they should be")


if __name__ == "__main__":
    main()
