"""RandAugment (Cubuk et al., NeurIPS 2020): n operations in a row, all of one strength."""

from dataclasses import dataclass

from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite

from scae_dali.checks import check
from scae_dali.methods import policy
from scae_dali.methods.base import Run

__all__ = ["Config", "Method"]


@dataclass(frozen=True, kw_only=True)
class Config(policy.PolicyConfig):
    """RandAugment (Cubuk et al., NeurIPS 2020).

    Args:
        n: How many operations are applied to an image, one after the other.
        m: Magnitude of the operations, from 0 to bins - 1.
        bins: Number of magnitudes that m chooses from.
    """

    n: int = 2
    m: int = 9
    bins: int = 31

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.n <= 16, f"n must be in [1, 16] operations, got {self.n}; usual is 2")
        check(
            0 <= self.m < self.bins,
            f"m must be in [0, {self.bins}), a magnitude of as many bins, got {self.m}; usual is 9",
        )


class Method(policy.Policy):
    """RandAugment as nvidia.dali.auto_aug has it: a larger m makes every operation stronger."""

    def __init__(self, config: Config, run: Run) -> None:
        suite = get_rand_augment_suite(**policy.translation(config))
        super().__init__(config, run, [suite] * config.n, config.bins, config.m)
