"""SaliencyMix (Uddin et al., ICLR 2021): CutMix whose box lies on the partner's most salient pixel.

The authors' code reads normalised floats as bytes, so that its peak is anywhere, and has one box
for the whole batch: that is the preset `official`. `paper` takes the map of each partner.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np

from scae_dali.checks import check_choice
from scae_dali.methods import cutmix, guidance
from scae_dali.methods.base import GuidedConfig, Run, Samples

__all__ = ["Config", "Method"]


@dataclass(frozen=True, kw_only=True)
class Config(cutmix.Config, GuidedConfig):
    """SaliencyMix (Uddin et al., ICLR 2021), which pastes what is salient in the other image.

    Args:
        preset: `paper` centres the box on the peak of the second image's map. `official` does what
            the authors' code does: one box for the whole batch, centred anywhere; `per` is ignored.
    """

    prob: float = 0.5
    preset: Literal["paper", "official"] = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("preset", self.preset, ("paper", "official"))

    @property
    def guided(self) -> bool:
        return self.preset == "paper"


class Method(cutmix.Method):
    """CutMix. With the preset `paper`, the box is centred at the largest saliency of the partner's
    crop, and pasted at the same position. Without a map, and where the crop shows nothing salient,
    it is CutMix's box.
    """

    def __init__(self, config: Config, run: Run) -> None:
        self._guided = config.guided
        if config.preset == "official":
            config = dataclasses.replace(config, per="batch")
        super().__init__(config, run)

    def _centre(
        self, samples: Samples, rows: np.ndarray, mixed: np.ndarray, uniform: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        status = np.zeros_like(samples.ids)
        if not self._guided:
            return uniform, status
        chosen = np.flatnonzero(mixed)
        second = samples.take(rows[chosen])
        turned = second.flip != samples.flip[chosen]
        centre = uniform.copy()
        centre[chosen], status[chosen] = guidance.peaks(
            second.ids, second.window, second.size_px, turned, uniform[chosen], self.run
        )
        return centre, status
