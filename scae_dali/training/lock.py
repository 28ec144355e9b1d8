"""A lock that keeps two runs from writing to one folder.

The run's first process holds it to the end, on a file in the folder. The system releases it when
that process dies, however it dies. The lock is on a file, but writing goes by the folder's name. So
the process checks, before it writes, whether that name still leads to the file that it locked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from scae_dali.training.ranks import Ranks

NAME = "run.lock"
PATIENCE_S = 5.0  # a process that its launcher has left behind needs a moment to end
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


@contextmanager
def hold(out: Path, ranks: Ranks) -> Iterator[Callable[[], None]]:
    """Make the folder `out` where it is missing, and keep other runs out of it.

    Every rank calls it. Raises ValueError in all of them where another process has the folder.
    Yields a check that the first rank calls before it writes anything there: it raises ValueError
    where the folder is no longer this run's. In other ranks the check does nothing.
    """
    checks: list[Callable[[], None]] = []
    with ExitStack() as stack:
        ranks.by_first(lambda: checks.append(stack.enter_context(_locked(out))))
        yield checks[0] if checks else lambda: None


@contextmanager
def _locked(out: Path) -> Iterator[Callable[[], None]]:
    if out.is_symlink() and not out.exists():
        raise ValueError(
            f"out must be a folder, got the link {str(out)!r} to {os.readlink(out)!r}, which does "
            "not exist: make that folder, or give another --out"
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {str(out)!r}; give another --out")
    path, end = out / NAME, time.monotonic() + PATIENCE_S
    file = _opened(path)
    try:
        # Its former owner may have removed the file, or the folder, while we waited.
        while not (_lock(file, path, end) and _is_at(file, path)):
            stale, file = file, _opened(path)
            os.close(stale)

        def check() -> None:
            if not _is_at(file, path):
                raise ValueError(
                    f"the folder of this run, {str(out)!r}, was moved, removed or taken by another "
                    f"run ({NAME} there is not ours any more); nothing more is written. What was "
                    "saved before goes on with --resume, where the folder still is"
                )

        yield check
    finally:
        os.close(file)  # the file stays: another process may wait for the lock on it


def _opened(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    # NFS gives exclusive locks on files that are open for writing alone.
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


def _lock(file: int, path: Path, end: float) -> bool:
    """Whether the lock is ours, or the file system has no locks; False if the file is gone from
    `path` meanwhile. Raises ValueError at the time `end`."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not _is_at(file, path):
                return False
            if time.monotonic() > end:
                raise ValueError(
                    f"another process is training in {str(path.parent)!r} (it holds {path.name}, "
                    f"fuser {path} names it): wait for its end, or give another --out"
                ) from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"note: {str(path.parent)!r} lies on a file system without locks "
                f"({error.strerror}); take care that no other run writes there",
                file=sys.stderr,
            )
            return True
        else:
            return True
