"""What a user may get wrong: each gives an error that names it and the remedy, or a fallback that
is stated here."""

import contextlib
import importlib
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from conftest import fill_cache, write_images
from nvidia.dali import Pipeline, fn, pipeline_def
from passes import batches
from PIL import Image
from torch import nn

import train as train_script
from pipelines import files
from pipelines.config import ExecConfig, ImageConfig
from scae_dali import SCAE
from scae_dali.cache import CacheError, SaliencyCache
from scae_dali.data.index import DatasetError, ImageIndex
from scae_dali.methods import Status
from scae_dali.plan.crop import CropConfig
from scae_dali.saliency.refresh import refresh_cache
from scae_dali.saliency.whole import whole_loader
from scae_dali.stage.loader import ImageError, Loader
from scae_dali.stage.stage import Stage
from scae_dali.stage.table import Planner

ROOT = Path(__file__).parents[2]
PIPELINES = ("train", "val", "saliency")
ROTATE_90, TRANSPOSE = Image.Transpose.ROTATE_90, Image.Transpose.TRANSPOSE


def picture() -> Image.Image:
    """Smooth, 80 x 60, without symmetry."""
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC)


def jpeg(path: Path, image: Image.Image | None = None) -> bytes:
    (image or picture()).save(path, "JPEG", quality=95)
    return path.read_bytes()


def loader(kind: str, index: ImageIndex, batch_size: int | None = None) -> Loader:
    """One of the ready-made pipelines; the crop of `train` is the whole of a picture()."""
    crop = CropConfig(area=(1.0, 1.0), aspect=(80 / 60, 80 / 60), flip=0.0)
    image = ImageConfig(size=32, val_resize=36, crop=crop)
    run = ExecConfig(batch_size=batch_size or len(index), threads=2)
    if kind == "train":
        stage = Stage(index, "none", epochs=1, batch_size=run.batch_size, seed=1)
        pipeline = files.train_pipeline(stage, image, run, seed=1)
        return Loader(pipeline, files.OUTPUTS, index, drop_last=True)
    resize = image.val_resize if kind == "val" else None
    return whole_loader(index, size=32, resize=resize, **asdict(run))


# Files that cannot be decoded


def overwritten(data: bytes, start: int, junk: bytes) -> bytes:
    return data[:start] + junk + data[start + len(junk) :]


