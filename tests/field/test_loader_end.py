"""A consumer that counts batches, and asks for no more than there are.

Lightning takes len(loader) batches and begins anew. A loader that notices its end only when it is
asked for one batch more gave every second epoch nothing. Sources:
https://github.com/Lightning-AI/pytorch-lightning/issues/12956 and
https://github.com/NVIDIA/DALI/issues/3865.
"""

from itertools import islice

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def

from pipelines.config import ExecConfig, ImageConfig
from pipelines.data import Data
from pipelines.loaders import Loaders
from scae_dali import Loader
from scae_dali.stage.stage import Stage

IMAGE = ImageConfig(size=16, val_resize=16)
EPOCHS = 4


def own(index, *, drop_last, state=None, position=0, shuffle=True, batch_size=8, **shard):
    """A loader over somebody's own pipeline."""
    shards = shard.get("num_shards", 1)
    stage = Stage(index, "none", epochs=EPOCHS, batch_size=batch_size, seed=1, num_shards=shards)

    @pipeline_def(batch_size=batch_size, num_threads=1, device_id=None, enable_checkpointing=True)
    def define():
        encoded, ids = fn.readers.file(
            files=list(index.files), file_root=index.root, name="Reader",
            shuffle_after_epoch=shuffle, pad_last_batch=True, **shard,
        )  # fmt: skip
        images = fn.resize(fn.decoders.image(encoded), size=(16, 16))
        images, _ = stage(images, ids, size=(16, 16))
        return images, ids

    return Loader(
        define(checkpoint=state), ["images", "id"], index, drop_last=drop_last, position=position
    )


def ids_of(batches):
    return [batch.ids.tolist() for batch in batches]


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("batch_size", [8, 10], ids=["2 are left over", "nothing is"])
def test_whoever_takes_len_batches_gets_every_epoch(index, drop_last, batch_size):
    loader = own(index, drop_last=drop_last, batch_size=batch_size)
    counted = [ids_of(islice(loader, len(loader))) for _ in range(EPOCHS)]
    asked = own(index, drop_last=drop_last, batch_size=batch_size)
    assert counted == [ids_of(asked) for _ in range(EPOCHS)]
    size = batch_size * len(loader) if drop_last else 50
    assert [sum(map(len, batches)) for batches in counted] == [size] * EPOCHS


def test_a_generator_that_is_asked_late_ends_and_takes_nothing(index):
    """As a prefetching consumer does, after it has begun the next epoch."""
    loader = own(index, drop_last=True)
    old = iter(loader)
    first = ids_of(islice(old, len(loader)))
    new = iter(loader)
    begun = [next(new).ids.tolist()]
    assert next(old, None) is None
    reference = own(index, drop_last=True)
    assert [first, begun + ids_of(new)] == [ids_of(reference) for _ in range(2)]


def test_shards_of_which_one_has_fewer_batches_go_on_for_epochs(index):
    """16, 17 and 17 samples, whose last batch of 8 is empty in the first shard."""
    loaders = [
        own(index, drop_last=False, shuffle=False, num_shards=3, shard_id=k, stick_to_shard=True)
        for k in range(3)
    ]
    for _ in range(EPOCHS):
        epoch = [[len(ids) for ids in ids_of(loader)] for loader in loaders]
        assert epoch == [[8, 8], [8, 8, 1], [8, 8, 1]]


def test_a_validation_loader_of_images_in_memory_too(tailed):
    pixels = np.stack([np.full((16, 16, 3), i, np.uint8) for i in range(len(tailed))])
    data = Data(tailed, tailed, pixels, pixels)
    loaders = Loaders(data, IMAGE, sampling="shuffle", seed=0)
    loader = loaders.val(ExecConfig(batch_size=8, threads=1))
    for _ in range(3):
        given = [i for ids in ids_of(islice(loader, len(loader))) for i in ids]
        assert given == list(range(63))


@pytest.mark.parametrize("taken", [3, 6])
def test_a_state_after_some_or_all_batches_goes_on_with_the_rest(index, taken):
    reference = own(index, drop_last=True)
    epochs = [ids_of(reference) for _ in range(3)]
    loader = own(index, drop_last=True)
    assert ids_of(islice(loader, taken)) == epochs[0][:taken]
    again = own(index, drop_last=True, state=loader.state(), position=taken)
    assert [ids_of(again) for _ in range(3)] == [epochs[0][taken:], *epochs[1:]]


def test_a_state_of_the_epochs_end_that_was_saved_before_its_rest_was_dropped(index):
    """As it was saved by versions that dropped the rest when they were asked for more."""
    reference = own(index, drop_last=True)
    epochs = [ids_of(reference) for _ in range(2)]
    loader = own(index, drop_last=True)
    loader.start()
    for _ in range(len(loader)):
        next(loader._dali)
    again = own(index, drop_last=True, state=loader.state(), position=len(loader))
    assert [ids_of(again) for _ in range(2)] == [[], epochs[1]]
