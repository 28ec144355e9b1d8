"""Counter-based random numbers: functions of (seed, stream, epoch, sample id, position).

There is no state to keep, to seed or to restore: sample i in epoch t draws the same numbers in any
batch, on any rank, and after any resume. The generator is Philox4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011); the key is the seed and the counter is
(id low, id high, epoch, stream and block). Numba compiles it.
"""

import functools
import hashlib
from enum import IntEnum

import numpy as np

from scae_dali.checks import check_seed
from scae_dali.plan.compiled import compiled

_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_BLOCK_BITS = 16  # low bits of the last counter word; the high bits name the stream


class Stream(IntEnum):
    """What a random number is for. Every recorded plan hangs on the values: never renumber."""

    CROP = 0
    ERASE = 1  # whether, and how large
    CENTRE = 2
    COLOR = 3
    MIX = 4
    PARTNER = 5
    PARTNER_CROP = 6
    ORDER = 7
    PERMUTATION = 8  # of a batch: epoch is the iteration, id the position in the batch
    BATCH_MIX = 9  # of a batch: epoch is the iteration, id is 0
    POLICY = 10
    GRID = 11
    REGION = 12  # KeepAugment's candidates
    STALEST = 13  # the order of maps that are equally old


@functools.cache
def round_keys(seed: int) -> np.ndarray:
    """The key of every round: int64 [rounds, 2]."""
    key = np.array([seed & _MASK, seed >> 32])
    return (key + np.arange(_ROUNDS)[:, None] * np.array(_WEYL)) & _MASK


def uniforms(
    seed: int, stream: Stream, epoch: int | np.ndarray, ids: np.ndarray, n: int
) -> np.ndarray:
    """Uniform numbers of one stream.

    seed: int in [0, 2⁶⁴). epoch: int or int64 [B], in [0, 2³²). ids: int64 [B], >= 0.
    n: numbers a sample, at most 4 · 2¹⁶. Returns float64 [B, n] in (0, 1), multiples of 2⁻³² plus
    2⁻³³.
    """
    check_seed(seed)
    if n > 4 << _BLOCK_BITS:
        raise ValueError(f"n must be at most {4 << _BLOCK_BITS}, got {n}")
    out = np.empty((len(ids), n))
    _fill(out, round_keys(seed), int(stream) << _BLOCK_BITS, np.atleast_1d(epoch), ids)
    return out


@compiled
def philox(a, b, c, d, keys):
    """One Philox4x32-10 block. a, b, c, d: the counter's words, int64 in [0, 2³²). keys: int64
    [rounds, 2], of `round_keys`. Returns four random words, int64 in [0, 2³²).

    Products of int64 wrap modulo 2⁶⁴, which leaves the needed bits right.
    """
    for k in range(_ROUNDS):
        p, q = a * _MULTIPLIER[0], c * _MULTIPLIER[1]
        a, b = (q >> 32 ^ b ^ keys[k, 0]) & _MASK, q & _MASK
        c, d = (p >> 32 ^ d ^ keys[k, 1]) & _MASK, p & _MASK
    return a, b, c, d


@compiled
def _fill(out, keys, stream, epoch, ids):
    """Writes `uniforms` into out, float64 [B, n]. epoch: int64 [B] or [1]."""
    n = out.shape[1]
    for i in range(out.shape[0]):
        for block in range((n + 3) // 4):
            t = epoch[min(i, len(epoch) - 1)]
            words = philox(ids[i] & _MASK, ids[i] >> 32, t, stream + block, keys)
            for word in range(min(4, n - 4 * block)):
                out[i, 4 * block + word] = (words[word] + 0.5) * 2.0**-32


def derive(seed: int, purpose: str) -> int:
    """A seed in [0, 2³¹) for one random operator of DALI or torch: no two share a stream.

    Hash of (seed, purpose) by BLAKE2b.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
