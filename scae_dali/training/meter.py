"""Counts what an epoch did: its loss, its seconds, and what happened to its samples.

A `Meter` adds up batches, steps, passes and validation as they are done, and makes its part of the
epoch's log row.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from scae_dali.methods import Status
from scae_dali.training.ranks import Ranks

# Which values of a status have a flag: bool [flags, values].
_HAS_FLAG = np.array([[bool(value & flag) for value in range(1 << len(Status))] for flag in Status])
_FLAGS = {flag: str(flag.name).lower() for flag in Status}
_SECONDS = ("train", "data", "saliency", "plan", "val")
_SUMS = ("loss", "hits", "images", "saliency_images", "agreement", "compared")


class Meter:
    """Adds up an epoch on this rank, and the seconds of the whole run.

    sums: name -> sum over the epoch so far, on this rank. totals: name -> seconds of the epochs
    that are closed, as a mean over the ranks. A checkpoint keeps both, and `restore` takes them
    back.
    """

    def __init__(self) -> None:
        self.totals = dict.fromkeys(("train", "saliency", "plan"), 0.0)
        self.sums: dict[str, float] = {}
        self._clear()

    def restore(self, sums: Mapping[str, float], totals: Mapping[str, float]) -> None:
        """Go on from the sums and totals of a checkpoint."""
        self.sums, self.totals = dict(sums), dict(totals)

    @property
    def empty(self) -> bool:
        """Whether no image has been trained on in this epoch."""
        return not self.sums["images"]

    def add_batch(self, status: Tensor) -> None:
        """Count a batch of training. status: int64 [B] of Status, what happened to each sample."""
        self.sums["images"] += len(status)
        values = np.bincount(status.numpy(), minlength=_HAS_FLAG.shape[1])
        for flag, count in zip(Status, (_HAS_FLAG @ values).tolist(), strict=True):
            self.sums[_FLAGS[flag]] += count

    def add_wait(self, seconds: float) -> None:
        """Count a wait for a batch."""
        self.sums["data"] += seconds

    def add_steps(self, *, loss: float, hits: float, seconds: float, plan_seconds: float) -> None:
        """Count steps of training.

        loss: summed over their images. hits: images whose own label came first. seconds: of the
        steps, waits included. plan_seconds: of plans that were made meanwhile.
        """
        self.sums["loss"] += loss
        self.sums["hits"] += hits
        self.sums["train"] += seconds
        self.sums["plan"] += plan_seconds

    def add_pass(self, *, images: int, agreement: float | None, seconds: float) -> None:
        """Count a saliency pass over so many images of all ranks.

        agreement: see PassReport; None on ranks that did not compare maps.
        """
        self.sums["saliency_images"] += images
        self.sums["saliency"] += seconds
        if agreement is not None:
            self.sums["agreement"] += agreement
            self.sums["compared"] += 1

    def add_validation(self, seconds: float) -> None:
        """Count a validation."""
        self.sums["val"] += seconds

    def close_epoch(self, ranks: Ranks, guided: bool) -> dict[str, Any]:
        """The row's fields of training and of its cost, over all ranks; clears the sums.

        overhead_percent is that of the run so far: the seconds of saliency passes, and of plans if
        guided, as a share of the seconds of training. Plans are made while the network trains, so
        to count them whole gives an upper bound.
        """
        sums = ranks.sum(self.sums)
        seconds = {key: sums[key] / ranks.world for key in _SECONDS}
        seconds["step"] = seconds["train"] - seconds["data"]
        for key in self.totals:
            self.totals[key] += seconds[key]
        total = self.totals
        cost = total["saliency"] + (total["plan"] if guided else 0.0)
        self._clear()
        agreement = {}
        if sums["compared"]:  # only processes that write a cache compare maps
            agreement["saliency_agreement"] = sums["agreement"] / sums["compared"]
        return agreement | {
            "train_loss": sums["loss"] / sums["images"],
            "train_top1": 100 * sums["hits"] / sums["images"],
            "img_per_s": sums["images"] / seconds["train"],
            "seconds": {key: round(value, 3) for key, value in seconds.items()},
            "saliency_images": round(sums["saliency_images"] / ranks.world),
            "overhead_percent": 100 * cost / total["train"],
            "share": {name: sums[name] / sums["images"] for name in _FLAGS.values()},
        }

    def _clear(self) -> None:
        self.sums = dict.fromkeys((*_SUMS, *_SECONDS, *_FLAGS.values()), 0.0)
