"""The samples in a webdataset: a tar whose neighbouring members with one stem make a sample.

The stem of a member ends at the first dot of its file name, and the suffix begins there: the image
`d/0001.jpg` and the label `d/0001.cls` are a sample. A label is the number of a class, as text. A
hard link has the content of the member that it is a link to.
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
from scae_dali.data.scan import EXTENSIONS, DatasetError, class_number

__all__ = ["scan_tar"]

_LABEL = "cls"
_PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
_BLOCK = 512
_AT_ONCE = 1 << 20  # bytes read at once behind the end mark

Where = tuple[int, int]  # offset and number of bytes of a content in the tar


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
    def of_sample(self) -> bool:
        return self.is_image or self.suffix == _LABEL

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
            if (before := seen.get(image.name)) is not None:
                raise DatasetError(
                    f"the archive {path!r} has two samples named {image.name!r}, at bytes {before} "
                    f"and {image.offset}; pack it again with a name for each"
                )
            seen[image.name] = image.offset
            names.append(image.name)
            labels.append(_label(path, file, image, members))
            where.append((image.offset, image.size))
    return Found(names, np.array(labels, np.int64), np.array(where, np.int64).reshape(-1, 2))


def _members(path: str, file: BinaryIO) -> Iterator[_Member]:
    """The files in a tar, in its order, but for hidden ones. Raises DatasetError for a tar that is
    damaged or cut off, or has images or labels whose bytes do not lie in it as in a file."""
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
    contents: dict[str, Where | None] | None = None  # of the members so far, where there are links
    link: str | None = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # there may be millions
                at = archive.offset
                if member.islnk():
                    if contents is None:
                        contents = _contents(path, member.offset)
                    where = contents.get(_name(member.linkname))
                else:
                    where = _where(member)
                    if where is not None and sum(where) > size:
                        raise _damaged(path, f"is cut off within {member.name!r}")
                name = _name(member.name)
                if contents is not None:
                    contents[name] = where
                if name.rpartition("/")[2].startswith("."):
                    continue
                found = _Member(name, *(where or (0, 0)))
                if where is not None:
                    yield found
                elif found.of_sample and not member.isdir():
                    raise _no_file(path, member)
                elif member.issym():
                    link = name
            at = archive.offset
    except DatasetError:
        raise
    except (tarfile.ReadError, ValueError) as error:  # ValueError: of a sparse file's damaged map
        raise _damaged(path, f"is no tar, or damaged at byte {at} ({error})") from error
    _check_end(path, file, at)
    if link is not None:
        warnings.warn(
            f"the archive {path!r} has the symbolic link {link!r}, which is left out; if images "
            "lie behind it, pack them themselves, as `tar --dereference` does",
            RuntimeWarning,
            stacklevel=2,
        )


def _name(name: str) -> str:
    return name.removeprefix("./")  # `tar cf x.tar .` names members so


def _where(member: tarfile.TarInfo) -> Where | None:
    """Where the content of a member lies; None where it has none of its own in one piece."""
    if member.isreg() and not member.issparse():
        return member.offset_data, member.size
    return None


def _contents(path: str, stop: int) -> dict[str, Where | None]:
    """Where the contents of the members before byte `stop` lie, by name. Of members of one name the
    last one counts, as where they are unpacked."""
    found = {}
    with tarfile.open(path, "r:") as archive:
        while (member := archive.next()) is not None and member.offset < stop:
            archive.members.clear()  # type: ignore[attr-defined]
            found[_name(member.name)] = _where(member)
    return found


def _no_file(path: str, member: tarfile.TarInfo) -> DatasetError:
    """Of an image or a label that has no content in the tar."""
    if member.issym():
        what = f"a symbolic link to {member.linkname!r}; pack the files themselves, as `tar "
        what += "--dereference` does"
    elif member.islnk():
        what = f"a link to {member.linkname!r}, which is no plain file before it in the archive; "
        what += "pack the files themselves, as `tar --hard-dereference` does"
    elif member.issparse():
        what = "stored without the holes of its file, so that it does not lie there in one piece; "
        what += "pack it again by `tar` without --sparse"
    else:
        what = f"no file, but a member of the type {member.type!r}; pack it again without it"
    return DatasetError(f"the archive {path!r}: {member.name!r} is {what}")


def _check_end(path: str, file: BinaryIO, at: int) -> None:
    """Raise DatasetError unless nothing but zeros lies behind the last member, from byte `at` on,
    and warn where nothing does."""
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
    while behind := os.pread(file.fileno(), _AT_ONCE, at):
        at += len(behind)
        if more := behind.lstrip(b"\0"):
            raise DatasetError(
                f"the archive {path!r} holds more behind its end mark, from byte {at - len(more)} "
                "on; if it was joined of several by `cat`, give those one by one, or unpack it by "
                "`tar --ignore-zeros -xf` and pack it again; otherwise it is damaged: copy it again"
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
    found = [member for member in members if member.suffix == _LABEL]
    if not found:
        raise DatasetError(
            f"the archive {path!r} has no label of {image.name!r}; add a member "
            f"{image.stem}.{_LABEL!s} with the number of the class as text, beside the image"
        )
    if len(found) > 1:
        raise DatasetError(
            f"the archive {path!r} has several labels of {image.name!r}, {len(found)} members "
            f"named {found[0].name!r}; pack it again with one label a sample"
        )
    text = os.pread(file.fileno(), found[0].size, found[0].offset)
    try:
        return int(np.int64(class_number(text.decode("latin-1"))))
    except (ValueError, OverflowError):
        raise DatasetError(
            f"the archive {path!r}: {found[0].name!r} must be the number of a class as text, got "
            f"{text[:40]!r}; pack it again with numbers from 0 on"
        ) from None
