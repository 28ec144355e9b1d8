"""A network run for its own sake: in evaluation mode, uncompiled, and left as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["isolated"]


@contextlib.contextmanager
def isolated(model: nn.Module, device_type: str) -> Iterator[None]:
    """Evaluation without a graph, uncompiled; the caller's state and the model's come back."""
    # Flags, not model.eval(): train() is overridden in some models, and flags may be mixed.
    modes = [(module, module.training) for module in model.modules()]
    # Weights that autocast would cache here, under no_grad, must not serve a later training step.
    autocast = torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )
    with contextlib.ExitStack() as stack:
        # The hook has to run; compiled code might keep it out, or be compiled again for it.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(autocast)
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training
