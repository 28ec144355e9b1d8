"""Several methods in one stage: their order, what does not combine, their plans and pixels."""

import re
import sys
import types

import numpy as np
import pytest
from crops import shifted
from nvidia.dali import fn, pipeline_def

from pipelines import files, memory
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.data.pixels import ArrayImages
from scae_dali.methods import BUILT_IN, Run, Samples, Status, compose, load, make_config
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.order import Order
from scae_dali.stage.stage import Stage

MAPS = np.random.default_rng(5).integers(0, 256, (2000, 7, 7), np.uint8)
MAPS[::5] = 9  # flat


def stored(ids):
    return MAPS[ids], ids % 7 != 0


def run_of(counts=(1000, 1000)):
    labels = np.repeat(np.arange(len(counts)), counts)
    return Run(seed=3, epochs=10, labels=labels, class_counts=np.array(counts), saliency=stored)


TAILED = (1900, 100)


def samples(n=320, run=None):
    rng = np.random.default_rng(1)
    ids = rng.permutation(2000)[:n]
    return Samples(
        ids=ids,
        keys=ids,
        labels=(run or run_of()).labels[ids],
        epoch=np.full(n, 5),
        window=np.tile([0.1, 0.2, 0.6, 0.7], (n, 1)),
        size_px=np.full((n, 2), 32),
        iteration=40 + np.arange(n) // 16,
        place=np.arange(n) % 16,
        flip=rng.random(n) < 0.5,
    )


def made(names, settings, run):
    return compose.make(compose.configs(names, settings), run)


def single(name, run, **settings):
    module = load(name)
    return module.Method(make_config(module, settings), run)


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ("scae", ["scae"]),
        ("cutmix+scae", ["cutmix", "scae"]),
        (" rand_augment + scae+mixup ", ["rand_augment", "scae", "mixup"]),
        ("mine.erasing+mixup", ["mine.erasing", "mixup"]),
    ],
)
def test_names_are_joined_by_plus(names, parts):
    assert compose.split(names) == parts


@pytest.mark.parametrize("names", ["", "+", "scae+", "+scae", "scae++mixup", "scae + scae", " "])
def test_empty_and_double_names_are_refused(names):
    message = f"method must be a name, or different ones joined by +, got {names!r}; for instance"
    with pytest.raises(ValueError, match=re.escape(message)):
        compose.split(names)


@pytest.fixture
def users(monkeypatch):
    """Makes modules mine.<name> of the user's own, whose Method has these members."""
    monkeypatch.setitem(sys.modules, "mine", types.ModuleType("mine"))

    def plan(self, samples):
        return {"status": 0 * samples.ids} | dict.fromkeys(self.fields, samples.epoch)

    def add(name, **members):
        module = types.ModuleType(f"mine.{name}")
        module.Config = load("none").Config
        shared = {"__init__": lambda self, config, run: None, "fields": {}, "plan": plan}
        module.Method = type("Method", (), shared | members)
        monkeypatch.setitem(sys.modules, f"mine.{name}", module)

    return add


@pytest.mark.parametrize(
    "names",
    [
        "rand_augment+scae+mixup",
        "mixup+rand_augment+scae",
        "scae+mixup+rand_augment",
        "scae+rand_augment+mixup",
    ],
)
def test_the_order_goes_by_kind_whatever_that_of_the_names(names):
    one = made(names, {}, run_of())
    assert one.kinds == ("policy", "erase", "mix")
    order = list(one.fields)
    assert order.index("op0") < order.index("source")


def test_images_go_through_the_methods_in_that_order(users):
    def applied(mark):
        return lambda self, images, plan: [*images, mark]

    for name, kind in (("third", "mix"), ("first", "policy"), ("second", "erase")):
        users(name, kinds=(kind,), apply=applied(name))
    for names in ("third+first+second", "second+third+first"):
        one = made("+".join(f"mine.{name}" for name in names.split("+")), {}, run_of())
        assert one.apply([], None) == ["first", "second", "third"]
        assert one.conditional is False
    users("first", kinds=("policy",), conditional=True)
    assert made("mine.third+mine.first", {}, run_of()).conditional is True


