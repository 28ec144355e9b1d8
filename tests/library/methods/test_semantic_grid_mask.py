"""SCAE with a grid: where its squares lie, how often, and what it falls back to."""

import dataclasses
import itertools

import numpy as np
import pytest
from crops import train_batches
from plans import (
    brute_saliency,
    check_pure,
    corner_maps,
    drawn,
    masks,
    method,
    saliency_map,
    samples,
)
from scipy import stats

from pipelines.config import ImageConfig
from scae_dali.data.pixels import ArrayImages
from scae_dali.methods import Status, load
from scae_dali.plan import schedule
from scae_dali.plan.crop import CropConfig

ALWAYS = {"p_min": 1.0, "p_max": 1.0}
WINDOW = (0.21, 0.1, 0.6, 0.8)
EPOCH = 10  # of as many: λ = λ_max


def cell(d, **more):
    """Settings of a grid of one size."""
    return {"d_min": d, "d_max": d + 1, "rotate": 0} | more


def one_map(ids):
    """The same map for every sample, in bytes."""
    maps = np.round(255 * saliency_map(1)).astype(np.uint8)
    return np.tile(maps, (len(ids), 1, 1)), np.ones(len(ids), bool)


def offsets(n, size, epoch=EPOCH, window=WINDOW, saliency=one_map, **settings):
    """Where the squares begin: int64 [n, 2]."""
    one = method("semantic_grid_mask", saliency, **ALWAYS, **settings)
    plan = one.plan(samples(n, size=size, epoch=epoch, window=window))
    assert set(plan["status"]) == {Status.ERASED}
    return drawn(plan)[:, 2:4]


