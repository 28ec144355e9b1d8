"""Weights to start from, and their validation alone."""

import json

import pytest
import tiny_run
import torch
from tiny_run import Tiny, arguments, assert_same_run, rows, start, weights

import train
from scae_dali.training.second_stage import ScaledLinear
from scae_dali.training.weights import load_weights

images, tiny, whole = tiny_run.images, tiny_run.tiny, tiny_run.whole  # fixtures


@pytest.fixture(autouse=True)
def tiny_here(monkeypatch):
    monkeypatch.setattr(
        "pipelines.validation.make_network", lambda name, classes, size: Tiny(classes)
    )


def figures(capsys, *argv):
    capsys.readouterr()
    start(*argv, "--evaluate")
    return json.loads(capsys.readouterr().out)


def test_evaluate_prints_the_figures_of_the_last_epoch_and_writes_nothing(
    images, whole, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train.Run, "train_step", None)
    monkeypatch.chdir(tmp_path)
    argv = [one for one in arguments(images, "x") if not one.startswith("--out")]
    found = figures(capsys, *argv, f"--weights={whole / 'weights.pt'}")
    last = rows(whole)[-1]
    assert found == {name: last[name] for name in found}
    assert {"val_top1", "val_per_class"} <= found.keys()
    assert not list(tmp_path.iterdir())
    # A run's checkpoint has its weights too.
    assert figures(capsys, *argv, f"--weights={whole / 'checkpoint.pt'}") == found
    with pytest.raises(SystemExit, match="--evaluate needs weights, got none: give --weights FI"):
        start(*argv, "--evaluate")


def test_training_starts_from_the_weights(images, whole, tmp_path, monkeypatch):
    begun = []

    def stop(run, batch, score):
        begun.append({name: value.clone() for name, value in run.net.state_dict().items()})
        raise ValueError("stopped")

    monkeypatch.setattr(train.Run, "train_step", stop)
    with pytest.raises(SystemExit, match="stopped"):
        start(*arguments(images, tmp_path / "run", weights=whole / "weights.pt"))
    torch.testing.assert_close(begun[0], dict(weights(whole)), rtol=0, atol=0)


def test_a_run_is_resumed_with_the_same_content_wherever_it_lies(images, whole, tmp_path):
    first, moved, other = (tmp_path / name for name in ("a.pt", "b.pt", "c.pt"))
    state = weights(whole)
    for path in (first, moved):
        path.write_bytes((whole / "weights.pt").read_bytes())
    torch.save({name: value + 1 for name, value in state.items()}, other)
    straight, out = tmp_path / "straight", tmp_path / "run"
    start(*arguments(images, straight, weights=first))
    start(*arguments(images, out, epochs=1, weights=first))
    for wrong in ({"weights": other}, {}):
        with pytest.raises(SystemExit, match=r"was made with weights='[0-9a-f]{32}', not "):
            start(*arguments(images, out, **wrong), "--resume")
    start(*arguments(images, out, weights=moved), "--resume")
    assert json.loads((out / "config.json").read_text())["weights"] == str(moved)
    # The rate is constant here, so a run of one epoch begins as one of two.
    assert_same_run(out, straight)


def test_a_run_without_a_checkpoint_yet_goes_on_with_its_weights(images, whole, tmp_path):
    out = tmp_path / "run"
    argv = arguments(images, out, weights=whole / "weights.pt")
    start(*argv)
    for name in ("checkpoint.pt", "metrics.jsonl", "weights.pt"):
        (out / name).unlink()
    start(*argv, "--resume")
    assert len(rows(out)) == 2


def test_a_second_stages_head_is_multiplied_out(tmp_path):
    net, plain = Tiny(3).eval(), Tiny(3).eval()
    net.fc = ScaledLinear(net.fc)
    with torch.no_grad():
        net.fc.scale.copy_(torch.tensor([0.5, 2.0, 3.0]))
    torch.save(net.state_dict(), tmp_path / "w.pt")
    load_weights(plain, str(tmp_path / "w.pt"))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), net(x))


def test_weights_that_do_not_fit_are_refused(images, tmp_path):
    path, state = tmp_path / "w.pt", Tiny(3).state_dict()

    def refused(told, **more):
        with pytest.raises(SystemExit, match=told):
            start(*arguments(images, tmp_path / "run", weights=path, **more))
        assert not (tmp_path / "run" / "config.json").exists()

    refused(r"weights must be the file of a state_dict, got '.*w.pt', where there is none")
    path.write_text("nonsense")
    refused(r"w.pt' cannot be read \(.*\): it is no file of torch.save")
    torch.save([1], path)
    refused("w.pt' holds no state_dict of tensors; write one by")
    torch.save(Tiny(4).state_dict(), path)
    refused(r"another network \(2 .*fc.weight is \[4, 4\] there and \[3, 4\] in the n.*; set model")
    torch.save(state | {"fc.bias": torch.full((3,), torch.nan)}, path)
    refused(r"values that are not finite \(fc.bias\): its training has diverged")
    torch.save(state, path)
    refused(
        r"weights are those that a first training starts from, .* second_stage.classifier=tune",
        **{"second_stage.classifier": "tune", "second_stage.weights": path},
    )
