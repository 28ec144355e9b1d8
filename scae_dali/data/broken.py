"""Finds broken image files by a quick look at their first and last bytes, without decoding.

It finds files that are missing, empty, no image, damaged in the header, or cut off. DALI's decoder
mends some of them: `decodes` tries it with one file. `explain` turns an error of DALI into one for
the user. Its remedy is for training files; `of_validation` turns it into that for validation files.
"""

import io
import itertools
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from nvidia.dali import fn, pipeline_def

from scae_dali.data.archives import UInt8
from scae_dali.data.index import DatasetError, ImageIndex
from scae_dali.data.scan import at_once

_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_SIGNATURES = (
    _JPEG,
    _PNG,
    b"BM",
    b"RIFF",  # WebP
    b"II*\x00",  # TIFF
    b"MM\x00*",
    b"II+\x00",  # BigTIFF
    b"MM\x00+",
    *(b"P%d" % kind for kind in range(1, 7)),  # PNM
    b"\x00\x00\x00\x0cjP  ",  # JPEG 2000
    b"\xffO\xffQ",
)
_TAIL = 4096  # cameras and tools may append to an image
_SOS, _BARE = 0xDA, {0x01, *range(0xD0, 0xD9)}  # scan data begins; markers without a length
_SOF = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # frame headers, of every kind of JPEG
_THREADS, _SHARE = 16, 64  # files are opened side by side: storage may be far away
_BLOCK = _THREADS * _SHARE
_NAMED_AT_ONCE = 20  # files in an error
_LOOKED_FOR = 1000  # files, before all are called missing
_PRIME = 2_654_435_761  # its multiples, modulo N, spread over N files whatever their order
_SECONDS = 30.0  # that an error may wait for its explanation

_OPTION = "(train.py: --data.exclude)"
_NO_FILE = "is no file"
_UNDECODABLE = "does not decode"  # though its bytes look sound
_OPERATOR = re.compile(r"operator `([^`]+)`")
_READS = re.compile(r"readers|decoders|peek_image_shape|io\.file")
_NO_IMAGE = re.compile(
    r"CUDA (runtime|driver) API error|cudaError|[Cc]an't allocate|requested number of shards"
)
_NAMED = re.compile(
    r"(?:Failed to decode sample #\d+ : |File mapping failed: |Failed to open file:? )(.+)"
)
_NOISE = re.compile(r"\s*(Critical error in pipeline|C\+\+ context|Current pipeline object|$)")


def fault(path: str) -> str | None:
    """What is wrong with an image file, or None where nothing was found."""
    try:
        with open(path, "rb", opener=at_once) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                return _NO_FILE
            return _fault(file, about.st_size)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _fault(file: BinaryIO, size: int) -> str | None:
    head = file.read(16)
    if not size:
        return "is empty"
    if not head.startswith(_SIGNATURES):
        return f"is no image (it begins with {head[:4]!r})"
    if head.startswith(_JPEG):
        return _jpeg_fault(file, size)
    file.seek(max(0, size - _TAIL))
    tail = file.read()
    if head.startswith(_PNG) and b"IEND" not in tail:
        return "is cut off (a PNG without an end chunk)"
    if head.startswith(b"RIFF") and int.from_bytes(head[4:8], "little") + 8 > size:
        return "is cut off (a WebP shorter than it says)"
    return None


def _jpeg_fault(file: BinaryIO, size: int) -> str | None:
    """Walks the segments up to the first scan, as strictly as DALI's parser; then seeks the end."""
    offset, framed = 2, False
    while True:
        file.seek(offset)
        segment = file.read(9)
        if len(segment) < 4:
            return "is cut off (a JPEG that ends in its header)"
        marker = segment[1]
        if segment[0] != 0xFF or marker in (0x00, 0xD9):
            return "has a damaged header"
        if marker == 0xFF:  # a fill byte
            offset += 1
        elif marker in _BARE:
            offset += 2
        elif marker == _SOS:
            break
        else:
            if marker in _SOF:
                framed = True
                if segment[5:7] == b"\0\0" or segment[7:9] == b"\0\0":
                    return "has a damaged header (a JPEG of no size)"
            offset += 2 + int.from_bytes(segment[2:4], "big")
    if not framed:
        return "has a damaged header (a JPEG without a frame)"
    for start in (max(offset, size - _TAIL), offset):  # mostly the tail is enough
        file.seek(start)
        if b"\xff\xd9" in file.read():
            return None
    return "is cut off (a JPEG without an end marker)"


