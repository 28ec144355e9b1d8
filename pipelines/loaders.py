"""The batches of a run: which pipeline serves which data, from files or from memory."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from pipelines import arrays, saliency, train, val
from pipelines.config import ExecConfig, ImageConfig
from pipelines.data import Data
from scae_dali.data.broken import of_training, of_validation
from scae_dali.plan.order import Order, Sampling
from scae_dali.stage.loader import ImageError, Loader
from scae_dali.stage.stage import Stage

T = TypeVar("T")


class TrainLoader(Loader):
    """A Loader whose errors tell what to do about files of training."""

    remedy = staticmethod(of_training)

    def _run(self, step: Callable[[], T]) -> T:
        try:
            return super()._run(step)
        except ImageError as error:
            raise ImageError(self.remedy(str(error))) from error


class ValLoader(TrainLoader):
    """The same for files of validation."""

    remedy = staticmethod(of_validation)


class Loaders:
    """Makes the loaders of `data`. sampling, seed: of the training's order."""

    def __init__(self, data: Data, image: ImageConfig, *, sampling: Sampling, seed: int) -> None:
        self._data, self._image, self._sampling, self._seed = data, image, sampling, seed

    def train(
        self, stage: Stage, run: ExecConfig, *, checkpoint: bytes | None = None, position: int = 0
    ) -> Loader:
        """checkpoint: the state of an earlier loader. position: batches of the epoch it gave."""
        index, pixels = self._data.train, self._data.train_pixels
        order = None
        if pixels is not None or self._sampling != "shuffle":
            order = self._order(index.labels, run, self._sampling)
        if pixels is None:
            pipeline = train.train_pipeline(
                stage, self._image, run, seed=self._seed, order=order, checkpoint=checkpoint
            )
        else:
            assert order is not None
            pipeline = arrays.train_pipeline(
                stage, pixels, order, self._image, run, checkpoint=checkpoint
            )
        return TrainLoader(
            pipeline, train.OUTPUTS, index, drop_last=True, position=position, order=order
        )

    def val(self, run: ExecConfig) -> Loader:
        index, pixels = self._data.val, self._data.val_pixels
        order = None
        if pixels is None:
            pipeline = val.val_pipeline(index, self._image, run)
        else:
            order = self._order(index.labels, run, "in_turn")
            pipeline = arrays.whole_pipeline(pixels, self._image, run, order, stretch=False)
        return ValLoader(pipeline, val.OUTPUTS, index, drop_last=False, order=order)

    def saliency(self, image: ImageConfig, run: ExecConfig, ids: Sequence[int]) -> Loader:
        """These samples of the training set, in this order, as whole images."""
        index, pixels = self._data.train, self._data.train_pixels
        order = None
        if pixels is None:
            pipeline = saliency.saliency_pipeline(index, image, run, ids)
        else:
            order = self._order(index.labels[np.asarray(ids)], run, "in_turn")
            pipeline = arrays.whole_pipeline(pixels, image, run, order, ids, stretch=True)
        return TrainLoader(pipeline, saliency.OUTPUTS, index, drop_last=False, order=order)

    def _order(self, labels: np.ndarray, run: ExecConfig, sampling: Sampling) -> Order:
        return Order(
            labels,
            batch_size=run.batch_size,
            seed=self._seed,
            sampling=sampling,
            shard=run.shard,
            num_shards=run.num_shards,
        )
