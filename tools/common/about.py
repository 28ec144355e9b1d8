"""What a result records of how it was made: command, commit, machine, versions. Reads and writes
results as JSON."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from tools import ROOT

__all__ = ["about", "hardware", "read_json", "versions", "write_json"]

PACKAGES = {
    "numpy": ("numpy",),
    "lmdb": ("lmdb",),
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "timm": ("timm",),
    "dali": ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "nvidia-dali-cuda110"),
}


def about() -> dict[str, Any]:
    """The record for a result: this tool's command line, commit, hardware and versions."""
    return {
        "command": shlex.join(["python", f"tools/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": _commit(),
        "hardware": hardware(),
        "versions": versions(),
    }


def hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in GB, and the GPU if torch sees one."""
    gpu = None
    try:
        import torch

        if torch.cuda.is_available():
            gpu = torch.cuda.get_device_name()
    except ImportError:
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gb": round(memory / 1e9, 1),
        "gpu": gpu,
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter here; None for one not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distributions in PACKAGES.items():
        found[name] = None
        for distribution in distributions:
            try:
                found[name] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                continue
    return found


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a file of JSON holds. Raises ValueError, with its path, for another file."""
    try:
        return json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a file of JSON ({error}): make it anew") from error


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write content as indented JSON; the file appears only once it is complete."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(target.name + ".tmp")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    draft.replace(target)


def _commit() -> str | None:
    """The working tree's commit, with -dirty if it has changes; None outside a working tree."""
    told = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(told, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