def test_a_single_method_is_itself_with_settings_of_its_own():
    one = made("cutmix", {"prob": 0.25}, run_of())
    assert type(one) is load("cutmix").Method
    assert one.config == load("cutmix").Config(prob=0.25)


def test_settings_may_be_ready_configs():
    scae = load("scae").Config(lam_max=5.0)
    assert compose.configs("scae", {"scae": scae})["scae"] is scae
    assert compose.configs(" scae ", {"lam_max": 5.0}) == {"scae": scae}
    both = compose.configs("scae+mixup", {"scae": scae, "mixup": {"alpha": 0.2}})
    assert both["scae"] is scae
    assert both["mixup"] == load("mixup").Config(alpha=0.2)
    message = "settings of scae must be a mapping, .*or its Config, got scae=.*alpha"
    with pytest.raises(ValueError, match=message):
        compose.configs("scae+mixup", {"scae": both["mixup"]})
    with pytest.raises(ValueError, match=r"unknown setting scae of .*scae; it has"):
        compose.configs("scae", {"scae": both["mixup"]})
    with pytest.raises(ValueError, match=r"go by the method's name, as in scae=.*got lam_max"):
        compose.configs("scae", {"scae": scae, "lam_max": 1.0})


def test_a_stage_takes_a_config_as_it_takes_its_fields(tailed, tailed_cache):
    settings = {"tail": 0.5, "mix_alpha": 4.0, "p_max": 0.8}
    shared = {"epochs": 3, "batch_size": 63, "seed": 8, "cache": tailed_cache}
    ready = load("scae").Config(**settings)
    given = (np.arange(63), np.full(63, 2), np.full((63, 2), 24))
    for names, more in (("scae", {}), ("rand_augment+scae", {"rand_augment": {"n": 1}})):
        one = Stage(tailed, names, scae=ready, **shared, **more)
        other = Stage(tailed, names, **shared, **(more | {"scae": settings} if more else settings))
        assert one.mixes
        np.testing.assert_array_equal(one.planner()(*given), other.planner()(*given))


COMBINE = r"do not combine: "
MIXED_ONCE = rf"{COMBINE}an image is mixed with one other at most .*mix_prob=0 switches it off"


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        ("mixup+cutmix", {}, rf"mixup and cutmix {MIXED_ONCE}"),
        ("rand_augment+cutmix+saliency_mix", {}, rf"cutmix and saliency_mix {MIXED_ONCE}"),
        ("scae+mixup", {}, rf"scae and mixup {MIXED_ONCE}"),
        ("mixup+scae", {"scae": {"tail": 1.0}}, rf"mixup and scae {MIXED_ONCE}"),
        ("random_erasing+scae", {}, rf"random_erasing and scae {COMBINE}one region of an image"),
        ("none+scae", {}, r"method none combines with no other, got none\+scae: leave it out"),
        ("cutmix+none", {}, r"method none combines with no other, got cutmix\+none: leave it out"),
        ("cutmix+cutoff", {}, rf"one of {', '.join(BUILT_IN)} or.*got 'cutoff'"),
        ("mixup+scae", {"lam_max": 1.0}, r"'mixup\+scae' go by .*name, as in mixup=.*got lam_max"),
        ("mixup+scae", {"cutmix": {}, "prob": 1}, "got cutmix, prob"),
        (
            "scae+mixup",
            {"scae": {"lambda_max": 1}},
            "unknown setting lambda_max of .*scae; .*lam_m",
        ),
        ("scae+mixup", {"mixup": {"alpha": 0}}, r"alpha must be in \(0, 100\], got 0"),
        ("scae+mixup", {"scae": 1.0}, r"settings of scae must be a mapping, .*got scae=1.0"),
        (
            "mixup",
            {"mixup": {"alpha": 0.2}},
            "unknown setting mixup of .*mixup; it has prob, alpha",
        ),
    ],
)
def test_what_does_not_combine_is_refused(names, settings, message):
    with pytest.raises(ValueError, match=message):
        made(names, settings, run_of(TAILED))


