"""The batches of a run: which pipeline serves which data, from files, archives or memory."""

from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from pipelines import files, memory
from pipelines.config import ExecConfig, ImageConfig
from pipelines.data import Data
from scae_dali.data.broken import of_training, of_validation
from scae_dali.data.index import ImageIndex
from scae_dali.data.pixels import ArrayImages
from scae_dali.plan.order import EpochLength, Order, Sampling
from scae_dali.saliency.whole import whole_loader
from scae_dali.stage.loader import Loader
from scae_dali.stage.stage import Stage


class Loaders:
    """Makes the loaders of `data`. The other settings are of the order of training, see `Order`."""

    def __init__(
        self,
        data: Data,
        image: ImageConfig,
        *,
        sampling: Sampling,
        seed: int,
        epoch_length: EpochLength = "largest",
        samples_per_turn: int = 1,
    ) -> None:
        self._data, self._image, self._sampling, self._seed = data, image, sampling, seed
        self._epoch_length, self._samples_per_turn = epoch_length, samples_per_turn

    def train(
        self,
        stage: Stage,
        execution: ExecConfig,
        *,
        checkpoint: bytes | None = None,
        position: int = 0,
    ) -> Loader:
        """Augmented batches, epoch by epoch. checkpoint: the state of an earlier loader. position:
        how many batches of the epoch that loader gave."""
        index = self._data.train
        images = _images(index, self._data.train_pixels)
        order = None
        shuffled_by_dali = index.archives is None and self._sampling == "shuffle"
        if isinstance(images, ArrayImages) or not shuffled_by_dali:
            order = Order(
                index.labels,
                batch_size=execution.batch_size,
                seed=self._seed,
                sampling=self._sampling,
                epoch_length=self._epoch_length,
                samples_per_turn=self._samples_per_turn,
                shard=execution.shard,
                num_shards=execution.num_shards,
            )
        if isinstance(images, ArrayImages):
            assert order is not None
            pipeline = memory.train_pipeline(
                stage, images, order, self._image, execution, checkpoint=checkpoint
            )
        else:
            pipeline = files.train_pipeline(
                stage, self._image, execution, seed=self._seed, order=order, checkpoint=checkpoint
            )
        return Loader(
            pipeline,
            files.OUTPUTS,
            index,
            drop_last=True,
            position=position,
            order=order,
            remedy=of_training,
        )

    def val(self, execution: ExecConfig) -> Loader:
        """The central crops of all validation images."""
        images = _images(self._data.val, self._data.val_pixels)
        resize = self._image.val_resize
        return _whole(images, None, self._image, execution, resize=resize, remedy=of_validation)

    def saliency(self, image: ImageConfig, execution: ExecConfig, ids: Sequence[int]) -> Loader:
        """These samples of the training set, in this order, as whole images."""
        images = _images(self._data.train, self._data.train_pixels)
        return _whole(images, ids, image, execution, resize=None, remedy=of_training)


def _images(index: ImageIndex, pixels: npt.NDArray[np.uint8] | None) -> ImageIndex | ArrayImages:
    return index if pixels is None else ArrayImages(index, np.ascontiguousarray(pixels))


def _whole(
    images: ImageIndex | ArrayImages,
    ids: Sequence[int] | None,
    image: ImageConfig,
    execution: ExecConfig,
    *,
    resize: int | None,
    remedy: Callable[[str], str],
) -> Loader:
    return whole_loader(
        images,
        ids,
        size=image.size,
        resize=resize,
        remedy=remedy,
        **image.tensor,
        **asdict(execution),
    )
