"""RandAugment (Cubuk et al., NeurIPS 2020): n operations in a row, all of one strength."""

from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite

from scae_dali.config import RandAugmentConfig as Config
from scae_dali.methods import policy
from scae_dali.methods.base import Run

__all__ = ["Config", "Method"]


class Method(policy.Policy):
    """As nvidia.dali.auto_aug.rand_augment: stronger with the magnitude, for every operation."""

    def __init__(self, config: Config, run: Run) -> None:
        suite = get_rand_augment_suite(**policy.translation(config))
        super().__init__(config, run, [suite] * config.n, config.bins, config.m)
