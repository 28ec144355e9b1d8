"""Weights to start from, and their validation alone."""

import argparse
import hashlib
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
    torch.save(state, first)
    wrapped = {f"module.{name}": value for name, value in reversed(state.items())}
    torch.save({"epoch": 4, "model": wrapped}, moved)
    torch.save({name: value + 1 for name, value in state.items()}, other)
    straight, out = tmp_path / "straight", tmp_path / "run"
    start(*arguments(images, straight, weights=first))
    start(*arguments(images, out, epochs=1, weights=first))
    for wrong, told in (
        (
            {"weights": other},
            r"other weights than '.*c.pt' holds: .*; --weights=.*a.pt\), or ",
        ),
        ({}, r"weights='.*a.pt', not None: .*; --weights=.*a.pt\), or "),
        (
            {"weights": tmp_path / "no.pt"},
            "weights must be the file of a state_dict, got '.*no",
        ),
    ):
        with pytest.raises(SystemExit, match=told):
            start(*arguments(images, out, **wrong), "--resume")
    start(*arguments(images, out, weights=moved), "--resume")
    assert json.loads((out / "config.json").read_text())["weights"] == str(moved)
    # The rate is constant here, so a run of one epoch begins as one of two.
    assert_same_run(out, straight)


def test_a_run_of_an_older_version_knows_the_file_of_its_weights(images, whole, tmp_path):
    """Its checkpoint has a hash of the file's bytes, and no name of the file."""
    first, moved, other = (tmp_path / name for name in ("a.pt", "b.pt", "c.pt"))
    for path in (first, moved):
        path.write_bytes((whole / "weights.pt").read_bytes())
    torch.save({name: value + 1 for name, value in weights(whole).items()}, other)
    out, straight = tmp_path / "run", tmp_path / "straight"
    start(*arguments(images, straight, weights=first))
    start(*arguments(images, out, epochs=1, weights=first))
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    del state["of"]["weights_content"]
    state["of"]["weights"] = hashlib.blake2b(first.read_bytes(), digest_size=16).hexdigest()
    torch.save(state, out / "checkpoint.pt")
    config = (out / "config.json").read_text()
    for text, told in (
        (config, "weights='.*a.pt', not None: .*; --weights=.*a.pt"),
        ("{", "was made with weights, and none are given: resume it"),
    ):
        (out / "config.json").write_text(text)
        with pytest.raises(SystemExit, match=told):
            start(*arguments(images, out), "--resume")
        with pytest.raises(SystemExit, match=r"other weights than '.*c.pt' holds"):
            start(*arguments(images, out, weights=other), "--resume")
    start(*arguments(images, out, weights=moved), "--resume")
    assert_same_run(out, straight)
    start(*arguments(images, out, weights=moved), "--resume")  # now its tensors are known


def test_a_run_with_an_average_is_evaluated_by_it(images, tmp_path, capsys):
    """As in its own validation, from weights.pt and from its checkpoint; other programs' files with
    both are taken as timm and torchvision take them, and told."""
    out = tmp_path / "run"
    start(*arguments(images, out, **{"optim.ema": 0.8, "optim.lr": 0.5}))
    last = rows(out)[-1]
    argv = arguments(images, "x")
    own = figures(capsys, *argv, f"--weights={out / 'checkpoint.pt'}")
    assert own == {name: last[name] for name in own}
    assert own == figures(capsys, *argv, f"--weights={out / 'weights.pt'}")
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    other = {"model": state["net"], "model_ema": state["ema"]}
    torch.save(other, tmp_path / "other.pt")
    start(*argv, f"--weights={tmp_path / 'other.pt'}", "--evaluate")
    said = capsys.readouterr()
    assert json.loads(said.out) != own
    assert "note: weights '" in said.err
    assert "holds 'model' and an average, 'model_ema': 'model' is taken" in said.err
    start(*argv, f"--weights={out / 'checkpoint.pt'}", "--evaluate")
    assert "their average: the average is taken" in capsys.readouterr().err


def test_a_network_that_nothing_trains_is_told(images, tmp_path, monkeypatch):
    class Detached(Tiny):
        def forward(self, images):
            return super().forward(images).detach()

    def frozen(name, classes, size):
        return Tiny(classes).requires_grad_(False)

    monkeypatch.setattr("pipelines.state.make_network", frozen)
    with pytest.raises(SystemExit, match=r"model 'mine' has no parameter to train: leave requires"):
        start(*arguments(images, tmp_path / "run", model="mine"))
    assert not (tmp_path / "run" / "config.json").exists()
    monkeypatch.setattr("pipelines.state.make_network", lambda name, n, size: Detached(n))
    with pytest.raises(SystemExit, match=r"model 'mine' gives logits without a gradient: its forw"):
        start(*arguments(images, tmp_path / "run", model="mine"))
    assert not (tmp_path / "run" / "config.json").exists()
    half = Tiny(3)
    half.features.requires_grad_(False)
    monkeypatch.setattr("pipelines.state.make_network", lambda name, n, size: half)
    before = half.features[0].weight.clone()
    start(*arguments(images, tmp_path / "half", epochs=1))
    assert torch.equal(half.features[0].weight, before)


