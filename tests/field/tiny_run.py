"""A run of train.py that takes a moment: 8 px images, a network of one convolution."""

import gc
import json
import sys

import pytest
import torch
from conftest import write_pngs
from torch import nn

import pipelines.state
import train
from scae_dali.training import lock

gc.freeze()  # what has been imported: a collection then takes a moment
COUNTS = {"a": 8, "b": 5, "c": 3}


class Tiny(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4, classes)

    def forward(self, images):
        return self.fc(self.features(images).mean((2, 3)))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(pipelines.state, "make_network", lambda name, classes, size: Tiny(classes))
    monkeypatch.setattr(lock, "PATIENCE_S", 0.1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """train/ and val/ of three classes."""
    root = tmp_path_factory.mktemp("images")
    write_pngs(root / "train", COUNTS, (8, 8))
    write_pngs(root / "val", dict.fromkeys(COUNTS, 2), (8, 8), seed=1)
    return root


def arguments(images, out, **more):
    settings = {
        "data.root": images,
        "out": out,
        "method": "none",
        "epochs": 2,
        "batch_size": 4,
        "threads": 1,
        "device": "cpu",
        "image.size": 8,
        "image.val_resize": 8,
        "optim.lr": 0.05,
        "checkpoint_every": 3,
    } | more
    return [f"--{name}={value}" for name, value in settings.items()]


def start(*arguments):
    """train.py with these arguments, in this process.

    Its pipelines are gone when it returns or raises: left to the garbage collector, which may come
    in a thread of another one, they would break that.
    """
    failed = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        try:
            train.main()
        except BaseException as error:
            failed = type(error)(*error.args)  # without its frames, which hold the pipelines
    gc.collect()
    if failed is not None:
        raise failed


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        tiny.__wrapped__(patch)
        start(*arguments(images, out))
    return out


def rows(out):
    """metrics.jsonl without what a clock gave."""
    timed = ("seconds", "img_per_s", "overhead_percent")
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def weights(out):
    return torch.load(out / "weights.pt", weights_only=True)


def assert_same_run(one, other):
    """The rows, and the weights bit for bit."""
    assert rows(one) == rows(other)
    mine, yours = weights(one), weights(other)
    assert mine.keys() == yours.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, yours[name], rtol=0, atol=0)
