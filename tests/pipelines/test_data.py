"""pipelines/data.py: what a run's data config opens, and what it refuses."""

from pathlib import Path

import jsonargparse
import numpy as np
import pytest
from conftest import write_cifar
from crops import write_pngs
from torchvision import datasets

from pipelines.data import Data, DataConfig
from scae_dali.data.index import DatasetError
from scae_dali.data.longtail import choose


@pytest.fixture
def root(tmp_path) -> Path:
    """12, 9 and 6 images to train on, 2 of each class to validate on, in test/."""
    counts = {"a": 12, "b": 9, "c": 6}
    train = [f"train/{k}/{i:02d}.png" for k, n in counts.items() for i in range(n)]
    test = [f"test/{k}/{i}.png" for k in counts for i in range(2)]
    write_pngs(tmp_path / "data", dict.fromkeys(train + test, (6, 8)))
    return tmp_path / "data"


def config(root, **more) -> DataConfig:
    return DataConfig(root=str(root), **({"val_dir": "test"} | more))


def opened(root, **more) -> Data:
    return config(root, **more).open(threads=1)


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines))
    return str(path)


def test_folders_are_opened_without_pixels(root, tmp_path):
    data = opened(root, index_cache=str(tmp_path / "cache"))
    assert data.train.class_counts.tolist() == [12, 9, 6]
    assert (len(data.val), data.val.classes) == (6, ("a", "b", "c"))
    assert (data.train_pixels, data.val_pixels) == (None, None)
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["train.npz", "val.npz"]
    (root / "test").rename(root / "val")
    assert DataConfig(root=str(root)).open().val.fingerprint == data.val.fingerprint


def test_in_memory_the_pixels_lie_beside_the_indices(root, tmp_path):
    bad = write(tmp_path / "bad.txt", "a/03.png", "c/00.png")
    data = opened(root, in_memory=True, exclude=bad)
    assert data.train.class_counts.tolist() == [11, 9, 5]
    assert data.train_pixels.shape == (25, 6, 8, 3)
    assert data.val_pixels.shape == (6, 6, 8, 3)
    other = opened(root, train_dir="test", in_memory=True)
    assert (other.train_pixels == data.val_pixels).all()


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_training_images_alone_get_a_long_tail(root, in_memory):
    whole = opened(root, in_memory=True)
    data = opened(root, imbalance=4, imbalance_seed=3, in_memory=in_memory)
    ids = choose(whole.train.labels, [12, 6, 3], seed=3)
    assert data.train.files == tuple(whole.train.files[i] for i in ids)
    assert data.train.class_counts.tolist() == [12, 6, 3]
    assert data.val.fingerprint == whole.val.fingerprint
    if in_memory:
        assert (data.train_pixels == whole.train_pixels[ids]).all()
    assert opened(root, imbalance=4).train.fingerprint != data.train.fingerprint


def test_cifars_own_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5: Path(path).is_file())
    write_cifar(tmp_path)
    data = DataConfig(root=str(tmp_path), format="cifar100").open()
    assert (len(data.train), len(data.val)) == (12, 4)
    assert (data.train_pixels.shape, data.val_pixels.shape) == ((12, 32, 32, 3), (4, 32, 32, 3))
    tail = DataConfig(root=str(tmp_path), format="cifar100", imbalance=4).open()
    assert tail.train.class_counts.tolist() == [4, 2, 1]
    places = [int(name.removeprefix("train/")) for name in tail.train.files]
    assert places == choose(data.train.labels, [4, 2, 1]).tolist()
    assert (tail.train_pixels == data.train_pixels[places]).all()
    ten = DataConfig(root=str(tmp_path), format="cifar10", in_memory=True).open()
    assert (len(ten.train), ten.train.classes) == (60, ("plane", "car"))


