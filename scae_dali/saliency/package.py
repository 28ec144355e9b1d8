"""Every class activation map of the package `pytorch-grad-cam`, by its name there."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scae_dali.checks import check
from scae_dali.saliency.cam import check_inputs, weighted_map
from scae_dali.saliency.gradcam import GradCAM
from scae_dali.saliency.isolation import isolated
from scae_dali.saliency.layout import Layout

__all__ = ["PREFIX", "PackageCAM"]

PREFIX = "pytorch_grad_cam:"


class PackageCAM(GradCAM):
    """Maps of `model` at `layer` by a class of the package, such as `LayerCAM`; model and layer are
    as for every `CAM`.

        cam = PackageCAM("LayerCAM", model)
        saliency = cam(images, labels)

    The package's map, at the layer's own resolution, is scaled as all maps are: ReLU, then min-max
    per image. The package computes on the host in NumPy. `method` is "pytorch_grad_cam:" and the
    name. What a call raises, GradCAM's does too; that the logits must depend on the layer holds for
    methods that use gradients.

    Raises ValueError where the package is not installed, for a name that is not one of a method of
    one layer, and for an unknown layer.
    """

    def __init__(self, name: str, model: nn.Module, layer: str | None = None) -> None:
        self.method = PREFIX + name
        self._class = _class_of(name)
        super().__init__(model, layer)
        with isolated(self.model, "cpu"):
            made = self._class(self.model, [self._module])
            made.activations_and_grads.release()
        self._uses_gradients: bool = made.uses_gradients
        self._detached: bool = made.detach

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        labels, extremes = check_inputs(images, labels)
        if not len(images):
            return images.new_zeros(0, *self.grid((images.shape[2], images.shape[3])))
        with isolated(self.model, images.device.type):
            # With its first images the layer shows how its output is read.
            output, _ = self._forward(images[:1], (0, 0), lambda output: output)
            layout = self._layout(output, images[:1])
            check(
                layout.axes == "[B,C,h,w]" or self._detached,
                f"method {self.method!r} needs a layer that gives [B,C,h,w], and {self.layer!r} "
                f"gives {layout}; pass another layer, or method='gradcam'",
            )
            checked = _Checked(self, extremes)
            raw, features, slopes = self._by_package(checked, images, labels, layout)
            maps = weighted_map(raw.new_ones(len(raw), 1), raw[:, None])
            self._require_maps(
                maps,
                images,
                labels,
                checked.logits[0],
                lambda: (
                    self._require_variation(features, images)
                    if slopes is None
                    else self._require_slopes(features, slopes, layout, images)
                ),
            )
            return maps

    def _by_package(
        self, model: _Checked, images: Tensor, labels: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The package's map f32[B,h,w] before it is scaled, and the layer's maps and their
        gradients, float[B,C,h,w], the latter None where the method uses none."""
        more: dict[str, Any] = {}
        if layout.axes != "[B,C,h,w]":
            if self._detached:
                more["reshape_transform"] = lambda output: layout.maps(output).float()
            if "ablation_layer" in inspect.signature(self._class).parameters:
                more["ablation_layer"] = importlib.import_module(
                    "pytorch_grad_cam"
                ).AblationLayerVit()
        elif self._detached:
            more["reshape_transform"] = lambda output: output.float()  # NumPy has no bfloat16
        parameters = [(p, p.requires_grad, p.grad) for p in self.model.parameters()]
        hooks = dict(self._module._forward_hooks)
        cam = self._class(model, [self._module], **more)
        kept: list[tuple[Any, ...]] = []
        of_layer = cam.get_cam_image

        def keep(images: Tensor, layer: Any, targets: Any, features: Any, slopes: Any, *rest: Any):
            raw = of_layer(images, layer, targets, features, slopes, *rest)
            kept.append((raw, features, slopes))
            return raw

        cam.get_cam_image = keep
        try:
            for parameter, _, _ in parameters:
                # The images' own gradient is enough, unless gradients are differentiated again.
                parameter.requires_grad_(not self._detached)
            with torch.enable_grad(), warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                leaf = images.clone().requires_grad_(self._uses_gradients)
                cam(leaf, [_Score(label) for label in labels.tolist()])
        finally:
            cam.activations_and_grads.release()
            for parameter, required, gradient in parameters:
                parameter.requires_grad_(required)
                parameter.grad = gradient
            # Where an ablation broke off, the package's hook and layer are still there.
            self._module._forward_hooks.clear()
            self._module._forward_hooks.update(hooks)
            parent, _, child = self.layer.rpartition(".")
            setattr(self.model.get_submodule(parent), child, self._module)
        tensors = [
            torch.as_tensor(v, device=images.device).detach() for v in kept[0] if v is not None
        ]
        return tensors[0].float(), tensors[1], tensors[2] if self._uses_gradients else None

    def _require_use(self, layout: Layout, images: Tensor) -> None:
        if self._uses_gradients:
            super()._require_use(layout, images)


class _Checked(nn.Module):
    """The model as the package sees it: its logits, of any batch, checked as for every `CAM`."""

    def __init__(self, cam: PackageCAM, extremes: tuple[int, int]) -> None:
        super().__init__()
        self.model = cam.model
        self._of = [cam]  # in a list, so that it is no module's attribute
        self.extremes = extremes
        self.logits: list[Tensor] = []  # of the first batch, which is the images

    def forward(self, images: Tensor) -> Tensor:
        logits = self._of[0]._logits(self.model(images), len(images), self.extremes)
        self.logits = self.logits or [logits.detach()]
        return logits


class _Score:
    """The score that a map explains: the logit of a class."""

    def __init__(self, label: int) -> None:
        self.label = label
        self.category = label  # what the package's own target calls it

    def __call__(self, logits: Tensor) -> Tensor:
        return logits[self.label]


def _class_of(name: str) -> Any:
    """The package's class. Raises ValueError where there is none, or no package."""
    if importlib.util.find_spec("pytorch_grad_cam") is None:
        raise ValueError(
            f"method '{PREFIX}{name}' needs the package pytorch-grad-cam, which is not installed: "
            "pip install grad-cam"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package's own imports
        package = importlib.import_module("pytorch_grad_cam")
        base = importlib.import_module("pytorch_grad_cam.base_cam").BaseCAM
    known: dict[str, Any] = {}
    for key, value in vars(package).items():
        if inspect.isclass(value) and issubclass(value, base):
            parts = ("forward", "compute_cam_per_layer")
            if all(getattr(value, part) is getattr(base, part) for part in parts):
                known[key] = value
    check(
        name in known,
        f"method '{PREFIX}{name}' must name a method of the package that looks at one layer: "
        f"{', '.join(sorted(known))}",
    )
    return known[name]
