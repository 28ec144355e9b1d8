"""Indices of archives: their samples, what is kept for the next time, and reading at offsets."""

import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
from packs import feature, pack_tars, pack_tfrecords, record, write_tar

from scae_dali.data import archives
from scae_dali.data.index import ImageIndex
from scae_dali.data.scan import DatasetError

OLD = (1e9, 1e9)  # long ago: an archive that was just written is not trusted


@pytest.fixture
def packed(index, tmp_path) -> Path:
    """The images of `index` as tars and as TFRecords."""
    pack_tars(index, tmp_path / "tars")
    pack_tfrecords(index, tmp_path / "records")
    for path in [*tmp_path.glob("tars/*"), *tmp_path.glob("records/*")]:
        os.utime(path, OLD)
    return tmp_path


@pytest.fixture
def scans(monkeypatch):
    """The names of the tars that are really looked at."""
    seen = []
    original = archives._load

    def load(kept, kind, stamp):
        found = original(kept, kind, stamp)
        if found is None:
            seen.append(os.path.basename(kept).removeprefix(".").split(".tar")[0])
        return found

    monkeypatch.setattr(archives, "_load", load)
    return seen


def tars(packed, **more):
    return ImageIndex.from_webdataset("train-{0000..0002}.tar", packed / "tars", **more)


def records(packed, **more):
    return ImageIndex.from_tfrecord("train-*", packed / "records", **more)


def write_labels(path: Path, *labels: int) -> None:
    members = [(f"{k}.jpg", b"image") for k in range(len(labels))]
    texts = [(f"{k}.cls", str(label).encode()) for k, label in enumerate(labels)]
    write_tar(path, [one for pair in zip(members, texts, strict=True) for one in pair])


@pytest.mark.parametrize("of", [tars, records])
def test_samples_have_the_bytes_and_labels_that_they_had_as_files(packed, index, of):
    made = of(packed)
    assert len(made) == 50
    assert made.labels.tolist() == index.labels.tolist()
    assert made.classes == ("0", "1", "2")
    assert made.archives.first_label == (of is records)
    if of is tars:
        assert made.files[:2] == ("train-0000.tar/a/00.jpg", "train-0000.tar/a/01.jpg")
        assert made.files[-1] == "train-0002.tar/c/04.jpg"
    else:
        first = record(
            {
                "image/height": feature(300),
                "image/encoded": feature(index.read([0])[0].tobytes()),
                "image/class/label": feature(1, packed=False),
                "image/filename": feature(b"a/00.jpg"),
            }
        )
        assert made.files[:2] == (
            "train-00000-of-00003 at index 0",
            f"train-00000-of-00003 at index {len(first)}",
        )
    same = zip(made.read(range(50)), index.read(range(50)), strict=True)
    assert all((one == two).all() for one, two in same)


def test_subsets_copies_and_exclusions_keep_the_bytes(packed, index):
    made = tars(packed, exclude=["train-0000.tar/a/00.jpg"])
    assert len(made) == 49
    ids = [48, 0, 7]
    for one in (made.subset(ids), pickle.loads(pickle.dumps(made.subset(np.array(ids))))):
        assert one.files == tuple(made.files[i] for i in ids)
        for mine, i in zip(one.read(range(3)), ids, strict=True):
            assert (mine == index.read([i + 1])[0]).all()
    without = made.without(["train-0001.tar/a/16.jpg"])
    assert "train-0001.tar/a/16.jpg" not in without.files
    assert (without.read([47])[0] == index.read([49])[0]).all()
    other = made.relabelled(np.full(49, 1), ["x", "y"])
    assert (other.labels == 1).all()
    assert (other.read([0])[0] == index.read([1])[0]).all()


def test_relative_paths_stay_those_of_the_start(packed, index, monkeypatch):
    monkeypatch.chdir(packed)
    made = ImageIndex.from_webdataset("train-*.tar", "tars")
    assert made.files[0] == "train-0000.tar/a/00.jpg"
    monkeypatch.chdir("/")
    assert (made.read([7])[0] == index.read([7])[0]).all()


