"""Samples in archives: where each one's encoded image lies, and how its bytes are read.

An archive is scanned once. What a scan finds is kept in a file beside the archive, or in a folder
of its own, and holds as long as the archive has the same size and mtime.
"""

from __future__ import annotations

import hashlib
import os
import resource
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from scae_dali.data.scan import RACY_NS, UNREADABLE, DatasetError, Int64, Path, pack, store, unpack

__all__ = ["Archives", "Found", "Scanner", "UInt8", "open_archives"]

UInt8 = npt.NDArray[np.uint8]

CACHE_VERSION = 2  # 1 left links out, and what lies behind the end mark of a tar
_THREADS = 16  # archives are scanned side by side: storage may be far away
_PATIENCE_S = 5.0  # without a progress bar


class Found(NamedTuple):
    """The samples of one archive, in its order.

    names: str [n], each once. labels: int64 [n], as the archive has them. where: int64 [n, 2],
    offset and number of bytes of the encoded images.
    """

    names: list[str]
    labels: Int64
    where: Int64


# (path) -> what the archive holds. Raises DatasetError, with the path, for what it cannot read.
Scanner = Callable[[str], Found]


class Archives:
    """The encoded images of samples in archives, by the samples' places in the index.

    files: the archives. where: int64 [N, 3], the number of a sample's archive, and offset and
    number of its bytes. first_label: the number that the archives give to class 0.
    """

    def __init__(self, files: _Files, where: Int64, first_label: int) -> None:
        self._files, self._where, self.first_label = files, where, first_label

    def subset(self, ids: npt.NDArray[np.integer | np.bool_]) -> Archives:
        """Those of the samples at `ids` (int [M], or a mask), in that order."""
        return Archives(self._files, self._where[ids], self.first_label)

    def place(self, archive: str, offset: int) -> int:
        """The place in the index of the image at this byte of an archive; -1 where there is none.

        Of several samples there (hard links), it is the first.
        """
        numbers = self._files.numbers
        if archive not in numbers:  # another spelling of the path, or another file
            numbers[archive] = numbers.get(os.path.realpath(archive), -1)
        starts, order = self._starts
        wanted = _start(numbers[archive], offset)
        at = int(np.searchsorted(starts, wanted))
        return int(order[at]) if at < len(starts) and starts[at] == wanted else -1

    @cached_property
    def _starts(self) -> tuple[Int64, Int64]:
        """Where the images begin (see `_start`), sorted, and the places of these samples."""
        starts = _start(self._where[:, 0], self._where[:, 1])
        order = np.argsort(starts, kind="stable")
        return starts[order], order

    def read(self, ids: Sequence[int]) -> list[UInt8]:
        """The encoded images of these samples, uint8 [bytes] each. Threads may read at once.

        Raises DatasetError where an archive has changed since it was indexed.
        """
        return [self._files.read(*self._where[i].tolist()) for i in ids]


