"""Digests of arrays that depend on their bits alone, not on their shardings or the number of processes.

The bytes of an array, in row-major order, are words of 32 bits, of which the last is filled up with zeros. The digest
has the sum of the words, which any flipped bit changes, and the sum of the words times their indices, which words that
changed places change; both modulo 2**64. Sums are exact in any order, so each shard adds its part.
"""

import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._core import processes

# Bytes to sum at once: their words, as integers of 64 bits, fit in the second-level cache.
_BLOCK = 1 << 18
_INDICES = np.arange(_BLOCK // 4 + 2, dtype=np.uint64)


def array_digests(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """Return the digest of each array, in hexadecimal; with many processes, all must call it with the same names."""
    with ThreadPoolExecutor() as pool:
        sums = np.array(list(pool.map(_sums_here, arrays.values())), np.uint64).reshape(-1, 2)
    # In halves, since JAX may not have integers of 64 bits.
    halves = processes.gather(sums.view(np.uint32))
    totals = np.ascontiguousarray(halves).view(np.uint64).sum(axis=0, dtype=np.uint64)
    return {
        name: f"{plain:016x}{weighted:016x}" for name, (plain, weighted) in zip(arrays, totals.tolist(), strict=True)
    }


def _sums_here(x: jax.Array) -> np.ndarray:
    """Return the part of the sums of an array that its shards in this process add, each by its first copy."""
    total = np.zeros(2, np.uint64)
    for shard in x.addressable_shards:
        if shard.replica_id == 0:
            for block, starts in _blocks(_bytes(_on_host(shard.data)), shard.index, x.shape):
                total += _sums(block, starts)
    return total


def _on_host(x: jax.Array) -> np.ndarray:
    """Return the elements of an array, which keeps no copy of them as it would of its own conversion."""
    return np.asarray(jax.make_array_from_single_device_arrays(x.shape, x.sharding, [x]))


def _bytes(x: np.ndarray) -> np.ndarray:
    """Return the bytes of an array along one more axis."""
    found = np.ascontiguousarray(x).reshape(*x.shape, 1).view(np.uint8)
    if x.dtype.itemsize == 1 and x.dtype != bool:
        dtype_bits = (jnp.finfo if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo)(x.dtype).bits
        if dtype_bits < 8:  # the other bits of the byte mean nothing
            found = found & np.uint8((1 << dtype_bits) - 1)
    return found


def _blocks(
    shard: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Split the bytes of a shard into rows that are contiguous in the whole array: blocks of them, and their starts."""
    whole = (*shape, shard.shape[-1])
    starts = [*(range(n)[s].start for s, n in zip(index, shape, strict=True)), 0]
    # Axes from this one on are contiguous: all but the first of them are there completely.
    axis = len(whole) - 1
    while axis and shard.shape[axis] == whole[axis]:
        axis -= 1
    strides = [math.prod(whole[i + 1 :]) for i in range(len(whole))]
    offsets = np.zeros(1, np.uint64)
    for i in range(axis):
        steps = np.arange(starts[i], starts[i] + shard.shape[i], dtype=np.uint64) * np.uint64(strides[i])
        offsets = (offsets[:, None] + steps).ravel()
    offsets = offsets + np.uint64(starts[axis] * strides[axis])
    rows = shard.reshape(len(offsets), -1)
    size = rows.shape[1]
    many = max(1, _BLOCK // size)
    for i in range(0, len(rows), many):
        for j in range(0, size, _BLOCK):
            yield rows[i : i + many, j : j + _BLOCK], offsets[i : i + many] + np.uint64(j)


def _sums(rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the two sums of rows of bytes that start at these bytes of the array."""
    size, shifts = rows.shape[1], starts % 4
    if size % 4 or shifts.any():
        padded = np.zeros((len(rows), (size + 6) // 4 * 4), np.uint8)
        for shift in range(4):
            padded[shifts == shift, shift : shift + size] = rows[shifts == shift]
        rows = padded
    words = rows.view(np.uint32).astype(np.uint64)
    of_rows = words.sum(axis=1)
    weighted = of_rows * (starts // 4) + words @ _INDICES[: words.shape[1]]
    return np.stack([of_rows, weighted]).sum(axis=1)
