"""Weights from a file, put into a network that they must fit."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scae_dali.checks import check
from scae_dali.saliency.weights import plain, stable_bytes

__all__ = [
    "check_extra_state",
    "fit",
    "is_state",
    "load_weights",
    "unscaled",
    "weights_content",
]


def load_weights(net: nn.Module, path: str) -> str | None:
    """Load a state_dict into `net`, in place: a file of torch.save.

    The state_dict may stand in a checkpoint, under one of the names that trainers give it, and its
    names may have the prefix of a wrapper, such as `module.`. Of a checkpoint of train.py with an
    average of the weights, the average is taken. A second stage's scale is multiplied into its
    linear layer. Nothing but tensors, numbers, texts and their containers is read. Returns a note
    for the user where the file holds other weights too, such as an average of them. Raises
    ValueError where there is no such file or no state_dict in it, and where it does not fit.
    """
    state, note = _read(path, net.state_dict())
    for name in [key.removesuffix(".scale") for key in state if key.endswith(".scale")]:
        if f"{name}.linear.weight" in state:
            state = unscaled(state, name)
    fit(
        net,
        state,
        f"weights {path!r}",
        other="set model, and data of as many classes, to those that the weights are of",
        infinite="its training has diverged; name the weights of one that has not",
    )
    return note


def weights_content(path: str, setting: str = "weights") -> str:
    """BLAKE2b-128 of the state_dict that `load_weights` takes from a file, hex: the same whatever
    it is wrapped in.

    setting: the one that names the file, for an error. Raises ValueError where there is no such
    file or no state_dict in it.
    """
    state, _ = _read(path, {}, setting)
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(state.items()):
        of = f"{value.dtype} {tuple(value.shape)} " if isinstance(value, Tensor) else ""
        digest.update(f"{name} {of}".encode())
        for part in stable_bytes(value):
            digest.update(part)
    return digest.hexdigest()


def _read(
    path: str, own: Mapping[str, Any], setting: str = "weights"
) -> tuple[dict[str, Any], str | None]:
    """The state_dict in a file by the names of the network, and a note, see load_weights.

    own: the network's; an empty one removes every prefix.
    """
    check(
        Path(path).is_file(),
        f"{setting} must be the file of a state_dict, got {path!r}, where there is none; train.py "
        "writes weights.pt into the run's folder",
    )
    where = f"{setting} {path!r}"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"{where} cannot be read ({type(error).__name__}: {reason}): it is no file of "
            "torch.save, it is cut off, or it holds objects, which could run code. If you trust "
            "it, write its tensors alone by torch.save(model.state_dict(), FILE)"
        ) from error
    names = _place(content)
    if names is None:
        raise ValueError(
            f"{where} holds no state_dict of tensors; write one by torch.save(model.state_dict(), "
            "FILE)"
        )
    note, state = None, content
    for depth, name in enumerate(names):
        others = _others(state, name)
        if depth == 0 and _of_train(content) and name == "ema":
            note = (
                f"{where} holds the weights of a run and their average: the average is taken, "
                "which the run validates and saves"
            )
        elif others and note is None:
            keys = "".join(f"[{one!r}]" for one in (*names[:depth], others[0]))
            what, one = ("other", "another state_dict")
            if _is_average(others[0]):
                what, one = ("average", "an average")
            note = (
                f"{where} holds {name!r} and {one}, {others[0]!r}: {name!r} is taken. If you mean "
                f"the {what}, write it to a file of its own: "
                f"torch.save(torch.load({path!r}){keys}, FILE)"
            )
        state = state[name]
    for name, value in state.items():
        try:
            if isinstance(value, Tensor):
                _finite(value), tuple(value.shape)
        except Exception as error:  # one on the device meta has no values, a nested one no shape
            raise ValueError(
                f"{where} holds {name} as a tensor without values, or of a kind that cannot be "
                f"read ({type(error).__name__}); load it into the network before you save the "
                "network's state_dict"
            ) from error
    return _unwrapped(state, own), note


# Under which names trainers keep a state_dict in a checkpoint.
_IN_CHECKPOINTS = ("net", "state_dict", "model", "model_state_dict", "model_state", "module")
_AVERAGE = re.compile(r"(.*[_.-])?(ema|swa|avg|averaged?|shadow)([_.-].*)?", re.IGNORECASE)
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.")


def _place(content: Any) -> list[str] | None:
    """The names under which a state_dict lies in what a file holds, the outermost first; None where
    there is none.

    An average counts where nothing else does, and in a checkpoint of train.py, which validates it.
    """
    if not isinstance(content, Mapping):
        return None
    if is_state(content):
        return []
    first = ["ema"] if _of_train(content) else []
    for name in (*first, *_IN_CHECKPOINTS, *filter(_is_average, content)):
        if (inner := _place(content.get(name))) is not None:
            return [name, *inner]
    return None


def _others(content: Mapping[Any, Any], taken: str) -> list[str]:
    """The names of other weights than those taken: averages, and then those of the same network."""
    states = {name: _names(inner) for name, inner in content.items() if isinstance(name, str)}
    own = states.pop(taken)
    found = [name for name, names in states.items() if names and _is_average(name)]
    return found + [name for name, names in states.items() if names == own and name not in found]


def _names(content: Any) -> set[str]:
    """The names in the state_dict that lies in what a file holds; none where there is none."""
    if (place := _place(content)) is None:
        return set()
    for name in place:
        content = content[name]
    return set(_unwrapped(content, {}))


def _is_average(name: Any) -> bool:
    return isinstance(name, str) and _AVERAGE.fullmatch(name) is not None


def _of_train(content: Mapping[Any, Any]) -> bool:
    """Whether it is a checkpoint of train.py."""
    return {"of", "net", "optimizer", "ranks"} <= content.keys()


def _unwrapped(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict by the names of the network. own: the network's."""
    found = dict(state)
    count = found.pop("n_averaged", None)  # of torch's AveragedModel
    if count is not None and "n_averaged" in own:
        found["n_averaged"] = count
    while (prefix := next((p for p in _PREFIXES if _all_begin(found, p)), None)) is not None:
        if _all_begin(own, prefix):
            break
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def is_state(state: Any) -> bool:
    """Whether it is a state_dict: tensors, and the extra state of modules, by their names."""
    return (
        isinstance(state, Mapping)
        and any(isinstance(value, Tensor) for value in state.values())
        and all(
            isinstance(name, str) and (isinstance(value, Tensor) or _is_extra(name))
            for name, value in state.items()
        )
    )


