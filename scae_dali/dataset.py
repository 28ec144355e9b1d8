"""The dataset index: which samples, in which order, of which class, by which 64-bit key.

A sample's id is its position. The index reads folders and lists, never pixels; what a class's
frequency means for erasing is for `schedule`, the order of reading is for the reader.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import time
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
SPLIT_NAMES = {"train", "val", "valid", "validation", "test"}
MAX_GUESSED_CLASSES = 1 << 16  # a stray number in a list must not make a billion classes
MAX_DEPTH = 16  # links may form a loop
CACHE_VERSION = 1
RACY_NS = 2_000_000_000  # the coarsest mtime step of common file systems
WEBDATASET_NAME = re.compile(r".+?:\d+:(.+)", re.DOTALL)  # archive.tar:OFFSET:member

Path = str | os.PathLike[str]
Int64 = npt.NDArray[np.int64]
Scan = tuple[list[str], Int64, tuple[str, ...]]  # files, images per class, classes


class DatasetError(ValueError):
    """A folder, list, label or name that cannot be used; the message names it and the remedy."""


def path_key(name: str) -> int:
    """The 64-bit key of a name: the first 8 bytes, big-endian, of BLAKE2b of its UTF-8 text."""
    return int.from_bytes(hashlib.blake2b(name.encode()).digest()[:8], "big")


@dataclass(frozen=True, init=False, eq=False, repr=False)
class ImageIndex:
    """An immutable list of samples: `root/files[i]` is sample i, of class `classes[labels[i]]`."""

    root: str  # the folder that `files` are relative to; "" where there is none
    files: tuple[str, ...]  # [N], posix paths
    labels: Int64  # [N], read-only
    classes: tuple[str, ...]  # [K]

    def __init__(
        self,
        root: Path,
        *,
        exclude: Path | Sequence[str] = (),
        allow_empty: bool = False,
        cache: Path | None = None,
    ) -> None:
        """Index `root/<class>/**/<image>`: classes by folder name, files sorted within a class.

        Images are told by extension (`EXTENSIONS`); hidden and other files are left out.
        exclude: paths, as in `files`, to leave out, or a file of them, one a line.
        allow_empty: a class folder without images keeps its label; without, it is an error.
        cache: an .npz file that spares the next scan while no folder under root has changed.
        Raises DatasetError.
        """
        root = os.fspath(root)
        files, counts, classes = _scan(root)[0] if cache is None else _scan_cached(root, cache)
        if len(classes) > 1 and "train" in classes and SPLIT_NAMES.issuperset(classes):
            raise DatasetError(
                f"root={root!r} holds the splits {_some(classes)}, not classes; give one of them, "
                f"such as {os.path.join(root, 'train')!r}"
            )
        labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
        empty = [classes[k] for k in np.flatnonzero(counts == 0)]
        if empty and not allow_empty:
            raise DatasetError(
                f"root={root!r} has class folders without images: {_some(empty)}; remove them, or "
                f"pass allow_empty=True to keep their labels"
            )
        self._fill(root, files, labels, classes, exclude)

    @classmethod
    def from_list(
        cls,
        list_file: Path,
        root: Path = "",
        *,
        num_classes: int | None = None,
        classes: Sequence[str] | None = None,
        exclude: Path | Sequence[str] = (),
    ) -> ImageIndex:
        """Index the lines `path label` of a UTF-8 list in their order (ImageNet-LT's lists).

        The label is the last token, so paths may hold spaces; blank lines are skipped. Without
        `num_classes` and `classes`, K is the highest label + 1. Raises DatasetError with the line.
        """
        files, labels = [], []
        names, limit = _class_names(num_classes, classes)
        for number, line in _lines(list_file):
            where = f"{os.fspath(list_file)}, line {number}"
            try:
                path, token = line.rsplit(maxsplit=1)
                label = int(token)
            except ValueError:
                raise DatasetError(
                    f"{where}: {line!r} is not 'path label' with an integer label, such as "
                    f"'train/cat/1.jpg 0'"
                ) from None
            if not 0 <= label < limit:
                raise _label_error(where, label, limit)
            files.append(path)
            labels.append(label)
        if not files:
            raise DatasetError(
                f"{os.fspath(list_file)} lists no samples; it needs 'path label' lines"
            )
        return cls.from_arrays(files, np.array(labels), root, classes=names, exclude=exclude)

    @classmethod
    def from_arrays(
        cls,
        files: Sequence[str],
        labels: npt.ArrayLike,
        root: Path = "",
        *,
        num_classes: int | None = None,
        classes: Sequence[str] | None = None,
        exclude: Path | Sequence[str] = (),
    ) -> ImageIndex:
        """Index files (str [N], relative to root) of the given integer labels [N], in that order.

        Without `num_classes` and `classes`, K is the highest label + 1. Raises DatasetError.
        """
        array = np.asarray(labels)
        if array.shape != (len(files),) or (array.size and array.dtype.kind not in "iu"):
            raise DatasetError(
                f"labels must be integers of shape ({len(files)},), one a file, "
                f"got {array.dtype} of shape {array.shape}"
            )
        names, limit = _class_names(num_classes, classes)
        if (wrong := np.flatnonzero((array < 0) | (array >= limit))).size:
            raise _label_error(f"sample {wrong[0]}", int(array[wrong[0]]), limit)
        if names is None:
            names = tuple(map(str, range(int(array.max(initial=-1)) + 1)))
        index = cls.__new__(cls)
        index._fill(os.fspath(root), files, array.astype(np.int64), names, exclude)
        return index

    def _fill(
        self,
        root: str,
        files: Sequence[str],
        labels: Int64,
        classes: tuple[str, ...],
        exclude: Path | Sequence[str],
    ) -> None:
        if isinstance(exclude, str | os.PathLike):
            exclude = [line for _, line in _lines(exclude)]
        if exclude:
            bad = set(exclude)
            keep = np.array([name not in bad for name in files], dtype=bool)
            if unknown := sorted(bad.difference(files)):
                raise DatasetError(
                    f"exclude names {len(unknown)} file(s) that the index lacks: {_some(unknown)}; "
                    f"names look like {_some(files, 1)}"
                )
            files = [name for name, kept in zip(files, keep, strict=True) if kept]
            labels = labels[keep]
        if not len(files):
            raise DatasetError(f"root={root!r}: no samples; is everything excluded?")
        for i, name in enumerate(files):
            if type(name) is not str or not name:
                raise DatasetError(f"sample {i}: a path must be a non-empty str, got {name!r}")
            try:
                name.encode()
            except UnicodeEncodeError:
                raise DatasetError(
                    f"sample {i}: the name {name!r} is not valid UTF-8; rename the file"
                ) from None
        labels.setflags(write=False)
        # The dataclass is frozen; this is its constructor.
        self.__dict__.update(root=root, files=tuple(files), labels=labels, classes=classes)

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        return f"ImageIndex(root={self.root!r}, {len(self)} samples, {self.num_classes} classes)"

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def class_counts(self) -> Int64:
        """Samples per class, int64 [K]; 0 where a class has none."""
        counts = np.bincount(self.labels, minlength=self.num_classes).astype(np.int64)
        counts.setflags(write=False)
        return counts

    @cached_property
    def fingerprint(self) -> str:
        """16 bytes of BLAKE2b, as hex, over the path and label of every sample, in order."""
        digest = hashlib.blake2b(digest_size=16)
        for name, label in zip(self.files, self.labels.tolist(), strict=True):
            raw = name.encode()
            digest.update(struct.pack("<Iq", len(raw), label) + raw)  # the length: unambiguous
        return digest.hexdigest()

    def keys(self, naming: str) -> npt.NDArray[np.uint64]:
        """The samples' cache keys, uint64 [N]: "index", the position, or "path", `path_key`.

        Raises DatasetError where two samples would share a key.
        """
        if naming == "index":
            return np.arange(len(self), dtype=np.uint64)
        if naming == "path":
            return self._path_keys[0]
        raise DatasetError(f"naming must be 'index' or 'path', got {naming!r}")

    @cached_property
    def _path_keys(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], Int64]:
        """Keys by position, keys sorted, and the positions of the sorted keys."""
        keys = np.fromiter(map(path_key, self.files), dtype=np.uint64, count=len(self))
        order = np.argsort(keys, kind="stable")
        ascending = keys[order]
        if (twice := np.flatnonzero(ascending[1:] == ascending[:-1])).size:
            i, j = order[twice[0]], order[twice[0] + 1]
            raise DatasetError(
                f"samples {i} ({self.files[i]!r}) and {j} ({self.files[j]!r}) have the same 64-bit "
                f"path key; list each file once, rename one, or name samples by 'index'"
            )
        keys.setflags(write=False)
        return keys, ascending, order

    def ids_of(self, names: Sequence[str]) -> Int64:
        """Positions, int64 [B], of the samples that a reader's `source_info` names.

        A name is the path as in `files`, the same behind root, or webdataset's
        `archive.tar:OFFSET:member`, known whole or by its member. Raises DatasetError.
        """
        ids = self._find(names)
        if (unknown := np.flatnonzero(ids < 0)).size:
            ids[unknown] = self._find([self._shorten(names[b]) for b in unknown.tolist()])
        if (unknown := np.flatnonzero(ids < 0)).size:
            raise DatasetError(
                f"no sample is named {names[unknown[0]]!r}; names here look like "
                f"{_some(self.files, 1)}, with or without root={self.root!r} in front"
            )
        return ids

    def _find(self, names: Sequence[str]) -> Int64:
        """Positions of names that are in `files`, -1 for others."""
        _, ascending, order = self._path_keys
        wanted = np.fromiter(map(path_key, names), dtype=np.uint64, count=len(names))
        ids = order[np.searchsorted(ascending, wanted).clip(max=len(self) - 1)]
        same = [self.files[i] == name for i, name in zip(ids.tolist(), names, strict=True)]
        return np.where(np.array(same, dtype=bool), ids, -1)

    def _shorten(self, name: str) -> str:
        prefix = os.path.join(self.root, "")
        if self.root and name.startswith(prefix):
            return name[len(prefix) :]
        member = WEBDATASET_NAME.fullmatch(name)
        return member[1] if member else name

    def subset(self, ids: npt.ArrayLike) -> ImageIndex:
        """The samples at `ids` (int [M]), in that order, renumbered from 0; the same classes."""
        chosen = np.asarray(ids)
        if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
            raise DatasetError(
                f"ids must be integers of shape [M], got {chosen.dtype} of shape {chosen.shape}; "
                f"np.flatnonzero turns a mask into ids"
            )
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < len(self):
            raise DatasetError(
                f"ids must lie in 0 … {len(self) - 1}, got {chosen.min()} … {chosen.max()}"
            )
        files = [self.files[i] for i in chosen.tolist()]
        return self.from_arrays(files, self.labels[chosen], self.root, classes=self.classes)


def _scan(root: str) -> tuple[Scan, list[str], list[int]]:
    """The files, counts and classes under root, and every folder visited with its mtime (ns)."""
    if not root:
        raise DatasetError("root is empty; give the folder that holds one folder per class")
    if not os.path.isdir(root):
        what = "is a file" if os.path.exists(root) else "does not exist"
        raise DatasetError(f"root={root!r} {what}; give the folder that holds one folder per class")
    folders, mtimes_ns = [], []

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
                    images.append(name)
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
    files = [name for names in images for name in names]
    return (files, counts, tuple(classes)), folders, mtimes_ns


def _scan_cached(root: str, cache: Path) -> Scan:
    """`_scan`, or what it found last time where every folder still has the mtime it had then."""
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
        with open(cache, "rb") as file, np.load(file, allow_pickle=False) as stored:
            if stored["version"] == CACHE_VERSION and stored["root"].tobytes() == here:
                folders = _unpack(stored["folders"])
                now = [os.stat(os.path.join(root, folder)).st_mtime_ns for folder in folders]
                if np.array_equal(stored["mtimes_ns"], now):
                    counts = stored["counts"]
                    files = _unpack(stored["files"]) if counts.any() else []
                    if len(files) != counts.sum():
                        raise ValueError("files and counts disagree")
                    return files, counts, tuple(_unpack(stored["classes"]))
    except (FileNotFoundError, NotADirectoryError):  # no cache yet, or a folder has gone
        pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        warnings.warn(
            f"the index cache {cache!r} is unreadable ({error}); root is scanned again and the "
            f"cache rewritten",
            stacklevel=3,
        )
    started_ns = time.time_ns()
    scan, folders, mtimes_ns = _scan(root)
    files, counts, classes = scan
    # A folder touched just now may change again within the same tick of its mtime: never trust it.
    settled = [mtime if mtime < started_ns - RACY_NS else -1 for mtime in mtimes_ns]
    temporary = f"{cache}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as out:
            np.savez(
                out,
                version=CACHE_VERSION,
                root=np.frombuffer(here, np.uint8),
                folders=_pack(folders),
                mtimes_ns=np.array(settled, dtype=np.int64),
                classes=_pack(classes),
                counts=counts,
                files=_pack(files),
            )
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, cache)
    except OSError as error:
        raise DatasetError(
            f"cache={cache!r} cannot be written ({error}); give a file in a writable folder"
        ) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return scan


def _pack(names: Sequence[str]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(os.fsencode("\0".join(names)), np.uint8)  # no path holds a NUL


def _unpack(packed: npt.NDArray[np.uint8]) -> list[str]:
    return os.fsdecode(packed.tobytes()).split("\0")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The non-blank lines of a UTF-8 file, without their ends, and their numbers from 1."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{os.fspath(path)}, after line {number}: not UTF-8 ({error}); convert the list"
        ) from None
    except OSError as error:
        raise DatasetError(f"the list {os.fspath(path)!r} cannot be read: {error}") from error


def _class_names(
    num_classes: int | None, classes: Sequence[str] | None
) -> tuple[tuple[str, ...] | None, int]:
    """The classes' names, if they are known, and what every label must stay below."""
    if classes is None:
        if num_classes is None:
            return None, MAX_GUESSED_CLASSES
        return tuple(map(str, range(num_classes))), num_classes
    if num_classes not in (None, len(classes)):
        raise DatasetError(
            f"num_classes={num_classes}, but classes names {len(classes)}; leave num_classes out"
        )
    return tuple(classes), len(classes)


def _label_error(where: str, label: int, limit: int) -> DatasetError:
    return DatasetError(
        f"{where}: label {label} is outside 0 … {limit - 1}; labels count from 0, and num_classes "
        f"says how many there are"
    )


def _some(names: Sequence[str], most: int = 5) -> str:
    listed = ", ".join(map(repr, names[:most]))
    return listed + (", …" if len(names) > most > 1 else "")
