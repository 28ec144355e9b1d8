"""The metrics of a validation: accuracy overall, by class, and of classes with many or few images;
and the calibration error.

Sums stay on the device until the end of a validation.
"""

import sys

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from scae_dali.training.ranks import Ranks

BINS = 15  # of confidence
FEW, MANY = 20, 100  # Liu et al. 2019: few has less, many has more training images, medium the rest


def shots(class_counts: np.ndarray) -> dict[str, np.ndarray]:
    """Which classes have many, medium and few training images, bool [K] each.

    class_counts: int64 [K].
    """
    many, few = class_counts > MANY, class_counts < FEW
    return {"many": many, "medium": ~many & ~few, "few": few}


class Evaluation:
    """The metrics of one validation: update() with every batch, then compute().

    class_counts: int64 [K], images of each class in the TRAINING set. Raises ValueError.
    """

    def __init__(self, class_counts: ArrayLike, device: torch.device | str) -> None:
        counts = np.asarray(class_counts)
        if counts.ndim != 1 or counts.size == 0 or counts.min() < 0:
            raise ValueError(
                f"class_counts must be [K] with no negative entry, got {counts!r}; "
                "ImageIndex.class_counts of the training set gives it"
            )
        self._groups = {f"val_{name}": group for name, group in shots(counts).items()}
        self._classes = torch.arange(len(counts), device=device)
        self._bounds = torch.linspace(0, 1, BINS + 1, device=device)[1:-1]
        # Rows: samples, those right by the best class, those right by one of the 5 best.
        self._sums = torch.zeros(3, len(counts), dtype=torch.float64, device=device)
        self._infinite = torch.zeros((), dtype=torch.float64, device=device)  # samples
        # Hits minus confidence: |accuracy - mean confidence| of a bin, times its samples.
        self._gaps = torch.zeros(BINS, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch, without waiting for the device.

        logits: float [B, K]. labels: int64 [B]. Raises ValueError on other shapes.
        """
        classes = len(self._classes)
        if labels.ndim != 1 or logits.shape != (len(labels), classes):
            raise ValueError(
                f"logits must be [B, {classes}] and labels [B], got {list(logits.shape)} and "
                f"{list(labels.shape)}; class_counts must be that of the network's classes"
            )
        logits = logits.float()
        self._infinite += (~logits.isfinite()).any(1).sum()
        before = self._before(logits, labels)
        first, best = (before < 1).double(), (before < min(5, classes)).double()
        self._sums.index_add_(1, labels, torch.stack([torch.ones_like(first), first, best]))
        confidence = logits.softmax(1).amax(1)
        bins = torch.bucketize(confidence, self._bounds)  # (0, 1/15], …, (14/15, 1]
        self._gaps.index_add_(0, bins, first - confidence.double())

    def compute(self, ranks: Ranks) -> dict[str, float | list[float | None]]:
        """Percent over the samples of all ranks, the same on each; every rank must call it.

        val_top1; val_top5, of the min(5, K) best; val_many, val_medium, val_few, top-1 over the
        samples of classes with > 100, 20 to 100 and < 20 training images, absent where there are
        none; val_ece, expected calibration error, L1; val_per_class, top-1 of each class, None
        where it has no sample. Raises ValueError where no rank had a sample. Notes on stderr where
        the network gave no finite logits at all: the figures then say nothing.
        """
        seen, first, best = sum(ranks.gather(self._sums.cpu().numpy()))
        gaps = sum(ranks.gather(self._gaps.cpu().numpy()))
        infinite = sum(ranks.gather(self._infinite.item()))
        if not seen.any():
            raise ValueError("update() must see a sample on some rank before compute(), got none")
        if infinite == seen.sum() and ranks.first:
            print(
                f"note: the network's outputs are not finite for any of the {infinite:.0f} "
                "validation images, so its figures say nothing: its weights or BatchNorm's "
                "averages are out of bounds, or amp's type is too small for its activations",
                file=sys.stderr,
            )
        figures = {"val_top1": first.sum() / seen.sum(), "val_top5": best.sum() / seen.sum()}
        for name, group in self._groups.items():
            if seen[group].any():
                figures[name] = first[group].sum() / seen[group].sum()
        figures["val_ece"] = np.abs(gaps).sum() / seen.sum()
        pairs = zip(first.tolist(), seen.tolist(), strict=True)
        return {
            **{name: 100 * float(value) for name, value in figures.items()},
            "val_per_class": [100 * hits / count if count else None for hits, count in pairs],
        }

    def _before(self, logits: Tensor, labels: Tensor) -> Tensor:
        """int64 [B]: how many classes come before the label's; K where its logit is NaN.

        Of equal logits, which bfloat16 has often, the first class comes first, as in argmax; topk
        leaves their order to the device.
        """
        label = labels[:, None]
        own = logits.gather(1, label)
        after = (logits < own) | ((logits == own) & (self._classes >= label))  # itself included
        return (~after).sum(1)
