"""Shared by the methods that look at saliency maps: fetching them, and what is wrong with them."""

import numpy as np

from scae_dali.methods.base import Run, Status


def maps(ids: np.ndarray, run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The saliency maps of samples, ids int64 [B], and which of them say anything.

    Returns Â, float64 [B, gh, gw] in [0, 1]; bool [B], whether the map is there and not constant;
    and status, int64 [B], NO_MAP where it is missing and FLAT_MAP where it is constant. Where the
    run has no cache all maps are missing, and status is 0.
    """
    if run.saliency is None:
        b = len(ids)
        return np.zeros((b, 1, 1)), np.zeros(b, np.bool_), np.zeros_like(ids)
    stored, found = run.saliency(ids)
    flat = found & (stored == stored[:, :1, :1]).all(axis=(1, 2))
    status = np.where(found, 0, int(Status.NO_MAP)) + np.where(flat, int(Status.FLAT_MAP), 0)
    return stored.astype(np.float64) / 255, found & ~flat, status
