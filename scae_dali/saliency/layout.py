"""How the output of a layer is read as maps: [B,C,h,w], [B,h,w,C], tokens [B,N,C] or [B,C,N].

For most outputs the shape is enough: a map has the images' aspect ratio, and the number of channels
rarely looks like a side of one. In doubt, the network is run on wider and on taller images, which
shows the axes that grow with the image's sides. Tokens are the cells of the convolution that cut
the image into patches, in its order, and come after leading ones such as a class token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from torch import Tensor, nn

from scae_dali.saliency.probe import CHANNELS_FIRST, Seen, changes, moved, up_to

__all__ = ["Layout", "layout_of", "leading_tokens", "of_tokens", "readings"]

# By how many cells a map may differ from the images' aspect ratio: through rounding, or through
# borders without padding.
_CELLS = (2, 6)


class Layout(NamedTuple):
    """One way to read a layer's output as maps.

    axes: what its axes are. grid: (h, w) of its maps. leading: how many tokens come before those of
    the patches, such as a class token.
    """

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
    """How the output of `module`, a layer of `model` called `name`, is read.

    shape: of its output for these images, float[B,C,H,W]. Runs the model up to the layer, on one
    image or a few, so call it within `isolated`. Raises ValueError where the output cannot be read
    as maps, or in more than one way.
    """
    shape, size = tuple(shape), (images.shape[2], images.shape[3])
    leading = leading_tokens(model)
    if len(shape) == 4 and _plain(shape, size, leading):
        return Layout("[B,C,h,w]", (shape[2], shape[3]))
    seen = up_to(model, module, images[:1])
    found = readings(shape, size, leading, seen.convolved)
    if len(shape) == 4:
        found = _of_maps(found, shape, images, model, module, seen)
    elif any(layout.axes == "[B,C,N]" for layout in found) and not _reorders(model):
        # Such an output is too rare to be believed without an experiment.
        found = _of_places(found, shape, images, model, module)
    given = f"layer {name!r} gives {list(shape)} for images {list(images.shape)}"
    if found and _reorders(model):
        found = _local(found, images, model, module)
        if not found:
            raise ValueError(
                f"{given}, whose tokens are not in the order of the image's rows; pass a layer "
                "behind which they are, such as one of the last stage"
            )
    if len(found) == 1:
        return found[0]
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
    """Every way to read an output of this shape, for images of `size`, (H, W).

    leading: how many tokens may come before those of the patches. convolved: (h, w) of the
    convolutions that ran before, one of which made the patches.
    """
    if len(shape) == 4:
        _, a, b, c = shape
        both = (Layout("[B,C,h,w]", (b, c)), Layout("[B,h,w,C]", (a, b)))
        for cells in _CELLS:
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
    most = max(map(math.prod, grids), default=max(shape))
    if not made:  # No convolution made the patches: they were cut out, or merged from those of one.
        made = [
            Layout("[B,N,C]", grid, number)
            for number in leading
            if shape[1] - number <= most and (grid := _grid_of(shape[1] - number, size))
        ]
    flat = [Layout("[B,C,N]", grid) for grid in grids if shape[2] == math.prod(grid)]
    if not flat and shape[2] <= most and (grid := _grid_of(shape[2], size)):
        flat = [Layout("[B,C,N]", grid)]  # pooled
    return flat + made


def of_tokens(
    layout: Layout,
    size: tuple[int, int],
    leading: Iterable[int],
    convolved: Iterable[tuple[int, int]],
) -> bool:
    """Whether what was read as a map may be something made of tokens instead.

    A map with a side as long as there are tokens, which no convolution gave, may be an attention
    matrix, or one head's part of the tokens.
    """
    leading = list(leading)
    known: dict[tuple[int, int], None] = {}

    def suspect(grid: tuple[int, int], grids: Iterable[tuple[int, int]]) -> bool:
        counts = {math.prod(one) + n for one in grids for n in leading if math.prod(one) > 1}
        return grid not in known and not counts.isdisjoint(grid)

    patches: dict[tuple[int, int], None] = {}
    for grid in convolved:
        if not suspect(grid, patches):  # a convolution may run over attention matrices
            patches[grid] = None
            known.update(dict.fromkeys(_halved(grid)))
    h, w = layout.grid
    # An attention matrix of patches that were cut out without a convolution.
    matrix = h == w and any(number and _grid_of(h - number, size) for number in leading)
    return layout.grid not in known and (matrix or suspect(layout.grid, known))


def leading_tokens(model: nn.Module) -> list[int]:
    """How many tokens may come before those of the patches, ascending.

    The model or a part of it may say so by `num_prefix_tokens`, as timm's do (2 with a distillation
    token). If none does, it is one or none.
    """
    for modules in ([model], model.modules()):
        said = {getattr(module, "num_prefix_tokens", None) for module in modules}
        numbers = {number for number in said if isinstance(number, int)}
        if numbers:
            return sorted({0, *numbers})
    return [0, 1]


def _of_aspect(grid: tuple[int, int], size: tuple[int, int], cells: int) -> bool:
    """Whether a map has the image's aspect ratio, give or take `cells` along its short side."""
    (h, w), (height, width) = grid, size
    if height == width:
        return h == w
    if height > width:
        (h, w), (height, width) = (w, h), (width, height)
    return abs(h - w * height / width) <= max(cells, 0.05 * h)


