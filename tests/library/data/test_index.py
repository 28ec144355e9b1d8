import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def
from PIL import Image

from scae_dali.data import index as dataset
from scae_dali.data import scan
from scae_dali.data.index import DatasetError, ImageIndex, path_key

FILES = ("cat/a b.jpg", "cat/deep/ß.PNG", "cat/z.jpeg", "dog/1.JPEG", "Éclair 日/x.webp")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """FILES, and much that is not to be found, in folders last changed long ago."""
    top = tmp_path / "data"
    others = (".hidden/a.jpg", "cat/.a.jpg", "cat/notes.txt", "cat/.git/b.jpg", "list.txt", "c.jpg")
    for name in (*FILES, *others):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).touch()
    settle(top)
    return top


def settle(top: Path) -> None:
    for folder, _, _ in os.walk(top):
        os.utime(folder, (1e9, 1e9))


def test_a_folder_becomes_classes_files_and_labels_in_a_stable_order(root):
    index = ImageIndex(root)
    assert index.root == str(root)
    assert index.files == FILES
    assert index.labels.tolist() == [0, 0, 0, 1, 2]
    assert index.labels.dtype == np.int64
    assert index.classes == ("cat", "dog", "Éclair 日")
    assert (len(index), index.num_classes) == (5, 3)
    assert index.class_counts.tolist() == [3, 1, 1]
    assert index.class_counts.dtype == np.int64
    assert repr(index) == f"ImageIndex(root={str(root)!r}, 5 samples, 3 classes)"


def test_an_index_is_read_only_and_pickles(root):
    index = ImageIndex(root)
    for array in (index.labels, index.class_counts, index.keys("path")):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(AttributeError, match="cannot assign"):
        index.files = ()  # type: ignore[misc]
    copy = pickle.loads(pickle.dumps(index))
    assert (copy.files, copy.fingerprint) == (index.files, index.fingerprint)


def test_links_to_folders_are_followed_and_loops_found(root, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.jpg").touch()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    assert "linked/1.jpg" in ImageIndex(root).files
    (root / "dog" / "loop").symlink_to(root / "dog")
    with pytest.raises(DatasetError, match="too deep; is a link"):
        ImageIndex(root)


def test_roots_that_cannot_be_are_refused(root, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    with pytest.raises(DatasetError, match="root is empty; give the folder"):
        ImageIndex("")
    with pytest.raises(DatasetError, match="nowhere' does not exist; give"):
        ImageIndex(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"list.txt' is a file; give"):
        ImageIndex(root / "list.txt")
    with pytest.raises(DatasetError, match=r"no class folders \(it holds no images either\)"):
        ImageIndex(flat)
    (flat / "1.jpg").touch()
    with pytest.raises(DatasetError, match=r"\(1 images lie directly in it\); put each class's"):
        ImageIndex(flat)
    for split in ("train", "val"):
        (flat / split / "cat").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"splits 'train', 'val', not classes; .*/train'"):
        ImageIndex(flat)


def test_an_empty_class_is_refused_or_keeps_its_label(root):
    (root / "cow" / "sub").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"without images: 'cow'; remove them$"):
        ImageIndex(root)
    index = ImageIndex(root, allow_empty=True)
    assert index.classes == ("cat", "cow", "dog", "Éclair 日")
    assert index.class_counts.tolist() == [3, 0, 1, 1]
    assert index.labels.tolist() == [0, 0, 0, 2, 3]


def test_a_name_that_is_not_utf8_is_refused(root, tmp_path):
    (root / "cat" / "bad\udcff.jpg").touch()
    with pytest.raises(DatasetError, match=r"'cat/bad\\udcff.jpg' is not valid UTF-8; rename"):
        ImageIndex(root)
    with pytest.raises(DatasetError, match="is not valid UTF-8; rename"):
        ImageIndex(root, cache=tmp_path / "index.npz")