BROKEN = {
    "garbage": (lambda data: b"not an image " * 50, r"is no image \(it begins with b'not '\)"),
    "truncated": (lambda data: data[: len(data) // 2], "is cut off .a JPEG without an end marker"),
    "truncated in the header": (lambda data: data[:100], "is cut off .a JPEG that ends in its h"),
    "zero bytes": (lambda data: b"", "is empty"),
    "damaged header": (lambda data: overwritten(data, 20, b"?" * 40), "has a damaged header"),
    "damaged tables": (
        lambda data: overwritten(data, data.find(b"\xff\xc4") + 5, b"\xff" * 16),
        "does not decode",
    ),
}


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_named_with_its_remedy(tmp_path, kind, fault):
    damage, reason = BROKEN[fault]
    good = jpeg(tmp_path / "good.jpg")
    (tmp_path / "bad one.jpg").write_bytes(damage(good))
    index = ImageIndex.from_arrays(["good.jpg", "bad one.jpg"], [0, 1], tmp_path)
    with pytest.raises(ImageError, match=rf"^'{tmp_path}/bad one.jpg' {reason}") as error:
        list(loader(kind, index))
    assert "Mend or remove it, or leave it out with exclude=" in str(error.value)
    assert re.search(
        r"`scae-dali check-images( --decode)?` finds every such file", str(error.value)
    )
    sound = ImageIndex.from_arrays(
        index.files, index.labels, tmp_path, num_classes=2, exclude=["bad one.jpg"]
    )
    assert [batch.ids.tolist() for batch in loader(kind, sound)] == [[0]]


def test_garbage_in_the_middle_of_a_jpeg_is_decoded_as_far_as_it_goes(tmp_path):
    """The fallback of libjpeg, with a warning of its own: the picture is spoilt from there on."""
    good = jpeg(tmp_path / "good.jpg")
    scan = good.find(b"\xff\xda")
    start = scan + 3 * (len(good) - scan) // 4
    (tmp_path / "corrupt.jpg").write_bytes(overwritten(good, start, bytes(range(1, 31))))
    index = ImageIndex.from_arrays(["good.jpg", "corrupt.jpg"], [0, 1], tmp_path)
    for kind in PIPELINES:
        (batch,) = loader(kind, index)
        assert batch.images.shape == (2, 3, 32, 32)
        assert batch.images.isfinite().all()
    good_image, corrupt = batch.images
    torch.testing.assert_close(corrupt[:, :12], good_image[:, :12])
    assert (corrupt - good_image).abs().max() > 0.1


def test_an_error_of_the_plan_is_not_blamed_on_an_image(index, monkeypatch):
    def decide(*arguments):
        raise IndexError("the plan's own")

    monkeypatch.setattr(Planner, "__call__", decide)
    shutdown, ended = Pipeline._shutdown, []
    monkeypatch.setattr(Pipeline, "_shutdown", lambda self: (ended.append(self), shutdown(self)))
    with pytest.raises(RuntimeError, match="the plan's own") as error:
        list(loader("train", index, 16))
    assert not isinstance(error.value, ImageError)
    assert ended  # at once, and not in whatever thread collects garbage
    ended.clear()


# Files that are unusual, and train


def write_exif(path: Path, stored: Image.Image, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, "JPEG", quality=95, exif=exif)


def translucent() -> Image.Image:
    image = picture()
    image.putalpha(128)
    return image


def palette() -> Image.Image:
    return picture().convert("P", palette=Image.Palette.ADAPTIVE)


GREY = picture().convert("L")
DOT = Image.new("RGB", (1, 1), (200, 50, 100))
# name: (how it is written, the picture that it shows)
UNUSUAL = {
    "1x1.png": (lambda path: DOT.save(path), DOT.resize((8, 8))),
    "1x1.jpg": (lambda path: jpeg(path, DOT), DOT.resize((8, 8))),
    "grey.jpg": (lambda path: jpeg(path, GREY), GREY),
    "cmyk.jpg": (lambda path: jpeg(path, picture().convert("CMYK")), picture()),
    "rgba.png": (lambda path: translucent().save(path), picture()),
    "palette.png": (lambda path: palette().save(path), palette()),
    "16 bits.png": (
        lambda path: Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257).save(path),
        GREY,
    ),
    "png.JPEG": (lambda path: picture().save(path, "PNG"), picture()),
    "rotated.jpg": (lambda path: write_exif(path, picture().transpose(ROTATE_90), 6), picture()),
    "transposed.jpg": (
        lambda path: write_exif(path, picture().transpose(TRANSPOSE), 5),
        picture(),
    ),
    "Bärenfüße 熊 😀.jpg": (jpeg, picture()),
}


@pytest.fixture(scope="module")
def unusual(tmp_path_factory) -> ImageIndex:
    """Every unusual file, and beside it the same picture as a plain PNG."""
    root = tmp_path_factory.mktemp("in a folder, ünusual")
    for folder in ("the unusual", "twin"):
        (root / folder).mkdir()
    for name, (write, shown) in UNUSUAL.items():
        write(root / "the unusual" / name)
        shown.convert("RGB").save(root / "twin" / f"{name}.png")
    files = [f"the unusual/{name}" for name in UNUSUAL] + [f"twin/{name}.png" for name in UNUSUAL]
    assert set(ImageIndex(root).files) == set(files)
    return ImageIndex.from_arrays(files, np.repeat([0, 1], len(UNUSUAL)), root)


@pytest.fixture(scope="module", params=PIPELINES)
def decoded(request, unusual) -> torch.Tensor:
    (batch,) = loader(request.param, unusual)
    assert sorted(batch.ids.tolist()) == list(range(len(unusual)))
    assert batch.labels.tolist() == unusual.labels[batch.ids].tolist()
    assert batch.images.shape == (len(unusual), 3, 32, 32)
    return batch.images[batch.ids.argsort()]


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_image_shows_what_it_should(decoded, name):
    i = list(UNUSUAL).index(name)
    image, twin = decoded[i], decoded[len(UNUSUAL) + i]
    assert image.isfinite().all()
    assert (image - twin).abs().mean() < 0.06  # of a deviation, that is 3 grey levels
    if not name.startswith("1x1"):
        assert (image.flip(1) - twin).abs().mean() > 0.3
        assert (image.flip(2) - twin).abs().mean() > 0.3


# Data sets


def test_folders_and_lists_that_cannot_be(tmp_path):
    write_images(tmp_path / "one empty", {"a": 1})
    (tmp_path / "one empty" / "b").mkdir()
    with pytest.raises(DatasetError, match=r"without images: 'b'; remove them"):
        ImageIndex(tmp_path / "one empty")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"has no class folders \(it holds no images either\)"):
        ImageIndex(tmp_path / "empty")
    (tmp_path / "list.txt").write_text("a/00.jpg 0\na/00.jpg 7\n")
    with pytest.raises(DatasetError, match=r"list.txt, line 2: label 7 is outside 0 … 2; labels"):
        ImageIndex.from_list(tmp_path / "list.txt", tmp_path / "one empty", num_classes=3)


