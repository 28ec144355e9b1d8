"""The log of a run: a row an epoch in metrics.jsonl and TensorBoard, and a line for the terminal.

metrics.jsonl holds one object an epoch, from 0 on; a resumed run drops the epochs that it does
again. Numbers that are not finite are null there. Rows that are read back are checked first.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import save_image

from scae_dali.methods.base import Triple

_SECONDS = ("train", "data", "step", "saliency", "val")
_FIGURES = ("val_top1", "val_top5", "img_per_s", "overhead_percent")
_NEEDED = (*_FIGURES, *(f"seconds.{name}" for name in _SECONDS))  # what `closing` reads
# Fields of numbers. They may be null, and absent where they are not needed.
_NUMBERS = {*_FIGURES, "best_top1", "median10_top1"}
_NUMBERS |= {f"val_{name}" for name in ("many", "medium", "few", "ece")}
_NUMBERS |= {f"{name}_adjusted" for name in _NUMBERS if name.startswith("val_")}
_OBJECTS = {"seconds", "share"}  # fields of objects of numbers
_NEVER_NULL = {"val_top1", "img_per_s", "overhead_percent"}
_PERCENT = _NUMBERS - {"img_per_s", "overhead_percent"}
_DEPTH = 8  # how deep objects and lists may be nested in a row
_DIGITS = 300  # a whole number of so many digits fits into a float


class LogError(ValueError):
    """A file of a run that is damaged: its metrics.jsonl, or the config.json beside it. The message
    names the file, the line and the remedy."""


class Log:
    """Writes rows; use it in one process of a run. rows: those written, from epoch 0 on.

    first_epoch: the rows from there on are dropped. saved: what `text` gave when the run's
    checkpoint was written: it brings back rows that metrics.jsonl lacks. Raises LogError where
    metrics.jsonl is damaged, and where an epoch before `first_epoch` is in neither.
    """

    def __init__(self, out: Path, first_epoch: int, saved: str = "") -> None:
        from torch.utils.tensorboard import SummaryWriter  # needs the extra `train`

        self._path = out / "metrics.jsonl"
        self.rows = known_rows(self._path, saved)[:first_epoch]
        _check(
            len(self.rows) == first_epoch,
            f"{str(self._path)!r} must have the epochs before {first_epoch}, which are done, and "
            f"ends before {len(self.rows)}; the checkpoint does not have them either: restore the "
            "file from a copy, or start in a new folder",
        )
        partial = self._path.with_suffix(".partial")
        self._lines = [_line(row) for row in self.rows]
        partial.write_text(self.text())
        os.replace(partial, self._path)
        self._board = SummaryWriter(str(out), purge_step=first_epoch)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one epoch's row and the figures of the run so far.

        In TensorBoard, nested figures have names with a slash, and a list is a histogram. None and
        numbers that are not finite are left out there.
        """
        full = _finite({**row, **_so_far([*self.rows, row])})
        self.rows.append(full)
        with open(self._path, "a") as file:
            file.write(_line(full))
        self._lines.append(_line(full))
        for name, value in _flat(full):
            if isinstance(value, list):
                known = np.array([one for one in value if one is not None])
                self._board.add_histogram(name, known, full["epoch"], bins=20)
            elif value is not None:
                self._board.add_scalar(name, value, full["epoch"])
        self._board.flush()

    def text(self) -> str:
        """All rows as metrics.jsonl has them."""
        return "".join(self._lines)

    def close(self) -> list[dict[str, Any]]:
        """Returns every epoch's row, of the whole run."""
        self._board.close()
        return self.rows


