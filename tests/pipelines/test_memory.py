"""Pipelines that are fed from memory: what comes out, and that it is what files give.

Mixing, resumes and shards of training are in test_second.
"""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import write_pngs
from nvidia.dali import fn

from pipelines import arrays, saliency, train, val
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.data.index import ImageIndex
from scae_dali.data.pixels import ArrayImages
from scae_dali.methods import BUILT_IN, Status
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.order import Order
from scae_dali.stage.loader import Loader
from scae_dali.stage.stage import Stage

PAD = CropConfig(kind="pad", pad=3)


@pytest.fixture(scope="module")
def pixels(tailed):
    return ArrayImages.from_index(tailed, threads=1).pixels


def batches_of(pipeline, index, order=None, outputs=val.OUTPUTS):
    return list(Loader(pipeline, outputs, index, drop_last=False, order=order))


def check_same(mine, other):
    for one, two in zip(mine, other, strict=True):
        assert one.ids.tolist() == two.ids.tolist()
        assert one.labels.tolist() == two.labels.tolist()
        assert one.images.shape == two.images.shape
        assert one.images.dtype == two.images.dtype
        assert one.images.stride() == two.images.stride()
        torch.testing.assert_close(one.images, two.images, rtol=0, atol=0)


IMAGES = [
    {"size": 24, "val_resize": 24},
    {"size": 20, "val_resize": 24},
    {"size": 16, "val_resize": 21},
    {"size": 32, "val_resize": 40, "dtype": "fp16", "layout": "NHWC"},
]


@pytest.mark.parametrize("settings", IMAGES)
def test_whole_images_are_those_of_the_validation_pipeline(tailed, pixels, settings):
    image, run = ImageConfig(**settings), ExecConfig(batch_size=16, threads=1)
    order = Order(tailed.labels, batch_size=16, seed=0, sampling="in_turn")
    mine = arrays.whole_pipeline(pixels, image, run, order, stretch=False)
    check_same(
        batches_of(mine, tailed, order), batches_of(val.val_pipeline(tailed, image, run), tailed)
    )


@pytest.mark.parametrize("settings", IMAGES)
def test_stretched_ones_those_of_the_saliency_pipeline(tailed, pixels, settings):
    """Some samples in an order of their own, one of them twice."""
    ids = [62, 7, 3, 3, 40, 41, 0]
    image, run = ImageConfig(**settings), ExecConfig(batch_size=3, threads=1)
    order = Order(tailed.labels[ids], batch_size=3, seed=0, sampling="in_turn")
    mine = arrays.whole_pipeline(pixels, image, run, order, ids, stretch=True)
    other = saliency.saliency_pipeline(tailed, image, run, ids)
    check_same(batches_of(mine, tailed, order), batches_of(other, tailed))


@pytest.mark.parametrize("side", [20, 26])
def test_images_that_are_not_square(tmp_path, side):
    write_pngs(tmp_path, {"a": 3, "b": 4}, (20, 31))
    index = ImageIndex(tmp_path)
    pixels = ArrayImages.from_index(index, threads=1).pixels
    image, run = ImageConfig(size=side, val_resize=side), ExecConfig(batch_size=4, threads=1)
    order = Order(index.labels, batch_size=4, seed=0, sampling="in_turn")
    for stretch, other in (
        (False, val.val_pipeline(index, image, run)),
        (True, saliency.saliency_pipeline(index, image, run)),
    ):
        mine = arrays.whole_pipeline(pixels, image, run, order, stretch=stretch)
        check_same(batches_of(mine, index, order), batches_of(other, index))


