"""`adamjax doctor`."""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

import adamjax
from adamjax import kernels
from adamjax._core.text import printable
from adamjax.cli._flags import Options, Subparsers
from adamjax.kernels import _cache, _library

_NEEDED = ("jax", "jaxlib", "numpy", "chex")
_OPTIONAL = ("flax", "optax", "orbax-checkpoint", "torch", "optuna")
_VARIABLE = "ADAMJAX_CACHE_DIR"  # the only one of adamjax
_SHOWN_VARIABLES = re.compile("(ADAMJAX|JAX|XLA)_.*|CXX|CUDA_VISIBLE_DEVICES")
_START_SECONDS = 120
_STEP_ERROR, _ROUNDED = 1e-5, 1e-3  # of a step of length 1; the part of quantised numbers that may be rounded otherwise


class Check(NamedTuple):
    """One part of the installation: what was found, and what is wrong with it and what to do, or None."""

    name: str
    found: str
    wrong: str | None = None


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "doctor",
        help="examine the installation, for you and for bug reports",
        description="Print versions, variables, devices, the kernel of fused steps and both caches, compare a fused "
        "step with a plain one, and say what is wrong and what to do about it. The exit status is 1 if anything is. "
        "The first run may compile the kernel.",
    )
    parser.add_argument("--json", action="store_true", help="print the same as an object of JSON")


def run(options: Options) -> int:
    found = list[Check]()
    for check in _checks():
        found.append(check)
        if not options["json"]:  # at once: the next check may take its time
            print(printable(f"{check.name:20} {check.found}"), flush=True)
    wrong = {check.name: check.wrong for check in found if check.wrong is not None}
    if options["json"]:
        print(json.dumps({"found": {check.name: check.found for check in found}, "wrong": wrong}, indent=1))
    else:
        print("\nnothing is wrong" if not wrong else "")
        for name, what in wrong.items():
            print(printable(f"wrong: {name}: {what}"))
    return 1 if wrong else 0


def _checks() -> Iterator[Check]:
    yield Check("python", f"{platform.python_version()} on {platform.platform()}")
    yield Check("adamjax", f"{adamjax.__version__} in {Path(adamjax.__file__).parent}")
    yield from _packages()
    yield from _variables()
    fault = _start_fault()
    yield _devices() if fault is None else Check("devices", "none", fault)
    yield Check("cores", _cores())
    backend = jax.default_backend() if fault is None else "cpu"
    kernel = _kernel(backend)
    yield kernel
    yield _kernel_cache()
    yield _compilation_cache()
    if fault is None and kernel.wrong is None:
        yield _fused_step(backend)


def _packages() -> Iterator[Check]:
    least = _least_versions()
    for name in (*_NEEDED, *_OPTIONAL):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        wrong = None
        if _numbers(version) < _numbers(least.get(name, "0")):
            wrong = f"adamjax needs {least[name]} or later: pip install --upgrade '{name}>={least[name]}'"
        yield Check(name, version, wrong)


def _least_versions() -> dict[str, str]:
    """Return the oldest versions that adamjax and its extras take, by package."""
    try:
        requirements = metadata.requires("adamjax") or []
    except metadata.PackageNotFoundError:  # a checkout that is on the path
        return {}
    matches = (re.match(r"([\w.-]+)>=([\d.]+)", line) for line in requirements)
    return {match[1]: match[2] for match in matches if match}


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def _variables() -> Iterator[Check]:
    for name, x in sorted(os.environ.items()):
        if _SHOWN_VARIABLES.fullmatch(name):
            is_unknown = name.startswith("ADAMJAX_") and name != _VARIABLE
            yield Check(name, x, f"adamjax reads {_VARIABLE} alone: rename or unset this" if is_unknown else None)


def _devices() -> Check:
    counts = Counter(f"{device.platform} ({device.device_kind})" for device in jax.devices())
    found = ", ".join(f"{n} {device}" for device, n in counts.items())
    wrong, has_gpu = None, Path("/proc/driver/nvidia").exists()
    if has_gpu and jax.default_backend() == "cpu" and not jax.config.values["jax_platforms"]:
        wrong = (
            "JAX does not use this machine's NVIDIA GPU: pip install --upgrade 'jax[cuda13]', or set JAX_PLATFORMS=cpu "
            "if the CPU is meant"
        )
    return Check("devices", found, wrong)


