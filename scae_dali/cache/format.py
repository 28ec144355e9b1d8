"""Format 1 of the cache: what its bytes mean, what may be stored in them, and how they are checked.

Nothing is pickled. Record keys are big-endian, so that LMDB's byte order is their numeric order:

    b"meta"       UTF-8 JSON: the fields of `CacheMeta`
    8 bytes       uint64 BE, position in the index or hash of the path: epoch stamp (uint16 LE)
                  + h*w bytes, round(255*A); a value of any other length is no map (the empty one
                  marks a withdrawn map)
    b"neighbors"  uint16 LE [K, m] in C order; its shape is the field `neighbors` of the meta record

A pass is told from another by its fields: epoch, weights, samples, provenance and settings.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any

import lmdb
import numpy as np
from numpy.typing import ArrayLike, NDArray

from scae_dali.checks import check
from scae_dali.plan import schedule

__all__ = [
    "CHUNK",
    "CLASSES",
    "EPOCHS",
    "FORMAT_VERSION",
    "KEY_BYTES",
    "META",
    "NEIGHBORS",
    "PROVENANCE",
    "CacheError",
    "CacheMeta",
    "Maps",
    "check_contents",
    "check_last_pass",
    "check_neighbors",
    "checked_epoch",
    "checked_grid",
    "checked_ids",
    "checked_maps",
    "checked_neighbors",
    "checked_provenance",
    "checked_settings",
    "damaged",
    "describe_pass",
    "digest_of_samples",
    "expected_bytes",
    "flat",
    "from_json",
    "neighbors_from_bytes",
    "pass_token",
    "put_ascending",
    "record_type",
    "rows",
    "same_pass",
    "settings_of",
    "split",
    "to_json",
]

FORMAT_VERSION = 1
META, NEIGHBORS = b"meta", b"neighbors"
KEY_BYTES = 8  # of a record key; the other keys are longer or shorter
EPOCHS = 1 << 16  # how many epochs a stamp of 16 bits tells apart
CLASSES = 1 << 16  # how many classes neighbours of 16 bits tell apart
SAMPLES = 1 << 32  # far more than any list of files has
LEVELS = 32  # of brackets within brackets, in settings
CHUNK = 4096  # records a commit: some 290 KB at 7x7, one sync
PROVENANCE = ("method", "model", "layer", "input_size")

Maps = NDArray[np.uint8]


class CacheError(ValueError):
    """A cache that cannot be used as asked; the message says what differs and what to do."""


def damaged(path: str, what: str) -> CacheError:
    """The error of a cache at `path` whose bytes cannot be right. what: that is wrong."""
    return CacheError(
        f"saliency cache {path!r} is damaged: {what}. Copy it again from one that is sound, with "
        "`scae-dali copy-cache` (`cp` is not safe while a pass writes); if there is none, remove "
        "it and build it anew"
    )


def record_type(grid: tuple[int, int]) -> np.dtype[np.void]:
    """The value of a record: fields stamp, u16 LE, and map, u8[h,w] with 255 = 1.0.

    Raises ValueError for a grid of 2 GiB.
    """
    if grid[0] * grid[1] + 2 >= 1 << 31:
        raise ValueError(f"grid must have fewer than 2^31 cells, got {grid}; 7x7 is usual")
    return np.dtype([("stamp", "<u2"), ("map", "u1", grid)])


def rows(
    txn: lmdb.Transaction, kind: np.dtype[np.void]
) -> Iterator[tuple[NDArray[np.uint64], NDArray[Any], int]]:
    """Blocks of records in key order: keys u64[n], values kind[n], and how many more had a wrong
    length."""
    every = iter(txn.cursor())
    while block := list(islice(every, 1024)):
        named = [row for row in block if len(row[0]) == KEY_BYTES]
        whole = [row for row in named if len(row[1]) == kind.itemsize]
        keys = np.frombuffer(b"".join([key for key, _ in whole]), ">u8").astype(np.uint64)
        records = np.frombuffer(b"".join([value for _, value in whole]), kind)
        yield keys, records, len(named) - len(whole)


def put_ascending(txn: lmdb.Transaction, keys: list[bytes], values: list[bytes]) -> None:
    """Puts records, keys ascending. Those beyond the last record are appended: pages fill whole.

    b"meta" and b"neighbors" may sort behind the last record. LMDB would then split pages in the
    middle (twice the size on disk), so they are taken out meanwhile; no reader sees that, for it is
    one transaction.
    """
    cursor = txn.cursor()
    behind: list[tuple[bytes, bytes]] = []
    there = cursor.last()
    while there and len(cursor.key()) != KEY_BYTES:
        behind.append((bytes(cursor.key()), bytes(cursor.value())))
        there = cursor.prev()
    known = bisect_right(keys, bytes(cursor.key())) if there else 0
    cursor.putmulti(zip(keys[:known], values[:known], strict=True))
    if known < len(keys):
        for name, _ in behind:
            txn.delete(name)
        cursor.putmulti(zip(keys[known:], values[known:], strict=True), append=True)
        for name, value in behind:
            txn.put(name, value)


def expected_bytes(samples: int, size: int) -> int:
    """About how many bytes a full cache takes: pages of 4096 with a header of 16, and 8 + 2 bytes
    more for each record."""
    a_page = max((4096 - 16) // (8 + 2 + KEY_BYTES + size + size % 2), 1)
    return 4096 * (samples // a_page + 1) * 102 // 100


def flat(maps: Maps) -> NDArray[np.bool_]:
    """u8[n,h,w] -> bool[n], whether a map is the same everywhere, and so says nothing."""
    cells = maps.reshape(len(maps), math.prod(maps.shape[1:]))
    return (cells == cells[:, :1]).all(1)


def split(blob: bytes, size: int) -> list[bytes]:
    """The blob in pieces of `size` bytes."""
    return [blob[start : start + size] for start in range(0, len(blob), size)]


def checked_epoch(epoch: int) -> int:
    """An epoch that a stamp can hold; raises ValueError for any other."""
    whole = isinstance(epoch, int | np.integer) and not isinstance(epoch, bool)
    if not whole or not 0 <= epoch < EPOCHS:
        raise ValueError(
            f"epoch must be an integer in 0..65535 (it is stored in 16 bits), got {epoch!r}"
        )
    return int(epoch)


def checked_ids(ids: ArrayLike, samples: int) -> NDArray[np.int64]:
    """int[B] -> i64[B]; raises IndexError for an id outside 0..samples-1, else ValueError."""
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"ids must be integers [B], got {array.dtype} {list(array.shape)}")
    if array.size and (array.min() < 0 or array.max() >= samples):
        worst = array[(array < 0) | (array >= samples)][0]
        raise IndexError(f"ids must be in 0..{samples - 1} (positions in the index), got {worst}")
    return array.astype(np.int64)


def checked_maps(maps: ArrayLike, ids: NDArray[np.int64], grid: tuple[int, int]) -> Maps:
    """f[B,h,w] in [0, 1] or u8[B,h,w] -> u8[B,h,w]; raises ValueError for others.

    ids: int[B], the samples, for the message.
    """
    values = np.asarray(maps)
    if values.shape != (len(ids), *grid):
        raise ValueError(
            f"maps must be [{len(ids)}, {grid[0]}, {grid[1]}], got {list(values.shape)}"
        )
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind != "f":
        raise ValueError(f"maps must be uint8, or float in [0, 1], got {values.dtype}")
    bad = ~((values >= 0) & (values <= 1))  # true of NaN as well
    if bad.any():
        row = int(np.flatnonzero(bad.any(axis=(1, 2)))[0])
        raise ValueError(
            f"maps must be in [0, 1], got {values[row][bad[row]][0]} for sample {ids[row]}; write "
            "a map of zeros where there is none"
        )
    return np.rint(255 * values.astype(np.float32)).astype(np.uint8)


def checked_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """The (h, w) of maps; raises ValueError for what is no grid, or too large a one."""
    if len(grid) != 2 or not all(isinstance(n, int | np.integer) and n >= 1 for n in grid):
        raise ValueError(f"grid must be (h, w) of positive integers, got {grid!r}")
    checked = int(grid[0]), int(grid[1])
    record_type(checked)
    return checked


def checked_neighbors(neighbors: ArrayLike) -> NDArray[np.uint16]:
    """u16[K, m], of each of K classes its m neighbouring ones; raises ValueError for others."""
    table = np.asarray(neighbors)
    if table.dtype != np.uint16 or table.ndim != 2:
        raise ValueError(f"neighbors must be uint16 [K, m], got {table.dtype} {list(table.shape)}")
    if len(table) > CLASSES:
        raise ValueError(
            f"neighbors must be of at most {CLASSES} classes (they are stored in 16 bits), got "
            f"{len(table)}"
        )
    if table.size and table.max() >= len(table):
        raise ValueError(
            f"neighbors must be classes 0..{len(table) - 1} (it has K rows), got {table.max()}"
        )
    return table


def neighbors_from_bytes(blob: bytes, shape: tuple[int, int], path: str) -> NDArray[np.uint16]:
    """The record of neighbours -> u16[K, m]. path: for the message of a CacheError."""
    told = f"saliency cache {path!r} has neighboring classes that cannot be right:"
    remedy = "make a saliency pass with neighbors, which writes them anew"
    if len(blob) != 2 * shape[0] * shape[1]:
        raise CacheError(f"{told} neighbors has {len(blob)} bytes, its shape is {shape}; {remedy}")
    table = np.frombuffer(blob, "<u2").astype(np.uint16).reshape(shape)
    if table.size and table.max() >= shape[0]:
        raise CacheError(f"{told} class {table.max()} of {shape[0]}; {remedy}")
    return table


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


def digest_of_samples(chosen: NDArray[np.bool_]) -> str:
    """The field `which` of a pass, hex. chosen: bool[N], whether a sample is of the pass."""
    return blake2b(np.packbits(chosen).tobytes(), digest_size=16).hexdigest()


def settings_of(fields: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings that are known of a pass; {} for None."""
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
    """A pass in words, for messages; fields as of `pass_token`. beside: another pass, which the
    words tell from this one."""
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
    """Settings as JSON gives them back, NumPy's numbers as Python's; raises ValueError for what
    JSON cannot hold."""
    if settings is None:
        return None
    try:
        kept = json.loads(json.dumps(dict(settings), default=_plain, allow_nan=False))
    except RecursionError:
        raise ValueError(f"settings must have at most {LEVELS} levels of lists and dicts") from None
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"settings must be a dict of numbers, strings and lists of them, got {settings!r}: "
            f"{error}"
        ) from error
    if not _is_shallow(kept, LEVELS):
        raise ValueError(f"settings must have at most {LEVELS} levels of lists and dicts")
    return kept or None


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1


