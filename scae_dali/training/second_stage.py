"""The second stage: the classifier is trained again, on the frozen features of a first stage.

cRT and LWS (Kang et al., 2020) and MiSLAS (Zhong et al., 2021) differ in which part of the
classifier is trained. Their class-balanced sampling, smoothing and schedule are the settings
`sampling`, `loss` and `optim`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # all of them, SyncBatchNorm too

from scae_dali.checks import check, check_choice, expand_home
from scae_dali.saliency.layers import classifier_of
from scae_dali.training import checkpoint
from scae_dali.training.weights import fit, is_state, unscaled


@dataclass(frozen=True, kw_only=True)
class SecondStageConfig:
    """Training the classifier again on frozen features.

    Args:
        classifier: `reset` trains a new classifier (cRT). `scale` trains only a factor for each
            class (LWS). `tune` trains the old classifier on, and a factor for each class
            (MiSLAS). null trains the whole network: no second stage.
        weights: Path of weights.pt in the folder of the first run.
        classifier_lr: The learning rate of the classifier's own weights is `optim.lr` times this.
        train_norms: Whether the BatchNorm layers of the frozen features normalise by the batch and
            update their running statistics.
    """

    classifier: Literal["reset", "scale", "tune"] | None = None
    weights: str | None = None
    classifier_lr: float = 1.0
    train_norms: bool = False

    def __post_init__(self) -> None:
        expand_home(self, "weights")
        if self.classifier is None:
            check(
                (self.weights, self.classifier_lr, self.train_norms) == (None, 1.0, False),
                "second_stage.classifier must be reset, scale or tune where other settings of "
                "second_stage are given, got None",
            )
            return
        check_choice("second_stage.classifier", self.classifier, ("reset", "scale", "tune"))
        check(
            self.weights is not None,
            "second_stage.weights must name the first stage's weights.pt, got None; train.py "
            "writes it into the run's folder at its end",
        )
        check(
            self.classifier_lr > 0,
            f"second_stage.classifier_lr must be positive, got {self.classifier_lr}",
        )
        check(
            self.classifier != "scale" or self.classifier_lr == 1,
            "second_stage.classifier=scale keeps the classifier's own weights, got classifier_lr="
            f"{self.classifier_lr}: leave it at 1, or choose tune",
        )


class ScaledLinear(nn.Module):
    """logits = scale · linear(x). Parameters: those of `linear`, and `scale` [K], 1 at first."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.scale = nn.Parameter(linear.weight.new_ones(linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """x: float [..., features] -> [..., K]."""
        return self.scale * self.linear(x)


def prepare(
    net: nn.Module, config: SecondStageConfig, num_classes: int, *, seed: int
) -> list[dict[str, Any]]:
    """Prepare `net`, in place: first stage's weights, new head, the rest frozen.

    Returns groups for an optimiser, {"params": [...], "lr_factor": float}, of all that is still
    trained. The weights may be those of another second stage: its scale is multiplied into the
    linear layer, so that a new one starts at 1. A classifier that is reset gets nn.Linear's own
    distribution, U(±1/√features), from `seed` alone.

    Raises ValueError where there are no weights, no such file or no state_dict in it, where it
    belongs to another network or number of classes, and where `net` has no linear classifier.
    """
    name, linear = classifier_of(net, num_classes)
    if isinstance(net.get_submodule(name.rpartition(".")[0]), ScaledLinear):
        name = name.rpartition(".")[0]
        net.set_submodule(name, linear)
    _load(net, name, linear, config.weights)
    net.requires_grad_(False)
    if config.classifier == "reset":
        _reset(linear, seed)
        groups: list[dict[str, Any]] = [
            {"params": [*linear.parameters()], "lr_factor": config.classifier_lr}
        ]
    else:
        head = ScaledLinear(linear)
        net.set_submodule(name, head)
        groups = [{"params": [head.scale], "lr_factor": 1.0}]
        if config.classifier == "tune":
            groups += [{"params": [*linear.parameters()], "lr_factor": config.classifier_lr}]
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    return groups


def set_train_mode(net: nn.Module, config: SecondStageConfig) -> None:
    """The net.train() of a second stage, after `prepare`: it covers what is trained, and no more.

    The frozen part is in eval mode, and so is dropout before the classifier. With `train_norms` its
    BatchNorm is in train mode, as in MiSLAS: it uses the statistics of the batch and updates the
    running ones, but keeps its weights.
    """
    net.eval()
    for module in net.modules():
        trained = any(p.requires_grad for p in module.parameters(recurse=False))
        if trained or (config.train_norms and isinstance(module, _BatchNorm)):
            module.train()


def _load(net: nn.Module, name: str, linear: nn.Linear, weights: str | None) -> None:
    """Load the first stage's weights. name: of the plain linear classifier in `net`."""
    if weights is None or not Path(weights).is_file():
        raise ValueError(
            f"second_stage.weights must be the file of a first stage's weights, got {weights!r}; "
            "train.py writes weights.pt into the run's folder at its end"
        )
    where = f"second_stage.weights {weights!r}"
    state = checkpoint.load(Path(weights))
    if not is_state(state):
        raise ValueError(
            f"{where} holds no state_dict of tensors; name a run's weights.pt, not checkpoint.pt"
        )
    state = unscaled(state, name)
    head = state.get(f"{name}.weight")
    if head is not None and head.ndim == 2 and len(head) != linear.out_features:
        raise ValueError(
            f"{where} is of {len(head)} classes and the data of {linear.out_features}; name "
            "weights trained on the same classes"
        )
    fit(
        net,
        state,
        where,
        other="set model to that of the first stage",
        infinite="its first stage has diverged; name the weights of one that has not",
    )


@torch.no_grad()
def _reset(linear: nn.Linear, seed: int) -> None:
    # Drawn on the CPU, from a generator: the same on every device, and no global state is touched.
    generator = torch.Generator().manual_seed(seed)
    bound = linear.in_features**-0.5
    for parameter in linear.parameters():
        parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
