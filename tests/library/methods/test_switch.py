"""One of two mixing methods for each batch: which one, its plan, and what is refused."""

import dataclasses
import re

import numpy as np
import pytest
from scipy import stats
from test_batch_mixing import check_equal, method, mixed_of, pasted, samples, stored

from pipelines import resume
from pipelines.data import DataConfig
from pipelines.recipe import Config
from scae_dali.data.index import ImageIndex
from scae_dali.methods import Run, compose, load, switch
from scae_dali.stage.stage import Stage


def switched(names="mixup|cutmix", seed=3, saliency=stored, **settings):
    labels = np.arange(10_000) % 10
    run = Run(
        seed=seed, epochs=10, labels=labels, class_counts=np.bincount(labels), saliency=saliency
    )
    return compose.make(compose.configs(names, settings), run)


SETTINGS = {"mixup": {"alpha": 0.8, "prob": 0.9}, "cutmix": {"alpha": 2.0, "prob": 0.8}}


@pytest.mark.parametrize("per", [("sample", "sample"), ("batch", "batch"), ("batch", "sample")])
@pytest.mark.parametrize("names", ["mixup|cutmix", "cutmix|mixup"])
def test_each_batch_is_planned_as_one_of_the_two_does_alone(names, per):
    these = samples(200, 16)
    settings = {
        name: SETTINGS[name] | {"per": one} for name, one in zip(SETTINGS, per, strict=True)
    }
    plan = switched(names, switch_prob=0.4, **settings).plan(these)
    alone = {name: method(name, **settings[name]).plan(these) for name in settings}
    assert plan.keys() == alone["mixup"].keys() | alone["cutmix"].keys()
    boxes, theirs = pasted(plan), pasted(alone["cutmix"])
    everywhere = switched(names, switch_prob=0.4).plan(these)["weight"].reshape(200, 16)
    chosen = (everywhere == 1).all(axis=1)
    for k, by_cutmix in enumerate(chosen):
        rows = slice(16 * k, 16 * k + 16)
        one = alone["cutmix" if by_cutmix else "mixup"]
        for key in ("status", "mu", "source", "source_flip"):
            np.testing.assert_array_equal(plan[key][rows], one[key][rows])
        if by_cutmix:
            np.testing.assert_array_equal(boxes[rows], theirs[rows])
            assert (plan["weight"][rows] == 1).all()
        else:
            np.testing.assert_array_equal(plan["weight"][rows], one["weight"][rows])
            assert (boxes[rows] == [32, 32, 0, 0]).all()  # of no area
    assert 50 < chosen.sum() < 150


def test_the_second_takes_switch_prob_of_the_batches():
    these = samples(4000, 2)
    for names, prob in (("mixup|cutmix", 0.3), ("cutmix|mixup", 0.7)):
        plan = switched(names, switch_prob=prob).plan(these)
        second = pasted(plan).reshape(4000, 2, 4)[:, :, 2:].any(axis=(1, 2))
        assert stats.binomtest(int(second.sum()), 4000, 0.3).pvalue > 1e-3
    for prob in (0.0, 1.0):
        plan = switched(switch_prob=prob).plan(these)
        alone = method("cutmix" if prob else "mixup").plan(these)
        check_equal({key: plan[key] for key in alone}, alone)
        left = plan["weight"] != 1 if prob else pasted(plan)[:, 2:] != 0
        assert not left.any()
    assert switch.Config().switch_prob == 0.5


def choices(seed=3, **keywords):
    plan = switched(seed=seed, mixup={"per": "batch"}).plan(samples(100, 8, **keywords))
    return (plan["weight"] == 1).reshape(100, 8)


def test_the_choice_is_one_a_batch_and_hangs_on_seed_and_iteration_alone():
    wanted = choices()
    assert (wanted == wanted[:, :1]).all()
    assert 0 < wanted[:, 0].sum() < 100
    np.testing.assert_array_equal(choices(epoch=2, crop=(24, 40)), wanted)
    other = dataclasses.replace(samples(100, 8, seed=9), keys=np.arange(800) << 32)
    plan = switched(mixup={"per": "batch"}).plan(other)
    np.testing.assert_array_equal((plan["weight"] == 1).reshape(100, 8), wanted)
    np.testing.assert_array_equal(choices(first=30)[:70], wanted[30:])
    assert (choices(seed=4) != wanted).any()
    one, these = switched(), samples(6, 16, first=11)
    parts = [one.plan(these.take(np.arange(16 * k, 16 * k + 16))) for k in range(6)]
    whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    check_equal(one.plan(these), whole)


def test_the_choice_is_independent_of_what_is_drawn_for_the_batch():
    """Whether it is mixed, and its weight, where these too are drawn once a batch."""
    n = 8000
    per = {"per": "batch", "prob": 0.5}
    plan = switched(mixup=per, cutmix=per | {"prob": 0.4}).plan(samples(n, 1))
    mu = method("mixup", **per).plan(samples(n, 1))["mu"]
    by_mixup = plan["weight"] < 1
    mixed = mixed_of(plan)
    assert stats.binomtest(int(by_mixup.sum()), n, 0.25).pvalue > 1e-3
    assert stats.binomtest(int((mixed & ~by_mixup).sum()), n, 0.2).pvalue > 1e-3
    assert stats.kstest(plan["mu"][by_mixup], "uniform").pvalue > 1e-3
    assert stats.ks_2samp(plan["mu"][by_mixup], mu[mu < 1]).pvalue > 1e-3


