"""`adamjax train --distributed`: one run of many processes, over all their devices."""

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from adamjax._core import checks
from adamjax.cli._flags import CommandError, Flags, flag

# Where a run is, and not what: another place gives the same result.
PLACE: Flags = {
    "coordinator": {"metavar": "HOST:PORT", "help": "where the processes meet: a free port of the host of process 0"},
    "processes": {"type": int, "help": "how many there are; 1: only this one, with all its devices"},
    "process_id": {"type": int, "help": "which of them this one is, from 0"},
}

# Longer, a process that is gone goes unnoticed; shorter, one that is only slow is taken for gone.
_HEARTBEAT_SECONDS = 10
_LONGEST_PATH = 4096
# JAX ends a process that has lost the others, and a signal may: what it would say then, another one has to say.
_WATCH = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"


class Group(NamedTuple):
    """The processes of a run, seen from one of them.

    Fields:
      mesh: All their devices; None if the run is not distributed, and on one device.
    """

    mesh: Mesh | None = None

    @property
    def leads(self) -> bool:
        """Whether it is this one that says and writes what is to be said and written once."""
        return jax.process_index() == 0

    def any(self, stop: Callable[[], bool]) -> Callable[[], bool]:
        """Whether any of them says so: all have to ask."""
        if jax.process_count() == 1:
            return stop
        return lambda: bool(multihost_utils.process_allgather(np.asarray(stop())).any())

    def agreed(self, path: Path) -> Path:
        """That of the one that leads."""
        if jax.process_count() == 1:
            return path
        text = os.fsencode(path)
        padded = np.frombuffer(text.ljust(_LONGEST_PATH, b"\0"), np.uint8)
        return Path(os.fsdecode(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes().rstrip(b"\0")))

    @contextmanager
    def watched(self, folder: Path | None) -> Iterator[None]:
        """Within, whatever ends this process, another one says in words what that means for the run in `folder`.

        Which is None where it is still to be chosen.
        """
        if jax.process_count() == 1:
            yield
            return
        said = (
            f"adamjax: process {jax.process_index()} of {jax.process_count()} ended before the run did: by an error of "
            "its own that stands above, by a signal, or because it lost another process (see what that one says). "
            f"Started again with --resume {folder or 'and its folder'}, on any number of processes, the run goes on "
            "from its last checkpoint."
        )
        # In a session of its own: no Ctrl-C ends it.
        command = [sys.executable, "-c", _WATCH, said]
        watch = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        try:
            yield
        except CommandError:
            watch.communicate(b"done")
            raise
        watch.communicate(b"done")


@contextmanager
def joined(options: dict[str, Any]) -> Iterator[Group]:
    """The group of processes that the flags say, or that the cluster has started.

    Raises:
      CommandError: They do not fit together, or there is no such cluster.
    """
    if not options.get("distributed"):
        for name in PLACE:
            if name in options:
                raise CommandError(f"{flag(name)} is for --distributed, which was not given")
        yield Group()
        return
    _join(options.get("coordinator"), options.get("processes"), options.get("process_id"))
    group = Group(jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,)))
    try:
        yield group
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        # To leave in good order, it would wait for the others, and these for it.
        if isinstance(error, CommandError):
            code = error.report()
        else:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _join(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    try:
        if processes is not None:
            checks.count("processes", processes)
        if process_id is not None:
            checks.count("process_id", process_id, least=0)
        if processes == 1:
            return
        if processes is not None and process_id is not None and process_id >= processes:
            raise ValueError(f"Invalid process_id value: {process_id}; it must be below --processes, {processes}")
        jax.distributed.initialize(coordinator, processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CommandError(
            f"--distributed: {error} (outside of Slurm, Open MPI, Kubernetes and the other clusters that JAX "
            "knows, it needs --coordinator, --processes and --process-id)"
        ) from error
