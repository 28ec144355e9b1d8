"""Eqs. 5-7 and the epochs of the saliency passes."""

import numpy as np
import pytest

from scae_dali.methods.scae import Config as ScaeConfig
from scae_dali.plan import schedule


def test_eq_5_grows_linearly_from_0_and_stops_at_t():
    lam = schedule.lam(np.arange(12), 10, 2.0)
    np.testing.assert_allclose(lam, [0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.0])
    assert schedule.lam(5, 10, -4.0) == -2.0
    each = schedule.lam(np.array([0, 5, 20]), 10, np.array([2.0, -1.0, -3.0]))
    np.testing.assert_allclose(each, [0, -0.5, -3.0])


def test_eqs_6_and_7_by_hand():
    f = schedule.frequency([400, 100, 4])
    np.testing.assert_allclose(f, [1.0, 0.25, 0.01])
    np.testing.assert_allclose(schedule.erase_prob(f, 0.1, 0.5, 0.5), [0.5, 0.3, 0.14])
    np.testing.assert_allclose(schedule.erase_prob(f, 0.1, 0.5, 0.0), [0.5, 0.5, 0.5])


def test_the_mean_erase_probability_on_cifar_100_lt():
    """0.372, weighted by samples, at an imbalance of 100."""
    counts = np.array([int(500 * 0.01 ** (k / 99)) for k in range(100)])
    p = schedule.erase_prob(schedule.frequency(counts), 0.1, 0.5, 0.5)
    assert (p * counts).sum() / counts.sum() == pytest.approx(0.372, abs=5e-4)


@pytest.mark.parametrize("counts", [[], [0, 0], [3, -1], [[1, 2]]])
def test_bad_class_counts_are_named(counts):
    with pytest.raises(ValueError, match=r"class_counts must be \[K\]"):
        schedule.frequency(counts)


@pytest.mark.parametrize(
    ("refresh_every", "passes"),
    [
        (10, {10: 10, 20: 20}),
        (1, {t: t for t in range(1, 25)}),
        (7, {7: 7, 14: 14, 21: 21}),
        (0, {}),
    ],
)
def test_passes_are_due_at_multiples_but_for_epoch_0(refresh_every, passes):
    due = {}
    for epoch in range(25):
        last = schedule.pass_epoch(epoch, refresh_every)
        if last is not None:
            due.setdefault(last, epoch)
    assert due == passes


@pytest.mark.parametrize(
    ("lam_max", "tail_lambda", "guided"),
    [(2.0, None, True), (0.0, None, False), (0.0, 0.0, False), (0.0, -1.0, True), (2.0, 0.0, True)],
)
def test_maps_are_wanted_where_some_lambda_is_not_0(lam_max, tail_lambda, guided):
    assert ScaeConfig(lam_max=lam_max, tail_lambda=tail_lambda).guided == guided
