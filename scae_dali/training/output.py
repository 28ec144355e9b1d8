"""Output that nobody reads any more, as after `… | head`."""

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
    """Let the process go on when nobody reads its output any more.

    note: what is then said on stderr. Characters that the terminal does not know are escaped.
    """

    def tell() -> None:
        if note:
            print(f"note: nobody reads stdout any more; {note}", file=sys.stderr)

    sys.stdout = _Stream(sys.stdout, tell)
    sys.stderr = _Stream(sys.stderr, lambda: None)


@contextmanager
def end_with_readers() -> Iterator[None]:
    """A context that raises SystemExit where nobody reads the output any more, with the status that
    a shell gives to a process that SIGPIPE has ended.

    Characters that the terminal does not know are escaped.
    """

    def end() -> None:
        sys.exit(128 + signal.SIGPIPE)

    before = sys.stdout, sys.stderr
    # A closed stream is None.
    sys.stdout, sys.stderr = (one and _Stream(one, end) for one in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Stream:
    """A stream whose reader may end: then it writes into nothing, and `gone` is called."""

    def __init__(self, stream: TextIO, gone: Callable[[], object]) -> None:
        self._stream, self._gone = stream, gone
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self) -> None:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)
        self._gone()
