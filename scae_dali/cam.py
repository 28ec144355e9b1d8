"""What every class activation map is made of: a layer watched, channels weighted, a map in [0, 1].

Decides which outputs of a layer are maps, how a weighted sum of channels becomes a saliency map,
and that the model is left as it was found. What a channel weighs is for `gradcam` and `scorecam`.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scae_dali.layers import find_layer, unwrap

__all__ = [
    "CAM",
    "ROUNDING",
    "SaliencyMethod",
    "as_map",
    "check_inputs",
    "isolated",
    "weighted_map",
]

# Relative; less than this is no difference between sums of float32.
ROUNDING = 4 * torch.finfo(torch.float32).eps


class SaliencyMethod(Protocol):
    """What a saliency pass needs: `CAM` is one, and a user's own need not be."""

    method: str  # recorded in the cache
    model: nn.Module  # inside its wrappers
    layer: str

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """images: float[B,3,S,S]; labels: int64[B] -> f32[B,h,w] in [0, 1], on images' device."""


class CAM(ABC):
    """Saliency maps of `model` at `layer`, a dotted module name (None: `default_layer(model)`).

    `model` may be wrapped (DataParallel, DistributedDataParallel, AveragedModel, torch.compile):
    names are those inside the wrapper, and the pass runs uncompiled. The layer must run once in
    a forward pass and give [B,C,h,w], or [B,tokens,C] of a square grid with at most one leading
    class token. F is that output as the head reads it, after any in-place operation that follows
    (an in-place ReLU, say).

    Raises ValueError for an unknown layer.
    """

    method: str

    def __init__(self, model: nn.Module, layer: str | None = None) -> None:
        self.model = unwrap(model)
        self.layer, self._module = find_layer(self.model, layer)

    @abstractmethod
    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """images: float[B,3,S,S]; labels: int64[B] -> f32[B,h,w] in [0, 1], on images' device.

        Images are what the network is trained on (normalised), in any memory format; autocast
        is the caller's. An image's map is all zero where it is constant, nowhere positive, or
        not finite, and does not depend on the rest of the batch. The model is left as it was
        found: modes, hooks, requires_grad, grad and buffers, also after an error.

        Raises ValueError for a label without a logit, logits that are not [B,classes], and a
        layer that does not run exactly once or whose output is no map.
        """

    def grid(self, size: int) -> tuple[int, int]:
        """(h, w) of the maps of images of size x size pixels; raises what a call raises."""
        maps = self(*self._blank(size))
        return maps.shape[1], maps.shape[2]

    def _blank(self, size: int) -> tuple[Tensor, Tensor]:
        """One image without content and its label."""
        parameter = next(self.model.parameters())
        images = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
        return images, torch.zeros(1, dtype=torch.int64, device=parameter.device)

    def _forward(
        self, images: Tensor, extremes: tuple[int, int], hand_on: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What `hand_on` made of the layer's output, which the head gets, and the logits."""
        handed: list[Tensor] = []

        def tap(module: nn.Module, args: Any, output: Any) -> Tensor:
            if handed:
                raise ValueError(
                    f"layer {self.layer!r} runs more than once in a forward pass; pass a layer "
                    "that runs once, such as the module that holds it"
                )
            self._check_map(output, images)
            handed.append(hand_on(output))
            return handed[0]

        handle = self._module.register_forward_hook(tap)
        try:
            output = self.model(images)
        finally:
            handle.remove()
        if not handed:
            raise ValueError(
                f"layer {self.layer!r} does not run in the forward pass of "
                f"{type(self.model).__name__}; pass another layer"
            )
        return handed[0], self._logits(output, len(images), extremes)

    def _check_map(self, output: Any, images: Tensor) -> None:
        """Raises ValueError unless the layer's output is a map of these images."""
        remedy = "pass a layer that gives [B,C,h,w], or [B,tokens,C] of a square grid"
        if not isinstance(output, Tensor):
            raise ValueError(f"layer {self.layer!r} gives a {type(output).__name__}; {remedy}")
        shape = list(output.shape)
        square = images.shape[2] == images.shape[3]
        if output.ndim == 3:
            good = _grid(shape[1]) > 0
        else:
            # A map of a square image that is not square is [B,h,w,C].
            good = output.ndim == 4 and not (square and shape[2] != shape[3])
        if not good or shape[0] != len(images) or not output.is_floating_point():
            raise ValueError(
                f"layer {self.layer!r} gives {output.dtype} {shape} for images "
                f"{list(images.shape)}, which is no feature map; {remedy}"
            )
        if shape[-2:] == [1, 1] or (output.ndim == 3 and _grid(shape[1]) == 1):
            raise ValueError(
                f"layer {self.layer!r} gives {shape} for images {list(images.shape)}: a map of "
                "one value says nothing; pass an earlier layer or larger images"
            )

    def _logits(self, output: Any, batch: int, extremes: tuple[int, int]) -> Tensor:
        """The model's output -> float[B,classes], checked against the labels' extremes."""
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != batch:
            what = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"the model must give logits [{batch},classes], or an object with such .logits; "
                f"{type(self.model).__name__} gave {what}"
            )
        classes = logits.shape[1]
        for label in extremes:
            if not 0 <= label < classes:
                raise ValueError(
                    f"labels must be 0 <= label < {classes}, the number of the model's logits, "
                    f"got {label}; the model and the labels are of different class lists"
                )
        return logits


