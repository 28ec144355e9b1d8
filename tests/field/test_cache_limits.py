"""Numbers that do not fit what a cache keeps of them are refused before anything is made.

Neighbours of more than 65,536 classes wrapped to other classes, and a run of 70,000 epochs was
accepted and died at its first pass beyond epoch 65,535. The kind is that of
https://github.com/brainglobe/cellfinder/pull/574, where labels in 16 bits wrapped without a word.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from caches import FakeIndex
from passes import Net, batches

from pipelines.data import DataConfig
from pipelines.maps import Maps
from pipelines.recipe import Config
from scae_dali.cache import SaliencyCache
from scae_dali.cache.format import check_last_pass, check_neighbors
from scae_dali.data.index import ImageIndex
from scae_dali.plan import schedule
from scae_dali.saliency.refresh import refresh_cache
from scae_dali.saliency.weights import nearest_classes

MANY = r"neighbors must be 0 where there are more than 65,536 classes .*neighbors=2 and 70,001"


def asked(ids):
    raise AssertionError("nothing may be read")


def index_of(classes):
    """One sample of the first class, of so many."""
    return SimpleNamespace(
        num_classes=classes, fingerprint="ab", labels=np.zeros(1, np.int64), __len__=lambda: 1
    )


def test_neighbours_of_more_classes_than_16_bits_name_are_refused():
    with pytest.raises(ValueError, match=MANY):
        refresh_cache(Net(), None, index_of(70_001), asked, epoch=1, layer="features", neighbors=2)
    with pytest.raises(ValueError, match=MANY):
        # Of no memory: what is refused is not computed.
        nearest_classes(torch.empty(70_001, 2, device="meta"), np.ones(70_001), 2)
    check_neighbors(0, 70_001)  # the remedy
    check_neighbors(2, 65_536)


def test_a_table_of_more_classes_is_not_written(tmp_path):
    with SaliencyCache.create(tmp_path / "maps.lmdb", FakeIndex(), grid=(2, 2)) as cache:
        with pytest.raises(ValueError, match=r"of at most 65536 classes .* got 65537"):
            cache.write_neighbors(np.zeros((65_537, 1), np.uint16))
        table = np.arange(65_536, dtype=np.uint16)[::-1, None]
        cache.write_neighbors(table)
        np.testing.assert_array_equal(cache.read_neighbors(), table)


@pytest.mark.parametrize(
    ("epochs", "refresh_every", "most"),
    [(70_000, 10, 65_540), (65_541, 10, 65_540), (65_537, 1, 65_536), (131_100, 65_536, 65_536)],
)
def test_a_run_whose_last_pass_no_map_can_carry_is_refused(epochs, refresh_every, most):
    with pytest.raises(ValueError, match=rf"epochs must be at most {most} with refresh_every="):
        check_last_pass(epochs, refresh_every)
    check_last_pass(most, refresh_every)  # the remedies
    check_last_pass(epochs, 0)
    last = schedule.pass_epoch(most - 1, refresh_every)
    assert last is None or last <= 65_535 < last + refresh_every


@pytest.mark.parametrize(
    ("epochs", "classes", "told"), [(70_000, 2, "epochs must be at most"), (6, 70_001, MANY)]
)
def test_training_does_not_begin(tmp_path, epochs, classes, told):
    config = Config(data=DataConfig(root="x"), out=str(tmp_path / "out"), epochs=epochs)
    guided = SimpleNamespace(refresh_every=2, guided=True, neighbors=2)
    ranks = SimpleNamespace(first=True)
    with pytest.raises(ValueError, match=told):
        Maps(config, guided, Net(), index_of(classes), None, ranks, neighbors=2)
    assert not (tmp_path / "out").exists()
    if classes > 2:  # who asks for no neighbours is let on, to the next thing that is missing here
        with pytest.raises(AttributeError, match="gather"):
            Maps(config, guided, Net(), index_of(classes), None, ranks)


@pytest.mark.parametrize("epoch", [-1, 65_536, 70_000])
def test_an_epoch_that_no_map_can_carry_is_refused_before_any_work(build, epoch, capsys):
    with pytest.raises(SystemExit):
        build(data="nowhere", model="nothing", out="nowhere.lmdb", epoch=epoch)
    assert f"--epoch must be in 0..65535, got {epoch}" in capsys.readouterr().err
    with pytest.raises(ValueError, match=rf"0\.\.65535 .* got {epoch}"):
        refresh_cache(Net(), None, index_of(2), asked, epoch=epoch, layer="features")


def test_build_cache_of_many_classes_names_the_option(build, tmp_path, monkeypatch):
    from scae_dali.commands import build_cache

    index = ImageIndex.from_arrays(["a"], np.zeros(1, np.int64), classes=range(70_001))
    monkeypatch.setattr(build_cache, "open_images", lambda arguments: index)
    monkeypatch.setattr(build_cache, "load_model", lambda *_: Net())
    monkeypatch.setattr(build_cache, "classifier_of", lambda *_: None)
    with pytest.raises(SystemExit, match=MANY):
        build(data="x", model="x", out=tmp_path / "maps.lmdb", neighbors=2)
    assert not (tmp_path / "maps.lmdb").exists()


@pytest.mark.parametrize("value", [1.01, -0.5, float("nan"), float("inf")])
def test_maps_that_levels_of_8_bits_do_not_hold_are_refused(fresh, index, value):
    """They wrapped: 1.01 became 2 of 255."""

    class Mine:
        method, layer = "mine", "features"

        def __init__(self, model, layer):
            self.model = model

        def __call__(self, images, labels):
            maps = torch.eye(7).repeat(len(images), 1, 1)
            maps[labels == 1, 3, 3] = value
            return maps

    loader_for = batches(index, size=28)
    with pytest.raises(ValueError, match=r"method 'mine' must give maps in \[0, 1\]"):
        refresh_cache(Net(), fresh, index, loader_for, epoch=1, method=Mine)
    assert fresh.census() == ({}, 0)
    value = 1.0
    assert refresh_cache(Net(), fresh, index, loader_for, epoch=1, method=Mine).images == 50


@pytest.mark.parametrize("grid", [(1 << 16, 1 << 15), (1, 1 << 40)])
def test_a_grid_that_no_record_holds_leaves_no_cache_behind(tmp_path, grid):
    with pytest.raises(ValueError, match=r"grid must have fewer than 2\^31 cells, got"):
        SaliencyCache.create(tmp_path / "maps.lmdb", FakeIndex(), grid=grid)
    assert not (tmp_path / "maps.lmdb").exists()
