"""Types of the tools' options: each turns the text of an option into what it means, or says what
the option takes.
"""

from __future__ import annotations

import math
import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

__all__ = [
    "count",
    "device",
    "existing_file",
    "existing_folder",
    "positive",
    "share",
    "shares",
    "sizes",
    "some_of",
    "usable_device",
    "usable_devices",
    "whole_numbers",
]


def count(text: str) -> int:
    """5 -> 5; at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ArgumentTypeError(f"must be a whole number, at least 1, got {text}")
    return number


def whole_numbers(text: str) -> list[int]:
    """1,2 -> [1, 2]; each once, and at least 1."""
    try:
        return list(dict.fromkeys(count(part) for part in text.split(",")))
    except ArgumentTypeError as error:
        raise ArgumentTypeError(
            f"must be whole numbers from 1 on, as in 1,2, got {text}"
        ) from error


def sizes(text: str) -> list[int]:
    """100000,1e7 -> [100000, 10000000], ascending."""
    try:
        found = sorted({int(float(part)) for part in text.split(",")})
    except (ValueError, OverflowError):
        found = []
    if not found or found[0] < 1:
        raise ArgumentTypeError(f"must be numbers of samples, such as 1e5,1281167, got {text!r}")
    return found


def positive(text: str) -> float:
    """0.5 -> 0.5; more than 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"must be a number above 0, got {text}")
    return number


def share(text: str) -> float:
    """0.5 -> 0.5; from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise ArgumentTypeError(f"must be a number from 0 to 1, got {text}")
    return number


def shares(text: str) -> list[float]:
    """0.5,1 -> [0.5, 1.0]; each once."""
    return list(dict.fromkeys(map(share, text.split(","))))


def some_of(*choices: str) -> Callable[[str], list[str]]:
    """A,B -> ["A", "B"], out of the choices."""

    def parse(text: str) -> list[str]:
        parts = list(dict.fromkeys(text.split(",")))
        if unknown := [part for part in parts if part not in choices]:
            raise ArgumentTypeError(
                f"must be some of {', '.join(choices)}, joined by commas, got {', '.join(unknown)}"
            )
        return parts

    return parse


def device(text: str) -> int | None:
    """The number of a GPU; None for `cpu`."""
    if text != "cpu" and not text.isdecimal():
        raise ArgumentTypeError(f"must be cpu or the number of a GPU, got {text}")
    return None if text == "cpu" else int(text)


def usable_device(text: str) -> int | None:
    """`device`, of a GPU that is there."""
    import torch

    number, found = device(text), torch.cuda.device_count()
    if number is not None and number >= found:
        raise ArgumentTypeError(
            f"must be cpu or one of the {found} GPUs that torch can use here, from 0 on, got {text}"
        )
    return number


def usable_devices(text: str) -> list[int | None]:
    """0,1 -> [0, 1]; cpu -> [None]."""
    return [usable_device(part) for part in text.split(",")]


def existing_file(text: str) -> Path:
    """A file that is there."""
    if not os.path.isfile(text):
        raise ArgumentTypeError(f"must be a file, and there is none at {text!r}")
    return Path(text)


def existing_folder(text: str) -> str:
    """A folder that is there."""
    if not os.path.isdir(text):
        raise ArgumentTypeError(f"must be a folder, and there is none at {text!r}")
    return text
