"""Which pipeline serves which data: files, archives and arrays give the same batches, in the same
order."""

import numpy as np
import pytest
import torch
from packs import pack_tars, pack_tfrecords

from pipelines import files, memory
from pipelines.config import ExecConfig, ImageConfig
from pipelines.data import Data
from pipelines.loaders import Loaders
from scae_dali.data.index import ImageIndex
from scae_dali.data.pixels import ArrayImages
from scae_dali.methods import Status
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.order import Order, epoch_size
from scae_dali.stage.stage import Stage

IMAGE = ImageConfig(size=24, val_resize=24, crop=CropConfig(kind="pad", pad=4))
EPOCHS = 3


@pytest.fixture(scope="module")
def sources(tailed, tmp_path_factory):
    """The same data as files, arrays and archives; validation is on every third sample."""
    third = np.arange(0, 63, 3)
    val = tailed.subset(third)
    pixels = ArrayImages.from_index(tailed, threads=1).pixels
    folder = tmp_path_factory.mktemp("packed")
    tars = ImageIndex.from_webdataset(pack_tars(tailed, folder), folder)
    pattern = pack_tfrecords(tailed, folder / "records")
    records = ImageIndex.from_tfrecord(pattern, folder / "records")
    return {
        "files": Data(tailed, val),
        "memory": Data(tailed, val, pixels, pixels[::3]),
        "tars": Data(tars, tars.subset(third)),
        "records": Data(records, records.subset(third)),
    }


def training(
    data, cache, sampling, *, batch_size=10, shard=0, num_shards=1, state=None, position=0,
    epoch_length="largest", samples_per_turn=1,
):  # fmt: skip
    index = data.train
    stage = Stage(
        index,
        "scae",
        epochs=EPOCHS,
        batch_size=batch_size,
        seed=2,
        cache=cache,
        num_shards=num_shards,
        epoch_size=epoch_size(index.labels, sampling, epoch_length),
    )
    run = ExecConfig(batch_size=batch_size, threads=1, shard=shard, num_shards=num_shards)
    loaders = Loaders(
        data,
        IMAGE,
        sampling=sampling,
        seed=2,
        epoch_length=epoch_length,
        samples_per_turn=samples_per_turn,
    )
    return loaders.train(stage, run, checkpoint=state, position=position)


def check_same(mine, other):
    """Batch by batch; mixed pixels may differ by one grey level, where a half is rounded."""
    for one, two in zip(mine, other, strict=True):
        for name in ("ids", "labels", "partners", "mu", "status", "boxes"):
            assert getattr(one, name).tolist() == getattr(two, name).tolist()
        differ = (one.images - two.images).abs().amax((1, 2, 3))
        assert (differ[one.status != Status.MIXED] == 0).all()
        assert (differ < 1.01 / 57).all()


@pytest.mark.parametrize("name", ["memory", "tars", "records"])
def test_class_balanced_files_and_others_are_the_same_batch_by_batch(sources, tailed_cache, name):
    """Also the pixels of partners, which are read from wherever the first ones are."""
    files, others = (
        training(sources[one], tailed_cache, "class_balanced") for one in ("files", name)
    )
    assert len(files) == len(others) == 5 * 40 // 10
    for _ in range(EPOCHS):
        mine, yours = list(files), list(others)
        check_same(mine, yours)
        status = torch.cat([batch.status for batch in mine])
        assert (status == Status.MIXED).sum() > 10
        if name != "memory":
            same = [(a.images == b.images).all() for a, b in zip(mine, yours, strict=True)]
            assert all(same)


