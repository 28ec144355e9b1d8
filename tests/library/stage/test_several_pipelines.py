"""One stage in several pipelines, and the ways of defining, running and reading a pipeline."""

import os
import threading

import numpy as np
import pytest
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.auto_aug import rand_augment
from nvidia.dali.plugin.pytorch import (
    DALIClassificationIterator,
    DALIGenericIterator,
    DALIRaggedIterator,
    LastBatchPolicy,
)

from scae_dali.stage.stage import Stage

SIZE = (24, 24)
BASE = {"batch_size": 10, "num_threads": 1, "device_id": None}


def make(index, cache, **keywords):
    settings = {"epochs": 3, "batch_size": 10, "seed": 3, "p_min": 1.0, "p_max": 1.0}
    return Stage(index, "scae", cache=cache, **settings | {"mix_prob": 0.0} | keywords)


def read(index, **keywords):
    return fn.readers.file(
        files=list(index.files), file_root=index.root, name="Reader",
        shuffle_after_epoch=True, pad_last_batch=True, **keywords,
    )  # fmt: skip


def body(one, jpegs, ids):
    """Erased images, ids and targets."""
    images = fn.resize(fn.decoders.image(jpegs), size=SIZE)
    erased, targets = one(images, ids, size=SIZE)
    return erased, ids, *targets


def define(one, index, *, reader=None, **options):
    @pipeline_def(**BASE | options)
    def train():
        return body(one, *read(index, **(reader or {})))

    return train()


def taken(pipeline, batches=10):
    """What a pipeline gives in so many batches, an array for each output."""
    outputs = [[np.asarray(out.as_array()) for out in pipeline.run()] for _ in range(batches)]
    return [np.concatenate(one) for one in zip(*outputs, strict=True)]


def check_same(mine, others):
    for one, other in zip(mine, others, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def alone(index, cache):
    """Two epochs of a pipeline that has the stage to itself; all images are erased."""
    images, ids, label, *rest = taken(define(make(index, cache), index))
    assert sorted(ids[:50, 0]) == sorted(ids[50:, 0]) == [*range(50)]
    assert (label[:, 0] == index.labels[ids[:, 0]]).all()
    plain = taken(define(make(index, None, p_min=0.0, p_max=0.0), index))[0]
    assert (images != plain).any((1, 2, 3)).all()
    return images, ids, label, *rest


def test_two_pipelines_take_turns_at_one_stage(index, cache, alone):
    one = make(index, cache)
    first, second = define(one, index), define(one, index)
    parts = [(taken(first, 1), taken(second, 1)) for _ in range(10)]
    for mine in zip(*parts, strict=True):
        check_same((np.concatenate(out) for out in zip(*mine, strict=True)), alone)


def test_two_threads_run_one_stage(index, cache, alone):
    one, found = make(index, cache), {}

    def run(number, pipeline):
        found[number] = taken(pipeline)

    threads = [threading.Thread(target=run, args=(k, define(one, index))) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        check_same(found[k], alone)


def test_a_pipeline_is_made_anew(index, cache, alone):
    one = make(index, cache)
    for _ in range(2):
        check_same(taken(define(one, index)), alone)
    begun = define(one, index, enable_checkpointing=True)
    begun.build()
    early = taken(begun, 3)
    again = define(one, index, enable_checkpointing=True, checkpoint=begun.checkpoint())
    rest = taken(again, 7)
    whole = define(one, index, enable_checkpointing=True)
    check_same((np.concatenate(out) for out in zip(early, rest, strict=True)), taken(whole))


def test_one_stage_serves_a_pipeline_for_training_and_one_with_a_larger_size(index, cache):
    """The plan of each is of its own size."""
    one = make(index, cache)

    @pipeline_def(**BASE)
    def other():
        jpegs, ids = read(index)
        images = fn.resize(fn.decoders.image(jpegs), size=(48, 48))
        return one(fn.copy(images), ids, size=(48, 48))[0], images

    small, large = define(one, index), other()
    small.run()
    erased, images = taken(large, 5)
    changed = (erased != images).any(3)
    ends = [np.flatnonzero(image.any(1))[-1] for image in changed]
    assert max(ends) > 24


def test_one_iterator_reads_two_shards(index, cache, alone):
    """As several GPUs of one process were once fed."""
    one = make(index, cache, num_shards=2)
    shards = [define(one, index, reader={"shard_id": shard, "num_shards": 2}) for shard in range(2)]
    loader = DALIGenericIterator(
        shards, ["images", "id", *("label", "partner", "mu")], reader_name="Reader",
        last_batch_policy=LastBatchPolicy.PARTIAL, auto_reset=True,
    )  # fmt: skip
    for epoch in (slice(0, 50), slice(50, 100)):
        wanted = dict(zip(alone[1][epoch, 0], alone[0][epoch], strict=True))
        found = {}
        for batches in loader:
            for batch in batches:
                found |= zip(batch["id"][:, 0].tolist(), batch["images"].numpy(), strict=True)
        assert sorted(found) == [*range(50)]
        for i, image in found.items():
            np.testing.assert_array_equal(image, wanted[i])


def test_a_classification_iterator_keeps_the_labels_of_the_reader(index, cache, alone):
    one = make(index, cache)

    @pipeline_def(**BASE)
    def train():
        jpegs, labels = fn.readers.file(
            file_root=index.root, name="Reader", shuffle_after_epoch=True, pad_last_batch=True
        )
        ids = fn.get_property(jpegs, key="source_info")
        images = fn.resize(fn.decoders.image(jpegs), size=SIZE)
        return one(images, ids, size=SIZE)[0], labels

    loader = DALIClassificationIterator(train(), reader_name="Reader", auto_reset=True)
    for epoch in range(2):
        batches = [batch for (batch,) in loader]
        images, labels = (
            np.concatenate([batch[name].numpy() for batch in batches]) for name in ("data", "label")
        )
        part = slice(50 * epoch, 50 * epoch + 50)
        np.testing.assert_array_equal(labels, alone[2][part])
        np.testing.assert_array_equal(images, alone[0][part])


def test_a_ragged_iterator(index, cache, alone):
    outputs = ["images", "id", "label", "partner", "mu"]
    loader = DALIRaggedIterator(
        [define(make(index, cache), index)], outputs, reader_name="Reader", auto_reset=True
    )
    batches = [batch for (batch,) in loader]
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in batches]), alone[2][:50])


