"""The README's code for somebody else's loader, run as it stands there on small data."""

import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill_cache
from nvidia.dali import fn, pipeline_def
from PIL import Image
from torch import nn

import scae_dali
from scae_dali.data.index import ImageIndex

README = (Path(__file__).parents[3] / "README.md").read_text()
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


def test_the_loop_reads_whole_epochs(folder, index, cache):
    changes = {"/data/imagenet/train": str(folder), "imagenet.lmdb": cache.path}
    names = run("file", changes | {"images, *targets": "images, ids, *targets"})
    torch.manual_seed(0)
    names["model"], seen = Net(), []
    names["model"].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    exec(BLOCKS["loop"].replace("range(100)", "range(2)"), names)
    assert sum(seen) == 2 * len(index)
    assert names["loss"].isfinite()
    assert names["batch"].labels.tolist() == index.labels[names["batch"].ids].tolist()


def test_composition(index, cache):
    names = {"scae_dali": scae_dali, "index": index}
    exec(BLOCKS["compose"].replace("imagenet.lmdb", cache.path), names)
    stage = names["stage"]
    planner = stage.planner()
    assert stage.conditional
    assert {"op0", "sign1", "box"} <= planner.columns.keys()
    ids = np.arange(len(index))
    rows = planner(ids, 0 * ids, np.full((len(ids), 2), 224))
    assert (rows[:, planner.columns["box"]].prod(axis=1) > 0).any()


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


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("name", ["refresh", "refresh_tar"])
def test_a_pass_sees_the_samples_that_it_wants_and_no_others(tar, folder, tmp_path, name, share):
    torch.manual_seed(0)
    changes = {
        "imagenet.lmdb": str(tmp_path / "maps.lmdb"),
        "epoch=0": f'epoch=0, layer="features", share={share}',
    }
    if name == "refresh":
        changes["/data/imagenet/train"] = str(folder)
    else:
        changes["samples.txt"] = str(tar / "samples.txt")
        changes["train.tar"] = str(tar / "train.tar")
    net, seen = Net(), []
    net.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    names = run(name, changes, model=net, MEAN=MEAN, STD=STD)
    if name == "refresh_tar":
        names["archive"].close()
    cache = names["cache"]
    assert cache.meta.epoch == 0
    assert cache.read(np.arange(50))[1].sum() == sum(seen) == np.ceil(50 * share)


@pytest.fixture(scope="module")
def greys(tmp_path_factory):
    """24 images of class a and 5 of b, of several sizes, each of one grey: index, cache, grey."""
    root = tmp_path_factory.mktemp("greys")
    grey = 250 - 8 * np.arange(29)
    for k, value in enumerate(grey.tolist()):
        path = root / "ab"[k >= 24] / f"{k:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (30 + k, 60 - k), (value,) * 3).save(path)
    index = ImageIndex(root)
    return index, fill_cache(root.parent / "greys.lmdb", index), grey


def own_pipeline(
    greys, *, size=(32, 32), window=True, conditionals=True, index=None, crop=None, **settings
):
    """A pipeline as the README has it, on data with a tail. Yields flat images, ids and targets."""
    files, cache, _ = greys
    if index is not None:
        cache = None  # it is of the files
    partner = {} if crop is None else {"partner_crop": crop}
    settings = {"tail": 0.5, "fill": "zero", "mix_alpha": 2.0} | settings
    scae = scae_dali.SCAE(index or files, cache, epochs=4, batch_size=10, seed=7, **settings)

    @pipeline_def(
        batch_size=10,
        num_threads=1,
        device_id=None,
        enable_checkpointing=True,
        enable_conditionals=conditionals,
    )
    def train():
        encoded, ids = fn.readers.file(
            files=list(files.files), file_root=files.root,
            name="Reader", shuffle_after_epoch=True, pad_last_batch=True,
        )  # fmt: skip
        shapes = fn.peek_image_shape(encoded)
        start, shape = fn.random_crop_generator(shapes, seed=1)
        if window:
            images = fn.decoders.image_slice(encoded, start=start, shape=shape, axis_names="HW")
        else:
            images = fn.decoders.image(encoded)
        images = fn.resize(images, size=(32, 32))
        frame = (start, shape, shapes) if window else None
        images, targets = scae(images, ids, window=frame, size=size, **partner)
        return fn.flip(images, horizontal=fn.random.coin_flip(seed=2)), ids, *targets

    return train()


