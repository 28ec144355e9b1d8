"""What a saliency cache says of itself: the fields of its meta record, and their JSON.

Decides the format version and which records are refused. When a stored map may be trusted, which
these fields serve, is decided in `cache`; the bytes are kept by `store`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

__all__ = [
    "FORMAT_VERSION",
    "PROVENANCE",
    "CacheError",
    "CacheMeta",
    "checked_provenance",
    "checked_settings",
    "describe_pass",
    "from_json",
    "pass_token",
    "same_pass",
    "settings_of",
    "to_json",
]

FORMAT_VERSION = 1
PROVENANCE = ("method", "model", "layer", "input_size")


class CacheError(ValueError):
    """A cache that cannot be used as asked; the message says what differs and what to do."""


@dataclass(frozen=True)
class CacheMeta:
    """The meta record.

    epoch, weights and the provenance (method, model, layer, input_size) are those of the last
    complete pass, of which there were `passes`; epoch is None before the first one, and once its
    maps were withdrawn. under_way: the same fields of a pass that was begun and has not ended, or
    None. neighbors: shape [K, m] of that array, or None. part: of how many samples the last pass
    was; None: of all. which: hex digest over those samples. input_size: a number, or [h, w].
    settings: what else the maps depend on, such as the mean that the images were normalised with;
    what it does not name is unknown, and so is all of it where it is None.
    """

    format: int
    grid: tuple[int, int]
    samples: int
    fingerprint: str
    naming: str
    method: str | None = None
    model: str | None = None
    layer: str | None = None
    input_size: int | list[int] | None = None
    weights: str = ""
    epoch: int | None = None
    passes: int = 0
    under_way: dict[str, Any] | None = None
    neighbors: tuple[int, int] | None = None
    part: int | None = None
    which: str | None = None
    settings: dict[str, Any] | None = None

    @property
    def last_pass(self) -> dict[str, Any]:
        """The last complete pass in the form of `under_way`; unknown settings are left out."""
        names = ("epoch", "weights", "part", "which", *PROVENANCE)
        known = {} if self.settings is None else {"settings": self.settings}
        return {name: getattr(self, name) for name in names} | known

    @property
    def token(self) -> str | None:
        """`pass_token` of the last complete pass; None where there is none, or another is under
        way."""
        if self.epoch is None or self.under_way is not None:
            return None
        return pass_token(self.last_pass)


def pass_token(fields: Mapping[str, Any]) -> str:
    """What tells a pass from every other, hex: BLAKE2b-128 of the fields of `last_pass`."""
    told = json.dumps(fields, sort_keys=True).encode()
    return blake2b(told, digest_size=16).hexdigest()


def settings_of(fields: Mapping[str, Any] | None) -> dict[str, Any]:
    """Those that are known of a pass; none of no pass."""
    return (fields or {}).get("settings") or {}


def same_pass(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether both are one pass as far as is known; fields as of `pass_token`, None for no pass."""
    if one is None or other is None:
        return one is other
    told = [{**fields, "settings": None} for fields in (one, other)]
    known, others = settings_of(one), settings_of(other)
    return told[0] == told[1] and all(
        known[name] == others[name] for name in known.keys() & others.keys()
    )


def describe_pass(fields: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> str:
    """For messages; fields as of `pass_token`. beside: another pass, to be told from this one."""
    text = _brief(fields)
    if beside is None or text != _brief(beside):
        return text
    more = [
        f"{name.replace('_', ' ')} {fields[name] or 'unknown'}"
        for name in PROVENANCE
        if fields[name] != beside[name]
    ]
    if (fields["part"], fields["which"]) != (beside["part"], beside["which"]):
        some = f"{fields['part']} samples ({(fields['which'] or '')[:8]})"
        more.append("all samples" if fields["part"] is None else some)
    known, others = settings_of(fields), settings_of(beside)
    both = [name for name in known if name in others]
    more += [f"{name} {known[name]}" for name in both if known[name] != others[name]]
    return ", ".join([text, *more])


def _brief(fields: Mapping[str, Any]) -> str:
    weights = fields["weights"][:8] or "unknown"
    return f"epoch {fields['epoch']}, model {fields['model'] or 'unknown'}, weights {weights}"


def checked_provenance(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of PROVENANCE, as JSON gives them back; raises ValueError for what it cannot."""
    checked = dict(given)
    for name in ("method", "model", "layer"):
        if given[name] is not None and not isinstance(given[name], str):
            raise ValueError(f"{name} must be a string or None, got {given[name]!r}")
    size = given["input_size"]
    if isinstance(size, tuple | list) and len(size) == 2 and all(map(_is_count, size)):
        checked["input_size"] = [int(side) for side in size]
    elif _is_count(size):
        checked["input_size"] = int(size)
    elif size is not None:
        raise ValueError(
            f"input_size must be a positive integer, (h, w) of such, or None, got {size!r}"
        )
    return checked


def checked_settings(settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """As JSON gives them back, NumPy's numbers as Python's; raises ValueError for what it cannot
    hold."""
    if settings is None:
        return None
    try:
        kept = json.loads(json.dumps(dict(settings), default=_plain, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"settings must be a dict of numbers, strings and lists of them, got {settings!r}: "
            f"{error}"
        ) from error
    return kept or None


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1


def to_json(meta: CacheMeta) -> bytes:
    fields = asdict(meta)
    if meta.settings is None:  # so that an older version reads it
        del fields["settings"]
    return json.dumps(fields).encode()


def from_json(blob: bytes, path: str) -> CacheMeta:
    """path: for the messages. Raises CacheError where blob is no meta record of this format."""
    remedy = "delete it and build it anew"
    if not blob:
        raise CacheError(
            f"{path!r} is an LMDB environment but no saliency cache: it has no meta record; "
            f"{remedy}"
        )
    try:
        fields = json.loads(blob)
        version = fields["format"]
        if version == FORMAT_VERSION:
            fields["grid"] = _pair(fields["grid"])
            if fields.get("neighbors") is not None:
                fields["neighbors"] = _pair(fields["neighbors"])
            return CacheMeta(**fields)
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"saliency cache {path!r} has a corrupt meta record ({error!r}); {remedy}"
        ) from error
    raise CacheError(
        f"saliency cache {path!r} is of format {version}, this version of scae-dali reads format "
        f"{FORMAT_VERSION}; use the version that wrote it, or build a new cache at another path"
    )


def _pair(values: list[Any]) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)
