"""MixUp, CutMix and SaliencyMix: plans, against oracles and the laws that the papers give."""

import dataclasses

import numpy as np
import pytest
from boxes import check_cutmixs, oracle_box, pasted
from plans import brute_saliency
from scipy import stats

from scae_dali.data.index import ImageIndex
from scae_dali.methods import Run, Samples, Status, batch, load, make_config
from scae_dali.plan import region
from scae_dali.stage.stage import Stage

NAMES = ("mixup", "cutmix", "saliency_mix")
MAPS = np.random.default_rng(5).integers(0, 256, (10_000, 7, 7), np.uint8)


def samples(batches=1, size=16, *, first=0, epoch=5, crop=(32, 32), seed=0):
    """Full batches, numbered from `first` on; ids, flips and windows are random, and some windows
    reach over the image's border."""
    rng = np.random.default_rng(seed)
    n = batches * size
    ids = rng.integers(0, len(MAPS), n)
    return Samples(
        ids=ids,
        keys=ids | rng.integers(0, 3, n) << 32,
        labels=ids % 10,
        epoch=np.full(n, epoch),
        window=np.concatenate([rng.uniform(-0.2, 0.6, (n, 2)), rng.uniform(0.2, 0.9, (n, 2))], 1),
        size_px=np.tile(np.array(crop), (n, 1)),
        iteration=first + np.arange(n) // size,
        place=np.arange(n) % size,
        flip=rng.random(n) < 0.5,
    )


def stored(ids):
    return MAPS[ids], np.ones(len(ids), bool)


def method(name, saliency=stored, seed=3, **settings):
    module = load(name)
    labels = np.arange(len(MAPS)) % 10
    run = Run(
        seed=seed, epochs=10, labels=labels, class_counts=np.bincount(labels), saliency=saliency
    )
    return module.Method(make_config(module, settings), run)


def check_equal(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, other[key], err_msg=key)


def mixed_of(plan):
    return plan["status"] & Status.MIXED_IN_BATCH > 0


@pytest.mark.parametrize("name", NAMES)
def test_every_batch_has_a_permutation(name):
    for per in ("sample", "batch"):
        plan = method(name, prob=1.0, per=per).plan(samples(40, 50))
        assert (np.sort(plan["source"].reshape(40, 50), axis=1) == np.arange(50)).all()


