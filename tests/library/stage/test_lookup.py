"""Maps that a stage looks up: in a cache, or in one that is made while the stage is at work."""

import numpy as np
import pytest

from scae_dali.cache import CacheError, SaliencyCache
from scae_dali.methods import Status
from scae_dali.saliency.stage import SCAE, Stage

SIZE = (32, 32)


def plan(one, index, epoch):
    """Status and boxes of all samples, int64 [N] and float64 [N, 4]."""
    ids = np.arange(len(index))
    planner = one.planner()
    rows = planner(ids, None, np.tile(SIZE, (len(ids), 1)), epoch=np.full(len(ids), epoch))
    return rows[:, planner.columns["status"].start].astype(int), rows[:, planner.columns["box"]]


def make(index, cache, **keywords):
    settings = {"epochs": 4, "batch_size": 10, "seed": 3, "p_min": 1.0, "p_max": 1.0}
    settings["refresh_every"] = 2
    return SCAE(index, cache, **settings | keywords)


@pytest.mark.parametrize("resident", [True, False])
def test_a_cache_that_is_made_later_guides_from_then_on(index, cache, tmp_path, resident):
    path = tmp_path / "later.lmdb"
    one, ready = make(index, path, resident=resident), make(index, cache)
    status, boxes = plan(one, index, 3)
    assert (status[status & Status.ERASED > 0] & Status.NO_MAP > 0).all()
    with SaliencyCache.create(path, index, grid=cache.meta.grid) as later:
        ids = later.begin_pass(2)
        later.write(ids, cache.read(ids)[0], epoch=2)
        later.end_pass(2)
        assert (plan(one, index, 3)[1] == boxes).all()  # not attached yet
        one.attach(later)
        status, boxes = plan(one, index, 3)
        wanted, same = plan(ready, index, 3)
    assert not (status & Status.NO_MAP).any()
    np.testing.assert_array_equal(status, wanted)
    np.testing.assert_array_equal(boxes, same)


def test_a_stage_without_a_cache_has_nothing_to_attach(index, cache):
    one = Stage(index, "random_erasing", epochs=4, batch_size=10, seed=3)
    with pytest.raises(ValueError, match="cache must be given to the stage for maps"):
        one.attach(cache)


@pytest.mark.parametrize("counted", [True, False])
def test_a_cache_that_nobody_makes_is_told_once_its_pass_is_past(index, tmp_path, counted):
    """Five batches an epoch: those of 13 epochs may be prepared before the pass of the second."""
    settings = {"epochs": 40, "batch_size": 10, "seed": 3, "refresh_every": 2}
    one = SCAE(index, tmp_path / "nowhere.lmdb", **settings)
    planner, ids = one.planner(), np.arange(10)
    size = np.tile(SIZE, (10, 1))
    message = r"no saliency cache at '.*nowhere.lmdb' in epoch 15, although .* due before epoch 2"
    if counted:
        planner(ids, np.full(10, 74), size)
        with pytest.raises(CacheError, match=message):
            planner(ids, np.full(10, 75), size)
    else:
        planner(ids, None, size, epoch=np.full(10, 14))
        with pytest.raises(CacheError, match=message):
            planner(ids, None, size, epoch=np.full(10, 15))


def test_a_cache_that_no_pass_will_make_must_be_there(index, tmp_path):
    settings = {"epochs": 5, "batch_size": 10, "seed": 3}
    for refresh_every in (0, 5):
        with pytest.raises(CacheError, match=r"no saliency cache at .*nowhere.* be less"):
            SCAE(index, tmp_path / "nowhere", refresh_every=refresh_every, **settings)
    SCAE(index, tmp_path / "nowhere", refresh_every=4, **settings)
