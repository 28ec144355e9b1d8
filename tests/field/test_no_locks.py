"""A cache where LMDB's locks cannot be taken is read all the same, and safely.

On file systems without locks the error said to delete a good cache. A user without permission to
write read without locks and without a word, and the process ended (SIGABRT) in the next pass of the
owner. The kind is that of https://github.com/BVLC/caffe/pull/4774 (NFS without locks),
https://github.com/jnwatson/py-lmdb/issues/228 ("Function not implemented" on a cluster) and
https://github.com/nuclia/nucliadb/pull/1157 (readers without locks beside a writer).
"""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import lmdb
import numpy as np
import pytest
from caches import GRID, FakeIndex, fill, in_process, maps_of, spoil

from scae_dali.cache import CacheError, SaliencyCache, environment, files
from scae_dali.commands import copy_cache

INDEX = FakeIndex()
ALL = np.arange(100)
LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENODEV, errno.EINVAL)
open_lmdb = lmdb.open


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_warned", set())
    with SaliencyCache.create(tmp_path / "maps.lmdb", INDEX, grid=GRID) as cache:
        fill(cache, 1)
    return str(tmp_path / "maps.lmdb")


def answer(monkeypatch, code):
    """LMDB's locks cannot be taken from now on."""

    def opened(path, **options):
        if options.get("lock", True):
            raise lmdb.Error(f"{path}: {os.strerror(code)}")
        return open_lmdb(path, **options)

    monkeypatch.setattr(lmdb, "open", opened)


def seen(cache):
    """The epoch of the maps, all of which must be of it."""
    (epoch,) = set(cache.stamps().tolist())
    for maps, found in (cache.read(ALL), cache.resident().read(ALL)):
        assert found.all()
        np.testing.assert_array_equal(maps, maps_of(ALL, epoch))
    return epoch


@pytest.mark.parametrize("code", LOCKLESS)
def test_a_file_system_without_locks_is_read_from_memory(path, monkeypatch, code):
    answer(monkeypatch, code)
    told = rf"its file system has none \({os.strerror(code)}\); read a copy on a local disk"
    with pytest.warns(RuntimeWarning, match=rf"maps\.lmdb' is read from a copy .*: {told}"):
        cache = SaliencyCache(path, index=INDEX)
    assert seen(cache) == 1
    for call in (lambda: cache.begin_pass(2), cache.claim):
        with pytest.raises(
            CacheError, match=r"maps\.lmdb' cannot be written to: .* put it on a local disk"
        ) as error:
            call()
        assert os.strerror(code) in str(error.value)
        assert "remove" not in str(error.value)
    cache.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        with SaliencyCache(path, index=INDEX) as cache:
            assert len(cache.begin_pass(1)) == 0
    monkeypatch.undo()
    with SaliencyCache(path, index=INDEX) as cache:
        fill(cache, 2)


def test_the_copy_that_the_error_advises(path, tmp_path, monkeypatch, capsys):
    answer(monkeypatch, errno.ENOLCK)
    with pytest.warns(RuntimeWarning, match="copy"):
        copy_cache.main([path, "--out", str(tmp_path / "local")])
    assert "100 maps" in capsys.readouterr().out
    monkeypatch.undo()
    with SaliencyCache(tmp_path / "local", index=INDEX) as cache:
        assert seen(fill(cache, 2)) == 2


def test_no_cache_is_made_there(tmp_path, monkeypatch):
    answer(monkeypatch, errno.ENOLCK)
    with pytest.raises(CacheError, match=r"none \(No locks available\); put it on a local disk"):
        SaliencyCache.create(tmp_path / "new", INDEX, grid=GRID)


def test_a_cache_that_is_cut_off_is_refused_there_too(path, monkeypatch):
    answer(monkeypatch, errno.ENOLCK)
    monkeypatch.setattr(files, "_PAUSES", (0.0,))
    data = Path(path) / "data.mdb"
    data.write_bytes(data.read_bytes()[:-4096])
    with pytest.raises(CacheError, match="has been cut off"):
        SaliencyCache(path, index=INDEX)


def test_a_reader_without_locks_sees_whole_moments_while_a_pass_is_made(path, monkeypatch):
    """Every commit of the other process rewrites all maps."""
    monkeypatch.setattr(environment, "RENEWAL", 0.0)
    code = """
        cache = SaliencyCache(path, index=FakeIndex())
        for epoch in range(2, 40):
            cache.begin_pass(epoch)
            cache.write(range(100), maps_of(range(100), epoch), epoch=epoch)
            cache.end_pass(epoch)
            time.sleep(0.01)
    """
    writer = threading.Thread(target=in_process, args=(code, path))
    answer(monkeypatch, errno.EACCES)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.warns(RuntimeWarning, match="copy"):
        cache = SaliencyCache(path, index=INDEX)
    writer.start()
    epochs = set()
    while writer.is_alive():
        epochs.add(seen_in_one_look(cache))
    writer.join()
    assert seen_in_one_look(cache) == 39
    assert len(epochs) > 3
    cache.close()