def test_excluded_files_are_left_out_and_must_exist(root, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_text("cat/a b.jpg\n\ndog/1.JPEG\n", encoding="utf-8")
    for exclude in (bad, str(bad), ["dog/1.JPEG", "cat/a b.jpg"]):
        index = ImageIndex(root, exclude=exclude)
        assert index.files == (FILES[1], FILES[2], FILES[4])
        assert index.class_counts.tolist() == [2, 0, 1]
    assert ImageIndex.from_arrays(["a", "b"], [0, 1], exclude=["a"]).labels.tolist() == [1]
    with pytest.raises(DatasetError, match=r"1 file\(s\) that the index lacks: 'x'; names look"):
        ImageIndex(root, exclude=["dog/1.JPEG", "x"])
    with pytest.raises(DatasetError, match="no samples; is everything excluded"):
        ImageIndex(root, exclude=FILES)
    with pytest.raises(DatasetError, match=r"no.txt' cannot be read"):
        ImageIndex(root, exclude=tmp_path / "no.txt")


def test_a_list_keeps_its_order_and_its_spaces(tmp_path):
    lines = tmp_path / "list.txt"
    lines.write_text("train/b c/2.JPEG 3\n\ntrain/a/1.JPEG\t0\r\n ü.jpg  1", encoding="utf-8")
    index = ImageIndex.from_list(lines, root="/data")
    assert index.root == "/data"
    assert index.files == ("train/b c/2.JPEG", "train/a/1.JPEG", " ü.jpg")
    assert index.labels.tolist() == [3, 0, 1]
    assert index.classes == ("0", "1", "2", "3")
    assert ImageIndex.from_list(lines, num_classes=6).class_counts.tolist() == [1, 1, 0, 1, 0, 0]
    assert ImageIndex.from_list(lines, classes="wxyz").classes == ("w", "x", "y", "z")
    assert ImageIndex.from_list(lines, exclude=[" ü.jpg"]).labels.tolist() == [3, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a 0\n\nb -1\n", r"list.txt, line 3: label -1 is outside 0 … 4; labels count from 0"),
        (b"a 0\nb 5\n", r"list.txt, line 2: label 5 is outside 0 … 4; .* num_classes"),
        (b"a 0\nb 99999999999999999999\n", r"line 2: label 99999999999999999999 is outside"),
        (b"a 0\nb.jpg\n", r"list.txt, line 2: 'b.jpg' is not 'path label'"),
        (b"a 0\n7\n", r"line 2: '7' is not 'path label'"),
        (b"a 0\nb 1_4\n", r"line 2: 'b 1_4' is not 'path label' with an integer label"),
        ("a ٣\n".encode(), r"line 1: 'a ٣' is not 'path label' with an integer label"),
        (b"a zero\n", r"line 1: 'a zero' is not 'path label' with an integer label, such as"),
        (b"a 0\n\xff 1\n", r"list.txt, after line \d: not UTF-8 .*; convert the list"),
        (b"\n", r"list.txt lists no samples"),
    ],
)
def test_errors_in_a_list_name_the_file_and_the_line(tmp_path, text, message):
    lines = tmp_path / "list.txt"
    lines.write_bytes(text)
    with pytest.raises(DatasetError, match=message):
        ImageIndex.from_list(lines, num_classes=5)


def test_without_num_classes_a_stray_label_does_not_make_a_billion_classes():
    with pytest.raises(DatasetError, match=r"sample 1: label 1000000000 is outside 0 … 65535"):
        ImageIndex.from_arrays(["a", "b"], [0, 10**9])
    assert ImageIndex.from_arrays(["a"], [10**6], num_classes=10**6 + 1).num_classes == 10**6 + 1


def test_arrays_are_checked_and_copied():
    labels = np.array([1, 0], dtype=np.uint8)
    index = ImageIndex.from_arrays(["a", "b"], labels, classes=["x", "y", "z"])
    labels[0] = 2
    assert index.labels.tolist() == [1, 0]
    assert index.class_counts.tolist() == [1, 1, 0]
    for bad, message in (
        ([0], r"shape \(2,\), one a file, got int64 of shape \(1,\)"),
        ([0.0, 1.0], r"must be integers .* got float64"),
        ([0, -3], r"sample 1: label -3 is outside 0 … 1;"),
        ([2, 0], r"sample 0: label 2 is outside 0 … 1;"),
    ):
        with pytest.raises(DatasetError, match=message):
            ImageIndex.from_arrays(["a", "b"], bad, num_classes=2)
    with pytest.raises(DatasetError, match="num_classes=3, but classes names 2; leave"):
        ImageIndex.from_arrays(["a"], [0], num_classes=3, classes=["x", "y"])
    with pytest.raises(DatasetError, match="no samples"):
        ImageIndex.from_arrays([], [])
    with pytest.raises(DatasetError, match="sample 1: a path must be a non-empty str, got ''"):
        ImageIndex.from_arrays(["a", ""], [0, 0])


def test_the_fingerprint_covers_paths_labels_and_order():
    def of(files, labels, **options):
        return ImageIndex.from_arrays(files, labels, **options).fingerprint

    prints = {
        of(["a", "b"], [0, 1]),
        of(["b", "a"], [0, 1]),
        of(["a", "b"], [1, 0]),
        of(["ab"], [0]),
        of(["a"], [0]),
        of(["a", "b", "c"], [0, 1, 0]),
    }
    assert len(prints) == 6
    assert of(["a", "b"], [0, 1]) == of(["a", "b"], [0, 1], root="/x", num_classes=9)
    record = (1).to_bytes(4, "little") + bytes(8) + b"a"
    assert of(["a"], [0]) == hashlib.blake2b(record, digest_size=16).hexdigest()