def test_permutations_are_uniform_and_independent_of_the_one_before():
    source = method("mixup").plan(samples(12_000, 4))["source"].reshape(-1, 4)
    _, counts = np.unique(source, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3
    source = method("mixup").plan(samples(12_000, 3))["source"].reshape(-1, 3)
    pairs = np.concatenate([source[:-1:2], source[1::2]], axis=1)
    _, counts = np.unique(pairs, axis=0, return_counts=True)
    assert len(counts) == 36
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_permutation_hangs_on_seed_and_iteration_alone(name):
    def source(seed=3, **keywords):
        return method(name, seed=seed, prob=1.0).plan(samples(**keywords))["source"].tolist()

    one = source(first=8)
    assert source(first=8, seed=3, epoch=2, crop=(24, 40)) == one
    other = dataclasses.replace(samples(first=8, seed=9), keys=np.arange(16) << 32)
    assert method(name, prob=1.0).plan(other)["source"].tolist() == one
    assert source(first=9) != one
    assert source(seed=4, first=8) != one


@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("name", NAMES)
def test_batches_planned_at_once_are_those_planned_alone(name, per):
    one, several = method(name, prob=0.5, per=per), samples(6, 16, first=11)
    plans = [one.plan(several.take(np.arange(16 * k, 16 * k + 16))) for k in range(6)]
    alone = {key: np.concatenate([plan[key] for plan in plans]) for key in plans[0]}
    check_equal(one.plan(several), alone)
    assert 0 < mixed_of(alone).mean() < 1


@pytest.mark.parametrize("name", NAMES)
def test_each_samples_own_draws_hang_on_seed_epoch_and_key_alone(name):
    """In other batches, at other places, of other iterations; SaliencyMix's box is the second's."""
    one, these = method(name, prob=0.5), samples(6, 16)
    keys = ("mu", "paste_anchors", "paste_shapes", "weight") if name != "saliency_mix" else ()
    order = np.random.default_rng(1).permutation(96)
    moved = dataclasses.replace(
        these.take(order), iteration=50 + np.arange(96) // 24, place=np.arange(96) % 24
    )
    plan, again = one.plan(these), one.plan(moved)
    np.testing.assert_array_equal(mixed_of(again), mixed_of(plan)[order])
    for key in plan.keys() & keys:
        np.testing.assert_array_equal(again[key], plan[key][order])
    later = one.plan(dataclasses.replace(these, epoch=these.epoch + 1))
    assert (mixed_of(later) != mixed_of(plan)).any()


@pytest.mark.parametrize("name", NAMES)
def test_or_one_draw_is_for_the_whole_batch(name):
    """Whether, and the weight or the box: functions of (seed, iteration)."""
    one = method(name, None, prob=0.6, per="batch")
    plan, other = one.plan(samples(3000, 4)), one.plan(samples(3000, 4, epoch=9, seed=2))
    for key in plan.keys() & {"status", "mu", "weight", "paste_anchors", "paste_shapes"}:
        rows = plan[key].reshape(3000, 4, -1)
        assert (rows == rows[:, :1]).all()
        assert len(np.unique(rows[:, 0], axis=0)) > (1 if key == "status" else 100)
        np.testing.assert_array_equal(plan[key], other[key])
    mixed = mixed_of(plan).reshape(3000, 4)[:, 0]
    assert stats.binomtest(int(mixed.sum()), 3000, 0.6).pvalue > 1e-3
    if name == "mixup":
        assert stats.kstest(plan["mu"].reshape(3000, 4)[mixed, 0], "uniform").pvalue > 1e-3


@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_the_rate_is_prob_and_the_others_are_left_alone(name, prob):
    these = samples(500, 20)
    plan = method(name, prob=prob).plan(these)
    mixed = mixed_of(plan)
    assert stats.binomtest(int(mixed.sum()), 10_000, prob).pvalue > 1e-3
    assert (plan["mu"][~mixed] == 1).all()
    assert (plan["status"][~mixed] == 0).all()
    np.testing.assert_array_equal(plan["source"][~mixed], these.place[~mixed])
    assert (plan["source_flip"][~mixed] == 0).all()
    if name == "mixup":
        np.testing.assert_array_equal(plan["weight"], plan["mu"])
    else:
        assert (pasted(plan)[~mixed, 2:] == 0).all()
    flip = these.flip.reshape(500, 20)
    turned = np.take_along_axis(flip, plan["source"].reshape(500, 20), axis=1) != flip
    np.testing.assert_array_equal(plan["source_flip"], turned.ravel())


@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("name", NAMES)
def test_a_stage_that_begins_later_plans_what_the_whole_run_does(index, cache, name, per):
    """Batch b of one that begins with epoch k is the run's k * batches_per_epoch + b."""
    ids = np.random.default_rng(2).integers(0, len(index), 240)
    run = {"epochs": 9, "batch_size": 10, "seed": 1, "cache": cache}

    def plan(start_epoch, first):
        """24 batches."""
        stage = Stage(index, name, start_epoch=start_epoch, prob=0.6, per=per, **run)
        assert stage.batches_per_epoch == 5
        planner = stage.planner()
        rows = planner(ids, first + np.arange(240) // 10, np.full((240, 2), 32))
        return {key: rows[:, where] for key, where in planner.columns.items()}

    whole, other = plan(0, first=15), plan(0, first=0)
    check_equal(plan(3, first=0), whole)
    check_equal(plan(1, first=10), whole)
    for key in ("source", "status", "mu"):
        assert (whole[key] != other[key]).any()


@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixups_weights_follow_beta(alpha, per):
    mu = method("mixup", alpha=alpha, per=per).plan(samples(8000, 1))["mu"]
    assert stats.kstest(mu, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert stats.kstest(mu, stats.beta(alpha * 1.2, alpha * 1.2).cdf).pvalue < 1e-3


@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("crop", [(32, 32), (224, 160), (5, 9), (1, 1)])
def test_cutmix_boxes_are_the_papers(crop, per):
    one, these = method("cutmix", prob=0.8, per=per), samples(200, 5, crop=crop)
    plan = one.plan(these)
    mixed, lam, u = batch.draw(these, one.run, one.config)
    assert len(these.ids) == 1000
    check_cutmixs(plan, mixed, lam, u, crop)


@pytest.mark.parametrize(("side", "mean"), [(32, 0.30), (224, 0.32)])
def test_cutmix_pastes_the_published_share_and_is_uniform_in_place(side, mean):
    n, crop = 20_000, (side, side)
    plan = method("cutmix").plan(samples(n, 1, crop=crop))
    assert (1 - plan["mu"]).mean() == pytest.approx(mean, abs=0.007)
    rng = np.random.default_rng(0)
    other = np.array(
        [oracle_box(rng.beta(1, 1), rng.integers(0, side, 2).tolist(), crop) for _ in range(n)]
    )
    mine = pasted(plan)
    for quantity in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] + b[:, 2],
        lambda b: b[:, 0] * side + b[:, 1] + b[:, 3],
    ):
        assert stats.ks_2samp(quantity(mine), quantity(other)).pvalue > 1e-4


def brute_peaks(saliency, window, size):
    """All pixels of a crop where Â is largest, up to rounding: [(y, x)]."""
    values = brute_saliency(saliency, window, *size)
    return [tuple(pixel) for pixel in np.argwhere(values > values.max() - 1e-12).tolist()]


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (3, 2), (7, 7), (14, 14)])
def test_the_peak_is_that_of_all_pixels(grid):
    """Windows within a cell, over the border, wider than the image; crops coarser than the map."""
    rng = np.random.default_rng(grid[0])
    n = 120
    maps = rng.random((n, *grid)) * (rng.random((n, *grid)) < 0.7)
    window = np.concatenate([rng.uniform(-0.4, 0.9, (n, 2)), rng.uniform(0.02, 1.6, (n, 2))], 1)
    window[::4] = (0.0, 0.0, 1.0, 1.0)
    size_px = rng.integers(1, 34, (n, 2))
    size_px[::8] = grid  # pixels on the cells' centres
    peak, height = region.peak(maps, window, size_px)
    assert ((peak >= 0) & (peak < size_px)).all()
    for k in range(n):
        assert tuple(peak[k].tolist()) in brute_peaks(maps[k], window[k], size_px[k].tolist())
        values = brute_saliency(maps[k], window[k], *size_px[k].tolist())
        assert height[k] == pytest.approx(values.max(), abs=1e-12)


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_saliency_mix_centres_its_box_on_the_second_images_peak(per):
    size, crop = 40, (26, 20)
    one, these = method("saliency_mix", prob=0.7, per=per), samples(8, size, crop=crop)
    plan = one.plan(these)
    mixed, lam, _ = batch.draw(these, one.run, one.config)
    np.testing.assert_array_equal(mixed_of(plan), mixed)
    boxes, kinds = pasted(plan), []
    for k in np.flatnonzero(mixed):
        j = k - k % size + plan["source"][k]
        peaks = brute_peaks(MAPS[these.ids[j]] / 255, these.window[j], crop)
        if these.flip[k] != these.flip[j]:
            peaks = [(y, crop[1] - 1 - x) for y, x in peaks]
        assert boxes[k].tolist() in [oracle_box(lam[k], peak, crop) for peak in peaks]
        kinds.append((these.flip[k], these.flip[j]))
        area = boxes[k, 2] * boxes[k, 3]
        assert plan["mu"][k] == 1 - area / (crop[0] * crop[1])
    assert len(set(kinds)) == 4


