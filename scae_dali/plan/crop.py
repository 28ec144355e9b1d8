"""The random crop and flip: which window of the full frame the network sees, and how.

The random numbers come in as data, so that a sample's window does not depend on its place in a
batch.
"""

import math

from scae_dali.config import CropConfig
from scae_dali.plan.random import Array, array_namespace


def draws_per_sample(config: CropConfig) -> int:
    """How many uniforms `crop_and_flip` reads a sample."""
    return 3 if config.kind == "pad" else 3 + 2 * config.tries


def crop_and_flip(u: Array, full_px: Array, config: CropConfig) -> tuple[Array, Array]:
    """Draw a window and whether to flip it.

    u: float64 [B, draws_per_sample] in (0, 1), the place, the flip, then the tries. full_px: int64
    [B, 2], (h, w) of the upright image. Returns int64 [B, 4], (y, x, h, w) in pixels of the full
    frame, and bool [B], whether to flip. A window of kind `pad` may reach over the image's border.
    """
    draw = _shifted if config.kind == "pad" else _resized
    return draw(u, full_px, config), u[:, 2] < config.flip


def _shifted(u, full_px, config):
    """The whole frame, shifted by -pad … pad pixels along each axis, all equally likely."""
    xp = array_namespace(u)
    shift = xp.astype(xp.floor(u[:, :2] * (2 * config.pad + 1)), xp.int64) - config.pad
    return xp.concat([shift, xp.astype(full_px, xp.int64)], axis=1)


def _resized(u, full_px, config):
    """Area a ~ U, aspect w/h log-uniform, and the first try that fits counts (Szegedy et al.,
    "Going deeper with convolutions", 2015, as torchvision and DALI have it). Where no try fits: the
    largest centred window whose aspect is in range.
    """
    xp = array_namespace(u)
    full = xp.astype(full_px, xp.float64)
    height, width = full[:, 0:1], full[:, 1:2]
    (a0, a1), (r0, r1) = config.area, config.aspect
    area = (a0 + (a1 - a0) * u[:, 3::2]) * height * width  # [B, tries]
    log_r0, log_r1 = math.log(r0), math.log(r1)
    aspect = xp.exp(log_r0 + (log_r1 - log_r0) * u[:, 4::2])
    h, w = xp.round(xp.sqrt(area / aspect)), xp.round(xp.sqrt(area * aspect))
    fits = (h >= 1) & (h <= height) & (w >= 1) & (w <= width)

    rows = xp.arange(u.shape[0], dtype=xp.int64, device=u.device)
    first = xp.argmax(xp.astype(fits, xp.int8), axis=1)
    some = fits[rows, first]
    height, width = height[:, 0], width[:, 0]
    fall_h = xp.minimum(xp.round(width / r0).clip(min=1), height)
    fall_w = xp.minimum(xp.round(height * r1).clip(min=1), width)
    h = xp.where(some, h[rows, first], fall_h)
    w = xp.where(some, w[rows, first], fall_w)
    y = xp.where(some, xp.floor(u[:, 0] * (height - h + 1)), xp.floor((height - h) / 2))
    x = xp.where(some, xp.floor(u[:, 1] * (width - w + 1)), xp.floor((width - w) / 2))
    return xp.astype(xp.stack([y, x, h, w], axis=1), xp.int64)
