"""The operators of a DALI graph, as they are known before anything runs.

DALI keeps them in private attributes of its nodes, which this module alone reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from nvidia.dali.pipeline import do_not_convert
from nvidia.dali.types import ScalarConstant

__all__ = [
    "Draw",
    "Origin",
    "arguments_of",
    "crop_draws",
    "display_name",
    "draw_of",
    "is_reader",
    "kind_of",
    "origin",
    "output_of",
    "permutations",
    "permuted_by",
    "readable",
    "schema_of",
    "sources",
]

DataNode = Any

# Kinds of operators that hand values on, but for type and shape.
_VALUES_STAY = {"Cast", "Copy", "ExpandDims", "MakeContiguous", "Reshape", "Squeeze"}


class Origin(NamedTuple):
    """Where values come from that reach a node as they are.

    kind: the operator, such as File or GetProperty. output: which of its outputs. arguments: its
    constant ones. reader: the name of the reader that it is, or whose output it looks at.
    """

    kind: str
    output: int
    arguments: dict[str, Any]
    reader: str | None


class Draw(NamedTuple):
    """What a random crop is drawn by; equal ones draw the same crops, but for no seed."""

    seed: int | None
    area: tuple[float, ...]
    aspect: tuple[float, ...]
    attempts: int


@do_not_convert
def origin(node: DataNode) -> Origin | None:
    """The operator whose output reaches `node` unchanged but for type and shape; None: unknown."""
    while readable(node) and kind_of(node) in _VALUES_STAY:
        node = node.source.inputs[0]
    if not readable(node):
        return None
    reader = next((one.source.name for one in _ancestors(node) if is_reader(one)), None)
    return Origin(kind_of(node), node.index or 0, arguments_of(node), reader)


@do_not_convert
def sources(node: DataNode) -> frozenset[str]:
    """The readers that a node hangs on, by name."""
    return frozenset(one.source.name for one in _ancestors(node) if is_reader(one))


@do_not_convert
def permutations(node: DataNode) -> frozenset[str]:
    """What ids were permuted by within their batch: the indices of fn.permute_batch, by name."""
    every = (one for one in _ancestors(node) if kind_of(one) == "PermuteBatch")
    return frozenset(permuted_by(one) for one in every)


def permuted_by(node: DataNode) -> str:
    """The indices of an fn.permute_batch: the node that they are, or the numbers themselves."""
    indices = node.source.inputs[1:]
    return indices[0].name if indices else str(arguments_of(node).get("indices"))


@do_not_convert
def crop_draws(*nodes: DataNode) -> dict[str, Draw]:
    """The random crop generators that nodes hang on, by name."""
    every = (one for node in nodes for one in _ancestors(node))
    return {one.source.name: draw_of(one) for one in every if kind_of(one) == "RandomCropGenerator"}


@do_not_convert
def output_of(node: DataNode, operator: str) -> int | None:
    """Which output of an operator of this kind a node is; None where it is another's."""
    return node.index or 0 if readable(node) and kind_of(node) == operator else None


def draw_of(node: DataNode) -> Draw:
    """With DALI's defaults, the same for all operators that draw a crop."""
    arguments = arguments_of(node)
    return Draw(
        arguments.get("seed"),
        tuple(map(float, arguments.get("random_area", (0.08, 1.0)))),
        tuple(map(float, arguments.get("random_aspect_ratio", (3 / 4, 4 / 3)))),
        int(arguments.get("num_attempts", 10)),
    )


def _ancestors(node: DataNode) -> Iterator[DataNode]:
    """The node, and all that it hangs on, the nearest first."""
    todo, seen = [node], set()
    while todo:
        one = todo.pop(0)
        if not readable(one) or one.name in seen:
            continue
        seen.add(one.name)
        yield one
        todo += one.source.inputs


def readable(node: DataNode) -> bool:
    """Whether the operator of a node is known; DALI's debug mode has none."""
    return hasattr(getattr(getattr(node, "source", None), "_op", None), "_init_args")


def schema_of(node: DataNode) -> str:
    operator = getattr(node.source, "_op", None)
    return getattr(operator, "schema_name", None) or type(operator).__name__


def kind_of(node: DataNode) -> str:
    """The operator's name: File for fn.readers.file, Image for any of DALI's image decoders."""
    name = schema_of(node).rpartition("__")[2]
    name = name.replace("ImageDecoder", "Image", 1)
    return name.removesuffix("Reader") or name


def is_reader(node: DataNode) -> bool:
    name = schema_of(node)
    return name.startswith("readers__") or (name.endswith("Reader") and not node.source.inputs)


def display_name(node: DataNode) -> str:
    """As users write it: fn.decoders.image_random_crop."""
    arguments = getattr(node.source._op, "_init_args", {})
    module = str(arguments.get("_module", "nvidia.dali.fn")).removeprefix("nvidia.dali.")
    name = arguments.get("_display_name", kind_of(node))
    if name == "_tensor_subscript":
        return "a subscript, images[…]"
    return "an arithmetic operator" if module == "math" else f"{module}.{name}"


def arguments_of(node: DataNode) -> dict[str, Any]:
    """Those that are constant, as numbers, texts, DALI's enumerations and lists."""
    given = getattr(node.source._op, "_init_args", {})
    return {name: _plain(value) for name, value in given.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.value if isinstance(value, ScalarConstant) else value
