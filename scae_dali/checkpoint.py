"""Files that survive: written wholly or not at all, read without running what is in them."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch


def save(path: Path, state: Any) -> None:
    """torch.save that leaves the old file or the new one, whatever happens meanwhile.

    Raises OSError where the disk does not take it.
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
        # Of a full disk torch says only how many bytes it missed.
        reason = error if isinstance(error, OSError) else error.__context__ or "is the disk full?"
        raise OSError(
            f"{str(path)!r} cannot be written ({reason}); make room and resume: what was saved "
            "before is kept"
        ) from error


def load(path: Path) -> Any:
    """What `save` wrote, on the CPU. Raises ValueError where the file is damaged or of others."""
    try:
        with zipfile.ZipFile(path) as records:  # torch does not look at the checksums
            if (damaged := records.testzip()) is not None:
                raise zipfile.BadZipFile(f"its record {damaged!r} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch names half a dozen types
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0].partition('. ')[0]}"
        raise ValueError(
            f"checkpoint {str(path)!r} cannot be read ({reason}); restore it from a copy, or start "
            "in a new folder"
        ) from error


def load_run(path: Path) -> dict[str, Any]:
    """`load`, of a run: a dict whose entry `of` is a dict of what it was made with. Raises
    ValueError for anything else."""
    state = load(path)
    if not isinstance(state, dict) or not isinstance(state.get("of"), dict):
        raise ValueError(
            f"{str(path)!r} is no checkpoint of a training run; move it away and restore the run's "
            "own from a copy, or start in a new folder"
        )
    return state
