"""Memory of this process and of the page cache, by the kernel's own count; Linux only."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import threading
from pathlib import Path

__all__ = ["Watch", "available", "drop_pages", "limit", "resident_share", "usage"]


def usage() -> dict[str, int]:
    """Bytes in memory: `own`, of this process alone; `file`, of mapped files, in the page cache."""
    fields = _fields("/proc/self/status")
    return {"own": fields["RssAnon"], "file": fields["RssFile"] + fields["RssShmem"]}


class Watch:
    """A context; `peak` is the most memory of its own that the process had within it, in bytes.

    It looks every 20 ms: the kernel's own peak includes mapped files.
    """

    def __enter__(self) -> Watch:
        self.peak = usage()["own"]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()
        self._note()

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self._note()

    def _note(self) -> None:
        self.peak = max(self.peak, usage()["own"])


def available() -> int:
    """Bytes that a process may still take without swapping or worse."""
    return _fields("/proc/meminfo")["MemAvailable"]


def limit(size: int) -> None:
    """Limits this process to so many bytes of its own: beyond, it gets MemoryError."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (size, hard))


def drop_pages(path: str | os.PathLike[str]) -> float:
    """Asks the kernel to drop the pages of a file that nobody maps; returns the share it kept."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # pages that are not written yet cannot go
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return resident_share(path)


def resident_share(path: str | os.PathLike[str]) -> float:
    """How much of a file is in the page cache, 0 … 1, by mincore(2)."""
    # ctypes takes a private map, but not a shared one that is read-only.
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as view,
    ):
        pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        start = ctypes.c_byte.from_buffer(view)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(view)), pages
        )
        del start  # or the map could not be closed
    if failed:
        raise OSError(ctypes.get_errno(), "mincore failed", os.fspath(path))
    return sum(page & 1 for page in bytes(pages)) / len(pages)


def _fields(path: str) -> dict[str, int]:
    """The lines `name: 12 kB` of a file in /proc, in bytes by name."""
    found = {}
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = 1024 * int(value[:-3])
    return found
