"""What pictures of the erasing show of eq. 4."""

from __future__ import annotations

from typing import Any

import numpy as np

from scae_dali.plan.region import saliency_at

__all__ = ["weights"]


def weights(
    saliency: np.ndarray, window: Any, full_px: Any, size_px: tuple[int, int], lam: float
) -> np.ndarray:
    """exp(λ·Â) of eq. 4 over the pixels of a crop, float64 [H, W].

    saliency: float [gh, gw] over the full frame. window: the crop (y, x, h, w), and full_px: (h, w)
    of the upright image, both in its pixels. size_px: (H, W) of the crop as the network sees it.
    """
    share = np.asarray(window) / np.tile(full_px, 2)
    axis_window = np.stack([share[:2], share[2:] / size_px], axis=1)[None]
    pixels = np.indices(size_px).reshape(2, -1).T[None]  # [1, H·W, 2]
    return np.exp(lam * saliency_at(saliency[None], pixels, axis_window)[0]).reshape(size_px)
