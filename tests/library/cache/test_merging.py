"""Several caches as one: whose maps, which pass, and what cannot be joined."""

import os

import lmdb
import numpy as np
import pytest
from caches import FakeIndex, fill, maps_of

from scae_dali.cache import CacheError, SaliencyCache, import_maps, merge_caches, merging
from scae_dali.data.index import ImageIndex

MADE = {"weights": "ab", "method": "gradcam", "model": "net", "layer": "l4", "input_size": 64}
MADE |= {"settings": {"amp": "none"}}
NAMES = [f"{'ab'[i % 2]}/{i}.jpg" for i in range(12)]


@pytest.fixture
def index():
    return ImageIndex.from_arrays(NAMES, np.arange(12) % 2, "data")


@pytest.fixture(params=["index", "path"])
def make(request, tmp_path, index):
    """A new cache that has maps of the samples `ids`, in a pass over all that never ended."""

    def make(name, ids, *, of=index, salt=0, epoch=0, naming=request.param, grid=(7, 7), **more):
        cache = SaliencyCache.create(tmp_path / name, of, grid=grid, naming=naming)
        cache.begin_pass(epoch, **MADE | more)
        cache.write(ids, maps_of(ids, salt, grid), epoch=epoch)
        if len(ids) == len(of):
            cache.end_pass(epoch)
        return cache

    make.naming = request.param
    return make


def merged(path, index):
    with SaliencyCache(path, index=index) as cache:
        return *cache.read(range(len(index))), cache.stamps().tolist(), cache.meta


def test_halves_of_one_data_set(make, index, tmp_path):
    """As a pass by one process would have made it."""
    halves = [make("one", range(5)), make("two", range(5, 12))]
    whole = make("whole", range(12))
    table = np.array([[1], [0]], np.uint16)
    for cache in (*halves, whole):
        cache.write_neighbors(table)
    done = merge_caches(tmp_path / "all", halves, index=index)
    assert (done.samples, done.found, done.conflicts.tolist(), done.neighbors) == (12, 12, [], True)
    maps, found, stamps, meta = merged(tmp_path / "all", index)
    np.testing.assert_array_equal(maps, maps_of(range(12)))
    assert (found.all(), stamps, meta) == (True, [0] * 12, whole.meta)
    with SaliencyCache(tmp_path / "all", index=index) as cache:
        assert cache.read_neighbors().tolist() == table.tolist()
        assert cache.begin_pass(0, **MADE).size == 0


def test_a_full_disk_is_told_with_the_place_of_the_merged_cache(make, index, tmp_path, monkeypatch):
    def full(*_, **__):
        raise lmdb.DiskError("mdb_put: No space left on device")

    one = make("one", [1, 2])
    monkeypatch.setattr(merging, "put_ascending", full)
    with pytest.raises(
        OSError, match=r"No space left .*: nothing was merged; make room for"
    ) as error:
        merge_caches(tmp_path / "all", [one], index=index)
    assert error.value.filename == str(tmp_path / "all")
    assert os.listdir(tmp_path) == ["one"]


def test_the_merged_cache_is_not_put_into_one_of_them(make, index, tmp_path):
    caches = [make("one", [1, 2]), make("two", [3])]
    with pytest.raises(CacheError, match=r"'.*all' is within saliency cache '.*two'; choose an"):
        merge_caches(tmp_path / "two" / "all", caches, index=index)


def test_the_pass_goes_on_where_maps_are_missing(make, index, tmp_path):
    done = merge_caches(tmp_path / "all", [make("one", [1, 2]), make("two", [7])], index=index)
    assert (done.found, done.neighbors) == (3, False)
    with SaliencyCache(tmp_path / "all", index=index) as cache:
        assert (cache.meta.epoch, cache.meta.passes) == (None, 0)
        pending = cache.begin_pass(0, **MADE)
        assert sorted(pending) == [0, 3, 4, 5, 6, 8, 9, 10, 11]
        cache.write(pending, maps_of(pending), epoch=0)
        cache.end_pass(0)
        np.testing.assert_array_equal(cache.read(range(12))[0], maps_of(range(12)))


