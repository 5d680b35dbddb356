"""`adamjax train --distributed`: one run of many processes, over all their devices."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from adamjax import training
from adamjax._core import checks
from adamjax.cli import _signals
from adamjax.cli._flags import CommandError, Flags, Options, flag

# These flags say where a run takes place. They do not change its result, and are not kept with it.
DISTRIBUTED_FLAGS: Flags = {
    "coordinator": {"metavar": "HOST:PORT", "help": "address at which the processes meet: a free port of process 0"},
    "processes": {"type": int, "help": "number of processes; 1: only this one, with all its devices"},
    "process_id": {"type": int, "help": "number of this process, from 0"},
}

# With a longer timeout, a lost process goes unnoticed; with a shorter one, a slow process is taken for lost.
_HEARTBEAT_SECONDS = 10
# A watching process prints the message, since JAX or a signal may end this one before it could.
_WATCH = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr)"


class ProcessGroup(NamedTuple):
    """The processes of a run, seen from one of them."""

    mesh: Mesh | None = None  # of all their devices; None if the run is not distributed, but on one device

    @property
    def is_leader(self) -> bool:
        """Whether this process prints and writes for all."""
        return jax.process_index() == 0

    @contextmanager
    def stop_on_signals(self) -> Iterator[Callable[[], bool]]:
        """Yield a function that tells whether a signal asked any process to stop. All call it after each update."""
        stopped = threading.Event()
        if jax.process_count() == 1:
            with _signals.stop_on_signals(stopped.set):
                yield stopped.is_set
            return
        config: Any = jax.config  # whose options are added at run time
        if not config.jax_enable_preemption_service:
            with _signals.stop_on_signals(stopped.set):
                yield lambda: bool(multihost_utils.process_allgather(np.asarray(stopped.is_set())).any())
            return
        # The service hears SIGTERM in any process, and tells all of them the same update to stop after.
        others = [number for number in _signals.STOPS if number != signal.SIGTERM]
        updates = itertools.count()
        with _signals.stop_on_signals(lambda: os.kill(os.getpid(), signal.SIGTERM), others):
            yield lambda: multihost_utils.reached_preemption_sync_point(next(updates))

    @contextmanager
    def watched(self, folder: Path | None) -> Iterator[None]:
        """Have another process explain, if this one ends early for any reason, how to resume the run in `folder`.

        `folder` is None if it is still to be chosen.
        """
        if jax.process_count() == 1:
            yield
            return
        message = (
            f"adamjax: process {jax.process_index()} of {jax.process_count()} ended before the run did: by an error of "
            "its own, printed above, by a signal, or because it lost another process (see its output). "
            f"Started again with --resume {folder or 'and its folder'}, on any number of processes, the run goes on "
            "from its last checkpoint."
        )
        # A session of its own, so that Ctrl-C does not end it.
        command = [sys.executable, "-c", _WATCH, message]
        watch = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        try:
            yield
        except CommandError:
            watch.communicate(b"done")
            raise
        watch.communicate(b"done")


@contextmanager
def process_group(options: Options) -> Iterator[ProcessGroup]:
    """Join the group of processes that the flags describe, or that the cluster has started."""
    if not options.get("distributed"):
        for name in DISTRIBUTED_FLAGS:
            if name in options:
                raise CommandError(f"{flag(name)} is for --distributed, which was not given")
        yield ProcessGroup()
        return
    _initialize(options.get("coordinator"), options.get("processes"), options.get("process_id"))
    group = ProcessGroup(training.data_mesh())
    try:
        yield group
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        # An orderly exit would wait for the other processes, which wait for this one.
        if isinstance(error, CommandError):
            code = error.show()
        else:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _initialize(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
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
