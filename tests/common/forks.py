"""Code in other processes, which are forked from one that has imported what takes long."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["train", "scae_dali.commands.build_cache"])


@dataclass
class Script:
    """Code that a process runs as its main module. names: of objects that it finds."""

    code: str
    argv: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)


def run_forked(*scripts: Script, timeout: float = 300) -> list[subprocess.CompletedProcess[str]]:
    """Run all of them at once, to their end. Raises subprocess.TimeoutExpired."""
    with tempfile.TemporaryDirectory() as folder:
        numbers = range(len(scripts))
        files = [[Path(folder, f"{name}{k}") for name in ("out", "errors")] for k in numbers]
        processes = [
            _FORKS.Process(target=_run, args=(script, sys.path, *map(str, pair)))
            for script, pair in zip(scripts, files, strict=True)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(end - time.monotonic(), 0))
        late = [process for process in processes if process.exitcode is None]
        for process in late:
            process.kill()
            process.join()
        said = [[path.read_text() if path.exists() else "" for path in pair] for pair in files]
    codes = [script.code for script in scripts]
    if late:
        out, errors = ("\n".join(part) for part in zip(*said, strict=True))
        raise subprocess.TimeoutExpired(codes, timeout, out, errors)
    return [
        subprocess.CompletedProcess(code, process.exitcode, *pair)
        for code, process, pair in zip(codes, processes, said, strict=True)
    ]


def _run(script: Script, path: list[str], out: str, errors: str) -> None:
    for number, name in enumerate((out, errors), start=1):
        with open(name, "wb") as file:
            os.dup2(file.fileno(), number)
    sys.path[:] = path
    sys.argv = ["-c", *script.argv]
    os.environ.update(script.environment)
    exec(script.code, {"__name__": "__main__", **script.names})
