"""Checks that a resumed run goes on as it began: every setting is compared with the saved one.

A short list of settings may change, and a note says so. Every other difference is refused, and so
are processes of one run that were given different settings.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.data import Data, DataConfig
from pipelines.recipe import Config
from scae_dali.checks import check
from scae_dali.data.index import ImageIndex, path_key
from scae_dali.training.ranks import Ranks
from scae_dali.training.weights import weights_content

# Where files lie and what computes. The images and weights in the files are compared separately.
_WHERE = {"data.root", "data.index_cache", "threads", "hw_decoder_load"}
_WEIGHTS = ("weights", "second_stage.weights")
_FILES = {"data.train_list", "data.val_list", "data.exclude", "data.train", "data.val", *_WEIGHTS}
_FREE = _WHERE | {"out", "checkpoint_every", "compile", "device", "data.val_exclude"}
_FREE |= {"saliency.batch_size", "saliency.cache"}
# Fingerprints of the images, and of the weights that a run starts from.
_CONTENTS = ("data", "val", "weights_content")
_OF_A_RUN = ("config.json", "checkpoint.pt", "metrics.jsonl", "weights.pt")
_ABSENT = "no such setting"


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value as JSON has it. config: a Config, or the content of a config.json."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = json.loads(json.dumps(dataclasses.asdict(config)))
    settings: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and name != "method_args":  # whose names are the user's own
            settings |= flat(value, f"{prefix}{name}.")
        else:
            settings[prefix + name] = value
    return settings


@functools.cache
def defaults() -> dict[str, Any]:
    """Every setting at its default, as `flat` gives it."""
    return flat(Config(data=DataConfig(root=""), out=""))


def identity(config: Config, data: Data) -> dict[str, Any]:
    """What a run is of, for its checkpoint: all settings, and the images and weights they name.

    Raises ValueError where the weights cannot be read.
    """
    settings = flat(config)
    named = _weights_of(settings)
    return settings | {
        "data": data.train.fingerprint,
        "val": data.val.fingerprint,
        "weights_content": named and weights_content(settings[named], named),
    }


def _weights_of(settings: Mapping[str, Any]) -> str | None:
    """The setting that names the weights that a run starts from; None where there are none."""
    return next((name for name in _WEIGHTS if settings.get(name)), None)


def file_keys(index: ImageIndex) -> Tensor:
    """Hashes of path and label of every sample: int64 [M], sorted, each once."""
    pairs = zip(index.labels.tolist(), index.files, strict=True)
    keys = {path_key(f"{label} {name}") - (1 << 63) for label, name in pairs}
    return torch.tensor(sorted(keys), dtype=torch.int64)


def agree(ranks: Ranks, settings: Mapping[str, Any]) -> None:
    """Raise ValueError in all ranks if settings differ between them; files may lie elsewhere."""
    every = ranks.gather(dict(settings))
    odd = []
    for name in sorted({name for one in every for name in one} - _WHERE - _FILES):
        values = [one.get(name) for one in every]
        if not all(_same(value, values[0]) for value in values):
            given = [f"{value!r} in rank {rank}" for rank, value in enumerate(values)]
            odd.append(f"{name} is {', '.join(given)}")
    check(
        not odd,
        f"all processes of a run must have the same settings, but {'; '.join(odd)}: start them "
        "with the same command and the same files",
    )


def check_new(out: Path) -> None:
    """Raise ValueError where `out` holds a run, or what is left of one."""
    left = [name for name in _OF_A_RUN if (out / name).exists()]
    check(
        not left,
        f"out must be a new folder, got {str(out)!r}: give another, or --resume (it has "
        f"{', '.join(left)})",
    )


def check_files(out: Path) -> None:
    """Raise ValueError if a folder has the name of one of a run's files."""
    for name in _OF_A_RUN:
        check(
            not (out / name).is_dir(),
            f"{str(out / name)!r} must be a file of the run, and is a folder: move it away, and "
            "restore the file from a copy if there was one",
        )


def check_same(
    ranks: Ranks,
    out: Path,
    now: Mapping[str, Any],
    state: Mapping[str, Any] | None,
    val: ImageIndex,
) -> list[str]:
    """Raise ValueError where the run in `out` was made with other settings, or ranks have other
    files. Returns notes on what has changed and may.

    now: the `identity` of this run. state: the content of the checkpoint in `out`, if there is one.
    """
    agree(ranks, {name: now[name] for name in _CONTENTS})
    was = saved_settings(out, state)
    if was is None:
        return []
    path = out / ("config.json" if state is None else "checkpoint.pt")
    before = None if state is None else state.get("val_files")
    done = 0 if state is None else state["epoch"]
    kind = "run" if state is None else "checkpoint"
    return compare(f"{kind} {str(path)!r}", was, now, done, lambda: left_out(before, val))


