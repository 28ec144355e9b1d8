"""The cache as its users meet it: what is written is read back, whatever happens in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import pytest
from caches import GRID, FakeIndex, fill, in_process, maps_of, spoil

from scae_dali.cache import (
    CacheError,
    CacheMeta,
    ChunkWriter,
    ResidentCache,
    SaliencyCache,
    environment,
    reader,
)
from scae_dali.plan.random import Stream, uniforms


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "maps.lmdb")


@pytest.fixture(params=["index", "path"])
def cache(request, path):
    with SaliencyCache.create(path, FakeIndex(), grid=GRID, naming=request.param) as cache:
        yield cache


def test_reads_back_what_was_written(cache):
    fill(cache, 3)
    ids = np.array([99, 0, 41, 0])
    maps, found = cache.read(ids)
    assert maps.dtype == np.uint8
    assert maps.flags.owndata or maps.base.flags.owndata
    assert maps.flags.writeable
    np.testing.assert_array_equal(maps, maps_of(ids, 3))
    assert found.tolist() == [True] * 4
    np.testing.assert_array_equal(cache.stamps(), np.full(100, 3))
    assert cache.stamps().dtype == np.int32


def test_missing_and_malformed_records_are_not_found(cache):
    cache.begin_pass(1)
    cache.write([5, 7], maps_of([5, 7]), epoch=1)
    name = int(FakeIndex().keys(cache.meta.naming)[7]).to_bytes(8, "big")
    spoil(cache, name, b"\1\0short")
    maps, found = cache.read([5, 6, 7])
    assert found.tolist() == [True, False, False]
    np.testing.assert_array_equal(maps[0], maps_of([5])[0])
    assert not maps[1:].any()
    assert cache.stamps()[[5, 6, 7]].tolist() == [1, -1, -1]
    assert cache.census() == ({1: 1}, 1)
    resident = cache.resident()
    assert np.flatnonzero(resident.found).tolist() == [5]


def test_empty_batch(cache):
    maps, found = cache.read(np.empty(0, np.int64))
    assert maps.shape == (0, 7, 7)
    assert found.shape == (0,)
    cache.begin_pass(0)
    cache.write([], np.empty((0, 7, 7), np.uint8), epoch=0)
    assert cache.census() == ({}, 0)


@pytest.mark.parametrize("ids", [[0, 100], [-1]])
def test_ids_outside_the_index(cache, ids):
    for read in (cache.read, cache.resident().read):
        with pytest.raises(IndexError, match=rf"0\.\.99 .*got {ids[-1]}"):
            read(ids)


@pytest.mark.parametrize(("ids", "got"), [([0.5], "float64"), ([[1, 2]], r"\[1, 2\]")])
def test_ids_of_another_type(cache, ids, got):
    with pytest.raises(ValueError, match=rf"ids must be integers \[B\], got .*{got}"):
        cache.read(ids)


def test_float_maps_are_rounded(cache):
    values = np.linspace(0, 1, 49, dtype=np.float64).reshape(1, 7, 7)
    cache.begin_pass(0)
    for dtype in (np.float64, np.float32):
        cache.write([8], values.astype(dtype), epoch=0)
        np.testing.assert_array_equal(cache.read([8])[0], np.rint(255 * values))


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (np.zeros((2, 6, 7), np.uint8), r"maps must be \[2, 7, 7\], got \[2, 6, 7\]"),
        (np.zeros((1, 7, 7), np.uint8), r"maps must be \[2, 7, 7\], got \[1, 7, 7\]"),
        (np.zeros((2, 7, 7), np.int16), r"uint8, or float in \[0, 1\], got int16"),
        (np.full((2, 7, 7), 1.5), r"in \[0, 1\], got 1.5 for sample 40"),
        (np.stack([np.zeros(GRID), np.full(GRID, np.nan)]), "got nan for sample 41"),
        (np.stack([np.zeros(GRID), np.full(GRID, -np.inf)]), "got -inf for sample 41"),
    ],
)
def test_malformed_maps(cache, maps, message):
    cache.begin_pass(0)
    with pytest.raises(ValueError, match=message):
        cache.write([40, 41], maps, epoch=0)
    assert cache.census() == ({}, 0)


def test_of_twins_the_last_counts(cache):
    cache.begin_pass(0)
    cache.write([9, 3, 9], maps_of([1, 2, 3]), epoch=0)
    np.testing.assert_array_equal(cache.read([9, 3])[0], maps_of([3, 2]))


@pytest.mark.parametrize("epoch", [-1, 65536, 1.0, "1"])
def test_epoch_must_fit_its_stamp(cache, epoch):
    for call in (cache.begin_pass, cache.end_pass):
        with pytest.raises(ValueError, match=rf"0\.\.65535 .* got {epoch!r}"):
            call(epoch)
    fill(cache, 65535)
    assert set(cache.stamps()) == {65535}


def test_meta_tells_the_last_pass_and_the_one_under_way(path):
    cache = SaliencyCache.create(
        path, FakeIndex(), grid=GRID, model="resnet50", layer="layer4", input_size=224
    )
    new = CacheMeta(
        1, GRID, 100, "00ff" * 8, "index", "gradcam", "resnet50", "layer4", 224, "", None, 0
    )
    assert cache.meta == new
    cache.begin_pass(4, weights="ab", layer="layer3")
    under_way = {"epoch": 4, "weights": "ab", "part": None, "which": None, "method": "gradcam"}
    under_way |= {"model": "resnet50", "layer": "layer3", "input_size": 224}
    assert cache.meta == replace(new, under_way=under_way)
    cache.write(range(100), maps_of(range(100)), epoch=4)
    cache.end_pass(4)
    assert cache.meta == replace(new, weights="ab", layer="layer3", epoch=4, passes=1)
    cache.end_pass(4)
    assert cache.meta.passes == 1


def test_pending_is_in_key_order(cache):
    pending = cache.begin_pass(0)
    keys = FakeIndex().keys(cache.meta.naming)
    assert pending.dtype == np.int64
    np.testing.assert_array_equal(keys[pending], np.sort(keys))


def test_a_pass_resumes(cache):
    fill(cache, 0)
    first = cache.begin_pass(1, weights="ab")
    cache.write(first[:30], maps_of(first[:30], 1), epoch=1)
    np.testing.assert_array_equal(cache.begin_pass(1, weights="ab"), first[30:])
    fill(cache, 1, weights="ab")
    assert cache.begin_pass(1, weights="ab").size == 0
    assert cache.meta.under_way is None
    np.testing.assert_array_equal(cache.read(range(100))[0], maps_of(range(100), 1))


@pytest.mark.parametrize("change", [{"weights": "cd"}, {"weights": "ab", "layer": "layer3"}])
@pytest.mark.parametrize("complete", [False, True])
def test_maps_of_other_weights_are_never_taken_for_new(cache, change, complete):
    fill(cache, 0)
    old = cache.begin_pass(1, weights="ab")
    old = old if complete else old[:30]
    cache.write(old, maps_of(old, 1), epoch=1)
    if complete:
        cache.end_pass(1)
    assert len(cache.begin_pass(1, **change)) == 100
    assert not cache.read(old)[1].any()
    assert cache.meta.epoch == (None if complete else 0)
    new = old[:10]
    cache.write(new, maps_of(new, 2), epoch=1)
    # Nor the new ones for old, on the way back.
    assert len(cache.begin_pass(1, weights="ab")) == 100
    fill(cache, 1, salt=5, **change)
    np.testing.assert_array_equal(cache.read(range(100))[0], maps_of(range(100), 5))
    assert cache.meta.passes == 2 + complete


def test_an_abandoned_pass_leaves_the_older_maps(cache):
    fill(cache, 1, weights="ab")
    ids = cache.begin_pass(2)[:40]
    cache.write(ids, maps_of(ids, 2), epoch=2)
    assert np.bincount(cache.stamps()).tolist() == [0, 60, 40]
    assert set(cache.begin_pass(1, weights="ab")) == set(ids)


def test_passes_over_a_share_take_every_sample_in_turn(cache):
    ages = []
    for epoch in range(1, 6):
        ids = cache.stalest(25, epoch=epoch)
        np.testing.assert_array_equal(fill(cache, epoch, ids=ids).stalest(25, epoch=epoch), ids)
        ages.append(np.bincount(cache.stamps() + 1, minlength=7).tolist())
    assert ages[:4] == [
        [75, 0, 25, 0, 0, 0, 0],
        [50, 0, 25, 25, 0, 0, 0],
        [25, 0, 25, 25, 25, 0, 0],
        [0, 0, 25, 25, 25, 25, 0],
    ]
    assert ages[4] == [0, 0, 0, 25, 25, 25, 25]
    assert (cache.meta.epoch, cache.meta.part, cache.meta.passes) == (5, 25, 5)
    maps, found = cache.read(range(100))
    assert found.all()
    for stamp in range(2, 6):
        ids = np.flatnonzero(cache.stamps() == stamp)
        np.testing.assert_array_equal(maps[ids], maps_of(ids, stamp))


def test_a_pass_over_other_samples_is_another_pass(cache):
    fill(cache, 5, ids=[0, 1, 2])
    assert set(cache.begin_pass(5, ids=[3, 4, 5])) == {3, 4, 5}
    with pytest.raises(CacheError, match=r"end_pass\(5\): 3 of 3 maps are missing"):
        cache.end_pass(5)
    cache.write([3, 4, 5], maps_of([3, 4, 5]), epoch=5)
    cache.end_pass(5)
    assert set(np.flatnonzero(cache.stamps() == 5)) == {3, 4, 5}


def test_the_stalest_are_not_the_same_of_every_epoch(cache):
    first, second = (set(cache.stalest(50, epoch=epoch)) for epoch in (1, 2))
    assert 10 < len(first & second) < 40


@pytest.mark.parametrize("count", [0, 1, 250, 251, 999, 1000])
def test_the_stalest_are_the_first_by_age_then_by_draw(path, count):
    index = FakeIndex(1000)
    with SaliencyCache.create(path, index, grid=GRID, naming="path") as cache:
        passes = {1: range(100, 200), 2: range(200, 350), 65535: range(350, 600)}
        for epoch, ids in (passes | {3: range(900)[::3]}).items():
            fill(cache, epoch, ids=ids)
        stamps = cache.stamps()
        ties = uniforms(0, Stream.STALEST, 3, np.arange(1000), 1)[:, 0]
        # Those of this pass, then those that are missing or of another run's epoch 65535, by age.
        age = np.where(stamps == 3, -2, np.where(stamps > 3, -1, stamps))
        first = np.lexsort((ties, age))[:count]
        ids = cache.stalest(count, epoch=3)
        np.testing.assert_array_equal(np.sort(ids), np.sort(first))
        keys = index.keys("path")[ids]
        np.testing.assert_array_equal(keys, np.sort(keys))


def test_of_equal_values_the_first_are_the_lowest():
    values = np.array([2.0, 1.0, 2.0, 2.0, 0.0])
    for count, places in enumerate(([], [4], [1, 4], [0, 1, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4])):
        assert np.flatnonzero(reader._lowest(values, count)).tolist() == places


def test_a_pass_over_a_share_resumes_with_the_same_samples(cache):
    fill(cache, 1)
    ids = cache.stalest(40, epoch=2)
    keys = FakeIndex().keys(cache.meta.naming)
    np.testing.assert_array_equal(keys[ids], np.sort(keys[ids]))
    pending = cache.begin_pass(2, ids=ids, weights="ab")
    np.testing.assert_array_equal(pending, ids)
    cache.write(pending[:15], maps_of(pending[:15], 2), epoch=2)
    with pytest.raises(CacheError, match="25 of 40 maps are missing"):
        cache.end_pass(2)
    again = cache.stalest(40, epoch=2)
    np.testing.assert_array_equal(again, ids)
    np.testing.assert_array_equal(cache.begin_pass(2, ids=again, weights="ab"), ids[15:])
    fill(cache, 2, ids=again, weights="ab")
    assert cache.begin_pass(2, ids=again, weights="ab").size == 0
    assert np.bincount(cache.stamps()).tolist() == [0, 60, 40]


def test_maps_of_other_weights_outside_a_share_are_withdrawn_too(cache):
    fill(cache, 1, weights="ab")
    fill(cache, 1, ids=[3, 5], weights="cd")
    assert np.flatnonzero(cache.read(range(100))[1]).tolist() == [3, 5]


def test_passes_over_a_share_replace_what_a_longer_run_left(cache):
    fill(cache, 90)
    for epoch in (10, 20, 30, 40):
        ids = cache.stalest(25, epoch=epoch)
        assert set(cache.stamps()[ids]) == {90}
        fill(cache, epoch, ids=ids)
    assert cache.census()[0] == {10: 25, 20: 25, 30: 25, 40: 25}


@pytest.mark.parametrize("weights", ["aa", "bb"])
def test_a_pass_of_no_samples_withdraws_nothing(cache, weights):
    fill(cache, 5, weights="aa")
    assert cache.begin_pass(5, ids=[], weights=weights).tolist() == []
    cache.end_pass(5)
    assert cache.census()[0] == {5: 100}
    assert len(cache.begin_pass(5, weights="bb")) == 100  # nor are they taken for new


def test_a_share_is_of_the_samples(cache):
    with pytest.raises(ValueError, match=r"count must be in 0\.\.100, the samples, got 101"):
        cache.stalest(101, epoch=1)
    with pytest.raises(IndexError, match="got 100"):
        cache.begin_pass(1, ids=[100])


def test_write_and_end_need_their_pass(cache):
    with pytest.raises(CacheError, match=r"write\(epoch=2\): the pass under way .* is none"):
        cache.write([0], maps_of([0]), epoch=2)
    cache.begin_pass(1)
    with pytest.raises(CacheError, match=r"is that of epoch 1; call begin_pass\(2\)"):
        cache.write([0], maps_of([0]), epoch=2)
    with pytest.raises(CacheError, match=r"end_pass\(2\): no such pass is under way"):
        cache.end_pass(2)
    cache.write([0, 2], maps_of([0, 2]), epoch=1)
    with pytest.raises(CacheError, match=r"98 of 100 maps are missing \(the first: sample 1\)"):
        cache.end_pass(1)
    assert cache.meta.epoch is None


def test_neighbors(cache):
    assert cache.read_neighbors() is None
    for table in (np.array([[1, 2], [2, 0], [0, 1]], np.uint16), np.array([[0]], np.uint16)):
        cache.write_neighbors(table)
        np.testing.assert_array_equal(cache.read_neighbors(), table)
    fill(cache, 0)
    assert cache.read_neighbors().tolist() == [[0]]
    assert cache.meta.epoch == 0
    with pytest.raises(ValueError, match=r"uint16 \[K, m\], got int64 \[2\]"):
        cache.write_neighbors(np.array([1, 0]))
    with pytest.raises(ValueError, match=r"classes 0\.\.1 \(it has K rows\), got 2"):
        cache.write_neighbors(np.array([[1], [2]], np.uint16))
    spoil(cache, b"neighbors", b"123")
    with pytest.raises(CacheError, match=r"neighbors has 3 bytes, its shape is \(1, 1\)"):
        cache.read_neighbors()


def test_resident_copy(cache):
    fill(cache, 0)
    resident = cache.resident()
    ids = [7, 99, 7]
    maps, found = resident.read(ids)
    np.testing.assert_array_equal(maps, cache.read(ids)[0])
    assert found.all()
    assert resident.maps.shape == (100, 7, 7)
    with pytest.raises(ValueError, match="read-only"):
        resident.maps[0] = 1
    cache.begin_pass(1)
    cache.write(range(100), maps_of(range(100), 1), epoch=1)
    assert not resident.stale()
    cache.end_pass(1)
    assert resident.stale()
    np.testing.assert_array_equal(resident.maps, maps_of(range(100), 0))
    resident.refresh()
    assert not resident.stale()
    np.testing.assert_array_equal(resident.maps, maps_of(range(100), 1))


def test_a_resident_reader_sees_what_a_lookup_sees(cache):
    """Before, during and after passes of this object, of another, and of another process."""
    resident, ids = ResidentCache(cache), np.arange(100)

    def same():
        for mine, looked_up in zip(resident.read(ids), cache.read(ids), strict=True):
            np.testing.assert_array_equal(mine, looked_up)
        return resident._copy

    assert same() is None  # no pass yet: there is nothing to keep
    cache.begin_pass(1)
    cache.write(ids[:40], maps_of(ids[:40], 1), epoch=1)
    assert same() is None
    cache.write(ids[40:], maps_of(ids[40:], 1), epoch=1)
    cache.end_pass(1)
    first = same()
    assert first is same()  # one copy for all batches
    cache.begin_pass(2, ids=ids[:50])
    for k in (0, 1):
        cache.write(ids[k::2][:25], maps_of(ids[k::2][:25], 2), epoch=2)
        assert same() is first
    cache.end_pass(2)
    second = same()
    assert second is not first
    cache._environment().disclaim()  # so that another process may write
    in_process(
        """
        with SaliencyCache(path, index=FakeIndex()) as cache:
            cache.begin_pass(3)
            cache.write(range(100), maps_of(range(100), 3), epoch=3)
            cache.end_pass(3)
        """,
        cache.path,
    )
    third = same()
    np.testing.assert_array_equal(third.maps, maps_of(ids, 3))
    # Maps that a pass withdraws and does not make anew, as it was killed.
    cache.begin_pass(3, weights="other", ids=ids[:10])
    cache.write(ids[:3], maps_of(ids[:3], 4), epoch=3)
    assert same() is third
    assert resident.read(ids)[1].sum() == 3


def test_a_resident_reader_follows_a_cache_that_was_made_anew(cache):
    fill(cache, 1, salt=1)
    resident, ids = ResidentCache(cache), np.arange(100)
    np.testing.assert_array_equal(resident.read(ids)[0], maps_of(ids, 1))
    os.rename(cache.path, cache.path + ".old")
    np.testing.assert_array_equal(resident.read(ids)[0], cache.read(ids)[0])
    with SaliencyCache.create(cache.path, FakeIndex(), grid=GRID, naming=cache.meta.naming) as anew:
        fill(anew, 1, salt=5, weights="bb")
        np.testing.assert_array_equal(cache.read(ids)[0], maps_of(ids, 5))
        np.testing.assert_array_equal(resident.read(ids)[0], maps_of(ids, 5))
    cache.close()
    with pytest.raises(CacheError, match="is closed"):
        resident.read(ids)


def test_chunk_writer_commits_in_chunks_and_loses_nothing_on_error(cache):
    committed = []

    def fails() -> None:
        with ChunkWriter(cache, 0, commit_every=20) as writer:
            for ids in np.split(writer.pending, 20)[:9]:
                writer.write(ids, maps_of(ids))
                committed.append(sum(cache.census()[0].values()))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fails()
    # The last chunk that is due may still be under way.
    for count, due in zip(committed, [0, 0, 0, 20, 20, 20, 20, 40, 40], strict=True):
        assert count in (due, max(due - 20, 0))
    assert cache.census() == ({0: 45}, 0)
    assert len(cache.begin_pass(0)) == 55
    fill(cache, 0)
    np.testing.assert_array_equal(cache.read(range(100))[0], maps_of(range(100)))


def test_chunk_writer_demands_a_whole_pass(cache):
    with pytest.raises(CacheError, match="95 of 100 maps are missing"), ChunkWriter(cache, 0) as w:
        w.write(w.pending[:5], maps_of(w.pending[:5]))
    assert cache.census() == ({0: 5}, 0)
    with pytest.raises(ValueError, match="commit_every must be at least 1 record, got 0"):
        ChunkWriter(cache, 0, commit_every=0)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (b"{", "corrupt meta record"),
        (b"\xff\xfe", "corrupt meta record"),
        (b"[]", "corrupt meta record"),
        (b'{"format": 1}', "corrupt meta record"),
        (b'{"format": 1, "grid": [7], "samples": 1}', "corrupt meta record"),
        (b'{"format": 2}', "is of format 2, this version of scae-dali reads format 1; use the"),
    ],
)
def test_malformed_meta(path, meta, message):
    with SaliencyCache.create(path, FakeIndex(), grid=GRID) as cache:
        spoil(cache, b"meta", meta)
    with pytest.raises(CacheError, match=message):
        SaliencyCache(path)


def test_meta_is_plain_json(cache):
    cache.close()
    with lmdb.open(cache.path, readonly=True) as env, env.begin() as txn:
        blob = txn.get(b"meta")
    assert json.loads(blob)["grid"] == [7, 7]
    assert json.loads(blob)["format"] == 1


def test_a_cache_named_by_index_keeps_nothing_per_sample(path):
    """At 10^8 samples a table of their keys is 0.8 GB."""
    index = FakeIndex(200_000)
    fill(SaliencyCache.create(path, index, grid=GRID), 0, ids=[5]).close()
    tracemalloc.start()
    with SaliencyCache(path, index=index) as cache:
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert cache.read([5])[1].all()
    assert held < len(index)
    assert peak < len(index)


def test_records_beyond_the_index_are_passed_over(cache):
    fill(cache, 0)
    strange = next(key for key in range(100, 300) if key not in FakeIndex().keys("path"))
    spoil(cache, strange.to_bytes(8, "big"), b"\0\0" + bytes(49))
    assert set(cache.stamps()) == {0}
    np.testing.assert_array_equal(cache.resident().maps, maps_of(range(100), 0))


def test_refuses_a_cache_of_something_else(path):
    SaliencyCache.create(path, FakeIndex(), grid=GRID).close()
    other = FakeIndex(samples=90, fingerprint="ee" * 16)
    with pytest.raises(
        CacheError,
        match=r"another data set: 100 samples, fingerprint 00ff00ff00ff00ff; the index has 90 and "
        "eeeeeeeeeeeeeeee.*new cache",
    ):
        SaliencyCache(path, index=other)
    with pytest.raises(CacheError, match=r"has grid \(7, 7\), not \(14, 14\); build a new cache"):
        SaliencyCache(path, index=FakeIndex(), grid=(14, 14))
    with pytest.raises(CacheError, match="names its samples by 'index', not by 'path'"):
        SaliencyCache.create(path, FakeIndex(), grid=GRID, naming="path", exist_ok=True)
    naming = SaliencyCache.create(path, FakeIndex(), grid=GRID, exist_ok=True).meta.naming
    assert naming == "index"
    with SaliencyCache.create(path, FakeIndex(), grid=GRID, exist_ok=True) as cache:
        assert cache.meta.samples == 100


def test_paths_that_hold_no_cache(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "data.mdb").write_bytes(b"x" * 9000)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    lmdb.open(str(tmp_path / "foreign")).close()
    for name, message in {
        "absent": "the directory does not exist; build one",
        "file": "a file is there",
        "empty": "the directory holds no data.mdb",
        "garbage": r"is damaged: data\.mdb is no LMDB file, .*: b'xxx",
        "foreign": "no saliency cache: it has no meta record",
    }.items():
        with pytest.raises(CacheError, match=message):
            SaliencyCache(tmp_path / name)
    assert not os.listdir(tmp_path / "empty")
    for name in ("file", "photos", "garbage"):
        with pytest.raises(CacheError, match="something is there; open it with"):
            SaliencyCache.create(tmp_path / name, FakeIndex(), grid=GRID)
    with pytest.raises(CacheError, match=r"no saliency cache: it holds 'cat\.jpg'"):
        SaliencyCache.create(tmp_path / "photos", FakeIndex(), grid=GRID, exist_ok=True)
    SaliencyCache.create(tmp_path / "empty", FakeIndex(), grid=GRID).close()


@pytest.mark.parametrize("grid", [(0, 7), (7,), (7.0, 7)])
def test_malformed_grid(path, grid):
    with pytest.raises(ValueError, match="positive integers"):
        SaliencyCache.create(path, FakeIndex(), grid=grid)


def test_keys_must_be_unique(path):
    class Twins(FakeIndex):
        def keys(self, naming):
            return np.minimum(np.arange(len(self), dtype=np.uint64), 98)

    with pytest.raises(CacheError, match="samples 98 and 99 have the same path key"):
        SaliencyCache.create(path, Twins(), grid=GRID, naming="path")


def test_without_an_index(cache):
    fill(cache, 2)
    bare = SaliencyCache(cache.path)
    assert bare.census() == ({2: 100}, 0)
    if cache.meta.naming == "index":
        np.testing.assert_array_equal(bare.read([3])[0], maps_of([3], 2))
    else:
        with pytest.raises(CacheError, match=r"names its samples by path.*pass index"):
            bare.read([3])


def test_objects_of_one_path_share_one_environment(cache, tmp_path):
    os.symlink(cache.path, tmp_path / "link")
    with SaliencyCache(tmp_path / "link", index=FakeIndex()) as second:
        assert second._environment() is cache._environment()
        fill(cache, 0)
        assert second.read([1])[1].all()
    assert cache.read([1])[1].all()
    with pytest.raises(CacheError, match=r"is closed; open it again"):
        second.read([1])


def test_a_cache_made_anew_at_the_same_path(path):
    old = fill(SaliencyCache.create(path, FakeIndex(), grid=GRID), 0)
    shutil.rmtree(path)
    with SaliencyCache.create(path, FakeIndex(50), grid=(3, 3)) as new:
        assert new.census() == ({}, 0)
        assert new.meta.samples == 50
    old.close()


@pytest.mark.parametrize("naming", ["index", "path"])
def test_bytes_a_record(path, naming):
    """Whole pages although meta and neighbors sort behind or between the records."""
    index = FakeIndex(20_000)
    with SaliencyCache.create(path, index, grid=GRID, naming=naming) as cache:
        cache.write_neighbors(np.zeros((1000, 5), np.uint16))
        for epoch in range(3):
            with ChunkWriter(cache, epoch, commit_every=1000) as writer:
                for ids in np.array_split(writer.pending, 40):
                    writer.write(ids, maps_of(ids, epoch))
            # 70 B a record and its pointer, 58 a page; then what a few commits copied of old pages.
            assert cache.size_bytes / len(index) < (80 if epoch == 0 else 86)
        assert cache.census() == ({2: 20_000}, 0)


def test_a_restarted_pass_does_not_unpack_the_pages(path):
    index = FakeIndex(20_000)
    with SaliencyCache.create(path, index, grid=GRID) as cache:
        fill(cache, 0, weights="a")
        before = cache.size_bytes
        fill(cache, 0, weights="b", salt=1)
        assert cache.size_bytes < before + (2 << 20)
        np.testing.assert_array_equal(cache.read([19_999])[0], maps_of([19_999], 1))


def test_the_map_grows_by_itself(path, monkeypatch):
    monkeypatch.setattr(environment, "INITIAL_MAP_SIZE", 1 << 16)
    index = FakeIndex(20_000)
    with SaliencyCache.create(path, index, grid=GRID) as cache:
        seen, stop = [], threading.Event()

        def read() -> None:
            while not stop.is_set():
                seen.append(int(cache.read(range(0, 20_000, 500))[1].sum()))

        reader = threading.Thread(target=read)
        reader.start()
        try:
            fill(cache, 0)
        finally:
            stop.set()
            reader.join()
        assert cache.size_bytes > 1 << 20
        np.testing.assert_array_equal(cache.read([0, 19_999])[0], maps_of([0, 19_999], 0))
        assert seen == sorted(seen)


def test_another_process_grows_the_map(path, monkeypatch):
    monkeypatch.setattr(environment, "INITIAL_MAP_SIZE", 1 << 16)
    with SaliencyCache.create(path, FakeIndex(20_000), grid=GRID) as cache:
        assert not cache.read([7])[1].any()
        in_process("fill(SaliencyCache(path, index=FakeIndex(20_000)), 4)", path)
        np.testing.assert_array_equal(cache.read([7])[0], maps_of([7], 4))
        assert cache.meta.epoch == 4
        in_process("fill(SaliencyCache(path, index=FakeIndex(20_000)), 5)", path)
        fill(cache, 6)
        np.testing.assert_array_equal(cache.stamps(), np.full(20_000, 6))


def test_a_batch_is_of_one_pass_while_another_thread_writes(path):
    """Every commit rewrites all samples, so a batch that mixes two passes was no snapshot."""
    ids = np.arange(100)
    with SaliencyCache.create(path, FakeIndex(), grid=GRID) as cache:
        fill(cache, 0)
        failures, stop = [], threading.Event()

        def read() -> None:
            while not stop.is_set():
                maps = cache.read(ids)[0].astype(int)
                if len({int(x) for x in (maps[:, 0, 0] - 3 * ids) % 256}) != 1:
                    failures.append(maps)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        try:
            for epoch in range(1, 40):
                cache.begin_pass(epoch)
                cache.write(ids, maps_of(ids, epoch), epoch=epoch)
                cache.end_pass(epoch)
        finally:
            stop.set()
            for reader in readers:
                reader.join()
        assert not failures


def test_processes_that_fork(path):
    """Parent and child read and write after a fork amid the parent's reads in another thread."""
    SaliencyCache.create(path, FakeIndex(), grid=GRID).close()
    in_process(
        """
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        cache = fill(SaliencyCache(path, index=FakeIndex()), 0)
        stop = threading.Event()
        def read():
            while not stop.is_set():
                assert cache.read(range(100))[1].all()
        thread = threading.Thread(target=read)
        thread.start()
        for epoch in range(1, 6):
            pid = os.fork()
            if pid == 0:
                try:
                    assert cache.meta.epoch == epoch - 1, cache.meta
                    fill(cache, epoch)
                    os._exit(0)
                except BaseException as error:
                    print(repr(error), file=sys.stderr, flush=True)
                    os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert (cache.read([5])[0] == maps_of([5], epoch)).all()
        stop.set()
        thread.join()
        fill(cache, 9)
        """,
        path,
    )
    with SaliencyCache(path, index=FakeIndex()) as cache:
        assert set(cache.stamps()) == {9}


