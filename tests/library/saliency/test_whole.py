"""Whole images of files and of memory: what comes out, in which order, and a pass over them."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import ROOT, write_pngs
from PIL import Image

from scae_dali.cache import SaliencyCache
from scae_dali.checks import IMAGENET_MEAN, IMAGENET_STD
from scae_dali.data.index import ImageIndex
from scae_dali.data.pixels import ArrayImages
from scae_dali.plan.order import Order
from scae_dali.saliency.whole import OUTPUTS, whole_loader, whole_pipeline
from scae_dali.stage.loader import Loader

SETTINGS = [
    {"size": 24, "resize": 24},
    {"size": 20, "resize": 24},
    {"size": 16, "resize": 21},
    {"size": 32, "resize": 40, "dtype": "fp16", "layout": "NHWC"},
]


@pytest.fixture(scope="module")
def images(tailed):
    return ArrayImages.from_index(tailed, threads=1)


def check_same(mine, other):
    for one, two in zip(mine, other, strict=True):
        assert one.ids.tolist() == two.ids.tolist()
        assert one.labels.tolist() == two.labels.tolist()
        assert one.images.shape == two.images.shape
        assert one.images.dtype == two.images.dtype
        assert one.images.stride() == two.images.stride()
        torch.testing.assert_close(one.images, two.images, rtol=0, atol=0)


def grey_levels(picture):
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (picture * std + mean).numpy()


@pytest.mark.parametrize("settings", SETTINGS)
def test_files_and_memory_give_the_same_central_crops(tailed, images, settings):
    check_same(*(whole_loader(of, batch_size=16, threads=1, **settings) for of in (images, tailed)))


@pytest.mark.parametrize("settings", SETTINGS)
def test_files_and_memory_give_the_same_stretched_images(tailed, images, settings):
    """Some samples in an order of their own, one of them twice."""
    ids = [62, 7, 3, 3, 40, 41, 0]
    stretched = settings | {"resize": None}
    check_same(
        *(whole_loader(of, ids, batch_size=3, threads=1, **stretched) for of in (images, tailed))
    )


@pytest.mark.parametrize("side", [20, 26])
def test_images_that_are_not_square(tmp_path, side):
    write_pngs(tmp_path, {"a": 3, "b": 4}, (20, 31))
    index = ImageIndex(tmp_path)
    images = ArrayImages.from_index(index, threads=1)
    for resize in (side, None):
        check_same(
            *(
                whole_loader(of, size=side, resize=resize, batch_size=4, threads=1)
                for of in (images, index)
            )
        )


@pytest.mark.parametrize(
    ("samples", "batch_size", "shards", "steps"),
    [(50, 16, 1, 3), (49, 8, 3, 2), (33, 8, 2, 2), (31, 15, 2, 1), (33, 16, 2, 1), (7, 3, 2, 1)],
)
def test_shards_give_every_sample_once_and_as_many_full_batches(samples, batch_size, shards, steps):
    """Also where they differ by one sample, on either side of a full batch."""
    pixels = np.zeros((samples, 4, 4, 3), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(samples)
    index = ImageIndex.from_arrays([f"{i}" for i in range(samples)], np.arange(samples) % 3)
    images = ArrayImages(index, pixels)
    shared = {"size": 4, "threads": 1, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    every, full = [], []
    for shard in range(shards):
        part = {"batch_size": batch_size, "shard": shard, "num_shards": shards}
        every.append(whole_loader(images, **part, **shared))
        pipeline = whole_pipeline(images, **part, **shared)
        order = Order(index.labels, seed=1, sampling="in_turn", **part)
        full.append(Loader(pipeline, OUTPUTS, index, drop_last=True, order=order))
    assert [len(loader) for loader in full] == [steps] * shards
    for _ in range(3):
        ids = []
        for batch in (batch for loader in every for batch in loader):
            assert 0 < len(batch.ids) <= batch_size
            assert batch.images[:, 0, 0, 0].long().tolist() == batch.ids.tolist()
            assert batch.labels.tolist() == index.labels[batch.ids.numpy()].tolist()
            ids += batch.ids.tolist()
        assert sorted(ids) == list(range(samples))
        given = [[len(batch.ids) for batch in loader] for loader in full]
        assert given == [[batch_size] * steps] * shards


def test_a_batch_that_no_shard_can_fill_is_refused():
    index = ImageIndex.from_arrays(["a", "b", "c"], [0, 0, 1])
    images = ArrayImages(index, np.zeros((3, 4, 4, 3), np.uint8))
    pipeline = whole_pipeline(images, size=4, batch_size=4, threads=1)
    order = Order(index.labels, batch_size=4, seed=1, sampling="in_turn")
    with pytest.raises(ValueError, match="batch_size must be at most the 3 images of a shard"):
        Loader(pipeline, OUTPUTS, index, drop_last=True, order=order)


def test_every_file_is_given_once_on_any_number_of_ranks(index):
    for shards in (1, 3, 4):
        for _ in range(2):
            ids = []
            for shard in range(shards):
                loader = whole_loader(
                    index, size=16, resize=16, batch_size=16, threads=1,
                    shard=shard, num_shards=shards,
                )  # fmt: skip
                ids += torch.cat([batch.ids for batch in loader]).tolist()
            assert sorted(ids) == list(range(50))


def test_the_central_crop_is_the_usual_one(index):
    batches = whole_loader(index, size=32, resize=36, batch_size=16, threads=2)
    mine = grey_levels(torch.cat([batch.images for batch in batches])[7])
    with Image.open(f"{index.root}/{index.files[7]}") as file:
        scale = 36 / min(file.size)
        size = tuple(round(side * scale) for side in file.size)
        resized = file.resize(size, Image.Resampling.BILINEAR)
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    other = np.asarray(resized.crop((left, top, left + 32, top + 32))).transpose(2, 0, 1)
    assert np.abs(mine - other).mean() < 2


def test_chosen_samples_keep_their_order_and_are_seen_whole(index):
    ids = [7, 3, 3, 49, 0]
    batches = list(whole_loader(index, ids, size=24, batch_size=2))
    assert torch.cat([batch.ids for batch in batches]).tolist() == ids
    with Image.open(f"{index.root}/{index.files[7]}") as file:
        other = np.asarray(file.resize((24, 24), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.abs(grey_levels(batches[0].images[0]) - other).mean() < 2


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"resize": 15}, ValueError, r"resize must be at least size \(16\), got 15; None"),
        ({"dtype": "fp64"}, ValueError, "dtype must be one of fp32, fp16; got 'fp64'"),
        ({"layout": "CHW"}, ValueError, "layout must be one of NCHW, NHWC; got 'CHW'"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, "std must be positive"),
        ({"shard": 2, "num_shards": 2}, ValueError, r"shard must be in \[0, num_shards=2\), got 2"),
        ({"ids": []}, ValueError, "ids must not be empty; None takes all samples"),
        ({"ids": [0, 63]}, IndexError, r"ids must be in \[0, 63\), .*, got 0 … 63"),
        ({"ids": [-1]}, IndexError, "got -1 … -1"),
    ],
)
def test_settings_are_validated(tailed, images, settings, error, message):
    for of in (tailed, images):
        with pytest.raises(error, match=message):
            whole_pipeline(of, **{"size": 16, "batch_size": 4} | settings)


SCRIPT = """
    import sys
    from functools import partial

    import torch
    from torch import nn

    from scae_dali import ImageIndex, SaliencyCache, refresh_cache
    from scae_dali.data.pixels import ArrayImages
    from scae_dali.saliency.whole import whole_loader

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU())
            self.head = nn.Linear(8, 5)

        def forward(self, images):
            return self.head(self.features(images).mean((2, 3)))

    torch.manual_seed(0)
    net, index = Net(), ImageIndex(sys.argv[1])
    for images, path in (
        (index, "files.lmdb"),
        (ArrayImages.from_index(index, threads=1), "memory.lmdb"),
    ):
        cache = SaliencyCache.create(path, index, grid=(6, 6))
        loader_for = partial(whole_loader, images, size=24, batch_size=16, threads=1)
        report = refresh_cache(net, cache, index, loader_for, epoch=0, layer="features")
        print(report.images, *cache.coverage())
    assert not [name for name in sys.modules if name.split(".")[0] in ("pipelines", "train")]
"""


def test_a_users_script_builds_the_same_cache_from_files_and_from_memory(tailed, tmp_path):
    """By the library alone."""
    script = tmp_path / "own.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [sys.executable, script, tailed.root],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["63 63 0"] * 2
    maps = []
    for name in ("files.lmdb", "memory.lmdb"):
        levels, found = SaliencyCache(tmp_path / name, index=tailed).read(np.arange(63))
        assert found.all()
        maps.append(levels)
    np.testing.assert_array_equal(*maps)
    assert len(np.unique(maps[0], axis=0)) > 60
