"""The training pipeline: random resized crop, the method's erasing, flip, normalisation.

A sample's augmentation depends on (seed, epoch, id) alone; the order of an epoch on (seed, epoch).
"""

from nvidia.dali import Pipeline, fn, pipeline_def, types

from pipelines.config import ExecConfig, ImageConfig
from pipelines.images import decode_crop, normalise, read_shuffled
from scae_dali.ops import Stage

OUTPUTS = ("images", "plan")


def train_pipeline(
    stage: Stage,
    image: ImageConfig,
    run: ExecConfig,
    *,
    seed: int,
    checkpoint: bytes | None = None,
) -> Pipeline:
    """A pipeline that yields OUTPUTS for every sample of stage.index, shuffled each epoch.

    images: float [3, S, S] or [S, S, 3]. plan: float64 [K], see planner; the Loader takes it apart.
    checkpoint: what a pipeline of the same arguments gave as its state.
    """

    @pipeline_def(enable_checkpointing=True, **run.arguments())
    def define():
        encoded, ids = read_shuffled(stage.index, run, seed)
        plan = stage.plan(
            ids,
            size=(image.size, image.size),
            shapes=fn.peek_image_shape(encoded),
            random_crop=image.crop,
        )
        start, shape = plan.part("start", types.INT32), plan.part("shape", types.INT32)
        images = decode_crop(encoded, start, shape, image, run)
        images = stage.apply(images, plan)
        flip = plan.part("flip", types.INT32)
        return normalise(images, image, mirror=flip), plan.row

    return define(checkpoint=checkpoint)
