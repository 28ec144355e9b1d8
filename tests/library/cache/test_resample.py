"""Maps of other sizes and types on a cache's grid: against torch, against sums by hand."""

import numpy as np
import pytest
import torch

from scae_dali.cache.resample import levels, resized


@pytest.fixture
def maps():
    return np.random.default_rng(0).random((3, 12, 20))


def of_torch(maps, grid, **how):
    return torch.nn.functional.interpolate(torch.from_numpy(maps)[:, None], grid, **how)[:, 0]


def test_whole_cells_are_means(maps):
    wanted = of_torch(maps, (4, 5), mode="area")
    np.testing.assert_allclose(resized(maps, (4, 5)), wanted, atol=1e-12)


def test_a_coarser_map_is_interpolated_as_torch_does_it(maps):
    for grid in ((24, 30), (13, 21), (12, 200)):
        wanted = of_torch(maps, grid, mode="bilinear", align_corners=False)
        np.testing.assert_allclose(resized(maps, grid), wanted, atol=1e-12)
    np.testing.assert_array_equal(resized(np.full((1, 1, 1), 0.3), (2, 3)), np.full((1, 2, 3), 0.3))


def test_pixels_that_a_cell_covers_in_part_count_in_part():
    # Two cells over three pixels: each covers one and a half.
    row = np.array([[[0.0, 0.6, 1.0]]])
    np.testing.assert_allclose(resized(row, (1, 2)), [[[0.3 / 1.5, 1.3 / 1.5]]])
    column = resized(row.transpose(0, 2, 1), (2, 1))
    np.testing.assert_allclose(column[:, :, 0], [[0.3 / 1.5, 1.3 / 1.5]])
    maps = np.random.default_rng(1).random((2, 37, 11))
    np.testing.assert_allclose(resized(maps, (7, 7)).mean((1, 2)), maps.mean((1, 2)))


def test_a_map_of_the_grid_stays_as_it_is():
    maps = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    np.testing.assert_array_equal(levels(maps, (16, 16)), maps)
    np.testing.assert_array_equal(levels(maps / 255, (16, 16)), maps)
    np.testing.assert_array_equal(levels((maps / 255).astype(np.float32), (16, 16)), maps)
    for kind in ("<u2", ">u2"):
        np.testing.assert_array_equal(levels(maps.astype(kind) * 257, (16, 16)), maps)


def test_a_mask_is_the_share_of_a_cell():
    mask = np.zeros((1, 4, 4), np.bool_)
    mask[0, :2, 1:] = True
    np.testing.assert_array_equal(levels(mask, (2, 2)), [[[128, 255], [0, 0]]])


def test_each_map_is_divided_by_its_highest_cell():
    maps = np.array([[[0, 30], [60, 15]], [[0, 0], [0, 0]], [[1e-30, 0], [0, 0]]])
    wanted = [[[0, 128], [255, 64]], [[0, 0], [0, 0]], [[255, 0], [0, 0]]]
    np.testing.assert_array_equal(levels(maps, (2, 2), "max"), wanted)
    np.testing.assert_array_equal(levels(maps[:1].astype(np.uint8), (2, 2), "max"), wanted[:1])
    # On the grid, whatever the peaks were before.
    assert levels(np.eye(4)[None], (1, 1), "max") == 255


@pytest.mark.parametrize(
    ("value", "scale", "told"),
    [
        (1.5, "none", r"must be in \[0, 1\], got 1.5; .* --scale max"),
        (np.nan, "none", "must be finite and not negative, got nan"),
        (np.nan, "max", "must be finite and not negative, got nan"),
        (np.inf, "max", "must be finite and not negative, got inf"),
        (np.inf, "none", "must be finite and not negative, got inf"),
        (-0.25, "max", "must be finite and not negative, got -0.25"),
    ],
)
def test_values_that_mean_nothing_are_refused(value, scale, told):
    maps = np.full((2, 3, 3), 0.5)
    maps[1, 2, 0] = value
    with pytest.raises(ValueError, match=told):
        levels(maps, (3, 3), scale)


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="float, bool, uint8 or uint16, got int64; cast it"):
        levels(np.ones((1, 2, 2), np.int64), (2, 2))
    with pytest.raises(ValueError, match=r"a map must be \[h, w\], got \[0, 2\]"):
        levels(np.ones((1, 0, 2)), (2, 2))
