"""The sdist and the wheels hold what they should, and work alone:  python tests/sdist_and_wheel.py --out dist

Builds the sdist, the wheel for all machines, and the wheel with compiled kernels for this one. Looks into them, and
installs each wheel with the lowest versions it allows into a fresh virtual environment. Trains there outside the
checkout, by plain steps and by fused ones: with compiled kernels, without a compiler and a cache. Has auditwheel check
the libraries that kernels need, and pyright find public names that have no type.
"""

import argparse
import email
import hashlib
import os
import platform
import re
import runpy
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
# Not of the package: a release is built where it is not installed.
VERSION = runpy.run_path(str(ROOT / "adamjax/_core/version.py"))["__version__"]
STEM = f"adamjax-{VERSION}"
PURE, COMPILED = (f"{STEM}-py3-none-{tag}.whl" for tag in ("any", f"manylinux_2_28_{platform.machine()}"))
LEVELS = runpy.run_path(str(ROOT / "adamjax/kernels/_flags.py"))["LEVELS"][platform.machine()]
# Files of all wheels beside Python; without them, no fused step, no pictures, and no types for those who import it.
DATA = {"adamjax/kernels/adam.cc", "adamjax/plots.mplstyle", "adamjax/py.typed"}
# Of each folder of the sdist, a file that it would be useless without.
SOURCES = [
    *("LICENSE", "PKG-INFO", "README.md", "pyproject.toml", ".ci/run", ".ci/kernels_hook.py", ".docs/conf.py"),
    ".github/CHANGELOG.md",
    *("adamjax/kernels/adam.cc", "benchmarks/__main__.py", "notebooks/quickstart.ipynb", "tests/conftest.py"),
    "tests/golden/torch.npz",
]


def packed(out):
    """Build all three; the paths of the sdist, the pure wheel and the one with compiled kernels."""
    run(sys.executable, "-m", "build", "--outdir", out, ROOT)
    with_kernels = os.environ | {"HATCH_BUILD_HOOK_ENABLE_CUSTOM": "true"}
    run(sys.executable, "-m", "build", "--wheel", "--outdir", out, ROOT, env=with_kernels)
    return out / f"{STEM}.tar.gz", out / PURE, out / COMPILED


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
        digests = {name: hashlib.sha256(file.read(name)).hexdigest() for name in names if name.endswith(".so")}
    modules = {str(module.relative_to(ROOT)) for module in (ROOT / "adamjax").rglob("*.py")}
    files = {name for name in names if ".dist-info/" not in name}
    equal(f"files of {path.name}", files - set(digests), modules | DATA)
    levels = LEVELS if path.name == COMPILED else ()
    kernels = {f"adamjax/kernels/prebuilt/adam-{level}" for level in levels}
    equal(f"kernels of {path.name}", {name.removesuffix(f"-{digest}.so") for name, digest in digests.items()}, kernels)
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


def check_libraries(wheel):
    """The oldest tag that auditwheel finds it fit for is not newer than the one it has."""
    found = re.search(r'platform\s+tag:\s+"manylinux_2_(\d+)_', run(sys.executable, "-m", "auditwheel", "show", wheel))
    equal("the kernels need a newer glibc than the wheel says", int(found[1]) > 28, False)
    headers = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]["dependencies"][0]
    lowest = [requirement.replace(">=", "==") for requirement in PROJECT["dependencies"]]
    equal("the headers are those of the oldest jaxlib", headers in lowest, True)


def check_readme():
    """The version stands in adamjax/_core/version.py; what quotes it follows."""
    newest = r"\n## (\d\S*)", ".github/CHANGELOG.md", "newest version of the changelog"
    cited = r"\n  version = \{(\S+)\}", "README.md", "cited version"
    for pattern, file, place in (newest, cited):
        equal(place, re.search(pattern, (ROOT / file).read_text())[1], VERSION)


def check_installed(pure, compiled, folder):
    """In an environment that has a wheel and the lowest it requires, and from a folder that is not the checkout."""
    environment, elsewhere = folder / "environment", folder / "elsewhere"
    venv.create(environment, with_pip=True)
    elsewhere.mkdir()
    python, command = environment / "bin" / "python", environment / "bin" / "adamjax"
    lowest = [requirement.replace(">=", "==") for requirement in PROJECT["dependencies"]]
    run(python, "-m", "pip", "install", "--quiet", pure, *lowest)
    equal("adamjax --version", run(command, "--version", cwd=elsewhere), f"adamjax {VERSION}\n")
    train = python, "-I", "-W", "error", ROOT / "tests" / "train_installed.py"
    print(run(*train, cwd=elsewhere), end="")
    run(python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", compiled)
    nothing = {"ADAMJAX_CACHE_DIR": "/proc/adamjax"}  # no compiler, no home, and a cache that nobody can write to
    for kernel in sorted(environment.glob("lib/python*/site-packages/adamjax/kernels/prebuilt/*.so"), reverse=True):
        print(run(*train, "--prebuilt", cwd=elsewhere, env=nothing), end="")
        kernel.unlink()  # then that of the next lower level is used
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
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder for all three (default: dist)")
    out = parser.parse_args().out.resolve()
    check_readme()
    sdist, pure, compiled = packed(out)
    check_sdist(sdist)
    check_wheel(pure)
    check_wheel(compiled)
    check_libraries(compiled)
    with tempfile.TemporaryDirectory() as folder:
        check_installed(pure, compiled, Path(folder))
    print(f"{sdist.name}, {pure.name} and {compiled.name} are as they should be")


if __name__ == "__main__":
    main()
