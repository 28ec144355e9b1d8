"""GridMask against the authors' algorithm, drawn here from its description, and in the pixels."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from plans import check_pure, drawn, masks, method, samples
from scipy import stats

from scae_dali.checks import IMAGENET_MEAN
from scae_dali.data.index import ImageIndex
from scae_dali.methods import Status, grid, load
from scae_dali.stage.stage import PlanNodes, Stage

IMAGENET = {"d_min": 96, "d_max": 224, "ratio": 0.6, "rotate": 360}
CIFAR = {"d_min": 24, "d_max": 32, "ratio": 0.4, "rotate": 0}
SMALL = {"d_min": 7, "d_max": 40, "ratio": 0.55}


def plans(n, size, epoch=5, **settings):
    """The plan of n samples that are all erased, unless told otherwise."""
    one = method("grid_mask", **{"prob": 1.0} | settings)
    return one.plan(samples(n, size=size, epoch=epoch))


def official_mask(size, d, kept, y, x, degrees):
    """What is erased, bool [H, W]: a mask larger than the image has bands of `kept` pixels in each
    d, along both axes; what is in none is erased. It is turned, and its middle is the mask."""
    side = 2 * math.ceil(math.hypot(*size))
    whole = [side + one % 2 for one in size]  # so that the middle is of whole pixels
    outside = []
    for length, one, begin in zip(whole, size, (y, x), strict=True):
        band = np.zeros(length, bool)
        first = begin + (length - one) // 2 - kept
        for start in range(first % d - d, length, d):
            band[max(0, start) : max(0, start + kept)] = True
        outside.append(~band)
    mask = Image.fromarray((outside[0][:, None] & outside[1][None, :]).astype(np.uint8))
    mask = np.asarray(mask.rotate(degrees)).astype(bool)
    top, left = ((length - one) // 2 for length, one in zip(whole, size, strict=True))
    return mask[top : top + size[0], left : left + size[1]]


@pytest.mark.parametrize("size", [(32, 32), (33, 50), (9, 70)])
@pytest.mark.parametrize("settings", [CIFAR, SMALL | {"rotate": 0}, SMALL | {"rotate": 1}])
def test_upright_grids_are_the_authors_to_the_pixel(settings, size):
    plan = plans(60, size, **settings)
    assert (plan["grid"][:, 2] == 0).all()
    for mine, numbers in zip(masks(plan, size), drawn(plan), strict=True):
        np.testing.assert_array_equal(mine, official_mask(size, *numbers))


@pytest.mark.parametrize("size", [(64, 64), (65, 48)])
def test_turned_grids_are_the_authors_but_for_edges(size):
    """Those turned by a multiple of 90° too, whose edges lie between the pixels."""
    plan = plans(400, size, **SMALL, rotate=360)
    mine, numbers = masks(plan, size), drawn(plan)
    assert mine.max() == 1  # the rectangles of a sample do not overlap
    wrong = [(one != official_mask(size, *n)).mean() for one, n in zip(mine, numbers, strict=True)]
    assert max(wrong) < 0.01
    assert np.mean(wrong) < 1e-3
    straight = numbers[:, 4] % 90 == 0
    assert straight.any()


def test_a_wrong_angle_or_offset_would_be_seen():
    size = (64, 64)
    plan = plans(20, size, **SMALL, rotate=360)
    for change in ([0, 0, 2, 0, 0], [0, 0, 0, 2, 0], [0, 0, 0, 0, 4], [0, 1, 0, 0, 0]):
        wrong = [
            (one != official_mask(size, *n)).mean()
            for one, n in zip(masks(plan, size), drawn(plan) + change, strict=True)
        ]
        assert np.mean(wrong) > 0.01


@pytest.mark.parametrize(("settings", "size"), [(IMAGENET, (224, 224)), (CIFAR, (32, 32))])
def test_cell_offset_and_angle_are_uniform_and_independent(settings, size):
    n = 20_000
    d, kept, y, x, degrees = drawn(plans(n, size, **settings)).T
    assert (kept == np.ceil(d * settings["ratio"])).all()
    assert (d.min(), d.max()) == (settings["d_min"], settings["d_max"] - 1)
    assert stats.chisquare(np.unique(d, return_counts=True)[1]).pvalue > 1e-4
    if settings["rotate"]:
        assert (degrees.min(), degrees.max()) == (0, 359)
        assert stats.chisquare(np.unique(degrees, return_counts=True)[1]).pvalue > 1e-4
    else:
        assert not degrees.any()
    within = np.random.default_rng(0).random(
        (2, n)
    )  # of the pixel: whole ones are uniform in steps
    shares = (y + within[0]) / d, (x + within[1]) / d
    for share in shares:
        assert stats.kstest(share, "uniform").pvalue > 1e-4
    for a, b in itertools.combinations([d, *shares, degrees], 2):
        if np.ptp(b):
            assert abs(stats.spearmanr(a, b).statistic) < 4 / np.sqrt(n)


@pytest.mark.parametrize(
    ("settings", "size"),
    [(IMAGENET, (224, 224)), (IMAGENET | {"rotate": 0}, (224, 224)), (CIFAR, (32, 32))],
)
def test_the_erased_share_is_that_of_the_squares(settings, size):
    """(side / d)² for every d, as every offset is equally likely: a little below (1 - ratio)²."""
    n = 1000 if size[0] > 100 else 6000
    plan = plans(n, size, **settings)
    sample, boxes = grid.rectangles(plan["grid"])
    share = np.bincount(sample, boxes[:, 2] * boxes[:, 3], minlength=n) / (size[0] * size[1])
    d, kept = drawn(plan)[:, :2].T
    error = share - ((d - kept) / d) ** 2
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(n)
    assert share.mean() == pytest.approx((1 - settings["ratio"]) ** 2, rel=0.07)
    # Nor is any place of the image favoured.
    some = masks({"grid": plan["grid"][:400]}, size)
    outer = some[:, : size[0] // 4].mean(axis=(1, 2)) - some[:, size[0] // 4 :].mean(axis=(1, 2))
    assert abs(outer.mean()) < 4 * outer.std() / np.sqrt(400)


@pytest.mark.parametrize(
    ("epoch", "ramp", "wanted"), [(0, 0, 0.8), (0, 8, 0.0), (2, 8, 0.2), (8, 8, 0.8), (9, 8, 0.8)]
)
def test_the_probability_grows_to_its_end(epoch, ramp, wanted):
    n = 5000
    plan = plans(n, (32, 32), epoch, prob=0.8, ramp_epochs=ramp, **CIFAR)
    erased = plan["status"] == Status.ERASED
    assert ((plan["grid"][:, 1] > 0) == erased).all()
    assert stats.binomtest(int(erased.sum()), n, wanted).pvalue > 1e-3


def test_epochs_may_meet_in_one_batch():
    one = method("grid_mask", prob=1.0, ramp_epochs=10, **CIFAR)
    batch = dataclasses.replace(samples(900, size=(32, 32)), epoch=np.arange(900) % 3 * 5)
    plan = one.plan(batch)
    rate = [(plan["status"][k::3] > 0).mean() for k in range(3)]
    assert rate == [0.0, pytest.approx(0.5, abs=0.12), 1.0]


def test_the_recipes_are_the_authors():
    config = load("grid_mask").Config()
    assert {name: getattr(config, name) for name in IMAGENET} == IMAGENET
    assert config.prob == 0.8


@pytest.mark.parametrize("rotate", [0, 360])
def test_a_plan_does_not_depend_on_the_batch_nor_on_the_library(rotate):
    one = method("grid_mask", **SMALL, rotate=rotate, prob=0.5, fill="color")
    batch = samples(300, size=(30, 41))
    check_pure(one, batch, np.array_split(np.random.default_rng(0).permutation(300), 7))


def test_what_is_cut_does_not_depend_on_the_batch_either():
    """Whether turned or not: a batch may hold both."""
    size = (40, 30)
    plan = plans(60, size, **SMALL, rotate=360, prob=0.8)["grid"]
    plan[::4, 2] = 0.0
    whole = masks({"grid": plan}, size)
    for i in range(60):
        np.testing.assert_array_equal(masks({"grid": plan[i : i + 1]}, size)[0], whole[i])


SIZE = (40, 30)


def erased(how, images, rows, planner, one):
    """Images as an operator graph leaves them. rows: float64 [B, K], of the planner."""

    @pipeline_def(batch_size=len(images), num_threads=1, device_id=None)
    def define():
        nodes = fn.external_source(source=lambda: list(images), layout="HWC")
        row = fn.external_source(source=lambda: list(rows))
        plan = PlanNodes(row, fn.cast(row, dtype=types.FLOAT), planner)
        return how(nodes, plan, one._run, one._method.config)

    return define().run()[0].as_array()


def stage_and_rows(n, **settings):
    """A stage, its planner, and the plan of n samples of SIZE."""
    index = ImageIndex.from_arrays([str(i) for i in range(n)], np.zeros(n, int), num_classes=1)
    one = Stage(index, "grid_mask", epochs=1, batch_size=n, seed=3, **SMALL | settings)
    planner = one.planner()
    return one, planner, planner(np.arange(n), np.zeros(n, int), np.tile(np.array(SIZE), (n, 1)))


@pytest.mark.parametrize("rotate", [0, 360])
@pytest.mark.parametrize("fill", ["mean", "zero", "color", "noise", "above_mean"])
@pytest.mark.parametrize("how", ["erase", "erase_by_mask"])
def test_exactly_the_grid_is_filled(how, fill, rotate):
    """By the operators of the CPU, and by those of the GPU, which give the same on the CPU."""
    n = 40
    one, planner, rows = stage_and_rows(n, rotate=rotate, fill=fill, prob=0.8)
    images = np.random.default_rng(0).integers(0, 256, (n, *SIZE, 3), np.uint8)
    out = erased(getattr(grid, how), images, rows, planner, one)
    assert out.dtype == np.uint8
    wanted = masks({"grid": rows[:, planner.columns["grid"]]}, SIZE).astype(bool)
    status = rows[:, planner.columns["status"].start]
    assert 0 < (status == 0).sum() < n
    assert not wanted[status == 0].any()
    # In float32, a pixel on the edge of a turned square may lie on its other side.
    on_edges = 3 if rotate and how != "erase" else 0
    assert ((out != images).any(axis=3) & ~wanted).sum() <= on_edges
    for image, mask, row in zip(out, wanted, rows, strict=True):
        inside = image[mask].astype(float)
        if fill == "noise":
            assert len(inside) < 100 or 40 < inside.std() < 80
        else:
            color = row[planner.columns["color"]] if fill == "color" else None
            value = {
                "mean": np.round(IMAGENET_MEAN),
                "zero": np.zeros(3),
                "color": color,
                "above_mean": [152, 144, 129],  # 123.675 + 0.4914 · 58.395, …
            }[fill]
            off = np.abs(inside - value).max(axis=1) > (1 if fill == "color" else 0)
            assert off.sum() <= on_edges


@pytest.mark.parametrize("how", ["erase", "erase_by_mask"])
def test_a_batch_of_which_nothing_is_erased(how):
    one, planner, rows = stage_and_rows(4, prob=0.0)
    images = np.random.default_rng(0).integers(0, 256, (4, *SIZE, 3), np.uint8)
    np.testing.assert_array_equal(erased(getattr(grid, how), images, rows, planner, one), images)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_min": 0}, "d_min and d_max must be 1 <= d_min < d_max, got 0 and 224; .* 96 and 224"),
        ({"d_min": 32, "d_max": 32}, "1 <= d_min < d_max, got 32 and 32"),
        ({"ratio": 1.0}, r"ratio must be in \(0, 1\), got 1.0; the authors' is 0.6"),
        ({"rotate": 400}, r"rotate must be in \[0, 360\] degrees, got 400; 0 leaves the grid"),
        ({"prob": -1}, r"prob must be a probability in \[0, 1\], got -1"),
        ({"ramp_epochs": -1}, "ramp_epochs must be >= 0, got -1; 0 is no ramp"),
        ({"fill": "blur"}, "fill must be one of mean, zero, color, noise, above_mean; got 'blur'"),
    ],
)
def test_settings_are_validated(settings, message):
    with pytest.raises(ValueError, match=message):
        load("grid_mask").Config(**settings)