def test_an_archive_is_looked_at_once(packed, scans):
    first = tars(packed)
    assert sorted(scans) == ["train-0000", "train-0001", "train-0002"]
    assert sorted(path.name for path in (packed / "tars").glob(".*")) == [
        f".train-000{k}.tar.index.npz" for k in range(3)
    ]
    scans.clear()
    assert tars(packed).fingerprint == first.fingerprint
    assert scans == []
    assert len(ImageIndex.from_webdataset("train-*", packed / "tars")) == 50  # hidden, so no match
    kept = packed / "tars" / ".train-0001.tar.index.npz"
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.warns(RuntimeWarning, match=r"train-0001.tar.index.npz' is unreadable .* again"):
        assert tars(packed).fingerprint == first.fingerprint
    assert scans == ["train-0001"]


@pytest.mark.parametrize("same", ["size", "mtime"])
def test_a_replaced_archive_is_indexed_anew(tmp_path, scans, same):
    """Tars are padded to whole blocks, so that their sizes often agree."""
    path = tmp_path / "s.tar"
    write_labels(path, 0, 1)
    os.utime(path, OLD)
    before = os.path.getsize(path)
    ImageIndex.from_webdataset("s.tar", tmp_path)
    write_labels(path, *([1, 0] if same == "size" else [0] * 40))
    os.utime(path, (1e9 + 1, 1e9 + 1) if same == "size" else OLD)
    assert (os.path.getsize(path) == before) == (same == "size")
    scans.clear()
    made = ImageIndex.from_webdataset("s.tar", tmp_path)
    assert scans == ["s"]
    assert made.labels.tolist() == ([1, 0] if same == "size" else [0] * 40)


def test_an_archive_that_was_just_written_is_not_trusted(packed, scans):
    os.utime(packed / "tars" / "train-0001.tar")
    tars(packed)
    scans.clear()
    tars(packed)
    assert scans == ["train-0001"]


@pytest.mark.parametrize("version", [1, archives.CACHE_VERSION])
def test_what_an_older_version_has_kept_is_not_taken(packed, version):
    """Version 1 left links out."""
    right = tars(packed).labels.tolist()
    kept = packed / "tars" / ".train-0000.tar.index.npz"
    with np.load(kept) as stored:
        arrays = dict(stored)
    arrays["labels"][:] = 2
    np.savez(kept, **(arrays | {"version": version}))
    assert (tars(packed).labels.tolist() == right) == (version == 1)


def test_other_features_are_looked_for_anew(packed):
    assert records(packed).labels[0] == 0
    made = records(packed, label="image/height", first_label=0)
    assert (made.labels == 300).all()
    assert records(packed).labels[0] == 0


def test_the_index_is_kept_where_it_is_told(packed, tmp_path, scans):
    tars(packed, cache=tmp_path / "kept" / "here")
    assert not list((packed / "tars").glob(".*"))
    assert len(list((tmp_path / "kept" / "here").iterdir())) == 3
    scans.clear()
    tars(packed, cache=tmp_path / "kept" / "here")
    assert scans == []
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match=r"cache='.*/file/x' cannot be written .*; give a folde"):
        tars(packed, cache=tmp_path / "file" / "x")


def test_archives_of_one_name_in_two_folders_are_kept_apart(packed, tmp_path):
    write_tar(tmp_path / "other" / "train-0000.tar", [("y.jpg", b"y"), ("y.cls", b"0")])
    os.utime(tmp_path / "other" / "train-0000.tar", OLD)
    for _ in range(2):
        made = ImageIndex.from_webdataset(
            "{tars,other}/train-0000.tar", tmp_path, cache=tmp_path / "kept"
        )
        assert made.files[0] == "tars/train-0000.tar/a/00.jpg"
        assert made.files[-1] == "other/train-0000.tar/y.jpg"


def test_a_folder_that_cannot_be_written_is_told(packed, monkeypatch):
    def store(path, **arrays):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(archives, "store", store)
    with pytest.warns(
        RuntimeWarning,
        match=r"index of 3 archives cannot be kept beside them \(.*Permission denied.* cache= is a",
    ):
        assert len(tars(packed)) == 50
    with pytest.raises(DatasetError, match=r"cache='.*kept' cannot be written"):
        tars(packed, cache=packed / "kept")


