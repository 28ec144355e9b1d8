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

__all__ = [
    "FORMAT_VERSION",
    "PROVENANCE",
    "CacheError",
    "CacheMeta",
    "describe_pass",
    "from_json",
    "pass_token",
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
    was; None: of all. which: hex digest over those samples.
    """

    format: int
    grid: tuple[int, int]
    samples: int
    fingerprint: str
    naming: str
    method: str | None = None
    model: str | None = None
    layer: str | None = None
    input_size: int | None = None
    weights: str = ""
    epoch: int | None = None
    passes: int = 0
    under_way: dict[str, Any] | None = None
    neighbors: tuple[int, int] | None = None
    part: int | None = None
    which: str | None = None

    @property
    def last_pass(self) -> dict[str, Any]:
        """The last complete pass in the form of `under_way`."""
        names = ("epoch", "weights", "part", "which", *PROVENANCE)
        return {name: getattr(self, name) for name in names}

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


def describe_pass(fields: Mapping[str, Any]) -> str:
    """For messages; fields as of `pass_token`."""
    weights = fields["weights"][:8] or "unknown"
    return f"epoch {fields['epoch']}, model {fields['model'] or 'unknown'}, weights {weights}"


def to_json(meta: CacheMeta) -> bytes:
    return json.dumps(asdict(meta)).encode()


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
