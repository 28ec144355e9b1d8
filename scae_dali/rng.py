"""Counter-based random numbers: functions of (seed, stream, epoch, sample id, position).

There is no state to keep, to seed or to restore: sample i in epoch t draws the same numbers in any
batch, on any rank, and after any resume. The generator is Philox4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011); the key is the seed and the counter is
(id low, id high, epoch, stream and block). It runs on NumPy arrays and on torch tensors of any
device alike. What is drawn from the numbers is decided elsewhere.
"""

import functools
import hashlib
from enum import IntEnum
from typing import Any

import array_api_compat
import numpy as np

Array = Any  # a NumPy array or a torch tensor


def array_namespace(array: Array) -> Any:
    """`array_api_compat`'s; NumPy as it is, whose functions that package wraps at a cost."""
    return np if isinstance(array, np.ndarray) else array_api_compat.array_namespace(array)


def on_host(array: Array) -> np.ndarray:
    """As NumPy."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


class Table:
    """An array of constants, in the array library of whoever looks something up; a copy is kept on
    every device that asked."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array.copy()  # torch shares only arrays that can be written to
        self._copies: dict[Any, Array] = {}

    def __len__(self) -> int:
        return len(self._array)

    def at(self, ids: Array) -> Array:
        """The entries at ids, int64 [B], on their device."""
        if isinstance(ids, np.ndarray):
            return self._array[ids]
        if ids.device not in self._copies:
            xp = array_namespace(ids)
            self._copies[ids.device] = xp.asarray(self._array, device=ids.device)
        return self._copies[ids.device][ids]


_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_AT_ONCE = 1 << 16  # samples; their words stay in the processor's cache
_BLOCK_BITS = 16  # of the last counter word; the rest names the stream


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
    PERMUTATION = 8  # of a batch: the epoch is the iteration, the id the place
    BATCH_MIX = 9  # of a batch: the epoch is the iteration, the id 0
    POLICY = 10
    GRID = 11
    REGION = 12  # KeepAugment's candidates
    STALEST = 13  # of maps that are equally old


def philox(even: Array, odd: Array, seed: int) -> tuple[Array, Array]:
    """One Philox4x32-10 block per counter.

    even, odd: int64 [2, …] each, words 0 and 2, and 1 and 3, of the counters, in [0, 2³²). seed:
    64-bit key. Returns the random words likewise. int64 products wrap modulo 2⁶⁴ in NumPy and in
    torch, which leaves the needed bits right.
    """
    xp = array_namespace(even)
    shape = (2,) + (1,) * (even.ndim - 1)
    keys = xp.reshape(xp.asarray(_keys(seed), device=even.device), (_ROUNDS, *shape))
    multiplier = xp.reshape(xp.asarray(_MULTIPLIER[::-1], device=even.device), shape)
    for key in keys:
        product = _swap(even) * multiplier  # of words 2 and 0
        # Only even words must be free of what lies above their 32 bits.
        odd, even = product, product >> 32 ^ odd
        even ^= key
        even &= _MASK
    return even, odd & _MASK


@functools.cache
def _keys(seed: int) -> np.ndarray:
    """The key of every round: int64 [rounds, 2]."""
    key = np.array([seed & _MASK, seed >> 32])
    return (key + np.arange(_ROUNDS)[:, None] * np.array(_WEYL)) & _MASK


def _swap(pair: Array) -> Array:
    return pair[::-1] if isinstance(pair, np.ndarray) else pair.flip(0)


def uniforms(seed: int, stream: Stream, epoch: Array, ids: Array, n: int) -> Array:
    """Uniform numbers of one stream.

    seed: int in [0, 2⁶⁴). epoch: int or int64 [B], in [0, 2³²). ids: int64 [B], >= 0.
    n: numbers a sample, at most 4 · 2¹⁶. Returns float64 [B, n] in (0, 1), multiples of 2⁻³² plus
    2⁻³³.
    """
    xp = array_namespace(ids)
    blocks = -(-n // 4)
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    if blocks > 1 << _BLOCK_BITS:
        raise ValueError(f"n must be at most {4 << _BLOCK_BITS}, got {n}")
    even, odd = (
        xp.empty((2, ids.shape[0], blocks), dtype=xp.int64, device=ids.device) for _ in range(2)
    )
    even[0, ...] = (ids & _MASK)[:, None]
    odd[0, ...] = (ids >> 32)[:, None]
    even[1, ...] = epoch if isinstance(epoch, int) else epoch[..., None]
    block = xp.arange(blocks, dtype=xp.int64, device=ids.device)
    odd[1, ...] = block + (int(stream) << _BLOCK_BITS)
    even, odd = philox(even, odd, seed)
    u = xp.empty((ids.shape[0], blocks, 4), dtype=xp.float64, device=ids.device)
    for word, values in enumerate((even[0], odd[0], even[1], odd[1])):
        u[:, :, word] = values
    u += 0.5
    u *= 2.0**-32
    return xp.reshape(u, (ids.shape[0], 4 * blocks))[:, :n]


def uniform_each(seed: int, stream: Stream, epoch: int, ids: np.ndarray) -> np.ndarray:
    """`uniforms` of one number a sample, for whole data sets: ids int64 [N] -> float64 [N].

    In blocks, for the words take ten times the numbers' own memory.
    """
    out = np.empty(len(ids))
    for start in range(0, len(ids), _AT_ONCE):
        block = slice(start, start + _AT_ONCE)
        out[block] = uniforms(seed, stream, epoch, ids[block], 1)[:, 0]
    return out


def derive(seed: int, purpose: str) -> int:
    """A seed in [0, 2³¹) for one random operator of DALI or torch: no two share a stream.

    Hash of (seed, purpose) by BLAKE2b.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
