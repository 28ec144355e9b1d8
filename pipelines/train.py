"""The training pipeline: random resized crop, the method's erasing, flip, normalisation.

A sample's augmentation depends on (seed, epoch, id) alone; the order of an epoch on (seed, epoch).
"""

from dataclasses import replace
from functools import partial

from nvidia.dali import Pipeline, pipeline_def, types

from pipelines.config import ExecConfig, ImageConfig
from pipelines.images import (
    check_order,
    crop_planned,
    decode_crop,
    normalise,
    read_in_order,
    read_shuffled,
)
from scae_dali.plan.order import Order
from scae_dali.stage import partner
from scae_dali.stage.stage import Stage

OUTPUTS = ("images", "plan")


def train_pipeline(
    stage: Stage,
    image: ImageConfig,
    run: ExecConfig,
    *,
    seed: int,
    order: Order | None = None,
    checkpoint: bytes | None = None,
) -> Pipeline:
    """A pipeline that yields OUTPUTS for every sample of stage.index, shuffled each epoch, or for
    those of `order`.

    images: float [3, S, S] or [S, S, 3]. plan: float64 [K], see planner; the Loader takes it apart.
    checkpoint: what a pipeline of the same arguments gave as its state.
    """

    if order is not None:
        check_order(order, stage, run)
    fetch = partial(decode_crop, image=replace(image, decode="full"), run=run)  # see partner.Fetch

    @pipeline_def(
        enable_checkpointing=True, enable_conditionals=stage.conditional, **run.arguments()
    )
    def define():
        if order is None:
            encoded, ids = read_shuffled(stage.index, run, seed)
        else:
            encoded, ids = read_in_order(stage.index, order)
        images, plan = crop_planned(stage, encoded, ids, image, run, keyed=order is not None)
        if stage.mixes:
            images = partner.mix(images, plan, image.crop, fetch)
        images = stage.apply(images, plan)
        flip = plan.part("flip", types.INT32)
        return normalise(images, image, mirror=flip), plan.row

    return define(checkpoint=checkpoint)