def test_a_users_own_module_needs_kinds_and_fields_of_its_own(users):
    users("plain")
    message = "method mine.plain combines with no other, got mine.plain+mixup: its Method has no"
    with pytest.raises(ValueError, match=re.escape(message)):
        made("mine.plain+mixup", {}, run_of())
    assert made("mine.plain", {}, run_of()).fields == {}
    users("erasing", kinds=("erase",), fields={"weight": 1})
    with pytest.raises(ValueError, match=r"mine.erasing and mixup .*both plan a field 'weight'"):
        made("mine.erasing+mixup", {}, run_of())
    one = made("mine.erasing+cutmix", {}, run_of())
    assert (one.plan(samples())["weight"] == 5).all()


def check_parts(names, run, settings, these):
    """The plan of a composition against those of its parts; returns them."""
    parts = [single(name, run, **settings.get(name, {})) for name in names.split("+")]
    plans = [part.plan(these) for part in parts]
    both = made(names, settings, run)
    plan = both.plan(these)
    assert plan.keys() == set().union(*plans)
    assert both.fields == {key: n for part in parts for key, n in part.fields.items()}
    for one in plans:
        for key in one.keys() - {"status"}:
            np.testing.assert_array_equal(plan[key], one[key])
    status = np.bitwise_or.reduce([one["status"] for one in plans])
    np.testing.assert_array_equal(plan["status"], status)
    return plan


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        ("random_erasing+cutmix", {"random_erasing": {"fill": "color"}, "cutmix": {"prob": 0.5}}),
        ("scae+mixup", {"mixup": {"alpha": 0.2, "per": "batch", "prob": 0.5}}),
        ("scae+saliency_mix", {"scae": {"p_min": 0.5}}),
        ("rand_augment+scae+cutmix", {"cutmix": {"prob": 0.5}}),
    ],
)
def test_the_plan_is_those_of_the_parts_and_status_has_the_bits_of_all(names, settings):
    """Without classes of the tail, where scae does not mix."""
    these = samples()
    plan = check_parts(names, run_of(), settings, these)
    told = set(plan["status"].tolist())
    erased, mixed = int(Status.ERASED), int(Status.MIXED_IN_BATCH)
    assert {0, erased, mixed, erased | mixed} <= told
    if "scae" in names:
        assert {erased | Status.NO_MAP, erased | mixed | Status.FLAT_MAP} <= told


def test_scae_with_classes_of_the_tail_combines_where_it_does_not_mix():
    run = run_of(TAILED)
    settings = {"scae": {"mix_prob": 0.0, "tail_erase": "always"}}
    plan = check_parts("scae+mixup", run, settings, samples(run=run))
    assert "partner_id" not in plan
    one = made("rand_augment+scae", {}, run)  # and it may mix under a policy
    assert one.kinds == ("policy", "erase", "mix")
    assert (one.plan(samples(run=run))["status"] == Status.MIXED).any()


SIZE, BATCH = 24, 16
CROP = CropConfig(kind="pad", pad=5)
# Pictures in grey levels, so that what is erased is exact.
IMAGE = ImageConfig(size=SIZE, val_resize=SIZE, crop=CROP, mean=(0.0,) * 3, std=(1.0,) * 3)
FILL = (124.0, 116.0, 104.0)


@pytest.fixture(scope="module")
def pixels(tailed):
    return ArrayImages.from_index(tailed, threads=1).pixels


def batches(index, pixels, names, count=8, *, cache=None, **settings):
    """So many batches: pictures [B, H, W, 3], {name: column}. pixels: in memory; None: of files."""
    stage = Stage(index, names, epochs=3, batch_size=BATCH, seed=8, cache=cache, **settings)
    run, order = (
        ExecConfig(batch_size=BATCH, threads=1),
        Order(index.labels, batch_size=BATCH, seed=8),
    )
    if pixels is None:
        pipeline = files.train_pipeline(stage, IMAGE, run, seed=8, order=order)
    else:
        pipeline = memory.train_pipeline(stage, ArrayImages(index, pixels), order, IMAGE, run)
    for _ in range(count):
        images, rows = (out.as_array().copy() for out in pipeline.run())
        columns = stage.planner(CROP).columns
        part = {key: rows[:, where].squeeze() for key, where in columns.items()}
        yield images.transpose(0, 2, 3, 1), part


def turned(picture, flip):
    return picture[:, ::-1] if flip else picture


