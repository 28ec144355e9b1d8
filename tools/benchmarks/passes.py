"""Measures the parts of a saliency pass: its pipeline, plain inference on it, and the pass."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from pipelines.config import ExecConfig, ImageConfig
from pipelines.loaders import Loaders
from scae_dali.cache import SaliencyCache
from scae_dali.data.index import ImageIndex
from scae_dali.saliency.gradcam import GradCAM
from scae_dali.saliency.refresh import refresh_cache
from scae_dali.stage.loader import Batch
from tools.common import live

__all__ = ["Passes"]


class Passes:
    """A network over whole images, batch by batch. Rates, in img/s, count from the first batch on,
    so without the start of the pipeline."""

    def __init__(
        self,
        net: nn.Module,
        layer: str | None,
        index: ImageIndex,
        loaders: Loaders,
        execution: ExecConfig,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        self._net, self._layer, self._index = net, layer, index
        self._loaders, self._execution, self._autocast = loaders, execution, autocast

    def pipeline(self, image: ImageConfig) -> Callable[[], float]:
        """Makes images and drops them."""
        return lambda: rate(batch.images for batch in self._batches(image))

    def inference(self, image: ImageConfig) -> Callable[[], float]:
        """Makes logits and drops them."""

        @torch.inference_mode()
        def measure() -> float:
            training = self._net.training
            self._net.eval()
            found = rate(map(self._logits, self._batches(image)))
            self._net.train(training)
            return found

        return measure

    def maps(self, image: ImageConfig, path: Path) -> Callable[[], float]:
        """Makes maps, by a whole pass into a cache at `path`."""
        grid = GradCAM(self._net, self._layer).grid(image.size)
        cache = SaliencyCache.create(path, self._index, grid=grid)
        epochs = itertools.count()

        def measure() -> float:
            begun: list[tuple[float, int]] = []  # when the first batch was made; its images

            def loader_for(ids: Sequence[int]) -> Iterator[Batch]:
                for batch in self._loaders.saliency(image, self._execution, ids):
                    yield batch
                    if not begun:
                        live.synchronize()
                        begun.append((time.perf_counter(), len(batch.images)))

            report = refresh_cache(
                self._net,
                cache,
                self._index,
                loader_for,
                epoch=next(epochs),
                layer=self._layer,
                autocast=self._autocast,
            )
            (start, first), end = begun[0], time.perf_counter()
            live.settle()
            return (report.images - first) / (end - start)

        return measure

    def _batches(self, image: ImageConfig) -> Iterator[Batch]:
        return iter(self._loaders.saliency(image, self._execution, range(len(self._index))))

    def _logits(self, batch: Batch) -> torch.Tensor:
        with self._autocast():
            return self._net(batch.images)


def rate(batches: Iterator[torch.Tensor]) -> float:
    """Returns img/s of all batches but the first, which starts the clock."""
    next(batches)
    live.synchronize()
    start = time.perf_counter()
    images = sum(map(len, batches))
    live.synchronize()
    seconds = time.perf_counter() - start
    live.settle()
    return images / seconds
