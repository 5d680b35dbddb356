"""Compile the kernels of a wheel for Linux:  HATCH_BUILD_HOOK_ENABLE_CUSTOM=true python -m build --wheel

Without that variable, a wheel has no compiled kernels and is for all machines. Zig's C++ compiler links a runtime of
its own and takes the symbols of an old glibc. The headers are those of the oldest jaxlib that adamjax supports, because
a jaxlib refuses handlers that are newer than itself.
"""

import hashlib
import os
import platform
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "adamjax" / "kernels"
GLIBC = 2, 28


class KernelsHook(BuildHookInterface):
    """Adds a kernel for each level of this machine's processors to the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        machine = platform.machine()
        self._folder = tempfile.TemporaryDirectory()
        for path in compile_kernels(machine, Path(self._folder.name)):
            build_data["force_include"][str(path)] = f"adamjax/kernels/prebuilt/{path.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}"


def compile_kernels(machine: str, folder: Path) -> list[Path]:
    """Compile the kernel for each level of a machine, into files whose names end with the digests of their contents."""
    settings = runpy.run_path(str(KERNELS / "_flags.py"))
    headers = next(iter(find_spec("jaxlib").submodule_search_locations)) + "/include"
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", f"{machine}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"]
    flags = [*settings["FLAGS"], *(settings["X86_FLAGS"] if machine == "x86_64" else ())]

    def compiled(level: str) -> Path:
        processor = level.replace("-", "_") if machine == "x86_64" else "generic"
        made = folder / f"{level}.o"
        run(
            *zig,
            f"-mcpu={processor}",
            *flags,
            "-fno-sanitize=undefined",
            "-w",
            f"-I{headers}",
            "-c",
            KERNELS / "adam.cc",
            "-o",
            made,
        )
        return made

    def linked(made: Path) -> Path:
        # For any processor, so that all have one and the same C++ runtime, which Zig compiles once.
        library = made.with_suffix(".so")
        run(*zig, "-O3", "-shared", "-s", "-Wl,-Bsymbolic", made, "-o", library)
        return library.rename(folder / f"adam-{made.stem}-{hashlib.sha256(library.read_bytes()).hexdigest()}.so")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [linked(made) for made in pool.map(compiled, settings["LEVELS"][machine])]


def run(*command: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr}\nfailed: {' '.join(map(str, command))}")
