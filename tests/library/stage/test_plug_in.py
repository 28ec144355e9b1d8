"""The code of the READMEs for somebody else's loop, run as it stands there on small data."""

import ast
import dataclasses
import inspect
import os
import re
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, fill_cache
from nvidia.dali import fn, pipeline_def
from packs import pack_tars, pack_tfrecords
from PIL import Image
from torch import nn

import scae_dali
from scae_dali.data.index import ImageIndex
from scae_dali.methods import BUILT_IN, load

PAGES = [ROOT / folder / "README.md" for folder in (".", "scae_dali", "pipelines/examples")]
FOUND = [
    block
    for page in PAGES
    for block in re.findall(r"```python (\w+)\n(.*?)```", page.read_text(), flags=re.DOTALL)
]
BLOCKS = dict(FOUND)
MEAN, STD = [124.0, 116.0, 104.0], [58.0, 57.0, 57.0]


def code_of(name, changes):
    """A block for small images, small batches and no GPU, and with changes, each of something."""
    code = re.sub(r"batch_size=\d+", "batch_size=10", BLOCKS[name])
    for old, new in {
        "device_id=0": "device_id=None", '"mixed"': '"cpu"', ".cuda()": "", "resnet50": "resnet18",
        "224": "64", "(7, 7)": "(2, 2)",
    }.items():  # fmt: skip
        code = code.replace(old, new)
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    return code


def run(name, changes, **names):
    """Execute a block with changes; returns its names."""
    exec(compile(code_of(name, changes), f"README: {name}", "exec"), names)
    return names


def check(pipeline, index, scae, batches=10):
    """Two epochs: right labels, rectangles in the mean's grey where the epoch says."""
    erased = 0
    for _ in range(batches):
        images, *_, label, partner, mu = (np.asarray(o.as_array()) for o in pipeline.run())
        assert images.shape == (10, 3, 64, 64)
        assert (label == partner).all()
        assert (mu == 1).all()
        assert np.isin(label, index.labels).all()
        erased += (np.abs(images[:, :, ::4, ::4]) < 0.0085).all(1).any((1, 2)).sum()
    assert 0 < erased < 10 * batches
    assert scae.seconds > 0


def test_every_block_is_run_here():
    """No name comes twice, and none without a test below."""
    tested = {"loop", "webdataset", "tfrecord", "memory", "ranks", "save", "resume", "refresh_zip"}
    tested |= {"harvest", "compose", "switch", "my_method", "iterator", "caches", "resnet50"}
    assert sorted(name for name, _ in FOUND) == sorted(tested)
    for page in PAGES:
        assert page.read_text().count("```") == 2 * page.read_text().count("```python ")


def test_the_errors_on_the_page_are_those_of_the_library():
    text = PAGES[1].read_text()
    table = text[text.index("| the error says |") :].partition("\n\n")[0]
    told = " ".join(
        "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        if isinstance(node, ast.JoinedStr)
        else str(getattr(node, "value", ""))
        for path in (ROOT / "scae_dali").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    )
    errors = re.findall(r"^\| `(.+?)`", table, flags=re.MULTILINE)
    assert len(errors) > 20
    assert [error for error in errors if error.strip("… ") not in told] == []


def test_every_setting_is_on_the_page():
    named = set(re.findall(r"`(\w+)`", PAGES[1].read_text()))
    settings = {f.name for name in BUILT_IN for f in dataclasses.fields(load(name).Config)}
    settings |= {f.name for f in dataclasses.fields(scae_dali.CropConfig)}
    for function in (scae_dali.Stage, scae_dali.Loader, scae_dali.refresh_cache):
        settings |= inspect.signature(function).parameters.keys()
    # The data set and what goes by the names of methods; what is for train.py alone.
    assert settings - named <= {"settings", "model", "torch_device", "remedy"}


@pytest.mark.parametrize(
    ("name", "most"), [("loop", 10), ("webdataset", 8), ("tfrecord", 10), ("resnet50", 15)]
)
def test_few_lines_are_added(name, most):
    lines = BLOCKS[name].splitlines()
    assert 1 <= sum(line.endswith("#+") for line in lines) <= most
    own = "\n".join(line for line in lines if not line.endswith("#+"))
    assert "scae" not in own


