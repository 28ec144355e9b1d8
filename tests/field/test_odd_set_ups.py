"""Small differences between set-ups that ended in a raw error. Found by trying."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from nvidia.dali import fn, pipeline_def, types

from pipelines.data import DataConfig
from pipelines.recipe import Config
from scae_dali import Loader, Stage
from scae_dali.data.index import ImageIndex


def test_a_home_folder_is_understood_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = DataConfig(root="~/data", train_list="~/list.txt", index_cache="~/kept")
    config = Config(data=data, out="~/runs/1", weights="~/w.pt")
    given = (data.root, data.train_list, data.index_cache, config.out, config.weights)
    names = ("data", "list.txt", "kept", "runs/1", "w.pt")
    assert given == tuple(str(tmp_path / name) for name in names)
    assert config.data.val_list is None
    assert DataConfig(root="a~b").root == "a~b"


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