def _is_extra(name: str) -> bool:
    """Whether it is what a module's get_extra_state gives: of any type, and not always a tensor."""
    return name.rpartition(".")[2] == "_extra_state"


def check_extra_state(net: nn.Module, name: str) -> None:
    """Raise ValueError where a checkpoint of the network could be written and not read again. name:
    of the network, for the error."""
    for key, value in net.state_dict().items():
        if isinstance(value, Tensor):
            continue
        file = io.BytesIO()
        try:
            torch.save(value, file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception as error:  # pickle and torch raise half a dozen types
            raise ValueError(
                f"model {name!r} has a {type(value).__name__} as {key}, which could be saved and "
                "not loaded, since files are read without running code: its get_extra_state must "
                "return tensors, numbers, texts and their containers"
            ) from error


def _all_begin(state: Mapping[str, Any], prefix: str) -> bool:
    return bool(state) and all(name.startswith(prefix) for name in state)


def fit(net: nn.Module, state: dict[str, Any], where: str, *, other: str, infinite: str) -> None:
    """Load a state into `net`, in place. where: the file, for an error.

    Raises ValueError where the names or shapes differ or the network does not take the values, with
    the remedy `other`, and where weights are not finite, for the reason `infinite`.
    """
    own = net.state_dict()
    odd = [f"it lacks {key}" for key in own if key not in state]
    odd += [f"it has {key}, which the network lacks" for key in state if key not in own]
    odd += [
        f"{key} is {list(state[key].shape)} there and {list(own[key].shape)} in the network"
        for key in own
        if key in state and not _is_extra(key) and state[key].shape != own[key].shape
    ]
    odd += [
        f"{key} is complex there and {own[key].dtype} in the network"
        for key in own
        if key in state and not _is_extra(key)
        if state[key].is_complex() and not own[key].is_complex()
    ]
    check(
        not odd,
        f"{where} is of another network ({len(odd)} differences: {'; '.join(odd[:2])}); {other}",
    )
    kept = {key for key, _ in net.named_parameters()}  # other buffers may hold -inf, as masks do
    kept |= {key for key in own if key.endswith(("running_mean", "running_var"))}
    odd = [key for key in own if key in kept and not _finite(state[key])]
    check(
        not odd,
        f"{where} has values that are not finite ({', '.join(odd[:3])}): {infinite}",
    )
    for key, value in own.items():
        if not _is_extra(key) and _storage(value) != _storage(state[key]):
            state = state | {key: plain(state[key])}  # torch copies no values between the two
    try:
        net.load_state_dict(state)
    except Exception as error:  # whatever a set_extra_state raises
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{where} does not go into the network ({type(error).__name__}: {reason}); {other}"
        ) from error


def _storage(value: Tensor) -> tuple[torch.layout, bool]:
    return value.layout, value.is_quantized


def _finite(value: Tensor) -> bool:
    value = plain(value)
    if value.itemsize == 1:  # float8 has no isfinite
        value = value.float()
    return bool(value.isfinite().all())


def unscaled(state: dict[str, Any], name: str) -> dict[str, Any]:
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
