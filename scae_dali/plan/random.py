"""Counter-based random numbers: functions of (seed, stream, epoch, sample id, position).

There is no state to keep, to seed or to restore: sample i in epoch t draws the same numbers in any
batch, on any rank, and after any resume. The generator is Philox4x32-10 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011); the key is the seed and the counter is
(id low, id high, epoch, stream and block). It runs on NumPy arrays, compiled by Numba, and on torch
tensors of any device. What is drawn from the numbers is decided elsewhere.
"""

import functools
import hashlib
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import array_api_compat
import numba
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
        product = xp.flip(even, axis=0) * multiplier  # of words 2 and 0
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


def check_seed(seed: int) -> None:
    """Raises ValueError unless it is in [0, 2⁶⁴)."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")


def uniforms(seed: int, stream: Stream, epoch: Array, ids: Array, n: int) -> Array:
    """Uniform numbers of one stream.

    seed: int in [0, 2⁶⁴). epoch: int or int64 [B], in [0, 2³²). ids: int64 [B], >= 0.
    n: numbers a sample, at most 4 · 2¹⁶. Returns float64 [B, n] in (0, 1), multiples of 2⁻³² plus
    2⁻³³.
    """
    blocks = -(-n // 4)
    check_seed(seed)
    if blocks > 1 << _BLOCK_BITS:
        raise ValueError(f"n must be at most {4 << _BLOCK_BITS}, got {n}")
    if isinstance(ids, np.ndarray):
        out = np.empty((len(ids), n))
        _fill(out, _keys(seed), int(stream) << _BLOCK_BITS, np.atleast_1d(epoch), ids)
        return out
    xp = array_namespace(ids)
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


def compiled(function: Callable) -> Callable:
    """By Numba, at the first call; what it makes is kept on the disk where there is a place for it,
    beside the module or in the user's cache. Other threads run Python meanwhile."""
    try:
        return numba.njit(function, nogil=True, cache=True)
    except RuntimeError:  # there is none
        return numba.njit(function, nogil=True)


@compiled
def _fill(out, keys, stream, epoch, ids):
    """`uniforms` into out, float64 [B, n], counter by counter. epoch: int64 [B] or [1]."""
    n = out.shape[1]
    for i in range(out.shape[0]):
        for block in range((n + 3) // 4):
            a, b = ids[i] & _MASK, ids[i] >> 32
            c, d = epoch[min(i, len(epoch) - 1)], stream + block
            for k in range(_ROUNDS):
                p, q = a * _MULTIPLIER[0], c * _MULTIPLIER[1]  # wrap, as in philox
                a, b = (q >> 32 ^ b ^ keys[k, 0]) & _MASK, q & _MASK
                c, d = (p >> 32 ^ d ^ keys[k, 1]) & _MASK, p & _MASK
            words = (a, b, c, d)
            for word in range(min(4, n - 4 * block)):
                out[i, 4 * block + word] = (words[word] + 0.5) * 2.0**-32


def derive(seed: int, purpose: str) -> int:
    """A seed in [0, 2³¹) for one random operator of DALI or torch: no two share a stream.

    Hash of (seed, purpose) by BLAKE2b.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