def faults(
    index: ImageIndex,
    seconds: float = float("inf"),
    progress: Callable[[int], object] = lambda files: None,
) -> Iterator[tuple[str, str]]:
    """(name, what is wrong) of every broken image, in order; stops after `seconds`.

    progress: called with the number of files looked at since its last call.
    """
    return _found(index, _fault_of, seconds, progress)


def _found(
    index: ImageIndex,
    fault_of: Callable[[ImageIndex, int], str | None],
    seconds: float,
    progress: Callable[[int], object] = lambda files: None,
) -> Iterator[tuple[str, str]]:
    """`faults`, of another look at a sample."""
    end = time.monotonic() + seconds

    def look(first: int) -> list[tuple[str, str | None]]:
        ids = range(first, min(first + _SHARE, len(index)))
        return [(index.files[i], fault_of(index, i)) for i in ids]

    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(index), _BLOCK):
            stop = min(start + _BLOCK, len(index))
            for looked in pool.map(look, range(start, stop, _SHARE)):
                yield from ((name, wrong) for name, wrong in looked if wrong is not None)
            progress(stop - start)
            if time.monotonic() > end:
                return


def _fault_of(index: ImageIndex, i: int) -> str | None:
    if index.archives is None:
        return fault(os.path.join(index.root, index.files[i]))
    encoded = index.read([i])[0]
    return _fault(io.BytesIO(encoded.tobytes()), len(encoded))


def check_regular(index: ImageIndex, seconds: float = 5.0) -> None:
    """Raise DatasetError where a name in the index is a pipe or a folder, as far as they are found
    within `seconds`. DALI would wait forever for somebody who writes to a pipe."""
    if index.archives is not None:
        return
    odd = [os.path.join(index.root, name) for name, _ in _found(index, _kind_of, seconds)]
    if odd:
        raise DatasetError(
            f"{len(odd)} of the {len(index)} images are no files (reading one could wait forever), "
            f"such as {odd[0]!r}: take such names out of the list, or put files there"
        )


def _kind_of(index: ImageIndex, i: int) -> str | None:
    try:
        mode = os.stat(os.path.join(index.root, index.files[i])).st_mode
    except OSError:  # whoever reads it will say so
        return None
    return None if stat.S_ISREG(mode) else _NO_FILE


def concerns_images(message: str) -> bool:
    """Whether DALI's message is about reading or decoding, and not about the machine or a plan."""
    operator = _OPERATOR.search(message)
    return bool(operator and _READS.search(operator[1]) and not _NO_IMAGE.search(message))


def explain(message: str, index: ImageIndex) -> str:
    """DALI's message for the user: the files at fault first, then the remedy, then DALI's words.

    DALI names a file that it cannot decode, but not one whose header it cannot parse: then all
    files are looked at, for half a minute at most.
    """
    known = set(index.files)
    named = [_relative(name.strip(), index.root) for name in _NAMED.findall(message)]
    broken = [
        (name, fault(os.path.join(index.root, name)) or _UNDECODABLE)
        for name in dict.fromkeys(named)
        if name in known
    ]
    if not broken and _is_there(index):
        broken = list(faults(index, seconds=_SECONDS))
    if broken:
        what = [f"{os.path.join(index.root, name)!r} {wrong}" for name, wrong in broken[:3]]
        more = f"; and {len(broken) - 3} more" if len(broken) > 3 else ""
        lines = ["; ".join(what) + more + "."]
    else:
        lines = [f"A file in {index.root!r} cannot be read or decoded; a quick look found none."]
    them = "them" if len(broken) > 1 else "it"
    deep = "" if any(wrong != _UNDECODABLE for _, wrong in broken) else " --decode"
    lines.append(
        f"Mend or remove {them}, or leave {them} out with exclude= {_OPTION}; "
        f"`scae-dali check-images{deep}` finds every such file and writes the list."
    )
    if looked := _all_missing(index):
        lines = [_none_is_there(index, looked)]
    operator = _OPERATOR.search(message)
    where = f" in {operator[1].removeprefix('nvidia.dali.')}" if operator else ""
    said = message.rpartition("encountered:")[2].splitlines()  # after the definition's traceback
    lines.append(f"DALI{where}: {' '.join(s.strip() for s in said if not _NOISE.match(s))}")
    return "\n".join(lines)


