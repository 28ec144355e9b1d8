"""Checkpoints and weights as files: written wholly or not at all, and read without running what is
in them."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: Any) -> None:
    """A torch.save that leaves the old file or the new one, even if it is interrupted.

    Raises OSError where the file cannot be written.
    """
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        # torch itself does not say that the disk is full.
        reason = error if isinstance(error, OSError) else error.__context__ or "is the disk full?"
        gone = isinstance(error, FileNotFoundError)
        remedy = "its folder was moved or removed" if gone else "make room and resume"
        raise OSError(
            f"{str(path)!r} cannot be written ({reason}); {remedy}: what was saved before is kept"
            + (" where the folder is now" if gone else "")
        ) from error


def load(path: Path) -> Any:
    """What `save` wrote, on the CPU. Raises ValueError where the file is damaged or not of save."""
    try:
        with zipfile.ZipFile(path) as records:  # torch does not look at the checksums
            if (damaged := records.testzip()) is not None:
                raise zipfile.BadZipFile(f"its record {damaged!r} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises half a dozen types
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0].partition('. ')[0]}"
        raise ValueError(
            f"checkpoint {str(path)!r} cannot be read ({reason}); restore it from a copy, or start "
            "in a new folder"
        ) from error


# Entries that every version's checkpoint of a run has, and the entries of each process in `ranks`.
_ENTRIES = {"of": dict, "epoch": int, "step": int, "totals": dict, "ranks": list}
_ENTRIES |= dict.fromkeys(("net", "optimizer", "scaler"), dict)
_OF_A_RANK = {"sums": dict, "rng": torch.Tensor}
_OPTIONAL = {"log": str, "val_files": torch.Tensor}


def load_run(path: Path) -> dict[str, Any]:
    """The checkpoint of a run: a dict, whose entry `of` is a dict of the run's settings and data.

    Raises ValueError where the file holds anything else.
    """
    state = load(path)
    faults = _faults(state, _ENTRIES) if isinstance(state, dict) else ["it is no dict"]
    if not faults:
        faults = [
            f"{name} is no {kind.__name__}"
            for name, kind in _OPTIONAL.items()
            if state.get(name) is not None and not isinstance(state[name], kind)
        ]
        for rank, mine in enumerate(state["ranks"]):
            odd = ["it is no dict"]
            if isinstance(mine, dict):
                odd = _faults(mine, _OF_A_RANK)
                odd += [f"it lacks {name}" for name in ("pipeline", "cuda_rng") if name not in mine]
            faults += [f"of process {rank}, {fault}" for fault in odd]
    if faults:
        raise ValueError(
            f"{str(path)!r} is no checkpoint of a training run ({'; '.join(faults[:2])}); move it "
            "away and restore the run's own from a copy, or start in a new folder"
        )
    return state


def saved_log(path: Path) -> str:
    """The log that a run's checkpoint has; "" where there is none to read.

    The weights are not read from the disk.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        log = state.get("log", "")
    except Exception:  # a damaged checkpoint is an error when the run is resumed, not here
        return ""
    return log if isinstance(log, str) else ""


def _faults(state: dict[str, Any], entries: dict[str, type]) -> list[str]:
    lacking = [f"it lacks {name}" for name in entries if name not in state]
    return lacking + [
        f"{name} is no {kind.__name__}"
        for name, kind in entries.items()
        if name in state and (not isinstance(state[name], kind) or isinstance(state[name], bool))
    ]
