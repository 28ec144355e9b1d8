"""The check that a training has not diverged: its loss and all that is saved must be finite.

A step that GradScaler leaves out for infinite gradients changes nothing, and is no divergence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from scae_dali.training.ranks import Ranks


def sound(nets: Iterable[nn.Module], optimizer: torch.optim.Optimizer) -> Tensor:
    """Whether weights, averages of BatchNorm and momentum are finite: float64 [1], 1 or 0.

    It stays on their device, which is not waited for.
    """
    values = [value for net in nets for value in _kept(net)]
    # Adam counts its steps on the host, in numbers that are always finite.
    values += [
        v
        for state in optimizer.state_dict()["state"].values()  # timm's Lookahead has its own .state
        for v in state.values()
        if torch.is_tensor(v) and v.ndim
    ]
    values = [value.detach() for value in values if value.is_floating_point() and value.numel()]
    largest = torch._foreach_norm(values, ord=math.inf)  # no finite value makes this norm overflow
    return torch.stack([one.isfinite() for one in largest]).all().double()[None]


def check_finite(ranks: Ranks, loss: float, kept: bool, where: str) -> None:
    """Raise ValueError in every rank where one has a loss, or what it keeps, that is not finite.

    loss: summed over some steps. kept: whether what these steps left is finite, see `sound`. where:
    the steps, for the message.
    """
    for rank, (value, finite) in enumerate(ranks.gather((loss, kept))):
        if math.isfinite(value) and finite:
            continue
        what = "weights are not finite" if math.isfinite(value) else f"loss is {value}"
        of = f" in rank {rank}" if ranks.world > 1 else ""
        raise ValueError(
            f"the run has diverged: the {what}{of} {where}. Nothing of these steps is kept, and "
            "what was saved before them is. Settings cannot change within a run: start anew in "
            "another --out with a lower --optim.lr, a longer --optim.warmup_epochs, or, where amp "
            "is fp16, --amp bf16 or none"
        )


def _kept(net: nn.Module) -> Iterator[Tensor]:
    yield from net.parameters()
    for name, value in net.named_buffers():
        if name.endswith(("running_mean", "running_var")):  # others may hold -inf, as masks do
            yield value