def _is_there(index: ImageIndex) -> bool:
    """Whether the images can be read; a list may name members of archives, which are no files."""
    return index.archives is not None or os.path.exists(os.path.join(index.root, index.files[0]))


def _all_missing(index: ImageIndex) -> int:
    """How many files were looked for, spread over the index, if none of them is there; else 0."""
    if index.archives is not None:
        return 0
    looked = min(len(index), _LOOKED_FOR)
    names = (index.files[k * _PRIME % len(index)] for k in range(looked))
    return 0 if any(os.path.exists(os.path.join(index.root, name)) for name in names) else looked


def _none_is_there(index: ImageIndex, looked: int) -> str:
    path = os.path.join(index.root, index.files[0])
    what = f"None of the files is there, such as {path!r} ({looked} of {len(index)} looked for): "
    if (link := _dead_link(path)) is not None:
        return (
            f"{what}{link!r} is a link to {os.path.realpath(link)!r}, which is not there. Put the "
            "files there again, or make the links anew."
        )
    return (
        f"{what}give the folder that the paths of the list are relative to, instead of "
        f"{index.root!r}."
    )


def _dead_link(path: str) -> str | None:
    """The link on this path that leads nowhere, or None."""
    while path and not os.path.exists(path):
        if os.path.islink(path):
            return path
        path = os.path.dirname(path)
    return None


def of_validation(explained: str) -> str:
    """A text of `explain`, with train.py's option that leaves out validation files."""
    return explained.replace(_OPTION, _OPTION.replace("exclude", "val_exclude"))


def of_training(explained: str) -> str:
    """A text of `explain`, with the remedies that remain once a run has begun."""
    return (
        f"{explained}\nA run that has begun goes on with the same images alone: put a sound one in "
        "the place of each, or start in a new folder."
    )


def decodes(encoded: UInt8) -> bool:
    """Whether DALI decodes an encoded image, uint8 [bytes], on the CPU, mended or as it is."""

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def define():
        image = fn.external_source(source=[[encoded]])
        return fn.peek_image_shape(image), fn.decoders.image(image).shape()

    if not len(encoded):
        return False
    try:
        define().run()
    except RuntimeError as error:
        if not concerns_images(str(error)):
            raise
        return False
    return True


def confirmed(index: ImageIndex, suspects: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Those of `faults` that the decoder cannot mend."""
    return (
        (name, wrong) for name, wrong in suspects if wrong == _NO_FILE or not _is_sound(index, name)
    )


def _is_sound(index: ImageIndex, name: str) -> bool:
    try:
        return decodes(index.read([index.files.index(name)])[0])
    except OSError:
        return False


def look(index: ImageIndex, seconds: float) -> None:
    """Raise ValueError with the names of broken validation files found within `seconds`."""
    suspects = confirmed(index, faults(index, seconds))
    broken = list(itertools.islice(suspects, _NAMED_AT_ONCE + 1))
    if not broken:
        return
    if looked := _all_missing(index):
        raise ValueError(f"validation: {_none_is_there(index, looked)}")
    lines = [
        f"{os.path.join(index.root, name)!r} {wrong}" for name, wrong in broken[:_NAMED_AT_ONCE]
    ]
    least = ""
    if len(broken) > len(lines):
        least = "at least "
        lines.append("and more")
    raise ValueError(
        f"{least}{len(broken)} of the {len(index)} validation images are broken, as far as a look "
        f"of {seconds:g} s can tell:\n"
        + "\n".join(lines)
        + "\nMend or remove them, or leave them out "
        "with --data.val_exclude and a file of their paths, one a line; `scae-dali check-images` "
        "writes it"
    )


def _relative(name: str, root: str) -> str:
    return name.removeprefix(os.path.join(root, "")) if root else name