def read_rows(path: Path, needed: Sequence[str] = ("val_top1",)) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, of the epochs 0, 1, …; [] where there is no file.

    A last line that a kill has cut off is left out. needed: fields that no row may lack;
    "seconds.train" is the field train of the object seconds.
    Raises LogError for any other damage, with the line and what to do.
    """
    return _parse(path.read_bytes(), path, needed) if path.exists() else []


def known_rows(path: Path, saved: str, needed: Sequence[str] = _NEEDED) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, or those of the checkpoint if it has more (`saved`, see Log).

    Raises LogError where metrics.jsonl is damaged, or has other rows than the checkpoint.
    """
    written, kept = read_rows(path, needed), _parse(saved.encode(), path, ())
    for one, other in zip(written, kept, strict=False):
        _check(
            one == other,
            f"{str(path)!r}: epoch {one['epoch']} has other figures than in the checkpoint beside "
            f"it; {_REMEDY}",
        )
    return max(written, kept, key=len)


_REMEDY = (
    "restore the file from a copy, or move it away and resume the run (train.py --resume), which "
    "writes it again from its checkpoint"
)


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise LogError(message)


def _parse(text: bytes, path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    wrong: str | None
    lines = [pair for pair in enumerate(text.split(b"\n"), 1) if pair[1].strip()]
    for number, line in lines:
        twice: list[str] = []
        try:
            row = _loads(line, twice)
            wrong = f"has {twice[0]!r} twice" if twice else _fault(row, len(rows), needed)
        except RecursionError:
            wrong = "is nested too deeply"
        except ValueError:
            if number == lines[-1][0]:
                break  # cut off
            wrong = "is no JSON"
        wrong = wrong or _odd_figures(rows, row)
        _check(wrong is None, f"{str(path)!r}, line {number} {wrong}; {_REMEDY}")
        rows.append(row)
    return rows


def _loads(line: bytes, twice: list[str]) -> Any:
    """JSON, with None for NaN, which older versions wrote, and infinity for what is too large.
    Names that an object has twice are added to `twice`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                twice.append(name)
            found[name] = value
        return found

    return json.loads(
        line,
        parse_constant=lambda name: None,
        parse_int=lambda text: int(text) if len(text) <= _DIGITS else math.inf,
        object_pairs_hook=unique,
    )


def _odd_figures(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> str | None:
    """Which figure of a row contradicts its own val_top1 or the earlier rows; None if none does."""
    known = _so_far([*rows, row]) if "val_top1" in row else {}
    for name, value in known.items():
        if name in row and not math.isclose(row[name] or 0, value, abs_tol=1e-6):
            return f"has {name} {row[name]!r:.40}, but by val_top1 of the epochs it is {value!r}"
    top1, top5 = row.get("val_top1"), row.get("val_top5")
    if top1 is not None and top5 is not None and top5 < top1 - 1e-6:
        return f"has val_top5 {top5!r}, below its val_top1 {top1!r}"
    return None


def _fault(row: Any, epoch: int, needed: Sequence[str]) -> str | None:
    """What is wrong with the row of this epoch."""
    if not isinstance(row, dict):
        return f"is no JSON object, got {row!r:.40}"
    if type(row.get("epoch")) is not int or row["epoch"] != epoch:
        return (
            f"must be of epoch {epoch}, as epochs follow each other, got {row.get('epoch')!r:.40}"
        )
    seconds = row.get("seconds")
    have = {*row, *(f"seconds.{name}" for name in seconds)} if isinstance(seconds, dict) else {*row}
    if lacking := [name for name in needed if name not in have]:
        return f"lacks {', '.join(lacking)}"
    for name in sorted(_NUMBERS & row.keys()):
        if not (_is_number(row[name]) or (row[name] is None and name not in _NEVER_NULL)):
            return f"must have a number as {name}, got {row[name]!r:.40}"
    if odd := [
        name for name in sorted(_PERCENT & row.keys()) if not 0 <= (row[name] or 0) <= 100 + 1e-6
    ]:
        return f"must have percent, from 0 to 100, as {odd[0]}, got {row[odd[0]]!r:.40}"
    for name in sorted(_OBJECTS & row.keys()):
        values = row[name].values() if isinstance(row[name], dict) else [None]
        if not all(map(_is_number, values)):
            return f"must have an object of numbers as {name}, got {row[name]!r:.40}"
    for name, value in row.items():
        if (fault := _beyond(value, _DEPTH)) is not None:
            return f"{fault} as {name}"
    return None


def _beyond(value: Any, depth: int) -> str | None:
    """What is wrong with a value: it is nested deeper, or a number in it is not finite."""
    if isinstance(value, dict | list):
        if not depth:
            return "is nested too deeply"
        inner = value.values() if isinstance(value, dict) else value
        return next((fault for one in inner if (fault := _beyond(one, depth - 1))), None)
    if isinstance(value, float) and not math.isfinite(value):
        return "must have finite numbers, got one beyond them"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """value with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(row: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    seconds, share = row["seconds"], row["share"]
    mixed = share["mixed"] + share.get("mixed_in_batch", 0.0)
    text = (
        f"epoch {row['epoch']:3d}  loss {row['train_loss']:.3f}  top-1 {row['val_top1']:5.2f}  "
        f"top-5 {row['val_top5']:5.2f}{_present(row, 'many', 'medium', 'few')}  "
        f"{row['img_per_s']:.0f} img/s  "
        f"data {seconds['data']:.1f} s  step {seconds['step']:.1f} s  "
        f"saliency {seconds['saliency']:.1f} s"
    )
    if row["lam"] or share["erased"] or mixed:
        text += (
            f"  λ {row['lam']:.2f}  erased {share['erased']:.1%}  mixed {mixed:.1%}"
            f"  unguided {share['no_map'] + share['flat_map']:.1%}"
            f"  overhead {row['overhead_percent']:.1f} %"
        )
    return text


def closing(rows: list[dict[str, Any]]) -> str:
    """The run in a few figures; without an epoch beside it, one is of the last epoch or the run."""
    seconds = {key: sum(row["seconds"][key] for row in rows) for key in _SECONDS}
    images = sum(row["img_per_s"] * row["seconds"]["train"] for row in rows)
    last, run = rows[-1], _so_far(rows)
    return (
        f"{len(rows)} epochs: top-1 {last['val_top1']:.2f} (epoch {last['epoch']}), best "
        f"{run['best_top1']:.2f} (epoch {run['best_epoch']}), median of the last ten "
        f"{run['median10_top1']:.2f}, top-5 {last['val_top5']:.2f}"
        f"{_present(last, 'many', 'medium', 'few', 'ece')}, "
        f"{images / seconds['train']:.0f} img/s; data {seconds['data']:.1f} s, "
        f"step {seconds['step']:.1f} s, saliency {seconds['saliency']:.1f} s, validation "
        f"{seconds['val']:.1f} s; overhead of the method {last['overhead_percent']:.1f} %"
    )


def save_picture(path: Path, images: Tensor, mean: Triple, std: Triple) -> None:
    """A sheet of a batch's first images as the network gets them.

    images: float [B, 3, H, W], normalised by mean and std in grey levels.
    """
    shift, scale = (torch.tensor(v, device=images.device)[:, None, None] for v in (mean, std))
    save_image((images[:32].float() * scale + shift) / 255, path, nrow=8)


def _present(row: Mapping[str, Any], *names: str) -> str:
    """` many 65.1 few 9.1`: the val_<name> that a row has; rows of older versions may lack all."""
    known = [(name, row.get(f"val_{name}")) for name in names]
    return "".join(f" {name} {value:.1f}" for name, value in known if value is not None)


def _so_far(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Top-1 of the run up to its last row: best, its (first) epoch, median of the last ten."""
    best = max(rows, key=lambda row: row["val_top1"])
    return {
        "best_top1": best["val_top1"],
        "best_epoch": best["epoch"],
        "median10_top1": median(row["val_top1"] for row in rows[-10:]),
    }


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        elif key != "epoch":
            yield prefix + key, value