def test_parts_that_have_lists_of_their_own(make, index, tmp_path):
    places = [[11, 0, 4, 3], [1, 2, 5, 6, 7, 8, 9, 10]]
    shards = [index.subset(ids) for ids in places]
    caches = [make(f"{k}", range(len(one)), of=one, salt=k) for k, one in enumerate(shards)]
    done = merge_caches(tmp_path / "all", caches, index=index, shards=shards)
    assert done.found == 12
    maps, _, _, meta = merged(tmp_path / "all", index)
    for k, ids in enumerate(places):
        np.testing.assert_array_equal(maps[ids], maps_of(range(len(ids)), k))
    assert (meta.fingerprint, meta.epoch, meta.part) == (index.fingerprint, 0, None)


def test_shards_in_another_order_are_noticed(make, index, tmp_path):
    shards = [index.subset([0, 2, 4]), index.subset([1, 3, 5])]
    caches = [make(f"{k}", range(3), of=one) for k, one in enumerate(shards)]
    with pytest.raises(
        CacheError, match="0' is of another data set than its shard; give the index"
    ):
        merge_caches(tmp_path / "all", caches, index=index, shards=shards[::-1])


def test_a_pass_that_replaces_older_maps_goes_on(make, index, tmp_path):
    one = make("one", range(12), epoch=3)
    one.begin_pass(4, **MADE)
    one.write([5, 6], maps_of([5, 6], 1), epoch=4)
    merge_caches(tmp_path / "all", [one], index=index)
    with SaliencyCache(tmp_path / "all", index=index) as cache:
        assert set(cache.begin_pass(4, **MADE)) == {*range(12)} - {5, 6}


def test_a_list_may_name_its_images_from_another_folder(make, index, tmp_path):
    inner = ImageIndex.from_arrays(NAMES, index.labels, "data/train")
    shard = ImageIndex.from_arrays(["train/a/4.jpg"], [0], "data")
    merge_caches(tmp_path / "all", [make("one", [0], of=shard)], index=inner, shards=[shard])
    assert merged(tmp_path / "all", inner)[1].tolist() == [i == 4 for i in range(12)]


def test_a_list_that_numbers_its_classes_otherwise(make, index, tmp_path):
    shard = ImageIndex.from_arrays(["a/4.jpg", "b/5.jpg"], [0, 0], "data")
    with pytest.raises(
        CacheError, match=r"'b/5.jpg' of .* has label 0, and the index of all has 1"
    ):
        merge_caches(tmp_path / "all", [make("one", [0], of=shard)], index=index, shards=[shard])
    unknown = ImageIndex.from_arrays(["a/99.jpg"], [0], "data")
    with pytest.raises(ValueError, match=r"no sample is named 'data/a/99.jpg'"):
        merge_caches(tmp_path / "all", [make("2", [0], of=unknown)], index=index, shards=[unknown])
    with pytest.raises(CacheError, match="is of another data set than the merged one; give the"):
        merge_caches(tmp_path / "all", [make("3", [0], of=unknown)], index=index)
    assert not (tmp_path / "all").exists()


def test_different_maps_of_one_sample(make, index, tmp_path):
    caches = [make("one", range(6)), make("two", range(5, 9)), make("three", range(8, 12), salt=1)]
    told = r"three' has other maps than a cache before it; samples: 1 \(the first: 8\)\. Leave"
    with pytest.raises(CacheError, match=told):
        merge_caches(tmp_path / "all", caches, index=index)
    assert not (tmp_path / "all").exists()
    done = merge_caches(tmp_path / "all", caches, index=index, keep_first=True)
    assert (done.found, done.conflicts.tolist()) == (12, [8])
    maps = merged(tmp_path / "all", index)[0]
    np.testing.assert_array_equal(maps[:9], maps_of(range(9)))
    np.testing.assert_array_equal(maps[9:], maps_of(range(9, 12), 1))


