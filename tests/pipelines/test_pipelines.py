"""The ready-made pipelines: what comes out, in which order, type and layout."""

import itertools
from dataclasses import replace
from importlib import metadata

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def

from pipelines import files
from pipelines.config import ExecConfig, ImageConfig
from pipelines.data import Data
from pipelines.loaders import Loaders
from scae_dali.stage.images import read, resolve_decode
from scae_dali.stage.loader import Loader
from scae_dali.stage.stage import Stage

RUN = ExecConfig(batch_size=16, threads=2)


def train_loader(index, image, run=RUN, *, seed=3, drop_last=False):
    stage = Stage(
        index, "none", epochs=3, batch_size=run.batch_size, seed=seed, num_shards=run.num_shards
    )
    pipeline = files.train_pipeline(stage, image, run, seed=seed)
    return Loader(pipeline, files.OUTPUTS, index, drop_last=drop_last)


def loaders(index, image):
    return Loaders(Data(index, index), image, sampling="shuffle", seed=3)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_types_and_layouts_of_every_pipeline(index, dtype, layout):
    image = ImageConfig(size=32, val_resize=36, dtype=dtype, layout=layout)
    plain = ImageConfig(size=32, val_resize=36)
    for make in (
        lambda image: train_loader(index, image),
        lambda image: loaders(index, image).val(RUN),
        lambda image: loaders(index, image).saliency(image, RUN, range(50)),
    ):
        for batch, reference in zip(make(image), make(plain), strict=True):
            assert batch.images.shape == (len(batch.ids), 3, 32, 32)
            assert batch.images.dtype == {"fp32": torch.float32, "fp16": torch.float16}[dtype]
            last = batch.images.is_contiguous(memory_format=torch.channels_last)
            assert last == (layout == "NHWC")
            assert (batch.ids == reference.ids).all()
            torch.testing.assert_close(batch.images.float(), reference.images, atol=2e-3, rtol=0)
            assert (batch.labels.numpy() == index.labels[batch.ids.numpy()]).all()


def test_the_order_depends_on_seed_and_epoch_alone(index):
    def order(**keywords):
        loader = train_loader(index, ImageConfig(size=16, val_resize=16), **keywords)
        return [torch.cat([batch.ids for batch in loader]).tolist() for _ in range(3)]

    first = order()
    assert all(sorted(ids) == list(range(50)) for ids in first)
    assert len({tuple(ids) for ids in first}) == 3
    assert order() == first
    assert order(seed=4) != first


@pytest.mark.parametrize(
    ("samples", "batch_size", "shards", "steps"),
    [(50, 16, 1, 3), (50, 25, 1, 2), (49, 8, 3, 2), (33, 8, 2, 2), (31, 15, 2, 1), (33, 16, 2, 1)],
)
def test_all_ranks_take_as_many_full_steps(index, samples, batch_size, shards, steps):
    """Also where the shards differ by one sample, on either side of a full batch."""
    part = index.subset(np.arange(samples))
    image = ImageConfig(size=16, val_resize=16)
    loaders = [
        train_loader(
            part,
            image,
            ExecConfig(batch_size=batch_size, threads=1, shard=s, num_shards=shards),
            drop_last=True,
        )
        for s in range(shards)
    ]
    for _ in range(3):
        given = [[len(batch.ids) for batch in loader] for loader in loaders]
        assert given == [[batch_size] * steps] * shards
    assert [len(loader) for loader in loaders] == [steps] * shards


def test_auto_decodes_regions_on_the_cpu_and_avoids_the_gpus_known_crash(monkeypatch):
    assert resolve_decode("auto", None) == "roi"
    for version, path in (("0.9.0.20", "full"), ("0.8.0", "roi"), ("0.10.1", "roi")):
        monkeypatch.setattr("scae_dali.stage.images.metadata.version", lambda name, v=version: v)
        assert resolve_decode("auto", 0) == path
        assert resolve_decode("roi", 0) == "roi"
    only_13 = {"nvidia-nvimgcodec-cu13": "0.9.1"}

    def version(name):
        if name not in only_13:
            raise metadata.PackageNotFoundError(name)
        return only_13[name]

    monkeypatch.setattr("scae_dali.stage.images.metadata.version", version)
    assert resolve_decode("auto", 0) == "full"
    only_13.clear()
    assert resolve_decode("auto", 0) == "roi"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageConfig(size=0), "image.size must be at least 1, got 0"),
        (lambda: ImageConfig(size=9, val_resize=8), "image.val_resize must be at least image.size"),
        (
            lambda: ImageConfig(decode="gpu"),
            "image.decode must be one of auto, roi, full; got 'gpu'",
        ),
        (lambda: ImageConfig(layout="CHW"), "image.layout must be one of NCHW, NHWC; got 'CHW'"),
        (lambda: ImageConfig(std=(1.0, 0.0, 1.0)), "image.std must be positive"),
        (lambda: ExecConfig(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: ExecConfig(batch_size=1, threads=0), "threads must be at least 1, got 0"),
        (
            lambda: ExecConfig(batch_size=1, shard=2, num_shards=2),
            r"shard must be in \[0, num_shards=2\), got 2",
        ),
        (
            lambda: ExecConfig(batch_size=1, hw_decoder_load=1.5),
            r"hw_decoder_load must be in \[0, 1\], got 1.5",
        ),
    ],
)
def test_settings_are_validated(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_small_images_are_seen_in_larger_batches_on_a_gpu_alone():
    run = ExecConfig(batch_size=128, device_id=0, shard=1, num_shards=2)
    assert run.for_inference(32) == replace(run, batch_size=1024)
    assert run.for_inference(224) == run
    assert RUN.for_inference(32) == RUN


def test_targets_that_a_pipeline_gives_itself(index):
    given = {
        "label": np.array([[7], [8], [9]]),
        "partner": np.array([[1], [2], [3]]),
        "mu": np.array([[0.25], [0.5], [1.0]], np.float32),
    }

    @pipeline_def(batch_size=3, num_threads=1, device_id=None)
    def define():
        _, ids = read(index)
        images = fn.constant(fdata=0.0, shape=(3, 4, 4))
        nodes = [fn.external_source(source=itertools.repeat(values)) for values in given.values()]
        return images, ids, *nodes

    batch = next(iter(Loader(define(), ["images", "id", *given], index, drop_last=False)))
    assert batch.labels.tolist() == [7, 8, 9]
    assert batch.partners.tolist() == [1, 2, 3]
    assert batch.mu.tolist() == [0.25, 0.5, 1.0]


@pytest.mark.parametrize("outputs", [["images"], ["id"], ["images", "plan", "id"], ["images", "x"]])
def test_outputs_that_a_loader_does_not_know(index, outputs):
    with pytest.raises(ValueError, match="outputs must be images and either plan, or id or label"):
        Loader(None, outputs, index, drop_last=False)
