"""KeepAugment (Gong et al., CVPR 2021): augmentation that leaves what is important as it is.

Of random rectangles of one size, those whose mean saliency is above a quantile of all of theirs
are important. Mode `cut` erases one that is not (selective-cut); mode `paste` transforms the image
by RandAugment and puts back one that is, from the original (selective-paste). There is no code of
the authors. Where there is no map, or a constant one, nothing is known to be important: `cut`
erases any of the rectangles, as Random Erasing does, and `paste` puts nothing back.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from scae_dali.checks import check, check_choice, check_prob
from scae_dali.methods import guidance, paste, rand_augment
from scae_dali.methods.base import DataNode, GuidedConfig, Run, Samples, Status
from scae_dali.methods.rectangle import Rectangle, RectangleConfig
from scae_dali.plan import region
from scae_dali.plan.random import Stream

__all__ = ["Config", "Method", "importance"]

_STEPS = 2.0**20  # importance is rounded, lest the order of additions decide what is equal


@dataclass(frozen=True, kw_only=True)
class Config(GuidedConfig, RectangleConfig, rand_augment.Config):
    """KeepAugment (Gong et al., CVPR 2021), which spares what the saliency map finds important.

    Args:
        mode: `cut` erases a rectangle that is not important. `paste` applies RandAugment and puts
            an important rectangle back; `fill` then has no effect.
        prob: Probability that a rectangle is erased, or with mode=paste put back.
        tau: A rectangle is important if its mean saliency is above this quantile of random
            rectangles of its size.
        candidates: How many random rectangles the quantile is taken from.
    """

    mode: Literal["cut", "paste"] = "cut"
    prob: float = 1.0
    tau: float = 0.6
    candidates: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mode", self.mode, ("cut", "paste"))
        check_prob("prob", self.prob)
        check(0 <= self.tau <= 1, f"tau must be a quantile in [0, 1], got {self.tau}; usual is 0.6")
        check(
            2 <= self.candidates <= 256,
            f"candidates must be in [2, 256], got {self.candidates}; the default is 16",
        )


class Method(Rectangle):
    """The size of the rectangle is drawn as in Random Erasing, its position from candidates that
    qualify: for `cut` the unimportant ones, for `paste` the important ones, all equally likely.

    Mode `paste` counts as erasing too. So it combines with no method that erases, which could erase
    what was put back.
    """

    config: Config

    def __init__(self, config: Config, run: Run) -> None:
        super().__init__(config, run)
        if config.mode == "paste":
            self.kinds, self.conditional = ("policy", "erase"), True
            self._policy = rand_augment.Method(config, run)
            self.fields = {**paste.fields("kept"), **self._policy.fields}

    def plan(self, samples: Samples) -> dict[str, np.ndarray]:
        if self.config.mode == "cut":
            return super().plan(samples)
        kept = self._regions(samples, self._prob(samples))
        box = kept["box"].astype(np.int64)
        pasted = paste.plan_of("kept", box, samples.size_px)
        return self._policy.plan(samples) | pasted | {"status": kept["status"]}

    def apply(self, images: DataNode, plan: Any) -> DataNode:
        if self.config.mode == "cut":
            return super().apply(images, plan)
        return paste.paste("kept", self._policy.apply(images, plan), images, plan)

    def _locate(self, samples: Samples, hw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        b, n = len(hw), self.config.candidates
        saliency, known, status = guidance.maps(samples.ids, self.run)
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
    """The tau-quantile of each row, linear between two values: float64 [B, n] -> [B, 1]."""
    ordered = np.sort(values, axis=1)
    at = tau * (values.shape[1] - 1)
    low, high = math.floor(at), math.ceil(at)
    lower = ordered[:, low : low + 1]
    return lower + (at - low) * (ordered[:, high : high + 1] - lower)