def seen_in_one_look(cache):
    maps, found = cache.read(ALL)
    assert found.all()
    return next(e for e in range(60) if (maps == maps_of(ALL, e)).all())


def test_a_copy_serves_until_a_newer_one_is_there(path, monkeypatch):
    answer(monkeypatch, errno.ENOSYS)
    with pytest.warns(RuntimeWarning, match="copy"):
        cache = SaliencyCache(path, index=INDEX)
    in_process("fill(SaliencyCache(path, index=FakeIndex()), 2)", path)
    assert seen(cache) == 1  # it is compared with the file now and then
    version = cache.version()
    monkeypatch.setattr(environment, "RENEWAL", 0.0)
    monkeypatch.setattr(environment, "copy_in_memory", busy)
    assert seen(cache) == 1
    monkeypatch.setattr(environment, "copy_in_memory", files.copy_in_memory)
    assert seen(cache) == 2
    assert cache.version() != version
    descriptors = len(os.listdir("/proc/self/fd"))
    assert seen(cache) == 2
    assert len(os.listdir("/proc/self/fd")) == descriptors
    cache.close()
    assert len(os.listdir("/proc/self/fd")) < descriptors


def busy(path):
    raise CacheError("cannot be read now")


def test_a_copy_is_of_one_moment_or_refused(path, monkeypatch):
    """A pass that commits all the time, and one that pauses."""
    commits = []

    def copied(source, target, length, copy=shutil.copyfileobj):
        copy(source, target, length)
        number = commits.pop() if commits else 2
        with SaliencyCache(path) as cache:
            for k in range(number):
                spoil(cache, b"x", bytes([k]))

    monkeypatch.setattr(files, "_PAUSES", (0.0, 0.0, 0.0))
    monkeypatch.setattr(shutil, "copyfileobj", copied)
    with pytest.raises(CacheError, match=r"maps\.lmdb' cannot be read without .* wait until its p"):
        files.copy_in_memory(path)
    commits[:] = [1, 2]
    os.close(files.copy_in_memory(path))


def test_forks_read_from_copies_of_their_own(path):
    in_process(
        """
        import errno, lmdb, warnings
        open_lmdb = lmdb.open
        def opened(path, **options):
            if options.get("lock", True):
                raise lmdb.Error(path + ": No locks available")
            return open_lmdb(path, **options)
        lmdb.open = opened
        warnings.simplefilter("ignore")
        cache = SaliencyCache(path, index=FakeIndex())
        assert cache.read([5])[1].all()
        pid = os.fork()
        if pid == 0:
            ok = (cache.read([5])[0] == maps_of([5], 1)).all()
            os._exit(0 if ok else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert (cache.read([5])[0] == maps_of([5], 1)).all()
        """,
        path,
    )