@pytest.mark.parametrize("name", ["files", "memory"])
def test_class_balanced_gives_every_class_as_often_and_never_the_same_picture(
    sources, tailed_cache, name
):
    loader = training(sources[name], tailed_cache, "class_balanced")
    for _ in range(EPOCHS):
        batches = list(loader)
        ids = torch.cat([batch.ids for batch in batches])
        labels = torch.cat([batch.labels for batch in batches])
        assert torch.bincount(labels).tolist() == [40] * 5
        counts = torch.bincount(ids)
        for k, n in enumerate(sources[name].train.class_counts):
            mine = counts[torch.from_numpy(sources[name].train.labels == k)]
            assert set(mine.tolist()) <= {40 // n, -(-40 // n)}
        # One sample 40 times: shifts, flips, rectangles and weights are drawn each time.
        pictures = torch.cat([batch.images for batch in batches])[ids == 62]
        assert len({one.numpy().tobytes() for one in pictures}) > 30
        status = torch.cat([batch.status for batch in batches])[ids == 62]
        assert {0, int(Status.MIXED)} < set(status.tolist())


@pytest.mark.parametrize("name", ["files", "memory"])
def test_an_epoch_of_the_datasets_length_shows_several_of_a_class_in_a_row(
    sources, tailed_cache, name
):
    """63 samples: 6 batches of 10, in which five classes take turns of 4. Batch 3 goes on from a
    state that the first loader gave."""

    def make(**keywords):
        more = {"epoch_length": "dataset", "samples_per_turn": 4} | keywords
        return training(sources[name], tailed_cache, "class_balanced", **more)

    loader = make()
    assert len(loader) == 6
    epochs = [list(loader) for _ in range(EPOCHS)]
    for batches in epochs:
        labels = torch.cat([batch.labels for batch in batches]).reshape(15, 4)
        assert (labels == labels[:, :1]).all()
        assert labels[:, 0].bincount().tolist() == [3] * 5
    first = make()
    check_same(first, epochs[0])
    batches = iter(first)
    check_same([next(batches) for _ in range(3)], epochs[1][:3])
    again = make(state=first.state(), position=3)
    check_same(again, epochs[1][3:])
    check_same(again, epochs[2])


@pytest.mark.parametrize("name", ["files", "memory", "tars"])
@pytest.mark.parametrize(
    ("sampling", "batch_size", "position"),
    [
        ("class_balanced", 10, 7),
        ("class_balanced", 10, 20),  # of 20, which are the whole epoch
        ("shuffle", 9, 7),  # of 7, likewise
        ("shuffle", 10, 2),
        ("shuffle", 10, 6),  # of 6; 3 samples are left
    ],
)
def test_an_epoch_goes_on_where_it_was_left(
    sources, tailed_cache, name, sampling, batch_size, position
):
    """In a loader that is made anew from the first one's state, and in the first one itself."""

    def make(**keywords):
        data = sources[name]
        return training(data, tailed_cache, sampling, batch_size=batch_size, **keywords)

    whole = make()
    reference = [list(whole) for _ in range(EPOCHS)]
    first = make()
    check_same(first, reference[0])
    batches = iter(first)
    check_same([next(batches) for _ in range(position)], reference[1][:position])
    again = make(state=first.state(), position=position)
    for loader in (again, first):
        if loader is again or position < len(first):  # else the epoch is over in the first one
            check_same(loader, reference[1][position:])
        check_same(loader, reference[2])


@pytest.mark.parametrize("name", ["files", "memory", "tars"])
@pytest.mark.parametrize("sampling", ["shuffle", "class_balanced"])
def test_all_ranks_take_as_many_full_steps_over_different_samples(
    sources, tailed_cache, name, sampling
):
    """63 samples on 4 ranks: 15 or 16 each; of 200, 50 each."""
    loaders = [
        training(sources[name], tailed_cache, sampling, batch_size=7, shard=shard, num_shards=4)
        for shard in range(4)
    ]
    steps = 2 if sampling == "shuffle" else 7
    for _ in range(2):
        every = [list(loader) for loader in loaders]
        assert [[len(batch.ids) for batch in batches] for batches in every] == [[7] * steps] * 4
        given = [batch for batches in every for batch in batches]
        if sampling == "shuffle":
            assert len({i for batch in given for i in batch.ids.tolist()}) == 4 * 14
        else:
            labels = torch.cat([batch.labels for batch in given])
            assert torch.bincount(labels).min() >= 36  # of 40, before batches are filled


def test_a_shuffle_holds_every_sample_and_that_of_files_is_dalis_own(sources, tailed_cache):
    orders = {}
    for name, data in sources.items():
        loader = training(data, tailed_cache, "shuffle", batch_size=9)
        orders[name] = [torch.cat([batch.ids for batch in loader]).tolist() for _ in range(2)]
        assert all(sorted(ids) == list(range(63)) for ids in orders[name])
        assert orders[name][0] != orders[name][1]
    assert orders["files"] != orders["memory"] == orders["tars"] == orders["records"]


@pytest.mark.parametrize("name", ["memory", "tars", "records"])
def test_validation_and_saliency_pass_are_the_same_of_files_and_others(sources, name):
    image = ImageConfig(size=20, val_resize=22)
    run = ExecConfig(batch_size=8, threads=1)
    files, others = (
        Loaders(sources[one], image, sampling="class_balanced", seed=0) for one in ("files", name)
    )
    for _ in range(2):
        batches = list(others.val(run))
        check_same(files.val(run), batches)
        assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(21))
    ids = [5, 61, 5, 0, 40, 41, 42, 43, 60]
    batches = list(others.saliency(image, run, ids))
    check_same(files.saliency(image, run, ids), batches)
    assert torch.cat([batch.ids for batch in batches]).tolist() == ids


def test_a_stage_that_would_count_other_epochs_is_refused(tailed, sources):
    stage = Stage(tailed, "none", epochs=3, batch_size=10, seed=0)
    images = ArrayImages(tailed, sources["memory"].train_pixels)

    def make(run, **keywords):
        order = Order(tailed.labels, seed=0, **{"batch_size": 10} | keywords)
        return (
            lambda: memory.train_pipeline(stage, images, order, IMAGE, run),
            lambda: files.train_pipeline(stage, IMAGE, run, seed=0, order=order),
        )

    run = ExecConfig(batch_size=10, threads=1)
    for define in make(run, sampling="class_balanced"):
        with pytest.raises(
            ValueError, match=r"got \(20, 0\) and \(7, 0\); give the stage epoch_size=200 and num_s"
        ):
            define()
    for define in make(run, start_epoch=1):
        with pytest.raises(ValueError, match=r"start_epoch, got \(7, 1\) and \(7, 0\)"):
            define()
    for define in make(run, num_shards=2):
        with pytest.raises(ValueError, match=r"got \(4, 0\) and \(7, 0\); .* num_shards=2"):
            define()
    for define in make(run, batch_size=9):
        with pytest.raises(ValueError, match=r"batch_size must be the same .*got \(9, 10, 10\)"):
            define()
    for define in make(ExecConfig(batch_size=9, threads=1)):
        with pytest.raises(ValueError, match=r"batch_size must be the same .*got \(10, 10, 9\)"):
            define()
