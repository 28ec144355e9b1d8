"""Experiments with a network, which is run up to a layer on images made for the purpose.

They answer: which images does the network take, what does the layer give, which of its axes grow
with the images, and where does it change if the image changes in one cell?
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

__all__ = [
    "CHANNELS_FIRST",
    "Seen",
    "changes",
    "moved",
    "own_tensor",
    "probe_images",
    "trial_images",
    "up_to",
]

# Modules whose four-dimensional output is [B,C,h,w], whatever the sizes.
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
    """What ran of a network up to a layer.

    output: the layer's, None where it did not run. convolved: (h, w) of the convolutions before it,
    in order. first: (C, h, w) of all modules before it that put channels first, [B,C,h,w].
    """

    output: Tensor | None
    convolved: list[tuple[int, int]]
    first: set[tuple[int, ...]]


def probe_images(like: Tensor, batch: int = 2) -> Tensor:
    """Images like `like`, float[B,C,H,W], in size, type and device: float[batch,C,H,W].

    Noise in every pixel and smooth noise, in turns, both normal; the same at every call.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *like.shape[1:], generator=generator)
    coarse = torch.randn(batch, like.shape[1], 4, 4, generator=generator)
    images[1::2] = interpolate(coarse[1::2], like.shape[2:], mode="bicubic")
    return images.to(like.device, like.dtype)


def own_tensor(model: nn.Module) -> Tensor:
    """A tensor of the device and the type of the images that the network takes: one of its weights,
    or an empty one. A network need not have any, and quantized weights are no numbers."""
    tensors = list(chain(model.parameters(), model.buffers()))
    floating = (one for one in tensors if one.is_floating_point())
    device = tensors[0].device if tensors else "cpu"
    return next(floating, torch.empty(0, device=device))


def trial_images(model: nn.Module, size: tuple[int, int], batch: int = 2) -> Tensor:
    """`probe_images` of (H, W) pixels that the network takes. Call it in `isolated`."""
    own = own_tensor(model)
    channels = _image_channels(model, own.new_zeros(1, 3, *size))
    return probe_images(own.new_empty(1, channels, *size), batch)


def _image_channels(model: nn.Module, like: Tensor) -> int:
    """Channels of the images that the first convolution to run takes; 3 if there is none.

    like: float[B,3,H,W], of the images' size.
    """
    first = next((one for one in model.modules() if isinstance(one, nn.Conv2d)), None)
    if first is None or first.in_channels == 3:
        return 3
    channels: list[int] = []

    def told(module: nn.Module, args: Any) -> None:
        if not channels and args and args[0].shape[1:2] == like.shape[1:2]:
            channels.append(getattr(module, "in_channels", 3))
        raise _Told

    handles = [
        module.register_forward_pre_hook(told)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        model(like[:1])
    except Exception:  # the question is only what the first convolution takes
        pass
    finally:
        for handle in handles:
            handle.remove()
    return channels[0] if channels else 3


class _Told(Exception):  # noqa: N818 - no error: the first convolution is about to run
    pass


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
        # Some networks convolve every patch by itself, in a larger batch: that does not count.
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
