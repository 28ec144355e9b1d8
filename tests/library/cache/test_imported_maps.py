"""One's own maps: found by their names or rows, checked before anything is written, recorded."""

import numpy as np
import pytest
from caches import in_process
from PIL import Image

from scae_dali.cache import CacheError, SaliencyCache, import_maps
from scae_dali.data.index import ImageIndex

FILES = ("cat/0.jpg", "cat/1.JPEG", "cat/extra.v2.png", "dog/0.jpg")


@pytest.fixture(params=["index", "path"])
def naming(request):
    return request.param


@pytest.fixture
def index():
    return ImageIndex.from_arrays(FILES, [0, 0, 0, 1], "images", classes=["cat", "dog"])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "maps.lmdb"


def some(k, shape=(2, 2)):
    """A map, uint8."""
    return np.random.default_rng(k).integers(0, 256, shape, np.uint8)


def write(folder, name, values):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if name.lower().endswith(".npy"):
        with open(file, "wb") as out:
            np.save(out, values)
    else:
        Image.fromarray(values).save(file)


def read(path, index):
    with SaliencyCache(path, index=index) as cache:
        return *cache.read(range(len(index))), cache.stamps().tolist(), cache.meta


def test_a_folder_that_mirrors_the_images(path, index, tmp_path, naming):
    folder = tmp_path / "masks"
    write(folder, "cat/0.npy", some(0) / 255)
    write(folder, "cat/1.JPEG.png", some(1))
    write(folder, "cat/extra.v2.NPY", some(2, (4, 6)).astype(np.float16) / 256)
    write(folder, "dog/0.png", np.array([[0, 1], [1, 1]], np.bool_))
    write(folder, "dog/7.png", some(3))
    seen = []
    done = import_maps(
        path, index, folder, grid=(2, 2), naming=naming, model="mine", progress=seen.append
    )
    assert (done.ids.tolist(), done.missing.tolist()) == ([0, 1, 2, 3], [])
    assert (done.unused, done.highest, sum(seen)) == (["dog/7.png"], 255, 4)
    maps, found, stamps, meta = read(path, index)
    assert found.all()
    np.testing.assert_array_equal(maps[:2], [some(0), some(1)])
    halves = some(2, (4, 6)).astype(np.float64).reshape(2, 2, 2, 3).mean((1, 3)) * 255 / 256
    assert np.abs(maps[2] - halves).max() <= 0.51
    np.testing.assert_array_equal(maps[3], [[0, 255], [255, 255]])
    assert stamps == [0] * 4
    assert (meta.method, meta.model, meta.layer, meta.weights) == ("imported", "mine", None, "")
    assert (meta.epoch, meta.passes, meta.part, meta.under_way) == (0, 1, None, None)
    assert (meta.settings, meta.naming) == ({"scale": "none"}, naming)


def test_some_maps_now_and_others_later(path, index, tmp_path, naming):
    write(tmp_path / "one", "cat/1.npy", some(1))
    done = import_maps(path, index, tmp_path / "one", grid=(2, 2), naming=naming)
    assert (done.ids.tolist(), done.missing.tolist()) == ([1], [0, 2, 3])
    write(tmp_path / "two", "dog/0.npy", some(3))
    write(tmp_path / "two", "cat/0.npy", 30.0 * some(0))
    import_maps(path, index, tmp_path / "two", scale="max")
    maps, found, stamps, meta = read(path, index)
    assert found.tolist() == [True, True, False, True]
    assert stamps == [1, 0, -1, 1]  # none is withdrawn
    np.testing.assert_array_equal(maps[1], some(1))
    for k in (0, 3):
        np.testing.assert_array_equal(maps[k], np.rint(some(k) * (255 / some(k).max())))
    assert (meta.epoch, meta.part, meta.settings) == (1, 2, {"scale": "max"})


def test_rows_of_an_array(path, index, tmp_path, naming):
    rows = np.stack([some(k, (4, 4)) for k in range(4)])
    np.save(tmp_path / "maps.npy", rows)
    import_maps(path, index, tmp_path / "maps.npy", grid=(4, 4), naming=naming)
    np.testing.assert_array_equal(read(path, index)[0], rows)
    import_maps(path, index, rows[::-1])
    maps, _, stamps, meta = read(path, index)
    np.testing.assert_array_equal(maps, rows[::-1])
    assert (stamps, meta.passes) == ([1] * 4, 2)


def test_rows_by_the_names_of_their_images(path, index):
    names = ["dog/0.jpg", "bird/0.jpg", "cat/1.JPEG\tmissing", "cat/0.jpg"]
    rows = np.stack([some(k) for k in (3, 9, 1, 0)])
    done = import_maps(path, index, rows, grid=(2, 2), names=names)
    assert (done.ids.tolist(), done.unused) == ([0, 3], ["bird/0.jpg"])
    maps, found, *_ = read(path, index)
    assert found.tolist() == [True, False, False, True]
    np.testing.assert_array_equal(maps[[0, 3]], [some(0), some(3)])


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a", "b", "c", "a"], "names must be different, got 'a' twice"),
        (["a", "b", "c"], "as many as there are names, 3, got 4"),
        (["a", "b", "c", "d"], "names must be of samples of the index that have a map; none is"),
        (["a", "b", "cat/0.jpg\tmissing", "d"], "none is"),
    ],
)
def test_names_that_do_not_fit(path, index, names, told):
    with pytest.raises(ValueError, match=told):
        import_maps(path, index, np.zeros((4, 2, 2)), grid=(2, 2), names=names)
    assert not path.exists()


