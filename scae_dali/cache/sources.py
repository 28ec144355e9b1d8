"""Where one's own maps lie: a folder of files that mirrors the images, or one array."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scae_dali.cache.exports import MISSING
from scae_dali.checks import check
from scae_dali.data.index import EXTENSIONS, ImageIndex
from scae_dali.data.scan import Path

__all__ = ["MapSource", "source_of"]

_ENDS = (".npy", ".png")
_AT_ONCE = 1 << 21  # cells of an array, some 16 MB where they are float64

# Places in the index int64 [B], their maps [B, h, w], and what each is called in a message.
_Block = tuple[NDArray[np.int64], NDArray[Any], Callable[[int], str]]


class MapSource(NamedTuple):
    """Maps of samples. ids: int64 [n], ascending, places in the index. blocks: the maps, a few at a
    time. unused: names of maps that are of no sample."""

    ids: NDArray[np.int64]
    blocks: Iterator[_Block]
    unused: list[str]


def source_of(
    maps: Path | NDArray[Any], index: ImageIndex, names: Sequence[str] | None
) -> MapSource:
    """The maps that `import_maps` is given. Raises ValueError where they are not of the index."""
    if isinstance(maps, str | os.PathLike) and os.path.isdir(maps):
        check(names is None, "names are of the rows of an array, and maps is a folder")
        folder = os.fspath(maps)
        files, unused = _files(folder, index)
        check(
            any(files),
            f"no file in {folder!r} is named like an image of the index: for {index.files[0]!r} it "
            f"would be {_stem(index.files[0])}.npy or .png",
        )
        ids = np.flatnonzero([file is not None for file in files])
        return MapSource(ids, _from_files(files), unused)
    array, rows, unused = _array(maps, index, names)
    ids = np.flatnonzero(rows >= 0)
    check(len(ids) > 0, "names must be of samples of the index that have a map; none is")
    return MapSource(ids, _from_array(array, rows[ids], ids, index), unused)


def _stem(name: str) -> str:
    """The name of an image, relative, without the extension of images."""
    stem, extension = os.path.splitext(name.lstrip("/"))
    return stem if extension.lower() in EXTENSIONS else name.lstrip("/")


def _files(folder: str, index: ImageIndex) -> tuple[list[str | None], list[str]]:
    """The file of each sample's map, None where there is none, and the files of no sample."""
    there: set[str] = set()
    for inner in {os.path.dirname(name.lstrip("/")) for name in index.files}:
        place = os.path.join(folder, inner)
        names = os.listdir(place) if os.path.isdir(place) else []
        there |= {os.path.join(inner, name) for name in names if name.lower().endswith(_ENDS)}
    owners: dict[str, str] = {}
    files: list[str | None] = []
    for name in index.files:
        forms = dict.fromkeys((_stem(name), name.lstrip("/")))
        ends = (end for lower in _ENDS for end in (lower, lower.upper()))
        found = [file for end in ends for form in forms if (file := form + end) in there]
        check(
            len(found) <= 1,
            f"image {name!r} has several maps in {folder!r}: {', '.join(found)}; keep one",
        )
        for file in found:
            check(
                owners.setdefault(file, name) == name,
                f"map {file!r} in {folder!r} is of two images, {owners.get(file)!r} and {name!r}; "
                f"give each its own, such as {name}.npy",
            )
        files.append(os.path.join(folder, found[0]) if found else None)
    return files, sorted(there.difference(owners))


def _from_files(files: Sequence[str | None]) -> Iterator[_Block]:
    for i, file in enumerate(files):
        if file is not None:
            values = _read_npy(file) if file.lower().endswith(".npy") else _read_png(file)
            check(values.ndim == 2, f"{file!r}: a map must be [h, w], got {list(values.shape)}")
            yield np.array([i]), values[None], partial(_file_of, file)


def _file_of(file: str, k: int) -> str:
    return repr(file)


def _read_npy(file: Path, **how: Any) -> NDArray[Any]:
    try:
        values = np.load(file, allow_pickle=False, **how)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{os.fspath(file)!r} is no .npy file of numbers: {error}") from error
    check(isinstance(values, np.ndarray), f"{os.fspath(file)!r} holds several arrays; save one")
    return values


def _read_png(file: str) -> NDArray[Any]:
    """A grey picture: bool, uint8 or uint16 [h, w], by its depth."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            check(
                picture.mode in ("1", "L") or picture.mode.startswith("I"),
                f"it is of mode {picture.mode}, and a map is grey (1, 8 or 16 bits, no palette)",
            )
            values = np.asarray(picture)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file!r} cannot be read as a map: {error}") from error
    return values.astype(np.uint16) if picture.mode.startswith("I") else values


def _array(
    maps: Path | NDArray[Any], index: ImageIndex, names: Sequence[str] | None
) -> tuple[NDArray[Any], NDArray[np.int64], list[str]]:
    """The array [M, h, w]; of each sample the row, -1 where it has none; and names of no sample."""
    array = maps if isinstance(maps, np.ndarray) else _read_npy(maps, mmap_mode="r")
    check(array.ndim == 3, f"maps must be [N, h, w], got {list(array.shape)}")
    wanted, of = (len(index), "samples in the index") if names is None else (len(names), "names")
    check(
        len(array) == wanted,
        f"maps must be as many as there are {of}, {wanted}, got {len(array)}; a list of names says "
        "which samples they are of",
    )
    if names is None:
        return array, np.arange(len(index)), []
    places: dict[str, int] = {}
    for row, line in enumerate(names):
        name = line.removesuffix(MISSING)
        check(name not in places, f"names must be different, got {name!r} twice; keep one")
        places[name] = row if name == line else -1
    rows = np.array([places.get(name, -1) for name in index.files], np.int64)
    known = set(index.files)
    return array, rows, [name for name, row in places.items() if row >= 0 and name not in known]


def _from_array(
    array: NDArray[Any], rows: NDArray[np.int64], ids: NDArray[np.int64], index: ImageIndex
) -> Iterator[_Block]:
    """rows: int64 [n], those of the samples `ids`, int64 [n]."""
    count = max(_AT_ONCE // max(math.prod(array.shape[1:]), 1), 1)
    for start in range(0, len(ids), count):
        some = ids[start : start + count]

        def called(k: int, some: NDArray[np.int64] = some) -> str:
            return f"the map of sample {some[k]}, {index.files[some[k]]!r}"

        yield some, array[rows[start : start + count]], called
