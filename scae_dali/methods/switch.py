"""One of two methods that mix within the batch, chosen for each batch: `mixup|cutmix`.

timm's Mixup does so with its switch_prob, and torchvision's recipes by RandomChoice of MixUp and
CutMix. The choice is a function of (seed, iteration) alone, so all ranks make the same one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scae_dali.checks import check_prob
from scae_dali.methods import base, batch
from scae_dali.methods.base import DataNode, Kind, Run, Samples
from scae_dali.plan.random import Stream, uniforms

__all__ = ["SWITCHED", "Config", "Method"]

# What can be joined by |.
SWITCHED = ("mixup", "cutmix", "saliency_mix")


@dataclass(frozen=True, kw_only=True)
class Config(base.Config):
    """The choice between the two methods.

    Args:
        switch_prob: Probability that a batch is mixed by the second of the two methods.
    """

    switch_prob: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_prob("switch_prob", self.switch_prob)


class Method(base.Method):
    """Mixes a whole batch by the second of two methods with probability `switch_prob`, and
    otherwise by the first. Each mixes as it does alone.

    methods: the two by name, both of SWITCHED.
    """

    kinds: tuple[Kind, ...] = ("mix",)
    config: Config

    def __init__(self, config: Config, run: Run, methods: Mapping[str, batch.BatchMix]) -> None:
        super().__init__(config, run)
        self.methods = methods
        self.fields = {key: n for method in methods.values() for key, n in method.fields.items()}

    def plan(self, samples: Samples) -> dict[str, np.ndarray]:
        # Where `per` is `batch`, batch.draw takes the first DRAWS of these numbers.
        n = batch.DRAWS + 1
        u = uniforms(self.run.seed, Stream.BATCH_MIX, samples.iteration, 0 * samples.place, n)
        second = u[:, -1] < self.config.switch_prob
        first, other = self.methods.values()
        plan, more = first.plan_where(samples, ~second), other.plan_where(samples, second)
        for key, value in more.items():
            if key in plan:
                wide = second[:, None] if value.ndim > 1 else second
                value = np.where(wide, value, plan[key])
            plan[key] = value
        return plan

    def apply(self, images: DataNode, plan: Any) -> DataNode:
        others = batch.partner_images(images, plan)
        # CutMix and SaliencyMix paste alike. MixUp comes last, since it returns float images.
        paste = next(method for name, method in self.methods.items() if name != "mixup")
        images = paste.mix(images, others, plan)
        if "mixup" in self.methods:
            images = self.methods["mixup"].mix(images, others, plan)
        return images