class _Files:
    """Archives, which are opened at the first read. stamps: int64 [A, 2], size and mtime (ns)."""

    def __init__(self, paths: Sequence[str], stamps: Int64) -> None:
        self._paths, self._stamps = tuple(paths), stamps
        self._open: dict[int, int] = {}  # number of an archive -> its descriptor
        # A process may have few files, and there may be two sets of archives: train and val.
        self._most_open = max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._lock = threading.Lock()

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Path of an archive -> its number. Real paths are there from the start."""
        return {os.path.realpath(path): number for number, path in enumerate(self._paths)}

    def __reduce__(self):
        return _Files, (self._paths, self._stamps)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        for descriptor in self._open.values():
            close(descriptor)

    def read(self, number: int, offset: int, size: int) -> UInt8:
        """Bytes of an archive, uint8 [size]."""
        descriptor = self._open.get(number)
        kept = descriptor is not None
        if descriptor is None:
            descriptor, kept = self._opened(number)
        try:
            data = os.pread(descriptor, size, offset)
        finally:
            if not kept:
                os.close(descriptor)
        if len(data) != size:
            raise self._changed(number)
        return np.frombuffer(data, np.uint8)

    def _opened(self, number: int) -> tuple[int, bool]:
        """The descriptor of an archive, and whether it is kept open."""
        descriptor = os.open(self._paths[number], os.O_RDONLY | os.O_CLOEXEC)
        if _stamp(os.fstat(descriptor)) != self._stamps[number].tolist():
            os.close(descriptor)
            raise self._changed(number)
        with self._lock:
            keep = number not in self._open and len(self._open) < self._most_open
            if keep:
                self._open[number] = descriptor
        return descriptor, keep

    def _changed(self, number: int) -> DatasetError:
        return DatasetError(
            f"the archive {self._paths[number]!r} has changed since it was indexed; start again, "
            "with archives that nobody writes to"
        )


def open_archives(
    paths: Sequence[str],
    root: Path,
    scan: Scanner,
    kind: str,
    joint: str,
    first_label: int | None,
    cache: Path | None,
) -> tuple[list[str], Int64, Archives]:
    """The samples of all archives: their names, their labels, counted from 0, and where they lie.

    kind: what a kept scan must be of; all that `scan` depends on is in it. joint: what stands in a
    name between the archive, relative to root, and what `scan` calls the sample. first_label: None:
    1 where labels run from 1, otherwise 0. cache: the folder in which scans are kept; None: beside
    each archive, in a hidden file, and where nothing can be written there, a warning says so.
    Raises DatasetError.
    """
    if first_label is not None and (
        not isinstance(first_label, int | np.integer) or abs(first_label) >= 1 << 62
    ):
        raise DatasetError(
            f"first_label must be a whole number, got {first_label!r}; the number of class 0 in "
            "archives is 0 or 1 as a rule"
        )
    if cache is not None:
        try:
            os.makedirs(cache, exist_ok=True)
        except OSError as error:
            raise _unwritable(cache, error) from error
    unkept: list[OSError] = []
    names: list[str] = []
    labels, where, stamps = [], [], []
    above = os.path.join(root, "")
    pool = ThreadPoolExecutor(_THREADS)
    try:
        look = partial(_look, scan=scan, kind=kind, cache=cache, unkept=unkept)
        looked = tqdm(
            pool.map(look, paths), desc="index", total=len(paths), unit="archive", delay=_PATIENCE_S
        )
        for number, (found, stamp) in enumerate(looked):
            inside = f"{paths[number].removeprefix(above)}{joint}"
            names += [inside + name for name in found.names]
            labels.append(found.labels)
            where.append(np.insert(found.where, 0, number, axis=1))
            stamps.append(stamp)
    finally:
        pool.shutdown(cancel_futures=True)
    if unkept:
        warnings.warn(
            f"the index of {len(unkept)} archives cannot be kept beside them ({unkept[0]}), so "
            "that it is made anew every time; cache= is a folder to keep it in (train.py: "
            "--data.index_cache)",
            RuntimeWarning,
            stacklevel=3,
        )
    given = np.concatenate(labels)
    first = _first_label(given, names) if first_label is None else int(first_label)
    if (low := given.min()) < first:
        raise DatasetError(
            f"sample {names[int(given.argmin())]!r} has the label {low}, and classes are numbered "
            f"from {first} on; first_label= is the number of class 0 (train.py: --data.first_label)"
        )
    files = _Files([os.path.abspath(path) for path in paths], np.array(stamps, np.int64))
    return names, given - first, Archives(files, np.concatenate(where), first)


def _first_label(labels: Int64, names: Sequence[str]) -> int:
    """The number of class 0: the lowest label, if that is 0 or 1."""
    low = int(labels.min())
    if low in (0, 1):
        return low
    raise DatasetError(
        f"labels must run from 0 or from 1, got {low} … {labels.max()} (the first is that of "
        f"{names[int(labels.argmin())]!r}); first_label= is the number of class 0 where it has no "
        "images (train.py: --data.first_label)"
    )


def _look(
    path: str, *, scan: Scanner, kind: str, cache: Path | None, unkept: list[OSError]
) -> tuple[Found, list[int]]:
    """What an archive holds, as it was kept or as it is found now, and the archive's stamp."""
    kept = _kept_path(path, cache)
    try:
        started_ns = time.time_ns()
        stamp = _stamp(os.stat(path))
        if (found := _load(kept, kind, stamp)) is not None:
            return found, stamp
        found = scan(path)
    except OSError as error:
        raise DatasetError(f"the archive {path!r} cannot be read: {error}") from error
    if not found.names:
        raise DatasetError(
            f"the archive {path!r} holds no samples; leave it out, or put it in again whole"
        )
    # An archive written just now may change again within the same tick of its mtime.
    known = stamp if stamp[1] < started_ns - RACY_NS else [-1, -1]
    try:
        store(
            kept,
            version=CACHE_VERSION,
            kind=pack([kind]),
            stamp=np.array(known, np.int64),
            names=pack(found.names),
            labels=found.labels,
            where=found.where,
        )
    except OSError as error:
        if cache is not None:
            raise _unwritable(cache, error) from error
        unkept.append(error)
    return found, stamp


def _load(kept: str, kind: str, stamp: list[int]) -> Found | None:
    """The kept scan of an archive with this stamp; None where there is none, or it is of another
    version or kind."""
    try:
        with open(kept, "rb") as file, np.load(file, allow_pickle=False) as stored:
            if stored["version"] != CACHE_VERSION or stored["stamp"].tolist() != stamp:
                return None
            if unpack(stored["kind"]) != [kind]:
                return None
            found = Found(unpack(stored["names"]), stored["labels"], stored["where"])
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        warnings.warn(
            f"the kept index {kept!r} is unreadable ({error}); the archive is indexed again",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return found if len(found.names) == len(found.labels) == len(found.where) else None


def _kept_path(path: str, cache: Path | None) -> str:
    """The file in which the scan of an archive is kept."""
    folder, name = os.path.split(path)
    if cache is None:
        return os.path.join(folder, f".{name}.index.npz")  # hidden: no pattern matches it
    # Archives of one name in several folders must not share a file.
    of = hashlib.blake2b(os.fsencode(os.path.realpath(path)), digest_size=6).hexdigest()
    return os.path.join(cache, f"{name}.{of}.npz")


def _unwritable(cache: Path, error: OSError) -> DatasetError:
    return DatasetError(
        f"cache={os.fspath(cache)!r} cannot be written ({error}); give a folder that can"
    )


def _start(number: Any, offset: Any) -> Any:
    """The number of an archive and an offset below 16 TiB in it, int64 [N] or int, as one."""
    return number << 44 | offset


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns]
