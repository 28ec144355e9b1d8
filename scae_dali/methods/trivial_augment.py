"""TrivialAugment (Müller and Hutter, ICCV 2021): one operation, of any strength."""

from nvidia.dali.auto_aug.trivial_augment import get_trivial_augment_wide_suite

from scae_dali.config import TrivialAugmentConfig as Config
from scae_dali.methods import policy
from scae_dali.methods.base import Run

__all__ = ["Config", "Method"]


class Method(policy.Policy):
    """TrivialAugmentWide, as nvidia.dali.auto_aug.trivial_augment has it."""

    def __init__(self, config: Config, run: Run) -> None:
        suite = get_trivial_augment_wide_suite(**policy.translation(config))
        super().__init__(config, run, [suite], config.bins)
