"""CMO: who is mixed with whom, when, and by which box; and that the pixels are those."""

import dataclasses
import re
import sys
import types

import numpy as np
import pytest
from boxes import check_cutmixs, oracle_box, pasted
from conftest import fill_cache
from crops import shifted
from nvidia.dali import fn, pipeline_def
from nvidia.dali import types as dali_types
from PIL import Image
from plans import brute_saliency
from scipy import stats

from pipelines import files, memory
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.cache import SaliencyCache
from scae_dali.data.index import ImageIndex
from scae_dali.data.pixels import ArrayImages
from scae_dali.methods import Run, Samples, Status, batch, compose, load, make_config
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.order import Order
from scae_dali.plan.random import Stream
from scae_dali.stage.loader import Loader
from scae_dali.stage.stage import Stage

COUNTS = (400, 100, 0, 20, 5)
LABELS = np.random.default_rng(4).permutation(np.repeat(np.arange(5), COUNTS))
T = 10
ALWAYS = {"skip_first": 0, "skip_last": 0}


def method(maps=None, seed=3, epochs=T, **settings):
    run = Run(
        seed=seed,
        epochs=epochs,
        labels=LABELS,
        class_counts=np.array(COUNTS),
        saliency=maps,
    )
    module = load("cmo")
    return module.Method(make_config(module, settings), run)


def samples(batches, size=16, *, epoch=5, first=0, crop=(32, 32)):
    rng = np.random.default_rng(0)
    n = batches * size
    ids = rng.integers(0, len(LABELS), n)
    return Samples(
        ids=ids,
        keys=ids | np.arange(n) << 32,
        labels=LABELS[ids],
        epoch=np.full(n, epoch),
        window=np.tile([0.0, 0.0, 1.0, 1.0], (n, 1)),
        size_px=np.tile(np.array(crop), (n, 1)),
        iteration=first + np.arange(n) // size,
        place=np.arange(n) % size,
        flip=rng.random(n) < 0.5,
    )


def test_defaults_are_the_papers():
    config = load("cmo").Config()
    assert (config.prob, config.alpha, config.per, config.weight_power) == (0.5, 1.0, "batch", 1.0)
    assert (config.skip_first, config.skip_last) == (3, 3)
    assert (config.saliency, config.guided) == (False, False)
    assert load("cmo").Config(saliency=True).guided


@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("crop", [(32, 32), (56, 40), (5, 9)])
def test_boxes_and_weights_are_cutmixs(per, crop):
    one, these = method(per=per, prob=0.6), samples(100, 10, crop=crop)
    plan = one.plan(these)
    mixed, lam, u = batch.draw(these, one.run, one.config)
    assert len(these.ids) == 1000
    check_cutmixs(plan, mixed, lam, u, crop)
    np.testing.assert_array_equal(plan["status"], np.where(mixed, Status.MIXED, 0))
    np.testing.assert_array_equal(plan["partner_id"][~mixed], these.ids[~mixed])
    assert 0.3 < mixed.mean() < 0.9


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_half_of_the_batches_are_mixed_and_three_tenths_pasted(per):
    n = 4000
    plan = method(per=per).plan(samples(n, 3))
    mixed, share = (plan["status"] > 0).reshape(n, 3), (1 - plan["mu"]).reshape(n, 3)
    alike = (mixed == mixed[:, :1]).all(axis=1) & (share == share[:, :1]).all(axis=1)
    assert alike.all() if per == "batch" else alike.mean() < 0.3
    assert stats.binomtest(int(mixed[:, 0].sum()), n, 0.5).pvalue > 1e-3
    assert share[:, 0][mixed[:, 0]].mean() == pytest.approx(0.30, abs=0.015)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2])