def test_lookahead_goes_on_bit_for_bit(images, tmp_path):
    """Four epochs of four steps; every sixth step goes back, half way to the one before it."""
    more = {"optim.name": "lookahead_adamw", "optim.lr": 0.01}
    start(*arguments(images, tmp_path / "straight", epochs=4, **more))
    for epochs, resume in ((2, []), (4, ["--resume"])):
        start(*arguments(images, tmp_path / "run", epochs=epochs, **more), *resume)
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    start(*arguments(images, tmp_path / "plain", epochs=4, **more | {"optim.name": "adamw"}))
    assert rows(tmp_path / "plain") != rows(tmp_path / "straight")


def test_ctrl_c_while_weights_are_validated_is_told_in_a_line(images, whole, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "evaluate", interrupt)
    with pytest.raises(SystemExit, match="130"):
        start(*arguments(images, "x", weights=whole / "weights.pt"), "--evaluate")
    assert capsys.readouterr().err == "interrupted\n"


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


def make(monkeypatch, network):
    for room in ("state", "validation"):
        monkeypatch.setattr(f"pipelines.{room}.make_network", lambda name, n, size: network(n))


class Dropping(Tiny):
    """With dropout, and a count of its batches in its extra state."""

    batches = 0

    def forward(self, images):
        self.batches += self.training
        return torch.nn.functional.dropout(super().forward(images), 0.5, self.training)

    def get_extra_state(self):
        return {"batches": self.batches}

    def set_extra_state(self, state):
        self.batches = state["batches"]


def test_a_network_that_training_alone_shows_not_to_fit_leaves_the_folder_free(
    images, tmp_path, monkeypatch
):
    class Auxiliary(Tiny):
        def forward(self, images):
            logits = super().forward(images)
            return [logits, logits] if self.training else logits

    out = tmp_path / "run"
    make(monkeypatch, Auxiliary)
    with pytest.raises(SystemExit, match="in training too, got list for a batch of 2; make its f"):
        start(*arguments(images, out))
    make(monkeypatch, Tiny)
    start(*arguments(images, out))
    make(monkeypatch, Auxiliary)
    start(*arguments(images, out, weights=out / "weights.pt"), "--evaluate")


def test_the_trial_of_a_network_changes_no_run(images, tmp_path, capsys, monkeypatch):
    make(monkeypatch, Dropping)
    straight, out, untried = (tmp_path / name for name in ("straight", "run", "untried"))
    start(*arguments(images, straight, epochs=3))
    for epochs in (1, 3):
        start(*arguments(images, out, epochs=epochs), "--resume")
    monkeypatch.setattr("pipelines.state.check_fits", lambda *_, **more: None)
    start(*arguments(images, untried, epochs=3))
    assert_same_run(straight, untried)
    assert_same_run(straight, out)
    assert weights(out)["_extra_state"] == {"batches": 12}
    found = figures(capsys, *arguments(images, "x", weights=out / "weights.pt"))
    assert found.items() <= rows(out)[-1].items()
    second = {"second_stage.classifier": "tune", "second_stage.weights": out / "weights.pt"}
    start(*arguments(images, tmp_path / "second", epochs=1, **second))
    assert "scale" in "".join(weights(tmp_path / "second"))


def test_extra_state_that_could_not_be_read_again_is_told_before_training(
    images, tmp_path, monkeypatch
):
    class Odd(Dropping):
        def get_extra_state(self):
            return {1: argparse.Namespace(batches=self.batches)}

    make(monkeypatch, Odd)
    with pytest.raises(
        SystemExit, match="model 'resnet50' has a dict as _extra_state, which could"
    ):
        start(*arguments(images, tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("source", [None, "pass", "harvest"])
def test_a_network_that_needs_autocast_is_trained_with_it(images, tmp_path, monkeypatch, source):
    class Half(Tiny):
        def __init__(self, classes):
            super().__init__(classes)
            self.fc.to(torch.bfloat16)

    make(monkeypatch, Half)
    more = {"amp": "bf16"}
    if source is not None:
        more |= {"method": "scae", "scae.refresh_every": 1}
        more |= {"saliency.layer": "features", "saliency.source": source}
    start(*arguments(images, tmp_path / "run", **more))
    given = {"weights": tmp_path / "run" / "weights.pt"}
    start(*arguments(images, "x", **more | given), "--evaluate")
    with pytest.raises(SystemExit, match="its weights are bfloat16 and float32 and images are fl"):
        start(*arguments(images, tmp_path / "other", **more | {"amp": "none"}))
