"""Output that nobody reads any more, as after `… | head`, or that cannot be written."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

__all__ = ["end_with_readers", "outlive_readers"]


def outlive_readers(note: str = "") -> None:
    """Let the process go on when nobody reads its output any more, or it cannot be written: the
    disk of a log is full, a terminal is gone, a stream is closed.

    note: what is then said on stderr. Characters that the terminal does not know are escaped.
    """

    def tell(fault: OSError) -> None:
        if note:
            why = "nobody reads stdout any more"
            if not isinstance(fault, BrokenPipeError):
                why = f"stdout cannot be written any more ({fault.strerror})"
            print(f"note: {why}; {note}", file=sys.stderr)

    sys.stdout = _Stream(sys.stdout or _nowhere(), tell, OSError)
    sys.stderr = _Stream(sys.stderr or _nowhere(), lambda fault: None, OSError)


def _nowhere() -> TextIO:
    return open(os.devnull, "w")


@contextmanager
def end_with_readers() -> Iterator[None]:
    """A context that raises SystemExit where nobody reads the output any more, with the status that
    a shell gives to a process that SIGPIPE has ended.

    Characters that the terminal does not know are escaped.
    """

    def end(fault: OSError) -> None:
        sys.exit(128 + signal.SIGPIPE)

    before = sys.stdout, sys.stderr
    # A closed stream is None.
    sys.stdout, sys.stderr = (one and _Stream(one, end, BrokenPipeError) for one in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Stream:
    """A stream that may come to an end: then it writes into nothing, and `gone` is called.

    faults: how it ends; others are raised.
    """

    def __init__(
        self, stream: TextIO, gone: Callable[[OSError], object], faults: type[OSError]
    ) -> None:
        self._stream, self._gone, self._faults = stream, gone, faults
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except self._faults as fault:
            self._drop(fault)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except self._faults as fault:
            self._drop(fault)

    def _drop(self, fault: OSError) -> None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)
        self._gone(fault)
