"""What all class activation maps share: a layer is watched, its channels are weighted and summed,
and the sum is scaled to [0, 1].

All-zero maps may be right for these images, or come from a fault of the network or the layer. This
module tells which, and raises an error for a fault.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scae_dali.saliency.isolation import isolated
from scae_dali.saliency.layers import find_layer, serving_layers, unwrap
from scae_dali.saliency.layout import Layout, layout_of
from scae_dali.saliency.probe import own_tensor, probe_images, trial_images
from scae_dali.saliency.reach import logits_of, require_finite

__all__ = ["CAM", "ROUNDING", "SaliencyMethod", "check_inputs", "weighted_map"]

# Relative difference of two float32 sums below which they count as equal.
ROUNDING = 4 * torch.finfo(torch.float32).eps


class SaliencyMethod(Protocol):
    """What a saliency pass needs of a method. Every `CAM` has it; any other class may."""

    method: str  # its name, which is recorded in the cache
    model: nn.Module  # inside its wrappers
    layer: str

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """images: float[B,3,H,W]; labels: int64[B] -> f32[B,h,w] in [0, 1], on images' device."""


class CAM(ABC):
    """Saliency maps of `model` at `layer`, a dotted module name (None: `default_layer(model)`).

    `model` may be wrapped (DataParallel, DistributedDataParallel, AveragedModel, torch.compile):
    names are those inside the wrapper, and the pass runs uncompiled. The layer must run once in
    a forward pass and give maps of the images' aspect, [B,C,h,w], [B,h,w,C] or [B,tokens,C]; the
    patches' tokens may follow as many others as the model's num_prefix_tokens says, or else a class
    token.
    F is that output as the head reads it, after any in-place operation that follows (an in-place
    ReLU, say).

    Raises ValueError for an unknown layer.
    """

    method: str  # its name

    def __init__(self, model: nn.Module, layer: str | None = None) -> None:
        self.model = unwrap(model)
        self.layer, self._module = find_layer(self.model, layer)
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._channels = 0  # of the layer, once it has run
        self._sound = False  # whether a batch has shown that the layer can give maps

    @abstractmethod
    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """images: float[B,3,H,W]; labels: int64[B] -> f32[B,h,w] in [0, 1], on images' device.

        Images are what the network is trained on (normalised), in any memory format; autocast
        is the caller's. An image's map is all zero where it is constant, nowhere positive, or
        not finite, and does not depend on the rest of the batch. The model is left as it was
        found: modes, hooks, requires_grad, grad and buffers, also after an error.

        Raises ValueError for a label without a logit, logits that are not [B,classes], and a
        layer that does not run exactly once or whose output is no map. If all maps of the first
        batch are zero, it is also raised for a network or a layer that can give none: weights or
        logits that are not finite, or a layer that the logits do not depend on.
        """

    def grid(self, size: int | tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the maps of images of size x size pixels, or of (H, W).

        Raises what a call raises, except that the network may be untrained.
        """
        height, width = (size, size) if isinstance(size, int) else size
        with isolated(self.model, own_tensor(self.model).device.type):
            images = trial_images(self.model, (height, width), batch=1)
            try:
                output, logits = self._forward(images, (0, 0), lambda output: output)
            except ValueError:  # of this class, or told by the network in words
                raise
            except Exception as error:  # whatever the network's layers raise
                raise ValueError(
                    f"size must be one that {type(self.model).__name__} takes, got {height} x "
                    f"{width} pixels of {images.shape[1]} channels ({type(error).__name__}: "
                    f"{error}); give that of its training images"
                ) from error
            layout = self._layout(output, images)
            if not (output.isfinite().all() and logits.isfinite().all()):
                require_finite(self.model, infinite_buffers=False)
            self._require_use(layout, images)
        return layout.grid

    def _forward(
        self, images: Tensor, extremes: tuple[int, int], hand_on: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run the model, whose head reads `hand_on(the layer's output)`.

        Returns what the head read, and the logits.
        """
        handed: list[Tensor] = []

        def tap(module: nn.Module, args: Any, output: Any) -> Tensor:
            if handed:
                raise ValueError(
                    f"layer {self.layer!r} runs more than once in a forward pass; pass a layer "
                    "that runs once, such as the module that holds it"
                )
            self._require_features(output, images)
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

    def _require_features(self, output: Any, images: Tensor) -> None:
        """Raises ValueError unless the layer's output may be maps of these images."""
        remedy = "pass a layer that gives [B,C,h,w], [B,h,w,C] or [B,tokens,C]"
        if not isinstance(output, Tensor):
            raise ValueError(f"layer {self.layer!r} gives a {type(output).__name__}; {remedy}")
        shape = list(output.shape)
        if output.ndim < 3 or shape[0] != len(images) or not output.is_floating_point():
            raise ValueError(
                f"layer {self.layer!r} gives {output.dtype} {shape} for images "
                f"{list(images.shape)}, which is no feature map; {remedy}"
            )

    def _layout(self, output: Tensor, images: Tensor) -> Layout:
        """How the layer's output is read; raises ValueError where it is no map."""
        key = (*output.shape[1:], *images.shape[2:])
        if key not in self._layouts:
            layout = layout_of(self.layer, output.shape, images, self.model, self._module)
            if layout.grid == (1, 1):
                raise ValueError(
                    f"layer {self.layer!r} gives {list(output.shape)} for images "
                    f"{list(images.shape)}: a map of one value says nothing; pass an earlier layer "
                    "or larger images"
                )
            self._layouts[key] = layout
            self._channels = layout.maps(output).shape[1]
        return self._layouts[key]

    def _require_maps(
        self,
        maps: Tensor,
        images: Tensor,
        labels: Tensor,
        logits: Tensor,
        require_content: Callable[[], None],
        content: Tensor | None = None,
    ) -> None:
        """Raises ValueError where all maps of the first batch are zero, or all its logits not
        finite, and the images are not at fault.

        require_content: raises where what the maps were made of has no content. content: bool[],
        whether the maps say anything about the classes; None: they do where any is not zero.
        """
        # Once is enough: later batches have the same weights, and to look would wait for the GPU.
        if self._sound or not len(images):
            return
        finite = logits.isfinite()
        mapped, any_finite, scored = torch.stack(
            [
                maps.any() if content is None else content,
                finite.all(1).any(),
                finite.gather(1, labels[:, None]).any(),
            ]
        ).tolist()
        if not any_finite:
            # Some networks exclude a class by a logit of minus infinity.
            require_finite(self.model, infinite_buffers=not scored)
            if not scored:
                if not images.isfinite().flatten(1).all(1).any():
                    return  # a later batch decides
                half = logits.dtype == torch.float16
                remedy = "use float32 or bfloat16" if half else "take weights of an earlier epoch"
                raise ValueError(
                    f"the logits of {type(self.model).__name__} are not finite for any of "
                    f"{len(images)} images, though its weights are: they overflow in "
                    f"{logits.dtype}; {remedy}"
                )
        if not mapped:
            require_finite(self.model, infinite_buffers=False)
            require_content()
        self._sound = True

    def _require_use(self, layout: Layout, images: Tensor) -> None:  # noqa: B027 - few need one
        """Raises ValueError where the method can make nothing of the layer, whatever the images
        and weights."""

    def _require_variation(self, features: Tensor, images: Tensor) -> None:
        """Raises ValueError where the layer is the same at every position, whatever the images.
        features: float[B,C,h,w], of these images."""
        if _varies(features):
            return
        probe = probe_images(images)
        with torch.no_grad():
            output, _ = self._forward(probe, (0, 0), lambda output: output)
        if not _varies(self._layout(output, probe).maps(output)):
            raise ValueError(
                f"layer {self.layer!r} gives the same values at every place, whatever the images, "
                f"so every map would be zero; {self._remedy(probe)}, or take other weights"
            )

    def _untrained(self, name: str) -> ValueError:
        """The error for a network whose weights called `name` are zero throughout."""
        return ValueError(
            f"{name!r} of {type(self.model).__name__} is zero throughout, so no map says anything: "
            "the network is not trained; load its weights, or train it first"
        )

    def _remedy(self, images: Tensor) -> str:
        """Which layer to pass instead, found out by trying; images: float[B,3,H,W]."""
        names = serving_layers(self.model, images, self._channels, unlike=self.layer)
        return f"pass layer={names[0]!r}" if names else "pass a layer on the way to the logits"

    def _logits(self, output: Any, batch: int, extremes: tuple[int, int]) -> Tensor:
        """The model's output -> float[B,classes], checked against the labels' extremes."""
        logits = logits_of(output)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != batch:
            what = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"the model must give logits [{batch},classes], or an object with such .logits; "
                f"{type(self.model).__name__} gave {what}; wrap it in a module whose forward "
                "returns the logits alone"
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


def check_inputs(images: Tensor, labels: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """-> labels on images' device, and the smallest and the largest of them."""
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be float[B,C,H,W], got {images.dtype} {list(images.shape)}")
    integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != images.shape[:1] or not integer:
        raise ValueError(
            f"labels must be int64[{len(images)}], one an image, "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    # Read before the forward pass is queued, lest the host wait for it.
    low, high = torch.stack(labels.aminmax()).tolist() if len(labels) else (0, 0)
    return labels.to(images.device, torch.int64, non_blocking=True), (low, high)


def _varies(features: Tensor) -> bool:
    """Whether any channel of any image is not the same throughout; float[B,C,h,w]."""
    return bool((features.amax((2, 3)) > features.amin((2, 3))).any())
