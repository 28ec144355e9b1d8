"""Plans as pure functions: rates, guidance, fallbacks, and the shape of a method's module."""

import dataclasses
import sys
import types
from itertools import pairwise

import numpy as np
import pytest
from plans import check_pure, corner_maps, method, samples
from scipy import stats

from scae_dali.methods import BUILT_IN, Run, Status, base, load, loading, make_config
from scae_dali.plan import schedule


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


# f_k = 1, 0.1 (which is not below it), 0.09995, 0.03, 0.002, none.
COUNTS = (20_000, 2_000, 1_999, 600, 40, 0)
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(6), COUNTS))


def tail_method(saliency=None, near=None, **settings):
    """SCAE on the long tail of LABELS. near: the cache's neighbours, [K][m]; None: it has none."""
    module = load("scae")
    run = Run(
        seed=3,
        epochs=10,
        labels=LABELS,
        class_counts=np.array(COUNTS),
        saliency=saliency,
        neighbors=lambda: None if near is None else np.array(near, np.uint16),
    )
    return module.Method(make_config(module, settings), run)


def of_class(k, epoch=5, **keywords):
    """The samples of one class."""
    every = samples(len(LABELS), LABELS, epoch, **keywords)
    return every.take(np.flatnonzero(k == LABELS))


@pytest.mark.parametrize(
    ("settings", "tail"),
    [
        ({}, (2, 3, 4)),
        ({"tail_erase": "always"}, (2, 3, 4)),
        ({"mix_prob": 1.0}, (2, 3, 4)),
        ({"mix_prob": 0.2, "tail": 1.0, "p_max": 0.9}, (1, 2, 3, 4)),
        ({"mix_prob": 0.0, "tail_erase": "always"}, (2, 3, 4)),
        ({"mix_prob": 0.0}, ()),
        ({"tail": 0.0}, ()),
        ({"class_aware": False}, ()),
    ],
)
def test_over_an_epoch_each_class_is_mixed_and_erased_as_eqs_7_and_8_say(settings, tail):
    one = tail_method(**settings)
    plan = one.plan(samples(len(LABELS), LABELS))
    config, status = one.config, plan["status"]
    assert set(status) <= {0, Status.ERASED, Status.MIXED}  # MIXED alone, never erased too
    assert ((plan["box"][:, 2:] > 0).all(axis=1) == (status == Status.ERASED)).all()
    rate = schedule.erase_prob(schedule.frequency(COUNTS), config.p_min, config.p_max, config.gamma)
    if not config.class_aware:
        rate[:] = config.p_max
    for k in range(5):
        mixed = config.mix_prob if k in tail else 0.0
        always = k in tail and config.tail_erase == "always"
        erased = (1 - mixed) * (1.0 if always else rate[k])
        for kind, wanted in ((Status.MIXED, mixed), (Status.ERASED, erased)):
            seen = (status[k == LABELS] == kind).sum()
            assert stats.binomtest(int(seen), COUNTS[k], wanted).pvalue > 1e-3, (k, kind)
    assert one.mixes == bool(tail and config.mix_prob)
    assert ("mu" in plan) == ("partner_id" in plan) == one.mixes


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_the_weights_of_mixed_samples_follow_beta_and_hang_on_nothing_else(alpha):
    one = tail_method(near=[[1]] * 6, mix_alpha=alpha)
    plan = one.plan(samples(len(LABELS), LABELS))
    mixed = plan["status"] == Status.MIXED
    assert (plan["mu"][~mixed] == 1).all()
    assert (plan["partner_id"][~mixed] == np.flatnonzero(~mixed)).all()
    mu, near = plan["mu"][mixed], LABELS[plan["partner_id"][mixed]] == 1
    assert stats.kstest(mu, stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert stats.ks_2samp(mu[near], mu[~near]).pvalue > 1e-3


def partners(one, k, epochs):
    """(id, partner) of the mixed samples of class k, int64 [n, 2]."""
    pairs = []
    for epoch in range(epochs):
        batch = of_class(k, epoch)
        plan = one.plan(batch)
        rows = plan["status"] == Status.MIXED
        pairs.append(np.stack([batch.ids[rows], plan["partner_id"][rows]], axis=1))
    return np.concatenate(pairs)


@pytest.mark.parametrize(("near", "neighbors"), [(None, 1), ([[1, 2]] * 6, 0)])
def test_without_neighbours_the_partner_is_any_other_sample_of_the_class(near, neighbors):
    """Before the first saliency pass, and on request."""
    pairs = partners(tail_method(near=near, neighbors=neighbors, mix_prob=1.0), 4, 60)
    assert len(pairs) == 60 * 40
    place = np.searchsorted(np.flatnonzero(LABELS == 4), pairs)
    assert (LABELS[pairs] == 4).all()
    offset = (place[:, 1] - place[:, 0]) % 40
    assert (offset > 0).all()  # never itself
    assert stats.chisquare(np.bincount(offset - 1, minlength=39)).pvalue > 1e-3


@pytest.mark.parametrize(("neighbors", "classes"), [(1, [3, 0]), (2, [3, 0, 4]), (9, [3, 0, 4, 5])])
def test_own_class_and_neighbours_are_equally_likely(neighbors, classes):
    """As many of the cache's as are wanted and there; class 5 has no samples, class 3 stands in."""
    near = [[5, 5, 5]] * 3 + [[0, 4, 5]] + [[5, 5, 5]] * 2
    pairs = partners(tail_method(near=near, neighbors=neighbors, mix_prob=1.0), 3, 5)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    chosen = LABELS[pairs[:, 1]]
    wanted = np.bincount(np.where(np.array(classes) == 5, 3, classes), minlength=6)
    expected = 3000 * wanted / len(classes)
    seen = np.bincount(chosen, minlength=6)
    assert (seen[expected == 0] == 0).all()
    assert stats.chisquare(seen[expected > 0], expected[expected > 0]).pvalue > 1e-3
    place = np.searchsorted(np.flatnonzero(LABELS == 0), pairs[chosen == 0, 1])
    assert stats.kstest((place + 0.5) / 20_000, "uniform").pvalue > 1e-3


def test_neighbours_are_asked_for_anew_in_every_batch():
    near = [[4]] * 6
    one = tail_method(near=near, mix_prob=1.0)
    first = partners(one, 3, 1)
    near[3] = [0]
    second = partners(one, 3, 1)
    assert set(LABELS[first[:, 1]]) == {3, 4}
    assert set(LABELS[second[:, 1]]) == {3, 0}
    own = LABELS[first[:, 1]] == 3
    np.testing.assert_array_equal(first[own], second[own])


def test_a_mixed_plan_does_not_depend_on_the_batch():
    """Also where epochs and occurrences of a sample meet in one batch."""
    one = tail_method(near=[[1, 2]] * 6, tail=1.0, mix_prob=0.7, fill="color")
    rng = np.random.default_rng(1)
    ids = rng.integers(0, len(LABELS), 400)
    batch = samples(400, LABELS[ids])
    batch = dataclasses.replace(
        batch, ids=ids, keys=ids | rng.integers(0, 3, 400) << 32, epoch=rng.integers(0, 3, 400)
    )
    rows = rng.permutation(400)
    whole = check_pure(one, batch, [*np.array_split(rows, 7), *rows[:40, None]])
    assert set(whole["status"]) == {0, Status.ERASED, Status.MIXED}


def test_tail_classes_have_a_lambda_of_their_own():
    """Boxes of the tail avoid the salient corner, the others seek it."""
    settings = {"p_min": 1.0, "p_max": 1.0, "mix_prob": 0.0, "area": (0.02, 0.04)}

    def distance(k, epoch=10, **more):
        return centre_distance(tail_method(corner_maps, **settings | more).plan(of_class(k, epoch)))

    own = {"lam_max": 8.0, "tail_lambda": -8.0}
    for k in (1, 2):
        plain = distance(k, 0, **own)
        assert plain == pytest.approx(32 * 2**0.5, rel=0.2)
        towards, away = distance(k, lam_max=8.0), distance(k, lam_max=-8.0)
        assert towards < plain - 2 < plain + 0.5 < away
        assert distance(k, **own) == pytest.approx(away if k == 2 else towards, abs=0.5)
    assert distance(2, class_aware=False, **own) == pytest.approx(towards, abs=0.5)
    uniform = {"lam_max": 0.0, "tail_lambda": -8.0}
    assert distance(1, **uniform) == pytest.approx(plain, abs=1.0)
    assert distance(2, **uniform) == pytest.approx(away, abs=0.5)


def test_a_map_is_missed_only_where_the_class_is_guided():
    def nothing(ids):
        return np.zeros((len(ids), 7, 7), np.uint8), np.zeros(len(ids), bool)

    settings = {"p_min": 1.0, "p_max": 1.0, "mix_prob": 0.0, "lam_max": 0.0, "tail_lambda": -1.0}
    one = tail_method(nothing, **settings)
    plan = one.plan(samples(3000, LABELS[:3000]))
    assert set(plan["status"][LABELS[:3000] < 2]) == {Status.ERASED}
    assert set(plan["status"][LABELS[:3000] >= 2]) == {Status.ERASED | Status.NO_MAP}


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


@dataclasses.dataclass
class PlainConfig:
    """Of a user's own module that derives from nothing of ours."""

    neighbors: int  # without a default
    guided: bool = True


class PlainMethod:
    """Likewise: a plan, an apply and fields."""

    fields = {"partner_id": 1, "shade": 1}  # noqa: RUF012

    def __init__(self, config, run):
        self.shade = config.neighbors + run.epochs

    def plan(self, samples):
        n = len(samples.ids)
        return {"status": 0 * samples.ids, "partner_id": samples.ids, "shade": np.full(n, 1.0)}

    def apply(self, images, plan):
        return images + self.shade


def test_a_users_own_classes_get_the_defaults_of_ours():
    module = types.ModuleType("plain")
    module.Config, module.Method = PlainConfig, PlainMethod
    run = Run(seed=3, epochs=10, labels=np.zeros(5, int), class_counts=np.array([5]))
    own = make_config(module, {"neighbors": 2})
    one = loading.make_method(module, own, run)
    assert isinstance(one, base.Method)
    assert (one.kinds, one.conditional, one.mixes, one.moves_pixels) == ((), False, True, False)
    assert (one.config, one.run, one.fields) == (own, run, PlainMethod.fields)
    assert one.plan(samples(5))["shade"].tolist() == [1.0] * 5
    assert one.apply(100, None) == 112
    assert (one.pastes, one.settle({}, None, None)) == (False, {})
    module.Method = type(
        "Settling", (PlainMethod,), {"pastes": True, "settle": lambda self, *given: {"mu": given}}
    )
    other = loading.make_method(module, own, run)
    assert (other.pastes, other.settle({}, 1, 2)) == (True, {"mu": ({}, 1, 2)})
    asked = loading.as_config(own)
    assert (asked.guided, asked.neighbors) == (True, 2)
    assert (asked.refresh_every, asked.lam_max, asked.wants_neighbors) == (0, 0.0, False)


def test_a_guided_config_of_a_users_own_may_have_any_field():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(base.GuidedConfig):
        lam_max: float
        neighbors: int = 2

    own = Own(lam_max=4.0)
    assert (own.guided, own.refresh_every, own.lam_max, own.neighbors) == (True, 10, 4.0, 2)
    scae = load("scae").Config(lam_max=3.0)
    assert loading.as_config(scae) is scae
    assert (scae.guided, scae.neighbors, scae.refresh_every, scae.lam_max) == (True, 1, 10, 3.0)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_methods_derive_from_the_bases(name):
    one = method(name)
    assert isinstance(one, base.Method)
    assert isinstance(one.config, base.Config)


def test_a_method_without_a_plan_is_refused():
    class Method(base.Method):
        def apply(self, images, plan):
            return images

    with pytest.raises(TypeError, match=r"abstract method '?plan"):
        Method(base.Config(), None)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=rf"one of {', '.join(BUILT_IN)} or.*got 'cutoff'"):
        load("cutoff")
    with pytest.raises(ValueError, match=r"unknown setting lambda_max of .*lam_max"):
        make_config(load("scae"), {"lambda_max": 3})


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_field_of_a_plan_has_its_declared_width(name):
    colored = hasattr(load(name).Config, "fill")
    one = method(name, corner_maps, (100, 5), **({"fill": "color"} if colored else {}))
    plan = one.plan(samples(6))
    assert one.fields.keys() <= plan.keys()
    for field, width in one.fields.items():
        assert plan[field].shape == ((6,) if width == 1 else (6, width))
        assert plan[field].dtype in (np.int64, np.float64)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("scae", {"area": (0.5, 0.2)}, r"area must be 0 < low <= high < 1, got \(0.5, 0.2\)"),
        ("scae", {"aspect": (0.0, 1.0)}, r"aspect must be 0 < low <= high, got \(0.0, 1.0\)"),
        ("scae", {"tries": 0}, r"tries must be in \[1, 100\], got 0"),
        (
            "scae",
            {"fill": "blue"},
            "fill must be one of mean, zero, color, noise, above_mean; got 'blue'",
        ),
        ("scae", {"p_max": 1.5}, r"p_max must be a probability in \[0, 1\], got 1.5"),
        ("scae", {"gamma": -1}, "gamma must be >= 0, got -1"),
        ("scae", {"border": "wrap"}, "border must be one of inside, clip; got 'wrap'"),
        ("scae", {"lam_max": 500}, r"lam_max must be in \[-100, 100\], got 500"),
        ("scae", {"refresh_every": -1}, "refresh_every must be >= 0, got -1"),
        ("scae", {"tail": 1.5}, r"tail must be in \[0, 1\], got 1.5; the paper's is 0.1"),
        ("scae", {"mix_prob": -0.5}, r"mix_prob must be a probability in \[0, 1\], got -0.5"),
        ("scae", {"mix_alpha": 0.0}, r"mix_alpha must be in \(0, 100\], got 0.0"),
        ("scae", {"mix_alpha": 200}, r"mix_alpha must be in \(0, 100\], got 200"),
        ("scae", {"neighbors": -1}, "neighbors must be >= 0, got -1"),
        ("scae", {"tail_erase": "never"}, "tail_erase must be one of class, always; got 'never'"),
        ("scae", {"tail_lambda": -500}, r"tail_lambda must be in \[-100, 100\], got -500"),
        ("random_erasing", {"prob": -0.1}, r"prob must be a probability in \[0, 1\], got -0.1"),
    ],
)
def test_settings_are_validated(name, settings, message):
    with pytest.raises(ValueError, match=message):
        load(name).Config(**settings)
