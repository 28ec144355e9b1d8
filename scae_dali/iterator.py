"""From a DALI pipeline to torch batches, epoch by epoch, with a state that can be saved."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from nvidia.dali import Pipeline
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from scae_dali.dataset import ImageIndex


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch on the pipeline's device.

    images: float [B, 3, H, W], channels-last in memory where the pipeline gives NHWC.
    labels, partners: int64 [B], classes of the sample and of the one mixed into it.
    mu: float32 [B], the weight of `labels`. ids: int64 [B], places in the index.
    status: int64 [B] of methods.Status. boxes: float32 [B, 4], (y, x, h, w) in pixels before the
    flip.
    """

    images: torch.Tensor
    labels: torch.Tensor
    partners: torch.Tensor
    mu: torch.Tensor
    ids: torch.Tensor
    status: torch.Tensor
    boxes: torch.Tensor


class Loader:
    """Iterates over a pipeline whose reader is named "Reader", one epoch a `for` loop.

    outputs: the pipeline's, by the names `images`, `id` and, where it has them, `label`, `partner`,
    `mu`, `status`, `box`. last_batch: `drop` an incomplete batch, or give it `partial`; the
    samples that pad a shard never appear.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        outputs: Sequence[str],
        index: ImageIndex,
        *,
        last_batch: Literal["drop", "partial"],
    ) -> None:
        policy = {"drop": LastBatchPolicy.DROP, "partial": LastBatchPolicy.PARTIAL}[last_batch]
        self._index = index
        self._labels = torch.from_numpy(index.labels.copy())
        self._dali = _run(
            index,
            lambda: DALIGenericIterator(
                [pipeline],
                list(outputs),
                reader_name="Reader",
                last_batch_policy=policy,
                auto_reset=True,
            ),
        )

    def __len__(self) -> int:
        """Batches a whole epoch."""
        return len(self._dali)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of an epoch, or what is left of it after a restored state."""
        batches = iter(self._dali)
        while True:
            try:
                (out,) = _run(self._index, batches.__next__)
            except StopIteration:
                return
            yield self._batch(out)

    def state(self) -> bytes:
        """The pipeline's state after the last batch given; see `checkpoint` of the pipelines."""
        return self._dali.checkpoints()[0]

    def _batch(self, out: dict[str, torch.Tensor]) -> Batch:
        images = out["images"]
        if images.shape[1] != 3:
            images = images.permute(0, 3, 1, 2)
        n, device = len(images), images.device
        ids = out["id"].long().reshape(n)
        if "label" in out:
            labels = out["label"].reshape(n)
        else:
            labels = self._labels[ids.cpu()]
        move = {"device": device, "non_blocking": True}
        labels = labels.to(**move)
        return Batch(
            images=images,
            labels=labels,
            partners=out["partner"].reshape(n).to(**move) if "partner" in out else labels,
            mu=out["mu"].reshape(n).to(**move) if "mu" in out else torch.ones(n, device=device),
            ids=ids,
            status=out["status"].reshape(n) if "status" in out else torch.zeros_like(ids),
            boxes=out["box"] if "box" in out else torch.zeros(n, 4),
        )


class ImageError(RuntimeError):
    """An image that DALI could not read or decode."""


def _run(index, step):
    try:
        return step()
    except RuntimeError as error:
        raise ImageError(_explain(index, str(error))) from error


def _explain(index, message):
    return message
