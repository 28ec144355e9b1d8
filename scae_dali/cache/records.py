"""The records of a cache: the bytes of a map, what may become one, and how they are packed.

A record is an 8 byte key and a value of `record_type`. Which key a sample has, and when its map is
written or believed, is decided in `cache`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import islice
from typing import Any

import lmdb
import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "CHUNK",
    "CLASSES",
    "EPOCHS",
    "KEY_BYTES",
    "Maps",
    "checked_epoch",
    "checked_ids",
    "checked_maps",
    "expected_bytes",
    "flat",
    "put_ascending",
    "record_type",
    "rows",
    "split",
]

CHUNK = 4096  # records a commit: some 290 KB at 7x7, one sync
KEY_BYTES = 8  # of a record; the other keys are longer or shorter
EPOCHS = 1 << 16  # that a stamp of 16 bits tells apart
CLASSES = 1 << 16  # that neighbours of 16 bits tell apart

Maps = NDArray[np.uint8]


def record_type(grid: tuple[int, int]) -> np.dtype[np.void]:
    """The value of a record: fields stamp, u16 LE, and map, u8[h,w] with 255 = 1.0.

    Raises ValueError for a grid of 2 GiB.
    """
    if grid[0] * grid[1] + 2 >= 1 << 31:
        raise ValueError(f"grid must have fewer than 2^31 cells, got {grid}; 7x7 is usual")
    return np.dtype([("stamp", "<u2"), ("map", "u1", grid)])


def rows(
    txn: lmdb.Transaction, kind: np.dtype[np.void]
) -> Iterator[tuple[NDArray[np.uint64], NDArray[Any], int]]:
    """Blocks of keys u64[n], records kind[n], and how many more had a wrong length."""
    every = iter(txn.cursor())
    while block := list(islice(every, 1024)):
        named = [row for row in block if len(row[0]) == KEY_BYTES]
        whole = [row for row in named if len(row[1]) == kind.itemsize]
        keys = np.frombuffer(b"".join([key for key, _ in whole]), ">u8").astype(np.uint64)
        records = np.frombuffer(b"".join([value for _, value in whole]), kind)
        yield keys, records, len(named) - len(whole)


def put_ascending(txn: lmdb.Transaction, keys: list[bytes], values: list[bytes]) -> None:
    """Puts records, keys ascending. Those beyond the last record are appended: pages fill whole.

    b"meta" and b"neighbors" may sort behind the last record. LMDB would then split pages in the
    middle (twice the size on disk), so they are taken out meanwhile; no reader sees that, for it is
    one transaction.
    """
    cursor = txn.cursor()
    behind: list[tuple[bytes, bytes]] = []
    there = cursor.last()
    while there and len(cursor.key()) != KEY_BYTES:
        behind.append((bytes(cursor.key()), bytes(cursor.value())))
        there = cursor.prev()
    known = bisect_right(keys, bytes(cursor.key())) if there else 0
    cursor.putmulti(zip(keys[:known], values[:known], strict=True))
    if known < len(keys):
        for name, _ in behind:
            txn.delete(name)
        cursor.putmulti(zip(keys[known:], values[known:], strict=True), append=True)
        for name, value in behind:
            txn.put(name, value)


def expected_bytes(samples: int, size: int) -> int:
    """Of a full cache, roughly: 4096 byte pages with a header of 16, 8 + 2 a record."""
    a_page = max((4096 - 16) // (8 + 2 + KEY_BYTES + size + size % 2), 1)
    return 4096 * (samples // a_page + 1) * 102 // 100


def flat(maps: Maps) -> NDArray[np.bool_]:
    """u8[n,h,w] -> bool[n], whether a map is the same everywhere, and so says nothing."""
    cells = maps.reshape(len(maps), math.prod(maps.shape[1:]))
    return (cells == cells[:, :1]).all(1)


def split(blob: bytes, size: int) -> list[bytes]:
    return [blob[start : start + size] for start in range(0, len(blob), size)]


def checked_epoch(epoch: int) -> int:
    whole = isinstance(epoch, int | np.integer) and not isinstance(epoch, bool)
    if not whole or not 0 <= epoch < EPOCHS:
        raise ValueError(
            f"epoch must be an integer in 0..65535 (it is stored in 16 bits), got {epoch!r}"
        )
    return int(epoch)


def checked_ids(ids: ArrayLike, samples: int) -> NDArray[np.int64]:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"ids must be integers [B], got {array.dtype} {list(array.shape)}")
    if array.size and (array.min() < 0 or array.max() >= samples):
        worst = array[(array < 0) | (array >= samples)][0]
        raise IndexError(f"ids must be in 0..{samples - 1} (positions in the index), got {worst}")
    return array.astype(np.int64)


def checked_maps(maps: ArrayLike, ids: NDArray[np.int64], grid: tuple[int, int]) -> Maps:
    """f[B,h,w] in [0, 1] or u8[B,h,w] -> u8[B,h,w]; ids: int[B]."""
    values = np.asarray(maps)
    if values.shape != (len(ids), *grid):
        raise ValueError(
            f"maps must be [{len(ids)}, {grid[0]}, {grid[1]}], got {list(values.shape)}"
        )
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind != "f":
        raise ValueError(f"maps must be uint8, or float in [0, 1], got {values.dtype}")
    bad = ~((values >= 0) & (values <= 1))  # true of NaN as well
    if bad.any():
        row = int(np.flatnonzero(bad.any(axis=(1, 2)))[0])
        raise ValueError(
            f"maps must be in [0, 1], got {values[row][bad[row]][0]} for sample {ids[row]}; write "
            "a map of zeros where there is none"
        )
    return np.rint(255 * values.astype(np.float32)).astype(np.uint8)
