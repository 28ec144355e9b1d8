"""Reads a DALI graph while it is being defined: the operators behind a node, and their arguments.

DALI keeps all this in private attributes of its nodes. This module alone reads them.
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

# Kinds of operators that hand on the values that they get, in another type or shape.
_VALUES_STAY = {"Cast", "Copy", "ExpandDims", "MakeContiguous", "Reshape", "Squeeze"}


class Origin(NamedTuple):
    """The operator that made the values of a node.

    kind: of the operator, such as File or GetProperty. output: which of its outputs it is.
    arguments: those that are constant. reader: the name of the reader that the values come from.
    """

    kind: str
    output: int
    arguments: dict[str, Any]
    reader: str | None


class Draw(NamedTuple):
    """The arguments that a random crop is drawn by. Two operators with the same ones, and a seed
    that is not None, draw the same crops."""

    seed: int | None
    area: tuple[float, ...]
    aspect: tuple[float, ...]
    attempts: int


@do_not_convert
def origin(node: DataNode) -> Origin | None:
    """The operator whose values reach the node, maybe in another type or shape; None: unknown."""
    while readable(node) and kind_of(node) in _VALUES_STAY:
        node = node.source.inputs[0]
    if not readable(node):
        return None
    reader = next((one.source.name for one in _ancestors(node) if is_reader(one)), None)
    return Origin(kind_of(node), node.index or 0, arguments_of(node), reader)


@do_not_convert
def sources(node: DataNode) -> frozenset[str]:
    """The names of the readers that a node's values come from."""
    return frozenset(one.source.name for one in _ancestors(node) if is_reader(one))


@do_not_convert
def permutations(node: DataNode) -> frozenset[str]:
    """The indices of every fn.permute_batch on the way to a node, see `permuted_by`."""
    every = (one for one in _ancestors(node) if kind_of(one) == "PermuteBatch")
    return frozenset(permuted_by(one) for one in every)


def permuted_by(node: DataNode) -> str:
    """The indices of an fn.permute_batch: the name of their node, or the numbers as a text."""
    indices = node.source.inputs[1:]
    return indices[0].name if indices else str(arguments_of(node).get("indices"))


@do_not_convert
def crop_draws(*nodes: DataNode) -> dict[str, Draw]:
    """The random crop generators that the nodes' values come from, by name."""
    every = (one for node in nodes for one in _ancestors(node))
    return {one.source.name: draw_of(one) for one in every if kind_of(one) == "RandomCropGenerator"}


@do_not_convert
def output_of(node: DataNode, operator: str) -> int | None:
    """Which output of an operator of this kind a node is; None where it is of another kind."""
    return node.index or 0 if readable(node) and kind_of(node) == operator else None


def draw_of(node: DataNode) -> Draw:
    """How an operator draws its random crop. The defaults are DALI's, the same for all that do."""
    arguments = arguments_of(node)
    return Draw(
        arguments.get("seed"),
        tuple(map(float, arguments.get("random_area", (0.08, 1.0)))),
        tuple(map(float, arguments.get("random_aspect_ratio", (3 / 4, 4 / 3)))),
        int(arguments.get("num_attempts", 10)),
    )


def _ancestors(node: DataNode) -> Iterator[DataNode]:
    """The node and all nodes that its values come from, the nearest first."""
    todo, seen = [node], set()
    while todo:
        one = todo.pop(0)
        if not readable(one) or one.name in seen:
            continue
        seen.add(one.name)
        yield one
        todo += one.source.inputs


def readable(node: DataNode) -> bool:
    """Whether the operator behind a node can be read; in DALI's debug mode there is none."""
    return hasattr(getattr(getattr(node, "source", None), "_op", None), "_init_args")


def schema_of(node: DataNode) -> str:
    operator = getattr(node.source, "_op", None)
    return getattr(operator, "schema_name", None) or type(operator).__name__


def kind_of(node: DataNode) -> str:
    """The kind of a node's operator: File for fn.readers.file, Image for any image decoder."""
    name = schema_of(node).rpartition("__")[2]
    name = name.replace("ImageDecoder", "Image", 1)
    return name.removesuffix("Reader") or name


def is_reader(node: DataNode) -> bool:
    name = schema_of(node)
    return name.startswith("readers__") or (name.endswith("Reader") and not node.source.inputs)


def display_name(node: DataNode) -> str:
    """The operator's name as users write it, such as fn.decoders.image_random_crop."""
    arguments = getattr(node.source._op, "_init_args", {})
    module = str(arguments.get("_module", "nvidia.dali.fn")).removeprefix("nvidia.dali.")
    name = arguments.get("_display_name", kind_of(node))
    if name == "_tensor_subscript":
        return "a subscript, images[…]"
    return "an arithmetic operator" if module == "math" else f"{module}.{name}"


def arguments_of(node: DataNode) -> dict[str, Any]:
    """The operator's constant arguments: numbers, texts, DALI's enumerations, and lists of them."""
    given = getattr(node.source._op, "_init_args", {})
    return {name: _plain(value) for name, value in given.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.value if isinstance(value, ScalarConstant) else value