@pytest.fixture(scope="module")
def loop(folder, tmp_path_factory):
    """The names of the first page's loop after two epochs, with a pass before the second one."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("loop") / "maps.lmdb"
    changes = {"/data/imagenet/train": str(folder), "maps.lmdb": str(path)}
    return run("loop", changes | {"range(100)": "range(2)", "seed=7": "seed=7, refresh_every=1"})


def test_the_loop_trains_and_makes_maps(loop, index):
    with scae_dali.SaliencyCache(loop["scae"]._lookup.path) as cache:
        assert (cache.meta.epoch, cache.meta.input_size, cache.meta.grid) == (1, 64, (2, 2))
        assert cache.coverage().found == len(index)
    assert loop["loss"].isfinite()
    assert loop["batch"].images.shape == (10, 3, 64, 64)
    check(loop["train"](), index, loop["scae"])


def test_a_checkpoint_goes_on_within_the_epoch(loop, index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {**loop, "loader": loader_of(loop, index)}
    batches = iter(names["loader"])
    begun = [next(batches).labels.tolist() for _ in range(2)]
    exec(code_of("save", {}), names)
    rest = [batch.labels.tolist() for batch in batches]
    assert sorted(np.concatenate(begun + rest)) == sorted(index.labels)
    seen = []
    names |= {"loader": loader_of(loop, index), "seen": seen}
    exec(code_of("resume", {"100": "2", "...": "seen.append(batch.labels.tolist())"}), names)
    assert seen[:3] == rest
    assert len(seen) == 3 + 5


def loader_of(loop, index):
    """The loader of the first page, anew."""
    outputs = ["images", *loop["scae"].outputs]
    return scae_dali.Loader(loop["train"](), outputs, index, drop_last=True)


@pytest.mark.filterwarnings("ignore:the stage plans epoch 0")  # the loop begins in epoch 2 here
def test_harvest(loop, index):
    """Half of the maps come out of the crops that the network was trained on."""
    scae, reports = loop["scae"], []

    def refresh(*arguments, **keywords):
        reports.append(type(scae).refresh(scae, *arguments, **keywords))

    scae.refresh, scae._made = refresh, None
    code = code_of("harvest", {"range(100)": "range(2, 4)", "share=0.1": "share=0.5"})
    names = {**loop}
    try:
        exec(code, names)
    finally:
        del scae.refresh
    assert [(report.images, report.harvested) for report in reports] == [(25, 0), (25, 25)]
    assert names["batch"].windows.shape == (10, 4)


@pytest.mark.parametrize("added", [True, False], ids=["after", "before"])
def test_resnet50_before_and_after(folder, index, tmp_path, monkeypatch, added):
    """Both train. With SCAE images are erased, and have the labels that they had before."""
    code = BLOCKS["resnet50"]
    if not added:
        code = re.sub(r".*#\+\n", "", code).replace("#- ", "")
        assert "scae" not in code
    monkeypatch.setitem(BLOCKS, "resnet50", code)
    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.head = nn.Conv2d(3, 3, 16, 16), nn.Linear(3, 3)

        def forward(self, images):
            if images.shape[2:] == (64, 64) and self.training:
                seen.append(images.detach())
            return self.head(self.features(images).mean((2, 3)))

    model = Model()
    names = {"rank": 0, "world": 1, "local": None, "model": model}
    names["optimiser"] = torch.optim.SGD(model.parameters(), lr=0.01)
    changes = {"/data/imagenet/train": str(folder), "range(90)": "range(2)", ".gpu()": ""}
    if added:
        changes |= {"maps.lmdb": str(tmp_path / "maps.lmdb"), "seed=7": "seed=7, refresh_every=1"}
        changes["(model, epoch)"] = '(model, epoch, layer="features")'
    names = run("resnet50", changes, **names)
    images = torch.cat(seen)
    assert len(images) == 2 * len(index)
    erased = (images[:, :, ::4, ::4].abs() < 0.0085).all(1).flatten(1).any(1).sum().item()
    assert (0 < erased < len(images)) if added else erased < 5
    labels = np.concatenate([batch["label"][:, 0].numpy() for (batch,) in names["loader"]])
    assert sorted(labels) == sorted(index.labels)
    if added:
        with scae_dali.SaliencyCache(tmp_path / "maps.lmdb", index=index) as cache:
            assert cache.coverage().found == len(index)


def test_one_process_of_several(index, tmp_path, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    store = f'"gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1'
    changes = {'"nccl"': store, "maps.lmdb": str(tmp_path / "maps.lmdb")}
    changes["torch.cuda.set_device(local)"] = ""
    try:
        names = run("ranks", changes, scae_dali=scae_dali, index=index)
    finally:
        torch.distributed.destroy_process_group()
    assert names["scae"].num_shards == 1


def test_images_in_memory(tmp_path):
    """A tail is mixed, and rectangles have the mean's grey."""
    labels = np.array([0] * 40 + [1] * 2)
    pixels = np.random.default_rng(0).integers(0, 100, (42, 32, 32, 3), np.uint8)
    given = {"names": [str(i) for i in range(42)], "labels": labels, "pixels": pixels}
    changes = {"maps.lmdb": str(tmp_path / "maps.lmdb")}
    names = run("memory", changes, **given, MEAN=MEAN, STD=STD)
    batches = [batch for _ in range(5) for batch in names["loader"]]
    assert len(batches) == 5 * 4
    mu, classes = (torch.cat([getattr(b, name) for b in batches]) for name in ("mu", "labels"))
    assert (mu[classes == 0] == 1).all()
    assert (mu[classes == 1] < 1).any()
    one = batches[-1]
    boxes = one.boxes[(one.status & 1).bool()]
    assert len(boxes)
    assert (boxes[:, 2:] > 0).all()


