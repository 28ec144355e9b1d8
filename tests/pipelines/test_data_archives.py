"""pipelines/data.py: training and validation images in tars and TFRecords."""

import numpy as np
import pytest
from packs import pack_tars, pack_tfrecords, write_tar

from pipelines.data import DataConfig, open_data
from scae_dali.data.index import DatasetError, ImageIndex
from scae_dali.data.pixels import ArrayImages
from scae_dali.training.ranks import Ranks


@pytest.fixture(scope="module")
def root(tailed, tmp_path_factory):
    """63 images of 5 classes to train on, and every third one to validate on."""
    root = tmp_path_factory.mktemp("packed")
    third = tailed.subset(np.arange(0, 63, 3))
    for format, pack in (("webdataset", pack_tars), ("tfrecord", pack_tfrecords)):
        pack(tailed, root / format / "train")
        pack(third, root / format / "val", archives=2)
    return root


def config(root, format="webdataset", **more):
    settings = {"train": "train/train-*", "val": "val/train-*"} | more
    return DataConfig(root=str(root / format), format=format, **settings)


@pytest.mark.parametrize("format", ["webdataset", "tfrecord"])
def test_archives_are_opened(root, tailed, tmp_path, format):
    data = config(root, format, index_cache=str(tmp_path / "kept")).open()
    assert data.train.labels.tolist() == tailed.labels.tolist()
    assert data.val.labels.tolist() == tailed.labels[::3].tolist()
    assert data.train.classes == data.val.classes == ("0", "1", "2", "3", "4")
    assert (data.train_pixels, data.val_pixels) == (None, None)
    assert (data.val.read([4])[0] == tailed.read([12])[0]).all()
    assert len(list((tmp_path / "kept").iterdir())) == 5
    assert data.train.files[0].startswith("train/train-0000")


def test_in_memory_the_pixels_are_those_of_the_files(root, tailed):
    data = config(root, in_memory=True, imbalance=4).open(threads=1)
    pixels = ArrayImages.from_index(tailed, threads=1).pixels
    whole = config(root).open().train
    ids = [whole.files.index(name) for name in data.train.files]
    assert (data.train_pixels == pixels[ids]).all()
    assert (data.val_pixels == pixels[::3]).all()


def test_subsets_and_exclusions(root, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_text("train/train-0000.tar/a/00.png\n")
    bad_val = tmp_path / "bad-val.txt"
    bad_val.write_text("val/train-0000.tar/a/03.png\n")
    data = config(root, exclude=str(bad), val_exclude=str(bad_val)).open()
    assert (len(data.train), len(data.val)) == (62, 20)
    held = config(root, val=None, holdout=1, exclude=str(bad), train="train/train-*")
    with pytest.raises(ValueError, match=r"data\.holdout=1 leaves no image of class '4'"):
        held.open()


def test_labels_of_val_are_counted_as_those_of_train(root, tmp_path):
    """The first label of val alone would be taken for class 0 or refused."""

    def opened(train, val, **more):
        for name, labels in {"t": train, "v": val}.items():
            members = [(f"{k}.jpg", b"image") for k in range(len(labels))]
            texts = [(f"{k}.cls", str(label).encode()) for k, label in enumerate(labels)]
            pairs = zip(members, texts, strict=True)
            write_tar(tmp_path / f"{name}.tar", [one for pair in pairs for one in pair])
        settings = {"root": str(tmp_path), "format": "webdataset", "train": "t.tar", "val": "v.tar"}
        return DataConfig(**settings, **more).open()

    assert opened([0, 1, 2], [1, 2]).val.labels.tolist() == [1, 2]
    assert opened([1, 2, 3], [3]).val.labels.tolist() == [2]
    assert opened([0, 1, 2], [1]).val.classes == ("0", "1", "2")
    with pytest.raises(
        DatasetError,
        match=r"data.val='v.tar' gives 'v.tar/1.jpg' the label 4, but training has the classes 1 … "
        "3; give archives of the same classes",
    ):
        opened([1, 2, 3], [2, 4])
    with pytest.raises(
        DatasetError, match=r"data.val='v.tar': sample 'v.tar/0.jpg' has the label 0, .*first_label"
    ):
        opened([1, 2], [0])
    assert opened([1, 2], [0], first_label=0).train.labels.tolist() == [1, 2]
    with pytest.raises(DatasetError, match=r"data.train='t.tar': labels must run from 0 or from 1"):
        opened([2, 3], [2])


def test_a_pattern_of_nothing_is_named(root):
    with pytest.raises(DatasetError, match=r"data.train='none-\*': no file matches '.*/none-\*'"):
        config(root, train="none-*").open()
    with pytest.raises(
        DatasetError, match=r"data.val='val/{0..9}.tar': the archive '.*/val/0.tar'"
    ):
        config(root, val="val/{0..9}.tar").open()


def test_one_process_of_a_node_indexes(root, monkeypatch):
    calls = []
    original = ImageIndex.from_webdataset

    def seen(*arguments, **settings):
        calls.append(1)
        return original(*arguments, **settings)

    monkeypatch.setattr(ImageIndex, "from_webdataset", seen)
    ranks = Ranks("cpu")
    assert len(open_data(config(root), 1, ranks).train) == 63
    assert len(calls) == 4  # for the others, and for itself
    ranks.local = 1
    open_data(config(root), 1, ranks)
    assert len(calls) == 6


@pytest.mark.parametrize("pattern", ["{a,b}.tar", "train-{0000..0002}.tar", "*.tar", "[ab].tar"])
def test_patterns_are_texts_on_the_command_line(pattern):
    import jsonargparse

    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(DataConfig)
    given = parser.parse_args(["--root=/d", "--format=webdataset", f"--train={pattern}"])
    assert given.train == pattern
