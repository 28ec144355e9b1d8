"""Losses of the recipes."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def mixed_cross_entropy(
    logits: Tensor, labels: Tensor, partners: Tensor, mu: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Mean of μ·CE(label) + (1 - μ)·CE(partner), which is CE against the mixed label.

    logits: float [B, K]. labels, partners: int64 [B] or, as DALI gives them, [B, 1], on any device.
    mu: float32 alike, in [0, 1]; 1 leaves the label as it is. Returns a float32 scalar.
    """
    logits = logits.float()
    labels, partners, mu = (t.to(logits.device).reshape(-1) for t in (labels, partners, mu))
    own = cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    other = cross_entropy(logits, partners, reduction="none", label_smoothing=label_smoothing)
    return torch.lerp(other, own, mu).mean()
