"""The README's code for somebody else's loader, run as it stands there on small data."""

import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill_cache
from torch import nn

from scae_dali.dataset import ImageIndex

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = dict(re.findall(r"```python (\w+)\n(.*?)```", README, flags=re.DOTALL))
MEAN, STD = [124.0, 116.0, 104.0], [58.0, 57.0, 57.0]


def run(name, changes, **names):
    """Execute a block with other paths, a small batch and no GPU; returns its names."""
    code = BLOCKS[name]
    code = re.sub(r"batch_size=\d+", "batch_size=10", code)
    always = {"device_id=0": "device_id=None", '"mixed"': '"cpu"'}
    for old, new in (always | changes).items():
        assert old in code
        code = code.replace(old, new)
    exec(compile(code, f"README: {name}", "exec"), names)
    return names


def check(names, index, cache, batches=10):
    """Two epochs: all samples, right labels, rectangles where the cache and the epoch say."""
    pipeline = names["train"]()
    black = 0
    for _ in range(batches):
        images, label, partner, mu = (np.asarray(o.as_array()) for o in pipeline.run())
        assert images.shape == (10, 3, 224, 224)
        assert (label == partner).all()
        assert (mu == 1).all()
        assert np.isin(label, index.labels).all()
        black += (images[:, :, ::8, ::8] == [[[124]], [[116]], [[104]]]).all(1).any((1, 2)).sum()
    assert 0 < black < 10 * batches
    assert names["scae"].seconds > 0
    return pipeline


@pytest.mark.parametrize("name", ["file", "webdataset", "tfrecord"])
def test_at_most_ten_lines_are_added(name):
    lines = BLOCKS[name].splitlines()
    assert 1 <= sum(line.endswith("#+") for line in lines) <= 10
    own = "\n".join(line for line in lines if not line.endswith("#+"))
    assert "scae" not in own


def test_file_reader(folder, index, cache):
    changes = {"/data/imagenet/train": str(folder), "imagenet.lmdb": cache.path}
    names = run("file", changes)
    check(names, index, cache)


@pytest.fixture(scope="module")
def tar(folder, index, tmp_path_factory):
    """The images in a tar as webdataset has them, and the list of their names and labels."""
    here = tmp_path_factory.mktemp("tar")
    with tarfile.open(here / "train.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, label in zip(index.files, index.labels, strict=True):
            archive.add(folder / name, name)
            (here / "cls").write_text(str(label))
            archive.add(here / "cls", str(Path(name).with_suffix(".cls")))
    lines = [f"{n} {k}\n" for n, k in zip(index.files, index.labels, strict=True)]
    (here / "samples.txt").write_text("".join(lines))
    return here


def test_webdataset_by_path_keys(tar):
    index = ImageIndex.from_list(tar / "samples.txt")
    cache = fill_cache(tar / "maps.lmdb", index, naming="path")
    changes = {
        "samples.txt": str(tar / "samples.txt"),
        "train.tar": str(tar / "train.tar"),
        "imagenet.lmdb": cache.path,
    }
    check(run("webdataset", changes), index, cache)


def varint(value):
    out = b""
    while True:
        value, low = value >> 7, value & 127
        out += bytes([low | (128 if value else 0)])
        if not value:
            return out


def field(number, payload):
    """A length-delimited field of a protocol buffer."""
    return bytes([number << 3 | 2]) + varint(len(payload)) + payload


def test_tfrecord_by_path_keys(folder, tmp_path):
    """tf.train.Example records written by hand: {"image": bytes}; DALI does not check the CRCs."""
    files = ImageIndex(folder)
    offsets = []
    with open(tmp_path / "train.tfrecord", "wb") as out:
        for name in files.files:
            image = (folder / name).read_bytes()
            feature = field(1, b"image") + field(2, field(1, field(1, image)))
            example = field(1, field(1, feature))
            offsets.append((out.tell(), 16 + len(example)))
            out.write(len(example).to_bytes(8, "little") + bytes(4) + example + bytes(4))
    (tmp_path / "train.tfrecord.idx").write_text("".join(f"{o} {n}\n" for o, n in offsets))
    record = str(tmp_path / "train.tfrecord")
    index = ImageIndex.from_arrays([f"{record} at index {o}" for o, _ in offsets], files.labels)
    cache = fill_cache(tmp_path / "maps.lmdb", index, naming="path")
    changes = {"train.tfrecord": record, "imagenet.lmdb": cache.path}
    check(run("tfrecord", changes, labels=files.labels), index, cache)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 4, 32, 32)
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))


def test_a_cache_from_tar_files(tar, tmp_path):
    torch.manual_seed(0)
    changes = {
        "samples.txt": str(tar / "samples.txt"),
        "train.tar": str(tar / "train.tar"),
        "imagenet.lmdb": str(tmp_path / "maps.lmdb"),
        "epoch=0": 'epoch=0, layer="features"',
    }
    names = run("refresh", changes, model=Net(), MEAN=MEAN, STD=STD)
    assert names["cache"].meta.epoch == 0
    assert names["cache"].read(np.arange(50))[1].all()
