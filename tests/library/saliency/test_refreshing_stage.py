"""Stages that make their saliency passes by themselves, from no cache at all."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from cams import Net
from nvidia.dali import fn, pipeline_def
from pairs import in_two

from scae_dali.data.index import ImageIndex
from scae_dali.data.pixels import ArrayImages
from scae_dali.saliency.stage import SCAE, Stage
from scae_dali.saliency.whole import whole_loader
from scae_dali.stage.loader import Loader

SIZE = (32, 32)


def make(index, path, **keywords):
    settings = {"epochs": 6, "batch_size": 10, "seed": 3, "refresh_every": 2, "mix_prob": 0.0}
    return SCAE(index, path, **settings | keywords)


def network(index):
    torch.manual_seed(0)
    return Net(torch.nn.Linear(6, index.num_classes))


def training(one, index):
    @pipeline_def(batch_size=10, num_threads=1, device_id=None)
    def define():
        encoded, ids = fn.readers.file(
            files=list(index.files), file_root=index.root, name="Reader", pad_last_batch=True
        )
        images = fn.resize(fn.decoders.image(encoded), size=SIZE)
        images, targets = one(images, ids, size=SIZE)
        return fn.crop_mirror_normalize(images), ids, *targets

    return Loader(define(), ["images", "id", *one.outputs], index, drop_last=True)


def test_a_loop_begins_without_a_cache_and_makes_the_passes_that_are_due(index, tmp_path):
    one, model = make(index, tmp_path / "maps.lmdb"), network(index)
    loader = training(one, index)
    made, guided = [], []
    for epoch in range(6):
        report = one.refresh(model, epoch, layer="body")
        made.append(None if report is None else report.images)
        assert one.refresh(model, epoch, layer="body") is None  # once is enough
        assert sum(len(batch.images) for batch in loader) == 50
        guided.append(bool(one._lookup.maps(np.arange(50))[1].all()))
    assert made == [None, None, 50, None, 50, None]
    assert guided == [False, False, True, True, True, True]
    assert (tmp_path / "maps.lmdb").is_dir()
    meta = one._lookup.cache.meta
    assert (meta.epoch, meta.passes, meta.input_size) == (4, 2, 32)


def test_a_resumed_run_makes_no_pass_again(index, tmp_path):
    path, model = tmp_path / "maps.lmdb", network(index)
    one = make(index, path)
    assert one.refresh(model, 2, size=32, layer="body").images == 50
    state = one.state_dict()
    with torch.no_grad():
        model.head.weight.add_(0.1)  # it has trained since
    resumed = make(index, path)
    resumed.load_state_dict(state)
    assert resumed.refresh(model, 3, size=32, layer="body") is None
    anew = make(index, path)
    assert anew.refresh(model, 3, size=32, layer="body").images == 50  # nobody told it
    resumed = make(index, path)
    resumed.load_state_dict(state)  # of a pass whose maps are gone
    assert (
        resumed.refresh(model, 3, size=32, layer="body").images == 0
    )  # the pass above was this one
    assert resumed.refresh(model, 4, size=32, layer="body").images == 50


def test_neighbouring_classes_alone_make_no_maps(tailed, tmp_path):
    index = tailed
    one = make(index, tmp_path / "maps.lmdb", lam_max=0.0, mix_prob=0.5, neighbors=1)
    report = one.refresh(network(index), 2, size=32, layer="body")
    assert report.images == 0
    assert one._lookup.neighbors().shape == (index.num_classes, 1)


def test_what_a_pass_lacks_is_named(index, tmp_path):
    with pytest.raises(ValueError, match="size must be the side of the images in a saliency pass"):
        make(index, tmp_path / "maps.lmdb").refresh(network(index), 2)
    with pytest.raises(ValueError, match=r"epoch must be an integer in 0\.\.65535 .*got -1"):
        make(index, tmp_path / "maps.lmdb").refresh(network(index), -1)
    plain = Stage(index, "random_erasing", epochs=6, batch_size=10, seed=3)
    with pytest.raises(ValueError, match="cache must be given to a stage that makes saliency"):
        plain.refresh(network(index), 2, size=32, layer="body")


IMPORTS = """
import numpy as np, torch
from torch import distributed
from test_refreshing_stage import make, network
from scae_dali.data.index import ImageIndex
"""
BOTH = """
distributed.init_process_group("gloo")
index = ImageIndex({root!r})
model = network(index)
wrapped = torch.nn.parallel.DistributedDataParallel(model)
one = make(index, {path!r}, num_shards=2)
assert one.refresh(wrapped, 1, size=32, layer="body") is None
report = one.refresh(wrapped, 2, size=32, layer="body")
maps, found = one._lookup.maps(np.arange(50))
made = one.state_dict()["pass"]
print(report.images, found.all(), maps.astype(int).sum(), made)
distributed.destroy_process_group()
"""


def test_two_processes_make_the_pass_together(index, tmp_path):
    one = make(index, tmp_path / "alone.lmdb")
    one.refresh(network(index), 2, size=32, layer="body")
    wanted = one._lookup.maps(np.arange(50))[0].astype(int).sum()
    said = in_two(IMPORTS + BOTH.format(root=index.root, path=str(tmp_path / "maps.lmdb")))
    assert said.splitlines() == [f"50 True {wanted} 2"] * 2


RESUMED = """
import os
distributed.init_process_group("gloo")
index, model = ImageIndex({root!r}), network(ImageIndex({root!r}))
node = os.environ["RANK"]
os.environ["LOCAL_RANK"] = "0"  # two nodes
one = make(index, {path!r} + node, num_shards=2)
one.refresh(model, 2, size=32, layer="body")
state = one.state_dict()
with torch.no_grad():
    model.head.weight.add_(0.1)  # it has trained since