# Caches


def decide(index: ImageIndex, cache: SaliencyCache, lam_max: float = 2.0) -> np.ndarray:
    """(status, y, x, h, w) of every sample, all of them erased in epoch 1."""
    erase_all: dict[str, Any] = {
        "p_min": 1.0,
        "p_max": 1.0,
        "lam_max": lam_max,
        "area": (0.05, 0.1),
    }
    n = len(index)
    stage = SCAE(index, cache, epochs=1, start_epoch=1, batch_size=n, seed=5, **erase_all)
    size_px = np.full((n, 2), 32)
    planner = stage.planner()
    rows = planner(np.arange(n), np.zeros(n, np.int64), size_px)
    return np.concatenate([rows[:, planner.columns[k]] for k in ("status", "box")], axis=1)


def test_a_missing_or_short_record_means_no_guidance_and_is_counted(index, tmp_path):
    fill_cache(tmp_path / "maps", index).close()
    with lmdb.open(str(tmp_path / "maps")) as env, env.begin(write=True) as txn:
        txn.delete((3).to_bytes(8, "big"))
        txn.put((4).to_bytes(8, "big"), b"short")
    plan = decide(index, SaliencyCache(tmp_path / "maps", index=index))
    lost = np.isin(np.arange(len(index)), [3, 4])
    assert (plan[lost, 0] == Status.ERASED | Status.NO_MAP).all()
    assert (plan[~lost, 0] == Status.ERASED).all()
    full = decide(index, fill_cache(tmp_path / "full", index))
    unguided = decide(index, SaliencyCache(tmp_path / "full", index=index), lam_max=0.0)
    np.testing.assert_array_equal(plan[lost, 1:], unguided[lost, 1:])
    np.testing.assert_array_equal(plan[~lost], full[~lost])


def test_a_cache_of_something_else_is_refused(index, tmp_path):
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 8, "seed": 1}
    with pytest.raises(CacheError, match=r"no saliency cache .*nowhere.*`scae-dali build-cache`"):
        SCAE(index, str(tmp_path / "nowhere"), **settings)
    fill_cache(tmp_path / "maps", index).close()
    other = index.subset(np.arange(20))
    with pytest.raises(CacheError, match=r"is of another data set: 50 samples.* the index has 20"):
        SCAE(other, str(tmp_path / "maps"), **settings)
    with pytest.raises(CacheError, match=r"has grid \(7, 7\), not \(3, 3\); build a new cache"):
        SaliencyCache.create(tmp_path / "maps", index, grid=(3, 3), exist_ok=True)


# Saliency passes


