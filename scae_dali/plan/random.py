"""Counter-based random numbers: functions of (seed, stream, epoch, sample id, position).

There is no state to keep, to seed or to restore: sample i in epoch t draws the same numbers in any
batch, on any rank, and after any resume. The generator is Philox4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011); the key is the seed and the counter is
(id low, id high, epoch, stream and block). Numba compiles it.
"""

import hashlib
from enum import IntEnum

import numpy as np

from scae_dali.checks import check_seed
from scae_dali.plan.compiled import compiled

# Unsigned, because compilers turn no loop with arithmetic shifts into vector instructions.
_MASK, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIER = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10
_BLOCK_BITS = 16  # low bits of the last counter word; the high bits name the stream
_LANES = 128  # samples whose blocks are computed together


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
    epochs = np.ascontiguousarray(np.broadcast_to(epoch, len(ids)))
    _fill(out, np.uint64(seed), int(stream) << _BLOCK_BITS, epochs, ids)
    return out


@compiled(inline="always")
def philox(a, b, c, d, low, high):
    """One Philox4x32-10 block. a, b, c, d: the counter's words. low, high: the key's. Returns four
    random words. All are uint64 in [0, 2³²)."""
    for _ in range(_ROUNDS):
        p, q = a * _MULTIPLIER[0], c * _MULTIPLIER[1]
        a, b = (q >> _HALF) ^ b ^ low, q & _MASK
        c, d = (p >> _HALF) ^ d ^ high, p & _MASK
        low, high = (low + _WEYL[0]) & _MASK, (high + _WEYL[1]) & _MASK
    return a, b, c, d


@compiled
def _fill(out, seed, stream, epoch, ids):
    """Writes `uniforms` into out, float64 [B, n]. seed: uint64. epoch: int64 [B]."""
    n = out.shape[1]
    words = np.empty((4, _LANES), np.uint64)
    for begin in range(0, len(out), _LANES):
        samples = min(_LANES, len(out) - begin)
        for block in range((n + 3) // 4):
            last = np.uint64(stream + block)
            for i in range(samples):  # in vector instructions
                own, t = np.uint64(ids[begin + i]), np.uint64(epoch[begin + i])
                words[0, i], words[1, i], words[2, i], words[3, i] = philox(
                    own & _MASK, own >> _HALF, t, last, seed & _MASK, seed >> _HALF
                )
            for word in range(min(4, n - 4 * block)):
                for i in range(samples):
                    # As int64, which vector instructions turn into floats.
                    uniform = (np.int64(words[word, i]) + 0.5) * 2.0**-32
                    out[begin + i, 4 * block + word] = uniform


def derive(seed: int, purpose: str) -> int:
    """A seed in [0, 2³¹) for one random operator of DALI or torch: no two share a stream.

    Hash of (seed, purpose) by BLAKE2b.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
