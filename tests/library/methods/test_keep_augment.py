"""KeepAugment: what counts as important, what is erased and put back, by oracles in NumPy."""

import dataclasses

import numpy as np
import pytest
from conftest import fill_cache
from crops import (
    H,
    N,
    W,
    smooth,
    stage_of,
    transformed,
)
from plans import brute_saliency, method, samples
from scipy import stats

from scae_dali.methods import Run, Status, compose
from scae_dali.methods.keep_augment import Config as KeepAugmentConfig
from scae_dali.methods.keep_augment import importance
from scae_dali.plan.random import Stream

TAU = 0.6


@pytest.fixture(scope="module")
def pixels():
    return smooth()


def random_maps(ids):
    """Another one for each id, no two values alike but by chance."""
    rng = np.random.default_rng(1)
    maps = rng.integers(0, 256, (30_000, 7, 7), np.uint8)
    return maps[ids], np.ones(len(ids), bool)


def candidates(one, batch, hw):
    """int64 [B, 16, 2], the top left pixels, as the method says that they are drawn."""
    u = batch.draw(one.run, Stream.REGION, 32).reshape(-1, 16, 2)
    room = batch.size_px - hw + 1
    return np.floor(u * room[:, None]).astype(int)


def important(one, batch, box, maps=random_maps):
    """Importance of the candidates and of the planned box: float64 [B, 16], [B]."""
    hw = box[:, 2:].astype(int)
    begin = candidates(one, batch, hw)
    saliency, (window, size_px) = maps(batch.ids)[0] / 255, (batch.window, batch.size_px)
    value = importance(saliency, begin, hw, window, size_px)
    mine = importance(saliency, box[:, None, :2].astype(int), hw, window, size_px)
    return value, mine[:, 0]


@pytest.mark.parametrize(
    "window",
    [(0.0, 0.0, 1.0, 1.0), (0.3, 0.1, 0.5, 0.25), (-0.2, -0.1, 1.0, 1.0), (0.4, 0.5, 0.9, 0.7)],
)
@pytest.mark.parametrize("grid", [(7, 5), (1, 3)])
def test_importance_is_the_mean_of_the_bilinear_map(window, grid):
    """Also where a crop reaches out of the image, which is of no importance there."""
    rng, size, fine = np.random.default_rng(0), np.array([40, 60]), 24
    saliency = rng.random((1, *grid))
    brute = brute_saliency(saliency[0], window, *(size * fine))
    inside = min(window) >= 0 and max(np.array(window[:2]) + window[2:]) <= 1
    for h, w in [(8, 8), (1, 1), (3, 29), (16, 24), (39, 59)]:
        begin = np.floor(rng.random((1, 9, 2)) * (size - (h, w) + 1)).astype(int)
        value = importance(saliency, begin, np.array([[h, w]]), np.array([window]), size[None])
        assert value.shape == (1, 9)
        assert (value * 2**20 == np.round(value * 2**20)).all()
        for (y, x), mine in zip(begin[0] * fine, value[0], strict=True):
            mean = brute[y : y + h * fine, x : x + w * fine].mean()
            assert mine == pytest.approx(mean, abs=2e-4 if inside else 5e-3)


@pytest.mark.parametrize("mode", ["cut", "paste"])
def test_the_rectangle_is_the_first_candidate_beyond_the_quantile(mode):
    one, batch = method("keep_augment", random_maps, mode=mode), samples(600, size=(48, 80))
    plan = one.plan(batch)
    box = plan["box"] if mode == "cut" else np.hstack([plan["kept_anchors"], plan["kept_shapes"]])
    if mode == "paste":
        np.testing.assert_array_equal(box[:, [0, 1, 4, 5]], np.tile([0, 0, 48, 80], (600, 1)))
        box = box[:, [2, 3, 6, 7]]
    value, _ = important(one, batch, box)
    begin = candidates(one, batch, box[:, 2:].astype(int))
    threshold = np.quantile(value, TAU, axis=1, keepdims=True)
    wanted = value <= threshold if mode == "cut" else value > threshold
    np.testing.assert_array_equal(box[:, :2], begin[np.arange(600), wanted.argmax(1)])
    assert (box[:, :2] + box[:, 2:] <= (48, 80)).all()


