"""The pipeline of the saliency pass: the whole upright image, stretched to a square."""

from collections.abc import Sequence

from nvidia.dali import Pipeline, fn, pipeline_def

from pipelines.config import ExecConfig, ImageConfig
from pipelines.images import decode, normalise, read
from scae_dali.data.index import ImageIndex

OUTPUTS = ("images", "id")


def saliency_pipeline(
    index: ImageIndex, image: ImageConfig, run: ExecConfig, ids: Sequence[int] | None = None
) -> Pipeline:
    """A pipeline that yields these samples (None: all) once, in order.

    The aspect ratio is not kept: the map then covers the full frame.
    """

    @pipeline_def(**run.arguments())
    def define():
        encoded, sample_ids = read(index, run, ids)
        images = fn.resize(decode(encoded, run), size=(image.size, image.size))
        return normalise(images, image), sample_ids

    return define()
