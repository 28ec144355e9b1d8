"""The optimiser of a training, its learning rate by step, and the moving average of the weights."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scae_dali.checks import check, check_choice

__all__ = ["EMA", "OptimConfig"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser, SGD with momentum or one of timm.

    Args:
        name: `sgd`, or the name of an optimiser of timm, such as adamw, lamb or lion. With
            `lookahead_` before it, as in lookahead_adamw, it is wrapped in timm's Lookahead.
        clip: Largest norm of the gradient of all parameters together; a longer one is scaled down
            to it. 0 leaves gradients as they are.
        lr: Learning rate. With several processes, it is the one for their batches together.
        momentum: Momentum, above 0 and below 1. Optimisers of timm that have none leave it aside.
        nesterov: Whether the momentum of sgd is Nesterov's.
        weight_decay: Weight decay (L2); 0 is none.
        decay_norms: Whether weight decay also acts on biases and on the weights of norm layers.
        schedule: `step` multiplies the learning rate by `factor` at each of the `milestones`.
            `cosine` lowers it to `lr_min` along a cosine.
        milestones: Epochs at which schedule=step lowers the learning rate.
        factor: What schedule=step multiplies the learning rate by.
        lr_min: Learning rate at the end of schedule=cosine.
        warmup_epochs: Epochs at the start in which the learning rate rises linearly to lr.
        lr_by_epoch: Whether the learning rate stays the same within an epoch. It is then the one of
            the epoch's first step. In the warm-up it is lr * (epoch + 1) / warmup_epochs.
        ema: Keep a running average of the weights with this decay a step, from 0 to below 1, and
            validate and save the average. 0 averages nothing.
    """

    name: str = "sgd"
    clip: float = 0.0
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    decay_norms: bool = True
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[int, ...] = (30, 60, 90)
    factor: float = 0.1
    lr_min: float = 0.0
    warmup_epochs: float = 0.0
    lr_by_epoch: bool = False
    ema: float = 0.0

    def __post_init__(self) -> None:
        check(0 < self.lr < math.inf, f"optim.lr must be positive and finite, got {self.lr}")
        check(0 < self.momentum < 1, f"optim.momentum must be in (0, 1), got {self.momentum}")
        for name in ("weight_decay", "factor", "lr_min", "warmup_epochs", "clip"):
            value = getattr(self, name)
            check(
                0 <= value < math.inf, f"optim.{name} must be at least 0, got {value}, and finite"
            )
        check_choice("optim.schedule", self.schedule, ("step", "cosine"))
        check(0 <= self.ema < 1, f"optim.ema must be in [0, 1), got {self.ema}; 0 switches it off")

    def optimizer(self, trained: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
        """The optimiser. trained: groups of parameters, `{"params": […], "lr_factor": float}`.

        Raises ValueError for a name that timm does not have, and where timm is not installed.
        """
        groups: list[dict[str, Any]] = []
        for group in trained:
            decayed = [p for p in group["params"] if self.decay_norms or p.ndim > 1]
            spared = [p for p in group["params"] if not self.decay_norms and p.ndim <= 1]
            for params, weight_decay in ((decayed, self.weight_decay), (spared, 0.0)):
                groups.append({**group, "params": params, "weight_decay": weight_decay})
        if self.name.lower() == "sgd":
            fused = all(_can_be_fused(p) for group in groups for p in group["params"]) or None
            how: dict[str, Any] = {"nesterov": self.nesterov, "fused": fused}
            optimizer = torch.optim.SGD(groups, self.lr, self.momentum, **how)
            optimizer.register_load_state_dict_post_hook(partial(_fit_state, fused=fused))
            if fused:
                optimizer.register_step_pre_hook(_begin_momentum)
            return optimizer
        return self._of_timm([group for group in groups if group["params"]])

    def _of_timm(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        try:
            from timm.optim import create_optimizer_v2, list_optimizers
        except ImportError as error:
            raise ValueError(
                f"optim.name={self.name!r} needs the package timm, version 1.0 or later, which is "
                "not installed: pip install 'timm>=1.0', or take sgd"
            ) from error
        known = [str(name) for name in list_optimizers()]
        wrapped = self.name.lower().removeprefix("lookahead_")  # timm does not list these
        close = difflib.get_close_matches(wrapped, known)
        check(
            wrapped in known,
            f"optim.name must be sgd or an optimiser of timm, got {self.name!r}; did you mean "
            f"{' or '.join(close) or 'adamw'}?",
        )
        more: dict[str, Any] = {"nesterov": self.nesterov} if wrapped == "sgd" else {}
        try:
            optimizer = create_optimizer_v2(
                groups, self.name, self.lr, self.weight_decay, momentum=self.momentum, **more
            )
        except (AssertionError, ImportError) as error:  # of those that other packages bring
            raise ValueError(
                f"optim.name={self.name!r} cannot be made here ({error}); take another, such as "
                "adamw"
            ) from error
        check(
            not getattr(optimizer, "is_second_order", False),
            f"optim.name={self.name!r} needs second derivatives, which train.py does not compute; "
            "take adamw, for instance",
        )
        return optimizer

    def clip_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale the gradients, which must not be those of a scaled loss, to a norm of `clip`."""
        if self.clip:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(params, self.clip)

    def early(self, epochs: int) -> bool:
        """Whether the last milestone lies in the first half of a run of so many epochs."""
        return self.schedule == "step" and 0 < 2 * max(self.milestones, default=0) < epochs

    def lr_at(self, step: int, steps: int, epochs: int) -> float:
        """The learning rate at a step counted from the run's start, `steps` to the epoch."""
        if self.lr_by_epoch:
            step, steps = step // steps, 1
        epoch = step / steps
        if epoch < self.warmup_epochs:
            return min(self.lr, self.lr * (step + 1) / (self.warmup_epochs * steps))
        if self.schedule == "step":
            return self.lr * self.factor ** sum(epoch >= m for m in self.milestones)
        done = (epoch - self.warmup_epochs) / (epochs - self.warmup_epochs)
        return self.lr_min + (self.lr - self.lr_min) * (1 + math.cos(math.pi * done)) / 2

    def set_lr(self, optimizer: torch.optim.Optimizer, step: int, steps: int, epochs: int) -> None:
        """Give an optimiser of `optimizer` the rates of a step: `lr_at` times each `lr_factor`."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr_at(step, steps, epochs) * group["lr_factor"]


_Pairs = tuple[list[Tensor], list[Tensor]]  # ours, theirs


class EMA(AveragedModel):
    """The exponential moving average of a network, which validation and the saved weights use.

    θ' <- decay·θ' + (1 - decay)·θ for parameters and buffers. Integers are copied, and the first
    update copies all. decay: in (0, 1). torch's own update waits for the device at every step; this
    one does not.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self._average = get_ema_multi_avg_fn(decay)
        # Tensors of the model that was last taken in: finding them takes longer than all else.
        self._walked: tuple[nn.Module, _Pairs, _Pairs] | None = None

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the model as it is now."""
        if self._walked is None or self._walked[0] is not model:
            own, new = ([*net.parameters(), *net.buffers()] for net in (self.module, model))
            real = [value.is_floating_point() for value in own]
            whole = [not one for one in real]
            self._walked = (
                model,
                ([*compress(own, real)], [*compress(new, real)]),
                ([*compress(own, whole)], [*compress(new, whole)]),
            )
        _, floats, integers = self._walked
        if self.n_averaged == 0:  # on the host
            torch._foreach_copy_(*floats)
        else:
            self._average(*floats, self.n_averaged)
        if integers[0]:
            torch._foreach_copy_(*integers)
        self.n_averaged += 1


def _can_be_fused(parameter: torch.Tensor) -> bool:
    """Whether the fused kernel takes it: it walks through the memory of a tensor in one piece."""
    dense = torch.ops.aten.is_non_overlapping_and_dense(parameter)
    return parameter.is_floating_point() and bool(dense)


def _fit_state(optimizer: torch.optim.Optimizer, *, fused: bool | None) -> None:
    """Fit a state that was loaded. Those of earlier versions say that it is not fused, and would be
    slower or fail with fp16. The fused kernel would take a momentum of another memory layout for
    one of its parameter's."""
    for group in optimizer.param_groups:
        group["fused"] = fused
    for parameter, state in optimizer.state.items() if fused else ():
        momentum = state.get("momentum_buffer")
        if momentum is not None and momentum.stride() != parameter.stride():
            state["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)


def _begin_momentum(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Give a momentum of zero to what has its first gradient now: layers may be left out of a step,
    and the fused kernel needs a momentum of every parameter or of none."""
    state, none = optimizer.state, dict[str, Any]()
    without = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if state.get(parameter, none).get("momentum_buffer") is None
    ]
    for parameter in without:  # in most steps there is none
        if parameter.grad is not None:
            check(
                not parameter.grad.is_sparse,
                "optim.name=sgd takes no sparse gradients, and the parameter of shape "
                f"{tuple(parameter.shape)} has one: make its nn.Embedding with sparse=False",
            )
            state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