@pytest.mark.parametrize("open_files", [1, 2, 100])
def test_few_files_may_be_open(packed, index, monkeypatch, open_files):
    limits = (4 * open_files, 4 * open_files)
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    made = tars(packed)
    before = len(os.listdir("/proc/self/fd"))
    for i in (0, 49, 20, 1, 48):
        assert (made.read([i])[0] == index.read([i])[0]).all()
    assert len(os.listdir("/proc/self/fd")) == before + min(open_files, 3)
    del made
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("change", ["mtime", "cut off"])
def test_an_archive_that_changes_under_way_is_told(packed, change):
    made = tars(packed)
    path = packed / "tars" / "train-0002.tar"
    if change == "mtime":
        os.utime(path)
    else:
        made.read([40])
        os.truncate(path, 1000)
    with pytest.raises(DatasetError, match=r"train-0002.tar' has changed since it was ind"):
        made.read([49])


@pytest.mark.parametrize(
    ("labels", "first_label", "wanted"),
    [
        ([0, 2, 1], None, [0, 2, 1]),
        ([3, 1, 2], None, [2, 0, 1]),
        ([3, 1, 2], 0, [3, 1, 2]),
        ([3, 1, 2], 1, [2, 0, 1]),
        ([3, 2], 1, [2, 1]),
        ([10, 12], 10, [0, 2]),
    ],
)
def test_labels_are_counted_from_0_or_from_1(tmp_path, labels, first_label, wanted):
    write_labels(tmp_path / "s.tar", *labels)
    made = ImageIndex.from_webdataset("s.tar", tmp_path, first_label=first_label)
    assert made.labels.tolist() == wanted
    assert made.num_classes == max(wanted) + 1


@pytest.mark.parametrize("first_label", ["0", 1.0, None, np.array([0]), -(1 << 70)])
@pytest.mark.parametrize("of", [tars, records])
def test_arguments_of_other_types_are_refused(packed, of, first_label):
    if first_label is None:
        with pytest.raises(DatasetError, match="num_classes must be a whole number, got '3'; leav"):
            of(packed, num_classes="3")
    else:
        with pytest.raises(DatasetError, match=r"first_label must be a whole number, got .*; the"):
            of(packed, first_label=first_label)


def test_paths_and_numbers_of_other_libraries(packed):
    made = ImageIndex.from_tfrecord(
        (packed / "records").glob("train-00001*"), first_label=np.int16(1), num_classes=np.int64(9)
    )
    one = ImageIndex.from_tfrecord(packed / "records" / "train-00001-of-00003")
    assert made.files == one.files
    assert (made.num_classes, made.archives.first_label) == (9, 1)
    tar = ImageIndex.from_webdataset([Path("train-0001.tar")], packed / "tars")
    assert tar.labels.tolist() == one.labels.tolist() == made.labels.tolist()


@pytest.mark.parametrize(
    ("labels", "first_label", "message"),
    [
        (
            [3, 2],
            None,
            r"run from 0 or from 1, got 2 … 3 \(the first is that of 's.tar/1.jpg'\)",
        ),
        ([1, -1], None, r"must run from 0 or from 1, got -1 … 1"),
        ([1, 0], 1, r"'s.tar/1.jpg' has the label 0, and classes are numbered from 1 on; first_la"),
        ([0, 99999999], None, r"sample 1: label 99999999 is outside 0 … 65535"),
    ],
)
def test_other_labels_are_refused(tmp_path, labels, first_label, message):
    write_labels(tmp_path / "s.tar", *labels)
    with pytest.raises(DatasetError, match=message):
        ImageIndex.from_webdataset("s.tar", tmp_path, first_label=first_label)


def test_an_archive_without_samples_is_named(packed):
    write_tar(packed / "tars" / "train-0001.tar", [("README.txt", b"nothing")])
    with pytest.raises(DatasetError, match=r"train-0001.tar' holds no samples; leave it out"):
        tars(packed)


def test_an_unreadable_archive_is_named(packed, monkeypatch):
    def scan(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("scae_dali.data.index.scan_tar", scan)
    with pytest.raises(DatasetError, match=r"train-0000.tar' cannot be read: .*Permission denied"):
        tars(packed)