def check_pasted(pictures, plain, part):
    """Both images with a rectangle of their own, then the box, each picture in its own flip."""
    erased = []
    for picture, flip, box in zip(plain, part["flip"], part["box"].astype(int), strict=True):
        y, x, h, w = box
        erased.append(turned(picture, flip).copy())
        erased[-1][y : y + h, x : x + w] = FILL
    boxes = np.concatenate([part["paste_anchors"][:, 2:], part["paste_shapes"][:, 2:]], axis=1)
    for k, (y, x, h, w) in enumerate(boxes.astype(int)):
        j = int(part["source"][k])
        wanted, second = erased[k].copy(), turned(erased[j], part["flip"][j] != part["flip"][k])
        wanted[y : y + h, x : x + w] = second[y : y + h, x : x + w]
        np.testing.assert_array_equal(pictures[k], turned(wanted, part["flip"][k]))


@pytest.mark.parametrize("where", ["memory", "files"])
@pytest.mark.parametrize("names", ["random_erasing+cutmix", "cutmix+random_erasing"])
def test_what_is_pasted_is_erased_before(tailed, pixels, where, names):
    pixels = pixels if where == "memory" else None
    settings = {"random_erasing": {"prob": 0.6}, "cutmix": {"prob": 0.7}}
    mixed, plain = batches(tailed, pixels, names, **settings), batches(tailed, pixels, "none")
    seen = []
    for (pictures, part), (before, _) in zip(mixed, plain, strict=True):
        check_pasted(pictures, before, part)
        seen += part["status"].astype(int).tolist()
    assert set(seen) == {0, 1, 32, 33}


def test_a_policy_then_erasing_then_mixing(tailed, tailed_cache, pixels):
    """cutmix+scae+rand_augment, of the pictures that rand_augment gives."""
    settings = {"scae": {"class_aware": False, "p_max": 0.7}, "cutmix": {"prob": 0.8}}
    policy = {"n": 1, "m": 15}
    three = batches(
        *(tailed, pixels, "cutmix+scae+rand_augment"),
        **settings,
        rand_augment=policy,
        cache=tailed_cache,
    )
    transformed = batches(tailed, pixels, "rand_augment", **policy)
    plain = batches(tailed, pixels, "none")
    seen, changed = [], 0
    for (pictures, part), (base, _), (before, _) in zip(three, transformed, plain, strict=True):
        check_pasted(pictures, base, part)
        seen += part["status"].astype(int).tolist()
        changed += sum((base != before).any(axis=(1, 2, 3)))
    assert {0, 1, 32, 33} <= set(seen)
    assert changed > 50


def posterised(images):
    """Four levels a channel, of NumPy's images and of DALI's."""
    return images // 64 * 64


@pytest.mark.parametrize("where", ["memory", "files"])
@pytest.mark.parametrize("names", ["scae+mine.posterise", "mine.posterise+scae"])
def test_scae_mixes_before_a_users_own_policy_and_erases_after_it(
    tailed, tailed_cache, pixels, users, where, names
):
    """By NumPy, of the crops of both samples; no other order gives these pixels."""

    def apply(self, images, plan):
        return fn.cast_like(posterised(images), images)  # DALI's quotients are int32

    users("posterise", kinds=("policy",), apply=apply)
    scae = {"tail": 0.5, "mix_prob": 1.0, "mix_alpha": 4.0, "p_max": 0.8}
    planner = Stage(tailed, "scae", epochs=3, batch_size=BATCH, seed=8, **scae).planner(CROP)
    given = pixels if where == "memory" else None
    counts, rounded = dict.fromkeys((0, Status.ERASED, Status.MIXED), 0), 0
    for pictures, part in batches(tailed, given, names, cache=tailed_cache, scae=scae):
        rows = np.concatenate([part[k].reshape(BATCH, -1) for k in planner.columns], axis=1)
        second, second_flip = planner.partner_crop(rows, np.full((BATCH, 2), SIZE), CROP)
        first = np.concatenate([part["start"], part["shape"]], axis=1).astype(int)
        ids, partners, boxes = (part[k].astype(int) for k in ("id", "partner_id", "box"))
        for k, picture in enumerate(pictures):
            a = shifted(pixels[ids[k]], first[k]).astype(np.float64)
            b = turned(shifted(pixels[partners[k]], second[k]), second_flip[k])
            mu, (y, x, h, w) = part["mu"][k], boxes[k]
            # Where μ·a + (1 - μ)·b ends on a half, float32 may round it the other way.
            either = [np.round(mu * a + (1 - mu) * b + e) for e in (-1e-3, 1e-3)]
            wanted = [posterised(one) for one in either]
            for one in wanted:
                one[y : y + h, x : x + w] = FILL
            found = turned(picture, part["flip"][k])
            assert ((found == wanted[0]) | (found == wanted[1])).all()
            rounded += (wanted[0] != wanted[1]).sum()
            counts[part["status"][k]] += 1
            if part["status"][k] == Status.MIXED:
                assert (found != np.round(mu * posterised(a) + (1 - mu) * posterised(b))).any()
            elif h * w:
                assert (found[y : y + h, x : x + w] != posterised(np.array(FILL))).all()
    assert min(counts.values()) > 10
    assert rounded < 0.001 * len(pictures) * pictures[0].size * 8


