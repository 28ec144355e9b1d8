"""Small differences between set-ups that ended in a raw error. Found by trying."""

import os
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from conftest import ROOT
from nvidia.dali import fn, pipeline_def, types
from packs import write_tar

from pipelines.data import DataConfig
from pipelines.recipe import Config
from scae_dali import Loader, Stage
from scae_dali.commands import build_cache, main
from scae_dali.data.index import DatasetError, ImageIndex


def test_a_home_folder_is_understood_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = DataConfig(root="~/data", train_list="~/list.txt", index_cache="~/kept")
    config = Config(data=data, out="~/runs/1", weights="~/w.pt")
    given = (data.root, data.train_list, data.index_cache, config.out, config.weights)
    names = ("data", "list.txt", "kept", "runs/1", "w.pt")
    assert given == tuple(str(tmp_path / name) for name in names)
    assert config.data.val_list is None
    assert DataConfig(root="a~b").root == "a~b"
    packed = DataConfig(root="/d", format="webdataset", train="~/t-*.tar", val="~/v.tar")
    assert (packed.train, packed.val) == (str(tmp_path / "t-*.tar"), str(tmp_path / "v.tar"))


def test_a_home_folder_is_understood_by_the_commands(monkeypatch, tmp_path, folder, cache):
    """Also behind =, where a shell leaves it alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(folder)
    (tmp_path / "maps.lmdb").symlink_to(cache.path)
    for command in (
        ["check-images", "--data=~/photos", "--out=~/broken.txt"],
        ["copy-cache", "~/maps.lmdb", "--out=~/copy.lmdb"],
        ["export-maps", "~/copy.lmdb", "--data=~/photos", "--out", "~/maps.npy"],
        ["inspect-cache", "~/maps.lmdb", "--picture=~/maps.png", "--data", "~/photos"],
        ["merge-caches", "~/maps.lmdb", "--data=~/photos", "--out=~/merged.lmdb"],
    ):
        assert not main.main(command), command
    names = {"broken.txt", "copy.lmdb", "maps.npy", "maps.png", "merged.lmdb"}
    assert names <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "~").exists()
    options = [
        "--data=~/photos",
        "--model=resnet18",
        "--weights",
        "~/w.pt",
        "--list=~/~.txt",
        "--out=a~/b~",
    ]
    given = build_cache.parse(options)
    found = (given.data, given.weights, given.list, given.out)
    assert found == (f"{tmp_path}/photos", f"{tmp_path}/w.pt", f"{tmp_path}/~.txt", "a~/b~")


def pipeline(index, name="Reader", dtype=None):
    stage = Stage(index, "none", epochs=2, batch_size=5, seed=1)

    @pipeline_def(batch_size=5, num_threads=1, device_id=None)
    def define():
        encoded, ids = fn.readers.file(
            files=list(index.files), file_root=index.root, name=name, pad_last_batch=True
        )
        if dtype is not None:
            ids = fn.cast(ids, dtype=dtype)
        images = fn.resize(fn.decoders.image(encoded), size=(8, 8))
        images, targets = stage(images, ids, size=(8, 8))
        return images, *targets

    return define()


def test_a_reader_of_another_name_is_told(index):
    with pytest.raises(
        ValueError, match=r'must have a reader named "Reader", got readers named Fi'
    ):
        Loader(pipeline(index, name="Files"), ["images", "label", "partner", "mu"], index,
               drop_last=True)  # fmt: skip


def test_ids_of_8_bits_are_told_from_names(index):
    with pytest.raises(RuntimeError, match="ids must be int32 or int64, or names, got one number"):
        pipeline(index, dtype=types.UINT8).run()
    assert pipeline(index, dtype=types.INT16).run()


def test_names_of_an_archive_that_begin_with_a_dot(tmp_path):
    index = ImageIndex.from_arrays(["./d/1.jpg", "d/2.jpg"], np.array([0, 1]))
    names = ["train.tar:512:./d/1.jpg", "train.tar:1024:./d/2.jpg", "train.tar:512:d/1.jpg"]
    assert index.ids_of(names[:2]).tolist() == [0, 1]


NAMES = ("/d/1", "../d/2", "../../d/3", "d/../../e/4", "//f/5", "d/6", "./d/7", "d/ä8", "日/9")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("cut", [False, True])
def test_members_that_dali_names_otherwise(folder, tmp_path, form, cut):
    """Two archives of the same names, of which the index may have every second sample."""
    jpeg = next(folder.rglob("*.jpg")).read_bytes()
    for k in range(2):
        members = []
        for i, name in enumerate(NAMES):
            label = str(len(NAMES) * k + i).encode()
            members += [(f"{name}.jpg", jpeg), (f"{name}.cls", label)]
        write_tar(tmp_path / "t" / f"{k}.tar", members, form)
    (tmp_path / "link").symlink_to(tmp_path / "t")
    index = ImageIndex.from_webdataset("*.tar", tmp_path / "t", cache=tmp_path / "kept")
    assert len(index) == 2 * len(NAMES)
    if cut:
        index = index.subset(np.arange(len(index))[::-2])

    @pipeline_def(batch_size=2 * len(NAMES), num_threads=1, device_id=None)
    def define():
        paths = [str(tmp_path / "link" / f"{k}.tar") for k in range(2)]
        encoded, labels = fn.readers.webdataset(paths=paths, ext=["jpg", "cls"])
        return fn.get_property(encoded, key="source_info"), labels

    sources, labels = define().run()
    sources = [bytes(np.asarray(sources[i])).decode() for i in range(2 * len(NAMES))]
    labels = [int(bytes(np.asarray(labels[i]))) for i in range(2 * len(NAMES))]
    known = set(index.labels.tolist())
    names = pickle.loads(pickle.dumps(index)).names()
    for _ in range(2):  # it remembers what it has seen
        ids = names.ids([s for s, label in zip(sources, labels, strict=True) if label in known])
        assert index.labels[ids].tolist() == [label for label in labels if label in known]
    if cut:
        with pytest.raises(DatasetError, match="no sample is named"):
            names.ids([s for s, label in zip(sources, labels, strict=True) if label not in known])


def test_what_lies_elsewhere_is_not_taken_for_a_member(folder, tmp_path):
    jpeg = next(folder.rglob("*.jpg")).read_bytes()
    write_tar(tmp_path / "a.tar", [("/d/1.jpg", jpeg), ("/d/1.cls", b"0")])
    write_tar(tmp_path / "b.tar", [("/d/1.jpg", jpeg), ("/d/1.cls", b"1")])
    index = ImageIndex.from_webdataset("a.tar", tmp_path)
    assert index.ids_of([f"{tmp_path}/a.tar:512:d/1.jpg"]).tolist() == [0]
    for name in (
        "a.tar:513:d/1.jpg",
        "a.tar:512:d/2.jpg",
        "b.tar:512:d/1.jpg",
        "c.tar:512:d/1.jpg",
    ):
        with pytest.raises(DatasetError, match="no sample is named"):
            index.ids_of([f"{tmp_path}/{name}"])


@pytest.mark.parametrize("command", ["train.py --help", "-m scae_dali.commands.main --help"])
def test_a_terminal_that_knows_no_unicode(command):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


CODE = """
from nvidia.dali import fn, pipeline_def

@pipeline_def(batch_size=4, num_threads=1, device_id=None, enable_conditionals=True)
def define():
    encoded, ids = fn.readers.file(
        files=list(index.files), file_root=index.root, name="Reader", pad_last_batch=True
    )
    images = fn.resize(fn.decoders.image(encoded), size=(16, 16))
    images, targets = stage(images, ids, size=(16, 16))
    return images, *targets

define()
"""


@pytest.mark.parametrize("method", ["rand_augment", "scae", "cmo"])
def test_a_pipeline_without_source_is_told_why_it_cannot_branch(tailed, tailed_cache, method):
    cache = {"cache": tailed_cache} if method == "scae" else {}
    stage = Stage(tailed, method, epochs=9, batch_size=4, seed=1, **cache)
    assert stage.conditional
    with pytest.raises(ValueError, match="must have its source in a file or a notebook where"):
        exec(CODE, {"index": tailed, "stage": stage})


def test_a_pipeline_that_needs_no_branch_may_have_no_source(index):
    stage = Stage(index, "cutout", epochs=2, batch_size=4, seed=1)
    exec(CODE, {"index": index, "stage": stage})
