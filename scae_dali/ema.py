"""The exponential moving average of a network's weights.

torch's `AveragedModel` holds it; how it is brought up to date is decided here, for torch's own way
moves the number of updates to the device, and so waits for the device at every step.
"""

from itertools import chain

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class EMA(AveragedModel):
    """θ' <- decay·θ' + (1 - decay)·θ of parameters and buffers; integers, and the first time all,
    are copied. decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the model as it is now."""
        first = self.n_averaged == 0  # on the host
        own, new = (chain(net.parameters(), net.buffers()) for net in (self.module, model))
        averaged: list[tuple[torch.Tensor, torch.Tensor]] = []
        for old, now in zip(own, new, strict=True):
            if first or not old.is_floating_point():
                old.copy_(now)
            else:
                averaged.append((old, now))
        if averaged:
            self._average(*map(list, zip(*averaged, strict=True)), self.n_averaged)
        self.n_averaged += 1