def to_json(meta: CacheMeta) -> bytes:
    """The bytes of the meta record."""
    fields = asdict(meta)
    if meta.settings is None:  # so that an older version reads it
        del fields["settings"]
    return json.dumps(fields).encode()


def from_json(blob: bytes, path: str) -> CacheMeta:
    """The meta record of these bytes; raises CacheError where a field is not what it must be.

    path: for the messages.
    """
    if not blob:
        raise CacheError(
            f"{path!r} is an LMDB environment but no saliency cache: it has no meta record; choose "
            "another path"
        )
    try:
        fields = json.loads(blob.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"it is no JSON ({error})") from error
    if not isinstance(fields, dict):
        raise _corrupt(path, f"it must be a dict, got {type(fields).__name__}")
    version = fields.get("format")
    if not _is_int(version, 1):
        raise _corrupt(path, f"format must be a positive integer, got {_brief_value(version)}")
    if version != FORMAT_VERSION:
        raise CacheError(
            f"saliency cache {path!r} is of format {_brief_value(version)}, this version of "
            f"scae-dali reads format {FORMAT_VERSION}; use the version that wrote it, or build a "
            "new cache at another path"
        )
    _check_fields(path, "", fields, _FIELDS, _REQUIRED)
    if (pass_ := fields.get("under_way")) is not None:
        _check_fields(path, "under_way.", pass_, _FIELDS, {"epoch"}, _PASS)
        if pass_["epoch"] is None:
            raise _corrupt(path, "under_way.epoch must be an epoch, got None")
        # Older versions wrote fewer fields.
        lacking = dict.fromkeys({*_PASS} - {"settings"}) | {"weights": ""}
        pass_ = fields["under_way"] = lacking | pass_
    for name, one in (("", fields), ("under_way.", pass_ or {})):
        if (part := one.get("part")) is not None and part > fields["samples"]:
            raise _corrupt(path, f"{name}part must be at most {fields['samples']}, got {part}")
    fields["grid"] = tuple(fields["grid"])
    if fields.get("neighbors") is not None:
        fields["neighbors"] = tuple(fields["neighbors"])
    return CacheMeta(**fields)


