"""Training from memory: batches as in training from files, in the order of an `Order`."""

from nvidia.dali import Pipeline, pipeline_def

from pipelines.config import ExecConfig, ImageConfig
from pipelines.files import augmented
from scae_dali.data.pixels import ArrayImages
from scae_dali.plan.order import Order
from scae_dali.stage.memory import FedPlan, check_memory
from scae_dali.stage.stage import Stage


def train_pipeline(
    stage: Stage,
    images: ArrayImages,
    order: Order,
    image: ImageConfig,
    execution: ExecConfig,
    *,
    checkpoint: bytes | None = None,
) -> Pipeline:
    """A pipeline that yields files.OUTPUTS for the samples of `order`.

    images: those of stage.index. checkpoint: the state that a pipeline of the same arguments gave.
    Raises ValueError where images are mixed that are not cropped in memory, see check_memory.
    """
    size = (image.size, image.size)
    check_memory(stage, order, images, size=size, crop=image.crop, batch_size=execution.batch_size)

    @pipeline_def(
        enable_checkpointing=True, enable_conditionals=stage.conditional, **execution.arguments()
    )
    def define():
        plan = FedPlan(stage, order, images, size=size, crop=image.crop)
        return augmented(stage, plan.images, plan, image)

    return define(checkpoint=checkpoint)