@pytest.mark.parametrize(
    ("mode", "tau", "ranks"),
    [
        ("cut", 0.6, range(10)),
        ("paste", 0.6, range(10, 16)),
        ("cut", 0.5, range(8)),
        ("paste", 0.5, range(8, 16)),
        ("cut", 0.0, range(1)),
        ("cut", 1.0, range(16)),
    ],
)
def test_all_candidates_below_or_above_the_quantile_are_as_likely(mode, tau, ranks):
    one = method("keep_augment", random_maps, mode=mode, tau=tau, area=(0.02, 0.1))
    batch = samples(6000, size=(200, 200))
    plan = one.plan(batch)
    box = plan.get("box")
    if mode == "paste":
        box = np.hstack([plan["kept_anchors"][:, 2:], plan["kept_shapes"][:, 2:]])
    value, mine = important(one, batch, box)
    rank = (value < mine[:, None]).sum(1)
    seen = np.bincount(rank, minlength=16)
    assert set(rank) == set(ranks)
    if len(ranks) > 1:
        assert stats.chisquare(seen[list(ranks)]).pvalue > 1e-3


def test_cut_erases_at_its_rate_with_the_sizes_of_random_erasing():
    one = method("keep_augment", random_maps, prob=0.3)
    plan = one.plan(samples(20_000))
    erased = plan["status"] == Status.ERASED
    assert set(plan["status"]) == {0, Status.ERASED}
    assert stats.binomtest(int(erased.sum()), 20_000, 0.3).pvalue > 1e-3
    assert ((plan["box"][:, 2:] > 0).all(1) == erased).all()
    same = {"area": one.config.area, "aspect": one.config.aspect, "tries": one.config.tries}
    other = method("random_erasing", prob=0.3, **same).plan(samples(20_000))
    np.testing.assert_array_equal(plan["box"][:, 2:], other["box"][:, 2:])


def test_paste_puts_back_at_its_rate_and_transforms_always():
    plan = method("keep_augment", random_maps, mode="paste", prob=0.3).plan(samples(20_000))
    kept = (plan["kept_shapes"][:, 2:] > 0).all(1)
    assert stats.binomtest(int(kept.sum()), 20_000, 0.3).pvalue > 1e-3
    assert (plan["kept_shapes"][~kept, 2:] == 0).all()
    assert set(plan["status"]) == {0}
    assert "box" not in plan
    rand = method("rand_augment").plan(samples(20_000))
    assert rand.keys() <= plan.keys()
    for field in rand:
        np.testing.assert_array_equal(plan[field], rand[field])


def some_maps(ids):
    """Every third is missing, every third is flat, the others are salient at the top left."""
    maps = np.zeros((len(ids), 7, 7), np.uint8)
    maps[ids % 3 == 1] = 128
    maps[ids % 3 == 2, :2, :2] = 255
    return maps, ids % 3 > 0


