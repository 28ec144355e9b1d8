"""How strongly and how often: eqs. 5-7 of the method, and when saliency passes are due.

All are functions of the epoch and of the class counts alone.
"""

import numpy as np


def lam(epoch, epochs: int, lam_max):
    """Eq. 5: λ(t) = λ_max · t/T. epoch: whole epochs t >= 0, int or int64 [B]; epochs: T; lam_max:
    float or float64 [B].

    Returns float64 of epoch's shape. Beyond T, where a pipeline reads ahead of the last epoch, t
    stays at T.
    """
    return lam_max * np.minimum(epoch, epochs).astype(np.float64) / epochs


def frequency(class_counts) -> np.ndarray:
    """Eq. 6: f_k = n_k / max_j n_j. class_counts: int [K] -> float64 [K] in [0, 1]."""
    counts = np.asarray(class_counts)
    if counts.ndim != 1 or counts.size == 0 or counts.min() < 0 or counts.max() == 0:
        raise ValueError(
            f"class_counts must be [K] with no negative and a positive entry, got {counts!r}; "
            "ImageIndex.class_counts gives it"
        )
    return counts / counts.max()


def erase_prob(frequency: np.ndarray, p_min: float, p_max: float, gamma: float) -> np.ndarray:
    """Eq. 7: p_k = p_min + (p_max - p_min) · f_k^γ. frequency: float64 [K] -> float64 [K]."""
    return p_min + (p_max - p_min) * frequency**gamma


def pass_epoch(epoch: int, refresh_every: int) -> int | None:
    """The epoch of the latest saliency pass that is due by `epoch`, or None where none is yet.

    Passes are due at the multiples of `refresh_every`, but for epoch 0, when there is nothing to
    see yet (and λ = 0, eq. 5); `refresh_every=0` means a cache that was built offline and is never
    refreshed.
    """
    if refresh_every == 0:
        return None
    return epoch // refresh_every * refresh_every or None
