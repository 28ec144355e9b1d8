"""Mixed precision, of training and of saliency passes alike."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(amp: str, device: torch.device) -> AbstractContextManager:
    """The context that a network computes in. amp: none, bf16 or fp16."""
    if amp == "none":
        return nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[amp])
