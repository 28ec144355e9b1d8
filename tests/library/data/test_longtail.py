"""The published CIFAR-LT subsets, and what other data sets give."""

import hashlib

import numpy as np
import pytest

from scae_dali.data.longtail import choose, imbalanced, profile

LABELS = np.random.default_rng(7).permutation(
    np.repeat(np.arange(100), 500)
)  # CIFAR-100's are mixed too


@pytest.mark.parametrize(
    ("imbalance", "total", "digest"),
    [(100, 10847, "d3a4c77ebc496731"), (50, 12608, "955c2f2419afaefe"), (10, 19573, None)],
)
def test_the_published_subsets_of_cifar_100(imbalance, total, digest):
    ids = imbalanced(LABELS, 100, imbalance)
    assert (ids.dtype, len(ids), len(set(ids.tolist()))) == (np.int64, total, total)
    counts = profile(500, 100, imbalance)
    assert (LABELS[ids] == np.repeat(np.arange(100), counts)).all()
    within = np.empty(len(LABELS), dtype=np.int16)  # each sample's place in its class
    within[np.argsort(LABELS, kind="stable")] = np.tile(np.arange(500), 100)
    if digest:
        raw = within[ids].astype("<i2").tobytes()
        assert hashlib.sha256(raw).hexdigest().startswith(digest)


def test_the_draw_is_that_of_numpys_global_generator():
    labels = np.array([2, 0, 1, 0, 2, 0, 1, 2, 0, 0])
    ids = choose(labels, [3, 2, 1], seed=5)
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    expected = []
    for k, count in enumerate((3, 2, 1)):
        members = np.where(labels == k)[0]
        np.random.shuffle(members)  # noqa: NPY002
        expected += members[:count].tolist()
    np.random.set_state(state)  # noqa: NPY002
    assert ids.tolist() == expected
    assert choose(labels, [3, 2, 1], seed=6).tolist() != expected


def test_the_global_generator_is_left_alone():
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    choose(LABELS, np.full(100, 3))
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_the_profile():
    counts = profile(500, 100, 100)
    assert (counts.dtype, counts[0], counts[-1], counts.sum()) == (np.int64, 500, 5, 10847)
    assert (np.diff(counts) <= 0).all()
    assert ((counts > 100).sum(), (counts < 20).sum()) == (35, 30)
    assert profile(9, 4, 1).tolist() == [9] * 4
    assert profile(1280, 3, 16).tolist() == [1280, 320, 80]
    assert profile(7, 1, 100).tolist() == [7]


def test_a_class_gives_at_most_what_it_has():
    labels = np.repeat([0, 1, 2], [4, 100, 30])
    counts = np.bincount(labels[imbalanced(labels, 3, 4)])
    assert counts.tolist() == [4, 50, 25]
    assert sorted(imbalanced(labels, 3, 1).tolist()) == list(range(134))
    assert imbalanced(labels, 3, 4, seed=1).tolist() != imbalanced(labels, 3, 4).tolist()


def test_a_class_may_be_asked_for_nothing():
    assert choose([1, 1, 0], [1, 0]).tolist() == [2]
    assert choose([1, 1, 0], [0, 0]).shape == (0,)


@pytest.mark.parametrize("imbalance", [0.5, 0, -1, float("nan")])
def test_an_imbalance_below_one_is_refused(imbalance):
    message = rf"imbalance must be at least 1, .*, got {imbalance}; published subsets have 10"
    with pytest.raises(ValueError, match=message):
        profile(500, 100, imbalance)


def test_a_class_that_would_vanish_is_refused():
    labels = np.repeat(np.arange(10), 20)
    with pytest.raises(
        ValueError,
        match=r"imbalance=100 leaves no sample of class 6, which has 20: .*, so give an imbalance "
        r"below 20",
    ):
        imbalanced(labels, 10, 100)
    with pytest.raises(ValueError, match="imbalance=inf leaves no sample of class 1"):
        imbalanced(labels, 10, float("inf"))
    with pytest.raises(ValueError, match="no sample of class 10, which has 0: leave the class out"):
        imbalanced(labels, 11, 2)


def test_what_cannot_be_chosen_is_refused():
    for labels, counts, seed, message in (
        ([0, 0, 1], [1, 2], 0, "counts asks for 2 samples of class 1, which has 1; np.minimum"),
        ([0, 1], [1, -1], 0, r"counts must be integers >= 0 of shape \[K\], got int64"),
        ([0, 1], [1.0, 1.0], 0, "counts must be .* got float64"),
        ([0, 2], [1, 1], 0, "labels must lie in 0 … 1, got 0 … 2"),
        ([0, -1], [1, 1], 0, "labels must lie in 0 … 1, got -1 … 0"),
        ([0.0, 1.0], [1, 1], 0, r"labels must be integers of shape \[N\], got float64"),
        ([], [1], 0, r"labels must be integers .* of shape \(0,\)"),
        ([0, 1], [1, 1], -1, r"seed must be in \[0, 2\^32\), got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(labels, counts, seed=seed)
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        profile(0, 3, 10)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        profile(5, 0, 10)
