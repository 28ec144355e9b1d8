"""Grad-CAM (eqs. 2-3): saliency maps of images for their labels, at the price of a forward pass.

The gradient stops at the target layer, so nothing below it needs one: the trunk runs without a
graph, the layer's output becomes a leaf, and only the head (for most networks a pooling and a
linear layer) is differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scae_dali.saliency.cam import CAM, check_inputs, weighted_map
from scae_dali.saliency.isolation import isolated
from scae_dali.saliency.layers import default_layer
from scae_dali.saliency.layout import Layout
from scae_dali.saliency.probe import probe_images
from scae_dali.saliency.reach import inference_told, leaf_of, reached, zero_weights

__all__ = ["GradCAM", "default_layer", "gradcam"]

# The maps are min-maxed, so any factor on the score cancels; this one keeps fp16 gradients,
# which a pooling divides by h*w, out of the subnormal range. A power of 2: exact elsewhere.
_SCORE_SCALE = 1024.0


@torch.no_grad()
def gradcam(features: Tensor, gradients: Tensor) -> Tensor:
    """Eqs. 2-3. features, gradients: float[B,C,h,w] -> saliency f32[B,h,w] in [0, 1].

    alpha_k = mean_ij of gradients, in float32; the rest is `weighted_map`. Raises ValueError where
    the shapes differ or are not 4-D.
    """
    if features.ndim != 4 or features.shape != gradients.shape:
        raise ValueError(
            "features and gradients must have the same shape [B,C,h,w], got "
            f"{list(features.shape)} and {list(gradients.shape)}"
        )
    return weighted_map(gradients.mean((2, 3), dtype=torch.float32), features)


class GradCAM(CAM):
    """Grad-CAM of `model` at `layer`; both are as for every `CAM`.

        cam = GradCAM(model)
        saliency = cam(images, labels)

    Gradients are taken with respect to the layer's output. A call also raises ValueError where the
    logits do not depend on it.
    """

    method = "gradcam"
    _grad_from_start = False  # True once the trunk is known to switch gradients off itself

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        labels, extremes = check_inputs(images, labels)
        with isolated(self.model, images.device.type):
            leaf, features, logits = self._differentiable(images, extremes)
            # One-hot rows: the gradient of S^y of every image, in one sweep.
            rows = torch.zeros_like(logits).scatter_(1, labels[:, None], _SCORE_SCALE)
            gradients = None
            if logits.requires_grad:
                (gradients,) = torch.autograd.grad(logits, [leaf], rows, allow_unused=True)
            layout = self._layout(features, images)
            if gradients is None:
                raise self._unreached(layout, images)
            features, slopes = layout.maps(features.detach()), layout.maps(gradients)
            maps = gradcam(features, slopes)
            self._require_maps(
                maps,
                images,
                labels,
                logits,
                lambda: self._require_slopes(features, slopes, layout, images),
            )
            return maps

    def _differentiable(
        self, images: Tensor, extremes: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's output as a leaf, its copy as the head read it, and the logits; call it in
        `isolated`."""
        leaves: list[Tensor] = []

        def cut(output: Tensor) -> Tensor:
            leaf, copy = leaf_of(output)
            leaves.append(leaf)
            torch.set_grad_enabled(True)  # for the head; isolated puts it back
            return copy

        if not self._grad_from_start:
            features, logits = self._forward(images, extremes, cut)
            if logits.requires_grad:
                return leaves[0], features, logits
        # A trunk that runs under no_grad restores the mode that it found.
        with torch.enable_grad(), inference_told(self.model):
            features, logits = self._forward(images, extremes, cut)
        self._grad_from_start = logits.requires_grad
        return leaves[-1], features, logits

    def _require_slopes(
        self, features: Tensor, slopes: Tensor, layout: Layout, images: Tensor
    ) -> None:
        """Raises ValueError where the gradient is zero everywhere, or the layer the same
        everywhere, and neither the labels nor the images are the reason.

        slopes: float[B,C,h,w], gradients of the labels' logits.
        """
        if bool((slopes != 0).any()):
            self._require_variation(features, images)
            return
        probe = probe_images(images)
        if reached(self.model, self._module, layout, probe):
            return
        self._require_use(layout, probe)
        zero = {name: value for name, value in zero_weights(self.model).items() if value.ndim > 1}
        if zero and reached(self.model, self._module, layout, probe, weights=zero):
            raise self._untrained(list(zero)[-1])
        raise ValueError(
            f"no gradient of the logits comes back to layer {self.layer!r}, whatever the images, "
            f"so every map would be zero: the units behind it are dead; {self._remedy(probe)}, or "
            "take other weights"
        )

    def _require_use(self, layout: Layout, images: Tensor) -> None:
        # Zero weights are replaced by noise, and so is the layer's output where what follows is
        # dead for it: whether a gradient comes back then depends on the architecture alone.
        weights = zero_weights(self.model)
        if not any(
            reached(self.model, self._module, layout, images, weights=weights, features=features)
            for features in (True, False)
        ):
            raise self._unreached(layout, images)

    def _unreached(self, layout: Layout, images: Tensor) -> ValueError:
        how = ", or not differentiably"
        if layout.leading:
            tokens = "class token" if layout.leading == 1 else f"{layout.leading} leading tokens"
            how = f" but for its {tokens}"
        return ValueError(
            f"the logits do not depend on layer {self.layer!r}{how}, so every map would be zero; "
            f"{self._remedy(images)}"
        )
