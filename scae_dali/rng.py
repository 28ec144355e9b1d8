"""Counter-based random numbers: functions of (seed, stream, epoch, sample id, position).

There is no state to keep, to seed or to restore: sample i in epoch t draws the same numbers in any
batch, on any rank, and after any resume. The generator is Philox4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011); the key is the seed and the counter is
(id low, id high, epoch, stream and block). It runs on NumPy arrays and on torch tensors of any
device alike. What is drawn from the numbers is decided elsewhere.
"""

import hashlib
from enum import IntEnum
from typing import Any

from array_api_compat import array_namespace

Array = Any  # a NumPy array or a torch tensor

_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_BLOCK_BITS = 16  # of the last counter word; the rest names the stream


class Stream(IntEnum):
    """What a random number is for. Every recorded plan hangs on the values: never renumber."""

    CROP = 0
    APPLY = 1
    SIZE = 2
    CENTRE = 3
    COLOR = 4
    MIX = 5
    PARTNER = 6


def philox(c0: Array, c1: Array, c2: Array, c3: Array, seed: int) -> tuple[Array, ...]:
    """One Philox4x32-10 block per counter.

    c0 … c3: int64 arrays of one shape (or broadcastable), values in [0, 2³²). seed: 64-bit key.
    Returns four int64 arrays of random words in [0, 2³²). int64 products wrap modulo 2⁶⁴ in NumPy
    and in torch, which leaves the needed bits right.
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniforms(seed: int, stream: Stream, epoch: Array, ids: Array, n: int) -> Array:
    """Uniform numbers of one stream.

    seed: int in [0, 2⁶⁴). epoch: int64 [B] or scalar array, in [0, 2³²). ids: int64 [B], >= 0.
    n: numbers a sample, at most 4 · 2¹⁶. Returns float64 [B, n] in (0, 1), multiples of 2⁻³² plus
    2⁻³³.
    """
    xp = array_namespace(ids)
    blocks = -(-n // 4)
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    if blocks > 1 << _BLOCK_BITS:
        raise ValueError(f"n must be at most {4 << _BLOCK_BITS}, got {n}")
    ids, epoch = xp.broadcast_arrays(ids[:, None], xp.asarray(epoch)[..., None])
    block = xp.arange(blocks, dtype=xp.int64, device=ids.device)[None, :]
    words = philox(
        ids & _MASK, ids >> 32, epoch, block + (int(stream) << _BLOCK_BITS), seed
    )  # each [B, blocks]
    words = xp.reshape(xp.stack(xp.broadcast_arrays(*words), axis=-1), (ids.shape[0], 4 * blocks))
    return (xp.astype(words[:, :n], xp.float64) + 0.5) * 2.0**-32


def derive(seed: int, purpose: str) -> int:
    """A seed in [0, 2³¹) for one random operator of DALI or torch: no two share a stream.

    Hash of (seed, purpose) by BLAKE2b.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
