"""What a cache says of itself is checked when it is read, before arrays are made of its numbers.

A record of 10¹² samples or maps of 30,000 × 30,000 led to a MemoryError or took gigabytes, numbers
as strings to a TypeError in a later epoch, and deeply nested brackets to a RecursionError. The kind
is that of https://github.com/ccpem/mrcfile/issues/31 (a header was believed, and 6 TB were
allocated) and https://github.com/ratal/mdfr/pull/39 (sizes in damaged files).
"""

import json
import tracemalloc

import numpy as np
import pytest
from caches import GRID, FakeIndex, fill, maps_of, spoil

from scae_dali.cache import CacheError, SaliencyCache
from scae_dali.cache.format import from_json, to_json
from scae_dali.commands import inspect_cache

ALL = np.arange(100)


@pytest.fixture
def path(tmp_path):
    with SaliencyCache.create(tmp_path / "maps.lmdb", FakeIndex(), grid=GRID) as cache:
        cache.write_neighbors(np.array([[1], [0], [1]], np.uint16))
        fill(cache, 3, weights="ab", settings={"mean": [1.5, 2]})
        cache.begin_pass(4, ids=[1, 2], input_size=(5, 7), settings={"amp": "no"})
    return str(tmp_path / "maps.lmdb")


def meta_of(path):
    with SaliencyCache(path) as cache:
        return json.loads(to_json(cache.meta))


def say(path, blob):
    """Puts another meta record into the file."""
    with SaliencyCache(path) as cache:
        spoil(cache, b"meta", blob if isinstance(blob, bytes) else json.dumps(blob).encode())


DEEP = json.loads("[" * 60 + "]" * 60)
HUGE = 10**30
NAN = float("nan")

WRONG = {
    "format": [0, -1, "1", True, 1.0, None, [1]],
    "grid": [
        *([7], [7, 7, 7], [0, 7], [7, -1], ["7", 7], [7.0, 7], [True, 7], 7, None, "77", {}),
        *([1 << 16, 1 << 15], [1, HUGE], DEEP),
    ],
    "samples": [-1, "100", 100.0, True, None, 10**12, HUGE, [100], NAN, float("inf")],
    "fingerprint": [None, 7, ["ab"], {}],
    "naming": ["name", None, 0, ["index"], True],
    "method": [7, ["gradcam"], False],
    "model": [7, {}, True],
    "layer": [7, [], 0],
    "input_size": [0, -3, "224", True, 2.5, [5], [5, 0], [5, "7"], [5, 7, 9], {}, NAN],
    "weights": [None, 7, ["ab"]],
    "epoch": [-1, 65_536, "3", 3.0, True, [3], HUGE, NAN],
    "passes": [-1, "1", None, 1.5, True],
    "under_way": [[], "x", 4, True],
    "neighbors": [[3], [-3, -1], [-1, 1], [3, "1"], [65_537, 1], [3, 1.0], 3, {}, [3, True]],
    "part": [-1, 101, "2", True, 1.5, HUGE],
    "which": [7, [], True],
    "settings": [[], "x", 7, {"mean": DEEP}, {"mean": NAN}],
}


@pytest.mark.parametrize("name", WRONG)
def test_each_field_has_its_type_and_range(path, name):
    sound = meta_of(path)
    for value in WRONG[name]:
        say(path, sound | {name: value})
        with pytest.raises(
            CacheError, match=rf"'{path}' is damaged: it has a corrupt meta"
        ) as error:
            SaliencyCache(path)
        if value == value and not json.dumps(value).count("NaN") and value != float("inf"):
            assert f"{name} must be " in str(error.value)
            assert "got " in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 600
        say_with_open_cache(path, sound)
    with SaliencyCache(path) as cache:
        assert cache.read([5])[1].all()


def say_with_open_cache(path, fields):
    """The same where the cache that is there cannot be opened."""
    from scae_dali.cache.environment import environment_at

    environment_at(path).update(
        lambda txn: txn.put(b"meta", json.dumps(fields).encode()) and None, needs=0
    )


