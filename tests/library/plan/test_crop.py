"""The random resized crop, against torchvision's, and the padded one."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from scae_dali.plan import crop
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.random import Stream, uniforms


def windows(full, n=4000, config=CropConfig(), seed=0):  # noqa: B008
    u = uniforms(seed, Stream.CROP, 0, np.arange(n), crop.draws_per_sample(config))
    return crop.crop_and_flip(u, np.tile(np.array(full), (n, 1)), config)[0]


def test_windows_are_distributed_as_torchvisions():
    height, width = 120, 200
    mine = windows((height, width))
    image = torch.zeros(3, height, width)
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(64, antialias=True)
    drawn = [transform.make_params([image]) for _ in range(len(mine))]
    other = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in drawn])
    for quantity in (
        lambda w: w[:, 0],
        lambda w: w[:, 1],
        lambda w: w[:, 2] * w[:, 3],
        lambda w: w[:, 3] / w[:, 2],
    ):
        assert stats.ks_2samp(quantity(mine), quantity(other)).pvalue > 1e-4


def test_windows_lie_in_the_image():
    for full in ((1, 1), (2, 500), (500, 2), (37, 41)):
        w = windows(full, 500)
        assert (w[:, :2] >= 0).all()
        assert (w[:, 2:] >= 1).all()
        assert (w[:, :2] + w[:, 2:] <= np.array(full)).all()


def test_where_nothing_fits_the_window_is_central_with_an_allowed_aspect():
    config = CropConfig(area=(1.0, 1.0), aspect=(3 / 4, 4 / 3))
    wide, tall = windows((30, 300), 3, config)[0], windows((300, 30), 3, config)[0]
    assert wide.tolist() == [0, 130, 30, 40]
    assert tall.tolist() == [130, 0, 40, 30]


def test_the_whole_image_on_request():
    assert windows((30, 40), 1, CropConfig(area=(1.0, 1.0), aspect=(4 / 3, 4 / 3)))[0].tolist() == [
        0,
        0,
        30,
        40,
    ]


def test_flips_have_their_probability_and_do_not_hang_on_the_window():
    config = CropConfig(flip=0.3)
    u = uniforms(1, Stream.CROP, 0, np.arange(20_000), crop.draws_per_sample(config))
    window, flip = crop.crop_and_flip(u, np.full((20_000, 2), 100), config)
    assert abs(flip.mean() - 0.3) < 0.015
    assert stats.ks_2samp(window[flip, 0], window[~flip, 0]).pvalue > 1e-4


def padded(n, pad, full=(32, 40)):
    config = CropConfig(kind="pad", pad=pad, flip=0.3)
    u = uniforms(2, Stream.CROP, 0, np.arange(n), crop.draws_per_sample(config))
    return crop.crop_and_flip(u, np.tile(np.array(full), (n, 1)), config)


def test_a_padded_crop_has_the_images_size_and_every_shift_equally_often():
    window, flip = padded(40_000, 4)
    assert window.dtype == np.int64
    assert (window[:, 2:] == [32, 40]).all()
    assert (window[:, :2].min(), window[:, :2].max()) == (-4, 4)
    y, x = window[:, :2].T + 4
    seen = np.bincount(18 * y + 2 * x + flip, minlength=162)  # jointly: shifts and flip
    expected = np.tile([0.7, 0.3], 81) * 40_000 / 81
    assert stats.chisquare(seen, expected).pvalue > 1e-3


def test_without_padding_the_whole_image_is_seen():
    assert (padded(100, 0)[0] == [0, 0, 32, 40]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "central"}, "crop.kind must be one of resized, pad; got 'central'"),
        ({"pad": -1}, "crop.pad must be >= 0 pixels, got -1"),
        ({"area": (0.0, 1.0)}, r"crop.area must be 0 < low <= high <= 1, got \(0.0, 1.0\)"),
        ({"aspect": (2.0, 1.0)}, r"crop.aspect must be 0 < low <= high, got \(2.0, 1.0\)"),
        ({"tries": 0}, r"crop.tries must be in \[1, 100\], got 0"),
        ({"flip": 1.1}, r"crop.flip must be a probability in \[0, 1\], got 1.1"),
    ],
)
def test_settings_are_validated(settings, message):
    with pytest.raises(ValueError, match=message):
        CropConfig(**settings)