class Net(nn.Module):
    """Features that are not negative; `weight` is that of every logit."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4, 3, bias=False)
        nn.init.constant_(self.head.weight, weight)

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))


def test_maps_without_a_positive_value_mean_no_guidance_and_are_counted(index, tmp_path):
    cache = SaliencyCache.create(tmp_path / "maps", index, grid=(7, 7))
    with pytest.warns(RuntimeWarning, match="50 of 50 saliency maps of layer 'features' are flat"):
        report = refresh_cache(Net(-1.0), cache, index, batches(index), epoch=1, layer="features")
    assert report.images == report.flat == len(index)
    maps, found = cache.read(np.arange(len(index)))
    assert found.all()
    assert not maps.any()
    plan = decide(index, cache)
    assert (plan[:, 0] == Status.ERASED | Status.FLAT_MAP).all()
    np.testing.assert_array_equal(plan[:, 1:], decide(index, cache, lam_max=0.0)[:, 1:])
    assert cache.meta.epoch == 1


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_network_that_has_diverged_makes_no_maps_and_takes_none_away(index, tmp_path, weight):
    cache = fill_cache(tmp_path / "maps", index)
    before = cache.read(np.arange(len(index)))[0]
    with pytest.raises(ValueError, match=r"'head.weight' of Net holds values that are not finite"):
        refresh_cache(Net(weight), cache, index, batches(index), epoch=2, layer="features")
    np.testing.assert_array_equal(cache.read(np.arange(len(index)))[0], before)


def test_an_unknown_layer_is_named_with_those_there_are(index, tmp_path):
    cache = SaliencyCache.create(tmp_path / "maps", index, grid=(7, 7))
    with pytest.raises(ValueError, match=r"layer 'feature' is no module of Net; did you mean feat"):
        refresh_cache(Net(1.0), cache, index, batches(index), epoch=1, layer="feature")
    assert cache.meta.under_way is None


@contextlib.contextmanager
def full_disk(free_bytes: int):
    """No file may grow beyond `free_bytes` here: writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_pass_that_meets_a_full_disk_goes_on_once_there_is_room(tmp_path):
    samples = 20_000
    index = ImageIndex.from_arrays([f"{i}.jpg" for i in range(samples)], np.zeros(samples, int))
    cache = SaliencyCache.create(tmp_path / "maps", index, grid=(7, 7))
    arguments: dict[str, Any] = {"epoch": 1, "layer": "features", "commit_every": 1000}
    net = Net(1.0)
    with full_disk(600_000), pytest.raises(OSError, match="is kept; make room for about 1,"):
        refresh_cache(net, cache, index, batches(index, batch_size=1000), **arguments)
    done = (cache.stamps() == 1).sum()
    assert 0 < done < samples
    report = refresh_cache(net, cache, index, batches(index, batch_size=1000), **arguments)
    assert report.images == samples - done
    assert (cache.stamps() == 1).all()


# The library's arguments


def test_unknown_methods_and_settings(index):
    common: dict[str, Any] = {"epochs": 1, "batch_size": 8, "seed": 1}
    with pytest.raises(ValueError, match=r"method must be one of none.* got 'scea'"):
        Stage(index, "scea", **common)
    with pytest.raises(ValueError, match=r"no module 'nobodys'; put its folder on PYTHONPATH"):
        Stage(index, "nobodys.module", **common)
    with pytest.raises(ValueError, match=r"unknown setting lamb of .*scae; it has .*area, aspect"):
        Stage(index, "scae", **common, lamb=2.0)


def test_batch_sizes_that_do_not_fit(index):
    stage = Stage(index, "none", epochs=1, batch_size=8, seed=1)
    run = ExecConfig(batch_size=16, threads=2)
    with pytest.raises(ValueError, match=r"of the stage is 8, of the pipeline 16; give both the s"):
        files.train_pipeline(stage, ImageConfig(), run, seed=1)
    with pytest.raises(ValueError, match="at most the 50 images of a shard, got 64"):
        loader("train", index, 64)


