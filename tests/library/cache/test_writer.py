"""Chunks of a pass: committed in a thread, in order, and none forgotten where a commit fails."""

import threading
from itertools import chain

import numpy as np
import pytest

from scae_dali.cache import ChunkWriter
from scae_dali.cache.cache import Reservation


class Store:
    """A cache that keeps what it is told; `before` runs in the commit's thread."""

    def __init__(self, before=lambda: None):
        self.before = before
        self.chunks = []
        self.ended = False

    def reserve(self, epoch):
        return Reservation(epoch)

    def unreserve(self):
        pass

    def begin_pass(self, epoch):
        return np.arange(10)

    def checked(self, ids, maps):
        return np.asarray(ids), np.asarray(maps)

    def write(self, ids, maps, *, epoch):
        self.before()
        assert (maps == ids[:, None, None]).all()
        self.chunks.append(ids.tolist())

    def end_pass(self, epoch):
        self.ended = True


def write(writer, *ids):
    writer.write(ids, np.array(ids, np.uint8)[:, None, None])


def test_maps_are_taken_while_the_chunk_before_is_committed():
    go = threading.Event()
    store = Store(before=lambda: go.wait(60))
    with ChunkWriter(store, 0, commit_every=4) as writer:
        write(writer, 0, 1, 2, 3)  # would not return if it waited for the commit
        write(writer, 4, 5, 6)
        assert store.chunks == []
        go.set()
        write(writer, 7, 8, 9)
    assert store.chunks == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9]]
    assert store.ended
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("commit")]


def test_slow_work_is_committed_before_a_chunk_is_full(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    store = Store()
    with ChunkWriter(store, 0, commit_every=8) as writer:
        for k in range(10):
            write(writer, k)
            now += 12  # seconds: the third map since a commit finds 30 gone
    assert store.chunks == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_one_commit_at_a_time():
    at_once, most = 0, 0

    def before():
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        threading.Event().wait(0.01)
        at_once -= 1

    store = Store(before)
    with ChunkWriter(store, 0, commit_every=1) as writer:
        for i in range(10):
            write(writer, i)
    assert store.chunks == [[i] for i in range(10)]
    assert most == 1


@pytest.mark.parametrize("last", [False, True])
def test_a_commit_that_fails_raises_and_its_maps_are_tried_again(last):
    failures = [OSError("the disk is full")]

    def before():
        if failures:
            raise failures.pop()

    store, seen = Store(before), []

    def body():
        with ChunkWriter(store, 0, commit_every=4) as writer:
            write(writer, 0, 1, 2, 3)  # fails, in the thread
            if not last:
                write(writer, 4, 5, 6, 7)  # is told
            seen.append("the end of the body")

    with pytest.raises(OSError, match="the disk is full"):
        body()
    assert seen == (["the end of the body"] if last else [])
    # At the very end the error ends the context, and the pass stays under way.
    assert sorted(chain(*store.chunks)) == ([] if last else list(range(8)))
    assert not store.ended


def test_maps_are_copied_when_they_are_taken():
    store = Store()
    maps = np.zeros((1, 1, 1), np.uint8)
    with ChunkWriter(store, 0, commit_every=100) as writer:
        for i in range(3):
            maps[:] = i
            writer.write([i], maps)
    assert store.chunks == [[0, 1, 2]]