def _start_fault() -> str | None:
    """Return the reason why JAX cannot start, or None. Another process tries, since a bad XLA_FLAGS ends it."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_START_SECONDS
        )
    except subprocess.TimeoutExpired:
        said = f"it takes more than {_START_SECONDS} s, as where another process holds the device"
    else:
        if done.returncode == 0:
            return None
        said = _reason(done.stderr)
    given = [name for name in ("JAX_PLATFORMS", "XLA_FLAGS") if name in os.environ]
    cure = f"correct or unset {' and '.join(given)}" if given else "install jax again, for this machine"
    return f"JAX cannot start ({said}): {cure}"


def _reason(output: str) -> str:
    """Return the line with the reason among the last words of a process: the first that XLA logged, or the last."""
    lines = output.strip().splitlines() or ["it says nothing"]
    logged = (re.match(r"[EF]\d{4} .*?\] (.*)", line) for line in lines)
    return next((match[1] for match in logged if match), lines[-1])


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} of {os.cpu_count()} for this process"


def _kernel(backend: str) -> Check:
    why = _library.shortage()
    return Check("kernel", _library.choice() if why is None else "there is none", why if backend == "cpu" else None)


def _kernel_cache() -> Check:
    try:
        path = _cache.folder()
        with _cache.scratch():  # it is writable
            pass
    except _cache.UnusableCacheError as error:
        is_needed = not any(kernel.current for kernel in kernels.status())
        return Check("kernel cache", "not usable" if is_needed else str(error), str(error) if is_needed else None)
    kept = [kernel for kernel in kernels.status() if kernel.path.parent == path]
    faults = [kernel.fault for kernel in kept if kernel.fault is not None]
    wrong = f"{faults[0]}: adamjax kernels clear removes it" if faults else None
    size = sum(kernel.size for kernel in kept) / 1e6
    return Check("kernel cache", f"{path}, writable; kernels: {len(kept)}, {size:.1f} MB", wrong)


def _compilation_cache() -> Check:
    name, folder = "compilation cache", jax.config.values["jax_compilation_cache_dir"]
    if not folder or not jax.config.values["jax_enable_compilation_cache"]:
        return Check(name, "off; JAX_COMPILATION_CACHE_DIR=FOLDER keeps compiled programs")
    if "://" in folder:
        return Check(name, folder)
    path = Path(folder).absolute()
    try:
        with tempfile.TemporaryFile(dir=next(p for p in (path, *path.parents) if p.exists())):
            return Check(name, f"{path}, writable")
    except OSError as error:
        wrong = f"JAX keeps nothing in {path} ({error.strerror}): name another folder by JAX_COMPILATION_CACHE_DIR"
        return Check(name, f"{path}, not writable", wrong)


def _fused_step(backend: str) -> Check:
    """Compare a fused step with a plain one, from the same state; on a CPU of float moments, else of quantised ones."""
    moments = None if backend == "cpu" else adamjax.quantized("int8")
    fused, plain = (adamjax.adam(1.0, mu_dtype=moments, nu_dtype=moments, fused=x) for x in (True, False))
    name = "fused step"
    try:
        with (
            jax.transfer_guard("allow"),
            warnings.catch_warnings(action="ignore", category=UserWarning),  # about the cache, which has its own check
        ):
            params = jnp.linspace(-1, 1, 16384, dtype=jnp.float32).reshape(64, 256)
            params, state = plain.step(jnp.sin(9 * params), plain.init(params), params)
            grads = jnp.cos(7 * params)
            (found, _), (right, _) = (opt.step(grads, state, params) for opt in (fused, plain))
            unequal = int(jnp.sum(~(jnp.abs(found - right) <= _STEP_ERROR)))
    except (RuntimeError, ValueError) as error:
        said = str(error).partition("\n")[0]
        # Few accelerators have a kernel, and XLA steps on all.
        return Check(name, "not possible" if backend == "cpu" else said, said if backend == "cpu" else None)
    if unequal <= (0 if moments is None else _ROUNDED * params.size):
        return Check(name, "equals a plain one")
    wrong = f"{unequal} of {params.size} numbers differ from a plain step: take fused=False, and report this, please"
    return Check(name, "differs from a plain one", wrong)
