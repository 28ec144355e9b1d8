"""MixUp, CutMix and SaliencyMix: the pixels that leave pipelines, against oracles in NumPy."""

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def

from pipelines import files, memory
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.data.pixels import ArrayImages
from scae_dali.methods import Status
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.order import Order
from scae_dali.stage import memory as engine
from scae_dali.stage.loader import Loader
from scae_dali.stage.stage import Stage

NAMES = ("mixup", "cutmix", "saliency_mix")
SWITCHED = "mixup|cutmix"
SIZE, BATCH = 24, 16
CROPS = {"pad": CropConfig(kind="pad", pad=5), "resized": CropConfig(area=(0.2, 1.0))}
KINDS = ("memory pad", "memory resized", "files pad", "files resized")


class Data:
    """A data set with its cache, and pipelines of it; its 63 images make 4 batches."""

    def __init__(self, index, cache):
        self.index, self.cache = index, cache
        self.images = ArrayImages.from_index(index, threads=1)

    def stage(self, name, num_shards=1, **settings):
        shared = {"epochs": 3, "batch_size": BATCH, "seed": 8, "num_shards": num_shards}
        return Stage(self.index, name, cache=self.cache, **shared, **settings)

    def pipeline(self, kind, name, *, layout="NCHW", shard=0, num_shards=1, state=None, **settings):
        """The pipeline, its order, and where the columns of its plan lie."""
        stage = self.stage(name, num_shards, **settings)
        run = ExecConfig(batch_size=BATCH, threads=1, shard=shard, num_shards=num_shards)
        crop = CROPS[kind.split()[1]]
        image = ImageConfig(size=SIZE, val_resize=SIZE, crop=crop, layout=layout)
        if kind.startswith("files"):
            order = None
            pipeline = files.train_pipeline(stage, image, run, seed=8, checkpoint=state)
        else:
            order = Order(
                self.index.labels, batch_size=BATCH, seed=8, shard=shard, num_shards=num_shards
            )
            pipeline = memory.train_pipeline(
                stage, self.images, order, image, run, checkpoint=state
            )
        return pipeline, order, stage.planner(crop).columns

    def batches(self, n, kind, name, **keywords):
        """n batches: (pictures [B, H, W, 3], {name: column}), of padding samples too."""
        pipeline, _, columns = self.pipeline(kind, name, **keywords)
        channels_last = keywords.get("layout") == "NHWC"
        for _ in range(n):
            images, rows = (out.as_array().copy() for out in pipeline.run())
            part = {key: rows[:, where].squeeze() for key, where in columns.items()}
            yield images if channels_last else images.transpose(0, 2, 3, 1), part

    def loader(self, *what, position=0, **keywords):
        pipeline, order, _ = self.pipeline(*what, **keywords)
        shared = {"drop_last": False, "position": position, "order": order}
        return Loader(pipeline, files.OUTPUTS, self.index, **shared)


@pytest.fixture(scope="module")
def data(tailed, tailed_cache):
    return Data(tailed, tailed_cache)


def mix_by_hand(name, first, second, part, k):
    """What sample k must look like: of two pictures, each in its own flip, as the plan says."""
    if name == "mixup" or (name == SWITCHED and part["weight"][k] < 1):
        return part["mu"][k] * first + (1 - part["mu"][k]) * second
    y, x = part["paste_anchors"][k, 2:].astype(int)
    h, w = part["paste_shapes"][k, 2:].astype(int)
    if part["flip"][k]:  # of the picture, not of the crop
        x = SIZE - x - w
    out = first.copy()
    out[y : y + h, x : x + w] = second[y : y + h, x : x + w]
    return out


def check_pictures(data, kind, name, n=8, **keywords):
    """Against the pipeline without augmentation, which has the same crops and flips. Returns how
    many samples are mixed with one of the other flip, and with one of the same."""
    where = {key: value for key, value in keywords.items() if key in ("shard", "num_shards")}
    plain, seen = data.batches(n, kind, "none", **where), []
    for (pictures, part), (before, own) in zip(
        data.batches(n, kind, name, **keywords), plain, strict=True
    ):
        np.testing.assert_array_equal(part["id"], own["id"])
        np.testing.assert_array_equal(part["flip"], own["flip"])
        source = part["source"].astype(int)
        for k in range(BATCH):
            wanted = mix_by_hand(name, before[k], before[source[k]], part, k)
            if "mixup" in name:
                np.testing.assert_allclose(pictures[k], wanted, atol=1e-5)
            else:
                np.testing.assert_array_equal(pictures[k], wanted)
            mixed = part["status"][k] == Status.MIXED_IN_BATCH
            assert mixed or (pictures[k] == before[k]).all()
            if mixed and source[k] != k and part["id"][source[k]] != part["id"][k]:
                assert 1 - part["mu"][k] < 0.01 or (pictures[k] != before[k]).any()
                seen.append(part["flip"][k] != part["flip"][source[k]])
    return sum(seen), len(seen) - sum(seen)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_mixed_of_two_crops_each_in_its_own_flip(data, kind, name, layout):
    assert min(check_pictures(data, kind, name, layout=layout, prob=0.8)) > 20


