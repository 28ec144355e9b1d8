"""Whether LMDB's pages hold together: LMDB ends the process (SIGABRT) at a page that is none, and
shows what happens to be there where a file was copied while it was written to.

A transaction has two trees of pages, that of the free pages and that of the records. A page of a
tree begins with its number, its flags and the bounds of its free space, and then has the places of
its nodes. A node has a key and, in a leaf, a value, which may lie in pages of its own, or else the
number of a page below. A value of the first tree is a list of free pages.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["NO_PAGE", "Tree", "WrongError", "check_trees"]

NO_PAGE = (1 << 64) - 1  # the root of an empty tree
_HEADER = 16  # bytes of a page before the places of its nodes
_NODE = 8  # bytes of a node before its key: size or page (two or three words), flags, key's length
_BRANCH, _LEAF, _OVERFLOW = 0x01, 0x02, 0x04  # flags of a page
_BIG, _NAMED = 0x01, 0x06  # flags of a node: its value lies in pages of its own; is a database
_DATABASE = 48  # bytes of the value of a node that is a database
_KINDS, _FREE = 0x7E, 0x08  # flags of a tree that tell its keys and values; those of free pages
_AT_ONCE = 1024  # pages
_LOOKED_AT = 4096  # values with pages of their own, whose first page is looked at

_Numbers = NDArray[np.int64]


class WrongError(Exception):
    """What is wrong with a data file, in words."""


class _OthersError(Exception):
    """The file has what no sound cache has, such as databases with names."""


class Tree(NamedTuple):
    """A tree as a meta page has it: flags, the number of levels, how many pages of each kind, how
    many records, and the page of the root."""

    flags: int
    depth: int
    branches: int
    leaves: int
    overflow: int
    entries: int
    root: int

    @property
    def fewest(self) -> int:
        """Nodes of a branch: LMDB ends the process at one of a single node, but for free pages."""
        return 1 if self.flags else 2


class _Nodes(NamedTuple):
    """The nodes of some pages, in order. page: the row of the page that a node is in; places: of
    its first byte in these pages; low: the first 32 bits, a size or the low part of a page; marks:
    flags, or the high part of a page; keys: bytes of the key. All int64 [n]."""

    page: _Numbers
    places: _Numbers
    low: _Numbers
    marks: _Numbers
    keys: _Numbers


def check_trees(descriptor: int, size: int, pages: int, free: Tree, records: Tree) -> None:
    """Raises WrongError where the pages of the two trees are not what they must be.

    size: bytes of a page. pages: how many there are, up to the last one in use. The keys of records
    must ascend, and no page may be used twice. A file of another program is let through.
    """
    file = _File(descriptor, size)
    try:
        _check_trees(file, pages, free, records)
    except _OthersError:
        if _has_meta(file, records):
            raise WrongError("is damaged in the flags of its records") from None
    except (ValueError, IndexError, OverflowError) as error:  # numbers beyond all bounds
        raise WrongError("is damaged in its trees of pages") from error


def _check_trees(file: _File, pages: int, free: Tree, records: Tree) -> None:
    if free.flags & _KINDS != _FREE:
        raise WrongError("is damaged in its first pages: it has no tree of free pages")
    if records.flags:
        raise _OthersError
    used: list[_Numbers] = [np.arange(2)]
    unused: list[_Numbers] = []
    last = b""
    for leaves, nodes, _ in _leaves(file, records, used):
        if (nodes.marks & _NAMED).any():
            raise _OthersError
        last = _require_ascending(leaves, nodes, last)
    for leaves, nodes, big in _leaves(file, free, used):
        for k in range(len(nodes.places)):
            start = int(nodes.places[k] + _NODE + nodes.keys[k])
            blob = leaves[start : start + int(nodes.low[k])]
            if big[k]:
                first, length = _big_value(leaves, nodes, np.array([k]))
                blob = file.bytes(int(first[0]) * file.size + _HEADER, int(length[0]))
            count, *numbers = np.frombuffer(blob.tobytes(), "<i8").tolist()
            unused.append(np.array(numbers[:count], np.int64))
    every = np.concatenate(used + unused)
    if every.size and (every.max() >= pages or np.bincount(every).max() > 1):
        raise WrongError("uses a page twice, or one behind its last")


def _has_meta(file: _File, records: Tree) -> bool:
    """Whether the tree has the record `meta` of a cache, as far as it can be read."""
    with suppress(WrongError, ValueError, IndexError, OverflowError):
        for leaves, nodes, _ in _leaves(file, records, []):
            database = (nodes.marks & _NAMED != 0) & (nodes.low == _DATABASE)
            for start in (nodes.places[(nodes.keys == 4) & ~database] + _NODE).tolist():
                if leaves[start : start + 4].tobytes() == b"meta":
                    return True
    return False


class _File(NamedTuple):
    """The pages of a file, each of `size` bytes."""

    descriptor: int
    size: int

    def bytes(self, offset: int, length: int) -> NDArray[np.uint8]:
        """Raises WrongError where the file ends before."""
        blob = os.pread(self.descriptor, length, offset)
        if len(blob) < length:
            raise WrongError("has been cut off")
        return np.frombuffer(blob, np.uint8)

    def pages(self, numbers: _Numbers) -> NDArray[np.uint8]:
        """uint8 [n, size], in this order."""
        if numbers.min(initial=2) < 2 or numbers.max(initial=2) >= 1 << 48:
            raise WrongError("tells pages that cannot be")
        starts = np.flatnonzero(np.diff(numbers, prepend=-1) != 1).tolist()
        runs = [
            self.bytes(int(numbers[one]) * self.size, (end - one) * self.size)
            for one, end in zip(starts, [*starts[1:], len(numbers)], strict=True)
        ]
        return np.concatenate(runs).reshape(-1, self.size)


def _leaves(
    file: _File, tree: Tree, used: list[_Numbers]
) -> Iterator[tuple[NDArray[np.uint8], _Nodes, NDArray[np.bool_]]]:
    """The leaves of a tree in order, some at a time: their bytes, their nodes, and which of these
    have a value with pages of its own. used: takes up the pages of the tree."""
    level = np.array([] if tree.root == NO_PAGE else [tree.root], np.uint64).astype(np.int64)
    branches = 0
    for _ in range(tree.depth - 1):
        below = []
        for numbers in _parts(level):
            _, nodes = _nodes(file, numbers, _BRANCH, tree.fewest)
            below.append(nodes.low | nodes.marks << 32)
        branches += len(level)
        used.append(level)
        level = np.concatenate(below)
        if len(level) > tree.branches + tree.leaves:
            raise WrongError("has more pages than it says")
    used.append(level)
    entries = overflow = 0
    for numbers in _parts(level):
        pages, nodes = _nodes(file, numbers, _LEAF, 1)
        big = nodes.marks & _BIG != 0
        entries += len(big)
        if big.any():
            own = _big_pages(file, pages, nodes, np.flatnonzero(big), look=overflow < _LOOKED_AT)
            overflow += len(own)
            used.append(own)
        yield pages, nodes, big
    if (branches, len(level), overflow, entries) != tree[2:6]:
        raise WrongError(f"has {entries:,} records, and it says {tree.entries:,}")


def _parts(numbers: _Numbers) -> Iterator[_Numbers]:
    for start in range(0, len(numbers), _AT_ONCE):
        yield numbers[start : start + _AT_ONCE]


def _nodes(
    file: _File, numbers: _Numbers, kind: int, fewest: int
) -> tuple[NDArray[np.uint8], _Nodes]:
    """The bytes [n · size] and the nodes of these pages, which must be of one kind.

    fewest: nodes that a page has.
    """
    pages = file.pages(numbers)
    words = pages.view("<u2")
    flags, lower, upper = words[:, 5:8].astype(np.int64).T
    fits = (pages[:, :8].copy().view("<i8")[:, 0] == numbers) & (flags == kind)
    fits &= (lower >= _HEADER) & (lower <= upper) & (upper <= file.size) & (lower % 2 == 0)
    counts = (lower - _HEADER) // 2
    fits &= counts >= fewest
    _require(fits, numbers)
    most = int(counts.max())
    there = np.arange(most) < counts[:, None]
    row = np.nonzero(there)[0]
    place = words[:, _HEADER // 2 : _HEADER // 2 + most][there].astype(np.int64)
    _require((place >= upper[row]) & (place + _NODE <= file.size) & (place % 2 == 0), numbers, row)
    at = (row * file.size + place) // 2
    low, high, marks, keys = (words.reshape(-1)[at + k].astype(np.int64) for k in range(4))
    low |= high << 16
    value = 0 if kind == _BRANCH else np.where(marks & _BIG, 8, low)
    fits = place + _NODE + keys + value <= file.size
    if kind == _LEAF:
        fits &= marks <= _BIG | _NAMED
    _require(fits, numbers, row)
    # Each node ends where another one begins, or the page ends: they fill the room in use.
    begins, ends = np.zeros((2, len(numbers), file.size // 2 + 1), np.bool_)
    begins[row, place // 2] = begins[:, -1] = True
    ends[row, (place + _NODE + keys + value + 1) // 2] = True
    ends[np.arange(len(numbers)), upper // 2] = True
    fits = (begins == ends).all(1) & (begins.sum(1) == counts + 1) & (upper % 2 == 0)
    _require(fits, numbers)
    return pages.reshape(-1), _Nodes(row, 2 * at, low, marks, keys)


def _require(fits: NDArray[np.bool_], numbers: _Numbers, row: _Numbers | None = None) -> None:
    """Raises WrongError with the first page that does not fit."""
    if not fits.all():
        k = int(np.argmin(fits))
        raise WrongError(f"is damaged in its page {numbers[k if row is None else row[k]]}")


def _big_value(pages: NDArray[np.uint8], nodes: _Nodes, big: _Numbers) -> tuple[_Numbers, _Numbers]:
    """The first pages of the values of these nodes, and their lengths in bytes."""
    start = nodes.places[big] + _NODE + nodes.keys[big]
    first = pages[start[:, None] + np.arange(8)].view("<i8")[:, 0]
    return first, nodes.low[big]


def _big_pages(
    file: _File, pages: NDArray[np.uint8], nodes: _Nodes, big: _Numbers, *, look: bool
) -> _Numbers:
    """All pages of the values of these nodes. look: whether to look at their first pages."""
    first, length = _big_value(pages, nodes, big)
    counts = (_HEADER - 1 + length) // file.size + 1
    total, least = int(counts.sum()), int(first.min())
    end = os.fstat(file.descriptor).st_size // file.size
    if least < 2 or int((first + counts).max()) > end or total > end:
        raise WrongError("has been cut off")
    if look:
        for number, count in zip(first.tolist(), counts.tolist(), strict=True):
            header: Any = file.bytes(number * file.size, _HEADER)
            told = header[:8].view("<i8")[0], header[10:12].view("<u2")[0]
            if (*told, header[12:16].view("<u4")[0]) != (number, _OVERFLOW, count):
                raise WrongError(f"is damaged in its page {number}")
    before = np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first, counts) + np.arange(total) - before


def _require_ascending(pages: NDArray[np.uint8], nodes: _Nodes, last: bytes) -> bytes:
    """Raises WrongError where keys do not ascend, beginning behind `last` -> the last key."""

    def key(k: int) -> bytes:
        start = int(nodes.places[k]) + _NODE
        return pages[start : start + int(nodes.keys[k])].tobytes()

    of_ids = nodes.keys == 8
    start = (nodes.places[of_ids] + _NODE) // 2
    numbers = np.zeros(len(start), np.uint64)
    for k in range(4):
        numbers = numbers << np.uint64(16) | pages.view(">u2")[start + k]
    fits = bool((numbers[1:] > numbers[:-1]).all())
    count = len(nodes.keys)
    others = np.flatnonzero(~of_ids)[:_AT_ONCE].tolist()
    for k in {0, *others, *(k + 1 for k in others if k + 1 < count)}:
        fits = fits and (last if k == 0 else key(k - 1)) < key(k)
    if not fits:
        raise WrongError("has records that are not in order")
    return key(count - 1)
