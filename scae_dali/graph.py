"""What a DALI graph tells before anything runs: where ids come from, what was done to images.

DALI keeps this in private attributes, which this module alone reads. What it cannot follow, such as
a Python function, it calls unknown, and nothing is refused for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from nvidia.dali.pipeline import do_not_convert

__all__ = [
    "History",
    "Origin",
    "crop_generators",
    "history",
    "origin",
    "output_of",
]

DataNode = Any

# Kinds of operators, by their names without a prefix and as of today: see _kind.
_VALUES_STAY = {"Cast", "Copy", "ExpandDims", "MakeContiguous", "Reshape", "Squeeze"}
_PIXELS_STAY = _VALUES_STAY - {"ExpandDims", "Reshape", "Squeeze"} | {
    *("Brightness", "BrightnessContrast", "CastLike", "ColorSpaceConversion", "ColorTwist"),
    *("Contrast", "Erase", "GaussianBlur", "Hsv", "Hue", "Saturation"),
}
_CROPS = {
    *("Crop", "ImageCrop", "ImageRandomCrop", "ImageSlice", "RandomResizedCrop", "Slice"),
    *("ResizeCropMirror", "FastResizeCropMirror", "_TensorSubscript"),
}
_UNKNOWN = {
    *("DLTensorPythonFunction", "NumbaFunction", "PythonFunction", "TorchPythonFunction"),
    *("PeekImageShape", "Shapes", "_Shape"),
}
_SMALL = 0.02  # a factor that takes grey levels to some range near 1, and no change of brightness


class Origin(NamedTuple):
    """Where values come from that reach a node as they are.

    kind: the operator, such as File or GetProperty. output: which of its outputs. arguments: its
    constant ones. reader: the name of the reader that it is, or whose output it looks at.
    """

    kind: str
    output: int
    arguments: dict[str, Any]
    reader: str | None


@dataclass(frozen=True, kw_only=True)
class History:
    """What was done to images on the way to a node.

    known: whether every operator of the way is known. layout: such as HWC, None: unknown. size:
    (h, w) where the graph fixes it. cropped, flipped, scaled: the names of the operators that did
    so, as users write them, None: nobody; scaled: from grey levels to others, such as normalised
    ones. crops: how many operators cropped, one after the other. generators: the random crop
    generators that the crop was drawn by. fused_seed: of a random crop that a decoder draws.
    """

    known: bool = True
    layout: str | None = "HWC"
    size: tuple[int, int] | None = None
    cropped: str | None = None
    flipped: str | None = None
    scaled: str | None = None
    crops: int = 0
    generators: frozenset[str] = frozenset()
    fused_seed: int | None = None


@do_not_convert
def origin(node: DataNode) -> Origin | None:
    """The operator whose output reaches `node` unchanged but for type and shape; None: unknown."""
    while (source := getattr(node, "source", None)) is not None and _kind(node) in _VALUES_STAY:
        node = source.inputs[0]
    if source is None:
        return None
    reader = next((one.source.name for one in _ancestors(node) if _is_reader(one)), None)
    return Origin(_kind(node), node.index or 0, _arguments(node), reader)


@do_not_convert
def crop_generators(*nodes: DataNode) -> dict[str, int | None]:
    """The random crop generators that nodes hang on, by name, with their seeds."""
    every = (one for node in nodes for one in _ancestors(node))
    found = (one for one in every if _kind(one) == "RandomCropGenerator")
    return {one.source.name: _arguments(one).get("seed") for one in found}


@do_not_convert
def history(node: DataNode) -> History | None:
    """What was done to the images of a node; None where they come from somewhere unknown."""
    return _history(node, {})


def _history(node: DataNode, seen: dict[str, History | None]) -> History | None:
    if getattr(node, "source", None) is None:
        return None
    key = node.name
    if key not in seen:
        seen[key] = None  # of a circle, which there is none
        seen[key] = _step(node, seen)
    return seen[key]


def _step(node: DataNode, seen: dict[str, History | None]) -> History | None:
    kind, arguments, inputs = _kind(node), _arguments(node), node.source.inputs
    if kind == "ExternalSource":
        layout = getattr(node.source._op, "_layout", None)
        return History(known=False, layout=layout) if layout else None
    if kind in ("Image", "ImageCrop", "ImageRandomCrop", "ImageSlice"):
        if not _schema(node).startswith(("decoders__", "experimental__decoders__", "ImageDecoder")):
            return None
        return _decoded(node, kind, arguments)
    if kind in _UNKNOWN or _schema(node).startswith("reductions__") or not inputs:
        return None
    every = [_history(one, seen) for one in inputs]
    if kind in ("Merge", "_ArithmeticGenericOp"):
        branches = every[:-1] if kind == "Merge" else every  # the last tells which one
        known = [one for one in branches if one is not None]
        if not known:
            return None
        before = _merged(known)
    elif every[0] is None:
        return None
    else:
        before = every[0]
    return _after(node, kind, arguments, before)


def _decoded(node: DataNode, kind: str, arguments: dict[str, Any]) -> History:
    if kind == "Image":
        return History()
    size = _pair(arguments.get("crop")) if kind == "ImageCrop" else None
    seed = arguments.get("seed") if kind == "ImageRandomCrop" else None
    return History(
        size=size,
        cropped=_display(node),
        crops=1,
        generators=frozenset(crop_generators(*node.source.inputs[1:])),
        fused_seed=seed,
    )


def _merged(histories: list[History]) -> History:
    """Of images that are one or the other, or both at once."""
    first = histories[0]
    return History(
        known=all(one.known for one in histories),
        layout=first.layout if len({one.layout for one in histories}) == 1 else None,
        size=first.size if len({one.size for one in histories}) == 1 else None,
        cropped=next((one.cropped for one in histories if one.cropped), None),
        flipped=next((one.flipped for one in histories if one.flipped), None),
        scaled=next((one.scaled for one in histories if one.scaled), None),
        crops=max(one.crops for one in histories),
        generators=frozenset().union(*(one.generators for one in histories)),
        fused_seed=next((one.fused_seed for one in histories if one.fused_seed is not None), None),
    )


def _after(node: DataNode, kind: str, arguments: dict[str, Any], before: History) -> History:
    name = _display(node)
    given = len(node.source.inputs) - node.source.spec.NumRegularInput()  # arguments as nodes
    if kind == "Resize":
        size = _resized(arguments)
        # What is given as a node beside a constant size can hardly be anything but a region.
        if "roi_start" in arguments or (given and size is not None):
            return _crop(node, before, size)
        return replace(before, size=size)
    if kind == "CropMirrorNormalize":
        return _crop_mirror_normalised(name, arguments, before, given)
    if kind in ("Flip", "ResizeCropMirror", "FastResizeCropMirror"):
        default = 1 if kind == "Flip" else 0
        constant = arguments.get("horizontal" if kind == "Flip" else "mirror", default)
        if given or constant or arguments.get("vertical"):
            before = replace(before, flipped=name)
        if kind == "Flip":
            return before
    along_yx = any(one.endswith(("_0", "_1")) for one in arguments)
    if kind == "_TensorSubscript" and not given and not along_yx:
        return before  # of the channels alone
    if kind in _CROPS:
        return _crop(node, before, _cropped(arguments))
    if kind == "Transpose":
        return replace(before, layout=_transposed(arguments, before.layout), size=None)
    if kind == "Normalize" or (kind == "_ArithmeticGenericOp" and _scales(arguments)):
        return replace(before, scaled=name)
    if kind in _PIXELS_STAY or kind == "_ArithmeticGenericOp":
        return before
    if kind in ("Merge", "Split"):
        return before
    # Of DALI, and harmless as far as is known: a rotation, say.
    return replace(before, known=False, size=None)


def _crop(node: DataNode, before: History, size: tuple[int, int] | None) -> History:
    drawn_by = frozenset(crop_generators(*node.source.inputs[1:])) or before.generators
    return replace(
        before,
        size=size,
        cropped=_display(node),
        crops=before.crops + 1,
        generators=drawn_by,
    )


def _crop_mirror_normalised(
    name: str, arguments: dict[str, Any], before: History, given: int
) -> History:
    crops = any(part in arguments for part in ("crop", "crop_h", "crop_w"))
    shifts = any(_values(arguments.get("mean", 0)))
    scales = {*_values(arguments.get("std", 1)), *_values(arguments.get("scale", 1))} != {1}
    return replace(
        before,
        layout=str(arguments.get("output_layout", "CHW")),
        size=_cropped(arguments) if crops else before.size,
        cropped=name if crops else before.cropped,
        crops=before.crops + crops,
        flipped=name if arguments.get("mirror") or given > crops else before.flipped,
        scaled=name if shifts or scales else before.scaled,
    )


def _resized(arguments: dict[str, Any]) -> tuple[int, int] | None:
    if arguments.get("mode", "default") not in ("default", "stretch"):
        return None
    if "size" in arguments:
        return _pair(arguments["size"])
    return _pair([arguments.get("resize_y", 0), arguments.get("resize_x", 0)])


def _cropped(arguments: dict[str, Any]) -> tuple[int, int] | None:
    if "crop_h" in arguments or "crop_w" in arguments:
        return _pair([arguments.get("crop_h", 0), arguments.get("crop_w", 0)])
    return _pair(arguments.get("size", arguments.get("crop")))


def _pair(value: Any) -> tuple[int, int] | None:
    """(h, w) where both are known; one number is of both, as DALI has it."""
    if value is None:
        return None
    values = [float(one) for one in _values(value)]
    values = values * 2 if len(values) == 1 else values
    if len(values) != 2 or min(values) < 1 or any(math.isnan(one) for one in values):
        return None
    return round(values[0]), round(values[1])


def _values(value: Any) -> list[Any]:
    return list(value) if hasattr(value, "__iter__") else [value]


def _transposed(arguments: dict[str, Any], layout: str | None) -> str | None:
    perm = list(arguments.get("perm", ()))
    if layout is None or sorted(perm) != list(range(len(layout))):
        return None
    return "".join(layout[axis] for axis in perm)


def _scales(arguments: dict[str, Any]) -> bool:
    """Whether an arithmetic operator divides, or multiplies by a very small number."""
    operation = str(arguments.get("expression_desc", "")).partition("(")[0]
    constants = [abs(one) for one in arguments.get("real_constants", ())]
    return operation in ("div", "fdiv") or (
        operation == "mul" and bool(constants) and max(constants) <= _SMALL
    )


def output_of(node: DataNode, kind: str) -> int | None:
    """Which output of an operator of this kind a node is; None where it is another's."""
    return node.index or 0 if getattr(node, "source", None) and _kind(node) == kind else None