@pytest.mark.parametrize(
    "name", ["epoch", "weights", "part", "which", "method", "model", "layer", "input_size"]
)
def test_each_field_of_the_pass_under_way(path, name):
    sound = meta_of(path)
    for value in [*WRONG[name], *([None] if name == "epoch" else [])]:
        with pytest.raises(CacheError, match="is damaged"):
            from_json(
                json.dumps(sound | {"under_way": sound["under_way"] | {name: value}}).encode(), path
            )
    lacking = {key: value for key, value in sound["under_way"].items() if key != name}
    blob = json.dumps(sound | {"under_way": lacking}).encode()
    if name == "epoch":
        with pytest.raises(CacheError, match=r"under_way\.epoch is missing"):
            from_json(blob, path)
    else:
        unknown = "" if name == "weights" else None
        assert from_json(blob, path).under_way == sound["under_way"] | {name: unknown}


@pytest.mark.parametrize("name", ["format", "grid", "samples", "fingerprint", "naming"])
def test_fields_that_must_be_there(path, name):
    fields = meta_of(path)
    del fields[name]
    with pytest.raises(CacheError, match=rf"{name} (is missing|must be a positive)"):
        from_json(json.dumps(fields).encode(), path)


def test_fields_of_an_older_version_may_be_missing(path):
    fields = meta_of(path)
    older = {name: fields[name] for name in ("format", "grid", "samples", "fingerprint", "naming")}
    meta = from_json(json.dumps(older).encode(), path)
    assert (meta.grid, meta.samples, meta.epoch, meta.settings) == (GRID, 100, None, None)


@pytest.mark.parametrize("done", [0, 60])
def test_a_pass_of_an_older_version_that_was_killed_goes_on(tmp_path, done):
    """That version knew no passes over some samples."""
    path = str(tmp_path / "old.lmdb")
    with SaliencyCache.create(path, FakeIndex(), grid=GRID) as cache:
        cache.begin_pass(2, weights="cd", model="net")
        cache.write(ALL[:done], maps_of(ALL[:done], 2), epoch=2)
    fields = meta_of(path)
    known = ("epoch", "weights", "method", "model", "layer", "input_size")
    older = {name: value for name, value in fields.items() if name not in ("part", "which")}
    older["under_way"] = {name: fields["under_way"][name] for name in known}
    say_with_open_cache(path, older)
    with SaliencyCache(path, index=FakeIndex()) as cache:
        assert cache.meta.under_way == fields["under_way"]
        assert cache.begin_pass(2, weights="cd", model="net").tolist() == ALL[done:].tolist()
        cache.write(ALL[done:], maps_of(ALL[done:], 2), epoch=2)
        cache.end_pass(2)
        assert (cache.meta.epoch, cache.census()) == (2, ({2: 100}, 0))


