"""Shared by the methods that look at saliency maps: fetching them, and what is wrong with them."""

import numpy as np

from scae_dali.methods.base import Run, Status
from scae_dali.plan import region


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


def peaks(
    ids: np.ndarray,
    window: np.ndarray,
    size_px: np.ndarray,
    flip: np.ndarray,
    otherwise: np.ndarray,
    run: Run,
) -> tuple[np.ndarray, np.ndarray]:
    """The most salient pixels of crops, int64 [n, 2], (y, x), and status as `maps` gives it.

    ids: int64 [n]. window, size_px: of the crops, see region.draw_centre. flip: bool [n], whether
    a crop is turned left to right. otherwise: int64 [n, 2], pixels for the crops that have no map,
    or show nothing of what is salient.
    """
    saliency, known, status = maps(ids, run)
    peak, height = region.peak(saliency, window, size_px)
    peak[:, 1] = np.where(flip, size_px[:, 1] - 1 - peak[:, 1], peak[:, 1])
    return np.where((known & (height > 0))[:, None], peak, otherwise), status