def test_keys_are_positions_or_the_first_eight_bytes_of_blake2b():
    index = ImageIndex.from_arrays(["a", "ü b"], [0, 0])
    assert index.keys("index").tolist() == [0, 1]
    expected = [hashlib.blake2b(n.encode()).digest()[:8] for n in index.files]
    assert index.keys("path").tolist() == [int.from_bytes(raw, "big") for raw in expected]
    assert [path_key(name) for name in index.files] == index.keys("path").tolist()
    assert index.keys("index").dtype == index.keys("path").dtype == np.uint64
    with pytest.raises(DatasetError, match="naming must be 'index' or 'path', got 'name'"):
        index.keys("name")


def test_samples_that_would_share_a_key_are_refused(monkeypatch):
    index = ImageIndex.from_arrays(["a", "b", "a"], [0, 0, 0])
    assert index.keys("index").tolist() == [0, 1, 2]
    with pytest.raises(DatasetError, match=r"0 \('a'\) and 2 \('a'\) have the same 64-bit"):
        index.keys("path")
    monkeypatch.setattr(dataset, "path_key", len)
    with pytest.raises(DatasetError, match=r"0 \('a'\) and 1 \('b'\) have .* rename one"):
        ImageIndex.from_arrays(["a", "b"], [0, 0]).ids_of(["b"])


def test_names_of_every_reader_are_found():
    files = [
        "d/s 0.jpg",
        "t.tar:512:d/s1.jpg",
        "t.tfrecord at index 19351",
        "x:7:y.jpg",
        "d/s2.jpg",
    ]
    index = ImageIndex.from_arrays(files, [0] * 5, root="/data/set")
    assert index.ids_of(files[::-1]).tolist() == [4, 3, 2, 1, 0]
    assert index.ids_of(["/data/set/d/s2.jpg", "d/s2.jpg"]).tolist() == [4, 4]
    assert index.ids_of(["t.tar:1024:d/s 0.jpg", "/data/t.tar:0:x:7:y.jpg"]).tolist() == [0, 3]
    assert index.ids_of([]).tolist() == []
    assert index.ids_of(["d/s 0.jpg"]).dtype == np.int64
    for name in ("d/s9.jpg", "t.tar:512:d/s9.jpg", "/data/set/d/s9.jpg", "t.tar:x:d/s2.jpg"):
        with pytest.raises(DatasetError, match=f"no sample is named '{name}'; .* 'd/s 0.jpg'"):
            index.ids_of(["d/s2.jpg", name])


def test_an_unknown_name_with_a_known_key_is_still_unknown(monkeypatch):
    index = ImageIndex.from_arrays(["a", "bb"], [0, 0])
    monkeypatch.setattr(dataset, "path_key", len)
    with pytest.raises(DatasetError, match="no sample is named 'cc'"):
        index.ids_of(["a", "cc"])


def test_a_subset_keeps_classes_and_renumbers(root):
    index = ImageIndex(root)
    part = index.subset([4, 0])
    assert (part.files, part.labels.tolist()) == ((FILES[4], FILES[0]), [2, 0])
    assert (part.root, part.classes) == (index.root, index.classes)
    assert part.fingerprint != index.fingerprint
    assert index.subset(range(5)).fingerprint == index.fingerprint
    for ids, message in (
        ([0, 5], "must lie in 0 … 4, got 0 … 5"),
        ([-1], "must lie in 0 … 4, got -1 … -1"),
        ([True] * 5, "integers of shape .*, got bool .*; np.flatnonzero turns"),
    ):
        with pytest.raises(DatasetError, match=message):
            index.subset(ids)


def test_dali_reads_the_files_and_its_labels_are_the_ids(root):
    index = ImageIndex(root)
    for i, name in enumerate(index.files):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(root / name, "PNG")

    @pipeline_def
    def read():
        data, ids = fn.readers.file(files=index.files, file_root=index.root)
        return ids, fn.get_property(data, key="source_info"), fn.decoders.image(data)

    outputs: Any = read(batch_size=len(index), num_threads=1, device_id=None).run()
    ids, names, images = outputs
    assert np.stack([np.asarray(i) for i in ids]).ravel().tolist() == [0, 1, 2, 3, 4]
    text = [np.asarray(name).tobytes().decode() for name in names]
    assert text == list(index.files)
    assert index.ids_of(text).tolist() == [0, 1, 2, 3, 4]
    assert [int(np.asarray(image)[0, 0, 0]) for image in images] == [0, 40, 80, 120, 160]