def test_a_bad_map_is_named_and_nothing_is_written(path, index, tmp_path):
    write(tmp_path / "masks", "cat/0.npy", some(0))
    write(tmp_path / "masks", "dog/0.npy", np.array([[0.5, np.nan]]))
    with pytest.raises(ValueError, match=r"'.*masks/dog/0\.npy': a map must be finite .* got nan"):
        import_maps(path, index, tmp_path / "masks", grid=(2, 2))
    assert not path.exists()
    rows = np.full((4, 2, 2), 0.5)
    import_maps(path, index, rows, grid=(2, 2))
    before = read(path, index)[3]
    rows[2, 0, 1] = -1
    with pytest.raises(ValueError, match=r"sample 2, 'cat/extra.v2.png': .* negative, got -1.0"):
        import_maps(path, index, rows)
    assert read(path, index)[3] == before


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("cat/0.png", np.zeros((2, 2, 3), np.uint8), "is of mode RGB, and a map is grey"),
        ("cat/0.npy", np.zeros((1, 2, 2)), r"cat/0\.npy': a map must be \[h, w\], got \[1, 2, 2\]"),
        ("cat/0.npy", np.array([[None]]), "is no .npy file of numbers: Object arrays"),
        ("cat/0.npy", np.zeros((2, 2), np.int64), r"cat/0\.npy': .* uint16, got int64"),
    ],
)
def test_files_that_are_no_maps(path, index, tmp_path, name, values, told):
    write(tmp_path / "masks", name, values)
    with pytest.raises(ValueError, match=told):
        import_maps(path, index, tmp_path / "masks", grid=(2, 2))


def test_broken_files(path, index, tmp_path):
    for name in ("cat/0.png", "cat/0.npy"):
        write(tmp_path / "masks", name, some(0, (64, 64)))
        file = tmp_path / "masks" / name
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(ValueError, match=rf"'.*{name}' "):
            import_maps(path, index, tmp_path / "masks", grid=(2, 2))
        file.unlink()


def test_names_of_files_that_can_be_mistaken(path, tmp_path):
    index = ImageIndex.from_arrays(["a/0.jpg", "a/0.png"], [0, 0])
    write(tmp_path / "masks", "a/0.npy", some(0))
    with pytest.raises(
        ValueError, match=r"'a/0.npy' .* two images, 'a/0.jpg' and 'a/0.png'; .*npy"
    ):
        import_maps(path, index, tmp_path / "masks", grid=(2, 2))
    write(tmp_path / "masks", "a/0.jpg.npy", some(1))
    with pytest.raises(
        ValueError, match=r"'a/0.jpg' has several maps .*a/0.npy, a/0.jpg.npy; keep"
    ):
        import_maps(path, index, tmp_path / "masks", grid=(2, 2))
    (tmp_path / "masks" / "a" / "0.npy").rename(tmp_path / "masks" / "a" / "0.png.npy")
    import_maps(path, index, tmp_path / "masks", grid=(2, 2))
    np.testing.assert_array_equal(read(path, index)[0], [some(1), some(0)])


def test_a_folder_of_something_else(path, index, tmp_path):
    (tmp_path / "masks").mkdir()
    with pytest.raises(ValueError, match=r"no file in .* for 'cat/0.jpg' it would be cat/0.npy or"):
        import_maps(path, index, tmp_path / "masks", grid=(2, 2))
    with pytest.raises(ValueError, match="names are of the rows of an array"):
        import_maps(path, index, tmp_path / "masks", grid=(2, 2), names=["a"])


def test_arrays_that_do_not_fit(path, index):
    with pytest.raises(ValueError, match="samples in the index, 4, got 3; a list of names says"):
        import_maps(path, index, np.zeros((3, 2, 2)), grid=(2, 2))
    with pytest.raises(ValueError, match=r"maps must be \[N, h, w\], got \[4, 2\]"):
        import_maps(path, index, np.zeros((4, 2)), grid=(2, 2))
    with pytest.raises(ValueError, match=r"grid must be given, \(h, w\): there is no cache at"):
        import_maps(path, index, np.zeros((4, 2, 2)))
    with pytest.raises(ValueError, match=r"scale must be one of none, max; got 'sum'"):
        import_maps(path, index, np.zeros((4, 2, 2)), grid=(2, 2), scale="sum")
    assert not path.exists()


def test_a_cache_of_something_else(path, index, tmp_path):
    rows = np.zeros((4, 2, 2))
    with SaliencyCache.create(path, index, grid=(2, 2)) as cache:
        cache.begin_pass(0, method="gradcam")
        cache.write([1], rows[:1], epoch=0)
    with pytest.raises(
        CacheError, match="has maps by 'gradcam'; import maps into a cache of their"
    ):
        import_maps(path, index, rows)
    import_maps(tmp_path / "own.lmdb", index, rows, grid=(2, 2))
    with pytest.raises(CacheError, match=r"has grid \(2, 2\), not \(3, 3\)"):
        import_maps(tmp_path / "own.lmdb", index, rows, grid=(3, 3))
    with pytest.raises(CacheError, match="names its samples by 'index', not by 'path'"):
        import_maps(tmp_path / "own.lmdb", index, rows, naming="path")
    with pytest.raises(CacheError, match="is of another data set"):
        import_maps(tmp_path / "own.lmdb", index.subset([0, 1, 2]), rows[:3])


def test_a_cache_that_was_made_and_not_filled_is_taken(path, index):
    SaliencyCache.create(path, index, grid=(2, 2)).close()
    import_maps(path, index, np.zeros((4, 2, 2)))
    assert read(path, index)[3].method == "imported"
    # It is closed again: another process may write.
    in_process("with SaliencyCache(path) as cache: cache.claim()", path)
