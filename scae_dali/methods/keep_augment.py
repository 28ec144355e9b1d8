"""KeepAugment (Gong et al., CVPR 2021): augmentation that leaves what is important as it is.

Of random rectangles of one size, those whose mean saliency is above a quantile of all of theirs
are important. Mode `cut` erases one that is not (selective-cut); mode `paste` transforms the image
by RandAugment and puts one that is back, from the original (selective-paste). There is no code of
the authors. Where there is no map, or a constant one, nothing is known to be important: `cut`
erases any of the rectangles, as Random Erasing does, and `paste` puts nothing back.
"""

import math
from typing import Any

import numpy as np

from scae_dali.config import KeepAugmentConfig as Config
from scae_dali.methods import guidance, paste, rand_augment, rectangle
from scae_dali.methods.base import DataNode, Kind, Run, Samples, Status
from scae_dali.plan import region
from scae_dali.plan.random import Stream

__all__ = ["Config", "Method", "importance"]

_STEPS = 2.0**20  # of importance: the order of additions must not decide what is equal


class Method:
    """The size of the rectangle is drawn as in Random Erasing, its place among the candidates that
    are to be erased, or kept; each of these is as likely as the others.

    `paste` stands for a method that erases too: one that follows could erase what is put back.
    """

    def __init__(self, config: Config, run: Run) -> None:
        self.config = config
        self.run = run
        self.conditional = config.mode == "paste"
        self.kinds: tuple[Kind, ...] = ("erase",)
        self.fields = rectangle.fields(config, run)
        if config.mode == "paste":
            self.kinds = ("policy", "erase")
            self._policy = rand_augment.Method(config, run)
            self.fields = paste.fields("kept") | self._policy.fields

    def plan(self, samples: Samples) -> dict[str, np.ndarray]:
        status = np.zeros_like(samples.ids)
        box = np.zeros((len(samples.ids), 4))
        rows, hw, fitted = rectangle.choose(samples, self.run, self.config, self.config.prob)
        status[rows] = int(Status.NO_FIT)
        rows, hw = rows[fitted], hw[fitted]
        if len(rows):
            box[rows], status[rows] = self._place(samples.take(rows), hw)
        if self.config.mode == "cut":
            fill = rectangle.fill_fields(samples, self.run, self.config)
            return {"status": status, "box": box} | fill
        kept = paste.plan_of("kept", box.astype(np.int64), samples.size_px)
        return self._policy.plan(samples) | kept | {"status": status}

    def apply(self, images: DataNode, plan: Any) -> DataNode:
        if self.config.mode == "cut":
            return rectangle.erase(images, plan, self.run, self.config)
        return paste.paste("kept", self._policy.apply(images, plan), images, plan)

    def _place(self, samples: Samples, hw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes float64 [B, 4] and status int64 [B], for rectangles of sizes hw, int64 [B, 2]."""
        b, n = len(hw), self.config.candidates
        saliency, known, status = guidance.maps(samples, self.run)
        first, last = region.centre_range(hw, samples.size_px, "inside")
        u = samples.draw(self.run, Stream.REGION, 2 * n).reshape(b, n, 2)
        centre = region.uniform_centre(u, first[:, None, :], last[:, None, :])
        begin = centre - (hw // 2)[:, None, :]  # [B, n, 2]
        value = importance(saliency, begin, hw, samples.window, samples.size_px)
        important = (value > _quantile(value, self.config.tau)) & known[:, None]
        if self.config.mode == "cut":
            wanted, status = ~important, status + int(Status.ERASED)
        else:
            wanted = important
        chosen = np.argmax(wanted, axis=1)
        box = np.concatenate([begin[np.arange(b), chosen], hw], axis=1)
        return (box * wanted.any(axis=1)[:, None]).astype(np.float64), status


def importance(
    saliency: np.ndarray,
    begin: np.ndarray,
    hw: np.ndarray,
    window: np.ndarray,
    size_px: np.ndarray,
) -> np.ndarray:
    """The mean of Â over rectangles, exactly, as a multiple of 2⁻²⁰: float64 [B, n].

    saliency: float64 [B, gh, gw], over the full frame. begin: int64 [B, n, 2], (y, x). hw: int64
    [B, 2]. window: float64 [B, 4], the crop as shares of the full frame. size_px: int64 [B, 2].
    Â is as in region.saliency_at: bilinear, so its mean over a rectangle is w_yᵀ Â w_x, with the
    mean weight of each row and column of the map.
    """
    rows = _weights(saliency.shape[1], begin[:, :, 0], hw[:, 0], window[:, 0::2], size_px[:, 0])
    columns = _weights(saliency.shape[2], begin[:, :, 1], hw[:, 1], window[:, 1::2], size_px[:, 1])
    mean = np.sum(rows @ saliency * columns, axis=2)
    return np.round(mean * _STEPS) / _STEPS


def _weights(
    cells: int, begin: np.ndarray, length: np.ndarray, window: np.ndarray, size_px: np.ndarray
) -> np.ndarray:
    """Along one axis, the mean weight of each cell of a map: float64 [B, n, cells].

    begin: int64 [B, n]. length, size_px: int64 [B]. window: float64 [B, 2], start and extent.
    """
    # In cells, with the centre of cell k at k.
    pixel = (window[:, 1] * cells / size_px)[:, None]
    first = (window[:, 0] * cells - 0.5)[:, None] + pixel * begin
    extent = pixel * length[:, None]
    ends = np.stack([first, first + extent]).clip(-0.5, cells - 0.5)  # [2, B, n], in the image
    # Of the weight 1 - |t|, the integral; one cell more at each border repeats the outermost one.
    cell = np.arange(-1.0, cells + 1)
    t = (ends[..., None] - cell).clip(-1.0, 1.0)
    integral = t * (1 - 0.5 * np.abs(t))
    weight = (integral[1] - integral[0]) / extent[..., None]
    weight[..., 1] += weight[..., 0]
    weight[..., -2] += weight[..., -1]
    return weight[..., 1:-1]


def _quantile(values: np.ndarray, tau: float) -> np.ndarray:
    """Of each row, linear between two values: float64 [B, n] -> [B, 1]."""
    ordered = np.sort(values, axis=1)
    place = tau * (values.shape[1] - 1)
    low, high = math.floor(place), math.ceil(place)
    lower = ordered[:, low : low + 1]
    return lower + (place - low) * (ordered[:, high : high + 1] - lower)
