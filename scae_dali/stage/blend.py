"""The blend of an image and its partner on the CPU, compiled: μ·image + (1 - μ)·partner.

DALI's arithmetic does the same in float32, and takes a third of a decoded image's time for it.
"""

import numpy as np
import numpy.typing as npt

from scae_dali.checks import check
from scae_dali.plan.compiled import compiled

_Pixels = npt.NDArray[np.uint8]


def blend(images: _Pixels, which: np.ndarray, partners: _Pixels, mu: np.ndarray) -> None:
    """Blend partners into some images, in place, rounded to the nearest grey level.

    images: uint8 [n, ...], C-contiguous. which: int64 [m], positions in them. partners: uint8
    [m, ...], of the images' shape. mu: float [m] in [0, 1], the weights of the images. Raises
    ValueError for arrays that do not fit: compiled code would read and write beyond them.
    """
    lengths = len(which), len(partners), len(mu)
    check(len(set(lengths)) == 1, f"which, partners and mu must have one length, got {lengths}")
    if not (images.dtype == partners.dtype == np.uint8 and images.flags.c_contiguous):
        raise ValueError(
            f"images and partners must be uint8, and images C-contiguous, got {images.dtype} and "
            f"{partners.dtype}, strides {images.strides} of {images.shape}"
        )
    if len(which):
        if images.shape[1:] != partners.shape[1:]:
            raise ValueError(
                f"partners must have the shape of images, got {partners.shape} and {images.shape}"
            )
        first, last = which.min(), which.max()
        if first < 0 or last >= len(images):
            raise ValueError(
                f"which must be positions of {len(images)} images, got {first} … {last}"
            )
        flat, others = images.reshape(len(images), -1), partners.reshape(len(which), -1)
        _blend_some(flat, which, others, mu.astype(np.float32))


def blended(
    images: list[np.ndarray], partners: list[np.ndarray], mu: list[np.ndarray]
) -> list[np.ndarray]:
    """Images blended with their partners, as fn.python_function calls it.

    images, partners: [H, W, C] each, in the type of images with the grey levels of uint8. mu:
    float32 [] each, the weights of the images. Raises ValueError where the two are not of one
    shape, as where partners are taken from a batch of images of several sizes.
    """
    return [
        _one(image, partner, np.float32(weight))
        for image, partner, weight in zip(images, partners, mu, strict=True)
    ]


def _one(image: np.ndarray, partner: np.ndarray, mu: np.float32) -> np.ndarray:
    if image.shape != partner.shape:
        raise ValueError(
            f"images must be of one size where they are mixed, got {image.shape} and "
            f"{partner.shape}; resize them before the stage"
        )
    if image.dtype == partner.dtype == np.uint8:
        out = image.copy()
        _blend(out.ravel(), partner.ravel(), mu)
        return out
    both = image * mu + partner * (1 - mu)
    if np.issubdtype(image.dtype, np.integer):
        both = np.floor(both + 0.5)
    return both.astype(image.dtype)


@compiled
def _blend_some(images, which, partners, mu):
    """`blend` with flat images, uint8 [n, k] and [m, k]. mu: float32 [m]."""
    for k in range(len(which)):
        _blend(images[which[k]], partners[k], mu[k])


@compiled
def _blend(image, partner, mu):
    """Blends flat arrays, uint8 [n] each, into the first. mu: float32."""
    rest = np.float32(1.0) - mu
    for j in range(len(image)):
        value = np.float32(image[j]) * mu + np.float32(partner[j]) * rest
        image[j] = np.uint8(value + np.float32(0.5))
