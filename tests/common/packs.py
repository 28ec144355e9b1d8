"""Archives of a test's own: webdataset tars, and TFRecords written by hand."""

import io
import os
import tarfile
from pathlib import Path

from scae_dali.data.index import ImageIndex


def write_tar(path: Path, members, format=tarfile.USTAR_FORMAT) -> None:
    """members: (name, content) each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def parts_of(index: ImageIndex, archives: int):
    """The samples of an index in so many neighbouring parts: (name, encoded image, label) each."""
    n, labels = len(index), index.labels.tolist()
    for k in range(archives):
        ids = range(n * k // archives, n * (k + 1) // archives)
        yield [(index.files[i], index.read([i])[0].tobytes(), labels[i]) for i in ids]


def pack_tars(index: ImageIndex, folder: Path, archives: int = 3, prefix: str = "train") -> str:
    """The samples of an index in tars, in its order. Returns the pattern of their names."""
    for k, samples in enumerate(parts_of(index, archives)):
        members = []
        for name, image, label in samples:
            members += [(name, image), (f"{os.path.splitext(name)[0]}.cls", str(label).encode())]
        write_tar(folder / f"{prefix}-{k:04d}.tar", members)
    return f"{prefix}-{{0000..{archives - 1:04d}}}.tar"


def varint(value: int) -> bytes:
    out = b""
    value &= (1 << 64) - 1
    while True:
        value, low = value >> 7, value & 127
        out += bytes([low | (128 if value else 0)])
        if not value:
            return out


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return bytes([number << 3 | 2]) + varint(len(payload)) + payload


def feature(*values: int | bytes, packed: bool = True) -> bytes:
    """A tf.train.Feature of bytes or of integers."""
    if values and isinstance(values[0], bytes):
        return field(1, b"".join(field(1, value) for value in values))
    if packed:
        return field(3, field(1, b"".join(map(varint, values))))
    return field(3, b"".join(b"\x08" + varint(value) for value in values))


def record(features: dict[str, bytes]) -> bytes:
    """A record of a tf.train.Example of these Features. Nobody looks at the checksums."""
    entries = (field(1, field(1, k.encode()) + field(2, v)) for k, v in features.items())
    example = field(1, b"".join(entries))
    return len(example).to_bytes(8, "little") + bytes(4) + example + bytes(4)


def pack_tfrecords(index: ImageIndex, folder: Path, archives: int = 3, first: int = 1) -> str:
    """The samples of an index in TFRecords like ImageNet's. Returns the pattern of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, samples in enumerate(parts_of(index, archives)):
        with open(folder / f"train-{k:05d}-of-{archives:05d}", "wb") as out:
            for name, image, label in samples:
                features = {
                    "image/height": feature(300),
                    "image/encoded": feature(image),
                    "image/class/label": feature(label + first, packed=bool(label % 2)),
                    "image/filename": feature(name.encode()),
                }
                out.write(record(features))
    return "train-*"
