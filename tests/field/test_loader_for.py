"""A pass makes the maps that it was asked for: a loader that reads other samples is told.

A `loader_for` that ignored its ids gave all images whatever the share, and under torchrun every
rank made all maps. The kind is that of https://github.com/NVIDIA/DALI/issues/2573, where each of
several GPUs went over the same samples instead of its part.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from passes import Net, batches

from scae_dali.saliency import refresh
from scae_dali.saliency.refresh import refresh_cache

REMEDY = "read the ids that loader_for is given, all of them and in their order"


def make(cache, index, loader_for, **more):
    settings = {"epoch": 3, "layer": "features", "commit_every": 10} | more
    return refresh_cache(Net(), cache, index, loader_for, **settings)


@pytest.fixture
def sound(index):
    return batches(index, size=28, batch_size=10)


@pytest.fixture
def seen(monkeypatch):
    """How many maps were computed."""
    found = []

    def blank(self, images, labels):
        found.append(len(images))
        return torch.eye(7).repeat(len(images), 1, 1)

    monkeypatch.setattr(refresh.METHODS["gradcam"], "__call__", blank)
    return found


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_a_loader_of_all_samples_is_told_at_its_first_batch(fresh, index, sound, seen, share):
    wanted = fresh.stalest(int(share * 50), epoch=3)
    first = next(k for k, sample in enumerate(wanted) if k != sample)
    told = rf"gave sample {first} where sample {wanted[first]} was asked for.*; {REMEDY}"
    with pytest.raises(ValueError, match=told):
        make(fresh, index, lambda ids: sound(range(50)), share=share)
    assert seen == []
    assert fresh.census() == ({}, 0)
    assert make(fresh, index, sound, share=share).images == 50 * share


def test_a_rank_is_given_its_own_part(fresh, index, sound, seen, monkeypatch):
    monkeypatch.setattr(refresh.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(refresh.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(refresh.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(refresh, "_union", lambda pending, *_: np.arange(50))
    with pytest.raises(ValueError, match="gave sample 0 where sample 1 was asked for, as number 1"):
        make(None, index, lambda ids: sound(range(50)))
    assert seen == []


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (lambda ids: [*ids[:9], ids[10], ids[9], *ids[11:]], "gave sample 10 where sample 9 was"),
        (lambda ids: ids[::-1], "gave sample 49 where sample 0 was asked for, as number 1 of 50"),
        (lambda ids: ids[:-2], "gave 48 of the 50 samples .* ended before sample 48.*last batch"),
        (
            lambda ids: [*ids, 7, 1],
            "gave more than the 50 samples that were asked for: then sample 7;",
        ),
        (lambda ids: [*ids, *ids], "gave more than the 50 samples .*: then sample 0;"),
        (lambda ids: [], "gave 0 of the 50 samples .* in a new loader for every call"),
    ],
    ids=["swapped", "backwards", "too few", "one more", "twice", "none"],
)
def test_what_was_sound_is_kept_and_the_next_loader_goes_on(fresh, index, sound, given, told):
    with pytest.raises(ValueError, match=rf"loader_for {told}"):
        make(fresh, index, lambda ids: sound(given(ids)))
    kept = int((fresh.stamps() == 3).sum())
    assert fresh.meta.under_way is not None
    assert make(fresh, index, sound).images == 50 - kept
    assert fresh.meta.epoch == 3


def test_a_loader_that_was_read_already_is_told_at_the_next_pass(fresh, index, sound):
    once = sound(range(50))
    assert make(fresh, index, lambda ids: once).images == 50
    with pytest.raises(ValueError, match=r"gave 0 of the 50 .* in a new loader for every call"):
        make(fresh, index, lambda ids: once, epoch=4)
    with pytest.raises(ValueError, match="loader_for returned None for 50 samples"):
        make(fresh, index, lambda ids: None, epoch=4)
    assert (fresh.stamps() == 3).all()


@pytest.mark.parametrize(
    "altered",
    [
        {"windows": torch.tensor([[0.2, 0.2, 0.5, 0.5]])},
        {"flips": torch.tensor([True])},
        {"status": torch.tensor([1])},
    ],
    ids=["cropped", "flipped", "erased"],
)
def test_a_training_loader_is_told(fresh, index, sound, altered):
    """Its crops would lie in the cache as maps of the whole."""

    def training(ids):
        for batch in sound(ids):
            n = len(batch.ids)
            yield replace(batch, **{name: value.repeat(n, *[1] * (value.ndim - 1))
                                    for name, value in altered.items()})  # fmt: skip

    with pytest.raises(ValueError, match="gave sample 0 cropped, flipped, erased or mixed, and ma"):
        make(fresh, index, training)
    assert (fresh.stamps() < 3).all()
