"""A plan and images fed from memory into somebody else's pipeline."""

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, types

from scae_dali.data.pixels import ArrayImages
from scae_dali.methods import Status
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.order import Order
from scae_dali.stage.loader import Loader
from scae_dali.stage.memory import FedPlan
from scae_dali.stage.stage import Stage

BATCH = 16
PAD = CropConfig(kind="pad", pad=3)


@pytest.fixture(scope="module")
def images(tailed):
    return ArrayImages.from_index(tailed, threads=1)


def make_stage(index, method="scae", **settings):
    return Stage(index, method, epochs=3, batch_size=BATCH, seed=4, **settings)


def own(stage, images, order, *, batch_size=BATCH, size=(24, 24), crop=PAD):
    """A pipeline that flips, and nothing more."""

    @pipeline_def(
        batch_size=batch_size,
        num_threads=1,
        device_id=None,
        enable_conditionals=stage.conditional,
        enable_checkpointing=True,
    )
    def define():
        plan = FedPlan(stage, order, images, size=size, crop=crop)
        erased = stage.apply(plan.images, plan)
        return fn.flip(erased, horizontal=plan.scalar("flip", types.INT32)), plan.row

    return define()


def order_of(index, **keywords):
    return Order(index.labels, **{"batch_size": BATCH, "seed": 4} | keywords)


def test_crops_are_shifted_erased_mixed_and_flipped_as_planned(tailed, tailed_cache, images):
    """By NumPy, from the plan that comes along."""
    fill = {"fill": "zero", "tail": 0.5, "p_min": 0.6, "p_max": 0.6}
    stage, order = make_stage(tailed, cache=tailed_cache, **fill), order_of(tailed)
    loader = Loader(
        own(stage, images, order), ("images", "plan"), tailed, drop_last=False, order=order
    )
    padded = np.pad(images.pixels, ((0, 0), (24, 24), (24, 24), (0, 0)))
    erased, mixed, seen = 0, 0, []
    for _ in range(3):
        for batch in loader:
            windows = (batch.windows.numpy()[:, :2] * 24).round().astype(int) + 24
            for k, i in enumerate(batch.ids.tolist()):
                given = batch.images[k].permute(1, 2, 0).numpy()
                seen.append(i)
                if batch.status[k] == Status.MIXED:
                    mixed += 1
                    continue
                y, x = windows[k]
                wanted = padded[i, y : y + 24, x : x + 24].copy()
                y, x, h, w = batch.boxes[k].int().tolist()
                wanted[y : y + h, x : x + w] = 0
                erased += h * w > 0
                np.testing.assert_array_equal(given, wanted[:, ::-1] if batch.flips[k] else wanted)
    assert sorted(seen) == sorted([*range(63)] * 3)
    assert erased > 30
    assert mixed > 3


def test_order_stage_and_pipeline_must_agree(tailed, images):
    stage = make_stage(tailed, "none")
    with pytest.raises(ValueError, match=r"batch_size must be the same of order.*\(16, 16, 8\)"):
        own(stage, images, order_of(tailed), batch_size=8)
    with pytest.raises(ValueError, match=r"start_epoch, got \(2, 0\) and \(4, 0\); give the stage"):
        own(stage, images, order_of(tailed, num_shards=2))


def test_what_is_mixed_must_be_cropped_in_memory(tailed, images):
    stage = make_stage(tailed, tail=0.5)
    for more in ({"size": (32, 32)}, {"crop": CropConfig()}):
        with pytest.raises(ValueError, match="images in memory are mixed only where crop"):
            own(stage, images, order_of(tailed), **more)


def test_boxes_are_filled_where_the_images_are_made_or_in_the_graph(tailed, images, monkeypatch):
    calls = []
    monkeypatch.setattr(fn, "erase", lambda images, **_: calls.append(images) or images)
    for size, expected in (((24, 24), 0), ((32, 32), 1)):
        own(make_stage(tailed, "random_erasing"), images, order_of(tailed), size=size)
        assert len(calls) == expected
