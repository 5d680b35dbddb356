"""`adamjax train --distributed`: one run of many processes, over all their devices."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from adamjax import training
from adamjax._core import checks
from adamjax.cli import _watch
from adamjax.cli._flags import CommandError, Flags, Options, flag

# These flags say where a run takes place. They do not change its result, and are not kept with it.
DISTRIBUTED_FLAGS: Flags = {
    "coordinator": {
        "metavar": "HOST:PORT",
        "help": "address at which the processes meet, a free port of process 0 (default: the cluster's)",
    },
    "processes": {
        "type": int,
        "help": "number of processes; 1: only this one, with all its devices (default: the cluster's)",
    },
    "process_id": {"type": int, "help": "number of this process, from 0 (default: the cluster's)"},
    "start_timeout": {"type": int, "help": "seconds to wait for the other processes at the start (default: 300)"},
    "stall_timeout": {
        "type": int,
        "help": "seconds without an update after which a process gives up, as one that waits for another in vain does; "
        "compilation and evaluations must be shorter (default: 3600)",
    },
}
_START_SECONDS, _STALL_SECONDS = 300, 3600

# With a longer timeout, a lost process goes unnoticed; with a shorter one, a paused process is taken for lost.
_HEARTBEAT_SECONDS = 40


class ProcessGroup(NamedTuple):
    """The processes of a run, seen from one of them."""

    mesh: Mesh | None = None  # of all their devices; None if the run is not distributed, but on one device
    timer: _watch.StallTimer | None = None  # None for one process

    @property
    def is_leader(self) -> bool:
        """Whether this process prints and writes for all."""
        return jax.process_index() == 0

    @contextmanager
    def stop_on_signals(self) -> Iterator[Callable[[], bool]]:
        """Yield a function that tells whether a signal asked any process to stop. All call it after each update."""
        with training.stop_on_signals() as stop:
            yield stop if self.timer is None else self.timer.around(stop)

    @contextmanager
    def watched(self, folder: Path | None) -> Iterator[None]:
        """End this process in bounded time, and explain an early end: how to resume the run in `folder`.

        `folder` is None if it is still to be chosen.
        """
        if self.timer is None:
            yield
            return
        message = (
            f"adamjax: process {jax.process_index()} of {jax.process_count()} ended before the run did: by an error of "
            "its own, printed above, by a signal, or because it lost another process (see its output). "
            f"Started again with --resume {folder or 'and its folder'}, on any number of processes, the run goes on "
            "from its last checkpoint."
        )
        with _watch.explained(message):
            yield
            self.timer.stop()


@contextmanager
def process_group(options: Options) -> Iterator[ProcessGroup]:
    """Join the group of processes that the flags describe, or that the cluster has started."""
    if not options.get("distributed"):
        for name in DISTRIBUTED_FLAGS:
            if name in options:
                raise CommandError(f"{flag(name)} is for --distributed, which was not given")
        yield ProcessGroup()
        return
    _initialize(options)
    alone = jax.process_count() == 1
    timer = None if alone else _watch.StallTimer(options.get("stall_timeout", _STALL_SECONDS))
    group = ProcessGroup(training.data_mesh(), timer)
    try:
        yield group
    except BaseException as error:
        if alone:
            raise
        # An orderly exit would wait for the other processes, which wait for this one.
        if isinstance(error, CommandError):
            code = error.show("train")
        else:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _initialize(options: Options) -> None:
    coordinator, processes, process_id = (options.get(name) for name in ("coordinator", "processes", "process_id"))
    try:
        for name, least in (("processes", 1), ("process_id", 0), ("start_timeout", 1), ("stall_timeout", 1)):
            if name in options:
                checks.count(name, options[name], least)
        if processes is not None and process_id is not None and process_id >= processes > 1:
            raise ValueError(f"Invalid process_id value: {process_id}; it must be below --processes, {processes}")
    except (TypeError, ValueError) as error:
        raise CommandError(f"--distributed: {error}") from error
    if processes == 1:
        return
    # By which signals stop a run, whatever the environment says.
    jax.config.update("jax_enable_preemption_service", True)
    seconds = options.get("start_timeout", _START_SECONDS)
    with _watch.explained(_not_met(options, seconds)):
        try:
            jax.distributed.initialize(
                coordinator,
                processes,
                process_id,
                initialization_timeout=seconds,
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise CommandError(
                f"--distributed: {error} (outside of Slurm, Open MPI, Kubernetes and the other clusters that JAX "
                "knows, it needs --coordinator, --processes and --process-id)"
            ) from error


def _not_met(options: Options, seconds: int) -> str:
    """Return the message of a process that did not meet the others."""
    known = {"process_id", "processes"} <= options.keys()
    numbers = f" {options['process_id']} of {options['processes']}" if known else ""
    return (
        f"adamjax: process{numbers} did not meet the others within {seconds} s: start all of them with the same "
        "--coordinator and --processes and each its own --process-id, at about the same time, or wait longer by "
        "--start-timeout; what the run had done before is in its folder, and --resume goes on"
    )