@torch.no_grad()
def weighted_map(alpha: Tensor, features: Tensor) -> Tensor:
    """alpha: f32[B,C]; features: float[B,C,h,w] -> saliency f32[B,h,w] in [0, 1].

    A = ReLU(sum_k alpha_k F^k), then min-max per image, so that the largest value is exactly 1.
    All zero where A is constant (up to float32's rounding) or not finite. Sums are float32
    whatever the features, autocast or not.
    """
    # Not a matrix product: autocast or TF32 would round its operands.
    weighted = (alpha[:, :, None, None] * features).sum(1)  # [B,h,w], at least float32
    a = weighted.relu()
    low, high = a.amin((1, 2)), a.amax((1, 2))
    # Terms of opposite sign cancel, so rounding is relative to the terms and not to their sum.
    noise = ROUNDING * (alpha.abs() * features.abs().amax((2, 3))).sum(1)
    usable = weighted.isfinite().all(2).all(1) & (high - low > noise)
    scaled = (a - low[:, None, None]) / (high - low)[:, None, None]
    return torch.where(usable[:, None, None], scaled, 0.0).float()


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


def check_inputs(images: Tensor, labels: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """-> labels on images' device, and the smallest and the largest of them."""
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be float[B,C,S,S], got {images.dtype} {list(images.shape)}")
    integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != images.shape[:1] or not integer:
        raise ValueError(
            f"labels must be int64[{len(images)}], one an image, "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    # Read before the forward pass is queued, lest the host wait for it.
    low, high = torch.stack(labels.aminmax()).tolist() if len(labels) else (0, 0)
    return labels.to(images.device, torch.int64, non_blocking=True), (low, high)


def as_map(output: Tensor) -> Tensor:
    """[B,C,h,w], or [B,tokens,C] -> [B,C,h,w] without the class token."""
    if output.ndim == 4:
        return output
    side = _grid(output.shape[1])
    patches = output[:, output.shape[1] - side**2 :]  # [B,side*side,C]
    return patches.transpose(1, 2).unflatten(2, (side, side))


def _grid(tokens: int) -> int:
    """Side of the square grid of `tokens`, one of which may be a class token; 0: no such grid."""
    for patches in (tokens, tokens - 1):
        if patches > 0 and math.isqrt(patches) ** 2 == patches:
            return math.isqrt(patches)
    return 0
