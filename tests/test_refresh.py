"""The saliency pass: what it writes, how it resumes, what it leaves alone."""

import numpy as np
import pytest
import torch
from torch import nn

from pipelines import saliency
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.cache import SaliencyCache
from scae_dali.gradcam import GradCAM
from scae_dali.iterator import Loader
from scae_dali.refresh import refresh_cache, weights_digest

IMAGE = ImageConfig(size=28, val_resize=28)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))


@pytest.fixture
def fresh(index, tmp_path):
    return SaliencyCache.create(tmp_path / "maps.lmdb", index, grid=(7, 7))


def loaders(index, asked, batch_size=16):
    def loader_for(ids):
        asked.append(list(ids))
        pipeline = saliency.saliency_pipeline(
            index, IMAGE, ExecConfig(batch_size=batch_size, threads=2), ids
        )
        return Loader(pipeline, saliency.OUTPUTS, index, drop_last=False)

    return loader_for


def run(model, cache, index, asked, *, epoch=3, **keywords):
    return refresh_cache(
        model, cache, index, loaders(index, asked), epoch=epoch, layer="features", **keywords
    )


def test_every_sample_gets_the_map_of_its_own_label(fresh, index):
    model, asked, done = Net(), [], []
    before = weights_digest(model)
    report = run(model, fresh, index, asked, name="net", input_size=28, progress=done.append)
    assert report.images == sum(done) == len(index)
    assert asked == [list(range(50))]
    maps, found = fresh.read(np.arange(50))
    assert found.all()
    cam = GradCAM(model, "features")
    for batch in loaders(index, [])(range(50)):
        wanted = (cam(batch.images, batch.labels) * 255).round().numpy()
        assert np.abs(maps[batch.ids.numpy()] - wanted).max() <= 1
    meta = fresh.meta
    assert (meta.epoch, meta.model, meta.layer, meta.input_size) == (3, "net", "features", 28)
    assert meta.under_way is None
    assert weights_digest(model) == before
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_complete_pass_is_not_made_twice_and_other_weights_make_a_new_one(fresh, index):
    model, asked = Net(), []
    run(model, fresh, index, asked)
    assert run(model, fresh, index, asked).images == 0
    with torch.no_grad():
        model.head.weight.mul_(-1)
    assert run(model, fresh, index, asked).images == 50
    assert run(model, fresh, index, asked, epoch=4).images == 50
    assert len(asked) == 3


def test_a_pass_that_breaks_goes_on_where_it_was(fresh, index):
    model, asked = Net(), []

    def breaking(ids):
        for k, batch in enumerate(loaders(index, asked)(ids)):
            if k == 2:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        refresh_cache(model, fresh, index, breaking, epoch=3, layer="features", commit_every=16)
    assert fresh.meta.under_way is not None
    assert fresh.meta.epoch is None
    assert run(model, fresh, index, asked).images == 50 - 32
    assert asked[1] == list(range(32, 50))
    assert (fresh.stamps() == 3).all()


def test_path_named_caches_are_filled_in_key_order(index, tmp_path):
    cache = SaliencyCache.create(tmp_path / "maps.lmdb", index, grid=(7, 7), naming="path")
    asked = []
    run(Net(), cache, index, asked)
    assert asked == [np.argsort(index.keys("path")).tolist()]
    assert cache.read(np.arange(50))[1].all()


def test_the_digest_sees_parameters_and_buffers():
    model = Net()
    first = weights_digest(model)
    model.features[1].running_mean += 1
    second = weights_digest(model)
    model.half()
    assert len({first, second, weights_digest(model)}) == 3
    assert weights_digest(Net()) == first
