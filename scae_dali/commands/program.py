"""How a program of the command line ends, also where it is interrupted or nobody reads what it
prints."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from scae_dali.training.output import end_with_readers

__all__ = ["Status", "interrupted", "run_program"]

Status = int | str | None  # as sys.exit takes it


def run_program(main: Callable[[], Status]) -> Status:
    """Run a program; returns its status. Ctrl-C is told in a line, and gives the status that a
    shell gives to a process that SIGINT has ended. Where nobody reads the output any more, the
    program ends without a word."""
    with end_with_readers():
        try:
            try:
                return main()
            except KeyboardInterrupt:
                return interrupted()
        finally:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()


def interrupted() -> int:
    """Tell of Ctrl-C; returns the status. Of processes under torchrun, one tells."""
    if os.environ.get("RANK", "0") == "0":
        print("interrupted", file=sys.stderr)
    return 128 + signal.SIGINT