def test_cutmix_and_saliency_mix_take_turns_over_the_same_box():
    """Of the second images of the batches that it mixes alone, SaliencyMix reads maps."""
    read = []

    def saliency(ids):
        read.extend(ids.tolist())
        return stored(ids)

    these = samples(40, 16)
    half = {"prob": 0.5}
    plan = switched("cutmix|saliency_mix", saliency=saliency, saliency_mix=half).plan(these)
    alone = [method("cutmix").plan(these), method("saliency_mix", **half).plan(these)]
    second = ~mixed_of(plan).reshape(40, 16).all(axis=1)
    assert 5 < second.sum() < 35
    rows = np.repeat(second, 16)
    assert plan.keys() == alone[0].keys()
    for key in plan:
        np.testing.assert_array_equal(plan[key][~rows], alone[0][key][~rows])
        np.testing.assert_array_equal(plan[key][rows], alone[1][key][rows])
    assert len(read) == (mixed_of(plan) & rows).sum()


@pytest.mark.parametrize(
    "names", ["random_erasing+mixup|cutmix", "mixup | cutmix + rand_augment + random_erasing"]
)
def test_the_switch_binds_tighter_than_plus(names):
    these, settings = samples(20, 16), {"random_erasing": {"prob": 0.6}, "mixup": {"alpha": 0.2}}
    plan = switched(names, switch_prob=0.7, **settings).plan(these)
    mixed = switched(switch_prob=0.7, mixup={"alpha": 0.2}).plan(these)
    erased = method("random_erasing", prob=0.6).plan(these)
    np.testing.assert_array_equal(plan["box"], erased["box"])
    np.testing.assert_array_equal(plan["status"], erased["status"] | mixed["status"])
    for key in mixed.keys() - {"status"}:
        np.testing.assert_array_equal(plan[key], mixed[key])
    assert ("op0" in plan) == ("rand_augment" in names)


def test_labels_and_weights_of_a_stage():
    labels = np.random.default_rng(0).permutation(96)  # a class each
    index = ImageIndex.from_arrays([f"{k}" for k in range(96)], labels)
    stage = Stage(
        index,
        "mixup|cutmix",
        epochs=9,
        batch_size=16,
        seed=1,
        switch_prob=0.4,
        mixup={"alpha": 0.8},
        cutmix=load("cutmix").Config(prob=0.5),
    )
    planner = stage.planner()
    rows = planner(np.arange(96), np.arange(96) // 16, np.full((96, 2), 32))
    part = {key: rows[:, where].squeeze() for key, where in planner.columns.items()}
    second = np.arange(96) // 16 * 16 + part["source"].astype(int)
    np.testing.assert_array_equal(part["partner"], labels[second])
    area = part["paste_shapes"][:, 2] * part["paste_shapes"][:, 3] / 32**2
    np.testing.assert_allclose(part["mu"], np.where(area > 0, 1 - area, part["weight"]))
    assert ((area > 0) | (part["weight"] == 1)).any()
    assert (area > 0).any()
    assert (part["weight"] < 1).any()


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (
            "mixup|scae",
            {},
            "only two of mixup, cutmix, saliency_mix can be joined by |, got mixup|scae; ",
        ),
        (
            "mixup|cutmix|saliency_mix",
            {},
            "two of mixup, cutmix, saliency_mix can be joined by |, got mixup|cutmix|saliency_mix; "
            "join other methods by +",
        ),
        ("mixup|mine.own", {}, "can be joined by |, got mixup|mine.own; join other methods by +"),
        ("mixup|", {}, "method must be a name, or different ones joined by +, got 'mixup|'"),
        ("mixup|mixup", {}, "different ones joined by +, got 'mixup|mixup'"),
        (
            "mixup|cutmix+saliency_mix",
            {},
            "saliency_mix and mixup|cutmix do not combine: an image is mixed with one other at",
        ),
        ("mixup+cutmix", {}, "mixup|cutmix takes one of the two for each batch"),
        ("mixup|cutmix", {"switch_prob": 1.5}, "switch_prob must be a probability in [0, 1], got"),
        ("mixup|cutmix", {"alpha": 1}, "settings of 'mixup|cutmix' go by the method's name, as in"),
        (
            "random_erasing+mixup",
            {"switch_prob": 0.2},
            "switch_prob is for two methods that are joined by |, as in mixup|cutmix, got 0.2 with "
            "method 'random_erasing+mixup'; leave it out",
        ),
        ("mixup", {"switch_prob": 0.2}, "unknown setting switch_prob of scae_dali.methods.mixup"),
    ],
)
def test_what_cannot_switch_is_refused(names, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        switched(names, **settings)


def config(**more):
    return Config(data=DataConfig(root="none"), out="none", **more)


def test_switch_prob_is_a_setting_of_a_run():
    one = config(method="cutmix|saliency_mix", switch_prob=0.3)
    assert one.method_configs() == {
        "cutmix": one.cutmix,
        "saliency_mix": one.saliency_mix,
        "cutmix|saliency_mix": switch.Config(switch_prob=0.3),
    }
    assert one.guided_config() == one.saliency_mix
    assert resume.flat(one)["switch_prob"] == 0.3
    assert config(method="mixup|cutmix").guided_config() is None
    for method_ in ("scae", "scae+mixup"):
        with pytest.raises(ValueError, match=re.escape(f"got 0.3 with method '{method_}'; leave")):
            config(method=method_, switch_prob=0.3)
    with pytest.raises(ValueError, match="switch_prob must be a probability"):
        config(method="mixup|cutmix", switch_prob=-0.1)
