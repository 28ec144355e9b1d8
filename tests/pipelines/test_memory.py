"""Training from memory: what comes out, and that it is what files give.

Mixing, resumes and shards are in test_partner.
"""

import dataclasses

import numpy as np
import pytest
from crops import train_batches
from nvidia.dali import fn

from pipelines import memory
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.data.pixels import ArrayImages
from scae_dali.methods import BUILT_IN, Status
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.order import Order
from scae_dali.stage.stage import Stage

PAD = CropConfig(kind="pad", pad=3)


@pytest.fixture(scope="module")
def pixels(tailed):
    return ArrayImages.from_index(tailed, threads=1).pixels


GRID = {"d_min": 6, "d_max": 12}
SETTINGS = {
    "random_erasing": {"fill": "color"},
    "grid_mask": GRID,
    "scae": {"mix_prob": 0.0, "tail_erase": "always", "fill": "zero"},
    "semantic_grid_mask": {"mix_prob": 0.0, "tail_erase": "always", **GRID},
    "rand_augment": {"n": 1},
    "cmo": {"skip_first": 0, "skip_last": 0},
}
METHODS = [
    *((name, SETTINGS.get(name, {})) for name in BUILT_IN),
    ("random_erasing", {"prob": 1.0}),
    ("random_erasing", {"prob": 1.0, "fill": "above_mean"}),
    ("scae", {"p_min": 1.0, "p_max": 1.0, "border": "clip", "tail_erase": "always"}),
    ("keep_augment", {"mode": "paste", "n": 1}),
    ("rand_augment+scae", {"rand_augment": {"n": 1}, "scae": {"tail": 0.5}}),
    ("scae+mixup", {"scae": {"mix_prob": 0.0}, "mixup": {"prob": 0.5}}),
    ("scae+mixup|cutmix", {"scae": {"mix_prob": 0.0}, "mixup": {"prob": 0.5}}),
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
    files = "files in order" if "mix" in name or name == "cmo" else "files"

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
@pytest.mark.parametrize(
    ("fill", "operators"), [("mean", 0), ("zero", 0), ("above_mean", 0), ("color", 1)]
)
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
        memory.train_pipeline(stage, ArrayImages(tailed, pixels), order, image, run)
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
    ("image", "got"),
    [
        ({"size": 24, "val_resize": 24}, r"got 'resized' and \(24, 24\)"),
        ({"size": 32, "val_resize": 32, "crop": PAD}, r"got 'pad' and \(32, 32\)"),
    ],
)
def test_arrays_are_mixed_in_padded_crops_of_their_own_size_alone(tailed, pixels, image, got):
    message = (
        r"images in memory are mixed only where crop.kind is pad and size theirs, "
        rf"\(24, 24\), {got}; set the method's mix_prob=0, or leave cmo out, or read the images "
        "from files"
    )
    with pytest.raises(ValueError, match=message):
        train_batches("memory", tailed, pixels, ImageConfig(**image))
    train_batches("memory", tailed, pixels, ImageConfig(**image), mix_prob=0.0, epochs=1)
