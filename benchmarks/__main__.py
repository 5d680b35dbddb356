"""Run benchmarks, and keep what they find:  python -m benchmarks [NAME ...] [--all] [--quick] [--out FOLDER]

Each runs in a process of its own, one after another. The folder gets `report.md`, with what was found, the machine it
was found on, and pictures; and `results.json`, with all that was timed. A name is that of a module: `step` is
`benchmarks/bench_step.py`. Without names, those run that take a minute or two, with `--all` also those that take up to
an hour. All are on the CPU but for `gpu`, which runs only if it is named.
"""

import argparse
import dataclasses
import json
import multiprocessing
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from adamjax._core.optional import require
from adamjax.run_folder import next_free
from benchmarks._machine import machine
from benchmarks._plots import draw
from benchmarks._report import Table, command, measured

SHORT = ["step", "trace", "memory", "donation", "sweep", "scale", "safety", "accuracy", "half_precision"]
LONG = ["storage", "tune", "range_test", "low_precision"]
NAMED = ["gpu"]


def main() -> int:
    given = arguments()
    require("matplotlib", "demo", "drawing what the benchmarks find")
    folder = given.out or next_free(Path("runs"), "benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    facts = machine()
    print("".join(f"{name}: {fact}\n" for name, fact in facts.items()), flush=True)
    found: dict[str, tuple[str, list[Table]]] = {}
    failed = []
    for name in given.names or SHORT + (LONG if given.all else []):
        print(f"## {name}\n", flush=True)
        try:
            # A process for each: they want other numbers of devices, and none is to have what another left in memory.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                found[name] = alone.submit(measured, name, given.quick).result()
        except Exception:
            traceback.print_exc()
            failed.append(name)
        write(folder, facts, found, given.quick)
    print(f"written to {folder}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    parser = command(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHORT + LONG + NAMED)}")
    parser.add_argument("--all", action="store_true", help=f"also {', '.join(LONG)}")
    parser.add_argument("--out", type=Path, help="the folder; else the next free runs/benchmarks-N")
    given = parser.parse_args()
    for name in given.names:
        if name not in SHORT + LONG + NAMED:
            parser.error(f"there is no benchmark {name}: choose among {', '.join(SHORT + LONG + NAMED)}")
    return given


def write(folder: Path, facts: dict[str, str], found: dict[str, tuple[str, list[Table]]], quick: bool) -> None:
    """`report.md`, `results.json` and the pictures."""
    lines = ["# Benchmarks", "", "| | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in facts.items()), ""]
    if quick:
        lines += ["With `--quick`: small sizes, to see that everything runs. These figures say nothing.", ""]
    for name, (doc, tables) in found.items():
        lines += [f"## {name}", "", doc.strip(), ""]
        for table in tables:
            lines.append(table.markdown())
            if table.picture is not None:
                draw(table, folder / f"{table.name}.png")
                lines += [f"![{table.title}]({table.name}.png)", ""]
    (folder / "report.md").write_text("\n".join(lines))
    results = {
        "machine": facts,
        "quick": quick,
        "benchmarks": {
            name: [{k: v for k, v in dataclasses.asdict(table).items() if k != "picture"} for table in tables]
            for name, (_, tables) in found.items()
        },
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1, default=plain) + "\n")


def plain(x: Any) -> Any:
    """Arrays and numbers of NumPy, as JSON has them."""
    return x.tolist() if isinstance(x, (np.ndarray, np.generic)) else x


if __name__ == "__main__":
    sys.exit(main())
