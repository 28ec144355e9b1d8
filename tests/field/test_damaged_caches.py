"""A cache that is cut off or damaged, or on a full disk, is told; it ends no process.

LMDB trusts its file. At a page behind the end of the file the process ended by SIGBUS in the middle
of an epoch, and at a page that is none by SIGABRT; other damage gave raw errors of LMDB, or a part
of the maps. The kind is that of https://github.com/damus-io/damus/pull/3660 (a truncated data.mdb
crashed its readers) and https://github.com/jnwatson/py-lmdb/issues/161 (a bus error where the disk
is full).
"""

import errno
import os
import re
import shutil
import threading
import time
from functools import partial

import lmdb
import numpy as np
import pytest
from caches import GRID, FakeIndex, fill, in_process, maps_of

from scae_dali.cache import CacheError, SaliencyCache, environment, files
from scae_dali.cache.format import put_ascending
from scae_dali.commands import copy_cache, inspect_cache

SAMPLES = 1000
INDEX = FakeIndex(SAMPLES)
ALL = np.arange(SAMPLES)
PAGE = 4096
FREE_FLAGS, RECORD_FLAGS = 16 + 24 + 4, 16 + 24 + 48 + 4  # where a meta page has them
DAMAGED = (
    r"saliency cache '.*maps\.lmdb' is damaged: {}\. Copy it again from one that is sound, with "
    r"`scae-dali copy-cache` .*; if there is none, remove it and build it anew$"
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(files, "_PAUSES", (0.0, 0.01))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "maps.lmdb"
    with SaliencyCache.create(path, INDEX, grid=GRID) as cache:
        cache.write_neighbors(np.zeros((3000, 1), np.uint16))
        for epoch in (1, 2, 3):
            fill(cache, epoch)
    return path


def data_of(path):
    return path / "data.mdb"


def pages_of(path):
    return data_of(path).stat().st_size // PAGE


def look(path):
    """Everything that opens a cache; the maps must be right."""
    with SaliencyCache(path, index=INDEX) as cache:
        for maps, found in (cache.read(ALL), cache.resident().read(ALL)):
            assert found.all()
            np.testing.assert_array_equal(maps, maps_of(ALL, 3))
        assert cache.census() == ({3: SAMPLES}, 0)
        assert not cache.read_neighbors().any()


def refusal(path, look=look):
    """What a look at the file is refused with; "" where all it shows is right."""
    try:
        look(path)
    except CacheError as error:
        return str(error)
    return ""


def test_a_file_that_was_cut_off_is_refused_wherever_it_ends(path):
    data = data_of(path).read_bytes()
    with lmdb.open(str(path), readonly=True, lock=False) as env:
        needed = (env.info()["last_pgno"] + 1) * PAGE
    refused = 0
    for length in {1, 40, PAGE, PAGE + 40, 2 * PAGE, *range(3 * PAGE, len(data), 7 * PAGE + 100)}:
        data_of(path).write_bytes(data[:length])
        told = refusal(path)  # none where only pages of no use are missing
        assert re.search(DAMAGED.format(r"data\.mdb .*"), told) if told else length > needed // 2
        refused += bool(told)
    assert refused > 8
    data_of(path).write_bytes(data[: needed // 3])
    told = rf"data\.mdb has been cut off: it has {needed // 3:,} bytes of {needed:,}"
    for call in (
        lambda: SaliencyCache(path),
        lambda: SaliencyCache.create(path, INDEX, grid=GRID, exist_ok=True),
    ):
        with pytest.raises(CacheError, match=DAMAGED.format(told)):
            call()
    assert inspect_cache.main([str(path)]) == 1
    with pytest.raises(SystemExit, match="error: saliency cache"):
        copy_cache.main([str(path), "--out", f"{path}.copy"])
    assert not os.path.exists(f"{path}.copy")
    data_of(path).write_bytes(data)
    look(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<!DOCTYPE html><html>not found</html>", r"is no LMDB file.*: b'<!DOCTYPE html><'"),
        (bytes(20_000), r"is no LMDB file, or is damaged at its beginning: b'.x00"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is no LMDB file"),
        (b"x" * 9000, "is no LMDB file"),
    ],
)
def test_a_file_of_something_else(path, content, told):
    data_of(path).write_bytes(content)
    with pytest.raises(CacheError, match=DAMAGED.format(rf"data\.mdb {told}.*")):
        look(path)


def test_a_database_of_another_program_is_not_called_damaged(tmp_path):
    with lmdb.open(str(tmp_path / "theirs"), max_dbs=2) as env:
        names = env.open_db(b"names"), env.open_db(b"twins", dupsort=True)
        with env.begin(write=True) as txn:
            for k in range(1000):
                txn.put(f"key {k}".encode(), b"value" * k)
                for name in names:
                    txn.put(b"key", str(k).encode(), db=name)
    with pytest.raises(
        CacheError, match="but no saliency cache: it has no meta record; ch"
    ) as error:
        SaliencyCache(tmp_path / "theirs")
    assert "remove" not in str(error.value)


@pytest.mark.parametrize("flags", [2, 4, 8])
def test_other_kinds_of_databases_are_not_called_damaged(tmp_path, flags):
    """Keys that are compared from their end, several values of a key, keys that are integers."""
    with lmdb.open(str(tmp_path / "theirs")) as env, env.begin(write=True) as txn:
        txn.put(b"12345678", b"value")
    for page in (0, PAGE):
        change(tmp_path / "theirs", page + RECORD_FLAGS, flags.to_bytes(2, "little"))
    with pytest.raises(CacheError, match="no saliency cache: it has no meta record"):
        SaliencyCache(tmp_path / "theirs")


def test_an_empty_file_and_no_file(path):
    data_of(path).write_bytes(b"")
    with pytest.raises(CacheError, match=r"no saliency cache at '.*': its data\.mdb is empty; b"):
        SaliencyCache(path)
    data_of(path).unlink()
    os.mkfifo(data_of(path))  # it would wait for a writer
    with pytest.raises(CacheError, match=r"no saliency cache|is no file"):
        SaliencyCache(path)
    shutil.rmtree(path)
    path.write_text("<!DOCTYPE html>")
    with pytest.raises(CacheError, match=r"no saliency cache at '.*maps\.lmdb': a file is there"):
        SaliencyCache(path)


def change(path, offset, content):
    with open(data_of(path), "r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize("offset", [16, PAGE + 16])
def test_meta_pages_without_their_magic_number(path, offset):
    change(path, offset, b"\0")
    with pytest.raises(CacheError, match=DAMAGED.format(r"data\.mdb is no LMDB file, or .*")):
        look(path)


def test_another_version_of_the_format(path):
    change(path, 20, b"\2")
    with pytest.raises(CacheError, match=r"data\.mdb is of version 2 of LMDB's format, and ver"):
        look(path)


@pytest.mark.parametrize("page", [bytes(PAGE), b"\xff" * PAGE, bytes(range(256)) * 16])
def test_a_page_that_is_none_ends_no_process(path, page):
    """Each page in turn: a look at the file either sees all maps, or is refused."""
    data = data_of(path).read_bytes()
    refused = 0
    for number in range(pages_of(path)):
        change(path, number * PAGE, page)
        told = refusal(path)
        assert not told or str(path) in told
        refused += bool(told)
        change(path, number * PAGE, data[number * PAGE : (number + 1) * PAGE])
    with lmdb.open(str(path), readonly=True, lock=False) as env:
        needed = env.stat()["leaf_pages"] + env.stat()["branch_pages"]
    assert refused >= needed
    look(path)


def nodes_of(path, key):
    """Where the key is in the nodes of a file that have it; 8 bytes before it a node begins."""
    data, key = data_of(path).read_bytes(), key.to_bytes(8, "big")
    return [
        found.start()
        for found in re.finditer(re.escape(key), data)
        if data[found.start() - 2 : found.start()] == b"\x08\0"
    ]


@pytest.mark.parametrize("key", [1, 517, 999])
def test_a_record_whose_node_is_damaged_is_refused(path, key):
    """LMDB moves the nodes of a page by their sizes: one that reached into its neighbour ended the
    process in a pass, by SIGBUS."""
    data = data_of(path).read_bytes()
    wrong = [(-8, size) for size in (0, 1, 49, 60, 71, 115, 1000, 65_535)]
    wrong += [(-6, high) for high in (1, 256)]
    wrong += [(-4, flags) for flags in (*range(1, 8), 8, 255)]
    wrong += [(-2, length) for length in (0, 2, 4, 6, 10, 40, 300)]
    for offset, value in wrong:
        for place in nodes_of(path, key):
            change(path, place + offset, value.to_bytes(2, "little"))
        assert re.search(DAMAGED.format(r"data\.mdb .*"), refusal(path)), (offset, value)
        data_of(path).write_bytes(data)
    look(path)


@pytest.mark.parametrize("key", [40, 430, 870])
def test_places_of_nodes_that_are_wrong_are_refused(path, key):
    """A page tells behind its header where its nodes begin."""
    data = data_of(path).read_bytes()
    for wrong in ("exchanged", "doubled", "shifted"):
        for place in nodes_of(path, key):
            page = place // PAGE * PAGE + 16
            first, second = data[page : page + 2], data[page + 2 : page + 4]
            shifted = (int.from_bytes(first, "little") - 4).to_bytes(2, "little")
            pair = {"exchanged": second + first, "doubled": first * 2, "shifted": shifted + second}
            change(path, page, pair[wrong])
        assert re.search(DAMAGED.format(r"data\.mdb .*"), refusal(path)), wrong
        data_of(path).write_bytes(data)
    look(path)


@pytest.mark.parametrize(
    ("offset", "flags"),
    [
        *((FREE_FLAGS, flags) for flags in (0, 2, 4, 0x0C, 0x18, 0x28, 0x48, 0x10, 0x7E)),
        *((RECORD_FLAGS, flags) for flags in (1, 2, 4, 8, 0x10, 0x20, 0x40, 0x14)),
    ],
)
def test_flags_of_the_trees(path, offset, flags):
    """LMDB ended the process in the next pass (SIGABRT), or lock.mdb was to be removed."""
    for page in (0, PAGE):
        change(path, page + offset, flags.to_bytes(2, "little"))
    assert re.search(DAMAGED.format(".*"), refusal(path))


def test_flags_of_the_file_are_no_damage(path):
    """LMDB keeps in the same place how a file was opened when it was made or copied."""
    for page in (0, PAGE):
        change(path, page + FREE_FLAGS, (0x4008).to_bytes(2, "little"))
    look(path)
    with SaliencyCache(path, index=INDEX) as cache:
        fill(cache, 4)


def test_pages_that_changed_places(path):
    data = data_of(path).read_bytes()
    for number in range(2, pages_of(path) - 1, 3):
        first = data[number * PAGE : (number + 1) * PAGE]
        second = data[(number + 1) * PAGE : (number + 2) * PAGE]
        change(path, number * PAGE, second + first)
        told = refusal(path)
        assert not told or str(path) in told
        change(path, number * PAGE, first + second)


def look_at_any_pass(path):
    """All maps must be those of the passes that they say they are of."""
    with SaliencyCache(path, index=INDEX) as cache:
        maps, found = cache.read(ALL)
        stamps = cache.stamps()
    assert found.all()
    for epoch in set(stamps.tolist()):
        ids = ALL[stamps == epoch]
        np.testing.assert_array_equal(maps[ids], maps_of(ids, epoch))


def test_a_copy_made_while_a_pass_writes_is_right_or_refused(path):
    """The first bytes of such a copy are older than the last ones."""
    refused = 0
    for passes in (0, 1, 3):
        for share in (0.05, 0.3, 0.6):
            data = data_of(path)
            first = data.read_bytes()[: int(share * data.stat().st_size)]
            with SaliencyCache(path, index=INDEX) as cache:
                for epoch in range(4, 4 + passes):
                    fill(cache, epoch, commit_every=200)
            torn = path.parent / "torn" / "maps.lmdb"
            shutil.rmtree(torn.parent, ignore_errors=True)
            torn.mkdir(parents=True)
            data_of(torn).write_bytes(first + data.read_bytes()[len(first) :])
            if told := refusal(torn, look_at_any_pass):
                assert passes
                assert "`cp` is not safe while a pass writes" in told
            refused += bool(told)
    assert refused >= 3


def test_a_sound_file_that_lacks_pages_of_no_use_is_not_refused(path):
    """LMDB writes no page that a transaction has let go of, and counts it all the same."""
    shutil.rmtree(path)
    with SaliencyCache.create(path, FakeIndex(100), grid=(30, 30)) as cache:
        cache.write_neighbors(np.zeros((3, 1), np.uint16))
        keys = [k.to_bytes(8, "big") for k in range(100)]
        record = bytes(902)
        for values in ([record] * 20, [b""] * 100):
            put = partial(put_ascending, keys=keys[: len(values)], values=values)
            cache._environment().update(put, needs=0)
        pages = cache._environment()._run(lambda handle: handle.info()["last_pgno"]) + 1
    short = data_of(path).stat().st_size < pages * PAGE
    if not short:  # other versions of LMDB may reuse that page
        pytest.skip("this version of LMDB wrote all pages")
    with SaliencyCache(path) as cache:
        assert cache.census() == ({}, 100)


def test_a_cache_is_never_refused_while_another_process_writes(path, monkeypatch):
    """Nor is one whose writer was killed."""
    code = """
        cache = SaliencyCache(path, index=FakeIndex(1000))
        for epoch in range(4, 25):
            fill(cache, epoch, commit_every=100)
    """
    writer = threading.Thread(target=in_process, args=(code, path))
    writer.start()
    opened = 0
    while writer.is_alive():
        with SaliencyCache(path, index=INDEX) as cache:
            monkeypatch.setattr(files, "_sound", {})
            assert cache.read(ALL)[1].all()
        opened += 1
    writer.join()
    assert opened > 3


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (lmdb.CorruptedError, "is damaged: LMDB reports .*Copy it again"),
        (lmdb.PageNotFoundError, "is damaged: LMDB reports"),
        (lmdb.InvalidError, "is damaged: LMDB reports"),
        (lmdb.CursorFullError, "is damaged: LMDB reports"),
        (lmdb.BadRslotError, r"has a lock\.mdb that cannot be used .* remove lock\.mdb$"),
        (lmdb.PanicError, "what was committed is kept; run again"),
        (lmdb.BadTxnError, "cannot be opened or used .*and run again"),
        (lmdb.Error, "cannot be opened or used"),
    ],
)
def test_errors_of_lmdb_are_told_with_a_remedy(path, error, told):
    with SaliencyCache(path, index=INDEX) as cache:

        def fails(_):
            raise error("mdb_get: something")

        env = cache._environment()
        for call in (lambda: env.view(fails), lambda: env.update(fails, needs=0)):
            with pytest.raises(CacheError, match=rf"saliency cache '.*maps\.lmdb' .*{told}") as how:
                call()
            assert ("remove it" in str(how.value)) == ("is damaged" in told)
        assert cache.read(ALL)[1].all()  # it goes on


@pytest.mark.parametrize("error", [lmdb.InvalidError, lmdb.VersionMismatchError])
def test_a_lock_file_of_something_else_is_not_taken_for_the_cache(path, monkeypatch, error):
    def fails(*_, **__):
        raise error("MDB_INVALID: File is not an LMDB file")

    monkeypatch.setattr(lmdb, "open", fails)
    with pytest.raises(
        CacheError, match=r"has a lock\.mdb that cannot .*; its maps are kept"
    ) as how:
        look(path)
    assert "anew" not in str(how.value)


LOCK_FILES = {
    "a directory": lambda lock: lock.mkdir(),
    "a pipe": os.mkfifo,
    "a device": lambda lock: lock.symlink_to("/dev/null"),
    "a link to itself": lambda lock: lock.symlink_to("lock.mdb"),
    "a link to nowhere": lambda lock: lock.symlink_to("no/such/place"),
}


@pytest.mark.parametrize("make", LOCK_FILES.values(), ids=LOCK_FILES)
def test_a_lock_file_that_is_no_file_is_told(path, make):
    lock = path / "lock.mdb"
    lock.unlink()
    make(lock)
    for call in (look, partial(SaliencyCache.create, index=INDEX, grid=GRID, exist_ok=True)):
        with pytest.raises(
            CacheError, match=r"a lock\.mdb that is .*; its maps are kept; .* remove "
        ):
            call(path)
    lock.rmdir() if lock.is_dir() else lock.unlink()
    look(path)


def test_a_lock_file_may_be_on_another_disk(path, tmp_path):
    (path / "lock.mdb").unlink()
    (path / "lock.mdb").symlink_to(tmp_path / "elsewhere")
    look(path)
    assert (tmp_path / "elsewhere").stat().st_size > 60_000


@pytest.mark.parametrize("name", [".DS_Store", ".nfs000000000123", "notes"])
def test_files_of_others_beside_a_cache_do_no_harm(path, name):
    (path / name).write_text("x")
    with SaliencyCache.create(path, INDEX, grid=GRID, exist_ok=True) as cache:
        fill(cache, 4)
        assert cache.census() == ({4: SAMPLES}, 0)
    with pytest.raises(CacheError, match="something is there"):
        SaliencyCache.create(path, INDEX, grid=GRID)
    data_of(path).unlink()
    with pytest.raises(CacheError, match=rf"is no saliency cache: it holds '{name}'"):
        SaliencyCache.create(path, INDEX, grid=GRID, exist_ok=True)


@pytest.mark.parametrize("exist_ok", [False, True])
@pytest.mark.parametrize("left", [["lock.mdb"], ["data.mdb", "lock.mdb"], ["data.mdb"]])
def test_what_a_killed_process_left_of_a_new_cache_is_in_nobodys_way(tmp_path, left, exist_ok):
    (tmp_path / "new").mkdir()
    for name in left:
        (tmp_path / "new" / name).touch()
    with pytest.raises(CacheError, match=r"no saliency cache at .*; build one with"):
        SaliencyCache(tmp_path / "new")
    with SaliencyCache.create(tmp_path / "new", INDEX, grid=GRID, exist_ok=exist_ok) as cache:
        fill(cache, 1)


def test_a_copy_is_not_put_into_the_cache(path, tmp_path):
    (tmp_path / "link").symlink_to(path)
    for out in (path / "copy", path / "deep" / "copy", tmp_path / "link" / "copy"):
        with pytest.raises(SystemExit, match=r"copy' is within saliency cache '.*maps\.lmdb'; cho"):
            copy_cache.main([str(path), "--out", str(out)])
    assert sorted(os.listdir(path)) == ["data.mdb", "lock.mdb"]
    copy_cache.main([str(path), "--out", f"{path}.copy"])  # its name alone begins alike


def test_a_disk_that_is_full_names_the_place_that_was_asked_for(tmp_path):
    with (
        pytest.raises(OSError, match="no room") as error,
        environment.new_directory(str(tmp_path / "copy")) as hidden,
    ):
        raise OSError(errno.ENOSPC, "no room", os.path.join(hidden, "data.mdb"))
    assert error.value.filename == str(tmp_path / "copy")
    with (
        pytest.raises(FileNotFoundError) as other,
        environment.new_directory(str(tmp_path / "copy")),
    ):
        raise FileNotFoundError(errno.ENOENT, "none", "elsewhere")
    assert other.value.filename == "elsewhere"
    assert os.listdir(tmp_path) == []


def full(descriptor, offset, length):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_on_a_full_disk_a_cache_is_read_from_memory(path, monkeypatch):
    """LMDB maps lock.mdb: without room for it, the process ended by SIGBUS."""
    (path / "lock.mdb").unlink()
    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(environment, "_warned", set())
    with pytest.warns(RuntimeWarning, match=r"copy in the memory .* no room for lock\.mdb \(No sp"):
        look(path)
    with (
        SaliencyCache(path, index=INDEX) as cache,
        pytest.raises(
            OSError, match=r"No space left on device: the saliency cache needs .* make r"
        ),
    ):
        cache.begin_pass(4)
    monkeypatch.undo()
    with SaliencyCache(path, index=INDEX) as cache:
        fill(cache, 4)


def test_a_cache_is_not_made_on_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        SaliencyCache.create(tmp_path / "new", INDEX, grid=GRID)
    assert error.value.filename == str(tmp_path / "new")
    monkeypatch.undo()
    SaliencyCache.create(tmp_path / "new", INDEX, grid=GRID).close()


def test_all_pages_are_looked_at_once_for_each_state_of_the_file(path, monkeypatch):
    """The look costs a third of a copy of all maps in memory, so it is made when the cache is
    opened, and not again before somebody writes to it."""
    looks = []
    monkeypatch.setattr(files, "check_trees", lambda *_: looks.append(1))
    monkeypatch.setattr(files, "_sound", {})
    for _ in range(3):
        with SaliencyCache(path, index=INDEX) as cache:
            cache.read(ALL)
    assert len(looks) == 1
    time.sleep(0.02)  # the system's clock of files
    with SaliencyCache(path, index=INDEX) as cache:
        fill(cache, 9)
    SaliencyCache(path).close()
    assert len(looks) == 2
