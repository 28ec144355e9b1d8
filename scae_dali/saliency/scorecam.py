"""Score-CAM (Wang et al., CVPR-W 2020): maps without gradients, at a forward pass a channel.

A channel weighs what the network still sees of the class where only that channel's region of the
image is left. Some hundred times the price of `gradcam`, so for caches built offline.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import interpolate

from scae_dali.saliency.cam import CAM, ROUNDING, check_inputs, weighted_map
from scae_dali.saliency.isolation import isolated
from scae_dali.saliency.reach import logits_of, probe_images, zero_weights

__all__ = ["ScoreCAM"]


class ScoreCAM(CAM):
    """Score-CAM of `model` at `layer`, as of any `CAM`; `chunk` masked images run at once.

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
            # Channels that weigh the same say nothing of the class.
            lightest = torch.where(alpha > 0, alpha, torch.inf).amin(1)
            content = maps.any() & (alpha.amax(1) > lightest).any()
            self._require_maps(
                *(maps, images, labels, logits),
                lambda: self._require_response(features, images),
                content,
            )
            return maps

    def _require_response(self, features: Tensor, images: Tensor) -> None:
        """Raises ValueError where the layer is the same at every place, or the logits are the same,
        whatever the images. features: float[B,C,h,w], of these images."""
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
        """alpha f32[B,C], which sums to 1; NaN, of which no map comes, where no channel varies."""
        low, high = features.amin((2, 3)), features.amax((2, 3))
        # False as well where a channel is not finite.
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
    """Whether those of the first image are not those of the second."""
    return not torch.equal(logits[0], logits[1])


def _masks(channels: Tensor, size: tuple[int, int]) -> Tensor:
    """Eqs. 7, 8. channels: float[P,h,w], none constant -> f32[P,1,*size] in [0, 1]."""
    up = interpolate(channels[:, None].float(), size, mode="bilinear", align_corners=False)
    low, high = up.amin((2, 3), keepdim=True), up.amax((2, 3), keepdim=True)
    # What varies by rounding alone may have lost it on the way up.
    return (up - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
