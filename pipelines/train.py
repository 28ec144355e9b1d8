"""The training pipeline: random resized crop, the method's erasing, flip, normalisation.

A sample's augmentation depends on (seed, epoch, id) alone; the order of an epoch on (seed, epoch).
"""

from nvidia.dali import Pipeline, pipeline_def, types

from pipelines.config import ExecConfig, ImageConfig
from pipelines.images import crop_planned, normalise, read_shuffled
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
        images, plan = crop_planned(stage, encoded, ids, image, run)
        images = stage.apply(images, plan)
        flip = plan.part("flip", types.INT32)
        return normalise(images, image, mirror=flip), plan.row

    return define(checkpoint=checkpoint)