resumed = make(index, {path!r} + (node if node == "0" else "anew"), num_shards=2)
resumed.load_state_dict(state)
assert resumed.refresh(model, 3, size=32, layer="body").images == 50
assert resumed.refresh(model, 3, size=32, layer="body") is None
maps, found = resumed._lookup.maps(np.arange(50))
print(found.all(), maps.astype(int).sum())
distributed.destroy_process_group()
"""


def test_where_one_node_has_lost_its_cache_all_processes_make_the_pass(index, tmp_path):
    """The others would wait for ever for those that go on without."""
    said = in_two(IMPORTS + RESUMED.format(root=index.root, path=str(tmp_path / "maps.lmdb")))
    first, second = said.splitlines()
    assert first == second
    assert first.startswith("True ")


def test_images_that_are_normalised_before_the_stage_need_a_loader_for_the_pass(index, tmp_path):
    one = make(index, tmp_path / "maps.lmdb", mean=(0, 0, 0), std=(1, 1, 1))
    with pytest.raises(ValueError, match="loader_for must be given where the stage gets images"):
        one.refresh(network(index), 2, size=32, layer="body")
    assert not (tmp_path / "maps.lmdb").exists()


def test_images_that_are_no_files_need_a_loader_too(index, tmp_path):
    named = ImageIndex.from_arrays([f"{i} in memory" for i in range(50)], index.labels)
    one = make(named, tmp_path / "maps.lmdb")
    with pytest.raises(ValueError, match=r"are no files of the index \('0 in memory' is none\)"):
        one.refresh(network(index), 2, size=32, layer="body")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), np.uint8)
    whole = partial(whole_loader, ArrayImages(named, pixels), size=32, batch_size=10)
    assert one.refresh(network(index), 2, loader_for=whole, size=32, layer="body").images == 50


def test_maps_of_another_run_are_told(index, tmp_path):
    path, model = tmp_path / "maps.lmdb", network(index)
    one = make(index, path)
    one.refresh(model, 2, size=32, layer="body")
    assert one._lookup.cache.meta.settings["mean"] == list(one._run.mean)
    state = one.state_dict()
    one._lookup.cache.close()
    another = make(index, path)
    with pytest.warns(RuntimeWarning, match=r"has maps of 50 samples that this run did not make"):
        assert another.refresh(model, 0) is None
    assert another.refresh(model, 1) is None  # once is enough
    resumed = make(index, path)
    resumed.load_state_dict(state)
    assert resumed.refresh(model, 3) is None


def test_epochs_of_the_loader_that_are_left_early_are_told(index, tmp_path):
    """Two of five batches are taken each time, so the stage falls behind."""
    one, model = make(index, tmp_path / "maps.lmdb", refresh_every=5, epochs=9), network(index)
    loader = training(one, index)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(9):
            one.refresh(model, epoch, layer="body")
            for _, _ in zip(range(2), loader, strict=False):
                pass
    told = [str(one.message) for one in caught if "the stage plans epoch" in str(one.message)]
    assert len(told) == 1
    assert "refresh was called for epoch 2" in told[0]


def test_workers_that_keep_an_old_epoch_are_told(index, tmp_path):
    one, model = make(index, tmp_path / "maps.lmdb", refresh_every=5), network(index)
    planner = one.planner()
    ids, size = np.arange(3), np.tile(SIZE, (3, 1))
    for epoch in range(4):
        one.refresh(model, epoch)
        planner(ids, None, size, epoch=np.full(3, epoch))
        if epoch:
            planner(ids, None, size, epoch=np.full(3, epoch - 1))  # they may lie ready
    with pytest.warns(RuntimeWarning, match=r"plans epoch 0, and refresh .* for epoch 3.*workers"):
        planner(ids, None, size, epoch=np.zeros(3, int))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_images_are_brought_to_the_type_of_the_weights(index, tmp_path, dtype):
    one, model = make(index, tmp_path / "maps.lmdb"), network(index).to(dtype)
    assert one.refresh(model, 2, size=32, layer="body").images == 50


def test_a_loader_of_another_size_is_told_before_the_cache_is_made(index, tmp_path):
    path, model = tmp_path / "maps.lmdb", network(index)
    one = make(index, path)

    def loader_for(ids):
        return whole_loader(index, ids, size=24, batch_size=16, threads=1)

    with pytest.raises(ValueError, match=r"loader_for gives, 24 x 24 pixels, got 32: pass size=24"):
        one.refresh(model, 2, loader_for=loader_for, size=32, layer="body")
    assert not path.exists()
    assert one.refresh(model, 2, loader_for=loader_for, size=24, layer="body").images == 50


@pytest.mark.parametrize("size", [(32, 32), "32", 32.5, 0])
def test_what_is_no_size(index, tmp_path, size):
    with pytest.raises(ValueError, match="size must be the side of the images in a saliency pass"):
        make(index, tmp_path / "maps.lmdb").refresh(network(index), 2, size=size, layer="body")


def test_a_loader_that_gives_no_batches(index, tmp_path):
    one = make(index, tmp_path / "maps.lmdb")
    with pytest.raises(ValueError, match="loader_for must give batches as"):
        one.refresh(network(index), 2, loader_for=list, size=32, layer="body")


@pytest.mark.parametrize("state", [{}, None, {"pass": 2}])
def test_what_is_no_state(index, tmp_path, state):
    with pytest.raises(ValueError, match="state must be what state_dict of a stage gives"):
        make(index, tmp_path / "maps.lmdb").load_state_dict(state)
