"""The examples, run as they stand on small drawn data."""

import re
import runpy
import sys
from collections import Counter
from itertools import chain

import lightning
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image
from test_imports import imported

import scae_dali
from scae_dali.stage.table import Planner
from tools.make_demo_data import make

EPOCHS, STEPS = 3, 2  # steps of 32 an epoch
EXAMPLES = sorted((ROOT / "pipelines" / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """90 images of 3 classes with 70, 16 and 4: a tail."""
    root = tmp_path_factory.mktemp("demo") / "data"
    counts = {"classes": 3, "train_max": 70, "imbalance": 20, "val_per_class": 4}
    make(root, **counts, seed=0, size_range=(48, 64), report=lambda line: None)
    return root


@pytest.fixture
def example(data, monkeypatch):
    """Runs an example with options; gives its names."""

    def run(name, **options):
        options = {"data": data, "epochs": EPOCHS} | options
        path = str(ROOT / "pipelines" / "examples" / f"{name}.py")
        argv = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
        monkeypatch.setattr(sys, "argv", [path, *argv])
        torch.manual_seed(0)
        return runpy.run_path(path, run_name="__main__")

    return run


@pytest.fixture
def steps(monkeypatch):
    """The labels of every step, as the loss gets them. `stop` is the step that fails, if any does.

    The examples that have no partners take torch's own loss.
    """

    class Steps(list):
        stop = None

    seen = Steps()

    def counted(loss):
        def call(logits, labels, *rest, **keywords):
            if len(seen) == seen.stop:
                raise KeyboardInterrupt
            seen.append(labels.tolist())
            return loss(logits, labels, *rest, **keywords)

        return call

    cross_entropy = torch.nn.functional.cross_entropy
    mixed = scae_dali.mixed_cross_entropy
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", counted(cross_entropy))

    def uncounted(*arguments):  # it calls torch's
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "cross_entropy", cross_entropy)
            return mixed(*arguments)

    monkeypatch.setattr(scae_dali, "mixed_cross_entropy", counted(uncounted))
    return seen


def test_examples_use_the_public_names_alone():
    sources = [path.read_text() for path in EXAMPLES]
    assert len(sources) == 7
    for source in sources:
        assert [name for name in imported(source) if name.startswith("scae")] == ["scae_dali"]
        used = {*re.findall(r"\bscae_dali\.(\w+)", source)}
        assert used <= {*scae_dali.__all__}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_too_few_epochs_are_told_in_a_line_and_nothing_is_made(path, example, tmp_path, capsys):
    place = "cache" if '"--cache"' in path.read_text() else "out"
    with pytest.raises(SystemExit, match="2"):
        example(path.stem, **{place: tmp_path / "made"}, epochs=2)
    said = capsys.readouterr().err
    assert "error: --epochs must be 3 or more, got 2: maps are made before epoch 2\n" in said
    assert not (tmp_path / "made").exists()


def test_without_torchrun_the_example_for_it_says_so(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit, match="2"):
        example("distributed", out=tmp_path / "made")
    said = capsys.readouterr().err
    assert "WORLD_SIZE, LOCAL_RANK, GROUP_RANK must be set: start this by torchrun" in said
    assert not (tmp_path / "made").exists()


def check_maps(path, index):
    """All images have maps of the pass before epoch 2."""
    with scae_dali.SaliencyCache(path, index=index) as cache:
        assert cache.coverage().found == len(index)
        assert (cache.meta.epoch, cache.meta.input_size) == (2, 128)


def check_epochs(steps, index):
    """Every epoch has the labels of all images, in an order of its own."""
    assert [len(labels) for labels in steps] == [32, 32, 26] * EPOCHS
    epochs = [list(chain(*steps[first : first + 3])) for first in range(0, 3 * EPOCHS, 3)]
    assert [sorted(labels) for labels in epochs] == [index.labels.tolist()] * EPOCHS
    assert epochs[0] != epochs[1] != epochs[2]


def test_own_loop_goes_on_bit_for_bit(example, steps, tmp_path):
    whole = example("own_loop", out=tmp_path / "whole")
    assert [len(labels) for labels in steps] == [32] * STEPS * EPOCHS
    assert len(whole["right"]) == 12
    check_maps(tmp_path / "whole" / "maps.lmdb", whole["index"])
    wanted = list(steps)

    steps.clear()
    steps.stop = STEPS + 1  # within the second epoch
    with pytest.raises(KeyboardInterrupt):
        example("own_loop", out=tmp_path / "broken")
    assert steps == wanted[: steps.stop]
    steps.clear()
    steps.stop = None
    resumed = example("own_loop", out=tmp_path / "broken")
    assert steps == wanted[STEPS:]
    weights = resumed["model"].state_dict()
    for name, one in whole["model"].state_dict().items():
        assert torch.equal(weights[name], one)


def test_classification_iterator_gives_the_labels_of_the_images(example, steps, tmp_path):
    """Each class has a grey of its own."""
    greys = {"a": 40, "b": 120, "c": 210}
    for name, grey in greys.items():
        (tmp_path / "train" / name).mkdir(parents=True)
        for k in range(14):
            Image.new("RGB", (50, 60), (grey,) * 3).save(tmp_path / "train" / name / f"{k}.png")
    names = example("classification_iterator", data=tmp_path, cache=tmp_path / "maps.lmdb")
    assert [len(labels) for labels in steps] == [32, 10] * EPOCHS
    erased, count = 0, Counter()
    for (batch,) in names["loader"]:
        shown = batch["data"][:, 0] * names["STD"][0] + names["MEAN"][0]
        shown, labels = shown.flatten(1).round(), batch["label"].squeeze(1)
        assert shown.median(1).values.tolist() == [[*greys.values()][k] for k in labels]
        erased += (shown != shown.median(1, keepdim=True).values).any(1).sum().item()
        count.update(labels.tolist())
    assert count == {0: 14, 1: 14, 2: 14}
    assert erased > 5
    check_maps(tmp_path / "maps.lmdb", names["index"])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_proxy_plans_every_image_in_its_epoch(example, steps, monkeypatch, tmp_path):
    planned = []
    plan = Planner.__call__

    def spy(self, ids, number, size, window=None, epoch=None):
        planned.extend(zip(epoch.tolist(), ids.tolist(), strict=True))
        return plan(self, ids, number, size, window, epoch)

    monkeypatch.setattr(Planner, "__call__", spy)
    names = example("proxy", cache=tmp_path / "maps.lmdb")
    index = names["index"]
    assert sorted(planned) == [(epoch, i) for epoch in range(EPOCHS) for i in range(len(index))]
    check_epochs(steps, index)
    check_maps(tmp_path / "maps.lmdb", index)


def test_dynamic_trains_on_every_image_once(example, steps, tmp_path):
    names = example("dynamic", cache=tmp_path / "maps.lmdb")
    check_epochs(steps, names["index"])
    check_maps(tmp_path / "maps.lmdb", names["index"])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_lightning_module_goes_on_within_an_epoch(example, steps, monkeypatch, tmp_path):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer
    monkeypatch.setattr(lightning, "Trainer", lambda **options: trainer(**options, **quiet))
    example("lightning_module", out=tmp_path / "whole")
    wanted = list(steps)
    assert [len(labels) for labels in wanted] == [32] * STEPS * EPOCHS

    steps.clear()
    steps.stop = 4
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        example("lightning_module", out=tmp_path / "broken", save_every=3)
    assert steps == wanted[:4]
    steps.clear()
    steps.stop = None
    names = example("lightning_module", out=tmp_path / "broken")
    assert steps == wanted[3:]
    assert names["trainer"].global_step == STEPS * EPOCHS
    check_maps(tmp_path / "broken" / "maps.lmdb", names["index"])


def test_timm_model_takes_network_optimiser_and_mean_of_timm(example, steps, tmp_path):
    names = example("timm_model", cache=tmp_path / "maps.lmdb", model="test_resnet")
    assert isinstance(names["model"], timm.models.ResNet)
    assert type(names["optimiser"]) is torch.optim.AdamW
    assert names["mean"] == names["std"] == [127.5] * 3  # not those of ImageNet
    images = names["batch"].images
    assert -1 <= images.min() < -0.5 < 0.5 < images.max() <= 1
    assert [len(labels) for labels in steps] == [32] * STEPS * EPOCHS
    check_maps(tmp_path / "maps.lmdb", names["index"])
