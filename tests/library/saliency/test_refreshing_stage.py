"""Stages that make their saliency passes by themselves, from no cache at all."""

import numpy as np
import pytest
import torch
from cams import Net
from nvidia.dali import fn, pipeline_def

from scae_dali.saliency.stage import SCAE, Stage
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
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        make(index, tmp_path / "maps.lmdb").refresh(network(index), -1)
    plain = Stage(index, "random_erasing", epochs=6, batch_size=10, seed=3)
    with pytest.raises(ValueError, match="cache must be given to a stage that makes saliency"):
        plain.refresh(network(index), 2, size=32, layer="body")