def test_a_fork_comes_before_looks_that_begin_later(path):
    """Four threads that look without a pause held a fork up for seconds. A look within another one
    waits for a fork that waits for it, and not for ever."""
    SaliencyCache.create(path, FakeIndex(), grid=GRID).close()
    in_process(
        """
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        import scae_dali.cache.environment
        scae_dali.cache.environment.PATIENCE = 0.2
        cache = fill(SaliencyCache(path, index=FakeIndex()), 0)
        def fork():
            began = time.monotonic()
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
            return time.monotonic() - began
        stop = threading.Event()
        def read():
            while not stop.is_set():
                assert cache.read(range(100))[1].all()
        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        took = sum(fork() for _ in range(10))
        stop.set()
        for thread in threads:
            thread.join()
        assert took < 4, took
        inside = threading.Event()
        def nested(txn):
            inside.set()
            time.sleep(0.3)
            return cache.read([5])[1].all()
        seen = []
        thread = threading.Thread(target=lambda: seen.append(cache._environment().view(nested)))
        thread.start()
        inside.wait()
        took = fork()
        thread.join(10)
        assert seen == [True], seen
        assert 0.1 < took < 4, took
        """,
        path,
    )


def test_a_killed_pass_resumes(path):
    index = FakeIndex(5000)
    fill(SaliencyCache.create(path, index, grid=GRID), 0).close()
    done = in_process(
        """
        import signal
        with ChunkWriter(SaliencyCache(path, index=FakeIndex(5000)), 1, commit_every=500) as w:
            for n, ids in enumerate(np.split(w.pending, 50)):
                w.write(ids, maps_of(ids, 1))
                if n == 32:
                    os.kill(os.getpid(), signal.SIGKILL)
        """,
        path,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    with SaliencyCache(path, index=index) as cache:
        assert (cache.meta.under_way or {})["epoch"] == 1
        assert cache.meta.epoch == 0
        pending = cache.begin_pass(1)
        first = int(pending[0])
        assert first in (2500, 3000)  # the last chunk may have been under way
        np.testing.assert_array_equal(pending, np.arange(first, 5000))
        maps, found = cache.read([first - 1, first])
        assert found.all()
        np.testing.assert_array_equal(maps[:1], maps_of([first - 1], 1))
        np.testing.assert_array_equal(maps[1:], maps_of([first], 0))
        fill(cache, 1)
        np.testing.assert_array_equal(cache.read(range(5000))[0], maps_of(range(5000), 1))


def test_a_full_disk_keeps_what_was_committed(path):
    """The limit on the file's size stands for the full disk; LMDB meets both in the same write."""
    done = in_process(
        """
        import resource
        cache = SaliencyCache.create(path, FakeIndex(20_000), grid=GRID)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, resource.RLIM_INFINITY))
        try:
            fill(cache, 1)
        except OSError as error:
            assert error.filename == os.path.realpath(path), error.filename
            print(error)
        else:
            sys.exit("no error")
        held = len(cache.begin_pass(1))
        assert 0 < held < 20_000, held
        done = np.flatnonzero(cache.stamps() == 1)
        assert (cache.read(done)[0] == maps_of(done, 1)).all()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        fill(cache, 1)  # the same object goes on once there is room
        print(held)
        """,
        path,
    )
    message, held = done.stdout.splitlines()
    assert "all that was committed before is kept; make room for about 1," in message
    assert path in message
    assert int(held) < 20_000
    with SaliencyCache(path, index=FakeIndex(20_000)) as cache:
        np.testing.assert_array_equal(cache.read(range(20_000))[0], maps_of(range(20_000), 1))


def test_a_read_only_directory():
    """As another user where this one is root, whom permissions don't stop."""
    root = Path(tempfile.mkdtemp())
    try:
        path = root / "maps.lmdb"
        fill(SaliencyCache.create(path, FakeIndex(), grid=GRID), 0).close()
        os.chmod(root, 0o755)
        for file in path.iterdir():
            os.chmod(file, 0o444)
        os.chmod(path, 0o555)
        code = """
            if os.geteuid() == 0:
                os.setuid(65534)
            import warnings
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # it is read from memory
                cache = SaliencyCache(path, index=FakeIndex())
            assert (cache.read([4, 5])[0] == maps_of([4, 5], 0)).all()
            assert cache.resident().found.all()
            try:
                cache.begin_pass(1)
            except PermissionError as error:
                print(error)
        """
        assert "is read-only here; give this user write permission" in in_process(code, path).stdout
    finally:
        os.chmod(path, 0o755)
        shutil.rmtree(root)


def test_several_processes_create_one_cache(path):
    code = "SaliencyCache.create(path, FakeIndex(), grid=GRID, exist_ok=True).read([0])"
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(in_process(code, path, check=False)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(done.returncode, done.stderr) for done in results] == [(0, "")] * 3


def test_a_copy_is_the_cache_of_that_moment(cache, tmp_path):
    fill(cache, 3)
    cache.write_neighbors(np.array([[1], [0], [1]], np.uint16))
    ids = cache.begin_pass(4)[:25]
    cache.write(ids, maps_of(ids, 4), epoch=4)
    cache.copy(tmp_path / "copy.lmdb")
    with SaliencyCache(tmp_path / "copy.lmdb", index=FakeIndex()) as copy:
        assert copy.meta == cache.meta
        np.testing.assert_array_equal(copy.stamps(), cache.stamps())
        np.testing.assert_array_equal(copy.read(range(100))[0], cache.read(range(100))[0])
        np.testing.assert_array_equal(copy.read_neighbors(), cache.read_neighbors())
        fill(copy, 4)  # the pass goes on there
    assert cache.census()[0] == {3: 75, 4: 25}
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "copy.lmdb").stat().st_mode & 0o777 == 0o777 & ~umask
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.lmdb", "maps.lmdb"]


