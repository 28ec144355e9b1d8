"""Weights from a file, put into a network that they must fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scae_dali.checks import check

__all__ = ["fit", "load_weights", "unscaled"]


def load_weights(net: nn.Module, path: str) -> None:
    """Load a state_dict into `net`, in place: a file of torch.save.

    The state_dict may stand in a checkpoint, under one of the names that trainers give it, and its
    names may have the prefix of a wrapper, such as `module.`. A second stage's scale is multiplied
    into its linear layer. Nothing but tensors, numbers, texts and their containers is read.
    Raises ValueError where there is no such file or no state_dict in it, and where it does not fit.
    """
    check(
        Path(path).is_file(),
        f"weights must be the file of a state_dict, got {path!r}, where there is none; train.py "
        "writes weights.pt into the run's folder",
    )
    where = f"weights {path!r}"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"{where} cannot be read ({type(error).__name__}: {reason}): it is no file of "
            "torch.save, it is cut off, or it holds objects, which could run code. If you trust "
            "it, write its tensors alone by torch.save(model.state_dict(), FILE)"
        ) from error
    state = _unwrapped(state, net.state_dict())
    if state is None:
        raise ValueError(
            f"{where} holds no state_dict of tensors; write one by torch.save(model.state_dict(), "
            "FILE)"
        )
    for name in [key.removesuffix(".scale") for key in state if key.endswith(".scale")]:
        if f"{name}.linear.weight" in state:
            state = unscaled(state, name)
    fit(
        net,
        state,
        where,
        other="set model, and data of as many classes, to those that the weights are of",
        infinite="its training has diverged; name the weights of one that has not",
    )


# Under which names trainers keep a state_dict in a checkpoint.
_IN_CHECKPOINTS = ("net", "state_dict", "model", "model_state_dict", "model_state", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.")


def _unwrapped(state: Any, own: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The state_dict in what a file holds, by the names of the network; None where there is none.

    own: the network's.
    """
    while isinstance(state, Mapping) and not _is_state(state):
        inner = [state[name] for name in _IN_CHECKPOINTS if isinstance(state.get(name), Mapping)]
        if not inner:
            return None
        state = inner[0]
    if not isinstance(state, Mapping):
        return None
    found = dict(state)
    count = found.pop("n_averaged", None)  # of torch's AveragedModel
    if count is not None and "n_averaged" in own:
        found["n_averaged"] = count
    while (prefix := next((p for p in _PREFIXES if _all_begin(found, p)), None)) is not None:
        if _all_begin(own, prefix):
            break
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _is_state(state: Mapping[Any, Any]) -> bool:
    return bool(state) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    )


def _all_begin(state: Mapping[str, Tensor], prefix: str) -> bool:
    return bool(state) and all(name.startswith(prefix) for name in state)


def fit(net: nn.Module, state: dict[str, Tensor], where: str, *, other: str, infinite: str) -> None:
    """Load a state into `net`, in place. where: the file, for an error.

    Raises ValueError where the names or shapes differ, with the remedy `other`, and where weights
    are not finite, for the reason `infinite`.
    """
    own = net.state_dict()
    odd = [f"it lacks {key}" for key in own if key not in state]
    odd += [f"it has {key}, which the network lacks" for key in state if key not in own]
    odd += [
        f"{key} is {list(state[key].shape)} there and {list(own[key].shape)} in the network"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    check(
        not odd,
        f"{where} is of another network ({len(odd)} differences: {'; '.join(odd[:2])}); {other}",
    )
    kept = {key for key, _ in net.named_parameters()}  # other buffers may hold -inf, as masks do
    kept |= {key for key in own if key.endswith(("running_mean", "running_var"))}
    odd = [key for key in own if key in kept and not state[key].isfinite().all()]
    check(
        not odd,
        f"{where} has values that are not finite ({', '.join(odd[:3])}): {infinite}",
    )
    net.load_state_dict(state)


def unscaled(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The state with a ScaledLinear head replaced by a plain linear layer of the same logits."""
    if f"{name}.scale" not in state:
        return state
    state = dict(state)
    scale = state.pop(f"{name}.scale")
    for part in ("weight", "bias"):
        value = state.pop(f"{name}.linear.{part}", None)
        if value is not None:
            state[f"{name}.{part}"] = scale.reshape(-1, *[1] * (value.ndim - 1)) * value
    return state
