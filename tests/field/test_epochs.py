"""Epochs that end otherwise than the stage thinks.

Who feeds a pipeline from an iterator of his own ends an epoch by StopIteration; DALI then counts
iterations from 0 again, and every epoch was planned as the first one, with λ = 0. Who forgets
num_shards or pad_last_batch, or lists more samples than his tar holds, has other epochs than the
stage. Sources: https://github.com/NVIDIA/DALI/issues/5046 and
https://github.com/NVIDIA/DALI/issues/2802 (sources that end), and
https://github.com/NVIDIA/DALI/issues/4440 and https://github.com/NVIDIA/DALI/issues/4179 (epochs of
another length than was thought).
"""

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from scae_dali.saliency.stage import SCAE, Stage

BATCH = 10


def ended(pipeline, *, epochs):
    """Outputs of whole epochs, each ended by the source: a list of batches an epoch."""
    out = []
    for _ in range(epochs):
        batches = []
        while True:
            try:
                batches.append([np.asarray(o.as_array()) for o in pipeline.run()])
            except StopIteration:
                break
        pipeline.reset()
        out.append(batches)
    return out


class Batches:
    """An iterator over batches of ids that ends, as DALI's tutorial has it."""

    def __init__(self, ids, batch):
        self.ids, self.batch = ids, batch

    def __iter__(self):
        self.at = 0
        return self

    def __next__(self):
        if self.at + self.batch > len(self.ids):
            raise StopIteration
        self.at += self.batch
        return [self.ids[self.at - self.batch : self.at, None]]


def one_by_one(info):
    """A source a sample at a time, which knows where it is."""
    if info.idx_in_epoch >= 60:
        raise StopIteration
    return np.array([info.idx_in_epoch % 50], np.int64)


def fed(stage, source, **how):
    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None)
    def define():
        ids = fn.external_source(source=source, dtype=types.INT64, **how)
        ids = ids[0] if isinstance(ids, list) else ids
        plan = stage.plan(ids, size=(24, 24))
        return plan.part("box", types.FLOAT), plan.id

    return define()


@pytest.mark.parametrize("kind", ["batches", "samples"])
def test_the_epoch_counts_on_where_a_source_ends(index, cache, kind):
    samples = 50 if kind == "batches" else 60
    stage = SCAE(index, cache, epochs=3, batch_size=BATCH, seed=3, epoch_size=samples)
    if kind == "batches":
        pipeline = fed(stage, Batches(np.arange(50), BATCH), num_outputs=1, cycle="raise")
    else:
        pipeline = fed(stage, one_by_one, batch=False)
    planner = stage.planner()
    for epoch, batches in enumerate(ended(pipeline, epochs=3)):
        assert len(batches) == stage.batches_per_epoch
        for b, (box, ids) in enumerate(batches):
            number = np.full(BATCH, epoch * stage.batches_per_epoch + b)
            rows = planner(ids[:, 0], number, np.full((BATCH, 2), 24))
            np.testing.assert_array_equal(box, rows[:, planner.columns["box"]].astype(np.float32))


def test_and_by_dalis_own_iterator(index, cache):
    """Whose auto_reset is what most people have."""
    stage = SCAE(index, cache, epochs=4, batch_size=BATCH, seed=3)
    source = Batches(np.arange(50), BATCH)
    loader = DALIGenericIterator(
        [fed(stage, source, num_outputs=1, cycle="raise")], ["box", "id"], auto_reset=True
    )
    epochs = [[out[0]["box"].numpy() for out in loader] for _ in range(4)]
    assert [len(batches) for batches in epochs] == [5] * 4
    different = {np.concatenate(batches).tobytes() for batches in epochs}
    assert len(different) == 4


def test_a_source_with_longer_epochs_than_the_stage_is_refused(index):
    stage = Stage(index, "none", epochs=3, batch_size=BATCH, seed=3)  # 5 batches an epoch
    pipeline = fed(stage, one_by_one, batch=False)  # 6 of them
    with pytest.raises(ValueError, match=r"epochs of 5 batches, .* after 6; give .*epoch_size"):
        ended(pipeline, epochs=2)


def read(stage, index, *, files=None, batch=BATCH, **reader):
    """Runs one batch of a pipeline with DALI's file reader."""

    @pipeline_def(batch_size=batch, num_threads=1, device_id=None)
    def define():
        names = list(index.files if files is None else files)
        encoded, ids = fn.readers.file(files=names, file_root=index.root, name="Mine", **reader)
        if files is not None:
            ids = fn.get_property(encoded, key="source_info")
        return stage.plan(ids, size=(24, 24)).id

    return define().run()


@pytest.mark.parametrize(
    ("files", "reader", "message"),
    [
        (50, {"num_shards": 2, "pad_last_batch": True}, "num_shards of the stage is 1, .*'Mine' 2"),
        (25, {"pad_last_batch": True}, "epochs of 50 samples, the reader 'Mine' has 25; .*epoch_s"),
        (50, {}, "pad_last_batch must be True in the reader 'Mine': its 50 samples are no whole"),
    ],
    ids=["num_shards", "half of the samples", "no padding"],
)
def test_a_reader_with_other_epochs_is_refused_at_the_first_batch(index, files, reader, message):
    stage = Stage(index, "none", epochs=3, batch_size=8, seed=3)
    listed = index.files[::2] if files == 25 else None
    with pytest.raises(RuntimeError, match=message):
        read(stage, index, files=listed, batch=8, **reader)


@pytest.mark.parametrize(
    ("stage", "reader"),
    [
        ({}, {}),  # 50 samples in batches of 10 need no padding
        ({"num_shards": 3}, {"num_shards": 3, "pad_last_batch": True}),
        ({"num_shards": 3}, {"num_shards": 3, "pad_last_batch": True, "stick_to_shard": True}),
    ],
)
def test_a_reader_with_the_same_epochs_runs(index, stage, reader):
    read(Stage(index, "none", epochs=3, batch_size=BATCH, seed=3, **stage), index, **reader)


def test_samples_that_are_left_out_on_purpose_are_told_by_epoch_size(index):
    stage = Stage(index, "none", epochs=3, batch_size=BATCH, seed=3, epoch_size=25)
    read(stage, index, files=index.files[::2], pad_last_batch=True)
