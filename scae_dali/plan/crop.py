"""The random crop and flip: which window of the full frame the network sees, and which way round.

The random numbers are passed in, so that a sample's window does not depend on its position in a
batch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from scae_dali.checks import check, check_choice, check_prob
from scae_dali.plan.compiled import compiled


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Random crop and horizontal flip.

    Args:
        kind: `resized` crops a random window and resizes it. `pad` crops a window of the image's
            own size, shifted by up to `pad` pixels, with black outside the image.
        area: Share of the image that the window covers, drawn uniformly, for kind=resized.
        aspect: Width divided by height of the window, drawn so that its logarithm is uniform, for
            kind=resized.
        tries: How often area and aspect are drawn until the window fits into the image, for
            kind=resized.
        pad: Largest shift in pixels, for kind=pad.
        flip: Probability of a horizontal flip.
    """

    kind: Literal["resized", "pad"] = "resized"
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    tries: int = 10
    pad: int = 4
    flip: float = 0.5

    def __post_init__(self) -> None:
        check_choice("crop.kind", self.kind, ("resized", "pad"))
        check(self.pad >= 0, f"crop.pad must be >= 0 pixels, got {self.pad}")
        low, high = self.area
        check(0 < low <= high <= 1, f"crop.area must be 0 < low <= high <= 1, got {self.area}")
        low, high = self.aspect
        check(0 < low <= high, f"crop.aspect must be 0 < low <= high, got {self.aspect}")
        check(1 <= self.tries <= 100, f"crop.tries must be in [1, 100], got {self.tries}")
        check_prob("crop.flip", self.flip)


def draws_per_sample(config: CropConfig) -> int:
    """How many uniform numbers `crop_and_flip` takes for a sample."""
    return 3 if config.kind == "pad" else 3 + 2 * config.tries


def crop_and_flip(
    u: np.ndarray, full_px: np.ndarray, config: CropConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a window and whether to flip it.

    u: float64 [B, draws_per_sample] in (0, 1): two for where the window lies, one for the flip, and
    two for each try. full_px: int64 [B, 2], (h, w) of the upright image. Returns int64 [B, 4],
    (y, x, h, w) in pixels of the full frame, and bool [B], whether to flip. A window of kind `pad`
    may reach over the image's border.
    """
    draw = _shifted if config.kind == "pad" else _resized
    return draw(u, full_px, config), u[:, 2] < config.flip


def _shifted(u, full_px, config):
    """The whole frame, shifted by -pad … pad pixels along each axis, all equally likely."""
    window = np.empty((len(u), 4), np.int64)
    _fill_shifted(window, u, full_px, config.pad)
    return window


@compiled
def _fill_shifted(window, u, full_px, pad):
    """Writes what `_shifted` returns into window."""
    for i in range(len(window)):
        for axis in range(2):
            window[i, axis] = int(np.floor(u[i, axis] * (2 * pad + 1))) - pad
            window[i, 2 + axis] = int(full_px[i, axis])


def _resized(u, full_px, config):
    """A window of uniform area and log-uniform aspect w/h; the first try that fits counts (Szegedy
    et al., "Going deeper with convolutions", 2015, as in torchvision and DALI). If none fits, it is
    the largest centred window whose aspect is in range.
    """
    full = full_px.astype(np.float64)
    height, width = full[:, 0:1], full[:, 1:2]
    (a0, a1), (r0, r1) = config.area, config.aspect
    area = (a0 + (a1 - a0) * u[:, 3::2]) * height * width  # [B, tries]
    log_r0, log_r1 = math.log(r0), math.log(r1)
    aspect = np.exp(log_r0 + (log_r1 - log_r0) * u[:, 4::2])
    h, w = np.round(np.sqrt(area / aspect)), np.round(np.sqrt(area * aspect))
    fits = (h >= 1) & (h <= height) & (w >= 1) & (w <= width)

    rows = np.arange(len(u))
    first = np.argmax(fits, axis=1)
    some = fits[rows, first]
    height, width = height[:, 0], width[:, 0]
    fall_h = np.minimum(np.maximum(np.round(width / r0), 1), height)
    fall_w = np.minimum(np.maximum(np.round(height * r1), 1), width)
    h = np.where(some, h[rows, first], fall_h)
    w = np.where(some, w[rows, first], fall_w)
    y = np.where(some, np.floor(u[:, 0] * (height - h + 1)), np.floor((height - h) / 2))
    x = np.where(some, np.floor(u[:, 1] * (width - w + 1)), np.floor((width - w) / 2))
    return np.stack([y, x, h, w], axis=1).astype(np.int64)
