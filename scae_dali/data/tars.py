"""The samples in a webdataset: a tar whose neighbouring members with one stem make a sample.

The stem of a member ends at the first dot of its file name, and the suffix begins there: the image
`d/0001.jpg` and the label `d/0001.cls` are a sample. A label is the number of a class, as text.
"""

from __future__ import annotations

import os
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import BinaryIO, NamedTuple

import numpy as np

from scae_dali.data.archives import Found
from scae_dali.data.scan import EXTENSIONS, DatasetError

__all__ = ["scan_tar"]

_LABEL = "cls"
_PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_BLOCK = 512


class _Member(NamedTuple):
    """offset, size: of the bytes of its content in the tar."""

    name: str
    offset: int
    size: int

    @property
    def stem(self) -> str:
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def suffix(self) -> str:
        return self.name.rpartition("/")[2].partition(".")[2]

    @property
    def is_image(self) -> bool:
        return f".{self.suffix}".lower() in EXTENSIONS


def scan_tar(path: str) -> Found:
    """The images of a tar and their labels. Raises DatasetError with the tar and the member where
    something is wrong, OSError where the tar cannot be read."""
    names, labels, where = [], [], []
    seen: dict[str, int] = {}
    with open(path, "rb") as file:
        for stem, group in groupby(_members(path, file), lambda member: member.stem):
            members = list(group)
            image = _image(path, stem, members)
            if image is None:
                continue
            if (before := seen.setdefault(image.name, image.offset)) != image.offset:
                raise DatasetError(
                    f"the archive {path!r} has two samples named {image.name!r}, at bytes {before} "
                    f"and {image.offset}; pack it again with a name for each"
                )
            names.append(image.name)
            labels.append(_label(path, file, image, members))
            where.append((image.offset, image.size))
    return Found(names, np.array(labels, np.int64), np.array(where, np.int64).reshape(-1, 2))


def _members(path: str, file: BinaryIO) -> Iterator[_Member]:
    """The files in a tar, in its order, but for hidden ones. Raises DatasetError for a tar that is
    damaged or cut off."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        return
    start = os.pread(file.fileno(), 2, 0)
    if start in _PACKED:
        raise DatasetError(
            f"the archive {path!r} is compressed by {_PACKED[start]}, so that no sample can be "
            "read alone; decompress it"
        )
    at = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # there may be millions
                at = archive.offset
                if not member.isreg():
                    continue
                if member.offset_data + member.size > size:
                    raise _damaged(path, f"is cut off within {member.name!r}")
                name = member.name.removeprefix("./")  # `tar cf x.tar .` names members so
                if not name.rpartition("/")[2].startswith("."):
                    yield _Member(name, member.offset_data, member.size)
            at = archive.offset
    except tarfile.ReadError as error:
        raise _damaged(path, f"is no tar, or damaged at byte {at} ({error})") from error
    end = os.pread(file.fileno(), _BLOCK, at)  # tarfile takes any damaged header for the end
    if end.strip(b"\0"):
        what = "has a damaged header" if len(end) == _BLOCK else "is cut off"
        raise _damaged(path, f"{what} at byte {at}")
    if not end:
        warnings.warn(
            f"the archive {path!r} has no end mark, so it may be cut off: compare it with its "
            "original; whoever writes a tar must close it",
            RuntimeWarning,
            stacklevel=2,
        )


def _damaged(path: str, what: str) -> DatasetError:
    return DatasetError(f"the archive {path!r} {what}; copy it or pack it again")


def _image(path: str, stem: str, members: Sequence[_Member]) -> _Member | None:
    """The image of a sample; None where its members have nothing to do with images."""
    images = [member for member in members if member.is_image]
    if len(images) == 1:
        return images[0]
    suffixes = ", ".join(member.suffix for member in members)
    if images:
        raise DatasetError(
            f"the archive {path!r} has several images of {stem!r} ({suffixes}); pack it again with "
            "one image a sample"
        )
    if any(member.name.lower().endswith((*EXTENSIONS, f".{_LABEL}")) for member in members):
        raise DatasetError(
            f"the archive {path!r} has no image of {stem!r}, whose suffixes are {suffixes}; pack "
            "it again with names whose first dot begins a suffix of images, such as "
            f"{', '.join(EXTENSIONS[:3])}"
        )
    return None


def _label(path: str, file: BinaryIO, image: _Member, members: Sequence[_Member]) -> int:
    found = next((member for member in members if member.suffix == _LABEL), None)
    if found is None:
        raise DatasetError(
            f"the archive {path!r} has no label of {image.name!r}; add a member "
            f"{image.stem}.{_LABEL!s} with the number of the class as text, beside the image"
        )
    text = os.pread(file.fileno(), found.size, found.offset)
    try:
        return int(text)
    except ValueError:
        raise DatasetError(
            f"the archive {path!r}: {found.name!r} must be the number of a class as text, got "
            f"{text[:40]!r}; pack it again with numbers from 0 on"
        ) from None
