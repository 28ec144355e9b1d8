"""The samples in a TFRecord file: one `tf.train.Example` a record, an image and a label in each.

A record is its length (uint64, little-endian), a checksum of that, a protocol buffer, and a
checksum of the buffer. The checksums are not looked at. Of the buffer no more is read than what
says where its parts lie:

    Example { Features 1 { repeated entry 1 { string 1, Feature 2 } } }
    Feature { BytesList 1 | FloatList 2 | Int64List 3 }, each { repeated value 1 }
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import numpy as np

from scae_dali.data.archives import Found
from scae_dali.data.scan import DatasetError

__all__ = ["IMAGE", "LABEL", "scan_tfrecord"]

# The fields of ImageNet's TFRecords.
IMAGE, LABEL = "image/encoded", "image/class/label"

Span = tuple[int, int]  # where something begins and ends in the file

_HEAD, _FOOT = 12, 4  # bytes of a record before and behind its buffer
_VARINT, _FIXED64, _SIZED, _FIXED32 = 0, 1, 2, 5  # how a field of a buffer is written
_BYTES_LIST, _INT64_LIST = 1, 3  # of a Feature


def scan_tfrecord(path: str, image: str = IMAGE, label: str = LABEL) -> Found:
    """The images and labels of a TFRecord file. image, label: the names of their features.

    A sample is named as DALI names it, less the file: `at index 19351`, by the offset of its
    record. Raises DatasetError with the file and the record, OSError where it cannot be read.
    """
    names, labels, where = [], [], []
    with open(path, "rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # it is empty
            return Found([], np.empty(0, np.int64), np.empty((0, 2), np.int64))
        with data:
            if data[:2] == b"\x1f\x8b":
                raise DatasetError(
                    f"the archive {path!r} is compressed by gzip, so that no sample can be read "
                    "alone; decompress it"
                )
            for at, buffer in _records(path, data):
                try:
                    features = dict(_features(data, buffer))
                    begin, end = _image(data, features, image)
                    labels.append(_label(data, features, label))
                except DatasetError as error:
                    raise DatasetError(
                        f"the archive {path!r}, the record at byte {at}: {error}"
                    ) from None
                names.append(f"at index {at}")
                where.append((begin, end - begin))
    return Found(names, np.array(labels, np.int64), np.array(where, np.int64).reshape(-1, 2))


def _records(path: str, data: mmap.mmap) -> Iterator[tuple[int, Span]]:
    """Of each record its offset, and where its buffer is."""
    at = 0
    while at < len(data):
        begin = at + _HEAD
        end = begin + int.from_bytes(data[at : at + 8], "little")
        if end + _FOOT > len(data):
            raise DatasetError(
                f"the archive {path!r} is cut off within the record at byte {at}, or is no "
                "TFRecord file; copy it again, or give a pattern that leaves it out"
            )
        yield at, (begin, end)
        at = end + _FOOT


def _features(data: mmap.mmap, example: Span) -> Iterator[tuple[str, Span]]:
    """The features of an Example, by name."""
    for _, features in _fields(data, example, 1):
        for _, entry in _fields(data, features, 1):
            name = b"".join(data[begin:end] for _, (begin, end) in _fields(data, entry, 1))
            for _, feature in _fields(data, entry, 2):
                yield name.decode(errors="replace"), feature


def _image(data: mmap.mmap, features: dict[str, Span], name: str) -> Span:
    values = _values(data, features, name, _BYTES_LIST, "image=", "image_field")
    if len(values) != 1 or values[0][0] != _SIZED:
        raise DatasetError(
            f"the feature {name!r} must hold the bytes of one image; image= names another "
            "(train.py: --data.image_field)"
        )
    return values[0][1]


def _label(data: mmap.mmap, features: dict[str, Span], name: str) -> int:
    numbers = []
    for _, (begin, end) in _values(data, features, name, _INT64_LIST, "label=", "label_field"):
        while begin < end:  # one number, or several packed together
            value, begin = _varint(data, begin, end)
            numbers.append(value - (value >> 63 << 64))
    if len(numbers) != 1:
        raise DatasetError(
            f"the feature {name!r} must hold one integer, the number of a class; label= names "
            "another (train.py: --data.label_field)"
        )
    return numbers[0]


def _values(
    data: mmap.mmap, features: dict[str, Span], name: str, kind: int, argument: str, option: str
) -> list[tuple[int, Span]]:
    """The values of a feature, as `_fields` gives them; none if they are not of this kind."""
    if name not in features:
        raise DatasetError(
            f"it has no feature {name!r}, but {', '.join(map(repr, sorted(features))) or 'none'}; "
            f"{argument} names another (train.py: --data.{option})"
        )
    lists = _fields(data, features[name], kind)
    return [value for _, one in lists for value in _fields(data, one, 1)]


def _fields(data: mmap.mmap, message: Span, number: int) -> Iterator[tuple[int, Span]]:
    """The fields of this number in a message: how each is written, and where its content is."""
    at, stop = message
    while at < stop:
        tag, at = _varint(data, at, stop)
        kind = tag & 7
        if kind == _SIZED:
            size, at = _varint(data, at, stop)
            end = at + size
        elif kind == _VARINT:
            _, end = _varint(data, at, stop)
        elif kind in (_FIXED32, _FIXED64):
            end = at + (4 if kind == _FIXED32 else 8)
        else:
            raise _no_example()
        if end > stop:
            raise _no_example()
        if tag >> 3 == number:
            yield kind, (at, end)
        at = end


def _varint(data: mmap.mmap, at: int, stop: int) -> tuple[int, int]:
    """A number of up to 64 bits, seven in a byte, the lowest first; and where it ends."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= stop:
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, at
    raise _no_example()


def _no_example() -> DatasetError:
    return DatasetError("it is no tf.train.Example, or is damaged; copy the file again")
