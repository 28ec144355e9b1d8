"""Encoded images of batches that are known ahead: from files, and read ahead from archives."""

import os

import numpy as np
import pytest
from nvidia.dali import pipeline_def
from packs import pack_tars

from scae_dali.data.index import DatasetError, ImageIndex
from scae_dali.plan.order import Order
from scae_dali.stage import feed

BATCH = 8


@pytest.fixture
def packed(index, tmp_path):
    return ImageIndex.from_webdataset(pack_tars(index, tmp_path), tmp_path)


def read(index, ids_of, threads=3, **settings):
    @pipeline_def(
        batch_size=BATCH, num_threads=threads, device_id=None, enable_checkpointing=True, **settings
    )
    def define():
        return feed.read_batches(index, ids_of)

    return define


def given(pipeline, batches):
    """The bytes of every sample of so many batches."""
    out = []
    for _ in range(batches):
        (encoded,) = pipeline.run()
        out += [np.asarray(encoded.at(k)).tobytes() for k in range(BATCH)]
    return out


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_the_bytes_of_each_sample_come_in_its_place(index, packed, threads):
    order = Order(index.labels, batch_size=BATCH, seed=1)
    wanted = [index.read([i])[0].tobytes() for n in range(20) for i in order.keys(n)]
    for of in (index, packed):
        assert given(read(of, order.keys, threads)(), 20) == wanted


def test_it_goes_on_where_it_was_left(index, packed):
    order = Order(index.labels, batch_size=BATCH, seed=1)
    define = read(packed, order.keys)
    first = define()
    seen = given(first, 5)
    state = first.checkpoint()
    whole = given(read(packed, order.keys)(), 12)
    assert seen == whole[: 5 * BATCH]
    assert given(define(checkpoint=state), 7) == whole[5 * BATCH :]


def test_every_batch_is_asked_for_once_and_in_order(packed):
    asked = []

    def ids_of(n):
        asked.append(n)
        return np.arange(n, n + BATCH) % 50

    given(read(packed, ids_of)(), 10)
    assert asked == list(range(len(asked)))
    assert 10 + feed._AHEAD <= len(asked) <= 10 + feed._AHEAD + 4


def test_an_archive_that_changes_is_told_in_its_own_words(packed, tmp_path):
    pipeline = read(packed, lambda n: np.arange(BATCH))()
    os.utime(tmp_path / "train-0000.tar", (1, 1))
    with pytest.raises(DatasetError, match=r"train-0000.tar' has changed since it was indexed"):
        pipeline.run()