def by_class(one, index):
    class Train(Pipeline):
        def define_graph(self):
            return body(one, *read(index))

    return Train(**BASE)


def by_context(one, index):
    pipeline = Pipeline(**BASE)
    with pipeline:
        pipeline.set_outputs(*body(one, *read(index)))
    return pipeline


@pytest.mark.parametrize("way", [by_class, by_context], ids=lambda way: way.__name__)
def test_a_pipeline_is_defined_in_another_way(index, cache, alone, way):
    check_same(taken(way(make(index, cache), index)), alone)


def test_a_pipeline_is_run_step_by_step(index, cache, alone):
    pipeline = define(make(index, cache), index)
    pipeline.build()
    labels = []
    for _ in range(10):
        pipeline.schedule_run()
        labels.append(np.array(pipeline.share_outputs()[2].as_array()))
        pipeline.release_outputs()
    np.testing.assert_array_equal(np.concatenate(labels), alone[2])


@pytest.mark.parametrize(
    "options",
    [
        {"exec_dynamic": False},
        {"exec_dynamic": True, "exec_async": False},
        {"exec_pipelined": False},
        {"exec_pipelined": False, "exec_async": False},
        {"exec_async": False, "prefetch_queue_depth": 1},
        {"exec_dynamic": False, "prefetch_queue_depth": {"cpu_size": 3, "gpu_size": 2}},
        {"prefetch_queue_depth": 5},
    ],
    ids=str,
)
def test_executors_that_run_a_stage(index, cache, alone, options):
    check_same(taken(define(make(index, cache), index, **options)), alone)


@pytest.mark.parametrize(
    "options", [{}, {"exec_dynamic": False}, {"prefetch_queue_depth": 3}], ids=str
)
def test_the_executor_that_hangs_is_refused(index, cache, options):
    message = (
        "exec_async must be True where a stage is in the pipeline, got False: DALI would hang at "
        "the first batch, as with any Python operator; leave exec_async out, or pass "
        "exec_pipelined=False or prefetch_queue_depth=1 too"
    )
    with pytest.raises(ValueError, match=message):
        define(make(index, cache), index, exec_async=False, **options)


def test_a_branch_of_a_conditional_erases_its_images_alone(index, cache, alone):
    one = make(index, cache)

    @pipeline_def(**BASE, enable_conditionals=True)
    def train():
        jpegs, ids = read(index)
        images = fn.resize(fn.decoders.image(jpegs), size=SIZE)
        plain = images
        chosen = fn.random.coin_flip(seed=5, dtype=types.BOOL)
        if chosen:
            images, _ = one(images, ids, size=SIZE)
        return images, plain, ids, fn.cast(chosen, dtype=types.INT32)

    images, plain, ids, chosen = taken(train())
    np.testing.assert_array_equal(ids, alone[1])
    assert 20 < chosen.sum() < 80
    wanted = np.where(chosen.reshape(-1, 1, 1, 1) == 1, alone[0], plain)
    np.testing.assert_array_equal(images, wanted)


def test_dalis_own_policies_come_after_the_stage(index, cache, alone):
    one = make(index, cache)

    @pipeline_def(**BASE, enable_conditionals=True)
    def train():
        images, ids, *targets = body(one, *read(index))
        changed = rand_augment.rand_augment(images, n=1, m=9, shape=SIZE)
        return changed, images, ids, *targets

    changed, *rest = taken(train())
    check_same(rest, alone)
    assert (changed != rest[0]).any((1, 2, 3)).sum() > 50


class Samples:
    """50 samples an epoch, for workers in processes."""

    def __init__(self, index):
        self.index = index

    def __call__(self, sample):
        if sample.idx_in_epoch >= 50:
            raise StopIteration
        path = os.path.join(self.index.root, self.index.files[sample.idx_in_epoch])
        return np.fromfile(path, np.uint8), np.array([sample.idx_in_epoch])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_an_external_source_in_processes(index, cache):
    one = make(index, cache)

    @pipeline_def(**BASE, py_num_workers=2, py_start_method="fork")
    def train():
        jpegs, ids = fn.external_source(Samples(index), num_outputs=2, batch=False, parallel=True)
        return body(one, jpegs, ids)

    pipeline = train()
    pipeline.start_py_workers()
    pipeline.build()
    for _ in range(2):
        _, ids, label, *_ = taken(pipeline, 5)
        with pytest.raises(StopIteration):
            pipeline.run()
        pipeline.reset()
        assert ids[:, 0].tolist() == [*range(50)]
        np.testing.assert_array_equal(label[:, 0], index.labels)


def test_dali_does_not_serialise_a_python_operator(index, cache):
    """So TensorFlow's DALIDataset and Triton, which need that, cannot have a stage."""
    with pytest.raises(RuntimeError, match="Could not serialize the operator"):
        define(make(index, cache), index).serialize()