def check_contents(txn: lmdb.Transaction, meta: CacheMeta, path: str) -> None:
    """Raises CacheError where the records cannot be those that the meta record tells of: its
    numbers are about to be the sizes of arrays.

    Looks at the number of all records, and at the length of the first maps.
    """
    kind = record_type(meta.grid)
    others = 0  # the longest map that is no map of this grid
    for key, value in islice(txn.cursor(), 1024):
        if len(key) == KEY_BYTES and len(value) == kind.itemsize:
            break
        others = max(others, len(value) if len(key) == KEY_BYTES else 0)
    else:
        if others:
            raise damaged(
                path,
                f"grid is {meta.grid[0]}x{meta.grid[1]}, whose records have {kind.itemsize:,} "
                f"bytes, and those that are there have at most {others:,}",
            )
    entries = txn.stat()["entries"]
    if meta.epoch is not None and meta.part is None and meta.samples > entries:
        raise damaged(
            path,
            f"samples is {meta.samples:,} and a pass over all of them is complete, but it has "
            f"{entries:,} records",
        )


def _corrupt(path: str, what: str) -> CacheError:
    return damaged(path, f"it has a corrupt meta record, {what}")


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _brief_value(value: Any) -> str:
    """At most 80 characters of a value out of JSON."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # too deep, or an integer of too many digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_shallow(value: Any, levels: int) -> bool:
    """Whether a value out of JSON has at most so many levels of lists and dicts."""
    if not isinstance(value, list | dict):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_shallow(one, levels - 1) for one in inner)


def _is_int(value: Any, low: int, high: int | None = None) -> bool:
    """Whether a value out of JSON is an integer from `low` to `high`."""
    return type(value) is int and low <= value and (high is None or value <= high)


def _is_pair(value: Any, low: int, high: int) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_int(n, low, high) for n in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


_INT32 = (1 << 31) - 1
# What each field must be: whether a value is that, and in words.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": (lambda v: _is_int(v, 1), "a positive integer"),
    "grid": (
        lambda v: _is_pair(v, 1, _INT32) and v[0] * v[1] + 2 <= _INT32,
        "two positive integers, of fewer than 2^31 cells",
    ),
    "samples": (lambda v: _is_int(v, 0, SAMPLES), "an integer in 0..2^32"),
    "fingerprint": (_is_text, "a string"),
    "naming": (lambda v: v in ("index", "path"), '"index" or "path"'),
    "method": (_or_none(_is_text), "a string or null"),
    "model": (_or_none(_is_text), "a string or null"),
    "layer": (_or_none(_is_text), "a string or null"),
    "input_size": (
        _or_none(lambda v: _is_int(v, 1) or _is_pair(v, 1, _INT32)),
        "a positive integer, two of them, or null",
    ),
    "weights": (_is_text, "a string"),
    "epoch": (_or_none(lambda v: _is_int(v, 0, EPOCHS - 1)), "an integer in 0..65535, or null"),
    "passes": (lambda v: _is_int(v, 0), "an integer of at least 0"),
    "under_way": (_or_none(lambda v: isinstance(v, dict)), "a dict or null"),
    "neighbors": (
        _or_none(lambda v: _is_pair(v, 0, _INT32) and v[0] <= CLASSES),
        "two integers of at least 0, the first at most 65536, or null",
    ),
    "part": (_or_none(lambda v: _is_int(v, 0)), "an integer of at least 0, or null"),
    "which": (_or_none(_is_text), "a string or null"),
    "settings": (
        _or_none(lambda v: isinstance(v, dict) and _is_shallow(v, LEVELS)),
        f"a dict of at most {LEVELS} levels, or null",
    ),
}
_REQUIRED = {"format", "grid", "samples", "fingerprint", "naming"}
_PASS = ("epoch", "weights", "part", "which", *PROVENANCE, "settings")


def _check_fields(
    path: str,
    of: str,
    fields: Mapping[str, Any],
    kinds: Mapping[str, tuple[Callable[[Any], bool], str]],
    required: set[str],
    known: Collection[str] | None = None,
) -> None:
    """Raises CacheError where a field of the meta record is not of its kind. of: what the fields
    are of, for messages. known: the fields that there may be; None: all kinds."""
    if missing := sorted(required - fields.keys()):
        raise _corrupt(path, f"{of}{missing[0]} is missing")
    for name, value in fields.items():
        if name not in (kinds if known is None else known):
            raise _corrupt(path, f"{of}{_brief_value(name)} is no field of format {FORMAT_VERSION}")
        fits, must = kinds[name]
        if not fits(value):
            raise _corrupt(path, f"{of}{name} must be {must}, got {_brief_value(value)}")


def check_last_pass(epochs: int, refresh_every: int) -> None:
    """Raises ValueError where a pass would come at an epoch that no map can carry."""
    last = schedule.pass_epoch(epochs - 1, refresh_every)
    if last is None or last < EPOCHS:
        return
    most = ((EPOCHS - 1) // refresh_every + 1) * refresh_every
    raise ValueError(
        f"epochs must be at most {most} with refresh_every={refresh_every}, got {epochs}: the last "
        f"saliency pass would come at epoch {last}, and maps carry epochs up to {EPOCHS - 1}; "
        "lower epochs, or set refresh_every=0 and name a cache that was built offline"
    )


def check_neighbors(neighbors: int, num_classes: int) -> None:
    """Raises ValueError where the cache cannot hold neighbours of so many classes."""
    check(
        not neighbors or num_classes <= CLASSES,
        f"neighbors must be 0 where there are more than {CLASSES:,} classes (a cache keeps the "
        f"neighbours of a class in 16 bits), got neighbors={neighbors} and {num_classes:,} "
        "classes; with 0, samples of tail classes are mixed within their class alone",
    )
