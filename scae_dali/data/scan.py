"""The images under a folder of classes, as a scan finds them or as the last one stored them.

Images are told by their extension, and sorted by name. A stored scan holds as long as no folder has
changed.
"""

from __future__ import annotations

import os
import re
import time
import uuid
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = [
    "EXTENSIONS",
    "RACY_NS",
    "SPLIT_NAMES",
    "UNREADABLE",
    "DatasetError",
    "Int64",
    "Path",
    "at_once",
    "class_number",
    "pack",
    "scan_cached",
    "scan_folders",
    "store",
    "unpack",
]

# What DALI decodes: all that torchvision lists among them.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k"),
)
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}
MAX_DEPTH = 16  # links may form a loop
CACHE_VERSION = 2  # 1 knew fewer extensions
_NUMBER = re.compile(r"\s*[+-]?[0-9]+\s*", re.ASCII)
RACY_NS = 2_000_000_000  # the coarsest mtime step of common file systems
# What np.load raises for a damaged file.
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)

Path = str | os.PathLike[str]
Int64 = npt.NDArray[np.int64]
Scan = tuple[list[str], Int64, tuple[str, ...]]  # files, images per class, classes


class DatasetError(ValueError):
    """A folder, list, label or name that cannot be used; the message names it and the remedy."""


def class_number(text: str) -> int:
    """The number of a class as a list or an archive has it: digits, with blanks around them or
    none. Raises ValueError for other text, such as `1_0`, which Python takes for 10."""
    if _NUMBER.fullmatch(text) is None:
        raise ValueError(f"the number of a class must be written in digits, got {text!r}")
    return int(text)


def at_once(path: str, flags: int) -> int:
    """Opens what may be a pipe, as `opener` of `open`, without waiting for who writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def scan_folders(root: str) -> tuple[Scan, list[str], list[int]]:
    """The files, counts and classes under root, and every folder visited with its mtime (ns)."""
    if not root:
        raise DatasetError("root is empty; give the folder that holds one folder per class")
    if not os.path.isdir(root):
        what = "is a file" if os.path.exists(root) else "does not exist"
        raise DatasetError(f"root={root!r} {what}; give the folder that holds one folder per class")
    folders, mtimes_ns = [], []
    others: Counter[str] = Counter()  # extensions of files that are no images

    def visit(folder: str) -> tuple[list[str], list[str]]:
        path = os.path.join(root, folder)
        if folder.count("/") > MAX_DEPTH:
            raise DatasetError(f"{path!r} is too deep; is a link to a folder above it in the way?")
        folders.append(folder)
        mtimes_ns.append(os.stat(path).st_mtime_ns)  # before listing: a change meanwhile will show
        images, subfolders = [], []
        with os.scandir(path) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    subfolders.append(name)
                elif entry.name.lower().endswith(EXTENSIONS):
                    if not entry.is_file() and os.path.exists(entry.path):  # no broken link
                        raise DatasetError(
                            f"{entry.path!r} is named as an image, and is no file (reading it "
                            "could wait forever): remove or rename it"
                        )
                    images.append(name)
                else:
                    others[os.path.splitext(name)[1] or "no extension"] += 1
        return images, subfolders

    def gather(folder: str) -> list[str]:
        images, subfolders = visit(folder)
        for name in subfolders:
            images += gather(name)
        return images

    loose, classes = visit("")
    if not classes:
        found = f"{len(loose)} images lie directly in it" if loose else "it holds no images either"
        raise DatasetError(
            f"root={root!r} has no class folders ({found}); put each class's images into a folder, "
            f"or use ImageIndex.from_list or from_arrays"
        )
    classes.sort()
    images = [sorted(gather(name)) for name in classes]
    counts = np.array([len(names) for names in images], dtype=np.int64)
    if not counts.any() and not SPLIT_NAMES.issuperset(classes):
        found = ", ".join(f"{count} of {name}" for name, count in others.most_common(5))
        raise DatasetError(
            f"root={root!r} has {len(classes)} folders and no images in them; other files there: "
            f"{found or 'none'}. Images are files of {', '.join(EXTENSIONS)}: convert others, or "
            "give the folder that holds one folder per class"
        )
    files = [name for names in images for name in names]
    return (files, counts, tuple(classes)), folders, mtimes_ns


def scan_cached(root: str, cache: Path) -> Scan:
    """`scan_folders`, or what it found last time where no folder's mtime has changed since."""
    cache = os.fspath(cache)
    if not cache.endswith(".npz"):
        raise DatasetError(f"cache={cache!r} must end in .npz: the file would be overwritten")
    here = os.fsencode(os.path.realpath(root))
    if os.fsencode(os.path.realpath(cache)).startswith(os.path.join(here, b"")):
        raise DatasetError(
            f"cache={cache!r} lies in root={root!r}: writing it would change the folders that it "
            f"describes; give a file elsewhere"
        )
    try:
        if (stored := _load(root, here, cache)) is not None:
            return stored
    except (FileNotFoundError, NotADirectoryError):  # no cache yet, or a folder has gone
        pass
    except UNREADABLE as error:
        warnings.warn(
            f"the index cache {cache!r} is unreadable ({error}); root is scanned again and the "
            f"cache rewritten",
            stacklevel=3,
        )
    started_ns = time.time_ns()
    scan, folders, mtimes_ns = scan_folders(root)
    # A folder touched just now may change again within the same tick of its mtime: never trust it.
    settled = [mtime if mtime < started_ns - RACY_NS else -1 for mtime in mtimes_ns]
    try:
        _save(cache, here, scan, folders, settled)
    except OSError as error:
        raise DatasetError(
            f"cache={cache!r} cannot be written ({error}); give a file in a writable folder"
        ) from error
    return scan


def _load(root: str, here: bytes, cache: str) -> Scan | None:
    """What the file holds; None where it is of another version or root, or a folder has changed."""
    with open(cache, "rb") as file, np.load(file, allow_pickle=False) as stored:
        if stored["version"] != CACHE_VERSION or stored["root"].tobytes() != here:
            return None
        folders = unpack(stored["folders"])
        now = [os.stat(os.path.join(root, folder)).st_mtime_ns for folder in folders]
        if not np.array_equal(stored["mtimes_ns"], now):
            return None
        counts = stored["counts"]
        files = unpack(stored["files"]) if counts.any() else []
        if len(files) != counts.sum():
            raise ValueError("files and counts disagree")
        return files, counts, tuple(unpack(stored["classes"]))


def _save(cache: str, here: bytes, scan: Scan, folders: list[str], mtimes_ns: list[int]) -> None:
    files, counts, classes = scan
    store(
        cache,
        version=CACHE_VERSION,
        root=np.frombuffer(here, np.uint8),
        folders=pack(folders),
        mtimes_ns=np.array(mtimes_ns, dtype=np.int64),
        classes=pack(classes),
        counts=counts,
        files=pack(files),
    )


def store(path: str, **arrays: npt.ArrayLike) -> None:
    """Write an .npz file, wholly or not at all."""
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as out:
            np.savez(out, **arrays)  # type: ignore[arg-type]
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def pack(names: Sequence[str]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(os.fsencode("\0".join(names)), np.uint8)  # no path holds a NUL


def unpack(packed: npt.NDArray[np.uint8]) -> list[str]:
    return os.fsdecode(packed.tobytes()).split("\0")
