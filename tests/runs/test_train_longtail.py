"""train.py on long-tailed images in memory: mixing, killed and resumed, and second stages."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import write_pngs
from scripts import KILLER, ROOT, check_same_weights, long_tailed, rows, run_code, run_here

from scae_dali.cache import SaliencyCache


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_pngs(root / "train", {"a": 40, "b": 20, "c": 3}, (32, 32))
    write_pngs(root / "test", {"a": 5, "b": 5, "c": 5}, (32, 32), seed=1)
    return root


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    monkeypatch = pytest.MonkeyPatch()
    run_here(monkeypatch, *long_tailed(data, out))
    monkeypatch.undo()
    return out


def test_the_tail_is_mixed_and_the_metrics_tell_the_classes_apart(whole):
    lines = rows(whole)
    assert all(line["share"]["mixed"] > 0 for line in lines)
    assert [line["saliency_images"] for line in lines] == [0, 63]
    last = lines[-1]
    assert last["val_top5"] == 100  # of three classes
    assert last["val_top1"] == pytest.approx(np.mean(last["val_per_class"]))
    assert last["val_few"] == last["val_per_class"][2]
    assert last["val_medium"] == pytest.approx(np.mean(last["val_per_class"][:2]))
    assert "val_many" not in last
    assert last["best_top1"] == max(line["val_top1"] for line in lines)
    assert last["median10_top1"] == np.median([line["val_top1"] for line in lines])
    with SaliencyCache(whole / "saliency.lmdb") as cache:
        assert cache.meta.grid == (8, 8)
        assert cache.read_neighbors().shape == (3, 1)


def test_without_guidance_neighbouring_classes_are_found_and_no_maps_made(
    data, tmp_path, monkeypatch
):
    out = tmp_path / "unguided"
    more = {"scae.lam_max": 0.0, "saliency.source": "harvest"}
    run_here(monkeypatch, *long_tailed(data, out, **more))
    assert [line["saliency_images"] for line in rows(out)] == [0, 0]
    with SaliencyCache(out / "saliency.lmdb") as cache:
        assert cache.read_neighbors().shape == (3, 1)
        assert (cache.stamps() == -1).all()


def test_maps_of_another_run_are_made_anew(data, whole, tmp_path, monkeypatch):
    cache = shutil.copytree(whole / "saliency.lmdb", tmp_path / "theirs.lmdb")
    out = tmp_path / "run"
    run_here(monkeypatch, *long_tailed(data, out, **{"saliency.cache": cache, "seed": 3}))
    assert [line["saliency_images"] for line in rows(out)] == [0, 63]


@pytest.mark.parametrize("sampling", ["shuffle", "class_balanced"])
def test_killed_within_an_epoch_a_run_goes_on_as_if_nothing_happened(
    data, whole, tmp_path, monkeypatch, sampling
):
    reference, out = whole, tmp_path / "killed"
    if sampling != "shuffle":
        reference = tmp_path / "reference"
        run_here(monkeypatch, *long_tailed(data, reference, sampling=sampling))
    argv = [*long_tailed(data, out, sampling=sampling), "--resume"]
    steps = {"shuffle": 7, "class_balanced": 15}[sampling]
    code = KILLER.format(
        signal="SIGKILL", module="train", owner="module.Run", name="train_step", calls=steps + 3
    )
    killed = run_code(code, *argv)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 2)
    run_here(monkeypatch, *argv)
    assert rows(out) == rows(reference)
    check_same_weights(out, reference)


@pytest.mark.parametrize(
    ("overlay", "trained"),
    [
        ("crt", {"fc.weight", "fc.bias"}),
        ("lws", {"fc.scale"}),
        ("mislas_stage2", {"fc.scale", "fc.linear.weight", "fc.linear.bias"}),
    ],
)
def test_a_second_stage_trains_the_classifier_and_renews_statistics_and_nothing_else(
    data, whole, tmp_path, monkeypatch, capsys, overlay, trained
):
    out = tmp_path / "second"
    config = {"config": ROOT / "pipelines" / "cifar100_lt.yaml"}
    argv = long_tailed(data, out, **config)
    argv[2:2] = ["--config", str(ROOT / "pipelines" / f"{overlay}.yaml")]
    argv += ["--second_stage.weights", str(whole / "weights.pt"), "--epochs", "1"]
    run_here(monkeypatch, *argv)
    first = torch.load(whole / "weights.pt", weights_only=True)
    second = torch.load(out / "weights.pt", weights_only=True)
    start = {"fc.scale": torch.ones(3)}
    start |= {f"fc.linear.{name}": first[f"fc.{name}"] for name in ("weight", "bias")}
    changed = {k for k, v in second.items() if not torch.equal(v, {**start, **first}[k])}
    buffers = {k for k in changed if "running" in k or "num_batches" in k}
    assert changed - buffers == trained
    assert buffers == {k for k in first if "running" in k or "num_batches" in k}
    # 63 images make 7 batches of 8.
    steps = second["bn1.num_batches_tracked"] - first["bn1.num_batches_tracked"]
    assert steps == 7
    assert json.loads((out / "config.json").read_text())["sampling"] == "class_balanced"
    assert rows(out)[0]["share"]["erased"] == 0
    own = ["--config", str(out / "config.json"), "--weights", str(out / "weights.pt"), "--evaluate"]
    capsys.readouterr()
    run_here(monkeypatch, *own)
    found = json.loads(capsys.readouterr().out)
    assert found["val_top1"] == pytest.approx(rows(out)[0]["val_top1"])
    assert not [name for name in found if "adjusted" in name]  # it was trained on all alike


def test_figures_are_adjusted_as_far_as_the_loss_is_not(data, whole, tmp_path, monkeypatch):
    run_here(monkeypatch, *long_tailed(data, tmp_path / "run", **{"loss.logit_adjust": 1}))
    ours, plain = rows(tmp_path / "run"), rows(whole)
    names = [name for name in ours[0] if name.endswith("_adjusted")]
    assert {"val_top1_adjusted", "val_few_adjusted", "val_ece_adjusted"} <= {*names}
    assert all(row[name] == row[name.removesuffix("_adjusted")] for row in ours for name in names)
    assert any(row[name] != row[name.removesuffix("_adjusted")] for row in plain for name in names)
    assert [row["train_loss"] for row in ours] != [row["train_loss"] for row in plain]


def test_weights_trained_with_another_loss_get_no_adjusted_figures(
    data, whole, tmp_path, monkeypatch, capsys
):
    weights = shutil.copytree(whole, tmp_path / "run", ignore=lambda *_: ["saliency.lmdb"])
    config = json.loads((weights / "config.json").read_text())
    for adjust, adjusted in ((0.0, True), (0.5, False)):
        config["loss"]["logit_adjust"] = adjust
        (weights / "config.json").write_text(json.dumps(config))
        capsys.readouterr()
        given = long_tailed(data, "x", weights=weights / "weights.pt")
        run_here(monkeypatch, *given, "--evaluate")
        said = capsys.readouterr()
        assert ("val_top1_adjusted" in json.loads(said.out)) == adjusted
        assert ("note: the weights were trained with loss.logit_adjust 0.5" in said.err) != adjusted
    remedy = said.err.strip().partition("validate with ")[2].split()
    run_here(monkeypatch, *remedy, "--evaluate")
    assert "val_top1_adjusted" in json.loads(capsys.readouterr().out)


def test_a_harvest_of_mixed_images_alone_is_told(data, tmp_path, monkeypatch, capsys):
    settings = {"method": "scae+mixup", "saliency.source": "harvest", "scae.mix_prob": 0}
    run_here(monkeypatch, *long_tailed(data, tmp_path / "run", **settings))
    told = "note: no map was harvested before epoch 1. An image that is mixed, or"
    assert told in capsys.readouterr().err


def test_mixup_and_deferred_weights_train(data, tmp_path, monkeypatch):
    argv = long_tailed(data, tmp_path / "run", method="mixup", epochs=2)
    argv += ["--loss.class_balanced", "0.99", "--loss.defer", "1"]
    run_here(monkeypatch, *argv)
    lines = rows(tmp_path / "run")
    assert [line["share"]["mixed_in_batch"] for line in lines] == [1.0, 1.0]
    assert all(np.isfinite(line["train_loss"]) for line in lines)