def test_ids_that_are_no_places_in_the_index(index):
    """Such as the labels that a file reader gives for a folder of another data set."""
    stage = Stage(index, "none", epochs=1, batch_size=2, seed=1)

    @pipeline_def(batch_size=2, num_threads=1, device_id=None)
    def define():
        images, ids = fn.constant(idata=[1] * 12, shape=[2, 2, 3]), fn.constant(idata=[50])
        return stage(images, ids, size=(2, 2))[1].label

    with pytest.raises(RuntimeError, match=r"ids must be in \[0, 50\).* got 50; let the reader"):
        define().run()


# train.py


@pytest.fixture(scope="module")
def place(tmp_path_factory, unusual) -> Path:
    """Data sets, lists, caches and configs, right ones and wrong ones."""
    root = tmp_path_factory.mktemp("place")
    for seed, (name, classes) in enumerate({"data": "ab", "three": "abc"}.items()):
        write_images(root / name / "train", dict.fromkeys(classes, 4), seed=2 * seed)
        write_images(root / name / "val", dict.fromkeys(classes, 2), seed=2 * seed + 1)
    shutil.copytree(root / "three", root / "empty class")
    shutil.rmtree(root / "empty class" / "train" / "b")
    (root / "empty class" / "train" / "b").mkdir()
    shutil.copytree(root / "data", root / "broken")
    (root / "broken" / "train" / "b" / "00.jpg").write_bytes(b"")
    shutil.copytree(unusual.root, root / "unusual" / "train")
    shutil.copytree(unusual.root, root / "unusual" / "val")
    (root / "list.txt").write_text("train/a/00.jpg 0\ntrain/a/01.jpg -1\n")
    (root / "exclude.txt").write_text("a/77.jpg\n")
    (root / "typo.yaml").write_text("scae:\n  lam_maxx: 3\n")
    (root / "broken.yaml").write_text("scae: [\n")
    fill_cache(root / "three.lmdb", ImageIndex(root / "three" / "train")).close()
    fill_cache(root / "7x7.lmdb", ImageIndex(root / "data" / "train")).close()
    return root


def run_train(monkeypatch, place: Path, out: Path, *flags: str, **changes: Any) -> None:
    """train.main() on tiny images; a setting is written with __ for its dots."""
    settings: dict[str, Any] = {
        "data__root": place / "data",
        "model": "shufflenet_v2_x0_5",
        "method": "none",
        "epochs": 1,
        "batch_size": 4,
        "threads": 2,
        "device": "cpu",
        "image__size": 64,
        "image__val_resize": 64,
        "optim__lr": 1e-4,
        "checkpoint_every": 0,
        "out": out,
    }
    argv = ["train.py"]
    for name, value in (settings | changes).items():
        argv += [f"--{name.replace('__', '.')}", str(value).replace("PLACE", str(place))]
    monkeypatch.setattr(
        sys, "argv", [*argv, *(flag.replace("PLACE", str(place)) for flag in flags)]
    )
    train_script.main()


