"""Batches from the host: those of one run, checked, and prepared by a thread while the device works."""

import contextlib
import inspect
import itertools
import queue
import threading
import warnings
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from adamjax._core.typing import PyTree

T = TypeVar("T")

AHEAD = 2  # items that a thread prepares

_opened = weakref.WeakSet[Any]()  # iterators that problems have returned


class BatchStream:
    """An iterator over the batches of a run, as NumPy arrays; all have the shapes and dtypes of the first.

    Args:
      problem: A problem with a method `batches`.
      seed: The seed of the run.
      first: The number of batches that the run has had already.
    """

    def __init__(self, problem: Any, seed: int, first: int = 0) -> None:
        starts = "start" in inspect.signature(problem.batches).parameters
        self.seed = seed
        self._name = f"{type(problem).__name__}.batches({seed})"
        self._step = first if starts else 0  # of the next batch
        self._ahead: PyTree = None
        self._like: PyTree = None
        self._told = False  # that short batches are dropped
        self._dropped = False  # the batch before
        self._source = problem.batches(seed, start=first) if first and starts else problem.batches(seed)
        if not hasattr(self._source, "__iter__"):
            raise TypeError(f"{self._name} returns a {type(self._source).__name__}, expected an iterable of batches")
        self._iterator = iter(self._source)
        self._refuse_used()
        while self._step < first:  # not so many draws, since short batches are dropped
            next(self)

    def __iter__(self) -> Iterator[PyTree]:
        return self

    def example(self) -> PyTree:
        """Return the first batch, which is still the next one afterwards."""
        if self._ahead is None:
            self._ahead = jax.tree.map(np.copy, next(self))  # the loader may use its memory again
        return self._ahead

    def __next__(self) -> PyTree:
        if self._ahead is not None:
            batch, self._ahead = self._ahead, None
            return batch
        while (batch := self._fitting(self._draw())) is None:
            pass
        self._step += 1
        return batch

    def close(self) -> None:
        """Close a generator, so that it can free what it holds."""
        if isinstance(self._iterator, Generator):
            self._iterator.close()

    def _refuse_used(self) -> None:
        """Refuse an iterator that another run has begun: this one would get what is left of it."""
        if self._iterator is not self._source:
            return
        with contextlib.suppress(TypeError):  # some of Python's own iterators cannot be remembered
            if self._iterator in _opened:
                raise ValueError(
                    f"{self._name} returns an iterator that another run has begun: make a new one at each call, so "
                    "that every run sees the batches of its seed"
                )
            _opened.add(self._iterator)

    def _draw(self) -> PyTree:
        """Return the next batch as the loader yields it; an error of the loader gets a note of the step."""
        for restarted in (False, True):
            try:
                return next(self._iterator)
            except StopIteration:
                if restarted or self._iterator is self._source:
                    break
                self._iterator = iter(self._source)
            except Exception as error:
                error.add_note(f"{self._name} raised this instead of the batch of step {self._step + 1}")
                raise
        if self._iterator is not self._source:
            raise ValueError(f"{self._name} is empty: it has no batch to train on")
        raise ValueError(
            f"{self._name} ended before step {self._step + 1}: let it go on for all steps (loop over the epochs), or "
            "return what can be started again, such as a list or a DataLoader"
        )

    def _fitting(self, batch: PyTree) -> PyTree | None:
        """Return the batch as arrays like those of the first one; None if it has fewer rows."""
        arrays = jax.tree.map_with_path(self._as_array, batch)
        if self._like is None:
            self._like = jax.tree.map(_canonical, arrays)
        structure, expected = (str(jax.tree.structure(tree)) for tree in (arrays, self._like))
        if structure != expected:
            raise ValueError(f"{self._at} is {structure}, and the first was {expected}: all batches need the same tree")
        found, first = jax.tree.leaves_with_path(arrays), jax.tree.leaves(self._like)
        pairs = [(path, x, like) for (path, x), like in zip(found, first, strict=True)]
        wrong = [(path, x, like) for path, x, like in pairs if x.shape != like.shape]
        if wrong and not self._dropped and all(_is_shorter(x, like) for _, x, like in pairs if like.shape):
            self._dropped = True
            self._warn_once(*wrong[0][1:])
            return None
        self._dropped = False
        for path, x, like in wrong:
            raise ValueError(
                f"{self._at}{jax.tree_util.keystr(path)} has shape {x.shape}, and the first had {like.shape}: "
                "a program is compiled for one shape, so pad the arrays, or choose rows of one length"
            )
        return jax.tree.map(lambda x, like: x.astype(like.dtype, copy=False), arrays, self._like)

    @property
    def _at(self) -> str:
        return f"the batch of step {self._step + 1} of {self._name}"

    def _as_array(self, path: Any, x: Any) -> np.ndarray:
        array = np.asarray(x)
        if array.dtype.kind not in "biufcV":
            raise TypeError(
                f"{self._at}{jax.tree_util.keystr(path)} is {type(x).__name__} of {array.dtype}: "
                "a batch is a pytree of arrays of numbers"
            )
        return array

    def _warn_once(self, x: np.ndarray, like: jax.ShapeDtypeStruct) -> None:
        if not self._told:
            self._told = True
            warnings.warn(
                f"{self._at} has {len(x)} rows, and the first had {like.shape[0]}: short batches are dropped, so "
                "shuffle each epoch anew, or choose a batch size that divides the data",
                stacklevel=2,
            )


def _canonical(x: np.ndarray) -> jax.ShapeDtypeStruct:
    # Decided once, since a context such as that of x64 mode does not reach the thread that reads the others.
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))


def _is_shorter(x: np.ndarray, like: jax.ShapeDtypeStruct) -> bool:
    return x.ndim == len(like.shape) and x.shape[1:] == like.shape[1:] and x.shape[0] < like.shape[0]


def stacked(
    streams: Sequence[BatchStream], ranges: Iterable[tuple[int, int]], size: int
) -> Generator[tuple[int, int, PyTree], None, None]:
    """Yield each range of steps with its batches from all streams: arrays of [streams, size, ...].

    Zeros fill up a range of fewer than `size` steps, so that one program serves all of them.
    """
    try:
        for first, last in ranges:
            block: PyTree = None
            for i, k in itertools.product(range(last - first), range(len(streams))):
                batch = next(streams[k])
                if block is None:
                    block = jax.tree.map(lambda x: np.zeros((len(streams), size, *x.shape), x.dtype), batch)
                # At once, since a loader may use the memory of a batch again for the next one.
                jax.tree.map(lambda y, x, at=(k, i): y.__setitem__(at, x), block, batch)
            yield first, last, block
    finally:
        for stream in streams:
            stream.close()


def prefetched(items: Generator[T, None, None]) -> Iterator[T]:
    """Yield the items of a generator that a thread advances, a few items ahead; raise its error in its turn."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(AHEAD)
    stopped = threading.Event()

    def work() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                ready.put((item, None))
                if stopped.is_set():
                    items.close()
        except BaseException as raised:
            error = raised
        ready.put((None, error))

    thread = threading.Thread(target=work, name="adamjax-batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stopped.set()
        while not ready.empty():  # a thread that waits for room goes on, and sees that it is to stop
            ready.get_nowait()
        thread.join(timeout=1.0)  # not for ever: a loader may hang
