"""Philox against its published vectors, and the independence of everything that keys it."""

import numpy as np
import pytest
from scipy import stats

from scae_dali.plan.random import Stream, derive, philox, uniforms

# Random123, kat_vectors: counter, key -> output of philox4x32-10.
VECTORS = [
    ([0] * 4, [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("function", [philox, philox.py_func], ids=["compiled", "in Python"])
@pytest.mark.parametrize(("counter", "key", "out"), VECTORS)
def test_philox_gives_the_published_words(counter, key, out, function):
    assert list(function(*map(np.uint64, counter + key))) == out


def test_uniforms_are_uniform_and_open():
    u = uniforms(7, Stream.ERASE, 3, np.arange(20_000), 6)
    assert u.shape == (20_000, 6)
    assert 0 < u.min() < u.max() < 1
    for column in u.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    assert np.abs(np.corrcoef(u.T) - np.eye(6)).max() < 0.03


def test_seed_stream_epoch_and_id_each_give_other_numbers():
    def draw(seed=1, stream=Stream.ERASE, epoch=2, ids=(5,)):
        return uniforms(seed, stream, epoch, np.array(ids), 8)

    base = draw()
    np.testing.assert_array_equal(base, draw())
    others = [
        draw(seed=2),
        draw(seed=1 + (1 << 32)),
        draw(stream=Stream.CENTRE),
        draw(epoch=3),
        draw(ids=(6,)),
        draw(ids=(5 + (1 << 32),)),
    ]
    for k, one in enumerate([base, *others]):
        for other in others[k:]:
            assert (one != other).all() or one is other


def test_a_sample_draws_the_same_in_any_batch_and_for_any_n():
    ids = np.array([9, 2, 2**40, 77])
    whole = uniforms(0, Stream.MIX, np.array([1, 1, 4, 1]), ids, 10)
    for k, epoch in enumerate([1, 1, 4, 1]):
        single = uniforms(0, Stream.MIX, epoch, ids[k : k + 1], 3)
        np.testing.assert_array_equal(single[0], whole[k, :3])


def test_uniforms_are_the_words_of_their_counters():
    seed, ids, epochs = 2**63 + 5, [0, 7, 2**40 + 1], [9, 0, 2**32 - 1]
    mine = uniforms(seed, Stream.CROP, np.array(epochs), np.array(ids), 22)
    for row, i, epoch in zip(mine, ids, epochs, strict=True):
        first = int(Stream.CROP) << 16
        words = [
            word
            for block in range(6)
            for word in philox.py_func(
                *map(np.uint64, (i % 2**32, i >> 32, epoch, first + block)),
                *map(np.uint64, (seed % 2**32, seed >> 32)),
            )
        ]
        assert row.tolist() == [(int(word) + 0.5) / 2**32 for word in words[:22]]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*64\), got -1"):
        uniforms(-1, Stream.CROP, 0, np.arange(2), 1)
    with pytest.raises(ValueError, match="n must be at most 262144, got 262145"):
        uniforms(0, Stream.CROP, 0, np.arange(2), 262145)


def test_derived_seeds_differ_by_purpose_and_seed():
    seeds = {derive(seed, purpose) for seed in range(50) for purpose in ("order", "noise", "model")}
    assert len(seeds) == 150
    assert all(0 <= seed < 2**31 for seed in seeds)
