"""Run benchmarks, and write a report:  python -m benchmarks [NAME ...] [--all] [--quick] [--out FOLDER]

The benchmarks run one after another, each in its own process. The folder gets `report.md`, with the figures, the
machine they were measured on, and plots; and `results.json`, with all timings. The name `step` stands for
`benchmarks/bench_step.py`. Without names, the benchmarks that take a minute or two run; with `--all`, also those that
take up to an hour. All run on the CPU except `gpu`, which runs only if it is named.
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
from adamjax.run_folder import claim
from benchmarks._machine import machine
from benchmarks._plots import draw
from benchmarks._report import Table, command, measured

SHORT = ["step", "trace", "memory", "donation", "sweep", "scale", "safety", "accuracy", "half_precision"]
SHORT += ["host_batches", "kernel", "checkpoint", "slow_mean"]
LONG = ["storage", "tune", "race", "horizon", "range_test", "low_precision", "transfer"]
NAMED = ["gpu"]


def main() -> int:
    given = arguments()
    require("matplotlib", "demo", "plotting the results of the benchmarks")
    folder = given.out or claim(Path("runs"), "benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    facts = machine()
    print("".join(f"{name}: {fact}\n" for name, fact in facts.items()), flush=True)
    found: dict[str, tuple[str, list[Table]]] = {}
    failed = []
    for name in given.names or SHORT + (LONG if given.all else []):
        print(f"## {name}\n", flush=True)
        try:
            # Each has its own process: they need different numbers of devices, and a clean memory.
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
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(SHORT + LONG + NAMED)}")
    parser.add_argument("--all", action="store_true", help=f"also {', '.join(LONG)}")
    parser.add_argument("--out", type=Path, help="folder to write (default: the next free runs/benchmarks-N)")
    given = parser.parse_args()
    for name in given.names:
        if name not in SHORT + LONG + NAMED:
            parser.error(f"there is no benchmark {name}: choose among {', '.join(SHORT + LONG + NAMED)}")
    return given


def write(folder: Path, facts: dict[str, str], found: dict[str, tuple[str, list[Table]]], quick: bool) -> None:
    """Write `report.md`, `results.json` and the plots."""
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
    """Convert NumPy's arrays and numbers to JSON's types."""
    return x.tolist() if isinstance(x, (np.ndarray, np.generic)) else x


if __name__ == "__main__":
    sys.exit(main())
