"""One run to a folder: a lock on a file in it that its first process holds to the end.

The system lets go of it when that process dies, however it dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from scae_dali.ranks import Ranks

NAME = "run.lock"
PATIENCE_S = 5.0  # a process that its launcher has left behind needs a moment to end
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


@contextmanager
def hold(out: Path, ranks: Ranks) -> Iterator[None]:
    """Make the folder `out` where it is missing, and keep other runs out of it.

    Every rank calls it. Raises ValueError in all of them where another process has the folder.
    """
    with ExitStack() as stack:
        ranks.by_first(lambda: stack.enter_context(_locked(out)))
        yield


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {str(out)!r}")
    out.mkdir(parents=True, exist_ok=True)
    path = out / NAME
    # NFS gives exclusive locks on files that are open for writing alone.
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(file, path)
        yield
    finally:
        os.close(file)  # the file stays: another process may wait for the lock on it


def _lock(file: int, path: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
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
            return None
