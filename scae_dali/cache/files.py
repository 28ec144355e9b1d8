"""LMDB's two files, data.mdb and lock.mdb, looked at without LMDB.

LMDB maps the file, and a process that looks at a page behind its end is killed by SIGBUS. So the
file is compared with what its meta pages say before LMDB opens it. Where LMDB cannot take locks, a
copy in memory is opened in place of the file.

Layout (LMDB 0.9, 64 bits): every page begins with its number, its flags and the bounds
of its free space. Pages 0 and 1 are meta pages: the one of the later transaction names the roots of
two trees, that of the free pages and that of the records, and the last page.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import struct
import sys
import time
from contextlib import suppress
from io import FileIO
from typing import NamedTuple

import lmdb

from scae_dali.cache.format import CacheError, damaged
from scae_dali.cache.tree import Tree, WrongError, check_trees

__all__ = [
    "DATA_FILE",
    "LOCK_BYTES",
    "LOCK_FILE",
    "READERS",
    "copy_in_memory",
    "require_sound",
    "require_whole",
    "reserve_lock_file",
    "transaction_of",
]

DATA_FILE, LOCK_FILE = "data.mdb", "lock.mdb"
READERS = 1024  # look-ups at one moment, of all processes of a node
LOCK_BYTES = 192 + 64 * (READERS - 1)  # of a new lock file

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_PAGE = struct.Struct("<QHHHH")  # number, padding, flags, lower and upper bound of the free space
_META = struct.Struct("<IIQQIHHQQQQQIHHQQQQQQQ")
_META_PAGE = 0x08  # flag of a page
# Another LMDB, and other machines, have another layout. What it is then is left to LMDB.
_READABLE = lmdb.version() < (0, 10) and sys.byteorder == "little" and sys.maxsize > 1 << 32
_sound: dict[str, tuple[int, ...]] = {}  # path -> the state of its file when it was found sound
_PAUSES = (0.0, 0.01, 0.1, 0.5)  # seconds: another process may be writing the meta pages


class _Meta(NamedTuple):
    """A meta page. size: bytes of a page. pages: how many there are, up to the last one in use."""

    transaction: int
    size: int
    pages: int
    free: Tree
    records: Tree


def require_whole(path: str) -> None:
    """Raises CacheError where the data file of the cache at `path` is no LMDB file, or has been cut
    off; PermissionError where this user may not read it."""
    _check(path, trees=False)


def require_sound(path: str) -> None:
    """Raises CacheError where the pages of the data file do not hold together, as in a copy that
    was made while a pass wrote. All pages are read, unless they were before.

    Whoever calls this has a transaction open, so that no page is used anew meanwhile.
    """
    if _sound.get(path) != (state := _state(path)):
        _check(path, trees=True)
        _sound[path] = state


def _check(path: str, *, trees: bool) -> None:
    if not _READABLE:
        return
    for pause in _PAUSES:
        time.sleep(pause)
        try:
            with _opened(os.path.join(path, DATA_FILE)) as data:
                meta = _require_whole(data.fileno())
                if trees:
                    check_trees(data.fileno(), *meta[1:])
            return
        except WrongError as error:
            trouble = str(error)
    raise damaged(path, f"{DATA_FILE} {trouble}")


def _state(path: str) -> tuple[int, ...]:
    """What changes with every commit to the data file."""
    status = os.stat(os.path.join(path, DATA_FILE))
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def transaction_of(path: str) -> int:
    """The number of the last transaction that was committed to the cache at `path`. Raises OSError
    and CacheError where there is none."""
    try:
        with _opened(os.path.join(path, DATA_FILE)) as data:
            return _newest(data.fileno()).transaction
    except WrongError as error:
        raise damaged(path, f"{DATA_FILE} {error}") from None


def copy_in_memory(path: str) -> int:
    """A copy of the data file, as it is at one moment -> file descriptor of memory.

    LMDB never writes to the pages of its last two snapshots. So the copy is of one moment if less
    than two transactions were committed meanwhile. Raises CacheError where more are at every try.
    """
    file = os.path.join(path, DATA_FILE)
    for pause in _PAUSES:
        time.sleep(pause)
        descriptor = os.memfd_create("saliency-cache", os.MFD_CLOEXEC)
        try:
            with _opened(file) as data, open(descriptor, "wb", closefd=False) as memory:
                shutil.copyfileobj(data, memory, 1 << 20)
            meta = _require_whole(descriptor)
            check_trees(descriptor, *meta[1:])
            if 0 <= transaction_of(path) - meta.transaction <= 1:
                os.truncate(descriptor, max(os.fstat(descriptor).st_size, meta.pages * meta.size))
                return descriptor
            trouble = None
        except WrongError as error:
            trouble = str(error)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.ENOSPC):
                raise OSError(
                    error.errno,
                    "there is no memory for a copy of this saliency cache, and LMDB's locks, with "
                    "which none is needed, cannot be taken; copy its folder to a local disk while "
                    "no pass writes to it",
                    path,
                ) from error
            raise
        os.close(descriptor)
    if trouble is not None:
        raise damaged(path, f"{DATA_FILE} {trouble}")
    raise CacheError(
        f"saliency cache {path!r} cannot be read without LMDB's locks now, as another process "
        "writes to it all the time; wait until its pass has ended"
    )


def reserve_lock_file(path: str) -> None:
    """Takes the room of the lock file on the disk, or raises OSError. LMDB maps the file, and a
    process that writes to a map for which a full disk has no room is killed by SIGBUS.
    """
    file, data = os.path.join(path, LOCK_FILE), os.path.join(path, DATA_FILE)
    length, taken, new = 0, 0, False
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise _unusable(path, "is no file")
        length, taken = status.st_size, 512 * status.st_blocks
    except FileNotFoundError:
        new = True
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise _unusable(path, "is a link to itself") from error
    length = length or LOCK_BYTES  # who has it open knows its length, so that stays
    if taken >= length:
        return
    if new and os.path.exists(data) and not os.access(data, os.W_OK):
        # A lock file of this user's would shut those out who may write.
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), file)
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o755)  # as LMDB does
    except FileNotFoundError as error:
        if not os.path.islink(file):
            raise
        raise _unusable(path, "is a link to nowhere") from error
    try:
        if new:
            _give_to_owner_of(data, descriptor)
        os.posix_fallocate(descriptor, 0, length)
    except OSError as error:
        if error.errno in _FULL:
            raise
    finally:
        os.close(descriptor)


def _give_to_owner_of(file: str, descriptor: int) -> None:
    """Lets those use an open file who may use another one, as far as this user can."""
    with suppress(FileNotFoundError, PermissionError):
        status = os.stat(file)
        os.fchmod(descriptor, stat.S_IMODE(status.st_mode))
        os.fchown(descriptor, status.st_uid if os.geteuid() == 0 else -1, status.st_gid)


def _unusable(path: str, what: str) -> CacheError:
    return CacheError(
        f"saliency cache {path!r} has a {LOCK_FILE} that {what}; its maps are kept; end all "
        f"processes that have it open, and remove {LOCK_FILE}"
    )


def _opened(file: str) -> FileIO:
    """The file, for reading."""
    if not stat.S_ISREG(os.stat(file).st_mode):  # a pipe would wait for a writer
        raise WrongError("is no file")
    try:
        return FileIO(file)
    except PermissionError as error:
        raise PermissionError(
            f"saliency cache {os.path.dirname(file)!r} cannot be read by this user; ask its owner "
            f"for permission to read {DATA_FILE}"
        ) from error


def _require_whole(descriptor: int) -> _Meta:
    """The meta page that counts, of a file that holds all pages that it names. Else raises
    WrongError."""
    meta = _newest(descriptor)
    length = os.fstat(descriptor).st_size  # after the meta page: pages are written before it
    if length < meta.pages * meta.size:
        try:  # a transaction may have let go of the last pages before its end
            check_trees(descriptor, *meta[1:])
        except WrongError:
            raise WrongError(
                f"has been cut off: it has {length:,} bytes of {meta.pages * meta.size:,}"
            ) from None
    return meta


def _newest(descriptor: int) -> _Meta:
    """The meta page that counts: that of the later transaction. LMDB wants both to be sound."""
    first = _meta_at(descriptor, 0)
    second = _meta_at(descriptor, first.size)
    return max(first, second)


def _meta_at(descriptor: int, offset: int) -> _Meta:
    page = os.pread(descriptor, _PAGE.size + _META.size, offset)
    start = page[:16]
    if not start:
        raise WrongError(
            "is empty" if offset == 0 else f"has been cut off: it has {offset:,} bytes"
        )
    if len(page) < _PAGE.size + _META.size and offset:
        raise WrongError(f"has been cut off: it has {offset + len(page):,} bytes")
    page = page.ljust(_PAGE.size + _META.size, b"\0")
    magic, version, *_ = fields = _META.unpack_from(page, _PAGE.size)
    if magic != _MAGIC or not _PAGE.unpack_from(page)[2] & _META_PAGE:
        where = "at its beginning" if offset == 0 else "in its second page"
        raise WrongError(f"is no LMDB file, or is damaged {where}: {start!r}")
    if version != _VERSION:
        raise WrongError(f"is of version {version} of LMDB's format, and version 1 is read")
    size = fields[4]
    if not 256 <= size <= 1 << 16 or size & (size - 1):
        raise WrongError(f"is damaged in its first pages: it tells pages of {size} bytes")
    free, records = Tree(*fields[5:12]), Tree(*fields[13:20])
    return _Meta(fields[21], size, fields[20] + 1, free, records)