@pytest.mark.parametrize(
    ("blob", "told"),
    [
        (b"[" * 100_000, "it is no JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "it is no JSON"),
        (b'{"settings": ' + b'{"a": ' * 50_000, "it is no JSON"),
        (b"\xff\xfe{", "it is no JSON"),
        ('{"format": 1}'.encode("utf-16"), "it is no JSON"),
        (b"{", "it is no JSON"),
        (b'{"format": ' + b"9" * 10_000 + b"}", "it is no JSON"),
        (b"[]", "it must be a dict, got list"),
        (b"7", "it must be a dict, got int"),
        (b"null", "it must be a dict, got NoneType"),
        (b'"format"', "it must be a dict, got str"),
    ],
)
def test_records_that_are_no_dict(path, blob, told):
    say(path, blob)
    with pytest.raises(CacheError, match=rf"corrupt meta record, {told}"):
        SaliencyCache(path)


def test_unknown_fields_and_formats(path):
    fields = meta_of(path)
    with pytest.raises(CacheError, match="'colour' is no field of format 1"):
        from_json(json.dumps(fields | {"colour": 1}).encode(), path)
    with pytest.raises(CacheError, match=r"under_way\.'colour' is no field"):
        from_json(
            json.dumps(fields | {"under_way": fields["under_way"] | {"colour": 1}}).encode(), path
        )
    with pytest.raises(CacheError, match=r"is of format 2, this version .* build a new") as error:
        from_json(b'{"format": 2, "colour": 1}', path)
    assert "damaged" not in str(error.value)  # another version can read it


def test_what_is_written_can_be_read(path):
    with SaliencyCache(path, index=FakeIndex()) as cache:
        settings = {"a": {"b": [[1.5, None, True, "x"]]}}
        fill(cache, 65_535, settings=settings, input_size=(np.int64(3), 4), model="Ωλ\ud800")
        assert cache.meta.settings == settings
        deep = {"a": DEEP}
        with pytest.raises(ValueError, match="settings must have at most 32 levels"):
            cache.begin_pass(1, settings=deep)
        for _ in range(2000):
            deep = {"a": deep}
        with pytest.raises(ValueError, match="settings must have at most 32 levels"):
            cache.begin_pass(1, settings=deep)


@pytest.mark.parametrize("grid", [(30_000, 30_000), (1, 1), (7, 8), (49, 1000)])
def test_a_grid_that_the_records_do_not_have(path, grid):
    say(path, meta_of(path) | {"grid": grid})
    tracemalloc.start()
    told = (
        rf"grid is {grid[0]}x{grid[1]}, whose records have {grid[0] * grid[1] + 2:,} bytes, .* 51"
    )
    with pytest.raises(CacheError, match=told):
        SaliencyCache(path)
    assert inspect_cache.main([path]) == 1
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_a_grid_of_a_cache_without_maps_takes_no_memory(tmp_path):
    index = FakeIndex()
    with SaliencyCache.create(tmp_path / "new", index, grid=(2000, 2000)) as cache:
        maps, found = cache.read(range(4))
        assert maps.shape == (4, 2000, 2000)
        assert maps.flags.writeable
        assert not found.any()
        assert not maps[:, ::500].any()


def test_samples_that_the_records_do_not_have(path):
    fields = meta_of(path) | {"under_way": None}
    for samples, told in ((10**9, "1,000,000,000"), (1000, "1,000")):
        say_with_open_cache(path, fields | {"samples": samples})
        with pytest.raises(
            CacheError, match=rf"samples is {told} and a pass .* it has 102 records"
        ):
            SaliencyCache(path)
    say_with_open_cache(path, fields | {"samples": 1000, "epoch": None})
    with pytest.raises(CacheError, match="of another data set: 1000 samples"):
        SaliencyCache(path, index=FakeIndex())


def test_a_cache_of_which_all_maps_were_withdrawn_is_sound(path):
    with SaliencyCache(path, index=FakeIndex()) as cache:
        cache.begin_pass(3, weights="other")
    with SaliencyCache(path, index=FakeIndex()) as cache:
        assert cache.census() == ({}, 100)
        fill(cache, 3, weights="other")


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (b"", r"neighbors has 0 bytes, its shape is \(3, 1\)"),
        (b"12345", "neighbors has 5 bytes"),
        (bytes(8), "neighbors has 8 bytes"),
        (b"\0\0\3\0\1\0", "class 3 of 3"),
        (b"\xff\xff\0\0\1\0", "class 65535 of 3"),
    ],
)
def test_neighbours_that_cannot_be(path, record, told):
    with SaliencyCache(path, index=FakeIndex()) as cache:
        spoil(cache, b"neighbors", record)
        with pytest.raises(
            CacheError, match=rf"'{path}' has neighboring classes .*{told}.*; make a s"
        ):
            cache.read_neighbors()
        assert cache.read([5])[1].all()
        cache.begin_pass(5)
        cache.write_neighbors(np.array([[2], [0], [1]], np.uint16))
        assert cache.read_neighbors().tolist() == [[2], [0], [1]]


def test_records_that_are_of_no_sample_are_passed_over(path):
    with SaliencyCache(path, index=FakeIndex()) as cache:
        for key in (b"\xff" * 8, b"\0" * 7 + b"\x64", b"a", b"seven77", b"ninebytes"):
            spoil(cache, key, b"\0\0" + bytes(49))
        spoil(cache, (7).to_bytes(8, "big"), b"short")
        found = cache.read(ALL)[1]
        assert np.flatnonzero(~found).tolist() == [7]
        np.testing.assert_array_equal(cache.resident().read(ALL)[0], cache.read(ALL)[0])
        np.testing.assert_array_equal(cache.read([5])[0], maps_of([5], 3))
    with SaliencyCache(path, index=FakeIndex()) as cache:
        assert cache.coverage().found == 99