def test_without_a_map_nothing_is_important_and_that_is_reported():
    n = 9000
    kind = np.arange(n) % 3
    small = {"area": (0.02, 0.04), "aspect": (1.0, 1.0)}
    plan = method("keep_augment", some_maps, **small).plan(samples(n))
    for k, status in enumerate((Status.NO_MAP, Status.FLAT_MAP, Status(0))):
        assert set(plan["status"][kind == k]) == {Status.ERASED | status}
        box = plan["box"][kind == k]
        place = box[:, :2] / (64 - box[:, 2:] + 1) + 0.5 / (64 - box[:, 2:] + 1)
        uniform = [stats.kstest(axis, "uniform").pvalue for axis in place.T]
        assert all(p < 1e-6 for p in uniform) if k == 2 else all(p > 1e-3 for p in uniform)
    blind = method("keep_augment", None, **small).plan(samples(n))
    assert set(blind["status"]) == {Status.ERASED}
    np.testing.assert_array_equal(plan["box"][kind < 2], blind["box"][kind < 2])

    beyond = samples(n, window=(-0.5, -0.5, 1.0, 1.0))  # saliency is 0 there, a flat map's too
    boxes = [
        method("keep_augment", maps, **small).plan(beyond)["box"] for maps in (some_maps, None)
    ]
    np.testing.assert_array_equal(*(box[kind < 2] for box in boxes))

    paste = {"mode": "paste", **small}
    plan = method("keep_augment", some_maps, **paste).plan(samples(n))
    kept = plan["kept_shapes"][:, 2] > 0
    for k, status in enumerate((Status.NO_MAP, Status.FLAT_MAP, Status(0))):
        assert set(plan["status"][kind == k]) == {status}
        assert kept[kind == k].mean() == pytest.approx(float(k == 2), abs=0.05)
    assert not method("keep_augment", None, **paste).plan(samples(n))["kept_shapes"][:, 2].any()


def test_what_is_salient_is_left_alone_and_put_back_as_the_crop_shows_it():
    """At the top left of the frame; a crop of the bottom right has none of it."""

    def corner(ids):
        maps, found = some_maps(np.full(len(ids), 2))
        return maps, found

    n, small = 3000, {"area": (0.02, 0.04), "aspect": (1.0, 1.0)}
    cut = method("keep_augment", corner, **small)
    paste = method("keep_augment", corner, mode="paste", **small)

    def in_corner(box):
        return (box[:, :2] + box[:, 2:] / 2 < 64 * 2 / 7).all(1).mean()

    def kept(plan):
        return np.hstack([plan["kept_anchors"][:, 2:], plan["kept_shapes"][:, 2:]])

    anywhere = in_corner(method("keep_augment", None, **small).plan(samples(n))["box"])
    assert in_corner(cut.plan(samples(n))["box"]) < 0.2 * anywhere
    assert in_corner(kept(paste.plan(samples(n)))) > 2 * anywhere
    away = samples(n, window=(0.5, 0.5, 0.5, 0.5))
    assert in_corner(cut.plan(away)["box"]) == pytest.approx(anywhere, abs=0.02)
    assert (kept(paste.plan(away))[:, 2:] == 0).all()  # nothing is above the quantile


@pytest.mark.parametrize("mode", ["cut", "paste"])
def test_a_plan_hangs_on_the_sample_alone(mode):
    settings = {"mode": mode, "prob": 0.8, "fill": "color"}
    one, rng = method("keep_augment", some_maps, **settings), np.random.default_rng(0)
    ids = rng.integers(0, 999, 600)
    window = np.hstack([rng.random((600, 2)) * 0.6, 0.2 + rng.random((600, 2)) * 0.6])
    batch = dataclasses.replace(
        samples(600),
        ids=ids,
        keys=ids | rng.integers(0, 3, 600) << 32,
        epoch=rng.integers(0, 3, 600),
        window=window,
        size_px=rng.integers(20, 60, (600, 2)),
    )
    plan = one.plan(batch)
    rows = rng.permutation(600)
    for part in [*np.array_split(rows, 7), *rows[:40, None]]:
        for key, value in one.plan(batch.take(part)).items():
            np.testing.assert_array_equal(value, plan[key][part])