def _grid_of(patches: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """(h, w) of so many patches with exactly the images' aspect ratio, if there is such a grid."""
    if patches < 1:
        return None
    divisor = math.gcd(*size)
    h, w = size[0] // divisor, size[1] // divisor
    times = math.isqrt(patches // (h * w))
    return (h * times, w * times) if h * w * times**2 == patches else None


def _plain(shape: tuple[int, ...], size: tuple[int, int], leading: Iterable[int]) -> bool:
    """Whether a 4-D shape is [B,C,h,w] of a square image without any doubt: its maps are square,
    its channels are not, and no side is as long as there may be tokens."""
    if size[0] != size[1] or shape[1] == shape[2] or shape[2] != shape[3]:
        return False
    return not any(_grid_of(shape[2] - number, size) for number in leading)


def _halved(grid: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """A grid, and those that pooling by 2, again and again, makes of it, rounded up or down."""
    grids = {grid}
    while grids:
        yield from grids
        grids = {
            half
            for h, w in grids
            if max(h, w) > 1
            for half in ((-(-h // 2), -(-w // 2)), (max(h // 2, 1), max(w // 2, 1)))
        }


def _of_maps(
    found: list[Layout],
    shape: tuple[int, ...],
    images: Tensor,
    model: nn.Module,
    module: nn.Module,
    seen: Seen,
) -> list[Layout]:
    """The readings of a 4-D shape that experiments confirm: which modules gave such a shape, and
    which axes grow with wider or taller images. They may also bring back a reading that the shape
    alone had ruled out."""
    _, a, b, c = shape
    first, last = Layout("[B,C,h,w]", (b, c)), Layout("[B,h,w,C]", (a, b))
    size, leading = (images.shape[2], images.shape[3]), leading_tokens(model)
    as_tokens = [one for one in (first, last) if of_tokens(one, size, leading, seen.convolved)]
    if found == [first] and first not in as_tokens and _of_aspect(first.grid, size, _CELLS[0]):
        return found
    looks = {along: moved(model, module, shape, images, along) for along in (3, 2)}
    told = {along: axes for along, axes in looks.items() if axes is not None}
    if any(told.values()):
        grows = {first: {3: [3], 2: [2]}, last: {3: [2], 2: [1]}}
        backed = [one for one in found if one not in as_tokens]
        if (a, b, c) in seen.first and first not in as_tokens:
            backed.append(first)
        # A reading that neither aspect nor convolution supports must have moved along both axes.
        return [
            one
            for one in (first, last)
            if (one in backed or len(told) == 2)
            and all(
                axes == grows[one][along] or (not axes and one in backed)
                for along, axes in told.items()
            )
        ]
    # The network takes no other size, or gives a map of one size for all images.
    found = [one for one in found if told or one not in as_tokens]
    if first in as_tokens and not told:
        return found
    by_class = isinstance(module, CHANNELS_FIRST)
    if by_class or ((a, b, c) in seen.first and (c, a, b) not in seen.first):
        return [first]
    return found


def _of_places(
    found: list[Layout],
    shape: tuple[int, ...],
    images: Tensor,
    model: nn.Module,
    module: nn.Module,
) -> list[Layout]:
    """The readings [B,N,C] or [B,C,N] that experiments confirm: the axis of the tokens grows with
    the images, or else a token changes where the image does. All, if neither decides."""
    axes = moved(model, module, shape, images, 3)
    if axes:
        token_axes = {"[B,N,C]": [1], "[B,C,N]": [2]}
        return [layout for layout in found if axes == token_axes[layout.axes]]
    return _local(found, images, model, module) or (found if len(found) > 1 else [])


def _local(
    found: list[Layout], images: Tensor, model: nn.Module, module: nn.Module
) -> list[Layout]:
    """The readings by which the layer changes most in the cell of its map in which the image was
    changed. Some cells are tried, and most of them must agree."""
    local = []
    for layout in found:
        cells, columns = math.prod(layout.grid), layout.grid[1]
        slack = 1 if min(layout.grid) >= 8 else 0  # patches may overlap
        tried = sorted({(2 * k + 1) * cells // 16 for k in range(8)})
        changed = changes(model, module, images, layout.grid, tried)
        peaks = layout.maps(changed).sum(1).flatten(1).argmax(1).tolist()
        near = [
            abs(peak // columns - cell // columns) <= slack
            and abs(peak % columns - cell % columns) <= slack
            for peak, cell in zip(peaks, tried, strict=True)
        ]
        if 2 * sum(near) > len(tried):
            local.append(layout)
    return local


def _reorders(model: nn.Module) -> bool:
    """Whether the network's tokens are in another order than the image's rows, as Hiera's are."""
    return any(type(module).__name__ in ("Unroll", "Reroll") for module in model.modules())
