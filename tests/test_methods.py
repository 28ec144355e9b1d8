"""Plans as pure functions: rates, guidance, fallbacks, and the shape of a method's module."""

import sys
import types
from itertools import pairwise

import numpy as np
import pytest

from scae_dali import schedule
from scae_dali.methods import BUILT_IN, Run, Samples, Status, load, make_config


def samples(n, labels=None, epoch=5, size=(64, 64), window=(0.0, 0.0, 1.0, 1.0)):
    return Samples(
        ids=np.arange(n),
        keys=np.arange(n),
        labels=np.zeros(n, np.int64) if labels is None else labels,
        epoch=np.full(n, epoch),
        window=np.tile(np.array(window), (n, 1)),
        size_px=np.tile(np.array(size), (n, 1)),
    )


def corner_maps(ids):
    """All saliency at the top left."""
    maps = np.zeros((len(ids), 7, 7), np.uint8)
    maps[:, :2, :2] = 255
    return maps, np.ones(len(ids), bool)


def method(name, saliency=None, counts=(100,), epochs=10, **settings):
    module = load(name)
    run = Run(
        seed=3,
        epochs=epochs,
        labels=np.arange(30_000) % len(counts),
        class_counts=np.array(counts),
        saliency=saliency,
    )
    return module.Method(make_config(module, settings), run)


def test_none_plans_nothing():
    plan = method("none").plan(samples(5))
    assert plan["status"].tolist() == [0] * 5
    assert set(plan) == {"status"}


@pytest.mark.parametrize(
    ("size", "area", "mean"), [(32, (0.02, 0.4), 0.201), (224, (0.02, 0.33), 0.175)]
)
def test_random_erasing_has_the_published_rate_and_area(size, area, mean):
    n = 20_000
    plan = method("random_erasing", area=area, aspect=(0.3, 3.33), tries=100).plan(
        samples(n, size=(size, size))
    )
    erased = plan["status"] == Status.ERASED
    assert erased.mean() == pytest.approx(0.5, abs=0.015)
    box = plan["box"][erased]
    assert (box[:, 2] * box[:, 3]).mean() / size**2 == pytest.approx(mean, abs=0.004)
    assert (box[:, 2] > box[:, 3]).mean() == pytest.approx(0.75, abs=0.02)
    assert (box[:, :2] + box[:, 2:] <= size).all()
    assert (plan["box"][~erased] == 0).all()


def test_random_erasing_defaults_are_the_published_ones():
    config = load("random_erasing").Config()
    assert (config.prob, config.area, config.aspect, config.tries) == (
        0.5,
        (0.02, 0.4),
        (0.3, 3.33),
        100,
    )


def test_scae_erases_each_class_at_its_own_rate():
    counts = (1000, 100, 10)
    n = 30_000
    labels = np.arange(n) % 3
    plan = method("scae", corner_maps, counts).plan(samples(n, labels))
    wanted = schedule.erase_prob(schedule.frequency(counts), 0.1, 0.5, 0.5)
    wanted[2] *= 0.5  # of the tail: the other half is mixed
    for k in range(3):
        rate = (plan["status"][labels == k] & Status.ERASED > 0).mean()
        assert abs(rate - wanted[k]) < 4 * np.sqrt(wanted[k] * (1 - wanted[k]) / (n / 3))
    plan = method("scae", corner_maps, counts, class_aware=False).plan(samples(n, labels))
    assert (plan["status"] & Status.ERASED > 0).mean() == pytest.approx(0.5, abs=0.015)


def centre_distance(plan):
    """Mean distance of the boxes' centres from the top left, over erased samples."""
    box = plan["box"][plan["box"][:, 2] > 0]
    return np.hypot(*(box[:, :2] + box[:, 2:] / 2).T).mean()


def test_at_epoch_0_scae_is_random_erasing_box_for_box():
    same = {"area": (0.02, 0.33), "aspect": (0.3, 3.3), "tries": 10}
    scae = method("scae", corner_maps, **same).plan(samples(500, epoch=0))
    other = method("random_erasing", prob=0.5, **same).plan(samples(500, epoch=0))
    np.testing.assert_array_equal(scae["box"], other["box"])
    np.testing.assert_array_equal(scae["status"], other["status"])


def test_guidance_grows_with_the_epoch_and_turns_with_the_sign():
    n, settings = 4000, {"p_min": 1.0, "p_max": 1.0, "area": (0.02, 0.04)}
    scae = method("scae", corner_maps, lam_max=8.0, **settings)
    distances = [centre_distance(scae.plan(samples(n, epoch=t))) for t in (0, 3, 6, 10)]
    assert all(b < a - 0.5 for a, b in pairwise(distances))
    protect = method("scae", corner_maps, lam_max=-8.0, **settings)
    assert centre_distance(protect.plan(samples(n, epoch=10))) > distances[0] + 0.5


def test_guidance_follows_the_crop():
    """A crop of the bottom right sees none of the salient corner: no guidance is left in it."""
    scae = method("scae", corner_maps, lam_max=8.0, p_min=1.0, p_max=1.0)
    away = centre_distance(scae.plan(samples(4000, epoch=10, window=(0.5, 0.5, 0.5, 0.5))))
    plain = centre_distance(scae.plan(samples(4000, epoch=0)))
    assert away == pytest.approx(plain, abs=0.7)


