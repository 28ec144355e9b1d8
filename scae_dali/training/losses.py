"""The loss: cross-entropy against mixed labels, for balanced data and for long tails.

Logit adjustment is that of Menon et al. (2021). With τ = 1 it is Balanced Softmax (Ren et al.,
2020). Label-aware smoothing is that of MiSLAS (Zhong et al., 2021). Class-balanced weights are
those of Cui et al. (2019), from an epoch on if wanted (deferred re-weighting; Cao et al., 2019).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from scae_dali.checks import check
from scae_dali.plan.schedule import frequency


def mixed_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    partners: Tensor,
    mu: Tensor,
    label_smoothing: float | Tensor = 0.0,
    *,
    weight: Tensor | None = None,
    adjustment: Tensor | np.ndarray | None = None,
    mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Mean of μ·CE(label) + (1 - μ)·CE(partner), which is CE against the mixed label.

    logits: float [B, K]. labels, partners: int64 [B] or, as DALI gives them, [B, 1], on any device.
    mu: float32 of the same shape, in [0, 1]; 1 leaves the label as it is. label_smoothing: ε in
    [0, 1], or float32 [K], one a class. weight: float32 [K] of class weights; None: all 1.
    adjustment: float [K], added to the logits of every image, see `logit_adjustment`; None: 0.
    Returns a float32 scalar. Raises ValueError for an adjustment of another shape.

    CE(y) = (1 - ε_y)·(-log p_y) + ε_y·mean_k(-log p_k), with the ε of the class itself. With
    weights, the sum of μ·w_y·CE(y) + (1 - μ)·w_j·CE(j) is divided by that of μ·w_y + (1 - μ)·w_j.
    So a sample's weight acts on its smoothed part too; torch.nn.functional.cross_entropy, which
    weights that part's terms by their own classes k, is the same only without smoothing.

    mean_over_ranks: gives the mean of a scalar over the processes that share a batch. With weights,
    the divisor is then this mean, so that the mean of the processes' gradients is the gradient of
    the whole batch. None: this process is alone.
    """
    if adjustment is not None:
        added = torch.as_tensor(adjustment, dtype=torch.float32, device=logits.device)
        check(
            added.shape == logits.shape[1:],
            f"adjustment must be [{logits.shape[1]}], one for each class, got {[*added.shape]}: "
            "make it by logit_adjustment of the class counts",
        )
        logits = logits.float() + added
    log_p = logits.log_softmax(1, dtype=torch.float32)
    labels, partners, mu = (t.to(logits.device).reshape(-1) for t in (labels, partners, mu))
    classes = torch.stack([labels, partners], 1)  # [B, 2], like all that follows
    share = torch.stack([mu, 1 - mu], 1)
    loss = -log_p.gather(1, classes)
    if isinstance(label_smoothing, Tensor):
        eps = label_smoothing.to(logits.device)[classes]
        loss = torch.lerp(loss, -log_p.mean(1, keepdim=True), eps)
    elif label_smoothing:
        loss = torch.lerp(loss, -log_p.mean(1, keepdim=True), label_smoothing)
    if weight is None:
        return (share * loss).sum() / len(logits)
    share = share * weight.to(logits.device)[classes]
    total = share.sum()
    if mean_over_ranks is not None:
        total = mean_over_ranks(total)
    return (share * loss).sum() / total


def logit_adjustment(class_counts, tau: float = 1.0) -> np.ndarray:
    """Menon et al. (2021), eq. 10: τ·log π_k, where π_k = n_k / Σn is the share of class k.

    class_counts: int [K]. Returns float64 [K]. A class without samples gets the value of the
    smallest class that has some, since log 0 is not finite. Raises ValueError for other counts, and
    for a tau that is not finite.
    """
    check(math.isfinite(tau), f"tau must be finite, got {tau}; 1 is Balanced Softmax")
    f = frequency(class_counts)
    smallest = f[f > 0].min()
    return tau * np.log(np.maximum(f, smallest) / f.sum())


def class_balanced_weights(class_counts, beta: float = 0.9999) -> np.ndarray:
    """Cui et al. (2019): w_k = (1 - β)/(1 - β^n_k), scaled to a mean of 1.

    class_counts: int [K]. beta: in [0, 1); 0 weighs all classes alike, 1 would be 1/n_k. Returns
    float64 [K] of sum K. A class without samples gets 0 and does not count: the sum is then the
    number of the others. Raises ValueError for other counts or beta.
    """
    check(0 <= beta < 1, f"beta must be in [0, 1), got {beta}; the paper's is 0.9999")
    present = frequency(class_counts) > 0
    counts = np.asarray(class_counts)[present]
    weights = np.zeros(len(present))
    # 1 - β^n without the cancellation near β = 1; the numerator goes with the scale.
    weights[present] = -1 / np.expm1(counts * (math.log(beta) if beta else -math.inf))
    return weights * (present.sum() / weights.sum())


