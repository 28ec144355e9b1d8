"""The index of a data set: its samples in order, each with a path, a class and a record key.

A sample's id is its place in the index. The index reads folders, lists, and in archives where each
image lies; it never reads pixels.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from scae_dali.data.archives import Archives, UInt8, open_archives
from scae_dali.data.names import Names
from scae_dali.data.patterns import expand
from scae_dali.data.scan import (
    EXTENSIONS,
    SPLIT_NAMES,
    DatasetError,
    Int64,
    Path,
    at_once,
    class_number,
    scan_cached,
    scan_folders,
)
from scae_dali.data.tars import scan_tar
from scae_dali.data.tfrecord import IMAGE, LABEL, scan_tfrecord

__all__ = ["ARCHIVES", "EXTENSIONS", "DatasetError", "ImageIndex", "of_archives", "path_key"]

ARCHIVES = ("webdataset", "tfrecord")  # formats of archives that are read
MAX_GUESSED_CLASSES = 1 << 16  # a stray number in a list must not make a billion classes


def path_key(name: str) -> int:
    """The record key of a name: the first 8 bytes, big-endian, of BLAKE2b of its UTF-8 text."""
    return int.from_bytes(hashlib.blake2b(name.encode()).digest()[:8], "big")


@dataclass(frozen=True, init=False, eq=False, repr=False)
class ImageIndex:
    """An immutable list of samples: `root/files[i]` is sample i, of class `classes[labels[i]]`.

    With `archives`, `files` are names of samples in them: archive.tar/member, or of a TFRecord
    `archive at index OFFSET`.
    """

    root: str  # the folder that `files` are relative to; "" where there is none
    files: tuple[str, ...]  # [N], posix paths
    labels: Int64  # [N], read-only
    classes: tuple[str, ...]  # [K]
    archives: Archives | None  # where the encoded images lie that are no files

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
        found = scan_folders(root)[0] if cache is None else scan_cached(root, cache)
        files, counts, classes = found
        if len(classes) > 1 and "train" in classes and SPLIT_NAMES.issuperset(classes):
            raise DatasetError(
                f"root={root!r} holds the splits {_some(classes)}, not classes; give one of them, "
                f"such as {os.path.join(root, 'train')!r}"
            )
        labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
        empty = [classes[k] for k in np.flatnonzero(counts == 0)]
        if empty and not allow_empty:
            raise DatasetError(
                f"root={root!r} has class folders without images: {_some(empty)}; remove them"
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
                label = class_number(token)
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
        return cls._of(os.fspath(root), files, array, (num_classes, classes), exclude)

    @classmethod
    def from_webdataset(
        cls,
        paths: Path | Sequence[Path],
        root: Path = "",
        *,
        first_label: int | None = None,
        num_classes: int | None = None,
        classes: Sequence[str] | None = None,
        exclude: Path | Sequence[str] = (),
        cache: Path | None = None,
    ) -> ImageIndex:
        """Index the images in tars, in the order of the tars and of their members.

        Neighbouring members with one stem are a sample: d/0001.jpg is an image, and d/0001.cls
        holds the number of its class as text.

        paths: patterns of the tars, relative to root, such as `train-{0000..1023}.tar`; see
        patterns.expand. first_label: the number that the archives give to class 0. None: 1 where
        labels run from 1, otherwise 0. cache: the folder in which what is found in a tar is kept,
        so that it is not read again as long as it is the same; None: beside the tar. Without
        `num_classes` and `classes`, K is the highest label + 1. A progress bar shows where it takes
        long. Raises DatasetError with the tar and the member.
        """
        names, labels, archives = open_archives(
            expand(paths, root), root, scan_tar, "webdataset", "/", first_label, cache
        )
        of_classes = (num_classes, classes)
        return cls._of(os.fspath(root), names, labels, of_classes, exclude, archives)

    @classmethod
    def from_tfrecord(
        cls,
        paths: Path | Sequence[Path],
        root: Path = "",
        *,
        image: str = IMAGE,
        label: str = LABEL,
        first_label: int | None = None,
        num_classes: int | None = None,
        classes: Sequence[str] | None = None,
        exclude: Path | Sequence[str] = (),
        cache: Path | None = None,
    ) -> ImageIndex:
        """Index the images in TFRecord files, in the order of the files and of their records.

        image, label: the features of a record that hold the encoded image and the number of its
        class. The defaults are those of ImageNet's TFRecords, which count classes from 1. The other
        arguments are those of `from_webdataset`. Raises DatasetError with the file and the record.
        """
        scan = partial(scan_tfrecord, image=image, label=label)
        kind = f"tfrecord {image} {label}"
        names, labels, archives = open_archives(
            expand(paths, root), root, scan, kind, " ", first_label, cache
        )
        of_classes = (num_classes, classes)
        return cls._of(os.fspath(root), names, labels, of_classes, exclude, archives)

    @classmethod
    def _of(
        cls,
        root: str,
        files: Sequence[str],
        labels: npt.NDArray[np.integer],
        of_classes: tuple[int | None, Sequence[str] | None],
        exclude: Path | Sequence[str] = (),
        archives: Archives | None = None,
    ) -> ImageIndex:
        """of_classes: `num_classes` and `classes`, as `from_arrays` takes them."""
        names, limit = _class_names(*of_classes)
        if (wrong := np.flatnonzero((labels < 0) | (labels >= limit))).size:
            raise _label_error(f"sample {wrong[0]}", int(labels[wrong[0]]), limit)
        if names is None:
            names = tuple(map(str, range(int(labels.max(initial=-1)) + 1)))
        index = cls.__new__(cls)
        index._fill(root, files, labels.astype(np.int64), names, exclude, archives)
        return index

    def _fill(
        self,
        root: str,
        files: Sequence[str],
        labels: Int64,
        classes: tuple[str, ...],
        exclude: Path | Sequence[str],
        archives: Archives | None = None,
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
            archives = None if archives is None else archives.subset(keep)
        if not len(files):
            raise DatasetError(f"root={root!r}: no samples; is everything excluded?")
        for i, name in enumerate(files):
            if type(name) is not str or not name:
                raise DatasetError(f"sample {i}: a path must be a non-empty str, got {name!r}")
            if "\0" in name:
                raise DatasetError(
                    f"sample {i}: the name {name!r} has a NUL character, which no file has; mend "
                    "the list"
                )
            try:
                name.encode()
            except UnicodeEncodeError:
                raise DatasetError(
                    f"sample {i}: the name {name!r} is not valid UTF-8; rename the file"
                ) from None
        labels.setflags(write=False)
        # The dataclass is frozen; this is its constructor.
        self.__dict__.update(
            root=root, files=tuple(files), labels=labels, classes=classes, archives=archives
        )

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
        # By parts: all labels as Python's integers would take four times the memory of the array.
        parts = np.array_split(self.labels, len(self) // 4096 + 1)
        labels = chain.from_iterable(part.tolist() for part in parts)
        for name, label in zip(self.files, labels, strict=True):
            raw = name.encode()
            digest.update(struct.pack("<Iq", len(raw), label) + raw)  # the length: unambiguous
        return digest.hexdigest()

    def keys(self, naming: str) -> npt.NDArray[np.uint64]:
        """The samples' record keys, uint64 [N]: their ids for "index", `path_key` for "path".

        Raises DatasetError where two samples would share a key.
        """
        if naming == "index":
            return np.arange(len(self), dtype=np.uint64)
        if naming == "path":
            return self._path_keys[0]
        raise DatasetError(f"naming must be 'index' or 'path', got {naming!r}")

    @cached_property
    def _path_keys(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], Int64]:
        """Record keys by id, the same keys sorted, and the ids of the sorted keys."""
        keys = np.fromiter(map(path_key, self.files), dtype=np.uint64, count=len(self))
        order = np.argsort(keys, kind="stable")
        ascending = keys[order]
        if (twice := np.flatnonzero(ascending[1:] == ascending[:-1])).size:
            i, j = order[twice[0]], order[twice[0] + 1]
            raise DatasetError(
                f"samples {i} ({self.files[i]!r}) and {j} ({self.files[j]!r}) have the same 64-bit "
                f"path key; list members of several archives as archive.tar/member, list a file "
                f"once, rename one, or name samples by 'index'"
            )
        keys.setflags(write=False)
        return keys, ascending, order

    def read(self, ids: Sequence[int]) -> list[UInt8]:
        """The samples' encoded images, uint8 [bytes] each. Raises OSError where a file cannot be
        read, DatasetError where an archive has changed since."""
        if self.archives is not None:
            return self.archives.read(ids)
        return [_content(os.path.join(self.root, self.files[i])) for i in ids]

    def encoded_paths(self, ids: Sequence[int]) -> list[npt.NDArray[np.uint8]]:
        """The samples' files, root included, as UTF-8 bytes: what DALI's fn.io.file.read takes."""
        paths = (os.path.join(self.root, self.files[i]) for i in ids)
        return [np.frombuffer(path.encode(), np.uint8) for path in paths]

    def ids_of(self, names: Sequence[str]) -> Int64:
        """Places, int64 [B], of the samples that a reader's `source_info` names.

        A name is the path as in `files`, or the same behind root, or webdataset's
        `archive.tar:OFFSET:member`. The index may have the latter whole, as
        `folder/archive.tar/member`, as `archive.tar/member`, or as the member alone; the longest
        is taken. An index of archives also has the OFFSET, which finds members whose names DALI
        tells otherwise: without a leading / or ../, or with ? for letters. Raises DatasetError for
        an unknown name, and for a sample of two members.
        """
        return self.names().ids(names)

    def names(self) -> Names:
        """The `ids_of` of one reader, which remembers the member of an archive of each sample."""
        place = None if self.archives is None else self.archives.place
        return Names(self.files, self.root, self._find, place)

    def _find(self, names: Sequence[str]) -> Int64:
        """Places of names that are in `files`, -1 for others."""
        _, ascending, order = self._path_keys
        wanted = np.fromiter(map(path_key, names), dtype=np.uint64, count=len(names))
        ids = order[np.searchsorted(ascending, wanted).clip(max=len(self) - 1)]
        same = [self.files[i] == name for i, name in zip(ids.tolist(), names, strict=True)]
        return np.where(np.array(same, dtype=bool), ids, -1)

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
        archives = None if self.archives is None else self.archives.subset(chosen)
        of_classes = (None, self.classes)
        return self._of(self.root, files, self.labels[chosen], of_classes, archives=archives)

    def without(self, exclude: Path | Sequence[str]) -> ImageIndex:
        """All samples but these, given as to the constructor."""
        of_classes = (None, self.classes)
        return self._of(self.root, self.files, self.labels, of_classes, exclude, self.archives)

    def relabelled(self, labels: npt.NDArray[np.int64], classes: Sequence[str]) -> ImageIndex:
        """The same samples in other classes. labels: int64 [N]."""
        return self._of(self.root, self.files, labels, (None, classes), archives=self.archives)


def of_archives(
    format: str,
    paths: Path | Sequence[Path],
    root: Path,
    *,
    image: str = IMAGE,
    label: str = LABEL,
    **settings: Any,
) -> ImageIndex:
    """The index of archives of a format of `ARCHIVES`. image, label: see from_tfrecord. settings:
    the other arguments of from_webdataset, which both have."""
    if format == "webdataset":
        return ImageIndex.from_webdataset(paths, root, **settings)
    return ImageIndex.from_tfrecord(paths, root, image=image, label=label, **settings)


def _content(path: str) -> UInt8:
    """The bytes of a file. Raises OSError, also for a pipe, which could be waited for forever."""
    with open(path, "rb", opener=at_once) as file:
        return np.fromfile(file, np.uint8)


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
        if not isinstance(num_classes, int | np.integer):
            raise DatasetError(
                f"num_classes must be a whole number, got {num_classes!r}; leave it out for the "
                "highest label + 1"
            )
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
