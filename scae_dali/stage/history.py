"""What was done to images on their way to a node of a DALI graph: cropped, resized, normalised.

From this it can be told whether a stage gets the images that it needs. The graph is followed back
to the decoder. What an unknown operator does, such as a Python function, counts as unknown; what is
done after it is seen again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nvidia.dali import types
from nvidia.dali.pipeline import do_not_convert

from scae_dali.stage.graph import (
    DataNode,
    Draw,
    arguments_of,
    crop_draws,
    display_name,
    draw_of,
    is_reader,
    kind_of,
    permuted_by,
    readable,
    schema_of,
)

__all__ = ["History", "history"]

# Operators by their kinds; see graph.kind_of.
_COLOURS = {
    *("Brightness", "BrightnessContrast", "CastLike", "ColorSpaceConversion", "ColorTwist"),
    *("Contrast", "Equalize", "Erase", "Filter", "GaussianBlur", "GridMask", "Hsv", "Hue"),
    *("JpegCompressionDistortion", "Gaussian", "LookupTable", "SaltAndPepper", "Saturation"),
    *("Shot", "Cast", "Copy", "MakeContiguous"),
}
_CROPS = {"Cat", "Crop", "Pad", "Paste", "RandomResizedCrop", "SSDRandomCrop", "Slice"}
_RESIZES_TOO = {"FastResizeCropMirror", "ResizeCropMirror"}
_FUNCTIONS = {
    *("DLTensorPythonFunction", "NumbaFunction", "PythonFunction", "TorchPythonFunction"),
}
_NO_IMAGES = {"Constant", "PeekImageShape", "Shapes", "_Shape"}
_SMALL = 1 / 32  # a factor that takes grey levels to a range near 1, and no change of brightness


@dataclass(frozen=True, kw_only=True)
class History:
    """What was done to images on their way to a node.

    known: whether every operator on the way is known.
    layout: such as HWC; None: unknown. size: (h, w) in pixels where the graph fixes it.

    The next four are names of operators, as users write them, or None where none did so:
    cropped: the last that cropped. flipped: the last that flipped, or turned by a large angle.
    turned: the decoder, if it keeps the orientation that an image is stored with instead of making
    it upright. scaled: the last that took grey levels to other values, such as a normalisation.

    crops: how many operators cropped, one after the other. resized: whether one resized. late:
    whether one cropped what had been resized. drawn_by: names of the random crop generators that
    the last crop comes from. fused: how that crop is drawn, if one operator both draws and crops.
    permuted: the indices by which the order of the batch was changed.
    """

    known: bool = True
    layout: str | None = "HWC"
    size: tuple[int, int] | None = None
    cropped: str | None = None
    flipped: str | None = None
    turned: str | None = None
    scaled: str | None = None
    crops: int = 0
    resized: bool = False
    late: bool = False
    drawn_by: frozenset[str] = frozenset()
    fused: Draw | None = None
    permuted: frozenset[str] = frozenset()


_UNKNOWN = History(known=False, layout=None)


@do_not_convert
def history(node: DataNode) -> History | None:
    """What was done to the images of a node; None where the node gives no images."""
    return _history(node, {})


def _history(node: DataNode, seen: dict[str, History | None]) -> History | None:
    if not readable(node):
        return _UNKNOWN
    if node.name not in seen:
        seen[node.name] = _step(node, seen)
    return seen[node.name]


def _step(node: DataNode, seen: dict[str, History | None]) -> History | None:
    kind, schema, inputs = kind_of(node), schema_of(node), node.source.inputs
    if kind == "ExternalSource":
        return replace(_UNKNOWN, layout=getattr(node.source._op, "_layout", None) or None)
    if schema.startswith(("decoders__Image", "experimental__decoders__Image", "ImageDecoder")):
        return _decoded(node, kind, arguments_of(node))
    if kind in _FUNCTIONS or is_reader(node):
        return _UNKNOWN
    if kind in _NO_IMAGES or schema.startswith(("reductions__", "random__")) or not inputs:
        return None
    if kind == "Merge":  # the last input tells which branch
        return _merged([one for one in (_history(i, seen) for i in inputs[:-1]) if one])
    if kind == "_ArithmeticGenericOp":  # with two images, as in a mix, the first one counts
        before = next((one for one in (_history(i, seen) for i in inputs) if one), None)
        return None if before is None else _calculated(node, before)
    before = _history(inputs[0], seen)
    return None if before is None else _after(node, kind, arguments_of(node), before)


def _decoded(node: DataNode, kind: str, arguments: dict[str, Any]) -> History:
    name = display_name(node)
    bytes_ = arguments.get("dtype", types.UINT8) == types.UINT8
    whole = History(
        scaled=None if bytes_ else name,
        turned=None if arguments.get("adjust_orientation", True) else name,
    )
    if kind == "Image":
        return whole
    size = _pair(arguments.get("crop"), int) if kind == "ImageCrop" else None
    cropped = _crop(node, whole, size)
    return replace(cropped, fused=draw_of(node)) if kind == "ImageRandomCrop" else cropped


def _merged(histories: list[History]) -> History | None:
    """The history of images that come from one of several branches of a conditional."""
    if not histories:
        return None
    first = histories[0]
    every = {
        name: next((value for one in histories if (value := getattr(one, name))), None)
        for name in ("cropped", "flipped", "turned", "scaled", "fused")
    }
    return History(
        known=all(one.known for one in histories),
        layout=first.layout if len({one.layout for one in histories}) == 1 else None,
        size=first.size if len({one.size for one in histories}) == 1 else None,
        crops=max(one.crops for one in histories),
        resized=any(one.resized for one in histories),
        late=any(one.late for one in histories),
        drawn_by=frozenset().union(*(one.drawn_by for one in histories)),
        permuted=frozenset().union(*(one.permuted for one in histories)),
        **every,
    )


def _after(node: DataNode, kind: str, arguments: dict[str, Any], before: History) -> History:
    name = display_name(node)
    # Arguments that are nodes have lost their names. A region of interest takes two of them, a
    # position of a crop two, and a mirror one.
    given = len(node.source.inputs) - 1
    if kind == "Resize":
        return _resized(node, arguments, before, given)
    if kind == "CropMirrorNormalize":
        return _crop_mirror_normalised(node, arguments, before, given)
    if kind in _RESIZES_TOO:
        if arguments.get("mirror") or given % 2:
            before = replace(before, flipped=name)
        size = _pair(arguments.get("crop"), int)
        if size is None and "crop" not in arguments and given < 2 and "roi_start" not in arguments:
            return replace(before, size=_size_of_resize(arguments), resized=True)
        return _crop(node, before, size)
    if kind == "Flip":
        constant = arguments.get("horizontal", 1) or arguments.get("vertical")
        return replace(before, flipped=name) if given or constant else before
    if kind == "Rotate":
        half = abs(float(arguments.get("angle", 0))) > 45
        keeps = arguments.get("keep_size")
        before = replace(before, known=False, size=before.size if keeps else None)
        return replace(before, flipped=name) if half else before
    if kind == "WarpAffine":
        matrix = list(arguments.get("matrix", (1, 0, 0, 0, 1, 0)))
        size = before.size if "size" not in arguments and given < 1 else None
        before = replace(before, known=False, size=size)
        return replace(before, flipped=name) if min(matrix[0], matrix[4]) < 0 else before
    if kind == "_TensorSubscript":
        return _subscripted(node, arguments, before, given)
    if kind in ("Cat", "Slice") and _of_channels(arguments):
        return before
    if kind in _CROPS:
        cropped = _crop(node, before, _size_of_crop(arguments))
        return replace(cropped, fused=draw_of(node)) if kind == "RandomResizedCrop" else cropped
    if kind == "Transpose":
        return replace(before, layout=_transposed(arguments, before.layout), size=None)
    if kind in ("Reshape", "Reinterpret"):
        layout = arguments.get("layout", before.layout)
        return replace(before, known=False, layout=layout and str(layout), size=None)
    if kind == "PermuteBatch":
        return replace(before, permuted=before.permuted | {permuted_by(node)})
    if kind == "Normalize":
        grey = arguments.get("dtype") == types.UINT8
        return before if grey else replace(before, scaled=name)
    if kind in _COLOURS or kind == "Split":
        dark = abs(float(arguments.get("brightness", 1))) <= _SMALL
        narrow = arguments.get("dtype") in (types.INT8, types.BOOL)
        return replace(before, scaled=name) if dark or narrow else before
    # Another operator: the images may be as before.
    return replace(before, known=False, size=None)


def _resized(node: DataNode, arguments: dict[str, Any], before: History, given: int) -> History:
    size = _size_of_resize(arguments)
    after = replace(before, resized=True)
    if any(float(one) < 0 for one in _sides(arguments)):  # DALI turns the image round
        after = replace(after, flipped=display_name(node))
    if "roi_start" in arguments or "roi_end" in arguments or (given > 1 and size is not None):
        return replace(_crop(node, before, size), flipped=after.flipped, resized=True)
    return replace(after, size=size)


def _crop_mirror_normalised(
    node: DataNode, arguments: dict[str, Any], before: History, given: int
) -> History:
    name = display_name(node)
    if any(part in arguments for part in ("crop", "crop_h", "crop_w")):
        before = _crop(node, before, _size_of_crop(arguments))
    shifts = any((*_values(arguments.get("mean", 0)), arguments.get("shift", 0)))
    scales = {*_values(arguments.get("std", 1)), *_values(arguments.get("scale", 1))} != {1}
    return replace(
        before,
        layout=str(arguments.get("output_layout", "CHW")),
        flipped=name if arguments.get("mirror") or given % 2 else before.flipped,
        scaled=name if shifts or scales else before.scaled,
    )


def _crop(node: DataNode, before: History, size: tuple[int, int] | None) -> History:
    if size is not None and size == before.size:
        return before  # all of it
    draws = frozenset(crop_draws(*node.source.inputs[1:]))
    return replace(
        before,
        size=size,
        cropped=display_name(node),
        crops=before.crops + 1,
        late=before.late or before.resized,
        drawn_by=draws or before.drawn_by,
    )


def _subscripted(node: DataNode, arguments: dict[str, Any], before: History, given: int) -> History:
    """The history after images[y0:y1, x0:x1, channels]."""
    if any(one.startswith("at_") for one in arguments):  # one of several, such as a frame
        return replace(before, known=False, size=None)
    along_yx = any(one.endswith(("_0", "_1")) for one in arguments)
    return _crop(node, before, None) if along_yx or given else before


def _of_channels(arguments: dict[str, Any]) -> bool:
    """Whether a slice, or a concatenation, is along the channels alone."""
    names = str(arguments.get("axis_names", arguments.get("axis_name", "")))
    axes = arguments.get("axes", arguments.get("axis", ()))
    return names == "C" if names else _values(axes) == [2]


def _calculated(node: DataNode, before: History) -> History:
    """The history after arithmetic, which may take grey levels to other values, or back."""
    arguments, name = arguments_of(node), display_name(node)
    operation, _, operands = str(arguments.get("expression_desc", "")).partition("(")
    numbers = [*arguments.get("real_constants", ()), *arguments.get("integer_constants", ())]
    for one in node.source.inputs:
        if kind_of(one) == "Constant":
            numbers += [*arguments_of(one).get("fdata", ()), *arguments_of(one).get("idata", ())]
    largest = max((abs(float(one)) for one in numbers), default=0.0)
    if operation in ("sub", "minus") and numbers and operands.startswith("&"):
        return replace(before, scaled=name)
    factor = largest if operation == "mul" else 1 / largest if largest else 0.0
    if operation not in ("mul", "div", "fdiv") or not factor:
        return before
    if factor <= _SMALL:
        return replace(before, scaled=name)
    return replace(before, scaled=None) if factor >= 1 / _SMALL else before


def _sides(arguments: dict[str, Any]) -> list[Any]:
    if "size" in arguments:
        return _values(arguments["size"])
    return [arguments.get("resize_y", 0), arguments.get("resize_x", 0)]


def _size_of_resize(arguments: dict[str, Any]) -> tuple[int, int] | None:
    if arguments.get("mode", "default") not in ("default", "stretch") or "max_size" in arguments:
        return None
    return _pair([abs(float(one)) for one in _sides(arguments)], lambda one: int(one + 0.5))


def _size_of_crop(arguments: dict[str, Any]) -> tuple[int, int] | None:
    if arguments.get("out_of_bounds_policy") == "trim_to_shape":
        return None
    if "crop_h" in arguments or "crop_w" in arguments:
        return _pair([arguments.get("crop_h", 0), arguments.get("crop_w", 0)], int)
    return _pair(arguments.get("crop", arguments.get("size")), int)


def _pair(value: Any, whole: Any) -> tuple[int, int] | None:
    """(h, w) where both are known. One number stands for both, as in DALI. whole: rounds."""
    if value is None:
        return None
    values = _values(value)
    values = values * 2 if len(values) == 1 else values
    if len(values) != 2 or not min(map(float, values)) >= 1:
        return None
    return whole(float(values[0])), whole(float(values[1]))


def _values(value: Any) -> list[Any]:
    return list(value) if hasattr(value, "__iter__") else [value]


def _transposed(arguments: dict[str, Any], layout: str | None) -> str | None:
    perm = list(arguments.get("perm", ()))
    if layout is None or sorted(perm) != list(range(len(layout))):
        return None
    return "".join(layout[axis] for axis in perm)