def label_aware_smoothing(class_counts, head: float, tail: float) -> np.ndarray:
    """MiSLAS, concave form: ε_k = tail + (head - tail)·sin(π/2 · (n_k - n_K)/(n_1 - n_K)).

    class_counts: int [K]; n_1 is the largest and n_K the smallest that is not 0 (ε is `tail` at 0
    too). head, tail: ε of those two, in [0, 1). Returns float64 [K]; all `head` where the classes
    are equally large. Raises ValueError for other counts.
    """
    f = frequency(class_counts)
    low = f[f > 0].min()
    if low == 1:
        return np.where(f > 0, head, tail)
    return tail + (head - tail) * np.sin(np.pi / 2 * (f - low).clip(0) / (1 - low))


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss: cross-entropy against the mixed labels.

    Args:
        logit_adjust: τ of logit adjustment (Menon et al., ICLR 2021), which adds τ·log π to the
            logits in training, where π is the share of each class. 1 is Balanced Softmax (Ren et
            al., NeurIPS 2020). 0 adds nothing.
        label_smoothing: Share of the label, from 0 to below 1, that is spread over all classes.
        smoothing_head: Label-aware smoothing (MiSLAS), instead of label_smoothing: the share for
            the largest class, from 0 to below 1.
        smoothing_tail: The share for the smallest class in label-aware smoothing. For classes in
            between, the share follows a sine of their size.
        class_balanced: β of class-balanced weights in the loss (Cui et al., CVPR 2019), who take
            0.9999. 0 weighs all classes alike.
        defer: Epoch from which the class-balanced weights act (deferred re-weighting).
    """

    logit_adjust: float = 0.0
    label_smoothing: float = 0.0
    smoothing_head: float | None = None
    smoothing_tail: float | None = None
    class_balanced: float = 0.0
    defer: int = 0

    def __post_init__(self) -> None:
        check(
            0 <= self.logit_adjust < math.inf,
            f"loss.logit_adjust must be at least 0 and finite, got {self.logit_adjust}; 1 is "
            "Balanced Softmax, 0 adjusts nothing",
        )
        for name in ("label_smoothing", "smoothing_head", "smoothing_tail", "class_balanced"):
            value = getattr(self, name)
            check(value is None or 0 <= value < 1, f"loss.{name} must be in [0, 1), got {value}")
        check(
            (self.smoothing_head is None) == (self.smoothing_tail is None),
            "loss.smoothing_head and loss.smoothing_tail go together, got "
            f"{self.smoothing_head} and {self.smoothing_tail}: give both or neither",
        )
        check(
            self.smoothing_head is None or self.label_smoothing == 0,
            "loss.label_smoothing must be 0 beside loss.smoothing_head and loss.smoothing_tail, "
            f"got {self.label_smoothing}: they set the smoothing of every class",
        )
        check(self.defer >= 0, f"loss.defer must be an epoch >= 0, got {self.defer}")
        check(
            self.defer == 0 or self.class_balanced > 0,
            f"loss.defer={self.defer} defers the class-balanced weights, got "
            "loss.class_balanced=0: set it (0.9999 in its paper), or leave defer at 0",
        )


class Loss:
    """The loss of a training run, by epoch.

        loss = Loss(config, index.class_counts, device, mean_over_ranks=ranks.mean)
        criterion = loss.at(epoch)
        criterion(logits, labels, partners, mu)

    class_counts: int [K] of the training data. The tensors are made once, here, on `device`.
    mean_over_ranks: see `mixed_cross_entropy`. With it, every rank calls the criterion with its
    part of each batch, and the mean of their losses is the loss of the whole batch. Raises
    ValueError for counts that are negative or all 0.
    """

    def __init__(
        self,
        config: LossConfig,
        class_counts,
        device: torch.device | str,
        *,
        mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.config = config
        self.smoothing: float | Tensor = config.label_smoothing
        self.weight: Tensor | None = None
        self.adjustment: Tensor | None = None
        self.mean_over_ranks = mean_over_ranks

        def tensor(values: np.ndarray) -> Tensor:
            return torch.as_tensor(values, dtype=torch.float32, device=device)

        if config.logit_adjust:
            self.adjustment = tensor(logit_adjustment(class_counts, config.logit_adjust))
        if config.smoothing_head is not None and config.smoothing_tail is not None:
            head, tail = config.smoothing_head, config.smoothing_tail
            self.smoothing = tensor(label_aware_smoothing(class_counts, head, tail))
        if config.class_balanced:
            self.weight = tensor(class_balanced_weights(class_counts, config.class_balanced))

    def at(self, epoch: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """This epoch's `mixed_cross_entropy`, as a function of (logits, labels, partners, mu)."""
        return partial(
            mixed_cross_entropy,
            label_smoothing=self.smoothing,
            weight=self.weight if epoch >= self.config.defer else None,
            adjustment=self.adjustment,
            mean_over_ranks=self.mean_over_ranks,
        )
