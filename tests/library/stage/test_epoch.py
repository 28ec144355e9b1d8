"""A stage that is told the epoch: batches of any size and order, DALI Proxy."""

import os

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch.experimental import proxy
from torch.utils.data import Dataset

from scae_dali.stage.stage import Stage

SIZE = (32, 32)
EPOCHS = 4


def make(index, cache, method="scae", **keywords):
    settings = {"epochs": EPOCHS, "seed": 5, "batch_size": 1, "cache": cache} | keywords
    return Stage(index, method, **settings)


def counted(index, cache, batch_size, **keywords):
    """Rows of a stage that counts batches: {(epoch, id): row}."""
    one = make(index, cache, batch_size=batch_size, epoch_size=len(index), **keywords)
    planner = one.planner()
    ids = np.arange(len(index) // batch_size * batch_size)
    found = {}
    for epoch in range(EPOCHS):
        number = epoch * one.batches_per_epoch + ids // batch_size
        rows = planner(ids, number, np.tile(SIZE, (len(ids), 1)))
        found |= {(epoch, i): row for i, row in zip(ids.tolist(), rows, strict=True)}
    return found


def told(one, epoch, batches, *, as_node=True, batch_size=16):
    """Rows of a pipeline that gives these batches of ids, with the epoch as a node or a number.

    epoch: int, or {id: epoch}.
    """

    def epochs(ids):
        return [[epoch if isinstance(epoch, int) else epoch[i]] for i in ids]

    @pipeline_def(batch_size=batch_size, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def define():
        ids = fn.external_source(name="ids", dtype=types.INT64, ndim=1)
        node = epoch
        if as_node:
            node = fn.external_source(name="epoch", dtype=types.INT64, ndim=1)
        return one.plan(ids, size=SIZE, epoch=node).row

    pipeline = define()
    found = []
    for ids in batches:
        given = {"ids": [np.array([i]) for i in ids]}
        if as_node:
            given["epoch"] = [np.array(e) for e in epochs(ids)]
        (rows,) = pipeline.run(**given)
        found.append(np.stack([np.asarray(row) for row in rows]))
    return found


def test_a_told_epoch_gives_the_plan_of_a_counted_one(index, cache):
    wanted = counted(index, cache, 10)
    order = np.random.default_rng(0).permutation(50).tolist()
    batches = [order[:16], order[16:19], order[19:20], order[20:36]]
    for epoch in (0, 3):
        for as_node in (True, False):
            rows = told(make(index, cache), epoch, batches, as_node=as_node)
            for ids, some in zip(batches, rows, strict=True):
                np.testing.assert_array_equal(some, [wanted[epoch, i] for i in ids])


def test_samples_of_one_batch_may_be_of_different_epochs(index, cache):
    wanted = counted(index, cache, 10)
    epoch = {i: i % EPOCHS for i in range(16)}
    (rows,) = told(make(index, cache), epoch, [[*range(16)]])
    np.testing.assert_array_equal(rows, [wanted[i % EPOCHS, i] for i in range(16)])


def test_batches_of_any_size_are_mixed_within_themselves(index):
    one = make(index, None, "cutmix")
    columns = one.planner().columns
    for ids in ([*range(16)], [7, 3, 41], [9]):
        (rows,) = told(one, 2, [ids])
        source = rows[:, columns["source"].start].astype(int)
        assert sorted(source) == [*range(len(ids))]
        labels = index.labels[ids]
        np.testing.assert_array_equal(rows[:, columns["partner"].start], labels[source])
    # Another batch, or another epoch, has another permutation.
    drawn = {
        tuple(told(one, epoch, [ids])[0][:, columns["source"].start])
        for epoch, ids in ((2, [*range(16)]), (3, [*range(16)]), (2, [*range(1, 17)]))
    }
    assert len(drawn) == 3


@pytest.mark.parametrize(
    ("keywords", "epoch", "message"),
    [
        ({}, -1, "epoch must be at least 0, got -1; count from 0"),
        ({"start_epoch": 2}, 2, "start_epoch must be 0 where epoch is given, got 2: leave it out"),
        ({}, "3", "epoch must be a whole number, or a node on the CPU, got '3'"),
        ({}, 1.5, "epoch must be a whole number, or a node on the CPU, got 1.5"),
    ],
)
def test_bad_epochs_are_named(index, cache, keywords, epoch, message):
    with pytest.raises(ValueError, match=message):
        told(make(index, cache, **keywords), epoch, [[0]], as_node=False)


def test_bad_epochs_of_a_batch_are_named(index, cache):
    with pytest.raises(RuntimeError, match="epoch must be at least 0, got -2"):
        told(make(index, cache), -2, [[0, 1]])


class Files(Dataset):
    """Encoded files for a DALI server, each with its place and the epoch."""

    def __init__(self, index, server):
        self.index, self.server, self.epoch = index, server, 0

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        encoded = np.fromfile(os.path.join(self.index.root, self.index.files[i]), np.uint8)
        return self.server(encoded=encoded, ids=np.array([i]), epoch=np.array([self.epoch]))


def test_a_pytorch_loader_with_workers_and_a_partial_batch_runs_it_by_dali_proxy(index, cache):
    one = make(index, cache)

    @pipeline_def(batch_size=16, num_threads=1, device_id=None)
    def define():
        encoded = fn.external_source(name="encoded", no_copy=True)
        ids = fn.external_source(name="ids", dtype=types.INT64, ndim=1)
        epoch = fn.external_source(name="epoch", dtype=types.INT64, ndim=1)
        images = fn.resize(fn.decoders.image(encoded), size=SIZE)
        images, targets = one(images, ids, size=SIZE, epoch=epoch)
        return images, ids, *targets

    with proxy.DALIServer(define()) as server:
        files = Files(index, server.proxy)
        orders = []
        for files.epoch in range(2):
            loader = proxy.DataLoader(
                server,
                files,
                batch_size=16,
                shuffle=True,
                num_workers=2,
                multiprocessing_context="fork",  # the server's queue cannot be pickled
            )
            batches = list(loader)
            assert [len(batch[0]) for batch in batches] == [16, 16, 16, 2]
            orders.append([i for batch in batches for i in batch[1].flatten().tolist()])
            labels = [k for batch in batches for k in batch[2].flatten().tolist()]
            assert labels == index.labels[orders[-1]].tolist()
        assert orders[0] != orders[1]
        assert sorted(orders[0]) == sorted(orders[1]) == [*range(50)]


def test_class_labels_given_as_ids_are_told(index, cache):
    one = make(index, cache)
    with pytest.warns(RuntimeWarning, match="ids have a sample more than once in a batch; if they"):
        told(one, 1, [[2, 1, 0, 1, 0, 0, 2]])


def test_a_last_batch_that_is_filled_up_is_not_told(index, cache, recwarn):
    told(make(index, cache), 1, [[2, 1, 0], [7, 8, 9, 9, 9]])
    assert not [one for one in recwarn if "more than once" in str(one.message)]


def test_samples_that_come_twice_and_are_no_labels_are_not_told(index, cache, recwarn):
    """Two views of each image, say: the ids are too high for labels."""
    one = make(index, cache)
    told(one, 1, [[11, 12, 13, 14] * 2, [0, 1, 2, 40, 40, 1]])
    names = [np.frombuffer(index.files[i].encode(), np.uint8) for i in (0, 1, 0, 2)]

    @pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def define():
        return one.plan(fn.external_source(source=[names] * 9), size=SIZE, epoch=1).row

    define().run()
    assert not [one for one in recwarn if "more than once" in str(one.message)]


@pytest.mark.parametrize("epoch", [None, 2])
def test_ids_of_several_numbers_are_refused(index, cache, epoch):
    one = make(index, cache, batch_size=2)

    @pipeline_def(batch_size=2, num_threads=1, device_id=None)
    def define():
        ids = fn.external_source(source=lambda: [np.array([3, 4]), np.array([1, 2])], ndim=1)
        return one.plan(ids, size=SIZE, epoch=epoch).row

    with pytest.raises(RuntimeError, match="ids must be one integer a sample, got 2 of int64"):
        define().run()


@pytest.mark.parametrize("epoch", [torch.tensor(2), np.array(2), np.int16(2), np.uint64(2)])
def test_a_number_may_be_of_other_types(index, cache, epoch):
    ids = [*range(16)]
    (wanted,) = told(make(index, cache), 2, [ids], as_node=False)
    (rows,) = told(Told(make(index, cache), epoch), 0, [ids], as_node=False)
    np.testing.assert_array_equal(rows, wanted)


class Told:
    """A stage that is told this epoch, whatever it is given."""

    def __init__(self, one, epoch):
        self.one, self.epoch = one, epoch

    def plan(self, ids, *, epoch, **keywords):
        return self.one.plan(ids, epoch=self.epoch, **keywords)


@pytest.mark.parametrize("epoch", [True, None, np.array([2]), 2.0])
def test_what_is_no_epoch(index, cache, epoch):
    with pytest.raises(ValueError, match="epoch must be a whole number, or a node on the CPU, got"):
        make(index, cache).dynamic(None, [0], epoch)
