"""All maps in one array, with names; and back again."""

import numpy as np
import pytest

from scae_dali.cache import SaliencyCache, export_maps, import_maps
from scae_dali.data.index import ImageIndex


@pytest.fixture
def index():
    return ImageIndex.from_arrays(["a/0.jpg", "a/1 .jpg", "b/é.jpg"], [0, 0, 1])


@pytest.fixture(params=["index", "path"])
def cache(request, index, tmp_path):
    with SaliencyCache.create(
        tmp_path / "maps.lmdb", index, grid=(2, 3), naming=request.param
    ) as cache:
        cache.begin_pass(4)
        maps = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
        cache.write([0, 2], maps, epoch=4)
        yield cache


def test_maps_and_names(cache, index, tmp_path):
    missing = export_maps(cache, index, tmp_path / "maps.npy")
    assert missing.tolist() == [1]
    rows = np.load(tmp_path / "maps.npy")
    assert (rows.dtype, rows.shape) == (np.uint8, (3, 2, 3))
    np.testing.assert_array_equal(rows.reshape(3, 6), [range(6), [0] * 6, range(6, 12)])
    lines = (tmp_path / "maps.txt").read_bytes().decode()
    assert lines == "a/0.jpg\na/1 .jpg\tmissing\nb/é.jpg\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps.lmdb", "maps.npy", "maps.txt"]


def test_an_export_is_imported_with_the_maps_that_are_missing(cache, index, tmp_path):
    export_maps(cache, index, tmp_path / "maps.npy")
    names = (tmp_path / "maps.txt").read_text("utf-8").splitlines()
    again = tmp_path / "again.lmdb"
    done = import_maps(again, index, tmp_path / "maps.npy", grid=(2, 3), names=names)
    assert done.missing.tolist() == [1]
    with SaliencyCache(again, index=index) as imported:
        for mine, theirs in zip(imported.read([0, 1, 2]), cache.read([0, 1, 2]), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_nothing_is_overwritten(cache, index, tmp_path):
    for name in ("maps.npy", "maps.txt"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match=rf"{name}' exists; choose another name"):
            export_maps(cache, index, tmp_path / "maps.npy")
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"index must be that of the saliency cache '.*maps.lmdb'"):
        export_maps(cache, index.subset([2, 1, 0]), tmp_path / "maps.npy")
    with pytest.raises(ValueError, match=r"path must end in .npy, got '.*maps.bin'"):
        export_maps(cache, index, tmp_path / "maps.bin")


def test_names_that_a_line_cannot_hold(tmp_path):
    index = ImageIndex.from_arrays(["a\tb"], [0])
    with (
        SaliencyCache.create(tmp_path / "maps.lmdb", index, grid=(2, 2)) as cache,
        pytest.raises(ValueError, match=r"no tab and no line end, got 'a\\tb'"),
    ):
        export_maps(cache, index, tmp_path / "maps.npy")