OFFLINE: dict[str, Any] = {"method": "scae", "scae__refresh_every": 0}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown model": (
        {"model": "resnet5000"},
        "model must be a classification network of torchvision or one of cifar_resnet20, .*, got "
        "'resnet5000'; did you mean res",
    ),
    "detection model": ({"model": "ssd300_vgg16"}, "must be a classification network .* 'ssd300_"),
    "unknown method": ({"method": "scea"}, "method must be one of none, .* got 'scea'"),
    "missing module": ({"method": "mine.own"}, "method 'mine.own': there is no module 'mine'; put"),
    "unknown layer": (
        {"method": "scae", "saliency__layer": "layer4"},
        "layer 'layer4' is no module of ShuffleNetV2; did you mean",
    ),
    "setting out of range": ({"scae__area": "[0.5, 0.2]"}, "area must be 0 < low <= high < 1, got"),
    "no epochs": ({"epochs": 0}, "epochs must be at least 1, got 0"),
    "large batch": ({"batch_size": 9}, "batch_size must be at most the 8 images of a shard, got 9"),
    "no data": (
        {"data__root": "PLACE/nowhere"},
        "root='.*/nowhere/train' does not exist; give the folder",
    ),
    "empty class": (
        {"data__root": "PLACE/empty class"},
        "class folders without images: 'b'; remove them",
    ),
    "label out of range": (
        {"data__train_list": "PLACE/list.txt"},
        "list.txt, line 2: label -1 is outside 0 … .* labels count from 0",
    ),
    "unknown file to exclude": (
        {"data__exclude": "PLACE/exclude.txt"},
        "exclude names 1 file.s. that the index lacks: 'a/77.jpg'; names look like 'a/00.jpg'",
    ),
    "broken image": (
        {"data__root": "PLACE/broken"},
        "broken/train/b/00.jpg' is empty.\nMend or remove it, .* --data.exclude",
    ),
    "no cache named": (
        OFFLINE,
        "refresh_every=0 means a cache built offline, got saliency.cache=None: name it",
    ),
    "passes that differ": (
        {"method": "scae+saliency_mix", "scae__refresh_every": 5},
        "refresh_every must be the same for methods that share the maps, got "
        r"\{'scae': 5, 'saliency_mix': 10\}",
    ),
    "settings of a method that is built in": (
        {"method_args": '{"lam_max": 50}', "method": "scae"},
        "method_args must be settings of modules of yours, got {'lam_max': 50} for method scae",
    ),
    "a negative batch of the pass": (
        {"method": "scae", "saliency__batch_size": -1},
        "saliency.batch_size must be at least 1, got -1; leave it out for the training's",
    ),
    "images of no size": ({"saliency__size": 0}, "saliency.size must be at least 1, got 0"),
    "negative decay": (
        {"optim__weight_decay": -1},
        "optim.weight_decay must be at least 0, got -1",
    ),
    "negative seed": ({"seed": -5}, r"seed must be in \[0, 2\*\*64\), got -5"),
    "a share of nothing": (
        {"method": "scae", "saliency__share": 0.0},
        r"saliency.share must be in \(0, 1\], got 0.0; 0.1 sees a tenth",
    ),
    "a pass over all and a harvest": (
        {"method": "scae", "saliency__source": "both"},
        "saliency.share must be below 1 where saliency.source is both, got 1",
    ),
    "a share of a harvest": (
        {"method": "scae", "saliency__source": "harvest", "saliency__share": 0.1},
        "saliency.share is that of a pass, and .* harvest makes none, got 0.1; set .* to both",
    ),
    "weights that never act": (
        {"loss__class_balanced": 0.9999, "loss__defer": 160},
        r"loss.defer must be below epochs \(\d+\), got 160",
    ),
    "an adjustment to classes that are shown equally often": (
        {"loss__logit_adjust": 1.0, "sampling": "class_balanced"},
        "loss.logit_adjust=1.0 is for .*, and sampling=class_balanced shows .*: leave one of them",
    ),
    "a harvest of moved pixels": (
        {"method": "rand_augment+scae", "saliency__source": "harvest"},
        r"saliency.source must be pass with rand_augment\+scae, which moves pixels, got harvest",
    ),
    "a harvest for a cache built offline": (
        OFFLINE | {"saliency__cache": "PLACE/none.lmdb", "saliency__source": "harvest"},
        "saliency.source=harvest needs refresh_every > 0, got 0",
    ),
    "no cache there": (
        OFFLINE | {"saliency__cache": "PLACE/none.lmdb"},
        "no saliency cache at '.*/none.lmdb': .* build one with `scae-dali build-cache`",
    ),
    "cache of other data": (
        OFFLINE | {"saliency__cache": "PLACE/three.lmdb"},
        "is of another data set: 12 samples, .* the index has 8 .* or build a new cache",
    ),
    "cache of another grid": (
        {"method": "scae", "saliency__cache": "PLACE/7x7.lmdb"},
        r"has grid \(7, 7\), not \(2, 2\); build a new cache at another path",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_train_refuses_before_it_writes(monkeypatch, place, tmp_path, case):
    changes, message = REFUSED[case]
    out = tmp_path / "run"
    with pytest.raises(SystemExit, match=f"(?s)^error: .*{message}"):
        run_train(monkeypatch, place, out, **changes)
    assert not (out / "config.json").exists()  # the folder can be used again


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_train_without_the_gpu_that_is_asked_for(monkeypatch, place, tmp_path):
    with pytest.raises(SystemExit, match="device must be cpu or auto where torch sees no GPU"):
        run_train(monkeypatch, place, tmp_path / "run", device="cuda")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--scae.lam_maxx", "3"], "--scae.lam_maxx"),
        (["--config", "PLACE/typo.yaml"], "lam_maxx"),
        (["--config", "PLACE/broken.yaml"], "config"),
        (["--config", "PLACE/none.yaml"], "none.yaml"),
        (["--optim.schedule", "sudden"], "sudden"),
        (["--epochs", "many"], "many"),
    ],
    ids=["unknown key", "unknown key in YAML", "no YAML", "no file", "no choice", "no number"],
)
def test_train_names_the_setting_that_it_does_not_know(
    monkeypatch, capsys, place, tmp_path, flags, named
):
    with pytest.raises(SystemExit) as stop:
        run_train(monkeypatch, place, tmp_path / "run", *flags)
    assert stop.value.code == 2
    usage, _, message = capsys.readouterr().err.rpartition("error:")
    assert usage
    assert named in message
    assert not (tmp_path / "run").exists()


