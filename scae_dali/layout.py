"""How the output of a layer is read as maps: [B,C,h,w], [B,h,w,C], tokens [B,N,C] or [B,C,N].

Shapes alone tell most outputs apart: a map has the images' aspect, and its channels rarely make one
that has it too. Where two readings are left, the network is run once more, and shows which axes go
with the image's sides. Tokens are those of the patches' convolution, after leading ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Layout", "layout_of", "leading_tokens", "readings"]


class Layout(NamedTuple):
    """A reading of a layer's output. grid: (h, w) of its maps; leading: tokens before the patches',
    such as a class token."""

    axes: Literal["[B,C,h,w]", "[B,h,w,C]", "[B,N,C]", "[B,C,N]"]
    grid: tuple[int, int]
    leading: int = 0

    def maps(self, output: Tensor) -> Tensor:
        """The layer's output, or its gradient -> float[B,C,h,w], without leading tokens."""
        if self.axes == "[B,C,h,w]":
            return output
        if self.axes == "[B,h,w,C]":
            return output.permute(0, 3, 1, 2)
        if self.axes == "[B,C,N]":
            return output.unflatten(2, self.grid)
        return output[:, self.leading :].transpose(1, 2).unflatten(2, self.grid)

    def __str__(self) -> str:
        h, w = self.grid
        tokens = f" after {self.leading} leading tokens" if self.leading else ""
        return f"{self.axes} with maps of {h}x{w}{tokens}"


def layout_of(
    name: str, shape: Iterable[int], images: Tensor, model: nn.Module, module: nn.Module
) -> Layout:
    """The layout of `module`, a layer of `model` called `name`, that gave `shape` for these images.

    images: float[B,C,H,W]. Runs the model up to the layer where the shape does not settle it, so
    call it within `isolated`. Raises ValueError where there is no reading, or more than one.
    """
    shape, size = tuple(shape), (images.shape[2], images.shape[3])
    convolved: list[tuple[int, int]] = []
    if len(shape) == 3:
        _, convolved = _up_to(model, module, images[:1])
    found = readings(shape, size, leading_tokens(model), convolved)
    if len(found) > 1 and len(shape) == 4:
        found = _moving(found, shape, images, model, module) or found
    if any(layout.axes == "[B,C,N]" for layout in found):
        # Too rare to be taken for granted.
        moving = _moving(found, shape, images, model, module)
        found = moving or (found if len(found) > 1 else [])
    if len(found) == 1:
        return found[0]
    given = f"layer {name!r} gives {list(shape)} for images {list(images.shape)}"
    if found:
        raise ValueError(
            f"{given}, which may be {' or '.join(map(str, found))}; pass another layer, or images "
            "of another size"
        )
    remedy = "pass a layer that gives [B,C,h,w], [B,h,w,C] or [B,tokens,C] of the images' aspect"
    if len(shape) == 3:
        remedy += (
            "; a model whose tokens begin with more than a class token says how many by its "
            "attribute num_prefix_tokens"
        )
    raise ValueError(f"{given}, which is no feature map; {remedy}")


def readings(
    shape: tuple[int, ...],
    size: tuple[int, int],
    leading: Iterable[int],
    convolved: Iterable[tuple[int, int]] = (),
) -> list[Layout]:
    """Every reading of an output's shape that goes with images of `size`, (H, W).

    leading: numbers of tokens that may come before the patches'. convolved: (h, w) of the
    convolutions that ran before, one of which made the patches.
    """
    if len(shape) == 4:
        _, a, b, c = shape
        both = (Layout("[B,C,h,w]", (b, c)), Layout("[B,h,w,C]", (a, b)))
        for cells in (2, 6):  # that rounding, and borders without padding, may make a difference of
            found = [layout for layout in both if _of_aspect(layout.grid, size, cells)]
            if found:
                return found
        # A pooling may give a square whatever the images.
        return [both[0]] if b == c else []
    if len(shape) != 3:
        return []
    grids = dict.fromkeys(convolved)
    made = [
        Layout("[B,N,C]", grid, number)
        for grid in grids
        for number in leading
        if shape[1] - number == math.prod(grid)
    ]
    if made:
        return made
    # No convolution made the patches: they were cut out, or merged from those of one.
    most = max(map(math.prod, grids), default=shape[1])
    flat = [Layout("[B,C,N]", grid) for grid in grids if shape[2] == math.prod(grid)]
    return flat + [
        Layout("[B,N,C]", grid, number)
        for number in leading
        if shape[1] - number <= most and (grid := _grid_of(shape[1] - number, size))
    ]


def leading_tokens(model: nn.Module) -> list[int]:
    """How many tokens may come before the patches', by what the model or a part of it says of
    itself, as timm's do (2: with a distillation token); one or none where nothing is said."""
    for modules in ([model], model.modules()):
        said = {getattr(module, "num_prefix_tokens", None) for module in modules}
        numbers = {number for number in said if isinstance(number, int)}
        if numbers:
            return sorted({0, *numbers})
    return [0, 1]


def _of_aspect(grid: tuple[int, int], size: tuple[int, int], cells: int) -> bool:
    """Whether a map is the image at one stride, but for so many cells along its short side."""
    (h, w), (height, width) = grid, size
    if height == width:
        return h == w
    if height > width:
        (h, w), (height, width) = (w, h), (width, height)
    return abs(h - w * height / width) <= max(cells, 0.05 * h)


def _grid_of(patches: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """(h, w) of so many patches of exactly the images' aspect."""
    if patches < 1:
        return None
    divisor = math.gcd(*size)
    h, w = size[0] // divisor, size[1] // divisor
    times = math.isqrt(patches // (h * w))
    return (h * times, w * times) if h * w * times**2 == patches else None


def _moving(
    found: list[Layout],
    shape: tuple[int, ...],
    images: Tensor,
    model: nn.Module,
    module: nn.Module,
) -> list[Layout]:
    """The reading in which the one axis that grows where the images become wider is that of the
    columns or places; none where the network does not take such images."""
    wide = torch.cat([images[:1], images[:1]], 3)
    try:
        other, _ = _up_to(model, module, wide)
    except Exception:  # whatever a network says to a size that it was not made for
        return []
    if other is None or len(other) != len(shape):
        return []
    moved = [axis for axis in range(1, len(shape)) if other[axis] != shape[axis]]
    grows = {"[B,C,h,w]": 3, "[B,h,w,C]": 2, "[B,N,C]": 1, "[B,C,N]": 2}
    return [layout for layout in found if moved == [grows[layout.axes]]]


class _Reached(Exception):  # noqa: N818 - no error: the layer has run
    pass


def _up_to(
    model: nn.Module, module: nn.Module, images: Tensor
) -> tuple[tuple[int, ...] | None, list[tuple[int, int]]]:
    """The shape that `module` gives, and (h, w) of the convolutions that ran before it."""
    shapes: list[tuple[int, ...]] = []
    convolved: list[tuple[int, int]] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        shapes.append(tuple(output.shape))
        raise _Reached

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if output.ndim == 4:
            convolved.append((output.shape[2], output.shape[3]))

    hooks: list[tuple[nn.Module, Callable[..., None]]] = [
        (convolution, note) for convolution in model.modules() if isinstance(convolution, nn.Conv2d)
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
    return (shapes[0] if shapes else None), convolved
