"""Signals that ask a run to end.

Schedulers give notice by SIGTERM or SIGUSR1 before they kill a job, a terminal that is closed by
SIGHUP, and Ctrl-C is SIGINT. A run saves a checkpoint then, and ends.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from scae_dali.training.ranks import Ranks

__all__ = ["Ended", "Notice"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
ECHO_S = 2.0  # in which a signal comes a second time by itself
STEPS = 10  # of several processes; they ask each other every so many steps


class Ended(BaseException):
    """The run was asked to end. number: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Notice:
    """Notes signals, within `with`; those that the process ignores stay ignored.

    Outside `saving`, a signal raises Ended in the main thread. Within, it is kept until the run
    asks for it, at a point where it can save; Ctrl-C a second time raises Ended at once.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._number: int | None = None
        self._noted = 0.0
        self._waits = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Notice:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """The run asks for signals within this context, by `raise_if_due`."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def due(self, step: int) -> bool:
        """Whether the run must save and end after so many steps; all ranks hear the same."""
        if self._ranks.world == 1:
            return self._number is not None
        if step % STEPS:
            return False
        noted = [number for number in self._ranks.gather(self._number) if number is not None]
        self._number = noted[0] if noted else None
        return bool(noted)

    def end(self) -> None:
        """Raise Ended for the signal that is due."""
        assert self._number is not None
        raise Ended(self._number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first = self._number is None
        if first:
            self._number, self._noted = number, time.monotonic()
        # torchrun passes on what its processes have got from the terminal or the scheduler too.
        again = number == signal.SIGINT and time.monotonic() > self._noted + ECHO_S
        if not self._waits or (again and not first):
            raise Ended(number)
