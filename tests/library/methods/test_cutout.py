"""Cutout: a square around any pixel, clipped at the border."""

import itertools

import numpy as np
import pytest
from plans import check_pure, method, samples
from scipy import stats

from scae_dali.methods import Status, load


@pytest.mark.parametrize(
    ("length", "size", "area"), [(8, (32, 32), 0.055), (16, (32, 20), None), (8, (4, 5), None)]
)
def test_the_square_is_where_the_authors_cut_for_every_pixel_equally_often(length, size, area):
    """Rows [y - length // 2, y + length // 2) and columns alike, around any pixel (y, x)."""
    n = 40_000
    plan = method("cutout", length=length).plan(samples(n, size=size))
    assert (plan["status"] == Status.ERASED).all()
    expected = {}
    for y, x in itertools.product(*map(range, size)):
        top, left = max(0, y - length // 2), max(0, x - length // 2)
        bottom, right = min(size[0], y + length // 2), min(size[1], x + length // 2)
        box = (top, left, bottom - top, right - left)
        expected[box] = expected.get(box, 0) + n / (size[0] * size[1])
    boxes, seen = np.unique(plan["box"].astype(int), axis=0, return_counts=True)
    assert {tuple(box) for box in boxes.tolist()} == set(expected)
    wanted = [expected[tuple(box)] for box in boxes.tolist()]
    assert stats.chisquare(seen, wanted).pvalue > 1e-4
    if area:
        mean = plan["box"][:, 2:].prod(axis=1).mean() / (size[0] * size[1])
        assert mean == pytest.approx(area, abs=0.0005)


def test_it_is_erased_at_its_rate_and_not_otherwise():
    plan = method("cutout", prob=0.3).plan(samples(10_000))
    erased = plan["status"] == Status.ERASED
    assert stats.binomtest(int(erased.sum()), 10_000, 0.3).pvalue > 1e-3
    assert (plan["box"][~erased] == 0).all()
    assert (plan["box"][erased, 2:] > 0).all()


def test_a_plan_does_not_depend_on_the_batch_nor_on_the_library():
    one = method("cutout", fill="color", prob=0.5)
    batch = samples(300, size=(20, 30))
    check_pure(one, batch, np.array_split(np.random.default_rng(0).permutation(300), 7))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"length": 0},
            "length must be a positive even number of pixels.*got 0; .* 8 for CIFAR-100",
        ),
        ({"length": 7}, "length must be a positive even number of pixels.*got 7"),
        ({"prob": 1.5}, r"prob must be a probability in \[0, 1\], got 1.5"),
        ({"fill": "blur"}, "fill must be one of mean, zero, color, noise, above_mean; got 'blur'"),
    ],
)
def test_settings_are_validated(settings, message):
    with pytest.raises(ValueError, match=message):
        load("cutout").Config(**settings)
