"""Mixing inside pipelines, of files and of arrays: the pixels, and that they are a function of the
sample alone."""

import numpy as np
import pytest
import torch
from conftest import write_pngs
from crops import shifted
from nvidia.dali import fn, pipeline_def
from PIL import Image

from pipelines import files, memory
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.data.index import ImageIndex
from scae_dali.data.pixels import ArrayImages
from scae_dali.methods import Status
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.order import Order
from scae_dali.stage import memory as engine
from scae_dali.stage.loader import ImageError, Loader
from scae_dali.stage.stage import Stage

SIZE, EPOCHS, SEED = 24, 3, 11
CROPS = {"pad": CropConfig(kind="pad", pad=5), "resized": CropConfig(area=(0.2, 1.0))}
KINDS = ["memory pad", "files pad", "files resized"]
SETTINGS = {"tail": 0.5, "neighbors": 2, "mix_alpha": 1.0}


def image_config(kind, **settings):
    return ImageConfig(size=SIZE, val_resize=SIZE, crop=CROPS[kind.split()[1]], **settings)


class Data:
    """A data set with its cache, and the loaders of it."""

    def __init__(self, index, cache):
        self.index, self.cache = index, cache
        self.images = ArrayImages.from_index(index, threads=1)

    def stage(self, batch_size=16, num_shards=1, **settings):
        return Stage(
            self.index,
            "scae",
            epochs=EPOCHS,
            batch_size=batch_size,
            seed=SEED,
            cache=self.cache,
            num_shards=num_shards,
            **(SETTINGS | settings),
        )

    def loader(
        self,
        kind,
        *,
        batch_size=16,
        shard=0,
        num_shards=1,
        state=None,
        position=0,
        dtype="fp32",
        layout="NCHW",
        **settings,
    ):
        stage = self.stage(batch_size, num_shards, **settings)
        run = ExecConfig(batch_size=batch_size, threads=1, shard=shard, num_shards=num_shards)
        image, order = image_config(kind, dtype=dtype, layout=layout), None
        if kind == "memory pad":
            order = Order(
                self.index.labels,
                batch_size=batch_size,
                seed=SEED,
                shard=shard,
                num_shards=num_shards,
            )
            pipeline = memory.train_pipeline(
                stage, self.images, order, image, run, checkpoint=state
            )
        else:
            pipeline = files.train_pipeline(stage, image, run, seed=SEED, checkpoint=state)
        return Loader(
            pipeline, files.OUTPUTS, self.index, drop_last=False, position=position, order=order
        )


@pytest.fixture(scope="module")
def data(tailed, tailed_cache):
    return Data(tailed, tailed_cache)


def whole(batches):
    """id -> all that the network and the loss get of a sample, and what is told of it."""
    out = {}
    for batch in batches:
        rows = zip(
            batch.images.numpy(),
            batch.labels.tolist(),
            batch.partners.tolist(),
            batch.mu.tolist(),
            batch.status.tolist(),
            batch.boxes.tolist(),
            strict=True,
        )
        ids = batch.ids.tolist()
        assert not out.keys() & set(ids)
        out |= {i: (pixels.tobytes(), *rest) for i, (pixels, *rest) in zip(ids, rows, strict=True)}
    return out