def test_second_images_are_drawn_from_the_whole_set_by_the_size_of_their_class(power):
    these = samples(2500, 16)
    plan = method(prob=1.0, weight_power=power).plan(these)
    partner = plan["partner_id"]
    sizes = np.array(COUNTS)[LABELS].astype(float)
    by_weight = method(weight_power=power).partner_weights(LABELS[:2], LABELS)
    np.testing.assert_allclose(by_weight, np.tile(sizes**-power, (2, 1)))
    wanted = sizes**-power / (sizes**-power).sum()
    found = np.bincount(partner, minlength=len(LABELS))
    assert stats.chisquare(found, wanted * len(partner)).pvalue > 1e-3
    by_class = [found[k == LABELS].sum() for k in (0, 1, 3, 4)]
    if power == 1:
        assert stats.chisquare(by_class).pvalue > 1e-3
    other = sizes ** -(power + 0.2)  # the test can fail
    assert stats.chisquare(found, other / other.sum() * len(partner)).pvalue < 1e-6
    # Whatever the class of the first image.
    table = np.zeros((4, 4))
    of = {0: 0, 1: 1, 3: 2, 4: 3}
    np.add.at(table, ([of[k] for k in these.labels], [of[k] for k in LABELS[partner]]), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize(("first", "last"), [(3, 3), (0, 0), (2, 0), (0, 1), (4, 5)])
def test_nothing_is_mixed_in_the_first_and_last_epochs(first, last):
    one = method(prob=1.0, skip_first=first, skip_last=last)
    mixed = [(one.plan(samples(4, epoch=t))["status"] > 0).all() for t in range(T + 2)]
    # A pipeline that reads ahead plans for the epochs T and on as for the last one.
    assert mixed == [first <= t < T - last for t in range(T)] + 2 * [last == 0]
    quiet = method(skip_first=first, skip_last=last).plan(samples(4, epoch=T - 1))
    if last:
        assert (quiet["mu"] == 1).all()
        assert (pasted(quiet)[:, 2:] == 0).all()


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_a_plan_hangs_on_seed_epoch_key_and_the_batchs_number(per):
    """Not on the other samples of the batch; batches planned at once are those planned alone."""
    one, these = method(stored, per=per, saliency=True), samples(6)
    whole = one.plan(these)
    for k in range(6):
        part = np.arange(16 * k, 16 * k + 16)
        for key, value in one.plan(these.take(part[::-1])).items():
            np.testing.assert_array_equal(value, whole[key][part[::-1]])
    always = method(per=per, prob=1.0)
    partner = always.plan(these)["partner_id"]
    moved = always.plan(dataclasses.replace(these, iteration=these.iteration + 90))
    np.testing.assert_array_equal(moved["partner_id"], partner)
    later = always.plan(dataclasses.replace(these, epoch=these.epoch - 1))["partner_id"]
    assert (later != partner).mean() > 0.8
    assert (method(seed=4, per=per, prob=1.0).plan(these)["partner_id"] != partner).mean() > 0.8


def test_a_stage_that_begins_later_plans_what_the_whole_run_does(index):
    ids = np.random.default_rng(2).integers(0, len(index), 240)

    def plan(start_epoch, first):
        stage = Stage(index, "cmo", epochs=9, batch_size=10, seed=1, start_epoch=start_epoch)
        planner = stage.planner(CropConfig())
        size = np.full((240, 2), 32)
        return planner(ids, first + np.arange(240) // 10, size, size + 9.0)

    whole = plan(0, first=15)
    np.testing.assert_array_equal(plan(3, first=0), whole)
    assert (plan(0, first=10) != whole).any()


MAPS = np.random.default_rng(5).integers(0, 256, (len(LABELS), 7, 7), np.uint8)


def stored(ids):
    """Every third map is missing, every third flat."""
    maps = MAPS[ids]
    maps[ids % 3 == 0] = 0
    maps[ids % 3 == 1] = 77
    return maps, ids % 3 != 0


def settled(one, plan, seed=1):
    """The rows of mixed samples, before and after, with windows and flips."""
    rows = np.flatnonzero(plan["status"] & Status.MIXED)
    rng = np.random.default_rng(seed)
    window = np.concatenate(
        [rng.uniform(-0.2, 0.6, (len(rows), 2)), rng.uniform(0.2, 0.9, (len(rows), 2))], axis=1
    )
    flip = rng.random(len(rows)) < 0.5
    part = {key: value[rows].astype(float) for key, value in plan.items()}
    return rows, part, part | one.settle(part, window, flip), window, flip


def test_the_box_is_centred_on_the_peak_of_the_second_images_map():
    crop = (26, 20)
    one, these = method(stored, saliency=True, prob=0.9, per="sample"), samples(60, crop=crop)
    plan = one.plan(these)
    _, lam, _ = batch.draw(these, one.run, one.config)
    rows, before, after, window, flip = settled(one, plan)
    boxes, seen = pasted(after), set()
    for k, row in enumerate(rows):
        partner = plan["partner_id"][row]
        missing = {0: Status.NO_MAP, 1: Status.FLAT_MAP, 2: 0}[partner % 3]
        assert after["status"][k] == Status.MIXED | missing
        seen.add((int(missing), bool(flip[k])))
        if missing:
            assert boxes[k].tolist() == pasted(before)[k].tolist()
            assert after["mu"][k] == before["mu"][k]
            continue
        values = brute_saliency(MAPS[partner] / 255, window[k], *crop)
        peaks = np.argwhere(values > values.max() - 1e-12).tolist()
        if flip[k]:
            peaks = [[y, crop[1] - 1 - x] for y, x in peaks]
        assert boxes[k].tolist() in [oracle_box(lam[row], peak, crop) for peak in peaks]
        assert after["mu"][k] == 1 - boxes[k, 2] * boxes[k, 3] / (crop[0] * crop[1])
    assert len(seen) == 6


def test_a_crop_that_shows_nothing_salient_is_pasted_anywhere():
    """Maps with one salient cell, at the lower right of the image; half of the crops leave it
    out."""
    maps = np.zeros((len(LABELS), 7, 7), np.uint8)
    maps[:, 6, 6] = 255
    one = method(lambda ids: (maps[ids], np.ones(len(ids), bool)), saliency=True, prob=1.0)
    plan = one.plan(samples(40))
    n = len(plan["status"])
    part = {key: value.astype(float) for key, value in plan.items()}
    shown = np.arange(n) % 2 == 0
    window = np.where(shown[:, None], [[0.5, 0.5, 0.5, 0.5]], [[0.1, 0.0, 0.5, 0.8]])
    after = part | one.settle(part, window, np.zeros(n, bool))
    assert (after["status"] == Status.MIXED).all()
    np.testing.assert_array_equal(pasted(after)[~shown], pasted(part)[~shown])
    np.testing.assert_array_equal(after["mu"][~shown], part["mu"][~shown])
    boxes = pasted(after)[shown & (after["mu"] < 1)]
    end = boxes[:, :2] + boxes[:, 2:]
    assert ((boxes[:, :2] <= 27) & (end > 27)).all()  # where the cell's centre is, of 32 px


def test_without_a_cache_or_without_saliency_nothing_is_changed():
    for one in (method(saliency=True, **ALWAYS), method(stored, **ALWAYS)):
        _, before, after, *_ = settled(one, one.plan(samples(20)))
        for key, value in before.items():
            np.testing.assert_array_equal(after[key], value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prob": 1.5}, r"prob must be a probability in \[0, 1\], got 1.5"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 100\], got 0.0"),
        ({"per": "epoch"}, "per must be one of sample, batch; got 'epoch'"),
        ({"weight_power": -1.0}, r"weight_power must be in \[0, 10\], got -1.0; the paper's .* 1"),
        ({"skip_first": -1}, "skip_first must be >= 0 epochs, got -1; the paper's value is 3"),
        ({"skip_last": -2}, "skip_last must be >= 0 epochs, got -2"),
        ({"refresh_every": -1}, "refresh_every must be >= 0, got -1"),
        (
            {"skip_first": 6, "skip_last": 4},
            r"below epochs \(10\), got 6 \+ 4: nothing .* 0 \(train.py: --cmo.skip_first 0 --",
        ),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        method(**settings)


def test_what_it_does_not_combine_with():
    run = method().run
    for names in ("scae+cmo", "cmo+mixup", "saliency_mix+cmo"):
        with pytest.raises(ValueError, match=r"do not combine: an image is mixed with one other"):
            compose.make(compose.configs(names, {}), run)
    both = compose.make(compose.configs("cmo+scae", {"scae": {"mix_prob": 0.0}}), run)
    assert both.kinds == ("erase", "mix")
    assert both.mixes
    assert both.pastes


# From here on pixels: every image has a colour of its own, and a mark where its map has its peak.
SIDE, BATCH, EPOCHS = 24, 16, 3
CROPS = {
    "memory pad": CropConfig(kind="pad", pad=0),
    "files pad": CropConfig(kind="pad", pad=0),
    "files resized": CropConfig(area=(0.5, 1.0)),
}
KINDS = [*CROPS]
GREY = {"mean": (0.0,) * 3, "std": (1.0,) * 3}  # so that what comes out is in grey levels


def marks(n):
    """(y, x) of each image's mark, in the cells of a map of 6 x 6."""
    return np.random.default_rng(9).integers(0, 6, (n, 2))


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """63 PNGs, 5 classes: image i is 4·i in its first channel, and red where its mark is."""
    root = tmp_path_factory.mktemp("marked")
    names = [f"{k}/{i:02d}.png" for k, n in zip("abcde", (40, 16, 3, 3, 1), strict=True)
             for i in range(n)]  # fmt: skip
    for i, (name, (y, x)) in enumerate(zip(names, marks(63), strict=True)):
        pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
        pixels[..., 0] = 4 * i
        pixels[4 * y : 4 * y + 4, 4 * x : 4 * x + 4, 1] = 255
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / name)
    return ImageIndex(root)


@pytest.fixture(scope="module")
def marked_cache(marked, tmp_path_factory):
    cache = SaliencyCache.create(
        tmp_path_factory.mktemp("cache") / "marked.lmdb", marked, grid=(6, 6)
    )
    maps = np.zeros((63, 6, 6))
    y, x = marks(63).T
    maps[np.arange(63), y, x] = 1.0
    cache.begin_pass(1)
    cache.write(np.arange(63), maps, epoch=1)
    cache.end_pass(1)
    return cache


def loader(index, kind, names="cmo", *, state=None, position=0, crop=None, shard=0, shards=1,
           batch_size=BATCH, cache=None, **settings):  # fmt: skip
    """All batches are mixed in all epochs, unless the settings say otherwise."""
    own = ALWAYS | {"prob": 1.0}
    if "+" in names:
        own = {"cmo": own | settings.get("cmo", {})}
    settings = own | settings | (own if "+" in names else {})
    stage = Stage(
        index,
        names,
        epochs=EPOCHS,
        batch_size=batch_size,
        seed=8,
        cache=cache,
        num_shards=shards,
        **settings,
    )
    image = ImageConfig(size=SIDE, val_resize=SIDE, crop=crop or CROPS[kind], **GREY)
    run = ExecConfig(batch_size=batch_size, threads=1, shard=shard, num_shards=shards)
    order = Order(index.labels, batch_size=batch_size, seed=8, shard=shard, num_shards=shards)
    if kind.startswith("memory"):
        images = ArrayImages.from_index(index, threads=1)
        pipeline = memory.train_pipeline(stage, images, order, image, run, checkpoint=state)
    else:
        pipeline = files.train_pipeline(stage, image, run, seed=8, order=order, checkpoint=state)
    out = Loader(pipeline, files.OUTPUTS, index, drop_last=False, order=order, position=position)
    return out, stage.planner(image.crop, keyed=True)


def everything(batches):
    """id -> picture [H, W, 3], label, partner, μ, status, box."""
    out = {}
    for b in batches:
        pictures = b.images.numpy().transpose(0, 2, 3, 1)
        told = zip(b.labels, b.partners, b.mu, b.status, b.boxes, strict=True)
        rest = [[v.tolist() for v in values] for values in told]
        out |= {
            i: (picture, *values)
            for i, picture, values in zip(b.ids.tolist(), pictures, rest, strict=True)
        }
    return out


@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_pixels_are_pasted_as_mu_says(marked, kind, per):
    """They are counted in the pictures, and are those of one image of the partner's class."""
    batches, _ = loader(marked, kind, per=per)
    shares, classes = [], np.zeros(5, int)
    for i, (picture, label, partner, mu, status, _) in everything(batches).items():
        number = np.round(picture[..., 0] / 4).astype(int)
        others = set(np.unique(number).tolist()) - {i}
        assert len(others) <= 1
        assert status == Status.MIXED
        assert label == marked.labels[i]
        pasted = number != i
        if others:
            assert partner == marked.labels[others.pop()]
            assert mu == pytest.approx(1 - pasted.mean(), abs=1e-6)
            rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert pasted.sum() == height * width  # a rectangle
            shares.append(pasted.mean())
        classes[partner] += 1
    assert len(shares) > 25
    assert classes[:1].sum() < 30  # 40 of 63 by chance, 13 by the weights


def oracle(planner, ids, epoch, sizes, pixels, erase=None):
    """By NumPy: rows, and the pictures of these ids where crops are windows of the images."""
    n, batches = len(ids), planner.batches_per_epoch
    iteration = epoch * batches + np.arange(n) // planner.batch_size
    rows = planner(ids, iteration, np.full((n, 2), SIDE), sizes.astype(float))
    columns = planner.columns
    mixed = np.flatnonzero(rows[:, columns["status"]][:, 0].astype(int) & Status.MIXED)
    full_px = sizes[rows[mixed, columns["partner_id"].start].astype(int)]
    rows[mixed], window, flip = planner.settle(rows[mixed], full_px, planner.random_crop)
    pictures = []
    for row in rows:
        i, where = int(row[columns["id"]][0]), row[columns["start"].start : columns["shape"].stop]
        picture = shifted(pixels[i], where.astype(int))
        y, x, h, w = row[columns["box"]].astype(int)
        picture[y : y + h, x : x + w] = 0
        pictures.append(picture)
    for k, where, turned in zip(mixed, window, flip, strict=True):
        other = shifted(pixels[int(rows[k, columns["partner_id"].start])], where)
        other = other[:, ::-1] if turned else other
        (y, x), (h, w) = (rows[k, columns[f"paste_{what}"]][2:].astype(int)
                          for what in ("anchors", "shapes"))  # fmt: skip
        pictures[k][y : y + h, x : x + w] = other[y : y + h, x : x + w]
    flips = rows[:, columns["flip"].start] == 1
    return rows, [p[:, ::-1] if f else p for p, f in zip(pictures, flips, strict=True)]


SETS = [
    ("cmo", {}),
    ("cmo", {"saliency": True, "per": "sample", "prob": 0.7}),
    ("random_erasing+cmo", {"random_erasing": {"fill": "zero", "prob": 0.8}}),
    ("scae+cmo", {"scae": {"mix_prob": 0.0, "fill": "zero"}, "cmo": {"saliency": True}}),
]


@pytest.mark.parametrize("kind", ["memory pad", "files pad"])
@pytest.mark.parametrize(("names", "settings"), SETS)
def test_the_pixels_are_those_of_an_oracle(tailed, tailed_cache, kind, names, settings):
    """The image is cropped and erased, then the box is pasted, then all is flipped."""
    crop = CropConfig(kind="pad", pad=5)
    batches, planner = loader(tailed, kind, names, crop=crop, cache=tailed_cache, **settings)
    pixels = ArrayImages.from_index(tailed, threads=1).pixels
    told, sizes = set(), np.full((64, 2), SIDE)
    for epoch in range(EPOCHS):
        seen = everything(batches)
        ids = np.array([*seen])
        rows, pictures = oracle(planner, np.resize(ids, 64), epoch, sizes, pixels)
        for row, wanted, i in zip(rows[:63], pictures, ids, strict=False):
            columns = planner.columns
            np.testing.assert_array_equal(seen[i][0], wanted)
            label, partner, mu, status = (
                row[columns[name]][0] for name in ("label", "partner", "mu", "status")
            )
            assert seen[i][1:5] == (label, partner, np.float32(mu), status)
            assert partner == tailed.labels[int(row[columns["partner_id"]][0])]
            told.add(int(status))
    assert any(status & Status.MIXED for status in told)
    assert any(status & Status.ERASED for status in told) == ("+" in names)


@pytest.mark.parametrize("kind", KINDS)
def test_with_saliency_the_second_images_mark_comes_along(marked, marked_cache, kind):
    """Unless it is outside the second image's crop."""
    along = {}
    for saliency in (True, False):
        batches, _ = loader(
            marked, kind, per="sample", saliency=saliency, cache=marked_cache, alpha=5.0
        )
        hits = []
        for i, (picture, *_) in everything(batches).items():
            number = np.round(picture[..., 0] / 4).astype(int)
            pasted = number != i
            if pasted.any():
                hits.append((picture[..., 1][pasted] > 128).any())
        along[saliency] = np.mean(hits)
    assert along[True] > (0.9 if kind == "files resized" else 0.999)
    assert along[False] < 0.85


def check_same(one, other):
    assert sorted(one) == sorted(other)
    for i in one:
        np.testing.assert_array_equal(one[i][0], other[i][0])
        assert one[i][1:] == other[i][1:]


SALIENT = {"saliency": True, "per": "sample", "prob": 0.6}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_the_same_in_any_batch_and_on_any_number_of_shards(marked, marked_cache, kind):
    shared = {"cache": marked_cache, **SALIENT}
    reference, _ = loader(marked, kind, **shared)
    epochs = [everything(reference) for _ in range(2)]
    for batch_size in (1, 20):
        other, _ = loader(marked, kind, batch_size=batch_size, **shared)
        for one in epochs:
            check_same(everything(other), one)
    halves = [loader(marked, kind, shard=shard, shards=2, **shared)[0] for shard in (0, 1)]
    for one in epochs:
        first, second = map(everything, halves)
        assert not first.keys() & second.keys()
        check_same(first | second, one)


@pytest.mark.parametrize(
    ("kind", "names"), [*((kind, "cmo") for kind in KINDS), ("files pad", "auto_augment+cmo")]
)
def test_a_resumed_run_goes_on_alike(marked, marked_cache, kind, names):
    settings = {"prob": 0.5, "saliency": True}
    settings = {"cmo": settings} if "+" in names else settings
    shared = {"cache": marked_cache, **settings}
    first, _ = loader(marked, kind, names, **shared)
    begun = iter(first)
    everything([next(begun), next(begun)])
    again, _ = loader(marked, kind, names, state=first.state(), position=2, **shared)
    check_same(everything(again), everything(begun))
    check_same(everything(again), everything(first))


def test_files_and_memory_and_both_operators_give_the_same(tailed, tailed_cache):
    crop = CropConfig(kind="pad", pad=5)
    for names, settings in (
        ("rand_augment+cmo", {"rand_augment": {"n": 1}}),
        ("random_erasing+cmo", {"random_erasing": {"fill": "color"}, "cmo": SALIENT}),
    ):
        shared = {"names": names, "crop": crop, "cache": tailed_cache, **settings}
        wanted = everything(loader(tailed, "memory pad", **shared)[0])
        for kind, backend in (("files pad", "python"), ("files pad", "torch")):
            check_same(everything(loader(tailed, kind, backend=backend, **shared)[0]), wanted)


@pytest.mark.parametrize("kind", ["memory pad", "files pad"])
def test_a_policy_transforms_what_is_pasted_on_its_own(marked, monkeypatch, kind):
    """A policy that adds a level to the third channel, which is 0: by the draws of each image."""
    module = types.ModuleType("mine.level")

    class Method:
        kinds, fields = ["policy"], {"level": 1}  # a user may write a list

        def __init__(self, config, run):
            self.run = run

        def plan(self, samples):
            level = 1 + np.floor(200 * samples.draw(self.run, Stream.POLICY, 1)[:, 0])
            return {"status": 0 * samples.ids, "level": level}

        def apply(self, images, plan):
            blue = dali_types.Constant(np.array([0, 0, 1], np.uint8))
            return images + blue * plan.scalar("level", dali_types.UINT8)

    module.Config, module.Method = load("none").Config, Method
    monkeypatch.setitem(sys.modules, "mine", types.ModuleType("mine"))
    monkeypatch.setitem(sys.modules, "mine.level", module)
    batches, _ = loader(marked, kind, "mine.level+cmo")
    pairs = []
    for i, (picture, *_) in everything(batches).items():
        pasted = np.round(picture[..., 0] / 4).astype(int) != i
        inside, outside = (np.unique(picture[..., 2][where]) for where in (pasted, ~pasted))
        if len(inside) and len(outside):
            assert len(inside) == len(outside) == 1
            pairs.append((inside[0], outside[0]))
    a, b = np.array(pairs).T
    assert len(pairs) > 30
    assert min(a.min(), b.min()) >= 1
    assert (a != b).mean() > 0.9
    assert len(np.unique(a)) > 15


def test_in_somebody_elses_pipeline(marked, marked_cache):
    stage = Stage(
        marked, "cmo", cache=marked_cache, epochs=3, batch_size=21, seed=2, saliency=True,
        prob=1.0, **ALWAYS,
    )  # fmt: skip
    assert stage.conditional

    @pipeline_def(batch_size=21, num_threads=1, device_id=None, enable_conditionals=True)
    def define():
        jpegs, ids = fn.readers.file(files=list(marked.files), file_root=marked.root)
        images = fn.decoders.image(jpegs)
        shown, targets = stage(
            images, ids, size=(SIDE, SIDE), partner_crop=CropConfig(kind="pad", pad=0)
        )
        return shown, *targets, ids

    pipeline = define()
    counted = 0
    for _ in range(3):
        shown, label, partner, mu, ids = (out.as_array() for out in pipeline.run())
        for picture, k, other, weight, i in zip(shown, label, partner, mu, ids, strict=True):
            number = np.round(picture[..., 0] / 4).astype(int)
            pasted = number != i[0]
            assert k[0] == marked.labels[i[0]]
            if pasted.any():
                assert weight[0] == pytest.approx(1 - pasted.mean(), abs=1e-6)
                assert other[0] == marked.labels[number[pasted][0]]
                assert (picture[..., 1][pasted] == 255).any()
                counted += 1
    assert counted > 40


def test_what_it_needs_is_said(marked, tmp_path):
    crop = CropConfig(area=(0.5, 1.0))
    message = "set the method's mix_prob=0, or leave cmo out, or read the images from files"
    with pytest.raises(ValueError, match=re.escape(message)):
        loader(marked, "memory pad", crop=crop)
    cache = fill_cache(tmp_path / "maps.lmdb", marked)
    stage = Stage(marked, "cmo", cache=cache, epochs=9, batch_size=4, seed=1)

    @pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def define():
        jpegs, ids = fn.readers.file(files=list(marked.files), file_root=marked.root)
        return stage(fn.decoders.image(jpegs), ids, size=(SIDE, SIDE))[0]

    with pytest.raises(ValueError, match=r"enable_conditionals must be True .*or leave cmo out"):
        define()
