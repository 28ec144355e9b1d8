"""What a network shows of a layer when it is run up to it: on these images, on larger ones, on ones
that differ at one place.

Tells what was seen. How the layer's output is read by that is decided in `layout`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

__all__ = ["CHANNELS_FIRST", "Seen", "changes", "moved", "probe_images", "up_to"]

# Whose four-dimensional output is [B,C,h,w], whatever the sizes.
CHANNELS_FIRST = (
    nn.Conv2d,
    nn.ConvTranspose2d,
    nn.BatchNorm2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.FractionalMaxPool2d,
    nn.LPPool2d,
    nn.Upsample,
)


class Seen(NamedTuple):
    """output: of the layer, None where it did not run. convolved: (h, w) of the convolutions up to
    it, in order; first: (C, h, w) of all modules up to it whose output is [B,C,h,w]."""

    output: Tensor | None
    convolved: list[tuple[int, int]]
    first: set[tuple[int, ...]]


def probe_images(like: Tensor, batch: int = 2) -> Tensor:
    """float[batch, ...]: of the size, type and device of `like`, float[B,C,H,W]; in turn normal
    noise of every pixel, and smooth."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *like.shape[1:], generator=generator)
    coarse = torch.randn(batch, like.shape[1], 4, 4, generator=generator)
    images[1::2] = interpolate(coarse[1::2], like.shape[2:], mode="bicubic")
    return images.to(like.device, like.dtype)


class _Reached(Exception):  # noqa: N818 - no error: the layer has run
    pass


def up_to(model: nn.Module, module: nn.Module, images: Tensor) -> Seen:
    """Run `model` on images, float[B,C,H,W], until `module` has run. Call it in `isolated`."""
    outputs: list[Tensor] = []
    convolved: list[tuple[int, int]] = []
    first: set[tuple[int, ...]] = set()

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)
        raise _Reached

    def note(module: nn.Module, args: Any, output: Any) -> None:
        # Some convolve every patch by itself, as one of a larger batch.
        if isinstance(output, Tensor) and output.ndim == 4 and len(output) == len(images):
            first.add(tuple(output.shape[1:]))
            if isinstance(module, nn.Conv2d):
                convolved.append((output.shape[2], output.shape[3]))

    hooks: list[tuple[nn.Module, Callable[..., None]]] = [
        (one, note) for one in model.modules() if isinstance(one, CHANNELS_FIRST)
    ]
    handles = [one.register_forward_hook(hook) for one, hook in [*hooks, (module, stop)]]
    try:
        with torch.no_grad():
            model(images)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return Seen(outputs[0] if outputs else None, convolved, first)


def moved(
    model: nn.Module, module: nn.Module, shape: tuple[int, ...], images: Tensor, along: int
) -> list[int] | None:
    """The axes of the layer's output, which is `shape`, that change where the images are doubled
    along their axis `along`; None where the network does not take such images."""
    double = torch.cat([images[:1], images[:1]], along)
    try:
        other = up_to(model, module, double).output
    except Exception:  # whatever a network says to a size that it was not made for
        return None
    if not isinstance(other, Tensor) or other.ndim != len(shape):
        return None
    return [axis for axis in range(1, len(shape)) if other.shape[axis] != shape[axis]]


def changes(
    model: nn.Module, module: nn.Module, images: Tensor, grid: tuple[int, int], cells: list[int]
) -> Tensor:
    """How much the layer's output changes where the image does in one cell of a grid, for each of
    `cells`, row by row: float[len(cells), ...]. images: float[B,C,H,W], of which the size counts.
    """
    base = probe_images(images[:1], 1)
    other = base.repeat(len(cells), 1, 1, 1)
    (h, w), (height, width) = grid, images.shape[2:]
    for image, cell in zip(other, cells, strict=True):
        y, x = divmod(cell, w)
        image[
            :,
            y * height // h : (y + 1) * height // h,
            x * width // w : (x + 1) * width // w,
        ] *= -2
    output = up_to(model, module, torch.cat([base, other])).output
    if output is None:
        raise ValueError("the layer does not run")
    return (output[1:] - output[:1]).float().abs()