def train_batches(kind, index, pixels, image, *, name="scae", epochs=2, **settings):
    """id -> (image, everything else), of every epoch."""
    stage = Stage(index, name, epochs=3, batch_size=16, seed=4, **settings)
    run = ExecConfig(batch_size=16, threads=1)
    order = None if kind == "files" else Order(index.labels, batch_size=16, seed=4)
    if kind == "memory":
        pipeline = arrays.train_pipeline(stage, pixels, order, image, run)
    else:
        pipeline = train.train_pipeline(stage, image, run, seed=4, order=order)
    loader = Loader(pipeline, train.OUTPUTS, index, drop_last=False, order=order)
    out = []
    for _ in range(epochs):
        seen = {}
        for b in loader:
            last = b.images.is_contiguous(memory_format=torch.channels_last)
            assert last == (image.layout == "NHWC")
            rest = zip(b.labels, b.partners, b.mu, b.status, b.boxes, strict=True)
            rows = zip(b.ids.tolist(), b.images.numpy(), rest, strict=True)
            seen |= {i: (one, [v.tolist() for v in values]) for i, one, values in rows}
        out.append(seen)
    assert stage.seconds > 0
    return out


GRID = {"d_min": 6, "d_max": 12}
SETTINGS = {
    "random_erasing": {"fill": "color"},
    "grid_mask": GRID,
    "scae": {"mix_prob": 0.0, "tail_erase": "always", "fill": "zero"},
    "semantic_grid_mask": {"mix_prob": 0.0, "tail_erase": "always", **GRID},
    "rand_augment": {"n": 1},
}
METHODS = [
    *((name, SETTINGS.get(name, {})) for name in BUILT_IN),
    ("random_erasing", {"prob": 1.0}),
    ("scae", {"p_min": 1.0, "p_max": 1.0, "border": "clip", "tail_erase": "always"}),
    ("keep_augment", {"mode": "paste", "n": 1}),
    ("rand_augment+scae", {"rand_augment": {"n": 1}, "scae": {"tail": 0.5}}),
    ("scae+mixup", {"scae": {"mix_prob": 0.0}, "mixup": {"prob": 0.5}}),
]
TRAINED = [
    ImageConfig(size=24, val_resize=24, crop=PAD),
    ImageConfig(size=32, val_resize=32, crop=PAD),
    ImageConfig(size=20, val_resize=24, crop=CropConfig(area=(0.3, 1.0)), decode="roi"),
]
CASES = [(*method, TRAINED[0]) for method in METHODS] + [
    (name, SETTINGS.get(name, {}), image)
    for name in ("none", "random_erasing", "scae")
    for image in TRAINED[1:]
]


def check_same_samples(mine, other):
    """Of every epoch. What SCAE mixes may differ by a grey level where a half is rounded."""
    for one, two in zip(mine, other, strict=True):
        assert sorted(one) == sorted(two) == list(range(63))
        for i in one:
            assert one[i][1] == two[i][1]
            if one[i][1][3] == Status.MIXED:
                assert np.abs(one[i][0] - two[i][0]).mean() < 0.01
            else:
                np.testing.assert_array_equal(one[i][0], two[i][0])


@pytest.mark.parametrize(("name", "settings", "image"), CASES)
def test_training_batches_are_those_of_files(tailed, tailed_cache, pixels, name, settings, image):
    """Pixel by pixel in both layouts; in the reader's own order, unless batches are mixed."""
    files = "files in order" if "mix" in name else "files"

    def batches(kind, layout, name=name, **settings):
        given = dataclasses.replace(image, layout=layout)
        return train_batches(kind, tailed, pixels, given, name=name, **settings)

    guided = settings | {"cache": tailed_cache}
    wanted = batches(files, "NCHW", **guided)
    for kind, layout in (("memory", "NCHW"), (files, "NHWC"), ("memory", "NHWC")):
        check_same_samples(wanted, batches(kind, layout, **guided))
    changed, statuses = [], set()
    for one, before in zip(wanted, batches("memory", "NCHW", name="none"), strict=True):
        changed += [(one[i][0] != before[i][0]).any() for i in one]
        statuses |= {values[3] for _, values in one.values()}
    assert (sum(changed) > 30) == (name != "none")
    assert len(statuses) > 2 or "+" not in name


