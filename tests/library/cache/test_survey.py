"""Means by class and the maps that stand out: against a whole copy in memory."""

import numpy as np
import pytest
from caches import FakeIndex

from scae_dali.cache import SaliencyCache
from scae_dali.cache.survey import focus, survey


def test_focus():
    maps = np.zeros((4, 2, 2), np.uint8)
    maps[0, 1, 0] = 7
    maps[1] = 9
    maps[2, 0] = 200
    assert focus(maps)[:3] == pytest.approx([1, 0, 0.5])  # one cell, all of four, two of four
    assert np.isnan(focus(maps)[3])
    one = np.array([[[3, 1], [0, 0]]], np.uint8)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert focus(one)[0] == pytest.approx(1 - entropy / np.log(4))


@pytest.fixture(params=["index", "path"])
def cache(request, tmp_path):
    """3000 maps, in several of LMDB's blocks, of which 500 are missing and 100 are flat."""
    index = FakeIndex(3000)
    with SaliencyCache.create(tmp_path / "c", index, grid=(2, 3), naming=request.param) as cache:
        maps = np.random.default_rng(0).integers(0, 256, (3000, 2, 3), np.uint8)
        maps[:100] = 8
        cache.begin_pass(1)
        cache.write(np.arange(2500), maps[:2500], epoch=1)
        yield cache


def test_means_of_classes_and_extremes(cache):
    labels = np.arange(3000) % 7
    found = survey(cache, labels, [3, 0, 9], extremes=5)
    maps, has = cache.read(np.arange(3000))
    assert found.counts.tolist() == [((labels == k) & has).sum() for k in (3, 0)] + [0]
    for mean, k in zip(found.means, (3, 0), strict=False):
        np.testing.assert_allclose(mean, maps[(labels == k) & has].mean(0) / 255)
    assert not found.means[2].any()
    np.testing.assert_allclose(found.mean, maps[has].mean(0) / 255)
    values = focus(maps[100:2500])
    order = np.argsort(values, kind="stable")
    assert [one.sample - 100 for one in found.least] == order[:5].tolist()
    assert [one.sample - 100 for one in found.most] == order[:-6:-1].tolist()
    for one in (*found.least, *found.most):
        assert one.focus == pytest.approx(values[one.sample - 100])
        np.testing.assert_array_equal(one.map, maps[one.sample])


def test_without_an_index_maps_are_seen_all_the_same(cache):
    with SaliencyCache(cache.path) as bare:
        found, whole = survey(bare, extremes=3), survey(cache, extremes=3)
    assert [one.focus for one in found.most] == [one.focus for one in whole.most]
    known = cache.meta.naming == "index"
    assert [one.sample >= 0 for one in found.least] == [known] * 3
    np.testing.assert_array_equal(found.mean, whole.mean)


def test_an_empty_cache_and_one_of_flat_maps(tmp_path):
    with SaliencyCache.create(tmp_path / "c", FakeIndex(10), grid=(2, 2)) as cache:
        found = survey(cache, np.zeros(10, np.int64), [0])
        assert (found.counts.tolist(), found.most, found.least) == ([0], [], [])
        assert not found.mean.any()
        blank = np.zeros((10, 2, 2), np.uint8)
        cache.begin_pass(0)
        cache.write(range(10), blank, epoch=0)
        assert survey(cache).most == []


def test_maps_of_one_cell_are_flat(tmp_path):
    with SaliencyCache.create(tmp_path / "c", FakeIndex(10), grid=(1, 1)) as cache:
        cache.begin_pass(0)
        cache.write(range(10), np.ones((10, 1, 1), np.uint8), epoch=0)
        assert survey(cache).least == []
