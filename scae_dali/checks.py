"""What settings are checked by, and the constants of images that several folders share."""

import importlib
import os

# ImageNet's mean and standard deviation of R, G and B, in grey levels [0, 255].
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

OLDEST_DALI = (2, 2)  # as in setup.cfg


def check(ok: bool, message: str) -> None:
    """Raise ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


def expand_home(config: object, *names: str) -> None:
    """Replace a leading ~ in these fields of a frozen config, which hold paths or None, by the home
    folder: a shell does so only at the beginning of a word, and YAML never."""
    for name in names:
        path = getattr(config, name)
        if path is not None:
            object.__setattr__(config, name, os.path.expanduser(path))


def check_dali() -> None:
    """Raise ModuleNotFoundError where DALI is missing, and ImportError where it is too old, each
    with the commands that install it."""
    install = (
        "for CUDA 12 (or without a GPU): pip install 'scae-dali[cuda12]', for CUDA 13: pip install "
        "'scae-dali[cuda13]'"
    )
    try:
        dali = importlib.import_module("nvidia.dali")
    except ModuleNotFoundError as error:
        if error.name not in ("nvidia", "nvidia.dali"):
            raise
        raise ModuleNotFoundError(
            f"NVIDIA DALI is not installed; {install}", name=error.name
        ) from None
    if tuple(map(int, dali.__version__.split(".")[:2])) < OLDEST_DALI:
        oldest = ".".join(map(str, OLDEST_DALI))
        raise ImportError(
            f"NVIDIA DALI must be {oldest} or newer, got {dali.__version__}; remove it, and then "
            f"{install}"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of the choices."""
    check(value in choices, f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_prob(name: str, value: float) -> None:
    """Raise ValueError unless value is in [0, 1]."""
    check(0 <= value <= 1, f"{name} must be a probability in [0, 1], got {value}")


def check_seed(seed: int) -> None:
    """Raise ValueError unless seed is in [0, 2⁶⁴)."""
    check(0 <= seed < 1 << 64, f"seed must be in [0, 2**64), got {seed}")
