"""scae-dali export-maps, and import-maps of what it writes: of folders, lists and CIFAR."""

import numpy as np
import pytest
from conftest import fill_cache, run

from scae_dali.cache import SaliencyCache
from scae_dali.data.index import ImageIndex
from scae_dali.data.pixels import ArrayImages


@pytest.mark.parametrize("naming", ["index", "path"])
def test_a_folder_there_and_back(folder, index, tmp_path, naming):
    cache = fill_cache(tmp_path / "maps.lmdb", index, naming=naming)
    cache.begin_pass(1, weights="other", ids=[7])  # withdraws them all
    known = [i for i in range(50) if i not in (7, 20)]
    maps = np.random.default_rng(1).integers(0, 256, (48, 7, 7), np.uint8)
    cache.write(known, maps, epoch=1)
    cache.close()
    out = tmp_path / "maps.npy"
    said = run("export_maps", tmp_path / "maps.lmdb", "--data", folder, "--out", out)
    assert f"{out}: uint8 [50, 7, 7]; names: {tmp_path}/maps.txt" in said
    assert f"2 of 50 images have no map (the first: {index.files[7]})" in said
    again = tmp_path / "again.lmdb"
    options = ["--data", folder, "--grid", "7,7", "--out", again]
    said = run("import_maps", out, "--names", tmp_path / "maps.txt", *options)
    assert f"{again}: 48 maps imported, 48 of 50 images have one; 0 of 48" in said
    assert f"2 of 50 images got no map here (the first: {index.files[7]})" in said
    with SaliencyCache(again, index=index) as imported:
        theirs, found = imported.read(range(50))
    assert np.flatnonzero(found).tolist() == known
    np.testing.assert_array_equal(theirs[known], maps)
    said = run("export_maps", tmp_path / "maps.lmdb", "--data", folder, "--out", out, status=2)
    assert "--out: " in said
    assert "maps.npy' exists; choose another name" in said


def test_a_list(folder, index, cache, tmp_path):
    files = [(name, int(label)) for name, label in zip(index.files, index.labels, strict=True)]
    (tmp_path / "list.txt").write_text("".join(f"{name} {label}\n" for name, label in files[:5]))
    listed = ImageIndex.from_list(tmp_path / "list.txt", root=folder)
    made = fill_cache(tmp_path / "maps.lmdb", listed)
    of = ["--data", folder, "--list", tmp_path / "list.txt"]
    run("export_maps", made.path, *of, "--out", tmp_path / "maps.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "maps.npy"), made.snapshot().maps)
    said = run("export_maps", cache.path, *of, "--out", tmp_path / "other.npy", status=1)
    assert "is of another data set: 50 samples" in said


def test_cifar(cifar, tmp_path):
    index = ArrayImages.from_cifar(cifar, "cifar10", train=True).index
    made = fill_cache(tmp_path / "maps.lmdb", index)
    of = ["--data", cifar, "--format", "cifar10"]
    run("export_maps", made.path, *of, "--out", tmp_path / "maps.npy")
    names = (tmp_path / "maps.txt").read_text().splitlines()
    assert (len(names), names[59]) == (60, "train/00059")
    run("import_maps", tmp_path / "maps.npy", *of, "--grid", "7,7", "--out", tmp_path / "new")
    with SaliencyCache(tmp_path / "new", index=index) as imported:
        np.testing.assert_array_equal(imported.snapshot().maps, made.snapshot().maps)


def test_a_place_that_cannot_be_written_is_known_before_the_images_are_listed(cache, tmp_path):
    (tmp_path / "there.txt").touch()
    for out, told in {
        tmp_path / "maps.pt": "path must end in .npy, got",
        tmp_path / "there.npy": "there.txt' exists; choose another name",
        "/proc/no/maps.npy": "must be a file that can be written, got '/proc/no/maps.npy'",
    }.items():
        options = ["--data", tmp_path / "none", "--out", out]
        said = run("export_maps", cache.path, *options, status=2)
        assert "argument --out: " in said
        assert told in said


def test_folders_above_are_made(folder, cache, tmp_path):
    out = tmp_path / "new" / "folder" / "maps.npy"
    run("export_maps", cache.path, "--data", folder, "--out", out)
    assert np.load(out).shape == (50, 7, 7)
