"""AutoAugment (Cubuk et al., CVPR 2019): one of 25 learned pairs of operations."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from nvidia.dali.auto_aug import augmentations
from nvidia.dali.auto_aug import auto_augment as policies
from nvidia.dali.auto_aug.core import Policy

from scae_dali.checks import check_choice
from scae_dali.methods import policy
from scae_dali.methods.base import Run, Samples
from scae_dali.plan.random import Stream

__all__ = ["Config", "Method"]


Learned = Literal["image_net", "reduced_image_net", "reduced_cifar10", "svhn", "cifar10"]


@dataclass(frozen=True, kw_only=True)
class Config(policy.PolicyConfig):
    """AutoAugment (Cubuk et al., CVPR 2019).

    The paper translates by up to 150 of 331 pixels.

    Args:
        policy: The data set that the policy was learned on. `reduced_cifar10` and `cifar10` have
            the same operations. Those of `reduced_cifar10` are as strong as in DALI, and those of
            `cifar10` as in most code for CIFAR.
    """

    policy: Learned = "image_net"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("policy", self.policy, get_args(Learned))


def cifar10_policy(**size: Any) -> Policy:
    """The sub-policies of CIFAR-10 with the magnitudes of DeepVoltaire's AutoAugment, which most
    code for CIFAR uses, and of torchvision.

    Magnitude k is k/9 of a range; DALI's policy has k/10. Brightness, colour, contrast and
    sharpness are changed by up to 0.9 in either direction; DALI's factors go from 0.1 to 1.9. With
    a larger magnitude more pixels are solarised, and fewer bits are left, from 8 down to 4; in
    DALI's policy fewer pixels are solarised, and more bits are left, from 1 up to 4. size: see
    policy.translation.
    """
    learned = policies.get_reduced_cifar10_policy(**size)
    enhance = (augmentations.brightness, augmentations.color, augmentations.contrast)
    bits = augmentations.posterize.augmentation((8, 4))
    others = (augmentations.sharpness, augmentations.solarize, bits)
    own = {operation.name: operation for operation in (*enhance, *others)}
    subs = [
        [(own.get(operation.name, operation), *how) for operation, *how in sub]
        for sub in learned.sub_policies
    ]
    return Policy("Cifar10Policy", 10, subs)


class Method(policy.Policy):
    """Applies one sub-policy, drawn uniformly, and its operations with their probabilities there.

    The policies are those of nvidia.dali.auto_aug.auto_augment, and `cifar10_policy`.
    """

    def __init__(self, config: Config, run: Run) -> None:
        make = getattr(policies, f"get_{config.policy}_policy", cifar10_policy)
        # This one translates nothing.
        size = {} if config.policy == "reduced_image_net" else policy.translation(config)
        learned = make(**size)
        subs = learned.sub_policies
        length = max(map(len, subs))
        # For each sub-policy and level: the operation, its probability, its magnitude.
        self._op = np.zeros((len(subs), length))
        self._prob = np.zeros((len(subs), length))
        self._bin = np.zeros((len(subs), length))
        levels = []
        for k in range(length):
            there = {s: sub[k] for s, sub in enumerate(subs) if k < len(sub)}
            # The last one stands for an operation that is not applied.
            level = [*dict.fromkeys(op for op, _, _ in there.values()), augmentations.identity]
            for s, (op, prob, magnitude) in there.items():
                self._op[s, k], self._prob[s, k] = level.index(op), prob
                self._bin[s, k] = magnitude or 0  # None: the operation has no magnitude
            levels.append(level)
        super().__init__(config, run, levels, learned.num_magnitude_bins)

    def plan(self, samples: Samples) -> dict[str, np.ndarray]:
        u = samples.draw(self.run, Stream.POLICY, 1 + 2 * len(self.levels))
        sub = np.floor(u[:, 0] * len(self._op)).astype(np.int64)
        plan = {"status": np.zeros_like(samples.ids)}
        for k, level in enumerate(self.levels):
            applied = u[:, 1 + 2 * k] < self._prob[sub, k]
            plan[f"op{k}"] = np.where(applied, self._op[sub, k], len(level) - 1.0)
            plan[f"sign{k}"] = np.floor(2 * u[:, 2 + 2 * k])
            plan[f"bin{k}"] = self._bin[sub, k]
        return plan
