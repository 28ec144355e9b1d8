"""Maps without any contrast guide nothing: they are counted and told, and so are missing ones.

Every map of a layer behind a network's last attention was zero, and the tools said that nine maps
of nine were there. The kind is that of https://github.com/jacobgil/pytorch-grad-cam/issues/539,
where a map drops to zero behind an attention's last layer.
"""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from caches import GRID, FakeIndex, maps_of, spoil
from conftest import write_pngs
from passes import Here, Net, batches

from pipelines.data import DataConfig
from pipelines.maps import Maps
from pipelines.recipe import Config, SaliencyConfig
from scae_dali.cache import SaliencyCache
from scae_dali.cache.format import flat
from scae_dali.commands import inspect_cache
from scae_dali.data.index import ImageIndex
from scae_dali.saliency.harvest import Harvest
from scae_dali.saliency.refresh import refresh_cache
from scae_dali.training.networks import make_network


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "maps.lmdb")


@pytest.fixture(params=["index", "path"])
def cache(request, path):
    with SaliencyCache.create(path, FakeIndex(), grid=GRID, naming=request.param) as cache:
        yield cache


def partly(blank):
    """A method whose maps of the first `blank` samples are the same everywhere, zero or not."""
    done = 0

    class Method:
        method, layer = "partly", "encoder.last"

        def __init__(self, model, layer):
            self.model = model

        def __call__(self, images, labels):
            nonlocal done
            maps = torch.eye(7).repeat(len(images), 1, 1)
            place = done + torch.arange(len(images))
            maps[place < blank] = 0.5
            maps[place < blank // 2] = 0
            done += len(images)
            return maps

    return Method


def make(cache, index, blank):
    loader_for = batches(index, size=28, batch_size=16)
    return refresh_cache(Net(), cache, index, loader_for, epoch=1, method=partly(blank))


@pytest.mark.parametrize("blank", [26, 50])
def test_a_pass_of_which_more_than_half_is_flat_warns(fresh, index, blank):
    told = rf"{blank} of 50 saliency maps of layer 'encoder.last' are flat .*the last attention"
    with pytest.warns(RuntimeWarning, match=told):
        report = make(fresh, index, blank)
    assert (report.images, report.flat) == (50, blank)
    assert fresh.coverage() == (50, blank)
    assert fresh.meta.epoch == 1  # the pass counts all the same


@pytest.mark.parametrize("blank", [0, 25])
def test_half_of_the_maps_may_be_flat(fresh, index, blank):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make(fresh, index, blank).flat == blank
        assert make(fresh, index, blank).flat == 0  # nothing left to do


def test_harvested_maps_are_counted_too(fresh, index):
    harvest = Harvest(Net(), "features", samples=50, num_classes=3, grid=(7, 7), size=28)
    harvest._counts[:30] = 1.0
    harvest._sums[:10, 0] = 1.0
    with pytest.warns(RuntimeWarning, match="20 of 30 saliency maps of layer 'features' are flat"):
        report = refresh_cache(
            Net(), fresh, index, batches(index), epoch=1, layer="features", share=0, harvest=harvest
        )
    assert (report.harvested, report.flat) == (30, 20)


def test_flat_is_whatever_is_the_same_everywhere():
    maps = maps_of(np.arange(5))
    maps[1], maps[3] = 0, 255
    assert flat(maps).tolist() == [False, True, False, True, False]
    maps[1, 6, 6] = 1
    assert flat(maps).tolist() == [False, False, False, True, False]
    assert flat(maps[:0]).tolist() == []
    assert flat(np.array([[[7]]], np.uint8)).tolist() == [True]


def test_coverage_counts_samples_of_the_index(cache):
    assert cache.coverage() == (0, 0)
    maps = maps_of(np.arange(100))
    maps[[3, 50, 99]] = 9
    cache.begin_pass(1)
    cache.write(np.arange(20, 100), maps[20:], epoch=1)
    strange = next(key for key in range(100, 300) if key not in FakeIndex().keys("path"))
    spoil(cache, strange.to_bytes(8, "big"), b"\0\0" + bytes(49))
    assert cache.coverage() == (80, 2)
    found = cache.coverage()
    assert (found.found, found.flat) == (80, 2)
    with SaliencyCache(cache.path) as bare:
        assert bare.coverage().found == 80 + (cache.meta.naming == "path")


@pytest.mark.parametrize(("blank", "warns"), [(30, False), (51, True)])
def test_inspect_cache_tells_flat_maps(tmp_path, capsys, blank, warns):
    where = str(tmp_path / "maps.lmdb")
    maps = maps_of(np.arange(100))
    maps[:blank] = 0
    with SaliencyCache.create(where, FakeIndex(), grid=GRID) as made:
        made.begin_pass(1)
        made.write(np.arange(100), maps, epoch=1)
    for option in ((), ("--json",)):
        assert inspect_cache.main([where, *option]) == 0
    text, _, facts = capsys.readouterr().out.partition("{\n")
    assert json.loads("{" + facts)["flat"] == blank
    assert f"flat          {blank} (the same everywhere" in text
    assert ("warning: more than half of the maps are flat" in text) == warns


def test_build_cache_tells_flat_maps(build, tmp_path, capsys):
    """Of a network whose features speak against every class."""
    write_pngs(tmp_path / "data", {"a": 3, "b": 2}, (32, 32))
    net = make_network("cifar_resnet20", 2)
    with torch.no_grad():
        net.fc.weight.fill_(-1)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    options = {"data": tmp_path / "data", "out": tmp_path / "maps.lmdb"}
    for said in ("5 maps of 5 in", "is complete already: 5 maps, 5 of them flat"):
        build(**options, model="cifar_resnet20", weights=tmp_path / "w.pt")
        printed = capsys.readouterr()
        assert said in printed.out
        assert "warning: 5 of 5 saliency maps of layer 'layer3' are flat" in printed.err


@pytest.fixture
def offline(tmp_path):
    """The Maps of a run on a cache built offline, with maps of the first samples, some of them
    flat."""
    write_pngs(tmp_path / "data", {"a": 6, "b": 4}, (8, 8))
    index = ImageIndex(tmp_path / "data")

    def make(found, blank, guided=True):
        maps = maps_of(np.arange(10))
        maps[:blank] = 0
        with SaliencyCache.create(tmp_path / "maps.lmdb", index, grid=GRID) as made:
            made.begin_pass(1)
            made.write(np.arange(found), maps[:found], epoch=1)
        config = Config(
            data=DataConfig(root="x"),
            out=str(tmp_path / "out"),
            saliency=SaliencyConfig(cache=str(tmp_path / "maps.lmdb")),
            method="none",
        )
        settings = SimpleNamespace(refresh_every=0, guided=guided)
        return Maps(config, settings, Net(), index, None, Here())

    return make


@pytest.mark.parametrize(
    ("found", "blank", "notes"),
    [
        (10, 0, []),
        (9, 0, ["has maps of 9 of 10 samples; the others are erased uniformly: run `scae-dali"]),
        (7, 2, ["has maps of 7 of 10 samples", "2 of 7 maps in saliency cache"]),
    ],
)
def test_an_offline_cache_says_what_it_lacks(offline, capsys, found, blank, notes):
    maps = offline(found, blank)
    said = capsys.readouterr().err
    assert said.count("note:") == len(notes)
    assert all(note in said for note in notes)
    assert maps.due(5) is None


def test_an_offline_cache_without_maps_is_refused(offline):
    with pytest.raises(
        ValueError, match=r"has no maps, and refresh_every=0 makes none: run `scae-dali"
    ):
        offline(0, 0)


def test_who_wants_neighbours_alone_needs_no_maps(offline, capsys):
    offline(0, 0, guided=False)
    assert capsys.readouterr().err == ""