@pytest.fixture(scope="module")
def references(data):
    """Of each kind, the samples of every epoch."""

    def epochs(kind):
        loader = data.loader(kind)
        return [whole(loader) for _ in range(EPOCHS)]

    return {kind: epochs(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def resize(data):
    """By a pipeline of its own, which decodes whole images: (ids, windows int64 [B, 4]) -> crops,
    uint8 [B, SIZE, SIZE, 3]."""

    def crops(ids, windows):
        @pipeline_def(batch_size=len(ids), num_threads=1, device_id=None)
        def define():
            paths = [f"{data.index.root}/{data.index.files[i]}".encode() for i in ids]
            encoded = fn.io.file.read(
                fn.external_source(source=[[np.frombuffer(p, np.uint8) for p in paths]])
            )
            start = fn.external_source(source=[windows[:, :2].astype(np.int32)])
            shape = fn.external_source(source=[windows[:, 2:].astype(np.int32)])
            images = fn.slice(fn.decoders.image(encoded), start, shape, axes=(0, 1))
            return fn.resize(images, size=(SIZE, SIZE))

        return define().run()[0].as_array()

    return crops


@pytest.mark.parametrize("kind", KINDS)
def test_the_pixels_are_those_of_an_oracle(data, references, resize, kind):
    """Crop, mix with the partner's own crop and flip, rectangle, flip, normalisation: by NumPy."""
    one, image = data.stage(), image_config(kind)
    planner = one.planner(image.crop)
    columns, n = planner.columns, len(data.index)
    mixed_of = []
    for epoch, seen in enumerate(references[kind]):
        ids = np.array(sorted(seen))
        rows = planner(
            ids,
            np.full(n, epoch * one.batches_per_epoch),
            np.full((n, 2), SIZE),
            np.full((n, 2), 24.0),
        )
        partners = rows[:, columns["partner_id"]].astype(int)[:, 0]
        window = rows[:, columns["start"].start : columns["shape"].stop].astype(int)
        # Drawn on their own, and not of the mixed ones alone: others are of no use, and of no harm.
        second, second_flip = planner.partner_crop(rows, np.full((n, 2), 24), image.crop)
        flip = rows[:, columns["flip"]][:, 0] == 1
        if image.crop.kind == "pad":
            a = [shifted(data.images.pixels[i], w) for i, w in zip(ids, window, strict=True)]
            b = [shifted(data.images.pixels[i], w) for i, w in zip(partners, second, strict=True)]
        else:
            a, b = resize(ids, window), resize(partners, second)
        mean, std = np.array(image.mean), np.array(image.std)
        for i, row in enumerate(rows):
            pixels = a[i].astype(np.float64)
            (status,), (mu,) = row[columns["status"]], row[columns["mu"]]
            if status == Status.MIXED:
                other = b[i][:, ::-1] if second_flip[i] else b[i]
                pixels = np.round(mu * pixels + (1 - mu) * other)
            y, x, h, w = row[columns["box"]].astype(int)
            pixels[y : y + h, x : x + w] = np.round(mean)
            pixels = pixels[:, ::-1] if flip[i] else pixels
            expected = ((pixels - mean) / std).transpose(2, 0, 1)
            got = np.frombuffer(seen[i][0], np.float32).reshape(3, SIZE, SIZE)
            # Where μ·a + (1 - μ)·b ends on a half, float32 may round it the other way.
            level = np.abs(got - expected) * std[:, None, None]
            assert level.max() < (1.01 if status == Status.MIXED else 0.01)
            assert (level > 0.01).mean() < 0.001
            labels = data.index.labels[[i, partners[i]]].tolist()
            assert seen[i][1:] == (*labels, np.float32(mu), status, row[columns["box"]].tolist())
        mixed = rows[:, columns["status"]][:, 0] == Status.MIXED
        assert (partners[mixed] != ids[mixed]).all()
        mixed_of.append((mixed, flip != second_flip, window[:, 0] != second[:, 0]))
    mixed, other_flip, other_place = map(np.concatenate, zip(*mixed_of, strict=True))
    assert mixed.sum() > 20
    assert 0.2 < other_flip[mixed].mean() < 0.8  # of their own, not those of the first sample
    assert other_place[mixed].mean() > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_partners_flip_is_the_drawn_one_whatever_the_samples_own(data, kind):
    """The sample's own flip acts on the mix, so the partner is flipped before where they differ."""
    crop = image_config(kind).crop
    planner = data.stage().planner(crop)
    ids = np.arange(40)
    size_px, full_px = np.full((40, 2), SIZE), np.full((40, 2), 24)
    rows = planner(ids, np.zeros(40, np.int64), size_px, full_px.astype(float))
    flip = planner.columns["flip"]
    assert set(rows[:, flip][:, 0]) == {0, 1}
    window, before = planner.partner_crop(rows, full_px, crop)
    final = before ^ (rows[:, flip][:, 0] == 1)
    rows[:, flip] = 1 - rows[:, flip]
    again, before = planner.partner_crop(rows, full_px, crop)
    np.testing.assert_array_equal(before ^ (rows[:, flip][:, 0] == 1), final)
    np.testing.assert_array_equal(again, window)
    assert set(final) == {False, True}


def test_files_and_arrays_give_the_same_samples(references):
    for mine, other in zip(references["files pad"], references["memory pad"], strict=True):
        assert sorted(mine) == sorted(other) == list(range(63))
        for i, one in mine.items():
            assert one[1:] == other[i][1:]
            if one[4] != Status.MIXED:
                assert one[0] == other[i][0]
            else:
                a, b = (np.frombuffer(o[0], np.float32) for o in (one, other[i]))
                differ = np.abs(a - b)
                assert differ.max() < 1.01 / 57  # one grey level, where a half is rounded
                assert (differ > 0.01).mean() < 0.001
    statuses = {one[4] for epoch in references["files pad"] for one in epoch.values()}
    assert {0, Status.ERASED, Status.MIXED} <= statuses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 20])
