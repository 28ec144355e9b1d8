"""The state of a Loader, its batches, and pipelines that give no ids."""

from itertools import islice

import pytest
import torch
from loops import loader

from scae_dali import Loader
from scae_dali.stage.loader import ids_of


def given(batches):
    return [batch.ids.tolist() for batch in batches]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("taken", [0, 1, 5, 6, 7, 9, 13])
def test_a_loop_goes_on_from_any_state(index, drop_last, taken):
    """As a run does that counts its epochs by the loader."""
    reference = loader(index, drop_last=drop_last)
    epochs = [given(reference) for _ in range(4)]
    flat = [batch for epoch in epochs for batch in epoch]
    first = loader(index, drop_last=drop_last)
    seen = []
    while len(seen) < taken:
        seen += given(islice(first, taken - len(seen)))
    state = first.state_dict()
    again = loader(index, drop_last=drop_last)
    again.load_state_dict(state)
    assert again.epoch == taken // len(reference)
    rest = [given(again) for _ in range(again.epoch, 4)]
    assert seen + [batch for epoch in rest for batch in epoch] == flat
    assert rest[1:] == epochs[taken // len(reference) + 1 :]
    assert again.epoch == 4


def test_a_state_can_be_saved_by_torch(index, tmp_path):
    first = loader(index)
    begun = iter(first)
    next(begun)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    again = loader(index)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert given(again) == given(begun)


def test_states_that_cannot_be_loaded_are_refused(index):
    begun = loader(index)
    state = begun.state_dict()
    with pytest.raises(RuntimeError, match="load_state_dict must come before the first batch"):
        begun.load_state_dict(state)
    for wrong, told in (({}, "{}"), (None, "None"), ({"epoch": 1}, "epoch")):
        with pytest.raises(ValueError, match=f"position, got {told}"):
            loader(index).load_state_dict(wrong)
    with pytest.raises(ValueError, match="checkpointing disabled"):
        loader(index, checkpointing=False).state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 5}, "a loader with batch_size=8, and this one has batch_size=5"),
        ({"num_shards": 2}, "num_shards=1, and this one has num_shards=2"),
        ({"some": range(41)}, "epoch_size=50, and this one has epoch_size=41"),
    ],
)
def test_a_state_of_other_batches_is_refused(index, change, message):
    first = loader(index)
    list(first)
    state = first.state_dict()
    index = index.subset(change["some"]) if "some" in change else index
    other = loader(index, **{name: value for name, value in change.items() if name != "some"})
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    del state["counts"]  # as states once were
    other.load_state_dict(state)


def test_a_state_of_other_labels_is_refused(index):
    state = loader(index).state_dict()
    other = index.relabelled((index.labels + 1) % 3, index.classes)
    with pytest.raises(ValueError, match="a loader with index of other images or labels, and this"):
        loader(other).load_state_dict(state)


@pytest.mark.parametrize("position", [-1, 7, 99])
def test_a_place_outside_the_epoch_is_refused(index, position):
    state = loader(index).state_dict() | {"position": position}
    with pytest.raises(ValueError, match=rf"position must be in 0 … 6, .* got {position}"):
        loader(index).load_state_dict(state)


def test_a_pipeline_without_ids_gives_images_and_targets(index):
    outputs = ("images", "label", "partner", "mu")
    one = loader(index, outputs)
    batches, reference = list(one), list(loader(index))
    assert len(batches) == len(reference) == 6
    for batch, wanted in zip(batches, reference, strict=True):
        assert batch.ids is None
        assert torch.equal(batch.labels, wanted.labels)
        assert torch.equal(batch.partners, wanted.labels)
        assert torch.equal(batch.images, wanted.images)
        assert (batch.mu == 1).all()
    with pytest.raises(ValueError, match="batches must have ids here, got some without"):
        ids_of(batches[0])


@pytest.mark.parametrize(
    "outputs", [("images",), ("images", "mu"), ("images", "plan", "id"), ("label", "id")]
)
def test_outputs_without_labels_are_refused(index, outputs):
    pipeline = loader(index)._pipeline
    with pytest.raises(ValueError, match="outputs must be images and either plan, or id or label"):
        Loader(pipeline, outputs, index, drop_last=True)


def test_a_batch_moves_what_the_network_and_the_loss_need(index):
    batch = next(iter(loader(index)))
    moved = batch.to("meta")
    for name in ("images", "labels", "partners", "mu"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(batch, name).device.type == "cpu"
    assert moved.ids is batch.ids
    batch.images = batch.images.half()  # trainers write to a batch
    assert batch.images.dtype == torch.float16