def test_a_copy_replaces_nothing(cache, tmp_path):
    for name in ("file", "folder"):
        (tmp_path / name).touch() if name == "file" else (tmp_path / name).mkdir()
        with pytest.raises(
            CacheError, match=rf"something is at '.*{name}' already; choose another"
        ):
            cache.copy(tmp_path / name)
    with pytest.raises(CacheError, match="something is at"):
        cache.copy(cache.path)


def test_a_copy_has_no_free_pages(path, tmp_path):
    with SaliencyCache.create(path, FakeIndex(20_000), grid=GRID) as cache:
        for epoch in range(3):
            fill(cache, epoch)
        cache.copy(tmp_path / "copy")
        assert os.path.getsize(tmp_path / "copy" / "data.mdb") < 0.98 * cache.size_bytes


def test_a_cache_is_copied_while_another_process_writes_to_it(path, tmp_path):
    """Every commit of that process rewrites all maps, and grows the file now and then."""
    SaliencyCache.create(path, FakeIndex(3000), grid=GRID).close()
    writer = threading.Thread(
        target=in_process,
        args=(
            """
            cache = SaliencyCache(path, index=FakeIndex(3000))
            ids = np.arange(3000)
            for epoch in range(1, 60):
                cache.begin_pass(epoch)
                cache.write(ids, maps_of(ids, epoch), epoch=epoch)
                cache.end_pass(epoch)
            """,
            path,
        ),
    )
    with SaliencyCache(path, index=FakeIndex(3000)) as cache:
        writer.start()
        seen = set()
        while writer.is_alive():
            place = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
            cache.copy(place)
            with SaliencyCache(place, index=FakeIndex(3000)) as copy:
                ages = copy.census()[0]
                assert len(ages) <= 1  # of one moment
                for epoch in ages:
                    seen.add(epoch)
                    np.testing.assert_array_equal(
                        copy.read(range(3000))[0], maps_of(range(3000), epoch)
                    )
        writer.join()
    assert len(seen) > 1


