"""Packs what a machine that keeps nothing must give back: enough to report its runs elsewhere, and
to go on with those that have not ended. `tar -xf FILE -C OUT` unpacks it.
"""

from __future__ import annotations

import argparse
import os
import tarfile
import zlib
from pathlib import Path

from tools.common import runs
from tools.paper.jobs import STARTS, existing, folder_of
from tools.paper.tables import Cell, Section

__all__ = ["check_unpacked", "ended", "pack"]

ALWAYS = ("config.json", "metrics.jsonl", STARTS)
TO_GO_ON = ("checkpoint.pt", "saliency.lmdb/data.mdb")  # of a run that has not ended


def check_unpacked(place: Path, file: Path) -> None:
    """Raise ValueError where an archive has what `pack` would lose: epochs that the runs in the
    table's folder, `place`, lack, or runs of another table. Also where it cannot be read."""
    if not file.exists():
        return
    if not file.is_file():
        raise ValueError(f"--archive must be a file, got {str(file)!r}, which is something else")
    try:
        _check_members(place, file)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(
            f"--archive {str(file)!r} cannot be read ({error}): move it away, or name another file"
        ) from error


def _check_members(place: Path, file: Path) -> None:
    out = place.parent
    with tarfile.open(file) as archive:
        for member in archive:
            table = next(iter(Path(member.name).parts), place.name)  # ./ has none
            if table != place.name:
                raise ValueError(
                    f"--archive {str(file)!r} holds runs of {table}, and those of {place.name} "
                    "would take their place: name another file"
                )
            mine = out / member.name
            if mine.name != "metrics.jsonl" or (
                mine.exists() and mine.stat().st_size >= member.size
            ):
                continue
            raise ValueError(
                f"--archive {str(file)!r} has epochs of {mine.parent.name} that --out lacks: "
                f"unpack it first (tar -xf {file} -C {out}), or name another file"
            )


def pack(args: argparse.Namespace, file: Path) -> int:
    """Write the table's runs into a compressed tar file, which appears once it is complete. Where
    there are none, nothing is written.

    The weights of a run go with it until the second stages on them have ended. Returns the number
    of runs. Raises ValueError where the file cannot be written.
    """
    found = existing(args)
    if not found:
        return 0
    draft = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(draft, "w:gz", compresslevel=6, dereference=True) as archive:
            for path, section, model, cell, seed in found:
                for name in _members(args, path, section, model, cell, seed):
                    if (path / name).exists():
                        archive.add(path / name, f"{args.place.name}/{path.name}/{name}")
        draft.replace(file)
    except OSError as error:
        raise ValueError(
            f"--archive {str(file)!r} cannot be written ({error}): the runs are in {args.place}; "
            "make room or name another file, and repeat the command"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    return len(found)


def _members(
    args: argparse.Namespace, path: Path, section: Section, model: str, cell: Cell, seed: int
) -> list[str]:
    names = [*ALWAYS]
    if not ended(path):
        names += TO_GO_ON
    others = [other.name for other in section.cells if other.first == cell.name]
    if not all(ended(folder_of(args, section, model, name, seed)) for name in others):
        names.append("weights.pt")
    return names


def ended(path: Path) -> bool:
    """Whether a run has all its epochs."""
    config = path / "config.json"
    return config.exists() and runs.epochs_done(path) >= runs.read_config(config)["epochs"]
