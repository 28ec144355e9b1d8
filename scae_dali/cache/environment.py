"""How a cache's LMDB environment is found, opened, shared, grown, claimed and recovered.

A process has one environment for each path, whatever its threads and forks. Errors that a user can
mend name the remedy. A process that writes claims the cache by a lock on its directory (flock),
which the system takes back when the process ends, however it ends.

Every commit is synced (LMDB's default). A killed process or a lost machine never damages what was
committed. LMDB wants a local file system.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any, TypeVar

import lmdb

from scae_dali.cache.format import CacheError

__all__ = [
    "DATA_FILE",
    "Claim",
    "Environment",
    "environment_at",
    "make_directory",
    "new_directory",
    "require_data_file",
]

INITIAL_MAP_SIZE = 64 << 20  # bytes of address space, not of disk; doubled whenever it is full
DATA_FILE, LOCK_FILE = "data.mdb", "lock.mdb"

_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
# LMDB reports a short write as EIO, so a full disk may arrive under that name too.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

T = TypeVar("T")


class Claim(Enum):
    """What `Environment.claim` found: whether this process is the one that writes."""

    OURS = auto()  # since before; or the file system has no locks, and nobody can tell
    TAKEN = auto()  # just now: another process may have written until then
    PARENTS = auto()  # the process that this one was forked from is the one
    THEIRS = auto()  # another living process is the one


class Environment:
    """One LMDB environment of this process: opened at first use, resized between transactions."""

    def __init__(self, path: str, parent: int | None = None) -> None:
        """parent: the process that this one was forked from, if it had claimed the cache."""
        self.path = path
        self._parent = parent
        self._state = threading.Condition()  # guards the next four
        self._handle: lmdb.Environment | None = None
        self._active = 0  # transactions open now
        self._identity: tuple[int, int] | None = None
        self._lock: int | None = None  # file descriptor of the directory
        self._writing = threading.Lock()  # LMDB allows one writer; ours queue here

    def view(self, look: Callable[[lmdb.Transaction], T]) -> T:
        """Returns look(transaction), for a transaction on the newest snapshot."""
        while True:
            try:
                with self._shared() as handle:
                    return _transact(handle, look, write=False)
            except lmdb.MapResizedError:  # another process has grown the file
                self._resize(0)

    def update(self, change: Callable[[lmdb.Transaction], None], *, needs: int) -> None:
        """Calls change(transaction) and commits; does both again when the map had to grow.

        needs: bytes for the message of the OSError that a full disk raises. Raises CacheError where
        the data file is no longer the one that was opened: LMDB would write to a file without a
        name, and all would be lost when it is closed.
        """
        with self._writing:
            while True:
                try:
                    with self._shared() as handle:
                        if self._identity != _identity(self.path):
                            raise self._gone()
                        return _transact(handle, change, write=True)
                except lmdb.MapFullError:
                    self._resize(2)
                except lmdb.MapResizedError:
                    self._resize(0)
                except lmdb.ReadonlyError as error:
                    raise PermissionError(
                        f"saliency cache {self.path!r} is read-only here; give this user write "
                        f"permission to the directory, {DATA_FILE} and {LOCK_FILE}, or copy it to "
                        "a writable place"
                    ) from error
                except lmdb.Error as error:
                    if (code := _code(error, _DISK_ERRORS)) is None:
                        raise
                    raise OSError(
                        code,
                        f"{os.strerror(code)}: nothing of this chunk was written, all that was "
                        f"committed before is kept; make room for about {needs:,} bytes and run "
                        "the pass again, it resumes",
                        self.path,
                    ) from error

    def copy(self, path: str) -> None:
        """Writes the newest snapshot into an empty directory, without the pages that are free."""
        while True:
            try:
                with self._shared() as handle:
                    return handle.copy(path, compact=True)
            except lmdb.MapResizedError:
                self._resize(0)
            except lmdb.Error as error:  # a disk that fills up may be an invalid argument too
                size = os.path.getsize(os.path.join(self.path, DATA_FILE))
                raise OSError(
                    _code(error, _DISK_ERRORS) or errno.EIO,
                    f"the copy was not made ({error}); make room for about {size:,} bytes",
                    path,
                ) from error

    def claim(self) -> Claim:
        """Makes this process the one that writes, until `close` or its end, unless another is.
        Raises CacheError where there is no directory any more."""
        with self._state:
            try:
                if self._lock is not None:
                    if os.path.samestat(os.fstat(self._lock), os.stat(self.path)):
                        return Claim.OURS
                    self.disclaim()  # the directory was made anew
                descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise self._gone() from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return Claim.PARENTS if self._parent == os.getppid() else Claim.THEIRS
            except OSError:
                os.close(descriptor)
                return Claim.OURS
            self._lock = descriptor
            return Claim.TAKEN

    def disclaim(self) -> bool:
        """Lets go of the claim; whether there was one. A fork shares the lock, and so keeps it."""
        claimed, self._lock = self._lock, None
        if claimed is not None:
            os.close(claimed)
        return claimed is not None

    def close(self) -> None:
        """Waits for transactions, closes LMDB, and lets go of the claim."""
        with self._alone():
            self._close()
            self.disclaim()

    def forget_if_replaced(self) -> None:
        """Closes it if the directory was deleted, or made anew, while it was open."""
        with self._alone():
            if self._handle is not None and self._identity != _identity(self.path):
                self._close()

    def hold(self) -> None:
        """Before a fork: waits for transactions, closes, and keeps others out until `release`."""
        self._state.acquire()
        self._state.wait_for(lambda: self._active == 0)
        self._close()

    def release(self) -> None:
        """After a fork, in the parent: lets others in again."""
        self._state.release()

    @contextmanager
    def _shared(self) -> Iterator[lmdb.Environment]:
        with self._state:
            if self._handle is None:
                self._handle = self._open()
                self._identity = _identity(self.path)
            self._active += 1
            handle = self._handle
        try:
            yield handle
        finally:
            with self._state:
                self._active -= 1
                self._state.notify_all()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._state:
            self._state.wait_for(lambda: self._active == 0)
            yield

    def _resize(self, factor: int) -> None:
        """Multiplies the size of the map by factor; 0 takes the size of the file."""
        with self._alone():
            if self._handle is not None:
                self._handle.set_mapsize(factor * self._handle.info()["map_size"])

    def _gone(self) -> CacheError:
        return CacheError(
            f"saliency cache {self.path!r} was deleted, moved or replaced since it was opened "
            "here; nothing more was written to it: run again, or open it again with "
            "SaliencyCache(...)"
        )

    def _close(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def _open(self) -> lmdb.Environment:
        options: dict[str, Any] = {
            "map_size": 0 if _identity(self.path) else INITIAL_MAP_SIZE,  # 0: as the file says
            "create": False,
            "max_readers": 1024,  # the pipelines and passes of all processes of a node
            "max_spare_txns": 0,  # see _transact; after an error the traceback keeps it
        }
        try:
            try:
                handle = lmdb.open(self.path, **options)
            except lmdb.Error as error:
                if _code(error, _DENIED) is None:
                    raise
                return lmdb.open(self.path, readonly=True, lock=False, **options)
            # The snapshot of a killed reader would keep old pages from being reused.
            handle.reader_check()
        except lmdb.Error as error:
            raise CacheError(
                f"{self.path!r} cannot be opened as a saliency cache ({error}); close whatever "
                "else has it open, or delete it and build it anew"
            ) from error
        return handle


def _transact(handle: lmdb.Environment, work: Callable[[lmdb.Transaction], T], write: bool) -> T:
    # In a function of its own so that the transaction object is gone before the environment may be
    # closed: py-lmdb 1.4 crashes on one that goes later.
    with handle.begin(write=write) as txn:
        return work(txn)


_environments: dict[str, Environment] = {}
_environments_lock = threading.Lock()
_parents: dict[str, int] = {}  # path -> the process that had claimed it at the fork


def environment_at(path: str) -> Environment:
    """The one environment of this process at a real path."""
    known = _environments.get(path)
    if known is None:
        with _environments_lock:
            known = _environments.setdefault(path, Environment(path, _parents.get(path)))
    return known


def _before_fork() -> None:
    # LMDB forbids an inherited environment, closing it in the child included, and py-lmdb then
    # refuses to open the file a second time: so nothing may be open at the moment of the fork.
    _environments_lock.acquire()
    for held in _environments.values():
        held.hold()


def _after_fork_in_parent() -> None:
    for held in _environments.values():
        held.release()
    _environments_lock.release()


def _after_fork_in_child() -> None:
    global _environments_lock
    # A lock lives as long as any copy of its descriptor; the parent's shall end with the parent.
    claimed = [path for path, held in _environments.items() if held.disclaim()]
    _parents.clear()
    _parents.update(dict.fromkeys(claimed, os.getppid()))
    _environments.clear()
    _environments_lock = threading.Lock()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)


def make_directory(path: str, *, exist_ok: bool) -> None:
    """Makes a cache's directory; with exist_ok, it may hold an environment. Raises CacheError."""
    if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
        if not exist_ok:
            raise CacheError(
                f"cannot create a saliency cache at {path!r}: something is there; open it with "
                "SaliencyCache(...), pass exist_ok=True, or choose another path"
            )
        _require_directory(path)
        if foreign := sorted(set(os.listdir(path)) - {DATA_FILE, LOCK_FILE}):
            raise CacheError(
                f"{path!r} is no saliency cache: it holds {foreign[0]!r}; choose another path"
            )
    os.makedirs(path, exist_ok=True)


