"""The exponential moving average of a network's weights.

torch's `AveragedModel` holds it; how it is brought up to date is decided here, for torch's own way
moves the number of updates to the device, and so waits for the device at every step.
"""

from itertools import compress

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

_Pairs = tuple[list[Tensor], list[Tensor]]  # ours, theirs


class EMA(AveragedModel):
    """θ' <- decay·θ' + (1 - decay)·θ of parameters and buffers; integers, and the first time all,
    are copied. decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self._average = get_ema_multi_avg_fn(decay)
        # Of the model that was last taken in: to walk through modules takes longer than all else.
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
