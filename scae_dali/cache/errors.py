"""What LMDB and the system answer where a cache cannot be opened, read or written, in words: what
happened, and a remedy. None advises to remove a cache whose maps may be sound.
"""

from __future__ import annotations

import errno
import os

import lmdb

from scae_dali.cache.files import DATA_FILE, LOCK_BYTES, LOCK_FILE, READERS
from scae_dali.cache.format import CacheError, damaged

__all__ = [
    "DENIED",
    "DISK",
    "LOCKLESS",
    "SAME_NUMBER",
    "code_of",
    "no_writing",
    "told",
    "why_no_locks",
]

DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
# What file systems without locks, or without shared maps of a file, answer.
LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENODEV, errno.EINVAL)
# LMDB reports a short write as EIO, so a full disk may arrive under that name too.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# LMDB locks the byte of a process's number, which is another's in another container.
SAME_NUMBER = errno.EAGAIN
_FOREIGN = (lmdb.InvalidError, lmdb.VersionMismatchError)
_DAMAGE = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.CursorFullError,
    lmdb.PageFullError,
    lmdb.IncompatibleError,
    lmdb.BadDbiError,
    *_FOREIGN,
)


def told(error: Exception, path: str, *, opening: bool = False) -> CacheError:
    """An error of LMDB in words, with a remedy. opening: the data file was found to be whole
    just before."""
    if isinstance(error, lmdb.ReadersFullError):
        what = f"is read by more than {READERS} threads and processes at this moment"
        remedy = "start fewer of them, or let some read a copy (scae-dali copy-cache)"
    elif isinstance(error, lmdb.BadRslotError) or (
        # Behind the name of a function of LMDB: a transaction, which looks at the data file.
        opening and isinstance(error, _FOREIGN) and not str(error).startswith("mdb_")
    ):
        what = f"has a {LOCK_FILE} that cannot be used ({error}); its maps are kept"
        remedy = f"end all processes that have it open, and remove {LOCK_FILE}"
    elif isinstance(error, _DAMAGE):
        return damaged(path, f"LMDB reports {error}")
    elif isinstance(error, lmdb.PanicError):
        what = f"was closed after an error of the disk ({error}); what was committed is kept"
        remedy = "run again"
    elif code_of(error, (errno.ENOMEM,)) is not None:
        what = f"does not fit the address space of this process ({error})"
        remedy = "raise its limit (ulimit -v)"
    else:
        what = f"cannot be opened or used ({error})"
        remedy = "close whatever else this process has open of it, and run again"
    return CacheError(f"saliency cache {path!r} {what}; {remedy}")


def no_writing(path: str, code: int) -> Exception:
    """Why this process cannot write to a cache. code: what the system answered."""
    answer = os.strerror(code)
    if code in DENIED:
        return PermissionError(
            f"saliency cache {path!r} is read-only here; give this user write permission to the "
            f"directory, {DATA_FILE} and {LOCK_FILE}, or copy it to a writable place (scae-dali "
            "copy-cache)"
        )
    if code in DISK:
        return OSError(
            code, f"{answer}: the saliency cache needs {LOCK_BYTES:,} bytes more; make room", path
        )
    if code == SAME_NUMBER:
        return CacheError(
            f"saliency cache {path!r} cannot be written to: {_same_number()}; let them share "
            "their numbers (docker run --pid=host), or write to a copy (scae-dali copy-cache)"
        )
    return CacheError(
        f"saliency cache {path!r} cannot be written to: LMDB needs locks, and its file system has "
        f"none ({answer}); put it on a local disk (scae-dali copy-cache copies one that is there)"
    )


def why_no_locks(code: int) -> str:
    """Why LMDB's locks cannot be taken, and a remedy. code: what the system answered."""
    answer = os.strerror(code)
    if code in DENIED:
        return (
            f"this user may not write to {LOCK_FILE} ({answer}); ask for permission to write to "
            "it, or read a copy of your own (scae-dali copy-cache)"
        )
    if code in DISK:
        return f"there is no room for {LOCK_FILE} ({answer}); make room"
    if code == SAME_NUMBER:
        return (
            f"{_same_number()}; let them share their numbers (docker run --pid=host), or read a "
            "copy of your own (scae-dali copy-cache)"
        )
    return (
        f"its file system has none ({answer}); read a copy on a local disk (scae-dali copy-cache)"
    )


def _same_number() -> str:
    return (
        f"a process of another container or machine has it open and has the number of this one "
        f"({os.getpid()}), by which LMDB tells processes apart"
    )


def code_of(error: Exception, codes: tuple[int, ...]) -> int | None:
    """Which of these codes an LMDB error has; only its text tells. None: none of them."""
    return next((code for code in codes if os.strerror(code) in str(error)), None)