@pytest.mark.parametrize("names", ["random_erasing+mixup", "scae+saliency_mix"])
def test_files_and_arrays_and_both_operators_give_the_same(tailed, tailed_cache, pixels, names):
    settings = {"scae": {"mix_prob": 0.0}} if "scae" in names else {}
    shared = {"count": 5, "cache": tailed_cache, **settings}
    wanted = list(batches(tailed, pixels, names, **shared))
    for given, backend in ((None, "python"), (pixels, "torch"), (None, "torch")):
        other = batches(tailed, given, names, backend=backend, **shared)
        for (pictures, part), (again, same) in zip(wanted, other, strict=True):
            np.testing.assert_array_equal(pictures, again)
            for key, value in part.items():
                np.testing.assert_array_equal(value, same[key])


def test_a_stage_of_several_in_somebody_elses_pipeline(index, cache):
    """Whole images, SCAE's rectangle and MixUp's weight."""
    stage = Stage(
        index,
        "mixup+scae",
        cache=cache,
        epochs=3,
        batch_size=10,
        seed=2,
        scae={"mix_prob": 0.0, "p_min": 1.0, "p_max": 1.0, "fill": "zero"},
        mixup={"alpha": 4.0},
    )

    @pipeline_def(batch_size=10, num_threads=1, device_id=None)
    def define():
        encoded, ids = fn.readers.file(files=list(index.files), file_root=index.root)
        images = fn.resize(fn.decoders.image(encoded), size=(20, 28))
        mixed, targets = stage(images, ids, size=(20, 28))
        return images, mixed, *targets, ids

    pipeline, planner = define(), stage.planner()
    images, mixed, label, partner, mu, ids = (out.as_array() for out in pipeline.run())
    rows = planner(ids[:, 0].astype(int), np.zeros(10, int), np.tile([20, 28], (10, 1)))
    part = {key: rows[:, where].squeeze() for key, where in planner.columns.items()}
    erased = images.astype(np.float64)
    for image, (y, x, h, w) in zip(erased, part["box"].astype(int), strict=True):
        assert h * w > 0
        image[y : y + h, x : x + w] = 0
    source = part["source"].astype(int)
    weight = mu.reshape(10, 1, 1, 1)
    np.testing.assert_allclose(mixed, weight * erased + (1 - weight) * erased[source], atol=1e-3)
    np.testing.assert_array_equal(partner, label[source])
    np.testing.assert_array_equal(label[:, 0], index.labels[ids[:, 0]])
    assert set(part["status"]) == {Status.ERASED | Status.MIXED_IN_BATCH}


@pytest.mark.parametrize(
    ("names", "settings", "moves"),
    [
        ("scae", {}, False),
        ("none", {}, False),
        ("keep_augment", {"mode": "cut"}, False),
        ("keep_augment", {"mode": "paste"}, True),
        ("scae+mixup", {}, False),
        ("mine.shear+scae", {}, True),
    ],
)
def test_a_stage_tells_whether_it_moves_pixels(index, users, names, settings, moves):
    users("shear", kinds=("policy",))
    settings = settings | ({"scae": {"mix_prob": 0.0}} if "+" in names else {})
    stage = Stage(index, names, epochs=1, batch_size=2, seed=0, **settings)
    assert stage.moves_pixels is moves