def _ancestors(node: DataNode) -> Iterator[DataNode]:
    """The node, and all that it hangs on, the nearest first."""
    todo, seen = [node], set()
    while todo:
        one = todo.pop(0)
        if getattr(one, "source", None) is None or one.name in seen:
            continue
        seen.add(one.name)
        yield one
        todo += one.source.inputs


def _schema(node: DataNode) -> str:
    operator = getattr(node.source, "_op", None)
    return getattr(operator, "schema_name", None) or type(operator).__name__


def _kind(node: DataNode) -> str:
    """The operator's name: File for fn.readers.file, Image for any of DALI's image decoders."""
    name = _schema(node).rpartition("__")[2]
    name = name.replace("ImageDecoder", "Image", 1)
    return name.removesuffix("Reader") or name


def _is_reader(node: DataNode) -> bool:
    name = _schema(node)
    return name.startswith("readers__") or (name.endswith("Reader") and not node.source.inputs)


def _display(node: DataNode) -> str:
    """As users write it: fn.decoders.image_random_crop."""
    arguments = getattr(node.source._op, "_init_args", {})
    module = str(arguments.get("_module", "nvidia.dali.fn")).removeprefix("nvidia.dali.")
    name = arguments.get("_display_name", _kind(node))
    return "an arithmetic operator" if module == "math" else f"{module}.{name}"


def _arguments(node: DataNode) -> dict[str, Any]:
    return dict(getattr(node.source._op, "_init_args", {}))
