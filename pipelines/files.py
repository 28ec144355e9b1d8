"""Training from files or archives: random crop, the method's augmentation, flip, normalisation.

A sample's augmentation depends on (seed, epoch, id) alone, the order of an epoch on (seed, epoch).
"""

from functools import partial

from nvidia.dali import Pipeline, fn, pipeline_def, types

from pipelines.config import ExecConfig, ImageConfig
from scae_dali.data.index import ImageIndex
from scae_dali.methods.base import DataNode
from scae_dali.plan.order import Order
from scae_dali.plan.random import derive
from scae_dali.stage import partner
from scae_dali.stage.feed import check_order, read_in_order
from scae_dali.stage.images import decode_crop, normalise, read
from scae_dali.stage.stage import PlanNodes, Stage

OUTPUTS = ("images", "plan")


def train_pipeline(
    stage: Stage,
    image: ImageConfig,
    execution: ExecConfig,
    *,
    seed: int,
    order: Order | None = None,
    checkpoint: bytes | None = None,
) -> Pipeline:
    """A pipeline that yields OUTPUTS for every sample of stage.index, shuffled each epoch, or for
    those of `order`, which archives need.

    images: float [3, S, S] or [S, S, 3]. plan: float64 [K], a row of scae_dali.stage.table.
    checkpoint: the state that a pipeline of the same arguments gave.
    """

    if order is not None:
        check_order(order, stage, execution.batch_size)
    fetch = partial(
        partner.decode_crop,
        size=(image.size, image.size),
        crop=image.crop,
        device="cpu" if execution.device_id is None else "gpu",
        hw_decoder_load=execution.hw_decoder_load,
    )

    @pipeline_def(
        enable_checkpointing=True, enable_conditionals=stage.conditional, **execution.arguments()
    )
    def define():
        if order is None:
            encoded, ids = read_shuffled(stage.index, execution, seed)
        else:
            encoded, ids = read_in_order(stage.index, order)
        images, plan = crop_planned(stage, encoded, ids, image, execution, keyed=order is not None)
        if stage.mixes:
            images = partner.mix(images, plan, image.crop, fetch)
        return augmented(stage, images, plan, image)

    return define(checkpoint=checkpoint)


def read_shuffled(index: ImageIndex, execution: ExecConfig, seed: int) -> tuple[DataNode, DataNode]:
    """Encoded files and their ids, int32 [1], in another order each epoch, which depends on (seed,
    epoch) alone if the pipeline has checkpointing enabled."""
    return read(
        index,
        shard=execution.shard,
        num_shards=execution.num_shards,
        shuffle_after_epoch=True,
        shuffle_after_epoch_seed=derive(seed, "order"),
    )


def planned(
    stage: Stage, encoded: DataNode, ids: DataNode, image: ImageConfig, *, keyed: bool = False
) -> tuple[DataNode, DataNode, PlanNodes]:
    """Start and shape of the crop that the stage draws, and the stage's plan. keyed: ids are keys,
    see `Order.keys`."""
    plan = stage.plan(
        ids,
        size=(image.size, image.size),
        shapes=fn.peek_image_shape(encoded),
        random_crop=image.crop,
        keyed=keyed,
    )
    return plan.part("start", types.FLOAT), plan.part("shape", types.FLOAT), plan


def crop_planned(
    stage: Stage,
    encoded: DataNode,
    ids: DataNode,
    image: ImageConfig,
    execution: ExecConfig,
    *,
    keyed: bool = False,
) -> tuple[DataNode, PlanNodes]:
    """The crops that the stage draws, HWC uint8 and not erased yet, and the stage's whole plan."""
    start, shape, plan = planned(stage, encoded, ids, image, keyed=keyed)
    images = decode_crop(
        encoded,
        start,
        shape,
        (image.size, image.size),
        path="full" if image.crop.kind == "pad" else image.decode,  # a window may reach outside
        hw_decoder_load=execution.hw_decoder_load,
    )
    return images, plan


def augmented(
    stage: Stage, images: DataNode, plan: PlanNodes, image: ImageConfig
) -> tuple[DataNode, DataNode]:
    """OUTPUTS: the crops augmented as planned, flipped and normalised, and the plan."""
    images = stage.apply(images, plan)
    return normalise(images, **image.tensor, mirror=plan.scalar("flip", types.INT32)), plan.row
