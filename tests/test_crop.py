"""The random resized crop, against torchvision's."""

import numpy as np
import torch
from scipy import stats
from torchvision.transforms import v2

from scae_dali import crop
from scae_dali.config import CropConfig
from scae_dali.rng import Stream, uniforms


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