def test_maps_keep_their_ages(make, index, tmp_path):
    one, two = make("one", range(12), epoch=3), make("two", range(12), epoch=3)
    two.begin_pass(8, **MADE, ids=range(6, 12))
    two.write(range(6, 12), maps_of(range(6, 12)), epoch=8)
    two.end_pass(8)
    one.begin_pass(8, **MADE, ids=[0])  # withdraws nothing
    one.write([0], maps_of([0]), epoch=8)
    one.end_pass(8)
    merge_caches(tmp_path / "some", [one], index=index)
    assert merged(tmp_path / "some", index)[3].part == 1
    merge_caches(tmp_path / "all", [two, one], index=index)
    _, found, stamps, meta = merged(tmp_path / "all", index)
    assert (found.all(), stamps) == (True, [3] * 6 + [8] * 6)
    assert (meta.epoch, meta.part, meta.under_way) == (8, 6, None)
    with SaliencyCache(tmp_path / "all", index=index) as cache:
        assert cache.begin_pass(8, ids=range(6, 12), **MADE).size == 0


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"weights": "cd"}, "weights cd, not ab"),
        ({"layer": "l3"}, "layer l3, not l4"),
        ({"input_size": 32}, "input size 32, not 64"),
        ({"settings": {"amp": "bf16"}}, "amp bf16, not none"),
        ({"grid": (2, 2)}, r"grid \(2, 2\), not \(7, 7\)"),
    ],
)
def test_caches_of_another_making(make, index, tmp_path, other, told):
    caches = [make("one", [0]), make("two", [1], **other)]
    with pytest.raises(CacheError, match=rf"two' is of another kind than '.*one': {told}\. Leave"):
        merge_caches(tmp_path / "all", caches, index=index)


def test_what_cannot_be_merged(make, index, tmp_path):
    one = make("one", [0])
    empty = SaliencyCache.create(tmp_path / "empty", index, grid=(7, 7), naming=make.naming)
    with pytest.raises(CacheError, match="empty' has no maps; leave it out"):
        merge_caches(tmp_path / "all", [one, empty], index=index)
    other = "path" if make.naming == "index" else "index"
    with pytest.raises(CacheError, match=f"naming {other}, not {make.naming}"):
        merge_caches(tmp_path / "all", [one, make("two", [1], naming=other)], index=index)
    with pytest.raises(CacheError, match=r"something is at '.*one' already; choose another path"):
        merge_caches(tmp_path / "one", [one], index=index)
    with pytest.raises(ValueError, match="caches must not be empty"):
        merge_caches(tmp_path / "all", [])
    with pytest.raises(ValueError, match="an index for each of the 1 caches, beside the index of"):
        merge_caches(tmp_path / "all", [one], shards=[index])
    if make.naming == "path":
        with pytest.raises(CacheError, match="names its samples by path, so it needs to know"):
            merge_caches(tmp_path / "all", [one])
    else:
        assert merge_caches(tmp_path / "all", [one]).found == 1
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_imported_maps_need_no_pass_to_go_on(index, tmp_path):
    rows = maps_of(range(12))
    for k, ids in enumerate(([0, 3], [4, 5, 6])):
        names = [NAMES[i] for i in ids]
        import_maps(tmp_path / f"{k}", index, rows[ids], grid=(7, 7), names=names)
    with SaliencyCache(tmp_path / "0") as one, SaliencyCache(tmp_path / "1") as two:
        merge_caches(tmp_path / "all", [one, two])
    maps, found, _, meta = merged(tmp_path / "all", index)
    assert np.flatnonzero(found).tolist() == [0, 3, 4, 5, 6]
    np.testing.assert_array_equal(maps[found], rows[found])
    assert (meta.method, meta.epoch, meta.part, meta.under_way) == ("imported", 0, 5, None)


def test_the_file_is_packed(tmp_path):
    big = FakeIndex(20_000)
    halves = []
    for k in (0, 1):
        cache = SaliencyCache.create(tmp_path / f"{k}", big, grid=(7, 7))
        halves.append(fill(cache, 0, salt=0, ids=np.arange(k, 20_000, 2)))
    merge_caches(tmp_path / "all", halves)
    with SaliencyCache(tmp_path / "all") as cache:
        assert cache.size_bytes / 20_000 < 80
        np.testing.assert_array_equal(cache.read([0, 19_999])[0], maps_of([0, 19_999], 0))