def no_scan(root):
    raise AssertionError("scanned again")


def test_a_cache_spares_the_scan_and_gives_the_same_index(root, tmp_path, monkeypatch):
    cache = tmp_path / "index.npz"
    first = ImageIndex(root, cache=cache)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "index.npz"]
    monkeypatch.setattr(scan, "scan_folders", no_scan)
    second = ImageIndex(root, cache=cache)
    assert (second.files, second.classes) == (first.files, first.classes)
    assert second.labels.tolist() == first.labels.tolist()
    assert second.fingerprint == first.fingerprint
    monkeypatch.chdir(root)
    part = ImageIndex("../data", cache=cache, exclude=[FILES[0]])  # options apply after the cache
    assert (part.root, part.files) == ("../data", FILES[1:])


@pytest.mark.parametrize("place", ["", "cat", "cat/deep", "new class", "cow"])
def test_a_change_anywhere_makes_the_cache_stale(root, tmp_path, place):
    cache = tmp_path / "index.npz"
    (root / "cow").mkdir()
    settle(root)
    before = ImageIndex(root, cache=cache, allow_empty=True)
    (root / place / "sub").mkdir(parents=True)
    (root / place / "sub" / "new.jpg").touch()
    after = ImageIndex(root, cache=cache, allow_empty=True)
    assert set(after.files) - set(before.files) == {f"{place}/sub/new.jpg".lstrip("/")}
    assert after.files == ImageIndex(root, allow_empty=True).files


def test_a_removed_folder_and_another_root_make_the_cache_stale(root, tmp_path):
    cache = tmp_path / "index.npz"
    ImageIndex(root, cache=cache)
    (root / "dog" / "1.JPEG").unlink()
    (root / "dog").rmdir()
    assert ImageIndex(root, cache=cache).classes == ("cat", "Éclair 日")
    (tmp_path / "other" / "k").mkdir(parents=True)
    (tmp_path / "other" / "k" / "1.jpg").touch()
    assert ImageIndex(tmp_path / "other", cache=cache).files == ("k/1.jpg",)


def test_a_folder_that_changed_just_now_is_not_trusted(root, tmp_path, monkeypatch):
    cache = tmp_path / "index.npz"
    (root / "dog" / "2.jpg").touch()
    now = (root / "dog").stat().st_mtime_ns
    ImageIndex(root, cache=cache)
    (root / "dog" / "3.jpg").touch()
    os.utime(root / "dog", ns=(now, now))  # as if within one tick of a coarse clock
    assert "dog/3.jpg" in ImageIndex(root, cache=cache).files


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped", "objects", "keys"])
def test_a_damaged_cache_is_scanned_again_with_a_warning(root, tmp_path, damage, monkeypatch):
    cache = tmp_path / "index.npz"
    ImageIndex(root, cache=cache)
    raw = cache.read_bytes()
    at = raw.index(b"cat/a b.jpg")
    if damage == "objects":
        np.savez(cache, version=np.array([{}], dtype=object))
    elif damage == "keys":
        np.savez(cache, root=0)
    else:
        flipped = raw[:at] + b"d" + raw[at + 1 :]
        made = {"cut": raw[:-40], "empty": b"", "text": b"cat dog", "flipped": flipped}
        cache.write_bytes(made[damage])
    with pytest.warns(UserWarning, match=r"index.npz' is unreadable .* scanned again") as caught:
        assert ImageIndex(root, cache=cache).files == FILES
    assert caught[0].filename == __file__
    monkeypatch.setattr(scan, "scan_folders", no_scan)
    assert ImageIndex(root, cache=cache).files == FILES


def test_a_cache_of_another_version_is_rewritten(root, tmp_path, monkeypatch):
    cache = tmp_path / "index.npz"
    ImageIndex(root, cache=cache)
    monkeypatch.setattr(scan, "CACHE_VERSION", 2)
    assert ImageIndex(root, cache=cache).files == FILES
    with np.load(cache) as stored:
        assert stored["version"] == 2


def test_a_cache_goes_only_where_it_can_do_no_harm(root, tmp_path):
    with pytest.raises(DatasetError, match=r"cache='saliency.lmdb' must end in .npz"):
        ImageIndex(root, cache="saliency.lmdb")
    with pytest.raises(DatasetError, match=r"lies in root=.*; give a file elsewhere"):
        ImageIndex(root, cache=root / "index.npz")
    with pytest.raises(DatasetError, match=r"cannot be written .*; give a file in a writable"):
        ImageIndex(root, cache=tmp_path / "none" / "index.npz")
