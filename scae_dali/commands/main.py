"""The console command `scae-dali`: runs one of the commands beside this module."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

from scae_dali.checks import check_dali
from scae_dali.commands.program import Status, run_program

# What each does, told here so that --help need not import them all.
COMMANDS = {
    "build-cache": "build a saliency cache from a trained network",
    "inspect-cache": "show what a saliency cache holds",
    "import-maps": "put maps of your own into a saliency cache",
    "export-maps": "write the maps of a saliency cache to one .npy file",
    "merge-caches": "join saliency caches of parts of a data set",
    "copy-cache": "copy a saliency cache, also while it is written",
    "check-images": "find the broken images of a data set",
    "show-erasing": "draw images with their saliency maps and what is erased",
}


def main(argv: Sequence[str] | None = None) -> Status:
    """Run a command with its options. Returns its exit status, or a message, as sys.exit takes."""
    return run_program(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> Status:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="scae-dali",
        description="Commands around saliency caches. `scae-dali COMMAND --help` tells the options "
        "of one.",
        epilog="commands:\n" + "\n".join(f"  {c:{width}}  {does}" for c, does in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"scae-dali {version('scae-dali')}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of those below")
    parser.add_argument("options", metavar="…", nargs=argparse.REMAINDER, help="its options")
    given = parser.parse_args(argv)
    return _run(given.command, given.options, f"scae-dali {given.command}")


def script(command: str) -> Status:
    """Run a command with the options of this process, as a script of tools/ does."""
    return run_program(lambda: _run(command, None, None))


def _run(command: str, options: Sequence[str] | None, prog: str | None) -> Status:
    """Import a command, and run it. options, prog: see argparse; None: those of this process."""
    try:
        if command not in ("inspect-cache", "copy-cache"):  # which read no images
            check_dali()
        module = importlib.import_module(f"scae_dali.commands.{command.replace('-', '_')}")
    except ImportError as error:
        if error.name == "matplotlib":
            return "error: show-erasing needs matplotlib; pip install 'scae-dali[train]'"
        return f"error: {error}"
    return module.main(options, prog=prog)


if __name__ == "__main__":
    sys.exit(main())
