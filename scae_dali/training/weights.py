"""Weights from a file, put into a network that they must fit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from scae_dali.checks import check

__all__ = ["fit", "load_weights", "unscaled"]


def load_weights(net: nn.Module, path: str) -> None:
    """Load a state_dict into `net`, in place: a file of torch.save, which may be the checkpoint of
    a run. A second stage's scale is multiplied into its linear layer.

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
            f"{where} cannot be read ({type(error).__name__}: {reason}); write them by "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    state = state.get("net", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
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