def saved_settings(out: Path, state: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The settings that the run in `out` was saved with; None where there is no run yet.

    Checkpoints of older versions hold some settings, and config.json the others. What neither has
    is at its default. Raises ValueError where config.json is needed and cannot be read.
    """
    settings = {} if state is None else dict(state["of"])
    older = state is not None and "weights_content" not in settings
    if older and "weights" in settings:
        settings["weights_content"] = settings.pop("weights")  # it was a hash of the file
    path = out / "config.json"
    if (older or "epochs" not in settings) and path.exists():
        try:
            settings = flat(json.loads(path.read_text())) | settings
        except (ValueError, AttributeError) as error:
            if "epochs" not in settings:
                raise ValueError(
                    f"{str(path)!r} cannot be read ({error}); restore it from a copy, or start in "
                    "a new folder"
                ) from error
    settings = _renamed(settings)
    if "epochs" not in settings:
        return settings or None
    settings = defaults() | settings
    if settings.get("weights_content") and _weights_of(settings) is None:
        del settings["weights"]  # nothing tells where they were
    return settings


def compare(
    source: str,
    was: Mapping[str, Any],
    now: Mapping[str, Any],
    done: int,
    fewer: Callable[[], int | None],
) -> list[str]:
    """Notes on changed settings that may change. Raises ValueError that names those that may not.

    source: what `was` was read from. done: epochs. fewer: how many validation images are left out
    now, None where there are others than before.
    """
    notes, odd, flags = [], [], []
    besides: dict[str, str] = {}
    for name in was:
        before, after = was[name], now.get(name, _ABSENT)
        if _same(before, after):
            continue
        text = f"{name}={before!r}, not {after!r}"
        if name == "val":
            if not _same(was["data"], now["data"]):
                continue  # validation is on other images altogether
            if (gone := fewer()) is not None:
                notes.append(f"{gone} validation images are left out from here on")
                continue
        elif name == "epochs":
            if isinstance(before, int) and isinstance(after, int) and after > before:
                notes.append(
                    f"epochs was {before}, now {after}: the schedules of learning rate and λ go by "
                    "the new number from here on"
                )
                continue
            text += f" ({done} are done)"
        elif name in _FREE or (name in _FILES and before is not None and after is not None):
            notes.append(f"{name} was {before!r}, now {after!r}")
            continue
        if name in _CONTENTS:  # then name the settings that choose them
            changed = _changed(name, was, now)
            if name == "weights_content":
                file = now.get(_weights_of(now) or "")
                if file is not None and before == _digest(file):
                    continue  # so older versions wrote it
                if any(was[one] is None or now[one] is None for one in changed):
                    continue  # the setting itself tells it
                text = "weights, and none are given"
                if file is not None:
                    text = f"other weights than {file!r} holds"
            besides |= {one: f"{one} was {was[one]!r}, now {now[one]!r}" for one in changed}
            exact = ("data.val_exclude", *_WEIGHTS)
            flags += [_flag(one, was[one]) for one in changed if one in exact]
        odd.append(text)
        if name in now and name not in _CONTENTS:
            flags.append(_flag(name, before))
    check(
        not odd,
        f"{source} was made with {'; '.join(odd)}: resume it with the same settings (config.json "
        f"beside it{'; ' + ' '.join(flags) if flags else ''}), or start in a new folder"
        + (f"; {'; '.join(besides.values())}" if besides else ""),
    )
    return notes


def _changed(content: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The changed settings that say where `content` is."""
    return [
        name
        for name in was
        if (name in _WEIGHTS if content == "weights_content" else name.startswith("data."))
        and not _same(was[name], now.get(name, was[name]))
    ]


def _renamed(settings: Any) -> Any:
    """Saved settings, with today's names of their values."""
    if isinstance(settings, dict) and settings.get("backend") == "numpy":
        return settings | {"backend": "python"}
    return settings


def _flag(name: str, value: Any) -> str:
    return shlex.quote(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")


def left_out(before: Tensor | None, index: ImageIndex) -> int | None:
    """How many former validation files are not in `index`; None if it has new ones.

    before: `file_keys` of the former index."""
    if before is None:
        return None
    old, new = set(before.tolist()), set(file_keys(index).tolist())
    return len(old - new) if new < old else None


def write_config(out: Path, config: Config, epoch: int) -> None:
    """Write config.json; if something has changed, the old file is kept beside it.

    epoch: the first that is trained with these settings.
    """
    path, settings = out / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists():
        try:
            if _same(_renamed(json.loads(path.read_text())), settings):
                return
        except ValueError:
            pass  # a damaged file is kept, too
        shutil.copy2(path, _until(path, epoch))
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(settings, indent=1) + "\n")
    os.replace(partial, path)


def set_aside(path: Path, epoch: int) -> None:
    """Rename a file, if it exists, whose content holds until `epoch` and no longer."""
    if path.exists():
        path.rename(_until(path, epoch))


def _until(path: Path, epoch: int) -> Path:
    """A new name beside path, such as config.until-epoch-9.json for config.json."""
    more = itertools.chain([""], (f".{number}" for number in itertools.count(1)))
    names = (f"{path.stem}.until-epoch-{epoch}{one}{path.suffix}" for one in more)
    return next(one for one in map(path.with_name, names) if not one.exists())


def _same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal; 1 and 1.0 are, and so are two NaN."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return one == other or (one != one and other != other)


def _digest(path: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
