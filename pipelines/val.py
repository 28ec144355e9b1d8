"""The validation pipeline: shorter side to `val_resize`, central crop of `size`, normalisation."""

from nvidia.dali import Pipeline, fn, pipeline_def

from pipelines.config import ExecConfig, ImageConfig
from pipelines.images import decode, normalise, read
from scae_dali.data.index import ImageIndex

OUTPUTS = ("images", "id")


def val_pipeline(index: ImageIndex, image: ImageConfig, run: ExecConfig) -> Pipeline:
    """A pipeline that yields every sample once, in order: images as in training, id int32 [1]."""

    @pipeline_def(**run.arguments())
    def define():
        encoded, ids = read(index, run)
        images = fn.resize(decode(encoded, run), mode="not_smaller", size=image.val_resize)
        return normalise(images, image, crop=(image.size, image.size)), ids

    return define()