def test_composition(index, cache):
    names = run("compose", {"maps.lmdb": cache.path}, scae_dali=scae_dali, index=index)
    stage = names["stage"]
    planner = stage.planner()
    assert stage.conditional
    assert {"op0", "sign1", "box"} <= planner.columns.keys()
    ids = np.arange(len(index))
    rows = planner(ids, 0 * ids, np.full((len(ids), 2), 224))
    assert (rows[:, planner.columns["box"]].prod(axis=1) > 0).any()


def test_maps_of_ones_own(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    maps = np.random.default_rng(0).random((len(index) - 1, 9, 12))
    for name, one in zip(index.files[1:], maps, strict=True):
        file = Path("masks", name).with_suffix(".npy")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, one)
    names = run("caches", {}, index=index, scae_dali=scae_dali)
    assert names["missing"].tolist() == names["done"].missing.tolist() == [0]
    exported = np.load("exported.npy")
    assert not exported[0].any()
    with scae_dali.SaliencyCache("all.lmdb", index=index) as merged:
        np.testing.assert_array_equal(merged.snapshot().maps, exported)


def test_a_switch(index):
    stage = run("switch", {}, scae_dali=scae_dali, index=index)["stage"]
    assert not stage.conditional
    assert {"box", "weight", "paste_shapes"} <= stage.planner().columns.keys()


def test_a_method_of_ones_own(greys, monkeypatch):
    module = types.ModuleType("my_package.my_method")
    monkeypatch.setitem(sys.modules, "my_package", types.ModuleType("my_package"))
    monkeypatch.setitem(sys.modules, "my_package.my_method", module)
    exec(BLOCKS["my_method"], module.__dict__)
    index, _, grey = greys
    stage = scae_dali.Stage(
        index, "my_package.my_method", epochs=4, batch_size=10, seed=7, prob=0.5
    )
    images, ids, *_ = given(own_pipeline(greys, stage=stage))
    middle = images[:, 8:24, 8:24].reshape(len(images), -1)
    erased = (middle == 0).all(1)
    assert 0.3 < erased.mean() < 0.7
    assert (images[:, 0, 0, 0] == grey[ids]).all()
    assert (middle[~erased, 0] == grey[ids][~erased]).all()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 4, 32, 32)
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))


