"""Random Erasing (Zhong et al., AAAI 2020): a rectangle anywhere in the crop, with one probability.

Area and aspect are uniform as in the paper and its code; torchvision and timm draw the aspect
log-uniform, and their settings are presets. The fill is the mean by default. The authors' code
fills with `above_mean`.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from scae_dali.checks import check_choice, check_prob
from scae_dali.methods.base import Samples
from scae_dali.methods.rectangle import Rectangle, RectangleConfig
from scae_dali.plan.region import Range

__all__ = ["PRESETS", "Config", "Method"]

Preset = Literal["official", "torchvision", "timm"]

# What other implementations have instead of the authors' settings. timm's noise is its mode
# `pixel`; torchvision's value 0 comes after the normalisation, so it is the mean.
PRESETS: dict[str, dict[str, Any]] = {
    "torchvision": {
        "area": (0.02, 0.33),
        "aspect": (0.3, 3.3),
        "aspect_law": "log",
        "tries": 10,
        "fill": "mean",
    },
    "timm": {
        "area": (0.02, 1 / 3),
        "aspect": (0.3, 1 / 0.3),
        "aspect_law": "log",
        "tries": 10,
        "fill": "noise",
    },
}


@dataclass(frozen=True, kw_only=True)
class Config(RectangleConfig):
    """Random Erasing (Zhong et al., AAAI 2020), by default with rectangles as in the authors' code.

    Args:
        prob: Probability that an image is erased.
        preset: `official` draws rectangles as the authors' code does, and fills them with the mean;
            the authors' fill is `above_mean`. `torchvision` and `timm` set area, aspect,
            aspect_law, tries and fill to those of these libraries; none of the five may then be
            given.
    """

    prob: float = 0.5
    area: Range = (0.02, 0.4)
    aspect: Range = (0.3, 3.33)
    tries: int = 100
    preset: Preset = "official"

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, get_args(Preset))
        preset = PRESETS.get(self.preset, {})
        given = {name: getattr(self, name) for name in preset}
        default = {f.name: f.default for f in fields(self) if f.name in preset}
        # A command line passes the defaults on, and a Config copied from one with the preset has
        # the preset's values: the user has set neither.
        if given not in (default, preset):
            other = ", ".join(f"{k}={v}" for k, v in given.items() if v != preset[k])
            raise ValueError(
                f"preset={self.preset} sets {', '.join(preset)}, got {other} too; leave them to "
                "the preset, or set all of them without one"
            )
        for name, value in preset.items():
            object.__setattr__(self, name, value)
        super().__post_init__()
        check_prob("prob", self.prob)


class Method(Rectangle):
    """Erase with probability `prob`, the position uniform over those that fit."""

    def _locate(self, samples: Samples, hw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._locate_anywhere(samples, hw, "inside")