@pytest.fixture
def namesake(path):
    """Another process that has the number of this one, as in another container: LMDB locks the byte
    of lock.mdb that has the process's number."""
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'r+b'); "
        "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(sys.argv[2])); print(); input()"
    )
    command = [sys.executable, "-c", code, os.path.join(path, "lock.mdb"), str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.stdin.close()


def test_a_process_of_another_container_with_the_same_number(path, namesake):
    told = (
        rf"another container or machine has it open and has the number of this one \({os.getpid()}"
    )
    with pytest.warns(
        RuntimeWarning, match=rf"copy in the memory of .*: a process of {told}.*host"
    ):
        cache = SaliencyCache(path, index=INDEX)
    assert seen(cache) == 1
    for call in (lambda: cache.begin_pass(2), cache.claim):
        with pytest.raises(
            CacheError, match=rf"cannot be written to: a process of {told}.* --pid="
        ):
            call()
    cache.close()
    namesake.stdin.close()
    namesake.wait()
    with SaliencyCache(path, index=INDEX) as cache:
        assert seen(fill(cache, 2)) == 2


def test_a_reader_leaves_no_lock_file_that_shuts_out_who_may_write(path, monkeypatch):
    os.unlink(os.path.join(path, "lock.mdb"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.warns(RuntimeWarning, match="copy in the memory"), SaliencyCache(path) as cache:
        assert cache.census() == ({1: 100}, 0)
    assert os.listdir(path) == ["data.mdb"]


@pytest.mark.parametrize("mode", [0o664, 0o600, 0o666])
def test_a_new_lock_file_is_for_those_who_may_use_the_cache(path, mode):
    os.unlink(os.path.join(path, "lock.mdb"))
    os.chmod(os.path.join(path, "data.mdb"), mode)
    owner = (1234, 100) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(os.path.join(path, "data.mdb"), *owner)
    with SaliencyCache(path, index=INDEX) as cache:
        assert seen(cache) == 1
        status = os.stat(os.path.join(path, "lock.mdb"))
    assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (mode, *owner)


AS_READER = """
    if os.geteuid() == 0:
        os.setuid(65534)
    import scae_dali.cache.environment, warnings
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        cache = SaliencyCache(path, index=FakeIndex())
        for _ in range(3):
            assert cache.read(range(100))[1].all()
    print([str(one.message) for one in told])
    end = time.time() + 3
    epochs = set()
    while time.time() < end and len(epochs) < 3:
        maps, found = cache.read(range(100))
        assert found.all()
        epochs.add(next(e for e in range(200) if (maps == maps_of(range(100), e)).all()))
        scae_dali.cache.environment.RENEWAL = 0.01
    try:
        cache.begin_pass(200)
    except PermissionError as error:
        print(error)
    print(len(epochs))
"""


@pytest.fixture
def shared():
    """A cache in a folder that other users see."""
    root = Path(tempfile.mkdtemp())
    os.chmod(root, 0o755)
    path = root / "maps.lmdb"
    with SaliencyCache.create(path, INDEX, grid=GRID) as cache:
        fill(cache, 1)
    yield path
    os.chmod(path, 0o755)
    shutil.rmtree(root)


@pytest.mark.parametrize("lock", [0o644, 0o666])
def test_a_reader_without_permission_lives_through_passes_of_the_owner(shared, lock):
    """Who may write to lock.mdb alone takes locks, and needs no copy."""
    if os.geteuid() != 0:
        pytest.skip("only root can read as another user; the tests above stand for this one")
    os.chmod(shared / "data.mdb", 0o644)
    os.chmod(shared / "lock.mdb", lock)
    done = []
    reader = threading.Thread(
        target=lambda: done.append(in_process(AS_READER, shared, check=False))
    )
    reader.start()
    epoch = 2
    while reader.is_alive():
        with SaliencyCache(shared, index=INDEX) as cache:
            cache.begin_pass(epoch)
            cache.write(ALL, maps_of(ALL, epoch), epoch=epoch)
            cache.end_pass(epoch)
        epoch = 2 + (epoch - 1) % 190
    reader.join()
    assert done[0].returncode == 0, done[0]
    told, refused, epochs = done[0].stdout.splitlines()
    if lock == 0o644:
        assert "copy in the memory of this process" in told
        assert r"may not write to lock.mdb (Permission denied); ask for permission" in told
        assert told.count("saliency cache") == 1
    else:
        assert told == "[]"
    assert "is read-only here" in refused
    assert int(epochs) > 1


def test_who_may_not_list_the_folder_is_told_so_at_a_pass(shared):
    if os.geteuid() != 0:
        pytest.skip("only root can become a user without permission")
    for name in ("data.mdb", "lock.mdb"):
        os.chmod(shared / name, 0o666)
    code = """
        os.setuid(65534)
        cache = SaliencyCache(path, index=FakeIndex())
        print(cache.read([3])[1].all())
        SaliencyCache.create(path, FakeIndex(), grid=GRID, exist_ok=True)
        for call in (cache.claim, lambda: cache.begin_pass(2)):
            try:
                call()
            except PermissionError as error:
                print(error)
    """
    for mode in (0o711, 0o733):
        os.chmod(shared, mode)
        seen, *told = in_process(code, shared).stdout.splitlines()
        assert (seen, len(told)) == ("True", 2)
        assert all("may not read its directory; ask its owner" in one for one in told)


def test_what_may_not_be_seen_is_not_called_missing(shared):
    if os.geteuid() != 0:
        pytest.skip("only root can become a user without permission")
    code = """
        os.setuid(65534)
        try:
            SaliencyCache(path)
        except PermissionError as error:
            print(error)
    """
    os.chmod(shared / "data.mdb", 0o600)
    assert "cannot be read by this user; ask its owner" in in_process(code, shared).stdout
    os.chmod(shared, 0o700)
    assert "may not look into the saliency cache" in in_process(code, shared).stdout
    os.chmod(shared, 0o755)
    os.chmod(shared.parent, 0o700)
    assert "may not look into the saliency cache" in in_process(code, shared).stdout
    os.chmod(shared.parent, 0o755)
