"""Processes that were killed while they read a cache neither make it grow nor shut others out.

Such a reader kept pages from being used again until somebody opened the cache anew, so every pass
made the file larger. More than 1,024 of them, or as many look-ups at a time, gave a raw error of
LMDB. The kind is that of https://github.com/frappe/mail/pull/559 (readers that were killed filled
LMDB's table) and https://github.com/PowerDNS/pdns/pull/9888 (they made the file grow).
"""

import lmdb
import pytest
from caches import GRID, FakeIndex, fill, in_process

from scae_dali.cache import CacheError, SaliencyCache, environment

INDEX = FakeIndex(3000)

KILLED = """
    import signal
    cache = SaliencyCache(path)
    def look(txn):
        for _ in range({more}):
            txns.append(handle.begin())
        os.kill(os.getpid(), signal.SIGKILL)
    txns = []
    handle = cache._environment()._handle
    cache._environment().view(look)
"""


@pytest.fixture
def cache(tmp_path):
    with SaliencyCache.create(tmp_path / "maps.lmdb", INDEX, grid=GRID) as cache:
        yield fill(cache, 1)


def readers(cache):
    return cache._environment()._run(lambda handle: handle.readers()).count("\n") - 1


def test_the_file_does_not_grow_with_passes_after_a_reader_was_killed(cache):
    fill(cache, 2)
    fill(cache, 3)
    before = cache.size_bytes
    in_process(KILLED.format(more=0), cache.path, check=False)
    for epoch in range(4, 12):
        fill(cache, epoch)
    # One pass more at most: that the reader was killed is seen when the next one begins.
    assert cache.size_bytes < 2 * before


def test_stale_readers_are_cleared_where_the_table_is_full(cache):
    """1,024 look-ups were under way in processes that were killed."""
    in_process(KILLED.format(more=1023), cache.path, check=False)
    assert cache.read([5])[1].all()
    assert readers(cache) <= 2


def test_look_ups_wait_for_others_to_end_and_then_say_what_to_do(cache, monkeypatch):
    waits = [3]

    def look(txn):
        if waits[0] > 0:
            waits[0] -= 1
            raise lmdb.ReadersFullError("mdb_txn_begin: MDB_READERS_FULL")
        return 7

    env = cache._environment()
    assert env.view(look) == 7
    monkeypatch.setattr(environment, "PATIENCE", 0.05)
    waits[0] = 1 << 30
    with pytest.raises(
        CacheError,
        match=r"maps\.lmdb' is read by more than 1024 threads and processes .*; start fewer",
    ):
        env.view(look)


def test_living_readers_keep_what_they_see(cache):
    env = cache._environment()
    maps = cache.read([5])[0]

    def look(txn):
        cache._environment().drop_stale_readers()
        fill(cache, 2)
        fill(cache, 3)
        return txn.get((5).to_bytes(8, "big"))

    assert env.view(look)[2:] == maps.tobytes()
