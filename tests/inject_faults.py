"""Runs on disks that fail end as they should:  python tests/inject_faults.py --times 100

Runs `adamjax.checkpoint.save`, `adamjax train` and `adamjax tune`, lets their disk fail, kills them, cuts the power,
sends signals and damages their files. Then it checks that nothing is lost: what was reported as saved is there, nothing
wrong is restored, and a program that cannot go on says why. It prints how many faults were tried, and how they ended:

  survived  all that was reported as saved is there, and the program goes on as if there had been no fault
  said      the program says what is wrong in a sentence, by a documented error
  altered   text that carries no digest was changed and still reads well, as if its owner had edited it
  lost      anything else
"""

import argparse
import shutil
import sys
import time
from collections import Counter

from faults import shim

# How many faults of a kind there are for one in `--times`, as they differ in what they cost.
FAULTS = {"error": 1, "full": 1, "short": 1, "read": 1, "damage": 2, "power": 2, "kill": 1, "sigkill": 0.1, "signal": 1}
PROGRAMS = {"checkpoint.save": 4, "adamjax train": 1, "adamjax tune": 1}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="faults of a kind, more of those that are cheap")
    parser.add_argument("--seed", default="0", help="of what happens when (default: 0)")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="default: all")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="default: all")
    options = parser.parse_args()
    scratch = shim.run_again_with_shim()
    from faults import bench, programs  # by which time the shim is there

    begun, totals = time.monotonic(), {fault: Counter() for fault in FAULTS}
    for make in (programs.Save, programs.Train, programs.Tune):
        if make.name in options.programs:
            found = bench.Bench(make(scratch), scratch)
            for fault in options.faults:
                if make.is_command or fault not in bench.OF_COMMANDS:
                    times = max(round(PROGRAMS[make.name] * FAULTS[fault] * options.times), 1)
                    totals[fault] += found.campaign(fault, times, options.seed)
    rows = {getattr(bench.Bench, x).__doc__: [totals[x][end] for end in (*programs.Outcome, None)] for x in totals}
    print(table(rows))
    print(f"seed {options.seed}, {time.monotonic() - begun:.0f} s")
    shutil.rmtree(scratch)
    return 1 if any(counts[-1] for counts in rows.values()) else 0


def table(rows):
    """Return the figures as a table of Markdown."""
    lines = ["| fault | tried | survived | said | altered | lost |", "|---|--:|--:|--:|--:|--:|"]
    for name, counts in rows.items():
        if any(counts):
            lines.append(f"| {name} | {' | '.join(map(str, [sum(counts), *counts]))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