@pytest.mark.parametrize("backend", ["python", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_also_with_one_draw_for_the_batch(data, name, backend):
    """Some batches are mixed, some are not."""
    for kind in ("memory pad", "files resized"):
        check_pictures(data, kind, name, per="batch", prob=0.5, backend=backend)


@pytest.mark.parametrize("backend", ["python", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_some_batches_are_mixed_by_one_method_and_some_by_the_other(data, kind, backend):
    settings = {"mixup": {"prob": 0.8}, "cutmix": {"prob": 0.8}}
    assert min(check_pictures(data, kind, SWITCHED, backend=backend, **settings)) > 20
    parts = [part for _, part in data.batches(8, kind, SWITCHED, **settings)]
    assert {bool((part["weight"] < 1).any()) for part in parts} == {False, True}


@pytest.mark.parametrize("kind", ["memory pad", "files resized"])
def test_shards_mix_within_themselves(data, kind):
    seen = []
    for shard in (0, 1):
        where = {"shard": shard, "num_shards": 2}
        assert min(check_pictures(data, kind, "saliency_mix", n=4, prob=1.0, **where)) > 5
        loader = data.loader(kind, "saliency_mix", **where)
        seen.append([i for batch in loader for i in batch.ids.tolist()])
    assert sorted(seen[0] + seen[1]) == list(range(63))


def told(batch):
    """All that the network and the loss get of a batch."""
    rest = (batch.labels, batch.partners, batch.mu, batch.ids, batch.status, batch.boxes)
    return (batch.images.numpy().tobytes(), *(values.tolist() for values in rest))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loader_tells_the_labels_of_both(data, kind):
    loader = data.loader(kind, "cutmix")
    labels = data.index.labels
    for given, (_, part) in zip(loader, data.batches(4, kind, "cutmix"), strict=True):
        n = len(given.ids)
        second = part["id"].astype(int)[part["source"].astype(int)]
        assert given.ids.tolist() == part["id"][:n].tolist()
        assert given.labels.tolist() == labels[given.ids].tolist()
        assert given.partners.tolist() == labels[second][:n].tolist()
        assert given.mu.tolist() == part["mu"][:n].astype(np.float32).tolist()
        assert set(given.status.tolist()) == {Status.MIXED_IN_BATCH}
        assert (given.boxes == 0).all()


@pytest.mark.parametrize("position", [0, 3, 4, 5])
@pytest.mark.parametrize(
    ("kind", "name", "per"),
    [
        ("memory pad", "mixup", "batch"),
        ("files pad", "cutmix", "sample"),
        ("files resized", "saliency_mix", "batch"),
        ("files resized", SWITCHED, "sample"),
    ],
)
def test_a_resume_gives_the_same_batches(data, kind, name, per, position):
    """Saved after some batches (4 to an epoch), restored, run to the end of the next epoch."""
    what = {"per": per, "prob": 0.7}
    if name == SWITCHED:
        what = dict.fromkeys(name.split("|"), what)
    whole = data.loader(kind, name, **what)
    wanted = [told(given) for _ in range(3) for given in whole]
    first = data.loader(kind, name, **what)
    epoch, within = divmod(position, 4)
    for _ in range(epoch):
        list(first)
    batches = iter(first)
    for _ in range(within):
        next(batches)
    again = data.loader(kind, name, state=first.state(), position=within, **what)
    rest = [told(given) for _ in range(2) for given in again]
    assert rest == wanted[position : 4 * (epoch + 2)]


def test_making_fewer_batches_at_once_changes_nothing(data, monkeypatch):
    wanted = [told(given) for given in data.loader("memory pad", "saliency_mix")]
    for at_once in (1, 32, 48):  # 1, 2 and 3 of the 4 batches of an epoch
        monkeypatch.setattr(engine, "SAMPLES_AT_ONCE", at_once)
        assert [told(given) for given in data.loader("memory pad", "saliency_mix")] == wanted


@pytest.mark.parametrize("backend", ["python", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_a_stage_called_in_somebody_elses_pipeline(index, cache, name, backend):
    """Crops of its own, not square, of JPEGs of many sizes; no flip, and no conditionals."""
    stage = Stage(
        index, name, cache=cache, epochs=3, batch_size=BATCH, seed=2, backend=backend, prob=0.8
    )

    @pipeline_def(batch_size=BATCH, num_threads=1, device_id=None)
    def define():
        encoded, ids = fn.readers.file(
            files=list(index.files), file_root=index.root, pad_last_batch=True
        )
        shapes = fn.peek_image_shape(encoded)
        start, size = fn.random_crop_generator(shapes, seed=1)
        images = fn.decoders.image_slice(encoded, start=start, shape=size, axis_names="HW")
        images = fn.resize(images, size=(20, 28))
        mixed, targets = stage(images, ids, window=(start, size, shapes))
        return images, mixed, *targets, ids, start, size, shapes[:2]

    pipeline, planner, seen = define(), stage.planner(), 0
    for k in range(5):
        images, mixed, label, partner, mu, ids, *window = (
            out.as_array().copy() for out in pipeline.run()
        )
        ids = ids[:, 0].astype(np.int64)
        window = np.concatenate(window, axis=1).astype(np.float64)
        size_px = np.tile([20, 28], (BATCH, 1))
        rows = planner(ids, np.full(BATCH, k), size_px, window)
        part = {key: rows[:, where].squeeze() for key, where in planner.columns.items()}
        part["flip"] = np.zeros(BATCH)
        source = part["source"].astype(int)
        np.testing.assert_array_equal(label[:, 0], index.labels[ids])
        np.testing.assert_array_equal(partner[:, 0], index.labels[ids[source]])
        np.testing.assert_array_equal(mu[:, 0], part["mu"].astype(np.float32))
        for i in range(BATCH):
            wanted = mix_by_hand(name, images[i], images[source[i]], part, i)
            np.testing.assert_allclose(mixed[i], wanted, atol=1e-3 if name == "mixup" else 0)
        seen += (mu < 1).sum()
    assert seen > 40
