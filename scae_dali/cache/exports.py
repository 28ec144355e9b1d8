"""The maps of a cache as one .npy file, for any other program."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from scae_dali.cache.reader import CacheReader
from scae_dali.checks import check
from scae_dali.data.index import ImageIndex

__all__ = ["MISSING", "check_new", "export_maps", "names_file"]

MISSING = "\tmissing"  # behind the name of a sample without a map


def names_file(path: str | os.PathLike[str]) -> str:
    """The file of names beside a .npy file: the same name with .txt."""
    return os.path.splitext(os.fspath(path))[0] + ".txt"


def check_new(path: str) -> None:
    """Raise ValueError unless path ends in .npy, and neither it nor its `names_file` exists."""
    check(path.endswith(".npy"), f"path must end in .npy, got {path!r}")
    for file in (path, names_file(path)):
        check(not os.path.lexists(file), f"{file!r} exists; choose another name, or remove it")


def export_maps(
    cache: CacheReader, index: ImageIndex, path: str | os.PathLike[str]
) -> NDArray[np.int64]:
    """Writes the maps, as they are at one moment -> the samples without one, int64 [m].

    path: the .npy file, u8 [N, h, w] with 255 = 1.0, in the order of the index; folders above it
    are made. Beside it the `names_file` has a line for each sample: its name, and behind that
    MISSING where it has no map; its row of the array is zeros then. index: that the cache was
    opened with. Raises ValueError where one of the files exists, for another ending or index, and
    for names that hold a tab or a line end.
    """
    path = os.fspath(path)
    check(
        cache.meta.fingerprint == index.fingerprint,
        f"index must be that of the saliency cache {cache.path!r}, got one of another data set",
    )
    check_new(path)
    strange = next((name for name in index.files if {"\t", "\n", "\r"} & {*name}), None)
    check(strange is None, f"names must hold no tab and no line end, got {strange!r}; rename it")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    snapshot = cache.snapshot()
    names = names_file(path)
    with open(f"{path}.partial", "wb") as array:
        np.save(array, snapshot.maps)
    with open(f"{names}.partial", "wb") as text:
        for name, has in zip(index.files, snapshot.found.tolist(), strict=True):
            text.write(f"{name}{'' if has else MISSING}\n".encode())
    for file in (names, path):
        os.replace(f"{file}.partial", file)
    return np.flatnonzero(~snapshot.found)
