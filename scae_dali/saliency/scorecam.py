"""Score-CAM (Wang et al., CVPR-W 2020): saliency maps without gradients.

A channel weighs as much as the class's logit when only that channel's region of the image is left.
That takes a forward pass for each channel, some hundred times the price of Grad-CAM, so it is meant
for caches that are built offline.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import interpolate

from scae_dali.saliency.cam import CAM, ROUNDING, check_inputs, weighted_map
from scae_dali.saliency.isolation import isolated
from scae_dali.saliency.probe import probe_images
from scae_dali.saliency.reach import logits_of, zero_weights

__all__ = ["ScoreCAM"]


class ScoreCAM(CAM):
    """Score-CAM of `model` at `layer`, as for every `CAM`; `chunk` masked images run at once.

        cam = ScoreCAM(model, chunk=256)
        saliency = cam(images, labels)

    Algorithm 1 of the paper: alpha = softmax over the channels of S^y(X * H_k) - S^y(X_b), with S
    the logits and the mask H_k (eqs. 7, 8) the channel upsampled bilinearly (corners not aligned)
    to the image's size and min-maxed. What a mask hides becomes 0, the data set's mean where images
    are normalised. A channel that is constant gives no mask, and weighs nothing.

    Raises ValueError for an unknown layer and for chunk < 1.
    """

    method = "scorecam"

    def __init__(self, model: nn.Module, layer: str | None = None, *, chunk: int = 64) -> None:
        super().__init__(model, layer)
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 masked image, got {chunk}")
        self.chunk = chunk

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        labels, extremes = check_inputs(images, labels)
        with isolated(self.model, images.device.type):
            output, logits = self._forward(images, extremes, lambda output: output)
            features = self._layout(output, images).maps(output)
            alpha = self._weights(images, labels, features)
            maps = weighted_map(alpha, features)
            # Channels of equal weight say nothing about the class.
            lightest = torch.where(alpha > 0, alpha, torch.inf).amin(1)
            content = maps.any() & (alpha.amax(1) > lightest).any()
            self._require_maps(
                *(maps, images, labels, logits),
                lambda: self._require_response(features, images),
                content,
            )
            return maps

    def _require_response(self, features: Tensor, images: Tensor) -> None:
        """Raises ValueError where the layer is the same at every position, or the logits are the
        same, whatever the images. features: float[B,C,h,w], of these images."""
        self._require_variation(features, images)
        probe = probe_images(images)
        if _differ(logits_of(self.model(probe))):
            return
        zero = {name: value for name, value in zero_weights(self.model).items() if value.ndim > 1}
        if zero and _differ(logits_of(functional_call(self.model, zero, (probe,)))):
            raise self._untrained(list(zero)[-1])
        raise ValueError(
            f"the logits of {type(self.model).__name__} are the same whatever the images, so no "
            "map says anything: its units are dead; take other weights"
        )

    def _weights(self, images: Tensor, labels: Tensor, features: Tensor) -> Tensor:
        """alpha f32[B,C], which sums to 1; NaN, which makes the map 0, if no channel varies."""
        low, high = features.amin((2, 3)), features.amax((2, 3))
        # False for channels that are not finite, too.
        varies = high - low > ROUNDING * torch.maximum(low.abs(), high.abs())
        scores = torch.full(varies.shape, -torch.inf, device=images.device)
        pairs = varies.nonzero()  # image and channel, so that chunks are full across images
        for start in range(0, len(pairs), self.chunk):
            b, k = pairs[start : start + self.chunk].unbind(1)
            masks = _masks(features[b, k], (images.shape[2], images.shape[3]))
            masked = images[b] * masks.to(images.dtype)
            logits = self._logits(self.model(masked), len(masked), (0, 0))
            scores[b, k] = logits.gather(1, labels[b, None])[:, 0].float()
        # S^y(X_b) is one number an image: the softmax does not see it.
        return scores.softmax(1)


def _differ(logits: Tensor) -> bool:
    """Whether the logits of two images differ. logits: float[2,classes]."""
    return not torch.equal(logits[0], logits[1])


def _masks(channels: Tensor, size: tuple[int, int]) -> Tensor:
    """Eqs. 7, 8. channels: float[P,h,w], none constant -> f32[P,1,*size] in [0, 1]."""
    up = interpolate(channels[:, None].float(), size, mode="bilinear", align_corners=False)
    low, high = up.amin((2, 3), keepdim=True), up.amax((2, 3), keepdim=True)
    # A channel that varies by rounding alone may be constant after the upsampling.
    return (up - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