def given(pipeline, batches=12):
    """Images uint8 [N, 32, 32, 3], ids, labels, partners' labels, mu."""
    outputs = [[np.asarray(o.as_array()) for o in pipeline.run()] for _ in range(batches)]
    images, *rest = (np.concatenate(one) for one in zip(*outputs, strict=True))
    return images, *(one[:, 0] for one in rest)


@pytest.mark.parametrize("size", [(32, 32), None])
@pytest.mark.parametrize("window", [True, False])
def test_tail_classes_are_mixed_in_somebodys_own_pipeline(greys, size, window):
    """The grey of a mix tells the partner and its weight."""
    images, ids, label, partner, mu = given(
        own_pipeline(greys, size=size, window=window, neighbors=0)
    )
    index, _, grey = greys
    assert (label == index.labels[ids]).all()
    mixed = mu < 1
    assert set(label[mixed]) == set(partner[mixed]) == {1}
    assert (partner[~mixed] == label[~mixed]).all()
    assert 0.2 < mixed[label == 1].mean() < 0.8
    for image, i, weight in zip(images[mixed], ids[mixed], mu[mixed], strict=True):
        (value,) = set(image.ravel().tolist())  # and no rectangle
        others = [j for j in range(24, 29) if j != i]
        wanted = [weight * grey[i] + (1 - weight) * grey[j] for j in others]
        assert np.abs(np.array(wanted) - value).min() < 0.51
    seen = set(zip(ids[mixed].tolist(), images[mixed, 0, 0, 0].tolist(), strict=True))
    assert len(seen) > 5
    for image, i in zip(images[~mixed], ids[~mixed], strict=True):
        assert set(image.ravel().tolist()) <= {0, int(grey[i])}


def test_a_neighbouring_class_comes_from_the_cache(greys):
    greys[1].write_neighbors(np.array([[1], [0]], np.uint16))
    _, _, label, partner, mu = given(own_pipeline(greys, mix_prob=1.0))
    assert (mu[label == 0] == 1).all()
    assert 0.2 < (partner[label == 1] == 0).mean() < 0.8


def test_the_partners_crop_may_be_padded(greys):
    """Then what lies outside the partner is black, and the sample's own share is left there."""
    crop = scae_dali.CropConfig(kind="pad", pad=20)
    pipeline = own_pipeline(greys, mix_prob=1.0, neighbors=0, crop=crop)
    images, ids, label, _, mu = given(pipeline)
    grey, borders = greys[2], 0
    for image, i, weight in zip(images[label == 1], ids[label == 1], mu[label == 1], strict=True):
        own = weight * grey[i]
        assert image.min() > own - 0.51
        rows, columns = (image.max((axis, 2)) for axis in (1, 0))
        borders += min(rows[0], rows[-1], columns[0], columns[-1]) < own + 0.51
    assert borders > (label == 1).sum() / 2


def test_without_conditionals_the_error_says_what_to_do(greys):
    message = (
        "enable_conditionals must be True where samples are mixed: define the pipeline with "
        r"@pipeline_def\(enable_conditionals=True, ...\), or set the method's mix_prob=0"
    )
    with pytest.raises(ValueError, match=message):
        own_pipeline(greys, conditionals=False)
    assert (given(own_pipeline(greys, conditionals=False, mix_prob=0.0), 2)[-1] == 1).all()


def test_names_that_are_no_files_are_refused_where_they_would_be_mixed(greys):
    """As those in archives are: when the graph is built, not in the midst of an epoch."""
    files = greys[0]
    names = ImageIndex.from_arrays([f"archive/{name}" for name in files.files], files.labels)
    rarest = re.escape(repr(os.path.join("archive", files.files[24])))
    message = f"on the disk where samples are mixed, and {rarest} is not: .*the method's mix_prob=0"
    with pytest.raises(ValueError, match=message):
        own_pipeline(greys, index=names)
    assert (given(own_pipeline(greys, index=names, mix_prob=0.0), 2)[-1] == 1).all()
