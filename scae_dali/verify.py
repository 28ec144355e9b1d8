"""Which image files are broken: a quick look at their first and last bytes.

It finds empty files, files that are no image, and JPEGs that end too early, without decoding. What
a decoder makes of the rest is the decoder's business.
"""

import os
import time
from collections.abc import Iterator

from scae_dali.dataset import ImageIndex

_SIGNATURES = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"BM",
    b"RIFF",  # WebP
    b"II*\x00",  # TIFF
    b"MM\x00*",
    b"P3",
    b"P6",
)
_TAIL = 4096  # some cameras and tools append to a JPEG


def fault(path: str) -> str | None:
    """What is wrong with an image file, or None where nothing was found."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            tail = file.read()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not size:
        return "is empty"
    if not head.startswith(_SIGNATURES):
        return f"is no image (it begins with {head[:4]!r})"
    if head.startswith(b"\xff\xd8") and b"\xff\xd9" not in tail:
        return "is cut off (a JPEG without an end marker)"
    return None


def faults(index: ImageIndex, seconds: float = float("inf")) -> Iterator[tuple[str, str]]:
    """(relative path, what is wrong) of every broken file; stops after `seconds`."""
    end = time.monotonic() + seconds
    for name in index.files:
        if (wrong := fault(os.path.join(index.root, name))) is not None:
            yield name, wrong
        if time.monotonic() > end:
            return


def explain(message: str, index: ImageIndex) -> str:
    """DALI's message in a few lines, with the files that are probably at fault."""
    noise = ("Critical error in pipeline", "Current pipeline object", "which was used", "File ")
    lines = [line.strip() for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith(noise)]
    broken = [f"{name} {wrong}" for name, wrong in faults(index, seconds=30)]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        kept.append(f"In {index.root!r}: {'; '.join(broken[:3])}{more}.")
    kept.append(
        "Mend or remove the file, or leave it out with exclude=; tools/check_images.py finds every "
        "such file and writes the list."
    )
    return "\n".join(kept)
