"""A cache of made-up samples, whose maps tell their sample and pass; code that other interpreters
run on it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import numpy as np

from scae_dali.cache import ChunkWriter

GRID = (7, 7)


@dataclass(frozen=True)
class FakeIndex:
    """What the cache needs of an index; the keys of paths straddle b"meta" and b"neighbors"."""

    samples: int = 100
    fingerprint: str = "00ff" * 8
    classes: tuple[str, ...] = ("cat", "dog", "eel")

    def __len__(self) -> int:
        return self.samples

    def keys(self, naming: str) -> np.ndarray:
        if naming == "index":
            return np.arange(self.samples, dtype=np.uint64)
        return np.random.default_rng(7).integers(0, 2**64, self.samples, np.uint64)


def maps_of(ids, salt=0, grid=GRID):
    """A map that tells its sample and its pass: u8[B,h,w]."""
    cells = np.arange(grid[0] * grid[1]).reshape(grid)
    return ((np.asarray(ids)[:, None, None] * 3 + salt * 11 + cells) % 256).astype(np.uint8)


def fill(cache, epoch, salt=None, **begin):
    with ChunkWriter(cache, epoch, **begin) as writer:
        for ids in np.array_split(writer.pending, max(len(writer.pending) // 50, 1)):
            writer.write(ids, maps_of(ids, epoch if salt is None else salt))
    return cache


PREAMBLE = """
import os, sys, threading, time
sys.path[:0] = sys.argv[1].split(os.pathsep)
import numpy as np
from caches import FakeIndex, fill, maps_of, GRID
from scae_dali.cache import CacheError, ChunkWriter, SaliencyCache
path = sys.argv[2]
"""


def in_process(code, path, *, check=True):
    """Runs code in another interpreter, warnings being errors there as well."""
    command = [sys.executable, "-W", "error", "-c", PREAMBLE + textwrap.dedent(code)]
    command += [os.pathsep.join(sys.path), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def spoil(cache, key, value):
    """Puts bytes into the file behind the cache's back, in the environment it has open."""
    cache._environment().update(lambda txn: txn.put(key, value) and None, needs=0)