def test_a_sample_is_the_same_whatever_the_batch_size(data, references, kind, batch_size):
    """Batches of 1: some are mixed wholly, the others not at all."""
    loader = data.loader(kind, batch_size=batch_size)
    assert [whole(loader) for _ in range(EPOCHS)] == references[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_and_whatever_the_number_of_shards(data, references, kind):
    loaders = [data.loader(kind, shard=shard, num_shards=2) for shard in (0, 1)]
    for epoch in range(EPOCHS):
        first, second = map(whole, loaders)
        assert not first.keys() & second.keys()
        assert abs(len(first) - len(second)) <= 1
        assert first | second == references[kind][epoch]


@pytest.mark.parametrize("kind", KINDS)
def test_and_by_the_torch_backend(data, references, kind):
    loader = data.loader(kind, backend="torch")
    assert [whole(loader) for _ in range(EPOCHS)] == references[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", [0, 3, 4, 5])
def test_and_after_a_resume(data, references, kind, position):
    """Saved after some batches (4 to an epoch), restored, run to the end of the next epoch."""
    epoch, within = divmod(position, 4)
    first = data.loader(kind)
    for k in range(epoch):
        assert whole(first) == references[kind][k]
    batches = iter(first)
    seen = whole([next(batches) for _ in range(within)])
    again = data.loader(kind, state=first.state(), position=within)
    rest = whole(again)
    assert not seen.keys() & rest.keys()
    assert seen | rest == references[kind][epoch]
    assert whole(again) == references[kind][epoch + 1]


def test_making_fewer_batches_at_once_changes_nothing(data, references, monkeypatch):
    for samples in (1, 32, 48):  # 1, 2 and 3 of the 4 batches of an epoch
        monkeypatch.setattr(engine, "SAMPLES_AT_ONCE", samples)
        loader = data.loader("memory pad")
        assert [whole(loader) for _ in range(EPOCHS)] == references["memory pad"]


def test_labels_are_not_mixed_without_their_images(data):
    """Whoever plans and applies by himself must have mixed in the partners."""
    stage = data.stage()
    assert stage.mixes

    @pipeline_def(batch_size=stage.batch_size, num_threads=1, device_id=None)
    def define():
        encoded, ids = fn.readers.file(
            files=list(data.index.files), file_root=data.index.root, pad_last_batch=True
        )
        images = fn.resize(fn.decoders.image(encoded), size=(SIZE, SIZE))
        plan = stage.plan(ids, size=(SIZE, SIZE))
        return stage.apply(images, plan), *plan.targets

    with pytest.raises(ValueError, match=r"mixed with their partners before apply .* mix_prob=0"):
        define()


@pytest.mark.parametrize("settings", [{"mix_prob": 0.0}, {"class_aware": False}, {"tail": 0.01}])
def test_without_mixing_there_is_no_branch_and_no_second_sample(data, settings):
    stage = data.stage(**settings)
    assert not stage.mixes
    for batch in data.loader("files pad", **settings):
        assert (batch.partners == batch.labels).all()
        assert (batch.mu == 1).all()
        assert set(batch.status.tolist()) <= {0, Status.ERASED}


def gradients(root):
    """8 images of class a, 4 of b, of many sizes, half of them EXIF-rotated. Upright: red is the
    share of the height, green of the width, blue the number."""
    shapes = []
    for k in range(12):
        h, w = 40 + 7 * k, 150 - 9 * k
        y, x = np.meshgrid((np.arange(h) + 0.5) / h, (np.arange(w) + 0.5) / w, indexing="ij")
        pixels = np.stack([255 * y, 255 * x, 0 * y + 20 * k], axis=-1).round().astype(np.uint8)
        image, exif = Image.fromarray(pixels), Image.Exif()
        if k % 2:
            exif[0x0112] = 6  # shown turned clockwise
            image = image.transpose(Image.Transpose.ROTATE_90)
        path = root / "ab"[k >= 8] / f"{k:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        image.save(path, quality=98, subsampling=0, exif=exif)
        shapes.append((h, w))
    return ImageIndex(root), np.array(shapes)


def gradient_crop(window, shape, number, flip):
    """What a window of such an image looks like: float64 [SIZE, SIZE, 3]."""
    place = (np.arange(SIZE) + 0.5) / SIZE
    (y, x, h, w), (height, width) = window, shape
    red, green = 255 * (y + h * place) / height, 255 * (x + w * place) / width
    crop = np.stack(np.broadcast_arrays(red[:, None], green[None], 20.0 * number), axis=-1)
    return crop[:, ::-1] if flip else crop


@pytest.mark.parametrize("decode", ["roi", "full"])
def test_a_second_sample_is_cropped_upright_in_its_own_frame(tmp_path, decode):
    """Of another size than the first, JPEG and EXIF: against what the gradients look like there."""
    index, shapes = gradients(tmp_path)
    image = ImageConfig(size=SIZE, val_resize=SIZE, crop=CROPS["resized"], decode=decode)
    stage = Stage(index, "scae", epochs=9, batch_size=4, seed=1, tail=0.6, mix_prob=1.0)
    pipeline = files.train_pipeline(stage, image, ExecConfig(batch_size=4, threads=1), seed=1)
    loader = Loader(pipeline, files.OUTPUTS, index, drop_last=False)
    planner = stage.planner(image.crop)
    columns, ids = planner.columns, np.arange(8, 12)
    mean, std = (torch.tensor(v)[:, None, None] for v in (image.mean, image.std))
    for epoch in range(8):
        pictures = {}
        for batch in loader:
            grey = (batch.images * std + mean).permute(0, 2, 3, 1).numpy()
            pictures |= dict(zip(batch.ids.tolist(), grey, strict=True))
        size_px = np.full((4, 2), SIZE)
        rows = planner(ids, np.full(4, 3 * epoch), size_px, shapes[ids].astype(float))
        partners = rows[:, columns["partner_id"]].astype(int)[:, 0]
        windows, flips = planner.partner_crop(rows, shapes[partners], image.crop)
        for k, row in enumerate(rows):
            own = row[columns["start"].start : columns["shape"].stop]
            flip, mu = row[columns["flip"]][0] == 1, row[columns["mu"]][0]
            a = gradient_crop(own, shapes[ids[k]], ids[k], flip)
            j = partners[k]
            b = gradient_crop(windows[k], shapes[j], j, flip != flips[k])
            assert np.abs(pictures[ids[k]] - (mu * a + (1 - mu) * b)).mean() < 2


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("kind", ["memory pad", "files resized"])
def test_types_and_layouts(data, kind, dtype, layout):
    loader, plain = data.loader(kind, dtype=dtype, layout=layout), data.loader(kind)
    for batch, reference in zip(loader, plain, strict=True):
        assert batch.images.dtype == {"fp32": torch.float32, "fp16": torch.float16}[dtype]
        last = batch.images.is_contiguous(memory_format=torch.channels_last)
        assert last == (layout == "NHWC")
        torch.testing.assert_close(batch.images.float(), reference.images, atol=2e-3, rtol=0)
        assert (batch.status == reference.status).all()


def test_a_second_sample_that_does_not_decode_is_named(tmp_path):
    """Also where the first ones do."""

    class FirstOfTail(Order):
        def keys(self, first, batches=1):
            return np.full(batches * self.batch_size, 20)

    write_pngs(tmp_path, {"a": 20, "b": 2}, (SIZE, SIZE))
    path = tmp_path / "b" / "01.png"
    path.write_bytes(path.read_bytes()[:200])
    index = ImageIndex(tmp_path)
    stage = Stage(index, "scae", epochs=1, batch_size=4, seed=0, tail=0.5, mix_prob=1.0)
    order = FirstOfTail(index.labels, batch_size=4, seed=0)
    run = ExecConfig(batch_size=4, threads=1)
    pipeline = files.train_pipeline(stage, image_config("files pad"), run, seed=0, order=order)
    with pytest.raises(ImageError, match=r"b/01.png' is cut off .*\n.*Mend or remove it"):
        next(iter(Loader(pipeline, files.OUTPUTS, index, drop_last=False, order=order)))
