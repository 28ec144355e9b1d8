"""The files that a pattern names: `train-{0000..1023}.tar`, `{a,b}.tar`, `train-*.tar`."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence

from scae_dali.data.scan import DatasetError, Path

__all__ = ["expand"]

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand(patterns: Path | Sequence[Path], root: Path = "") -> list[str]:
    """The files of one pattern or several, relative to root, as paths with root in front.

    `{0..9}`, `{000..127}` and `{a,b}` stand for several patterns, in this order, as in a shell.
    `*`, `?` and `[…]` match names, which come sorted; hidden ones are left out. Raises DatasetError
    where a file is missing, nothing matches, or a file comes twice.
    """
    several = [patterns] if isinstance(patterns, str | os.PathLike) else patterns
    try:
        given = [os.fsdecode(pattern) for pattern in several]
    except TypeError:
        raise DatasetError(
            f"archives must be named by a pattern or a list of patterns, got {patterns!r}; give "
            "one such as 'train-{0000..1023}.tar'"
        ) from None
    found: list[str] = []
    for pattern in given:
        parts = _BRACES.split(pattern)  # text and the inside of braces, in turn
        choices = [_choices(part) if i % 2 else [part] for i, part in enumerate(parts)]
        for one in itertools.product(*choices):
            found += _matching("".join(one), os.fspath(root), pattern)
    if not found:
        raise DatasetError("no archive is named; give a pattern such as 'train-{0000..1023}.tar'")
    if twice := [path for path, n in Counter(found).items() if n > 1]:
        raise DatasetError(
            f"the pattern {' '.join(map(repr, given))} names {twice[0]!r} twice; name it once"
        )
    return found


def _choices(inside: str) -> list[str]:
    """What the inside of a pair of braces stands for."""
    if (bounds := _RANGE.fullmatch(inside)) is not None:
        first, last = int(bounds[1]), int(bounds[2])
        padded = any(len(bound) > 1 and bound[0] == "0" for bound in bounds.groups())
        width = max(map(len, bounds.groups())) if padded else 0
        step = 1 if first <= last else -1
        return [str(n).zfill(width) for n in range(first, last + step, step)]
    return inside.split(",") if "," in inside else [f"{{{inside}}}"]


def _matching(name: str, root: str, pattern: str) -> list[str]:
    """The files of a pattern without braces. pattern: what the user gave."""
    name = os.path.normpath(name)
    path = os.path.join(root, name)
    if os.path.isfile(path):
        return [path]
    of = "" if name == pattern else f" (of the pattern {pattern!r})"
    if glob.has_magic(name):
        matching = os.path.join(glob.escape(root), name) if root else name
        found = sorted(filter(os.path.isfile, glob.glob(matching)))
        if found:
            return found
        raise DatasetError(f"no file matches {path!r}{of}; give the archives' names, below root")
    what = "is a folder" if os.path.isdir(path) else "does not exist"
    raise DatasetError(
        f"the archive {path!r}{of} {what}; give names that do, relative to root={root!r}"
    )
