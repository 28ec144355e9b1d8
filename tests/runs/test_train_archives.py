"""train.py on tars and TFRecords: as on files, resumed exactly, and what it says of bad ones."""

import os
import shutil

import pytest
import tiny_run
import torch
from packs import pack_tars, pack_tfrecords, write_tar
from tiny_run import arguments, assert_same_run, rows, start, weights

import train
from scae_dali.data.index import ImageIndex

images, tiny = tiny_run.images, tiny_run.tiny  # fixtures


@pytest.fixture(scope="module")
def packed(images, tmp_path_factory):
    """The same images in tars and in TFRecords."""
    root = tmp_path_factory.mktemp("packed")
    for split in ("train", "val"):
        index = ImageIndex(images / split)
        pack_tars(index, root / "webdataset", archives=2, prefix=split)
        pack_tfrecords(index, root / "tfrecord" / split, archives=2)
    return root


def settings(format, **more):
    patterns = {
        "webdataset": ("train-{0000..0001}.tar", "val-*.tar"),
        "tfrecord": ("train/train-*", "val/train-*"),
    }[format]
    return {"data.format": format, "data.train": patterns[0], "data.val": patterns[1]} | more


MIXED = {"method": "scae", "scae.tail": 0.7, "scae.refresh_every": 1, "scae.neighbors": 0}
MIXED |= {"saliency.layer": "features"}


@pytest.mark.parametrize("format", ["webdataset", "tfrecord"])
def test_a_run_from_archives_is_that_from_files(images, packed, tmp_path, format):
    """In the same order, with a pass over half of the images, and with partners."""
    more = {"sampling": "class_balanced", "saliency.share": 0.5} | MIXED
    start(*arguments(images, tmp_path / "files", **more))
    start(*arguments(packed / format, tmp_path / "tars", **settings(format, **more)))
    assert rows(tmp_path / "files")[1]["share"]["mixed"] > 0.1
    assert rows(tmp_path / "files")[1]["saliency_images"] == 8
    assert_same_run(tmp_path / "files", tmp_path / "tars")


class Killed(BaseException):
    """What nothing catches."""


def test_killed_within_an_epoch_a_run_goes_on_bit_for_bit(packed, tmp_path, monkeypatch):
    """Also where the archives have been moved since."""
    argv = arguments(packed / "webdataset", tmp_path / "whole", **settings("webdataset", **MIXED))
    start(*argv)
    copy = tmp_path / "elsewhere"
    shutil.copytree(packed / "webdataset", copy / "deeper")
    steps, step = [], train.Run.train_step

    def killed(run, *batch):
        steps.append(1)
        if len(steps) > 7:  # of 4 in an epoch
            raise Killed
        step(run, *batch)

    argv = [one.replace("whole", "killed") for one in argv]
    monkeypatch.setattr(train.Run, "train_step", killed)
    with pytest.raises(Killed):
        start(*argv)
    monkeypatch.setattr(train.Run, "train_step", step)
    state = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 3)
    argv = [one.replace(str(packed / "webdataset"), str(copy / "deeper")) for one in argv]
    start(*argv, "--resume", "--data.train=train-*.tar")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_run_does_not_go_on_with_other_archives(packed, tmp_path):
    root = tmp_path / "tars"
    shutil.copytree(packed / "webdataset", root)
    argv = arguments(root, tmp_path / "run", **settings("webdataset", epochs=1))
    start(*argv)
    shutil.move(root / "train-0001.tar", root / "train-0002.tar")
    with pytest.raises(SystemExit, match=r"data=.*data.train was 'train-{0000..0001}.tar', now"):
        start(*argv, "--resume", "--data.train=train-*.tar")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda png: png[:-20],
            "train-0000.tar/a/0.png' is cut off .*\n.*`scae-dali check-images`",
        ),
        (
            lambda png: png.replace(b"IDAT", b"IDAT" + b"\xff" * 24),
            r"A file in '.*tars' cannot be read or decoded; .*\n.*check-images --decode",
        ),
    ],
)
def test_an_image_that_does_not_decode_is_told_with_the_command_that_finds_it(
    packed, tmp_path, spoil, message
):
    root = tmp_path / "tars"
    shutil.copytree(packed / "webdataset", root)
    index = ImageIndex.from_webdataset("train-0000.tar", root)
    image = index.read([0])[0].tobytes()
    write_tar(root / "train-0000.tar", [("a/0.png", spoil(image)), ("a/0.cls", b"0")])
    argv = arguments(root, tmp_path / "run", **settings("webdataset"))
    with pytest.raises(SystemExit, match=message):
        start(*argv)


@pytest.mark.parametrize("kept", ["beside", "cache"])
def test_the_index_is_made_once(packed, tmp_path, kept):
    root = tmp_path / "tars"
    shutil.copytree(packed / "webdataset", root)
    for path in root.glob("*.tar"):
        os.utime(path, (1e9, 1e9))
    for path in root.glob(".*"):
        path.unlink()
    more = {} if kept == "beside" else {"data.index_cache": tmp_path / "kept"}
    start(*arguments(root, tmp_path / "run", **settings("webdataset", epochs=1, **more)))
    found = root.glob(".*.index.npz") if kept == "beside" else (tmp_path / "kept").iterdir()
    times = {path: path.stat().st_mtime_ns for path in found}
    assert len(times) == 4
    start(*arguments(root, tmp_path / "two", **settings("webdataset", epochs=1, **more)))
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert weights(tmp_path / "run").keys()