def test_webdataset_by_path_keys(index, tmp_path):
    """Two tars; and a pass over them that the stage makes by itself."""
    pack_tars(index, tmp_path, archives=2)
    packed = ImageIndex.from_webdataset("train-*.tar", tmp_path)
    cache = fill_cache(tmp_path / "maps.lmdb", packed, naming="path")
    names = ImageIndex.from_webdataset(str(tmp_path / "train-*.tar"))
    assert names.fingerprint != packed.fingerprint  # without a root the names are whole paths
    changes = {"/data/wds": str(tmp_path), "maps.lmdb": cache.path}
    names = run("webdataset", changes, MEAN=MEAN, STD=STD)
    check(names["train"](), packed, names["scae"])
    names["model"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    exec(code_of("iterator", {}), names)
    assert names["loss"].isfinite()
    own = {"cache": tmp_path / "own.lmdb", "epochs": 100, "batch_size": 10, "seed": 7}
    report = scae_dali.SCAE(packed, **own).refresh(Net(), 10, size=64, layer="features")
    assert report.images == 50


def test_tfrecord_by_path_keys(index, tmp_path):
    pack_tfrecords(index, tmp_path, archives=1)
    record = str(tmp_path / "train-00000-of-00001")
    packed = ImageIndex.from_tfrecord(record)
    offsets = [int(name.rpartition(" ")[2]) for name in packed.files]
    ends = [*offsets[1:], os.path.getsize(record)]
    lines = [f"{at} {end - at}\n" for at, end in zip(offsets, ends, strict=True)]
    Path(f"{record}.idx").write_text("".join(lines))
    cache = fill_cache(tmp_path / "maps.lmdb", packed, naming="path")
    changes = {"train.tfrecord": record, "maps.lmdb": cache.path}
    names = run("tfrecord", changes, MEAN=MEAN, STD=STD)
    check(names["train"](), packed, names["scae"])


@pytest.fixture(scope="module")
def packed_zip(folder, index, tmp_path_factory):
    """The images in a zip file, and the list of their names and labels."""
    here = tmp_path_factory.mktemp("zip")
    with zipfile.ZipFile(here / "train.zip", "w") as archive:
        for name in index.files:
            archive.write(folder / name, name)
    lines = [f"{n} {k}\n" for n, k in zip(index.files, index.labels, strict=True)]
    (here / "samples.txt").write_text("".join(lines))
    return here


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_pass_sees_the_samples_that_it_wants_and_no_others(packed_zip, tmp_path, share):
    torch.manual_seed(0)
    changes = {
        "maps.lmdb": str(tmp_path / "maps.lmdb"),
        "epoch=0": f'epoch=0, layer="features", share={share}',
        "samples.txt": str(packed_zip / "samples.txt"),
        "train.zip": str(packed_zip / "train.zip"),
    }
    net, seen = Net(), []
    net.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    names = run("refresh_zip", changes, model=net, MEAN=MEAN, STD=STD)
    names["archive"].close()
    cache = names["cache"]
    assert cache.meta.epoch == 0
    assert cache.read(np.arange(50))[1].sum() == sum(seen) == np.ceil(50 * share)


@pytest.fixture(scope="module")
def greys(tmp_path_factory):
    """24 images of class a and 5 of b, of several sizes, each of one grey: index, cache, grey."""
    root = tmp_path_factory.mktemp("greys")
    grey = 250 - 8 * np.arange(29)
    for k, value in enumerate(grey.tolist()):
        path = root / "ab"[k >= 24] / f"{k:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (30 + k, 60 - k), (value,) * 3).save(path)
    index = ImageIndex(root)
    return index, fill_cache(root.parent / "greys.lmdb", index), grey


def own_pipeline(
    greys, *, size=(32, 32), window=True, conditionals=True, index=None, crop=None, stage=None,
    **settings,
):  # fmt: skip
    """A pipeline as the README has it, on data with a tail. Yields flat images, ids and targets."""
    files, cache, _ = greys
    if index is not None:
        cache = None  # it is of the files
    partner = {} if crop is None else {"partner_crop": crop}
    settings = {"tail": 0.5, "fill": "zero", "mix_alpha": 2.0} | settings
    scae = stage
    if stage is None:
        scae = scae_dali.SCAE(index or files, cache, epochs=4, batch_size=10, seed=7, **settings)

    @pipeline_def(
        batch_size=10,
        num_threads=1,
        device_id=None,
        enable_checkpointing=True,
        enable_conditionals=conditionals,
    )
    def train():
        encoded, ids = fn.readers.file(
            files=list(files.files), file_root=files.root,
            name="Reader", shuffle_after_epoch=True, pad_last_batch=True,
        )  # fmt: skip
        shapes = fn.peek_image_shape(encoded)
        start, shape = fn.random_crop_generator(shapes, seed=1)
        if window:
            images = fn.decoders.image_slice(encoded, start=start, shape=shape, axis_names="HW")
        else:
            images = fn.decoders.image(encoded)
        images = fn.resize(images, size=(32, 32))
        frame = (start, shape, shapes) if window else None
        images, targets = scae(images, ids, window=frame, size=size, **partner)
        return fn.flip(images, horizontal=fn.random.coin_flip(seed=2)), ids, *targets

    return train()


def given(pipeline, batches=12):
    """Images uint8 [N, 32, 32, 3], ids, labels, partners' labels, mu."""
    outputs = [[np.asarray(o.as_array()) for o in pipeline.run()] for _ in range(batches)]
    images, *rest = (np.concatenate(one) for one in zip(*outputs, strict=True))
    return images, *(one[:, 0] for one in rest)


@pytest.mark.parametrize("size", [(32, 32), None])
@pytest.mark.parametrize("window", [True, False])
def test_tail_classes_are_mixed_in_somebodys_own_pipeline(greys, size, window):
    """The grey of a mix tells the partner and its weight."""
    images, ids, label, partner, mu = given(
        own_pipeline(greys, size=size, window=window, neighbors=0)
    )
    index, _, grey = greys
    assert (label == index.labels[ids]).all()
    mixed = mu < 1
    assert set(label[mixed]) == set(partner[mixed]) == {1}
    assert (partner[~mixed] == label[~mixed]).all()
    assert 0.2 < mixed[label == 1].mean() < 0.8
    for image, i, weight in zip(images[mixed], ids[mixed], mu[mixed], strict=True):
        (value,) = set(image.ravel().tolist())  # and no rectangle
        others = [j for j in range(24, 29) if j != i]
        wanted = [weight * grey[i] + (1 - weight) * grey[j] for j in others]
        assert np.abs(np.array(wanted) - value).min() < 0.51
    seen = set(zip(ids[mixed].tolist(), images[mixed, 0, 0, 0].tolist(), strict=True))
    assert len(seen) > 5
    for image, i in zip(images[~mixed], ids[~mixed], strict=True):
        assert set(image.ravel().tolist()) <= {0, int(grey[i])}


def test_a_neighbouring_class_comes_from_the_cache(greys):
    greys[1].write_neighbors(np.array([[1], [0]], np.uint16))
    _, _, label, partner, mu = given(own_pipeline(greys, mix_prob=1.0))
    assert (mu[label == 0] == 1).all()
    assert 0.2 < (partner[label == 1] == 0).mean() < 0.8


def test_the_partners_crop_may_be_padded(greys):
    """Then what lies outside the partner is black, and the sample's own share is left there."""
    crop = scae_dali.CropConfig(kind="pad", pad=20)
    pipeline = own_pipeline(greys, mix_prob=1.0, neighbors=0, crop=crop)
    images, ids, label, _, mu = given(pipeline)
    grey, borders = greys[2], 0
    for image, i, weight in zip(images[label == 1], ids[label == 1], mu[label == 1], strict=True):
        own = weight * grey[i]
        assert image.min() > own - 0.51
        rows, columns = (image.max((axis, 2)) for axis in (1, 0))
        borders += min(rows[0], rows[-1], columns[0], columns[-1]) < own + 0.51
    assert borders > (label == 1).sum() / 2


def test_without_conditionals_the_error_says_what_to_do(greys):
    message = (
        "enable_conditionals must be True where samples are mixed: define the pipeline with "
        r"@pipeline_def\(enable_conditionals=True, ...\), or set the method's mix_prob=0"
    )
    with pytest.raises(ValueError, match=message):
        own_pipeline(greys, conditionals=False)
    assert (given(own_pipeline(greys, conditionals=False, mix_prob=0.0), 2)[-1] == 1).all()


@pytest.fixture(scope="module")
def unreadable(greys):
    """The index of `greys` by names that are no files, as those in some archive are."""
    files = greys[0]
    names = [f"archive/{name}" for name in files.files]
    return ImageIndex.from_arrays(names, files.labels, classes=files.classes)


@pytest.mark.parametrize("size", [(32, 32), None])
def test_where_images_cannot_be_read_partners_are_of_the_batch(greys, unreadable, size):
    """Grey, label and weight of each mix, batch by batch; of the own class if the batch has it."""
    with pytest.warns(RuntimeWarning, match=r"cannot be read \('archive/b/24.png' is no file\)"):
        pipeline = own_pipeline(greys, index=unreadable, size=size, mix_prob=1.0, neighbors=0)
    grey, labels, alone, together = greys[2], greys[0].labels, 0, 0
    for images, ids, label, partner, mu in (given(pipeline, 1) for _ in range(24)):
        assert (label == labels[ids]).all()
        mixed = label == 1
        assert (mu[~mixed] == 1).all()
        assert (partner[~mixed] == label[~mixed]).all()
        for row in np.flatnonzero(mixed):
            (value,) = set(images[row].ravel().tolist())
            others = [i for k, i in enumerate(ids) if k != row]
            mine = [i for i in others if labels[i] == 1]
            weight = mu[row]
            mixes = {i: weight * grey[ids[row]] + (1 - weight) * grey[i] for i in mine or others}
            of = {labels[i] for i, mix in mixes.items() if abs(mix - value) < 0.51}
            assert partner[row] in of
            alone, together = alone + (not mine), together + bool(mine)
    assert alone > 3
    assert together > 10


def test_one_warning_is_enough_and_none_where_nothing_is_mixed(greys, unreadable):
    settings = {"epochs": 4, "batch_size": 10, "seed": 7, "tail": 0.5}
    scae = scae_dali.SCAE(unreadable, None, **settings)
    with pytest.warns(RuntimeWarning, match="second images are taken from the same batch"):
        own_pipeline(greys, stage=scae)
    own_pipeline(greys, stage=scae)  # warnings are errors
    assert (given(own_pipeline(greys, index=unreadable, mix_prob=0.0), 2)[-1] == 1).all()


def test_cmo_pastes_boxes_of_images_of_the_batch(greys, unreadable):
    """What is pasted has the grey, the label and the share that the targets tell; the rare class
    is pasted more often than it is in the batch."""
    stage = scae_dali.Stage(
        unreadable, "cmo", epochs=9, batch_size=10, seed=7, start_epoch=0, prob=1.0,
        per="sample", skip_first=0, skip_last=0,
    )  # fmt: skip
    with pytest.warns(RuntimeWarning, match="taken from the same batch"):
        pipeline = own_pipeline(greys, stage=stage)
    grey, labels, pasted = greys[2], greys[0].labels, []
    for images, ids, label, partner, mu in (given(pipeline, 1) for _ in range(24)):
        assert (label == labels[ids]).all()
        for image, i, other, weight in zip(images, ids, partner, mu, strict=True):
            values, counts = np.unique(image, return_counts=True)
            share = dict(zip(values.tolist(), counts / image.size, strict=True))
            assert share.pop(int(grey[i]), 0) == pytest.approx(weight, abs=1e-6)
            if share:
                (value,) = share
                j = grey.tolist().index(value)
                assert j in ids
                assert labels[j] == other
                pasted.append(other)
    assert len(pasted) > 150
    assert 0.3 < np.mean(pasted) < 0.6  # of the images, 0.17 are of the rare class
