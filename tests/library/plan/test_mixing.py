"""Eq. 8's draws: how the weight is distributed, and who is mixed with whom."""

import numpy as np
import pytest
from scipy import stats

from scae_dali.plan.mixing import Partners, draw_in_batch, mix_weight
from scae_dali.plan.random import Stream, uniforms

# Six samples of class 0, four of 1, one of 2, none of 3, three of 4; not sorted by class.
LABELS = np.random.default_rng(1).permutation(np.repeat([0, 1, 2, 4], [6, 4, 1, 3]))


@pytest.mark.parametrize("alpha", [0.2, 0.4, 1.0, 2.0])
def test_the_weight_follows_beta(alpha):
    u = uniforms(3, Stream.MIX, 1, np.arange(50_000), 2)[:, 1]
    mu = mix_weight(u, alpha)
    assert stats.kstest(mu, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert stats.kstest(mu, stats.beta(1.1 * alpha, alpha).cdf).pvalue < 1e-6  # the test can fail


def test_the_weight_is_a_share_for_the_outermost_numbers_too():
    u = np.array([2.0**-33, 0.5, 1 - 2.0**-33])
    for alpha in (1e-3, 0.4, 100.0):
        mu = mix_weight(u, alpha)
        assert ((mu >= 0) & (mu <= 1)).all()
        assert mu[1] == pytest.approx(0.5)


def drawn(i, neighbors):
    """Share of every sample among the partners of sample i, over an even grid of numbers."""
    side = 60  # a multiple of all that is counted here, so that the shares are exact
    grid = (np.arange(side) + 0.5) / side
    u = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    n = len(u)
    table = None if neighbors is None else np.tile(np.array(neighbors, np.uint16), (5, 1))
    partner = Partners(LABELS, 5).draw(u, np.full(n, i), np.full(n, LABELS[i]), table)
    return np.bincount(partner, minlength=len(LABELS)) / n


def wanted(i, classes):
    """The same by hand: each class equally likely, in it every sample but i itself."""
    share = np.zeros(len(LABELS))
    for k in classes:
        others = [j for j in np.flatnonzero(k == LABELS) if j != i] or [i]
        share[others] += 1 / len(classes) / len(others)
    return share


@pytest.mark.parametrize("neighbors", [None, [], [4], [4, 0], [4, 2], [3], [3, 4]])
def test_each_class_is_equally_likely_and_in_it_every_other_sample(neighbors):
    """Class 3 has no samples: the own class stands in for it."""
    for i in np.flatnonzero(LABELS == 1):
        classes = [1, *(1 if k == 3 else k for k in neighbors or [])]
        np.testing.assert_allclose(drawn(i, neighbors), wanted(i, classes))


@pytest.mark.parametrize(
    ("neighbors", "classes"),
    [(None, [2]), ([], [2]), ([3], [2]), ([1], [1]), ([1, 4], [1, 4]), ([3, 4], [2, 4])],
)
def test_a_sample_that_is_alone_in_its_class_takes_a_neighbours(neighbors, classes):
    """And itself only where there is no neighbour with samples."""
    (i,) = np.flatnonzero(LABELS == 2)
    np.testing.assert_allclose(drawn(i, neighbors), wanted(i, classes))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0, 10.0])
def test_from_all_each_sample_has_a_share_by_the_size_of_its_class(power):
    """Over an even grid of numbers; class 3 has no samples, and the last class none either."""
    side = 1200
    grid = (np.arange(side) + 0.5) / side
    u = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    found = np.bincount(Partners(LABELS, 6).draw_from_all(u, power), minlength=len(LABELS))
    sizes = np.array([6, 4, 1, 0, 3])[LABELS]
    wanted = sizes**-power / (sizes**-power).sum()
    # A class gets a whole number of the grid's columns.
    assert np.abs(found / len(u) - wanted).max() <= 1 / side
    if power == 1:  # four classes, of which each has a quarter, exactly
        np.testing.assert_allclose(found / len(u), 1 / 4 / sizes)


def test_from_all_the_outermost_numbers_are_of_the_first_and_last_class():
    u = np.array([2.0**-33, 1 - 2.0**-33])
    for power in (0.0, 1.0, 10.0):
        drawn_ = Partners(LABELS, 6).draw_from_all(np.stack([u, u], axis=1), power)
        assert LABELS[drawn_].tolist() == [0, 4]


def test_a_partner_depends_on_nothing_but_its_row():
    ids = np.arange(len(LABELS))
    u = uniforms(0, Stream.PARTNER, 2, ids, 2)
    table = np.array([[1], [4], [0], [0], [2]], np.uint16)
    partners = Partners(LABELS, 5)
    whole = partners.draw(u, ids, LABELS, table)
    for rows in (np.random.default_rng(0).permutation(ids), *ids[:, None], ids[:0]):
        part = partners.draw(u[rows], ids[rows], LABELS[rows], table)
        np.testing.assert_array_equal(part, whole[rows])


def shares_in_batch(weights, own, side=120):
    """Share of every position among the partners of `own`, over even numbers."""
    u = (np.arange(side) + 0.5) / side
    partner = draw_in_batch(u, np.tile(weights, (side, 1)), np.full(side, own))
    return np.bincount(partner, minlength=len(weights)) / side


@pytest.mark.parametrize(
    ("weights", "own", "wanted"),
    [
        ([1, 1, 1, 1], 2, [1 / 3, 1 / 3, 0, 1 / 3]),
        ([3, 9, 0, 1], 1, [3 / 4, 0, 0, 1 / 4]),
        ([0, 0, 1, 0], 2, [1 / 3, 1 / 3, 0, 1 / 3]),  # none but itself
        ([0, 0, 0], 0, [0, 1 / 2, 1 / 2]),
        ([0.0, 0.1, 0.2], 0, [0, 1 / 3, 2 / 3]),
        ([1], 0, [1]),
        ([0], 0, [1]),
    ],
)
def test_partners_in_a_batch_come_by_their_weights_and_never_itself(weights, own, wanted):
    assert shares_in_batch(weights, own).tolist() == pytest.approx(wanted)


def test_the_outermost_numbers_give_partners_in_a_batch():
    u, weights = np.array([2.0**-33, 1 - 2.0**-33]), np.array([[0, 1, 1, 0]] * 2)
    assert draw_in_batch(u, weights, np.array([3, 3])).tolist() == [1, 2]