@pytest.mark.parametrize("mode", ["cut", "paste"])
def test_a_crop_too_small_for_any_rectangle_is_left_alone(mode):
    plan = method("keep_augment", random_maps, mode=mode).plan(samples(50, size=(1, 1)))
    assert set(plan["status"]) == {Status.NO_FIT}
    assert not (plan["box"] if mode == "cut" else plan["kept_shapes"][:, 2:]).any()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Maps of the samples that test_policies has."""
    return fill_cache(tmp_path_factory.mktemp("cache") / "maps.lmdb", stage_of("none", N).index)


@pytest.mark.parametrize("batch_size", [N, 7])
def test_cut_fills_exactly_the_box(pixels, cache, batch_size):
    """In a pipeline without conditionals."""
    settings = {"cache": cache, "fill": "zero", "conditionals": False}
    out, plan = transformed("keep_augment", pixels, batch_size, prob=0.7, **settings)
    expected = pixels.copy()
    for image, (y, x, h, w) in zip(expected, plan["box"].astype(int), strict=True):
        image[y : y + h, x : x + w] = 0
    np.testing.assert_array_equal(out, expected)
    assert 0.5 < (plan["status"] == Status.ERASED).mean() < 0.9


@pytest.mark.parametrize("batch_size", [N, 7])
@pytest.mark.parametrize("size", [None, (H, W)])
def test_paste_is_rand_augment_with_the_box_of_the_original(pixels, cache, batch_size, size):
    settings = {"n": 3, "m": 25, "fill_value": 0}
    moved, _ = transformed("rand_augment", pixels, **settings)
    settings |= {"mode": "paste", "prob": 0.7, "cache": cache, "size": size}
    out, plan = transformed("keep_augment", pixels, batch_size, **settings)
    expected, kept = moved.copy(), 0
    for k, begin in enumerate(plan["kept_anchors"][:, 2:].astype(int)):
        (y, x), (h, w) = begin, plan["kept_shapes"][k, 2:].astype(int)
        expected[k, y : y + h, x : x + w] = pixels[k, y : y + h, x : x + w]
        kept += h > 0
    np.testing.assert_array_equal(out, expected)
    assert 0.5 < kept / N < 0.9
    assert (expected != moved).any((1, 2, 3)).mean() > 0.5


def test_paste_needs_conditionals(pixels):
    with pytest.raises(ValueError, match="enable_conditionals must be True where a policy is"):
        transformed("keep_augment", pixels, mode="paste", conditionals=False)


def test_cut_combines_with_a_policy_and_paste_does_not():
    run = Run(seed=3, epochs=1, labels=np.zeros(9, int), class_counts=np.array([9]))
    both = compose.make(compose.configs("keep_augment+rand_augment", {}), run)
    assert both.kinds == ("policy", "erase")
    assert both.fields.keys() == {"op0", "sign0", "op1", "sign1"}
    paste = {"keep_augment": {"mode": "paste"}}
    with pytest.raises(ValueError, match="keep_augment and rand_augment do not combine"):
        compose.make(compose.configs("keep_augment+rand_augment", paste), run)
    with pytest.raises(ValueError, match="keep_augment and random_erasing do not combine"):
        compose.make(compose.configs("keep_augment+random_erasing", paste), run)
    mixed = compose.make(compose.configs("cutmix+keep_augment", paste), run)
    assert mixed.kinds == ("policy", "erase", "mix")
    assert mixed.conditional


def test_defaults():
    config = KeepAugmentConfig()
    assert (config.mode, config.prob, config.tau, config.candidates) == ("cut", 1.0, TAU, 16)
    assert (config.n, config.m, config.bins, config.refresh_every) == (2, 9, 31, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "keep"}, "mode must be one of cut, paste; got 'keep'"),
        ({"prob": 2.0}, r"prob must be a probability in \[0, 1\], got 2.0"),
        ({"tau": -0.1}, r"tau must be a quantile in \[0, 1\], got -0.1; usual is 0.6"),
        ({"candidates": 1}, r"candidates must be in \[2, 256\], got 1; the default is 16"),
        ({"refresh_every": -1}, "refresh_every must be >= 0, got -1"),
        ({"area": (0.5, 0.2)}, r"area must be 0 < low <= high < 1, got \(0.5, 0.2\)"),
        ({"m": 31}, r"m must be in \[0, 31\), a magnitude of as many bins, got 31"),
    ],
)
def test_settings_are_validated(settings, message):
    with pytest.raises(ValueError, match=message):
        KeepAugmentConfig(**settings)