def test_without_a_map_saliency_mix_is_cutmix_and_says_so():
    def some(ids):
        maps, found = stored(ids)
        found = found & (ids % 3 != 0)
        maps[ids % 3 == 0] = 0
        maps[ids % 3 == 1] = 77
        return maps, found

    these = samples(20, 16)
    plan = method("saliency_mix", some, prob=0.7).plan(these)
    plain = method("cutmix", prob=0.7).plan(these)
    second = these.ids[np.arange(320) // 16 * 16 + plan["source"]]
    mixed = mixed_of(plan)
    wanted = np.choose(second % 3, [Status.NO_MAP, Status.FLAT_MAP, 0]) | Status.MIXED_IN_BATCH
    np.testing.assert_array_equal(plan["status"], np.where(mixed, wanted, 0))
    np.testing.assert_array_equal(plan["source"], plain["source"])
    same = second % 3 < 2
    np.testing.assert_array_equal(pasted(plan)[same], pasted(plain)[same])
    assert (pasted(plan) != pasted(plain))[~same & mixed].any(axis=1).mean() > 0.8
    check_equal(method("saliency_mix", None, prob=0.7).plan(these), plain)


def test_a_crop_that_shows_nothing_salient_is_pasted_as_by_cutmix():
    """Maps with one salient cell, at the lower right; some crops show it, and some do not."""

    def corner(ids):
        maps = np.zeros((len(ids), 7, 7), np.uint8)
        maps[:, 6, 6] = 255
        return maps, np.ones(len(ids), bool)

    these = samples(20, 16)
    plan = method("saliency_mix", corner, prob=1.0).plan(these)
    plain = method("cutmix", prob=1.0).plan(these)
    second = np.arange(320) // 16 * 16 + plan["source"]
    # A cell has weight up to the centres of its neighbours, which lie 5.5 cells from the start.
    hidden = (these.window[second, :2] + these.window[second, 2:] < 5.5 / 7).any(axis=1)
    assert 0.2 < hidden.mean() < 0.9
    np.testing.assert_array_equal(pasted(plan)[hidden], pasted(plain)[hidden])
    assert (pasted(plan) != pasted(plain))[~hidden].any()
    assert (plan["status"] == Status.MIXED_IN_BATCH).all()


def test_the_official_preset_is_one_box_at_chance_for_the_batch():
    def explode(ids):
        raise AssertionError("read")

    these = samples(50, 8)
    for per in ("sample", "batch"):
        one = method("saliency_mix", explode, preset="official", prob=0.5, per=per)
        check_equal(one.plan(these), method("cutmix", prob=0.5, per="batch").plan(these))


@pytest.mark.parametrize("name", NAMES)
def test_the_partner_is_the_label_of_the_second_sample(name):
    labels = np.random.default_rng(0).permutation(96)  # a class each, and neither is the id
    index = ImageIndex.from_arrays([f"{k}" for k in range(96)], labels)
    stage = Stage(index, name, epochs=9, batch_size=16, seed=1, prob=0.5)
    planner = stage.planner()
    ids, iteration = np.random.default_rng(1).permutation(96), 2 + np.arange(96) // 16
    rows = planner(ids, iteration, np.full((96, 2), 32))
    part = {key: rows[:, where].squeeze() for key, where in planner.columns.items()}
    second = ids.reshape(6, 16)[np.arange(96) // 16, part["source"].astype(int)]
    np.testing.assert_array_equal(part["label"], labels[ids])
    np.testing.assert_array_equal(part["partner"], labels[second])
    mixed = part["status"] == Status.MIXED_IN_BATCH
    assert 20 < mixed.sum() < 80
    assert (part["mu"][~mixed] == 1).all()
    np.testing.assert_array_equal(second[~mixed], ids[~mixed])
