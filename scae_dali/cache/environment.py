"""How a cache's LMDB environment is found, opened, shared, grown, claimed and recovered.

A process has one environment for each path, whatever its threads and forks. Errors that a user can
mend name the remedy. A process that writes claims the cache by a lock on its directory (flock),
which the system takes back when the process ends, however it ends.

Every commit is synced (LMDB's default). A killed process or a lost machine never damages what was
committed. LMDB wants a local file system. Where a process cannot take its locks, because of the
file system or of permissions, it reads a copy in memory, and cannot write.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from typing import Any, TypeVar

import lmdb

from scae_dali.cache.errors import (
    DENIED,
    DISK,
    LOCKLESS,
    SAME_NUMBER,
    code_of,
    no_writing,
    told,
    why_no_locks,
)
from scae_dali.cache.files import (
    DATA_FILE,
    LOCK_FILE,
    READERS,
    copy_in_memory,
    require_sound,
    require_whole,
    reserve_lock_file,
    transaction_of,
)
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
PATIENCE = 2.0  # seconds that a look-up waits for others to end where there are too many
RENEWAL = 10.0  # seconds that a copy in memory serves before it is compared with the file

_OPTIONS: dict[str, Any] = {
    "create": False,
    "max_spare_txns": 0,  # see _transact; after an error the traceback keeps it
}

_BUILD = "build one with `scae-dali build-cache` or SaliencyCache.create"

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
        self._state = threading.Condition()  # guards the next eight
        self._handle: lmdb.Environment | None = None
        self._copy: int | None = None  # file descriptor of memory, where there are no locks
        self._compared = 0.0  # when the copy was last compared with the file
        self._obstacle = 0  # what the system answered when the locks were to be taken
        self._active = 0  # transactions open now
        self._forking = False
        self._identity: tuple[int, int] | None = None
        self._lock: int | None = None  # file descriptor of the directory
        self._writing = threading.Lock()  # LMDB allows one writer; ours queue here

    def view(self, look: Callable[[lmdb.Transaction], T]) -> T:
        """Returns look(transaction), for a transaction on the newest snapshot."""
        return self._run(lambda handle: _transact(handle, look, write=False))

    def require_sound(self) -> None:
        """Raises CacheError where the pages of the data file do not hold together. To be called in
        `view`: then they stay. A copy in memory was found sound when it was made."""
        if self._copy is None:
            require_sound(self.path)

    def update(self, change: Callable[[lmdb.Transaction], None], *, needs: int) -> None:
        """Calls change(transaction) and commits; does both again when the map had to grow.

        needs: bytes for the message of the OSError that a full disk raises. Raises CacheError where
        the data file is no longer the one that was opened: LMDB would write to a file without a
        name, and all would be lost when it is closed.
        """

        def commit(handle: lmdb.Environment) -> None:
            if self._identity != _identity(self.path):
                raise self._gone()
            if self._copy is not None:
                raise no_writing(self.path, self._obstacle)
            _transact(handle, change, write=True)

        with self._writing:
            while True:
                try:
                    return self._attempt(commit)
                except lmdb.MapFullError:
                    self._resize(2)
                except lmdb.ReadonlyError as error:
                    raise no_writing(self.path, errno.EACCES) from error
                except lmdb.Error as error:
                    if (code := code_of(error, DISK)) is None:
                        raise self._told(error) from error
                    raise OSError(
                        code,
                        f"{os.strerror(code)}: nothing of this chunk was written, all that was "
                        f"committed before is kept; make room for about {needs:,} bytes and run "
                        "the pass again, it resumes",
                        self.path,
                    ) from error

    def copy(self, path: str) -> None:
        """Writes the newest snapshot into an empty directory, without the pages that are free."""

        def save(handle: lmdb.Environment) -> None:
            # An environment that is opened by the name of a file is copied to a file.
            handle.copy(
                os.path.join(path, DATA_FILE) if self._copy is not None else path, compact=True
            )

        try:
            self._attempt(save)
        except lmdb.Error as error:  # a disk that fills up may be an invalid argument too
            if (code := code_of(error, (*DISK, errno.EINVAL))) is None:
                raise self._told(error) from error
            size = os.path.getsize(os.path.join(self.path, DATA_FILE))
            raise OSError(
                errno.EIO if code == errno.EINVAL else code,
                f"the copy was not made ({error}); make room for about {size:,} bytes",
                path,
            ) from error

    def drop_stale_readers(self) -> None:
        """Takes killed processes out of LMDB's table of readers: the snapshot of such a reader
        keeps old pages from being used again."""
        self._run(lambda handle: handle.reader_check())

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
            except PermissionError as error:
                raise PermissionError(
                    f"saliency cache {self.path!r} cannot be written to by this user, who may not "
                    "read its directory; ask its owner for permission to read and write the "
                    "directory, and what is in it"
                ) from error
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
            self.drop_copy()
            self.disclaim()

    def forget_if_replaced(self) -> None:
        """Closes it if the directory was deleted, or made anew, while it was open."""
        with self._alone():
            if self._handle is not None and self._identity != _identity(self.path):
                self._close()
                self.drop_copy()

    def hold(self) -> None:
        """Before a fork: waits for transactions, closes, and keeps others out until `release`."""
        self._state.acquire()
        self._forking = True
        self._state.wait_for(lambda: self._active == 0)
        self._close()

    def release(self) -> None:
        """After a fork, in the parent: lets others in again."""
        self._forking = False
        self._state.notify_all()
        self._state.release()

    def drop_copy(self) -> None:
        """Closes the copy in memory, if there is one. A fork does so with that of its parent."""
        copy, self._copy = self._copy, None
        if copy is not None:
            os.close(copy)

    def _run(self, work: Callable[[lmdb.Environment], T]) -> T:
        """Returns work(LMDB's environment). Raises CacheError for LMDB's errors."""
        try:
            return self._attempt(work)
        except lmdb.Error as error:
            raise self._told(error) from error

    def _attempt(self, work: Callable[[lmdb.Environment], T]) -> T:
        """Returns work(LMDB's environment); does it again where another process has grown the file,
        and for a while where the table of readers is full."""
        patience = None
        while True:
            try:
                with self._shared() as handle:
                    return work(handle)
            except lmdb.MapResizedError:
                self._resize(0)
            except lmdb.ReadersFullError:
                patience = patience or time.monotonic() + PATIENCE
                if time.monotonic() > patience:
                    raise
                with self._shared() as handle:
                    handle.reader_check()
                time.sleep(0.01)

    @contextmanager
    def _shared(self) -> Iterator[lmdb.Environment]:
        with self._state:
            # A fork that waits comes first; not for ever, as this look may be within another one.
            self._state.wait_for(lambda: not self._forking, PATIENCE)
            if self._handle is None:
                self._identity = _identity(self.path)
                self._handle = self._open()
                self._identity = _identity(self.path)
            elif self._copy is not None and self._active == 0:
                self._renew()
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
            if self._handle is None:
                return
            try:
                self._handle.set_mapsize(factor * self._handle.info()["map_size"])
            except lmdb.Error as error:
                raise self._told(error) from error

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
        there = self._identity is not None
        if there:
            require_whole(self.path)
        try:
            return self._open_with_locks()
        except FileNotFoundError as error:
            raise self._gone() from error
        except OSError as error:  # lmdb.Error is none
            cause: Exception = error
            code = error.errno if error.errno in (*DENIED, *DISK) else None
        except lmdb.Error as error:
            cause = error
            code = code_of(error, (*DENIED, *LOCKLESS, *DISK, SAME_NUMBER))
        if code is None:
            raise told(cause, self.path, opening=True) from cause
        if not there:
            raise no_writing(self.path, code) from cause
        if code in DENIED and os.access(os.path.join(self.path, LOCK_FILE), os.W_OK):
            try:
                return self._open_with_locks(readonly=True)
            except lmdb.Error as error:
                code = code_of(error, (SAME_NUMBER,)) or code
        self._obstacle = code
        if self._copy is None:
            self._take_copy()
        return self._open_copy()

    def _open_with_locks(self, readonly: bool = False) -> lmdb.Environment:
        reserve_lock_file(self.path)
        size = 0 if self._identity else INITIAL_MAP_SIZE  # 0: as the file says
        handle = lmdb.open(
            self.path, map_size=size, readonly=readonly, max_readers=READERS, **_OPTIONS
        )
        handle.reader_check()
        try:
            handle.begin().abort()  # LMDB locks the number of this process at its first look
        except lmdb.Error as error:
            if code_of(error, (SAME_NUMBER,)) is not None:
                handle.close()
                raise
        self.drop_copy()
        return handle

    def _take_copy(self) -> None:
        """Takes a copy in place of the one that is there, if any. Warns of the first one."""
        copy = copy_in_memory(self.path)
        self.drop_copy()
        self._copy, self._compared = copy, time.monotonic()
        if self.path in _warned:
            return
        _warned.add(self.path)
        warnings.warn(
            f"saliency cache {self.path!r} is read from a copy in the memory of this process, of "
            f"{os.fstat(copy).st_size / 1e6:.1f} MB, as LMDB's locks cannot be taken: "
            f"{why_no_locks(self._obstacle)}",
            RuntimeWarning,
            stacklevel=2,
        )

    def _open_copy(self) -> lmdb.Environment:
        file = f"/proc/self/fd/{self._copy}"
        try:
            return lmdb.open(file, map_size=0, subdir=False, readonly=True, lock=False, **_OPTIONS)
        except lmdb.Error as error:
            raise self._told(error) from error

    def _renew(self) -> None:
        """Takes a new copy where the file has changed since, at most every RENEWAL seconds."""
        assert self._handle is not None
        if time.monotonic() - self._compared < RENEWAL:
            return
        self._compared = time.monotonic()
        with suppress(CacheError, OSError):  # then the older copy goes on serving
            changed = transaction_of(self.path) != self._handle.info()["last_txnid"]
            if changed and self._identity == _identity(self.path):
                self._take_copy()
                self._close()
                self._handle = self._open_copy()

    def _told(self, error: lmdb.Error) -> CacheError:
        """An error of LMDB in words."""
        if isinstance(error, lmdb.PanicError):  # nothing more can be done with this handle
            with self._alone():
                self._close()
        return told(error, self.path)


def _transact(handle: lmdb.Environment, work: Callable[[lmdb.Transaction], T], write: bool) -> T:
    # In a function of its own so that the transaction object is gone before the environment may be
    # closed: py-lmdb 1.4 crashes on one that goes later.
    with handle.begin(write=write) as txn:
        return work(txn)


_warned: set[str] = set()  # paths of caches of which a warning has told that they are copied
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
    for held in _environments.values():
        held.drop_copy()
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
    """Makes a cache's directory; with exist_ok, it may hold an environment. Raises CacheError.

    What a process leaves that was killed when it made one, or found the disk full, is no
    environment. Beside one, files of others do no harm.
    """
    if os.path.lexists(path) and (not os.path.isdir(path) or _identity(path) or _foreign(path)):
        if not exist_ok:
            raise CacheError(
                f"cannot create a saliency cache at {path!r}: something is there; open it with "
                "SaliencyCache(...), pass exist_ok=True, or choose another path"
            )
        _require_directory(path)
        if _identity(path) is None and (foreign := _foreign(path)):
            raise CacheError(
                f"{path!r} is no saliency cache: it holds {foreign[0]!r}; choose another path"
            )
    os.makedirs(path, exist_ok=True)


def _foreign(path: str) -> list[str]:
    """What a directory holds beside the files of an environment."""
    return sorted(set(os.listdir(path)) - {DATA_FILE, LOCK_FILE})


@contextmanager
def new_directory(path: str, *sources: str) -> Iterator[str]:
    """A directory for a cache that appears at `path` when all is well with it, at the end.

    Yields where it is until then. If the context fails it is removed. Raises CacheError where
    something is at `path`, or where it is within one of the directories `sources`.
    """
    path = os.path.abspath(path)
    if os.path.lexists(path):
        raise CacheError(f"something is at {path!r} already; choose another path, or remove it")
    for source in map(os.path.realpath, sources):
        if os.path.realpath(path).startswith(os.path.join(source, "")):
            raise CacheError(f"{path!r} is within saliency cache {source!r}; choose another path")
    parent, name = os.path.split(path)
    hidden = os.path.join(parent, f".{name}-{secrets.token_hex(4)}")
    os.makedirs(hidden)
    try:
        yield hidden
        _sync(os.path.join(hidden, DATA_FILE))
        os.rename(hidden, path)  # fails where something has come to `path` meanwhile
    except BaseException as error:
        shutil.rmtree(hidden, ignore_errors=True)
        if isinstance(error, OSError) and os.path.basename(hidden) in str(error.filename):
            raise OSError(error.errno, error.strerror, path) from error
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
        empty = os.path.exists(os.path.join(path, DATA_FILE))
        raise CacheError(
            f"no saliency cache at {path!r}: "
            + (f"its {DATA_FILE} is empty" if empty else f"the directory holds no {DATA_FILE}")
            + f"; {_BUILD}"
        )


def _require_directory(path: str) -> None:
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            return
        what = "a file is there"
    except PermissionError as error:
        raise _unseen(path) from error
    except (FileNotFoundError, NotADirectoryError):
        what = "the directory does not exist"
    raise CacheError(f"no saliency cache at {path!r}: {what}; {_BUILD}")


def _identity(path: str) -> tuple[int, int] | None:
    """Device and inode of the data file; None where there is none yet, or an empty one."""
    try:
        status = os.stat(os.path.join(path, DATA_FILE))
    except PermissionError as error:
        raise _unseen(path) from error
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_size else None


def _unseen(path: str) -> PermissionError:
    return PermissionError(
        f"this user may not look into the saliency cache {path!r}; ask its owner for permission to "
        "enter the directory"
    )
