"""The metrics of a validation: accuracy overall, by class, and of classes with many or few images;
and the calibration error.
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

    class_counts: int64 [K], images of each class in the TRAINING set. adjustment: float [K]. If it
    is given, there is a second set of metrics, for which it is subtracted from the logits (post-hoc
    logit adjustment; Menon et al., 2021, eq. 9). Raises ValueError.
    """

    def __init__(
        self,
        class_counts: ArrayLike,
        device: torch.device | str,
        adjustment: ArrayLike | None = None,
    ) -> None:
        counts = np.asarray(class_counts)
        if counts.ndim != 1 or counts.size == 0 or counts.min() < 0:
            raise ValueError(
                f"class_counts must be [K] with no negative entry, got {counts!r}; "
                "ImageIndex.class_counts of the training set gives it"
            )
        self._groups = shots(counts)
        self._classes = torch.arange(len(counts), device=device)
        self._bounds = torch.linspace(0, 1, BINS + 1, device=device)[1:-1]
        self._tallies = {"": _Tally(len(counts), device)}
        if adjustment is not None:
            self._adjustment = torch.as_tensor(adjustment, dtype=torch.float32, device=device)
            self._tallies["_adjusted"] = _Tally(len(counts), device)
        self._infinite = torch.zeros((), dtype=torch.float64, device=device)  # samples

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
        for name, tally in self._tallies.items():
            self._add(tally, logits - self._adjustment if name else logits, labels)

    def compute(self, ranks: Ranks) -> dict[str, float | list[float | None]]:
        """Percent over the samples of all ranks, the same on each; every rank must call it.

        val_top1; val_top5, of the min(5, K) best; val_many, val_medium, val_few, top-1 over the
        samples of classes with > 100, 20 to 100 and < 20 training images, absent where there are
        none; val_ece, expected calibration error, L1; val_per_class, top-1 of each class, None
        where it has no sample. The second set has the same names with `_adjusted` at the end.

        Raises ValueError where no rank had a sample. Notes on stderr where the network gave no
        finite logits at all: the figures then say nothing.
        """
        infinite = sum(ranks.gather(self._infinite.cpu().numpy()))
        sums = {
            name: [sum(ranks.gather(one.cpu().numpy())) for one in (tally.counts, tally.gaps)]
            for name, tally in self._tallies.items()
        }
        samples = sums[""][0][0].sum()
        if not samples:
            raise ValueError("update() must see a sample on some rank before compute(), got none")
        if infinite == samples and ranks.first:
            print(
                f"note: the network's outputs are not finite for any of the {infinite:.0f} "
                "validation images, so its figures say nothing: its weights or BatchNorm's "
                "averages are out of bounds, or amp's type is too small for its activations",
                file=sys.stderr,
            )
        return {
            f"val_{key}{name}": value
            for name, (counts, gaps) in sums.items()
            for key, value in self._figures(counts, gaps).items()
        }

    def _add(self, tally: "_Tally", logits: Tensor, labels: Tensor) -> None:
        before = self._before(logits, labels)
        first, best = (before < 1).double(), (before < min(5, len(self._classes))).double()
        tally.counts.index_add_(1, labels, torch.stack([torch.ones_like(first), first, best]))
        confidence = logits.softmax(1).amax(1)
        bins = torch.bucketize(confidence, self._bounds)  # (0, 1/15], …, (14/15, 1]
        tally.gaps.index_add_(0, bins, first - confidence.double())

    def _figures(
        self, counts: np.ndarray, gaps: np.ndarray
    ) -> dict[str, float | list[float | None]]:
        seen, first, best = counts
        figures = {"top1": first.sum() / seen.sum(), "top5": best.sum() / seen.sum()}
        for name, group in self._groups.items():
            if seen[group].any():
                figures[name] = first[group].sum() / seen[group].sum()
        figures["ece"] = np.abs(gaps).sum() / seen.sum()
        pairs = zip(first.tolist(), seen.tolist(), strict=True)
        return {
            **{name: 100 * float(value) for name, value in figures.items()},
            "per_class": [100 * hits / count if count else None for hits, count in pairs],
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


class _Tally:
    """The sums that one set of metrics is made of. They stay on the device until compute().

    counts: float64 [3, K]. Its rows count samples, those whose best class is right, and those that
    have the right class among the 5 best. gaps: float64 [BINS], the sum of hits minus confidence,
    whose absolute value is |accuracy - mean confidence| of a bin, times its samples.
    """

    def __init__(self, classes: int, device: torch.device | str) -> None:
        self.counts = torch.zeros(3, classes, dtype=torch.float64, device=device)
        self.gaps = torch.zeros(BINS, dtype=torch.float64, device=device)
