"""Feeds a DALI pipeline in an `Order`, and checks that a stage counts the same epochs."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn
from nvidia.dali.pipeline import do_not_convert

from scae_dali.checks import check
from scae_dali.data.archives import UInt8
from scae_dali.data.index import ImageIndex
from scae_dali.methods.base import DataNode
from scae_dali.plan.order import ID, Order
from scae_dali.stage.stage import Stage

_AHEAD = 2  # batches that are read from archives before DALI asks for them


def feed(source: Callable[[Any], Any], layout: str = "", **how: Any) -> DataNode:
    """A node fed by source(info), which makes the batch of the number info.iteration. A checkpoint
    of the pipeline restores that number. how: further arguments of fn.external_source."""
    return fn.external_source(
        source=lambda info: source(info), batch=True, batch_info=True, layout=layout, **how
    )


def read_in_order(index: ImageIndex, order: Order) -> tuple[DataNode, DataNode]:
    """Encoded images in this order, and their keys, int64 [1] (see `Order.keys`)."""
    keys = feed(lambda info: order.keys(info.iteration)[:, None])
    return read_batches(index, lambda n: order.keys(n) & ID), keys


@do_not_convert
def read_batches(index: ImageIndex, ids_of: Callable[[int], np.ndarray]) -> DataNode:
    """Encoded images of batches that are known ahead. ids_of: the number of a batch -> its samples,
    int64 [B]."""
    if index.archives is not None:
        return feed(ReadAhead(index, ids_of), no_copy=True)
    return fn.io.file.read(feed(lambda info: index.encoded_paths(ids_of(info.iteration).tolist())))


class ReadAhead:
    """Reads batches from archives, in as many threads as the pipeline has, while DALI decodes.

    Made in the definition of a pipeline, and called by it with each batch's info. ids_of: see
    read_batches; it is called in the thread that runs the pipeline.
    """

    def __init__(self, index: ImageIndex, ids_of: Callable[[int], np.ndarray]) -> None:
        pipeline = Pipeline.current()
        self._index, self._ids_of = index, ids_of
        self._threads = pipeline.num_threads
        self._pool = ThreadPoolExecutor(self._threads, "read")
        self._coming: dict[int, list[Future[list[UInt8]]]] = {}
        # DALI does not copy them: they must live until it has given out their batch.
        self._in_use: deque[list[UInt8]] = deque(maxlen=pipeline.prefetch_queue_depth + 2)

    def __call__(self, info: Any) -> list[UInt8]:
        for n in range(info.iteration, info.iteration + _AHEAD + 1):
            if n not in self._coming:
                ids, k = self._ids_of(n).tolist(), self._threads
                self._coming[n] = [self._pool.submit(self._index.read, ids[i::k]) for i in range(k)]
        parts = [future.result() for future in self._coming.pop(info.iteration)]
        batch: list[Any] = [None] * sum(map(len, parts))
        for i, part in enumerate(parts):
            batch[i :: self._threads] = part
        self._in_use.append(batch)
        return batch


def check_order(order: Order, stage: Stage, batch_size: int) -> None:
    """Raise ValueError where a stage would count other epochs than the order has.

    batch_size: the pipeline's.
    """
    sizes = order.batch_size, stage.batch_size, batch_size
    check(
        len(set(sizes)) == 1,
        f"batch_size must be the same of order, stage and pipeline, got {sizes}",
    )
    mine = order.batches, order.start_epoch
    other = stage.batches_per_epoch, stage.start_epoch
    check(
        mine == other,
        f"order and stage must agree in batches an epoch and start_epoch, got {mine} and {other}; "
        f"give the stage epoch_size={order.epoch_size} and num_shards={order.num_shards}",
    )
