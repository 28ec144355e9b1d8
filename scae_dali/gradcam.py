"""Eqs. 2-3: model + images + labels -> saliency maps, at the price of a forward pass.

The gradient stops at the target layer, so nothing below it needs one: the trunk runs without a
graph, the layer's output becomes a leaf, and only the head (for most networks a pooling and a
linear layer) is differentiated. What happens to the maps is for others: `cache` stores them,
`refresh` decides when and for which images they are made, `region` reads them.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["GradCAM", "default_layer", "gradcam"]

# By class name, so that subclasses and look-alikes (timm's ResNet) are served too. "-1" is the
# last child of what precedes it.
_LAYERS = {
    "AlexNet": "features",
    "CifarResNet": "layer3",
    "ConvNeXt": "features",
    "DenseNet": "features",
    "EfficientNet": "features",
    "GoogLeNet": "inception5b",
    "Inception3": "Mixed_7c",
    "MaxVit": "blocks.-1",
    "MNASNet": "layers",
    "MobileNetV2": "features",
    "MobileNetV3": "features",
    "RegNet": "trunk_output",
    "ResNet": "layer4",
    "ShuffleNetV2": "conv5",
    "SqueezeNet": "features",
    "SwinTransformer": "permute",  # the blocks before it are [B,h,w,C]
    "VGG": "features",
    # Past the last attention the patch tokens no longer reach the logits; before it they do.
    "VisionTransformer": "encoder.layers.-1.ln_1",
}

# The maps are min-maxed, so any factor on the score cancels; this one keeps fp16 gradients,
# which a pooling divides by h*w, out of the subnormal range. A power of 2: exact elsewhere.
_SCORE_SCALE = 1024.0


@torch.no_grad()
def gradcam(features: Tensor, gradients: Tensor) -> Tensor:
    """Eqs. 2-3. features, gradients: float[B,C,h,w] -> saliency f32[B,h,w] in [0, 1].

    alpha_k = mean_ij of gradients, A = ReLU(sum_k alpha_k F^k), then min-max per image, so that
    the largest value is exactly 1. All zero where A is constant (up to float32's rounding) or
    not finite. Sums are float32 whatever the inputs, autocast or not. Raises ValueError where
    the shapes differ or are not 4-D.
    """
    if features.ndim != 4 or features.shape != gradients.shape:
        raise ValueError(
            "features and gradients must have the same shape [B,C,h,w], got "
            f"{list(features.shape)} and {list(gradients.shape)}"
        )
    alpha = gradients.mean((2, 3), dtype=torch.float32)
    # Not a matrix product: autocast or TF32 would round its operands.
    weighted = (alpha[:, :, None, None] * features).sum(1)  # [B,h,w], at least float32
    a = weighted.relu()
    low, high = a.amin((1, 2)), a.amax((1, 2))
    # Terms of opposite sign cancel, so rounding is relative to the terms and not to their sum.
    rounding = 4 * torch.finfo(torch.float32).eps
    noise = rounding * (alpha.abs() * features.abs().amax((2, 3))).sum(1)
    usable = weighted.isfinite().all(2).all(1) & (high - low > noise)
    scaled = (a - low[:, None, None]) / (high - low)[:, None, None]
    return torch.where(usable[:, None, None], scaled, 0.0).float()


def default_layer(model: nn.Module) -> str:
    """Name of the last feature map of a torchvision classification network, by its family.

    Raises ValueError for a class that is not in the table, or that lacks the table's layer.
    """
    model = _unwrap(model)
    for cls in type(model).__mro__:
        name = _resolve(model, _LAYERS.get(cls.__name__, ""))
        if name:
            return name
    raise ValueError(
        f"no default Grad-CAM layer is known for {type(model).__name__}; pass layer=NAME, the "
        f"module whose output is the last feature map, such as {', '.join(_candidates(model))}"
    )


class GradCAM:
    """Saliency maps of `model` at `layer`, a dotted module name (None: `default_layer(model)`).

        cam = GradCAM(model)
        saliency = cam(images, labels)

    `model` may be wrapped (DataParallel, DistributedDataParallel, AveragedModel, torch.compile):
    names are those inside the wrapper, and the pass runs uncompiled. The layer must run once in
    a forward pass and give [B,C,h,w], or [B,tokens,C] of a square grid with at most one leading
    class token. Gradients are taken with respect to the layer's output; F is that output as the
    head reads it, after any in-place operation that follows (an in-place ReLU, say).

    Raises ValueError for an unknown layer.
    """

    def __init__(self, model: nn.Module, layer: str | None = None) -> None:
        self.model = _unwrap(model)
        self.layer = default_layer(self.model) if layer is None else layer
        modules = dict(self.model.named_modules(remove_duplicate=False))
        if not self.layer or self.layer not in modules:
            close = difflib.get_close_matches(self.layer, modules, n=5, cutoff=0.4)
            raise ValueError(
                f"layer {self.layer!r} is no module of {type(self.model).__name__}; "
                f"did you mean {', '.join(close or _candidates(self.model))}?"
            )
        self._module = modules[self.layer]

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """images: float[B,3,S,S]; labels: int64[B] -> f32[B,h,w] in [0, 1], on images' device.

        Images are what the network is trained on (normalised), in any memory format; autocast
        is the caller's. An image's map is all zero where it is constant, nowhere positive, or
        not finite, and does not depend on the rest of the batch. The model is left as it was
        found: modes, hooks, requires_grad, grad and buffers, also after an error.

        Raises ValueError for a label without a logit, logits that are not [B,classes], a layer
        that does not run exactly once or whose output is no map, and logits that do not depend
        on it.
        """
        labels, extremes = _check_inputs(images, labels)
        taps: list[tuple[Tensor, Tensor]] = []

        def tap(module: nn.Module, args: Any, output: Any) -> Tensor:
            if taps:
                raise ValueError(
                    f"layer {self.layer!r} runs more than once in a forward pass; pass a layer "
                    "that runs once, such as the module that holds it"
                )
            self._check_map(output, images)
            leaf = output.detach().requires_grad_()
            torch.set_grad_enabled(True)  # for the head; _isolated puts it back
            # The head gets a copy: a leaf can't be changed in place, and some heads do.
            features = leaf.clone()
            taps.append((leaf, features))
            return features

        with _isolated(self.model, images.device.type):
            handle = self._module.register_forward_hook(tap)
            try:
                output = self.model(images)
            finally:
                handle.remove()
            if not taps:
                raise ValueError(
                    f"layer {self.layer!r} does not run in the forward pass of "
                    f"{type(self.model).__name__}; pass another layer"
                )
            ((leaf, features),) = taps
            logits = self._logits(output, len(images), extremes)
            # One-hot rows: the gradient of S^y of every image, in one sweep.
            rows = torch.zeros_like(logits).scatter_(1, labels[:, None], _SCORE_SCALE)
            gradients = None
            if logits.requires_grad:
                (gradients,) = torch.autograd.grad(logits, leaf, rows, allow_unused=True)
            if gradients is None:
                raise ValueError(
                    f"the logits do not depend on layer {self.layer!r}, or not differentiably; "
                    "pass a layer on the way to them"
                )
            return gradcam(_as_map(features.detach()), _as_map(gradients))

    def grid(self, size: int) -> tuple[int, int]:
        """(h, w) of the maps of images of size x size pixels; raises what a call raises."""
        parameter = next(self.model.parameters())
        images = torch.zeros(1, 3, size, size, device=parameter.device, dtype=parameter.dtype)
        maps = self(images, torch.zeros(1, dtype=torch.int64, device=parameter.device))
        return maps.shape[1], maps.shape[2]

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


@contextlib.contextmanager
def _isolated(model: nn.Module, device_type: str) -> Iterator[None]:
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


def _check_inputs(images: Tensor, labels: Tensor) -> tuple[Tensor, tuple[int, int]]:
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
    return labels.to(images.device, torch.int64), (low, high)


def _grid(tokens: int) -> int:
    """Side of the square grid of `tokens`, one of which may be a class token; 0: no such grid."""
    for patches in (tokens, tokens - 1):
        if patches > 0 and math.isqrt(patches) ** 2 == patches:
            return math.isqrt(patches)
    return 0


def _as_map(output: Tensor) -> Tensor:
    """[B,C,h,w], or [B,tokens,C] -> [B,C,h,w] without the class token."""
    if output.ndim == 4:
        return output
    side = _grid(output.shape[1])
    patches = output[:, output.shape[1] - side**2 :]  # [B,side*side,C]
    return patches.transpose(1, 2).unflatten(2, (side, side))


def _unwrap(model: nn.Module) -> nn.Module:
    """The network inside the wrappers of torch, in any order."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
    while True:
        inner = model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _resolve(model: nn.Module, pattern: str) -> str:
    """Module name of a pattern of `_LAYERS`, or "" where the model has no such module."""
    names: list[str] = []
    for part in filter(None, pattern.split(".")):
        children = [name for name, _ in model.named_children()]
        name = children[-1] if part == "-1" and children else part
        if name not in children:
            return ""
        names.append(name)
        model = model.get_submodule(name)
    return ".".join(names)


def _candidates(model: nn.Module) -> list[str]:
    """A few names for an error: the last top-level modules with weights, the last convolution."""
    top = [
        name
        for name, child in model.named_children()
        if not isinstance(child, nn.Linear) and next(child.parameters(), None) is not None
    ]
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return list(dict.fromkeys(filter(None, top[-4:] + convolutions[-1:]))) or ["(it has none)"]