def folded(lam, d, side, size):
    """P(offset) of an upright grid, float64 [d, d], by the sum over every place of a period and
    every pixel in it: eq. 4 there, on the offset that puts a square's centre at the pixel."""
    saliency = np.round(255 * saliency_map(1)) / 255
    weight = np.exp(lam * brute_saliency(saliency, WINDOW, *size))
    out = np.zeros((d, d))
    period = [min(d, one) for one in size]
    places = list(itertools.product(*(range(s - p + 1) for s, p in zip(size, period, strict=True))))
    for top, left in places:
        part = weight[top : top + period[0], left : left + period[1]]
        y, x = (
            (begin + np.arange(length) - side // 2) % d
            for begin, length in zip((top, left), period, strict=True)
        )
        np.add.at(out, (y[:, None], x[None, :]), part / part.sum() / len(places))
    return out


def chi_square(seen, p):
    counts = np.zeros_like(p)
    np.add.at(counts, tuple(seen.T), 1)
    assert counts[p == 0].sum() == 0
    return stats.chisquare(counts[p > 0], p[p > 0] * len(seen)).pvalue


@pytest.mark.parametrize("lam", [-3.0, 2.0])
@pytest.mark.parametrize(
    ("d", "size"), [(12, (12, 12)), (12, (32, 20)), (15, (16, 30)), (16, (12, 32))]
)
def test_offsets_follow_eq_4_folded_by_the_lattice(d, size, lam):
    """Over the whole crop if it is one cell; a cell may be larger than the crop, too."""
    for ratio in (0.4, 0.6):  # squares of even and of odd sides
        side = d - int(np.ceil(d * ratio))
        seen = offsets(10_000, size, lam_max=lam, **cell(d, ratio=ratio))
        assert chi_square(seen, folded(lam, d, side, size)) > 1e-4


def test_the_chi_square_test_can_fail():
    seen = offsets(16_000, (32, 20), lam_max=3.0, **cell(12))
    assert chi_square(seen, folded(3.0, 12, 4, (32, 20))) > 1e-4
    assert chi_square(seen, folded(2.0, 12, 4, (32, 20))) < 1e-4
    assert chi_square(seen, folded(3.0, 12, 6, (32, 20))) < 1e-4  # a pixel off


@pytest.mark.parametrize("rotate", [0, 360])
def test_without_guidance_it_is_grid_mask_grid_for_grid(rotate):
    grid = {"d_min": 8, "d_max": 30, "ratio": 0.5, "rotate": rotate, "fill": "color"}
    batch = samples(500, epoch=0)
    one = method("semantic_grid_mask", one_map, **grid).plan(batch)
    other = method("grid_mask", prob=0.5, **grid).plan(batch)
    assert one.keys() == other.keys()
    for name, value in other.items():
        np.testing.assert_array_equal(one[name], value)


def test_as_lambda_goes_to_0_the_law_becomes_that_of_grid_mask():
    """Upright, and the crop no multiple of a cell: every offset is equally likely."""
    n, d, size = 16_000, 12, (32, 20)
    seen = offsets(n, size, lam_max=1e-9, **cell(d))
    assert chi_square(seen, np.full((d, d), 1 / d**2)) > 1e-4
    other = method("grid_mask", prob=1.0, **cell(d)).plan(samples(n, size=size))
    assert (seen != drawn(other)[:, 2:4]).any()
    for axis in (0, 1):
        assert stats.ks_2samp(seen[:, axis], drawn(other)[:, 2 + axis]).pvalue > 1e-4


@pytest.mark.parametrize("rotate", [0, 360])
def test_a_square_lies_over_what_is_salient(rotate):
    """One pixel of the crop has all saliency, as far as λ tells: the squares are centred there."""

    def peak(ids):
        maps = np.zeros((len(ids), 16, 16), np.uint8)
        maps[:, 5, 9] = 255
        return maps, np.ones(len(ids), bool)

    n, size = 30, (16, 16)  # a cell of the map is a pixel
    settings = {"d_min": 16, "d_max": 24, "ratio": 0.7, "rotate": rotate, **ALWAYS}
    one = method("semantic_grid_mask", peak, lam_max=60.0, **settings)
    batch = samples(n, size=size, epoch=EPOCH)
    plan = one.plan(batch)
    mask = masks(plan, size)
    assert (mask[:, 5, 9] == 1).all()
    # Nothing but the centre: what is erased is balanced around it.
    side = np.round(plan["grid"][:, 0] * plan["grid"][:, 1])
    for i in np.flatnonzero(side % 2 == 1):
        part = mask[i, 3:8, 7:12]
        np.testing.assert_array_equal(part, part[::-1, ::-1])


@pytest.mark.parametrize("rotate", [0, 360])
def test_guidance_grows_with_the_epoch_and_turns_with_the_sign(rotate):
    def at_corner(lam_max, epoch):
        settings = {"d_min": 56, "d_max": 64, "rotate": rotate, "lam_max": lam_max, **ALWAYS}
        one = method("semantic_grid_mask", corner_maps, **settings)
        return masks(one.plan(samples(1000, epoch=epoch)), (64, 64))[:, :16, :16].mean()

    shares = [at_corner(8.0, epoch) for epoch in (0, 4, 10)]
    assert shares[0] + 0.02 < shares[1]
    assert shares[1] + 0.02 < shares[2]
    assert at_corner(-8.0, 10) < shares[0] - 0.02


def test_each_class_is_erased_at_its_own_rate_or_mixed():
    counts = (1000, 100, 10)
    n = 30_000
    labels = np.arange(n) % 3
    plan = method("semantic_grid_mask", corner_maps, counts).plan(samples(n, labels))
    wanted = schedule.erase_prob(schedule.frequency(counts), 0.1, 0.5, 0.5)
    mixed = plan["status"] == Status.MIXED
    erased = plan["status"] == Status.ERASED
    assert (erased == (plan["grid"][:, 1] > 0)).all()
    for k in range(3):
        of = labels == k
        rates = ((mixed, 0.5 * (k == 2)), (erased, wanted[k] * (0.5 if k == 2 else 1.0)))
        for seen, rate in rates:
            assert stats.binomtest(int(seen[of].sum()), int(of.sum()), rate).pvalue > 1e-3
    scae = method("scae", corner_maps, counts).plan(samples(n, labels))
    for name in ("status", "mu", "partner_id"):
        np.testing.assert_array_equal(plan[name], scae[name])


def test_missing_and_flat_maps_are_grid_mask_and_reported():
    def maps(ids):
        values, found = corner_maps(ids)
        found[ids % 3 == 0] = False
        values[ids % 3 == 1] = 128
        return values, found

    n, kind, grid = 600, np.arange(600) % 3, cell(14)
    plan = method("semantic_grid_mask", maps, **ALWAYS, **grid).plan(samples(n))
    other = method("grid_mask", prob=1.0, **grid).plan(samples(n))
    assert set(plan["status"][kind == 0]) == {Status.ERASED | Status.NO_MAP}
    assert set(plan["status"][kind == 1]) == {Status.ERASED | Status.FLAT_MAP}
    assert set(plan["status"][kind == 2]) == {Status.ERASED}
    np.testing.assert_array_equal(plan["grid"][kind < 2], other["grid"][kind < 2])
    assert (plan["grid"][kind == 2] != other["grid"][kind == 2]).any()


@pytest.mark.parametrize("rotate", [0, 360])
def test_a_plan_does_not_depend_on_the_batch(rotate):
    def maps(ids):
        values = np.random.default_rng(0).integers(0, 256, (400, 7, 7), np.uint8)
        return values[ids], ids % 5 > 0

    counts = (300, 20)
    settings = {"d_min": 6, "d_max": 30, "rotate": rotate, "fill": "color", "lam_max": 5.0}
    one = method("semantic_grid_mask", maps, counts, **settings)
    batch = samples(400, np.arange(400) % 2, size=(30, 41), window=WINDOW)
    batch = dataclasses.replace(batch, epoch=np.arange(400) % 4 * 3)
    parts = np.array_split(np.random.default_rng(0).permutation(400), 9)
    whole = check_pure(one, batch, parts)
    assert {int(Status.MIXED), int(Status.ERASED), 0} <= set(whole["status"])


def test_pipelines_mix_and_erase_alike_from_files_and_from_memory(tailed, tailed_cache):
    """In a pipeline with conditionals, as some samples are mixed."""
    pixels = ArrayImages.from_index(tailed, threads=1).pixels
    settings = {"d_min": 8, "d_max": 16, "mix_prob": 1.0, "p_min": 1.0, "p_max": 1.0}
    image = ImageConfig(size=24, val_resize=24, crop=CropConfig(kind="pad", pad=3))
    files, memory = (
        train_batches(
            kind,
            tailed,
            pixels,
            image,
            name="semantic_grid_mask",
            cache=tailed_cache,
            **settings,
        )
        for kind in ("files", "memory")
    )
    status = {rest[3] for epoch in files for _, rest in epoch.values()}
    assert status == {Status.MIXED, Status.ERASED}
    for one, two in zip(files, memory, strict=True):
        for i in one:
            assert one[i][1] == two[i][1]
            np.testing.assert_allclose(one[i][0], two[i][0], atol=0.02)


def test_its_settings_are_those_of_scae_and_of_the_grid():
    names = [
        {f.name for f in dataclasses.fields(load(name).Config)}
        for name in ("semantic_grid_mask", "scae", "grid_mask", "random_erasing")
    ]
    rectangle = names[3] - {"prob", "preset", "fill"} | {"border"}
    assert names[0] == (names[1] - rectangle) | (names[2] - {"prob", "ramp_epochs"})
    for message, setting in (("p_max must be a prob", {"p_max": 2}), ("d_min", {"d_min": 300})):
        with pytest.raises(ValueError, match=message):
            load("semantic_grid_mask").Config(**setting)