@pytest.mark.parametrize("device_id", [None, 0])
@pytest.mark.parametrize(("fill", "operators"), [("mean", 0), ("zero", 0), ("color", 1)])
def test_boxes_of_one_colour_are_left_to_no_operator(
    tailed, pixels, monkeypatch, device_id, fill, operators
):
    """Of crops; other images have to be erased after they are cropped."""
    calls = []
    monkeypatch.setattr(fn, "erase", lambda images, **_: calls.append(images) or images)
    order = Order(tailed.labels, batch_size=16, seed=4)
    run = ExecConfig(batch_size=16, device_id=device_id)
    for image, expected in ((TRAINED[0], operators), (TRAINED[1], 1)):
        stage = Stage(tailed, "random_erasing", epochs=3, batch_size=16, seed=4, fill=fill)
        arrays.train_pipeline(stage, pixels, order, image, run)
        assert len(calls) == expected
        calls.clear()


def test_the_pixels_in_memory_are_not_touched(tailed, pixels):
    before = pixels.copy()
    image = ImageConfig(size=24, val_resize=24, crop=PAD)
    seen = train_batches("memory", tailed, pixels, image, tail=0.5, mix_prob=1.0, epochs=3)
    assert sum(values[3] == Status.MIXED for epoch in seen for _, values in epoch.values()) > 50
    np.testing.assert_array_equal(pixels, before)


def test_each_epoch_has_an_order_of_its_own(tailed, pixels):
    image = ImageConfig(size=24, val_resize=24, crop=PAD)
    orders = [list(epoch) for epoch in train_batches("memory", tailed, pixels, image, epochs=3)]
    assert len(set(map(tuple, orders))) == 3


@pytest.mark.parametrize(
    ("samples", "batch_size", "shards", "steps"),
    [(50, 16, 1, 3), (49, 8, 3, 2), (33, 8, 2, 2), (31, 15, 2, 1), (33, 16, 2, 1), (7, 3, 2, 1)],
)
def test_shards_give_every_sample_once_and_as_many_full_batches(samples, batch_size, shards, steps):
    """Also where they differ by one sample, on either side of a full batch."""
    pixels = np.zeros((samples, 4, 4, 3), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(samples)
    index = ImageIndex.from_arrays([f"{i}" for i in range(samples)], np.arange(samples) % 3)
    image = ImageConfig(size=4, val_resize=4, mean=(0.0,) * 3, std=(1.0,) * 3)

    def loaders(drop_last):
        for shard in range(shards):
            order = Order(
                index.labels, batch_size=batch_size, seed=1, shard=shard, num_shards=shards
            )
            run = ExecConfig(batch_size=batch_size, threads=1, shard=shard, num_shards=shards)
            pipeline = arrays.whole_pipeline(pixels, image, run, order, stretch=True)
            yield Loader(pipeline, val.OUTPUTS, index, drop_last=drop_last, order=order)

    every, full = list(loaders(False)), list(loaders(True))
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
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    order = Order(index.labels, batch_size=4, seed=1)
    image = ImageConfig(size=4, val_resize=4)
    run = ExecConfig(batch_size=4, threads=1)
    pipeline = arrays.whole_pipeline(pixels, image, run, order, stretch=True)
    with pytest.raises(ValueError, match="batch_size must be at most the 3 images of a shard"):
        Loader(pipeline, val.OUTPUTS, index, drop_last=True, order=order)


@pytest.mark.parametrize(
    ("image", "got"),
    [
        ({"size": 24, "val_resize": 24}, "got 'resized' and 24"),
        ({"size": 32, "val_resize": 32, "crop": PAD}, "got 'pad' and 32"),
    ],
)
def test_arrays_are_mixed_in_padded_crops_of_their_own_size_alone(tailed, pixels, image, got):
    message = (
        r"images in memory are mixed only where image.crop.kind is pad and image.size theirs, "
        rf"\(24, 24\), {got}; set the method's mix_prob=0, or read the images from files"
    )
    with pytest.raises(ValueError, match=message):
        train_batches("memory", tailed, pixels, ImageConfig(**image))
    train_batches("memory", tailed, pixels, ImageConfig(**image), mix_prob=0.0, epochs=1)