@pytest.mark.parametrize("in_memory", [False, True])
def test_held_out_training_images_are_validated_on(root, in_memory):
    whole = opened(root, in_memory=True)
    data = opened(root, val_dir="val", holdout=2, imbalance=5, in_memory=in_memory)
    assert data.val.class_counts.tolist() == [2, 2, 2]
    assert data.train.class_counts.tolist() == [10, 4, 2]
    assert not {*data.train.files} & {*data.val.files}
    assert {*data.train.files, *data.val.files} < {*whole.train.files}
    if in_memory:
        for index, pixels in ((data.train, data.train_pixels), (data.val, data.val_pixels)):
            ids = [whole.train.files.index(name) for name in index.files]
            assert (pixels == whole.train_pixels[ids]).all()
    untailed = opened(root, val_dir="val", holdout=2)
    assert untailed.val.fingerprint == data.val.fingerprint
    assert untailed.train.class_counts.tolist() == [10, 7, 4]
    with pytest.raises(
        ValueError, match=r"data\.holdout=7 leaves no image of class 'c', which has"
    ):
        opened(root, val_dir="val", holdout=7)


def test_cifars_training_images_are_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5: Path(path).is_file())
    write_cifar(tmp_path)
    whole = DataConfig(root=str(tmp_path), format="cifar100").open()
    data = DataConfig(root=str(tmp_path), format="cifar100", holdout=1, imbalance=3).open()
    assert data.val.class_counts.tolist() == [1, 1, 1]
    assert data.train.class_counts.tolist() == [3, 1, 1]
    names = [*data.train.files, *data.val.files]
    places = [int(name.removeprefix("train/")) for name in names]
    assert len({*places}) == 8
    pixels = np.concatenate([data.train_pixels, data.val_pixels])
    assert (pixels == whole.train_pixels[places]).all()


def test_the_lists_of_imagenet_lt(tmp_path):
    """Their lines, in files that lie elsewhere than the images."""
    train = write(
        tmp_path / "ImageNet_LT_train.txt",
        "train/n01440764/n01440764_762.JPEG 0",
        "train/n01440764/n01440764_10026.JPEG 0",
        "train/n01443537/n01443537_1.JPEG 2",
    )
    val = write(
        tmp_path / "ImageNet_LT_val.txt",
        "val/ILSVRC2012_val_00000001.JPEG 2",
        "val/ILSVRC2012_val_00000002.JPEG 0",
    )
    data = DataConfig(root="/data/imagenet", train_list=train, val_list=val).open()
    assert data.train.class_counts.tolist() == [2, 0, 1]
    assert data.val.labels.tolist() == [2, 0]
    assert data.train.root == data.val.root == "/data/imagenet"
    assert data.val.files[0] == "val/ILSVRC2012_val_00000001.JPEG"
    assert data.val.classes == data.train.classes


def test_a_validation_list_of_other_classes_is_refused(root, tmp_path):
    train = write(tmp_path / "train.txt", "train/a/00.png 0", "train/b/00.png 1")
    val = write(tmp_path / "val.txt", "val/1.png 0", "val/2.png 65", "val/3.png 2")
    with pytest.raises(
        DatasetError,
        match=r"val_list='.*val.txt' gives 'val/2.png' the label 65, but training has the classes "
        r"0 … 1; give lists of the same classes",
    ):
        DataConfig(root=str(root), train_list=train, val_list=val).open()
    fits = write(tmp_path / "fits.txt", "test/b/0.png 1")
    assert DataConfig(root=str(root), val_list=fits).open().val.classes == ("a", "b", "c")


def test_a_training_list_and_a_folder_must_have_as_many_classes(root, tmp_path):
    train = write(tmp_path / "train.txt", "train/a/00.png 0", "train/c/00.png 2")
    assert opened(root, train_list=train).train.num_classes == 3
    train = write(tmp_path / "short.txt", "train/a/00.png 0", "train/b/00.png 1")
    with pytest.raises(
        DatasetError, match=r"has the classes 0 … 1, '.*/test' 3 class folders; .* data.val_list"
    ):
        opened(root, train_list=train)


