"""Data of supervised problems: arrays, or loaders of batches, on the host."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from adamjax._core.typing import PyTree

Batch = tuple[PyTree, PyTree]  # inputs and targets, of NumPy arrays with the same number of rows

_TARGETS = ("label", "labels", "target", "targets", "y")


class Arrays:
    """Arrays of inputs and targets; an epoch is a pass over their rows in an order of its own."""

    def __init__(self, name: str, data: Any) -> None:
        self.inputs: PyTree
        self.targets: PyTree
        self.inputs, self.targets = _batch(name, data)
        self.rows: int = _rows(name, (self.inputs, self.targets))

    def __repr__(self) -> str:
        return f"[{describe((self.inputs, self.targets))}]"

    def batches(self, seed: int, start: int, batch_size: int) -> Iterator[Batch]:
        """Yield the batches of a run for ever, from number `start`: in several processes, the rows of this one."""
        processes, process = jax.process_count(), jax.process_index()
        if batch_size % processes:
            raise ValueError(
                f"Invalid batch_size value: {batch_size}; it must be a multiple of the number of processes, {processes}"
            )
        epoch, first = divmod(start, self.rows // batch_size)
        while True:
            order = np.random.default_rng((seed % 2**64, epoch)).permutation(self.rows)
            for i in range(first, self.rows // batch_size):
                chosen = order[i * batch_size : (i + 1) * batch_size][process::processes]
                yield jax.tree.map(lambda x, chosen=chosen: x[chosen], (self.inputs, self.targets))
            epoch, first = epoch + 1, 0


class Loader:
    """An iterable of batches, or a function from a seed to one."""

    def __init__(self, name: str, source: Any) -> None:
        self._name, self._source = name, source
        if isinstance(source, Iterator):
            raise TypeError(
                f"Invalid {name} value: a value of type {type(source).__name__}, which can be read only once, "
                "and each run needs batches of its own: give a function, `lambda seed: ...`, that returns such a value"
            )

    def __repr__(self) -> str:
        name = getattr(self._source, "__qualname__", type(self._source).__name__)
        return f"<batches of {name}>"

    def epoch(self, iterable: Iterable[Any]) -> Iterator[Batch]:
        """Yield the batches of one pass."""
        numpy_batches = getattr(iterable, "as_numpy_iterator", None)  # tf.data's
        for batch in iterable if numpy_batches is None else numpy_batches():
            yield _batch(f"a batch of {self._name}", batch)

    def open(self, seed: int) -> Iterable[Any]:
        """Return the iterable of a run."""
        if isinstance(self._source, Iterable):
            return self._source
        found = self._source(seed)
        if not isinstance(found, Iterable):
            raise TypeError(
                f"{self._name} returned {type(found).__name__} for seed {seed}, expected an iterable of batches"
            )
        return found

    def batches(self, seed: int, start: int) -> Iterator[Batch]:
        """Yield the batches of a run for ever, from number `start`; short last batches are left out."""
        first, number, opened = None, 0, self.open(seed)
        while True:
            before, short = number, None
            for batch in self.epoch(opened):
                first = first or batch
                fits = row_shapes(batch) == row_shapes(first)
                if short is not None or not fits or _rows(self._name, batch) > _rows(self._name, first):
                    raise ValueError(
                        f"a batch of {self._name} is {describe(short or batch)}, and the first was "
                        f"{describe(first)}: all must have the same shapes, only the last of an epoch may have fewer "
                        "rows"
                    )
                if _rows(self._name, batch) < _rows(self._name, first):
                    short = batch
                    continue
                number += 1
                if number > start:
                    yield batch
            if number == before:
                raise ValueError(f"{self._name} had no batch in an epoch; it must yield pairs (inputs, targets)")
            if isinstance(opened, Iterator):
                opened = self.open(seed)

    def read(self) -> tuple[Arrays, int]:
        """Return the rows of one pass, and the number of those in the first batch."""
        batches = list(self.epoch(self.open(0)))
        if not batches:
            raise ValueError(f"{self._name} had no batch; it must yield pairs (inputs, targets)")
        rows = _rows(self._name, batches[0])
        return Arrays(self._name, jax.tree.map(lambda *x: np.concatenate(x), *batches)), rows


def as_source(name: str, data: Any) -> Arrays | Loader:
    """Return the argument `name` as arrays, if it is a tuple or dict, or else as a loader."""
    if isinstance(data, (tuple, Mapping)):
        return Arrays(name, data)
    if hasattr(data, "shape") or not (isinstance(data, Iterable) or callable(data)):
        raise TypeError(
            f"Invalid {name} value: a value of type {type(data).__name__}; {name} must be a tuple of arrays "
            "(inputs, targets), an iterable of batches, or a function from a seed to one"
        )
    return Loader(name, data)


def _batch(name: str, data: Any) -> Batch:
    """Return inputs and targets as NumPy arrays, in the dtypes that JAX gives them."""
    if isinstance(data, Mapping):
        found = [key for key in data if key in _TARGETS]
        inputs = {key: x for key, x in data.items() if key not in _TARGETS}
        if len(found) != 1 or not inputs:
            raise TypeError(
                f"{name} is a dict of {sorted(map(str, data))}; the targets must be under exactly one of "
                f"{', '.join(map(repr, _TARGETS))}, and all others are the inputs"
            )
        targets = data[found[0]]
        data = (next(iter(inputs.values())) if len(inputs) == 1 else inputs, targets)
    if not (isinstance(data, (tuple, list)) and len(data) == 2):
        size = f" and length {len(data)}" if isinstance(data, (tuple, list)) else ""
        raise TypeError(f"{name} is of type {type(data).__name__}{size}, expected a pair (inputs, targets)")
    pair = tuple(jax.tree.map(_as_numpy, x, is_leaf=_is_list_of_numbers) for x in data)
    for path, x in jax.tree.leaves_with_path(pair):
        if not jax.numpy.issubdtype(x.dtype, np.number) and x.dtype != bool:
            part, where = ("inputs", "targets")[path[0].idx], jax.tree_util.keystr(path[1:])
            raise TypeError(f"the {part}{where} of {name} are {x.dtype}, expected numbers")
    _rows(name, pair)
    return pair[0], pair[1]


def _as_numpy(x: Any) -> np.ndarray:
    if hasattr(x, "detach"):  # torch's
        x = x.detach().cpu()
    x = np.asarray(x)
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False) if x.dtype.kind in "fiuc" else x


def _is_list_of_numbers(x: Any) -> bool:
    return isinstance(x, list) and not any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(x))


def _rows(name: str, data: PyTree) -> int:
    """Return the number of rows, which must be the same in all arrays."""
    rows = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(data)}
    if len(rows) != 1 or 0 in rows:
        raise ValueError(
            f"the arrays of {name} are {describe(data)}: inputs and targets must have the same number of rows, at "
            "least one, along their first axis"
        )
    return rows.pop()


def row_shapes(data: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.shape[1:], data)


def describe(data: PyTree) -> str:
    return ", ".join(f"{x.dtype}[{','.join(map(str, x.shape))}]" for x in jax.tree.leaves(data))