def test_unusual_images_train(monkeypatch, place, tmp_path):
    run_train(monkeypatch, place, tmp_path / "run", data__root=place / "unusual", batch_size=11)
    weights = torch.load(tmp_path / "run" / "weights.pt", weights_only=True)
    assert all(value.isfinite().all() for value in weights.values())


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_train(monkeypatch, place, out)
    return out


def test_a_run_is_not_overwritten(monkeypatch, place, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    with pytest.raises(
        SystemExit, match=r"out must be a new folder, got '.*': give another, or --r"
    ):
        run_train(monkeypatch, place, finished)
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == before


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: b"garbage", lambda data: data[: len(data) // 2], flipped],
    ids=["empty", "garbage", "truncated", "a flipped bit"],
)
def test_a_damaged_checkpoint_is_named_and_kept(monkeypatch, place, copied, damage):
    path = copied / "checkpoint.pt"
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with pytest.raises(SystemExit, match=rf"checkpoint '{path}' cannot be read \(.*restore it fr"):
        run_train(monkeypatch, place, copied, "--resume", epochs=2)
    assert path.read_bytes() == damaged


def test_a_file_that_is_no_checkpoint(monkeypatch, place, copied):
    torch.save({"fc.weight": torch.zeros(3)}, copied / "checkpoint.pt")
    with pytest.raises(SystemExit, match=r"is no checkpoint of a training run .* move it away"):
        run_train(monkeypatch, place, copied, "--resume", epochs=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "squeezenet1_0"}, "model='shufflenet_v2_x0_5', not 'squeezenet1_0': resume"),
        ({"data__root": "PLACE/three"}, "data='[0-9a-f]{32}', not '[0-9a-f]{32}': resume it"),
        ({"batch_size": 2}, "batch_size=4, not 2: resume it"),
        ({"seed": 1}, "seed=0, not 1: resume it"),
        ({"optim__ema": 0.9}, "optim.ema=0.0, not 0.9: resume it"),
        ({"method": "cutout"}, "method='none', not 'cutout': resume it"),
        ({"amp": "bf16"}, "amp='none', not 'bf16': resume it"),
        ({"image__crop__kind": "pad"}, "image.crop.kind='resized', not 'pad': resume it"),
        ({"saliency__source": "harvest"}, "saliency.source='pass', not 'harvest': resume it"),
    ],
    ids=["model", "classes", "batch_size", "seed", "ema", "method", "amp", "crop", "source"],
)
def test_a_checkpoint_of_other_settings(monkeypatch, place, finished, changes, message):
    before = (finished / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit, match=f"checkpoint.pt' was made with {message}"):
        run_train(monkeypatch, place, finished, "--resume", **({"epochs": 2} | changes))
    assert (finished / "checkpoint.pt").read_bytes() == before