def test_folders_that_are_missing_or_differ_are_named(root):
    with pytest.raises(
        DatasetError, match=r"has no folder 'val', it has test, train; data.val_dir names the one"
    ):
        DataConfig(root=str(root)).open()
    with pytest.raises(DatasetError, match=r"no folder 'x', it has none at all; data.train_dir"):
        opened(root / "train" / "a", train_dir="x")
    with pytest.raises(DatasetError, match=r"/nowhere/train' does not exist"):
        opened(root / "nowhere")
    (root / "test" / "c").rename(root / "test" / "d")
    message = r"/train' and '.*/test' must have the same class folders; '.*test' lacks 'c': add"
    with pytest.raises(DatasetError, match=message):
        opened(root)


def test_an_imbalance_that_empties_a_class_is_refused(root):
    with pytest.raises(ValueError, match="imbalance=50 leaves no sample of class 2, which has 6"):
        opened(root, imbalance=50)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"format": "cifar"},
            "data.format must be one of folder, cifar10, cifar100, webdataset, tfrecord; got 'cif",
        ),
        (
            {"format": "cifar100", "train_list": "lt.txt"},
            r"data.train_list is for files, got 'lt.txt' with data.format=cifar100; leave it out, "
            "or give another data.format: folder",
        ),
        ({"format": "cifar10", "val_dir": "test"}, "data.val_dir is for files, got 'test'"),
        ({"format": "cifar10", "exclude": "x"}, "data.exclude is for files, got 'x'"),
        ({"format": "cifar10", "index_cache": "x"}, "data.index_cache is for files"),
        (
            {"train": "a.tar"},
            "data.train is for archives, got 'a.tar' with data.format=folder; leave it out, or "
            "give another data.format: webdataset or tfrecord",
        ),
        ({"format": "webdataset", "train": "a", "val": "b", "val_dir": "x"}, "data.val_dir is for"),
        ({"format": "webdataset", "image_field": "jpg"}, "data.image_field is for TFRecords"),
        (
            {"format": "tfrecord", "val": "v"},
            "data.train must name archives with data.format=tfrecord, got None; give a pattern "
            "relative to data.root, such as 'train-{0000..0127}.tar'",
        ),
        ({"format": "webdataset", "train": "t.tar"}, "data.val must name archives"),
        (
            {"format": "webdataset", "train": "a", "val": "b", "holdout": 1},
            "data.holdout=1 validates on training images, so leave out data.val, got 'b'",
        ),
        (
            {"format": "tfrecord", "train": "a", "val": "b", "first_label": -1},
            "data.first_label must be at least 0, got -1; 0 and 1 are usual",
        ),
        (
            {"train_list": "lt.txt", "train_dir": "images"},
            "train_list and data.train_dir exclude each other, got 'lt.txt' and 'images'; the list",
        ),
        ({"val_list": "v.txt", "val_dir": "test"}, "val_list and data.val_dir exclude each other"),
        ({"imbalance": 0.01}, "data.imbalance must be at least 1, got 0.01; published subsets"),
        ({"imbalance": float("nan")}, "data.imbalance must be at least 1, got nan"),
        ({"holdout": -1}, "data.holdout must be at least 0, got -1; it counts images of each"),
        (
            {"holdout": 50, "val_dir": "test"},
            "data.holdout=50 validates on training images, so leave out data.val_dir and data.val_"
            "list, got 'test' and None",
        ),
        ({"imbalance_seed": -1}, r"data.imbalance_seed must be in \[0, 2\^32\), got -1"),
    ],
)
def test_settings_that_do_not_combine_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(root="/data", **settings)


def test_the_command_line_knows_every_field_and_explains_it(capsys):
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(DataConfig)
    line = ["--root=/d", "--format=cifar100", "--imbalance=100"]
    made = DataConfig(**parser.parse_args(line).as_dict())
    assert made == DataConfig(root="/d", format="cifar100", imbalance=100)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Train on a long-tailed subset, whose largest class has this many times" in said
    assert "CIFAR's files as torchvision downloads them" in said


def test_data_is_compared_by_identity(root):
    data = opened(root, in_memory=True)
    assert data == data
    assert data != opened(root, in_memory=True)
    assert data.train_pixels.dtype == np.uint8
