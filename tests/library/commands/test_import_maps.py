"""scae-dali import-maps: of a folder of masks, as a user has them."""

import numpy as np
import pytest
from conftest import run
from PIL import Image

from scae_dali.cache import SaliencyCache


@pytest.fixture
def masks(index, tmp_path):
    """PNG masks of 0 and 255 for all images but one, of different sizes, and one more."""
    folder = tmp_path / "masks"
    for i, name in enumerate([*index.files[1:], "a/unknown.jpg"]):
        file = (folder / name).with_suffix(".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        mask = np.zeros((40 + i, 60), np.uint8)
        mask[:, :30] = 255
        Image.fromarray(mask).save(file)
    return folder


def test_a_folder_of_masks(folder, index, masks, tmp_path):
    out = tmp_path / "maps.lmdb"
    options = [masks, "--data", folder, "--out", out, "--model", "hands"]
    said = run("import_maps", *options, status=1)
    assert "error: grid must be given, (h, w): there is no cache at" in said
    said = run("import_maps", *options, "--grid", "2,4", "--naming", "path")
    assert f"{out}: 49 maps imported, 49 of 50 images have one; 0 of 49 maps are flat" in said
    assert f"1 of 50 images got no map here (the first: {index.files[0]})" in said
    assert "left out: 1, maps of no image (the first: a/unknown.png)" in said
    with SaliencyCache(out, index=index) as cache:
        maps, found = cache.read(range(50))
        meta = cache.meta
    assert found.tolist() == [False] + [True] * 49
    np.testing.assert_array_equal(maps[1:], np.broadcast_to([255, 255, 0, 0], (49, 2, 4)))
    assert (meta.method, meta.model, meta.naming) == ("imported", "hands", "path")
    assert "method       imported" in run("inspect_cache", out)


def test_masks_of_0_and_1_are_noticed(folder, index, tmp_path):
    rows = np.zeros((50, 4, 4), np.uint8)
    rows[:, 0] = 1
    np.save(tmp_path / "maps.npy", rows)
    options = [tmp_path / "maps.npy", "--data", folder, "--out", tmp_path / "maps.lmdb"]
    said = run("import_maps", *options, "--grid", "4,4")
    assert "warning: no value is above 1 of 255; are these masks of 0 and 1? --scale max" in said
    said = run("import_maps", *options, "--scale", "max")
    assert "warning" not in said
    with SaliencyCache(tmp_path / "maps.lmdb", index=index) as cache:
        np.testing.assert_array_equal(cache.read(range(50))[0], rows * 255)


def test_what_cannot_be_imported_is_told(folder, tmp_path):
    np.save(tmp_path / "maps.npy", np.full((50, 2, 2), 3.5))
    options = ["--data", folder, "--out", tmp_path / "maps.lmdb", "--grid", "2,2"]
    said = run("import_maps", tmp_path / "maps.npy", *options, status=1)
    assert "error: the map of sample 0, 'a/00.jpg': a map must be in [0, 1], got 3.5" in said
    said = run("import_maps", tmp_path / "none", *options, status=1)
    assert "none" in said
    said = run("import_maps", tmp_path / "maps.npy", *options[:-1], "7x7", status=2)
    assert "--grid: must be height,width in cells, such as 7,7, got '7x7'" in said
    assert not (tmp_path / "maps.lmdb").exists()
