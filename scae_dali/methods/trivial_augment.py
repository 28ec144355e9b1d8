"""TrivialAugment (Müller and Hutter, ICCV 2021): one operation, of any strength."""

from dataclasses import dataclass

from nvidia.dali.auto_aug.trivial_augment import get_trivial_augment_wide_suite

from scae_dali.checks import check
from scae_dali.methods import policy
from scae_dali.methods.base import Run

__all__ = ["Config", "Method"]


@dataclass(frozen=True, kw_only=True)
class Config(policy.PolicyConfig):
    """TrivialAugmentWide (Müller and Hutter, ICCV 2021).

    The paper translates by up to 32 pixels on CIFAR and on ImageNet.

    Args:
        bins: Number of magnitudes, one of which is drawn for each image.
    """

    bins: int = 31
    max_translate_rel: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.bins >= 1, f"bins must be at least 1, got {self.bins}; usual is 31")


class Method(policy.Policy):
    """TrivialAugmentWide, as nvidia.dali.auto_aug.trivial_augment has it."""

    def __init__(self, config: Config, run: Run) -> None:
        suite = get_trivial_augment_wide_suite(**policy.translation(config))
        super().__init__(config, run, [suite], config.bins)