def test_a_copy_that_does_not_fit_leaves_nothing(path):
    done = in_process(
        """
        import resource
        cache = fill(SaliencyCache.create(path, FakeIndex(20_000), grid=GRID), 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, resource.RLIM_INFINITY))
        try:
            cache.copy(path + ".copy")
        except OSError as error:
            print(error, os.listdir(os.path.dirname(path)))
        """,
        path,
    )
    assert "the copy was not made (mdb_env_copy" in done.stdout
    assert done.stdout.endswith("['maps.lmdb']\n")


def test_inspection(cache):
    fill(cache, 3)
    ids = cache.begin_pass(4)[:25]
    cache.write(ids, maps_of(ids), epoch=4)
    spoil(cache, int(FakeIndex().keys(cache.meta.naming)[ids[0]]).to_bytes(8, "big"), b"")
    tool = str(Path(__file__).parents[3] / "tools" / "inspect_cache.py")
    code = (
        f"import runpy; sys.argv[1:] = [path, {{}}]; runpy.run_path({tool!r}, run_name='__main__')"
    )
    facts = json.loads(in_process(code.format("'--json'"), cache.path).stdout)
    assert facts["meta"]["under_way"]["epoch"] == 4
    del facts["meta"]
    assert facts == {
        "path": cache.path,
        "samples": 100,
        "found": 99,
        "coverage": 0.99,
        "flat": 0,
        "malformed": 1,
        "ages": {"3": 75, "4": 24},
        "bytes": cache.size_bytes,
    }
    text = in_process(code.format(""), cache.path).stdout
    assert "99 of 100 (99.00%)" in text
    assert "    3           75  ####" in text
    done = in_process(code.format(""), cache.path + "x", check=False)
    assert done.returncode == 1
    assert "error: no saliency cache at" in done.stderr