@contextmanager
def new_directory(path: str) -> Iterator[str]:
    """A directory for a cache that appears at `path` when all is well with it, at the end.

    Yields where it is until then. If the context fails it is removed. Raises CacheError where
    something is at `path`.
    """
    path = os.path.abspath(path)
    if os.path.lexists(path):
        raise CacheError(f"something is at {path!r} already; choose another path, or remove it")
    parent, name = os.path.split(path)
    hidden = os.path.join(parent, f".{name}-{secrets.token_hex(4)}")
    os.makedirs(hidden)
    try:
        yield hidden
        _sync(os.path.join(hidden, DATA_FILE))
        os.rename(hidden, path)  # fails where something has come to `path` meanwhile
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    _sync(parent)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_data_file(path: str) -> None:
    """Raises CacheError where there is none, or an empty one."""
    _require_directory(path)
    if _identity(path) is None:
        raise CacheError(
            f"no saliency cache at {path!r}: the directory holds no {DATA_FILE}; build one with "
            "`scae-dali build-cache` or SaliencyCache.create"
        )


def _require_directory(path: str) -> None:
    if not os.path.isdir(path):
        what = "a file is there" if os.path.lexists(path) else "the directory does not exist"
        raise CacheError(
            f"no saliency cache at {path!r}: {what}; build one with `scae-dali build-cache` or "
            "SaliencyCache.create"
        )


def _identity(path: str) -> tuple[int, int] | None:
    """Device and inode of the data file; None where there is none yet, or an empty one."""
    try:
        status = os.stat(os.path.join(path, DATA_FILE))
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_size else None


def _code(error: lmdb.Error, codes: tuple[int, ...]) -> int | None:
    """Which of these codes an LMDB error has; only its text tells. None: none of them."""
    return next((code for code in codes if os.strerror(code) in str(error)), None)
