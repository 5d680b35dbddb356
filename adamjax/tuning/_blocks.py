"""The batches of a population, in blocks: as many steps as one call of a compiled program makes."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core.typing import PyTree
from adamjax.problems._batches import AHEAD, prefetched, stacked
from adamjax.problems._task import Task

T = TypeVar("T")

Block = tuple[int, int, PyTree]  # the first step, the one after the last, and the batches if they come from the host


# Batches from the host go to the device in blocks: as many bytes at most, unless one batch has more, and as many steps.
BLOCK_BYTES, BLOCK_STEPS = 2**24, 64


class BatchSource:
    """The batches of the runs of a population, in blocks of up to `size` steps if they come from the host.

    All settings share them: a loader is advanced once a step and seed. Blocks end where the runs are evaluated.
    """

    def __init__(self, task: Task, seeds: np.ndarray, eval_steps: np.ndarray) -> None:
        self._task, self.seeds = task, seeds
        self.size = 0
        longest = int(np.diff(eval_steps, prepend=0).max())
        if task.is_fed:
            nbytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(task.batch_like))
            most = min(max(BLOCK_BYTES // max(nbytes * len(seeds), 1), 1), BLOCK_STEPS)
            self.size = -(-longest // -(-longest // most))  # blocks of one length, to fill up few of them
        self._ranges: list[list[tuple[int, int]]] = []
        for first, last in itertools.pairwise([0, *eval_steps.tolist()]):
            starts = range(first, last, self.size or last - first)
            self._ranges.append([(start, min(start + starts.step, last)) for start in starts])

    def blocks(self) -> Iterator[Iterable[Block]]:
        """Yield the blocks up to each evaluation."""
        ranges = itertools.chain.from_iterable(self._ranges)
        feed: Iterator[Block] = ((first, last, None) for first, last in ranges)
        if self._task.is_fed:
            streams = [self._task.stream(seed) for seed in self.seeds.tolist()]
            feed = prefetched(stacked(streams, ranges, self.size))
        for some in self._ranges:
            yield itertools.islice(feed, len(some))

    def example(self) -> PyTree:
        """Zeros like the batches of a block."""
        shape = (len(self.seeds), self.size)
        return jax.tree.map(lambda x: np.zeros((*shape, *x.shape), x.dtype), self._task.batch_like)


def mean_losses(
    advance: Callable[[T, Block], tuple[T, jax.Array]], members: T, blocks: Iterable[Block]
) -> tuple[T, jax.Array]:
    """Make the steps of the blocks by `advance`, which returns sums of losses; return the members and the means."""
    totals: list[jax.Array] = []
    steps = 0
    for block in blocks:
        members, total = advance(members, block)
        totals.append(total)
        steps += block[1] - block[0]
        if len(totals) > AHEAD:  # or batches would wait for the device, and fill its memory
            totals[-1 - AHEAD].block_until_ready()
    return members, functools.reduce(jnp.add, totals) / np.float32(steps)
