"""Feeds a DALI pipeline in an `Order`, and checks that a stage counts the same epochs."""

from collections.abc import Callable
from typing import Any

from nvidia.dali import fn

from scae_dali.checks import check
from scae_dali.data.index import ImageIndex
from scae_dali.methods.base import DataNode
from scae_dali.plan.order import ID, Order
from scae_dali.stage.stage import Stage


def feed(source: Callable[[Any], Any], layout: str = "") -> DataNode:
    """A node fed by source(info), which makes the batch of the number info.iteration. A checkpoint
    of the pipeline restores that number."""
    return fn.external_source(
        source=lambda info: source(info), batch=True, batch_info=True, layout=layout
    )


def read_in_order(index: ImageIndex, order: Order) -> tuple[DataNode, DataNode]:
    """Encoded files in this order, and their keys, int64 [1] (see `Order.keys`)."""

    def paths(info):
        return index.encoded_paths((order.keys(info.iteration) & ID).tolist())

    keys = feed(lambda info: order.keys(info.iteration)[:, None])
    return fn.io.file.read(feed(paths)), keys


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