def test_missing_and_flat_maps_are_uniform_and_reported():
    def maps(ids):
        values, found = corner_maps(ids)
        found[ids % 3 == 0] = False
        values[ids % 3 == 0] = 0
        values[ids % 3 == 1] = 128
        return values, found

    n, settings = 3000, {"p_min": 1.0, "p_max": 1.0, "lam_max": 8.0}
    plan = method("scae", maps, **settings).plan(samples(n, epoch=10))
    uniform = method("scae", None, **settings).plan(samples(n, epoch=10))
    kind = np.arange(n) % 3
    assert set(plan["status"][kind == 0]) == {Status.ERASED | Status.NO_MAP}
    assert set(plan["status"][kind == 1]) == {Status.ERASED | Status.FLAT_MAP}
    assert set(plan["status"][kind == 2]) == {Status.ERASED}
    np.testing.assert_array_equal(plan["box"][kind < 2], uniform["box"][kind < 2])
    assert (plan["box"][kind == 2] != uniform["box"][kind == 2]).any()


def test_the_cache_is_not_read_while_lambda_is_0():
    def explode(ids):
        raise AssertionError("read")

    plan = method("scae", explode).plan(samples(200, epoch=0))
    assert set(plan["status"]) == {0, Status.ERASED}


def test_a_plan_does_not_depend_on_the_batch():
    labels = np.arange(600) % 2
    for name in ("random_erasing", "scae"):
        one = method(name, corner_maps, (50, 5), fill="color") if name == "scae" else method(name)
        batch = samples(600, labels)
        whole = one.plan(batch)
        rows = np.random.default_rng(0).permutation(600)
        for part in [*np.array_split(rows, 11), *rows[:40, None]]:
            for key, value in one.plan(batch.take(part)).items():
                np.testing.assert_array_equal(value, whole[key][part])


def test_a_crop_too_small_for_any_rectangle_is_left_alone():
    for name in ("random_erasing", "scae"):
        rate = {"prob": 1.0} if name == "random_erasing" else {"p_min": 1.0, "p_max": 1.0}
        plan = method(name, corner_maps, **rate).plan(samples(50, size=(1, 1)))
        assert set(plan["status"]) == {Status.NO_FIT}
        assert (plan["box"] == 0).all()


def test_clip_draws_centres_near_the_border():
    settings = {"p_min": 1.0, "p_max": 1.0, "area": (0.2, 0.3)}
    inside = method("scae", None, border="inside", **settings).plan(samples(2000))["box"]
    clipped = method("scae", None, border="clip", **settings).plan(samples(2000))["box"]
    assert (clipped[:, :2] >= 0).all()
    assert (clipped[:, :2] + clipped[:, 2:] <= 64).all()
    assert clipped[:, 2:].prod(1).mean() < 0.85 * inside[:, 2:].prod(1).mean()


def test_a_module_of_the_users_own_is_a_method(monkeypatch):
    module = types.ModuleType("my_package.my_method")
    module.Config = load("none").Config
    module.Method = load("none").Method
    monkeypatch.setitem(sys.modules, "my_package", types.ModuleType("my_package"))
    monkeypatch.setitem(sys.modules, "my_package.my_method", module)
    assert load("my_package.my_method") is module
    del module.Method
    with pytest.raises(ValueError, match=r"'my_package.my_method': the module lacks Method"):
        load("my_package.my_method")


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"one of none, random_erasing, scae or.*got 'cutoff'"):
        load("cutoff")
    with pytest.raises(ValueError, match=r"unknown setting lambda_max of .*lam_max"):
        make_config(load("scae"), {"lambda_max": 3})


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_field_of_a_plan_has_its_declared_width(name):
    one = method(name, corner_maps, **({} if name == "none" else {"fill": "color"}))
    plan = one.plan(samples(6))
    for field, width in one.fields.items():
        assert plan[field].shape == (6, width)
        assert plan[field].dtype == np.float64


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("scae", {"area": (0.5, 0.2)}, r"area must be 0 < low <= high < 1, got \(0.5, 0.2\)"),
        ("scae", {"aspect": (0.0, 1.0)}, r"aspect must be 0 < low <= high, got \(0.0, 1.0\)"),
        ("scae", {"tries": 0}, r"tries must be in \[1, 100\], got 0"),
        ("scae", {"fill": "blue"}, "fill must be one of mean, zero, color, noise; got 'blue'"),
        ("scae", {"p_max": 1.5}, r"p_max must be a probability in \[0, 1\], got 1.5"),
        ("scae", {"gamma": -1}, "gamma must be >= 0, got -1"),
        ("scae", {"border": "wrap"}, "border must be one of inside, clip; got 'wrap'"),
        ("scae", {"lam_max": 500}, r"lam_max must be in \[-100, 100\], got 500"),
        ("scae", {"refresh_every": -1}, "refresh_every must be >= 0, got -1"),
        ("random_erasing", {"prob": -0.1}, r"prob must be a probability in \[0, 1\], got -0.1"),
    ],
)
def test_settings_are_validated(name, settings, message):
    with pytest.raises(ValueError, match=message):
        load(name).Config(**settings)