def test_a_checkpoint_of_another_pipeline(monkeypatch, place, copied):
    """As of another device, whose pipeline may be another: of all else the settings tell."""
    state = torch.load(copied / "checkpoint.pt", weights_only=True)
    state["of"]["image.decode"] = "full"
    torch.save(state, copied / "checkpoint.pt")
    with pytest.raises(SystemExit, match=r"is of another pipeline .*\(.+\).* in its config.json"):
        run_train(monkeypatch, place, copied, "--resume", epochs=2, image__decode="full")


def test_a_checkpoint_that_some_nodes_lack(monkeypatch, place, copied):
    def gather(self, value):
        return [value, not value if isinstance(value, bool) else value]

    monkeypatch.setattr(train_script.Ranks, "gather", gather)
    with pytest.raises(SystemExit, match=r"checkpoint.pt must be in '.*' on every node or on none"):
        run_train(monkeypatch, place, copied, "--resume", epochs=2)


def test_a_checkpoint_that_meets_a_full_disk_leaves_the_last_one(monkeypatch, place, copied):
    path = copied / "checkpoint.pt"
    before = path.read_bytes()
    with full_disk(1_000_000), pytest.raises(SystemExit, match=r"cannot be written .* make room"):
        run_train(monkeypatch, place, copied, "--resume", epochs=2)
    assert path.read_bytes() == before
    assert not list(copied.glob("*.partial"))
    run_train(monkeypatch, place, copied, "--resume", epochs=2)
    assert torch.load(path, weights_only=True)["epoch"] == 2


READ_ONLY = """
import os, sys, train, scae_dali.methods.scae
from scae_dali import SCAE, ImageIndex
if os.geteuid() == 0:
    os.setuid(65534)  # permissions don't stop root
index = ImageIndex(sys.argv[2] + "/train")
SCAE(index, sys.argv[4], epochs=1, batch_size=2, seed=1)
print("readable")
train.main()
"""


def test_a_cache_in_a_read_only_folder_is_read_and_not_refreshed(place):
    root = Path(tempfile.mkdtemp())  # pytest's own is for this user alone
    maps = root / "maps.lmdb"
    try:
        shutil.copytree(place / "data", root / "data")
        fill_cache(maps, ImageIndex(root / "data" / "train")).close()
        (root / "runs").mkdir()
        (root / "runs").chmod(0o777)
        argv = ["--data.root", root / "data", "--saliency.cache", maps, "--out", root / "runs/a"]
        argv += [
            "--model",
            "shufflenet_v2_x0_5",
            "--image.size",
            "224",
            "--scae.refresh_every",
            "1",
        ]
        argv += ["--epochs", "2", "--batch_size", "4", "--device", "cpu"]
        root.chmod(0o755)
        maps.chmod(0o555)
        for file in maps.iterdir():
            file.chmod(0o444)
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, *map(str, argv)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 1, done.stderr
        assert done.stdout.startswith("readable")
        assert "is read-only here; give this user write permission" in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        maps.chmod(0o755)
        shutil.rmtree(root)


# Tools


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("inspect_cache", ["PLACE/none.lmdb"], "no saliency cache at"),
        ("inspect_cache", ["PLACE/data"], "no saliency cache at .*data"),
        (
            "build_cache",
            ["--data=PLACE/data", "--model=resnet18", "--out=PLACE/three.lmdb", "--size=64"],
            "three.lmdb' is of another data set: 12 samples",
        ),
        (
            "build_cache",
            ["--data=PLACE/data", "--model=resnet5000", "--out=PLACE/new.lmdb"],
            "got 'resnet5000'",
        ),
    ],
)
def test_tools_say_what_is_wrong(monkeypatch, capsys, place, tool, arguments, message):
    module = importlib.import_module(f"tools.{tool}")
    monkeypatch.setattr(sys, "argv", [tool, *(a.replace("PLACE", str(place)) for a in arguments)])
    try:
        status, said = module.main(), capsys.readouterr().err
    except SystemExit as stop:
        status, said = 1, f"{stop.code}"
    assert status == 1
    assert re.search(f"^error: .*{message}", said)
