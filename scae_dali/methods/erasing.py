"""Shared by the methods that erase: what a region is filled with, and DALI operators that do it."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from nvidia.dali import fn, types

from scae_dali.checks import check_choice
from scae_dali.methods import base
from scae_dali.methods.base import DataNode, Kind, Run, Samples
from scae_dali.plan.random import Stream, derive

Fill = Literal["mean", "zero", "color", "noise", "above_mean"]
# The code of Random Erasing's authors writes CIFAR-10's mean, in [0, 1], into images that are
# normalised already. So it is a number of standard deviations.
ABOVE_MEAN = (0.4914, 0.4822, 0.4465)


@dataclass(frozen=True, kw_only=True)
class ErasingConfig(base.Config):
    """The settings of a method that erases, whatever the shape.

    Args:
        fill: What is erased is filled with this: `mean` of the data set, `zero` (black), `color`
            (one random colour an image), `noise` (normal, with the data set's mean and deviation,
            drawn anew for each pixel) or `above_mean` (0.4914, 0.4822 and 0.4465 standard
            deviations above the mean, as in the code of Random Erasing's authors).
    """

    fill: Fill = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("fill", self.fill, get_args(Fill))


class Erasing(base.Method):
    """Erases a region of some of the samples, each with a probability of its own.

    A subclass says how likely a sample is erased (`_prob`), which regions are erased (`_regions`,
    which a subclass for their shape has), and how DALI erases them (`apply`).
    """

    kinds: tuple[Kind, ...] = ("erase",)
    config: Any  # an ErasingConfig

    def __init__(self, config: Any, run: Run) -> None:
        super().__init__(config, run)
        if config.fill == "color":
            if not run.grey_levels:
                raise ValueError(
                    f"mean must be in grey levels where fill is color, got {run.mean}; erase "
                    "before the normalisation, or pass another fill"
                )
            self.fields = {"color": 3}

    def plan(self, samples: Samples) -> dict[str, np.ndarray]:
        plan = self._regions(samples, self._prob(samples))
        if self.config.fill == "color":  # in grey levels
            plan["color"] = 255 * samples.draw(self.run, Stream.COLOR, 3)
        return plan

    def _prob(self, samples: Samples) -> np.ndarray:
        """The probability that a sample is erased, float64 [B]."""
        return np.full(len(samples.ids), float(self.config.prob))

    def _regions(self, samples: Samples, prob: np.ndarray) -> dict[str, np.ndarray]:
        """The plan's `status`, and what it says of the regions. prob: float64 [B]."""
        raise NotImplementedError


def erase_boxes(images: DataNode, plan: Any, run: Run, config: ErasingConfig) -> DataNode:
    """Eq. 1: fill the plan's `box`. images: HWC with 3 channels, CPU or GPU. A box of no area
    leaves an image as it is."""
    if config.fill not in ("color", "noise") and plan.fill_boxes(
        images, fill_value(plan, run, config)
    ):
        return images
    anchor = plan.part("box", types.FLOAT, slice(0, 2))
    shape = plan.part("box", types.FLOAT, slice(2, 4))
    return erase_rectangles(images, anchor, shape, plan, run, config)


def erase_rectangles(
    images: DataNode, anchor: DataNode, shape: DataNode, plan: Any, run: Run, config: ErasingConfig
) -> DataNode:
    """Fill any number of rectangles of an image. anchor, shape: float32 [2n], y and x in turns."""
    where = {"anchor": anchor, "shape": shape, "axis_names": "HW"}
    if config.fill == "noise":
        # fn.erase fills with one value a channel: here it cuts a mask.
        keep = fn.erase(images * 0 + 1, fill_value=0, **where)
        return fill_where(images, keep, plan, run, config)
    return fn.erase(images, fill_value=fill_value(plan, run, config), **where)


def fill_where(
    images: DataNode, keep: DataNode, plan: Any, run: Run, config: ErasingConfig
) -> DataNode:
    """images where keep is 1, filled where it is 0. keep: of their shape, any type."""
    if config.fill == "noise":
        value = fn.random.normal(keep, dtype=types.FLOAT, seed=derive(run.seed, "noise"))
        std, mean = (types.Constant(v, device=images.device) for v in (run.std, run.mean))
        value = value * std + mean
    elif config.fill == "color":
        value = fill_value(plan, run, config)
        value = value if images.device == "cpu" else value.gpu()
    else:
        value = types.Constant(fill_value(plan, run, config), device=images.device)
    return fn.cast_like(images * keep + value * (1 - keep), images)


def fill_value(plan: Any, run: Run, config: ErasingConfig) -> Any:
    """What to fill with, one value a channel, for every fill but noise."""
    if config.fill == "color":
        return plan.part("color", types.FLOAT)
    if config.fill == "zero":
        return (0.0, 0.0, 0.0)
    value: tuple[float, ...] = run.mean
    if config.fill == "above_mean":
        # DALI's AutoGraph, which reads this in a pipeline with conditionals, knows no strict zip.
        value = tuple(run.mean[c] + ABOVE_MEAN[c] * run.std[c] for c in range(3))
    # fn.erase truncates to the type of the images: round what is meant for bytes.
    return tuple(min(round(v), 255) for v in value) if run.grey_levels else value
