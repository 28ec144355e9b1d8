"""Weights as people have them: in checkpoints, behind wrappers, damaged, and of other things.

PyTorch's own forum and trackers are full of `Missing key(s) in state_dict: … Unexpected key(s)`, as
in https://discuss.pytorch.org/t/13853 for DataParallel. The others were found by trying.
"""

import argparse
import re

import pytest
import torch
from torch import nn

from scae_dali.training.networks import check_fits, make_network
from scae_dali.training.second_stage import ScaledLinear
from scae_dali.training.weights import load_weights, weights_content


def small():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))


@pytest.fixture
def trained():
    net = small()
    net(torch.zeros(2, 3, 8, 8))
    with torch.no_grad():
        for value in net.state_dict().values():
            value.copy_(torch.rand(value.shape) if value.is_floating_point() else value + 7)
    return net


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "args": {"lr": 0.1}},
        lambda state: {"model": {"model_state": state}},
        lambda state: {"net": state, "optimizer": {"state": {}}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
        lambda state: {
            "model": {f"module.{name}": value for name, value in state.items()}
            | {"n_averaged": torch.tensor(4)}
        },
    ],
    ids=["plain", "state_dict", "nested", "net", "module", "compiled", "averaged"],
)
def test_a_state_dict_is_found_behind_what_trainers_put_around_it(trained, tmp_path, wrap):
    torch.save(wrap(trained.state_dict()), tmp_path / "w.pt")
    net = small()
    net(torch.ones(2, 3, 8, 8))
    load_weights(net, str(tmp_path / "w.pt"))
    torch.testing.assert_close(net.state_dict(), trained.state_dict(), rtol=0, atol=0)


def of(state, add):
    return {name: value + add for name, value in state.items()}


OURS = {"of": {"model": "x"}, "optimizer": {"state": {}}, "ranks": [{}], "epoch": 3}


@pytest.mark.parametrize(
    ("wrap", "taken", "told"),
    [
        # The first state is the weights, the second their average; see timm, torchvision, DeiT, …
        (lambda one, two: {"state_dict": one, "state_dict_ema": two}, 0, r"\['state_dict_ema'\]"),
        (lambda one, two: {"model_ema": two, "model": one}, 0, r"\['model_ema'\]"),
        (lambda one, two: {"net": one, "ema": two, "epoch": 3}, 0, r"\['ema'\]"),
        (lambda one, two: {"model": one, "SWA": {"module": two}}, 0, r"\['SWA'\]"),
        (
            lambda one, two: {"a": 1, "model": {"net": one, "net_ema": two}},
            0,
            r"\]\['net_ema'\]",
        ),
        (
            lambda one, two: {"model": {"state_dict": one}, "averaged_model": two},
            0,
            "averaged_",
        ),
        (lambda one, two: {"model_ema": two, "epoch": 3}, 1, None),
        (lambda one, two: {"model": {"cfg": "x"}, "ema": {"state_dict": two}}, 1, None),
        (lambda one, two: {"model": one, "ema_decay": 0.9, "ema": {"decay": 0.9}}, 0, None),
        (lambda one, two: {"model": one, "schema": two}, 0, None),
        (lambda one, two: {**OURS, "net": one}, 0, None),
        (lambda one, two: {**OURS, "net": one, "ema": two}, 1, "the average is taken, which the r"),
    ],
)
def test_weights_and_their_average_in_one_file(trained, tmp_path, wrap, taken, told):
    states = trained.state_dict(), of(trained.state_dict(), 1)
    average = {"n_averaged": torch.tensor(4)}
    average |= {f"module.{name}": value for name, value in states[1].items()}
    torch.save(wrap(states[0], average), tmp_path / "w.pt")
    torch.save(states[taken], tmp_path / "plain.pt")
    net = small()
    net(torch.ones(2, 3, 8, 8))
    note = load_weights(net, str(tmp_path / "w.pt"))
    torch.testing.assert_close(net.state_dict(), dict(states[taken]), rtol=0, atol=0)
    content = weights_content(str(tmp_path / "w.pt"))
    assert content == weights_content(str(tmp_path / "plain.pt"))
    if told is None:
        assert note is None
        return
    assert re.search(told, note)
    if taken == 0:  # what the note says works
        said = re.search(r"torch.save\(torch.load\('.*'\)((\['\w+'\])+), FILE\)$", note)
        inner = torch.load(tmp_path / "w.pt")
        for name in re.findall(r"\w+", said[1]):
            inner = inner[name]
        torch.save(inner, tmp_path / "average.pt")
        assert load_weights(net, str(tmp_path / "average.pt")) is None
        torch.testing.assert_close(net.state_dict(), states[1], rtol=0, atol=0)


def test_the_content_of_weights_is_their_names_types_shapes_and_values(tmp_path):
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(True), "c": torch.zeros(0)}

    def content(state, name="w.pt"):
        torch.save(state, tmp_path / name)
        return weights_content(str(tmp_path / name))

    same = [
        {name: state[name] for name in "cba"},
        state | {"a": state["a"].T.contiguous().T},
        {"module": {f"module.{name}": value for name, value in state.items()}},
    ]
    assert {content(one, f"{k}.pt") for k, one in enumerate(same)} == {content(state)}
    others = [
        state | {"a": state["a"] + 1e-6},
        state | {"a": state["a"].reshape(3, 2)},
        state | {"a": state["a"].bfloat16()},
        state | {"b": torch.tensor(1, dtype=torch.uint8)},
        {"x": state["a"], "b": state["b"], "c": state["c"]},
        {"a": state["a"], "b": state["b"]},
    ]
    assert len({content(one) for one in (state, *others)}) == 7
    torch.save([1], tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"second_stage.weights '.*' holds no state_dict"):
        weights_content(str(tmp_path / "w.pt"), "second_stage.weights")


def test_a_network_whose_own_names_begin_so_keeps_them(trained, tmp_path):
    class Outer(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    torch.save(Outer(trained).state_dict(), tmp_path / "w.pt")
    inner = small()
    inner(torch.ones(2, 3, 8, 8))
    net = Outer(inner)
    load_weights(net, str(tmp_path / "w.pt"))
    torch.testing.assert_close(net.state_dict(), Outer(trained).state_dict(), rtol=0, atol=0)


def test_weights_of_a_second_stage_serve(trained, tmp_path):
    scaled = ScaledLinear(trained[3])
    with torch.no_grad():
        scaled.scale.copy_(torch.tensor([1.0, 2.0, 0.5]))
    images = torch.rand(2, 3, 8, 8)
    second = nn.Sequential(*trained[:3], scaled).eval()
    torch.save(second.state_dict(), tmp_path / "w.pt")
    net = small()
    net(images)
    load_weights(net.eval(), str(tmp_path / "w.pt"))
    torch.testing.assert_close(net(images), second(images))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: torch.save(nn.Linear(2, 2), path), "cannot be read .*holds objects, which"),
        (lambda path: torch.save({"args": argparse.Namespace(a=1)}, path), "cannot be read"),
        (lambda path: path.write_text("<html>not found</html>"), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: torch.save([torch.zeros(2)], path), "holds no state_dict of tensors; write"),
        (lambda path: torch.save({"epoch": 3}, path), "holds no state_dict of tensors; write"),
        (lambda path: torch.save({"a": torch.zeros(2)}, path), "is of another network"),
        (lambda path: None, "must be the file of a state_dict, got '.*w.pt', where there is none"),
    ],
    ids=["module", "namespace", "html", "empty", "list", "no state", "another", "none"],
)
def test_what_holds_no_weights_is_told_in_one_line(trained, tmp_path, write, message):
    write(tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message) as found:
        load_weights(trained, str(tmp_path / "w.pt"))
    assert "w.pt" in str(found.value)
    assert "\n" not in str(found.value)


def test_a_file_that_is_cut_off_is_told(trained, tmp_path):
    path = tmp_path / "w.pt"
    torch.save(trained.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(trained, str(path))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("inception_v3", 64, "does not take images of 64 x 64 px .*give another size"),
        ("vit_b_32", 50, "cannot be made for images of 50 px .*multiple of 32"),
        ("timm:vit_tiny_patch16_224", 96, "does not take images of 96 x 96 px"),
    ],
)
def test_a_network_that_does_not_fit_the_images_is_told(name, size, message):
    def fit():
        net = make_network(name, 5, size)
        check_fits(net, name, size, 5, torch.device("cpu"))

    with pytest.raises(ValueError, match=message):
        fit()


def test_a_vision_transformer_is_made_for_the_images():
    net = make_network("vit_b_32", 5, 64)
    check_fits(net, "vit_b_32", 64, 5, torch.device("cpu"))
    assert net.training
    with pytest.raises(ValueError, match="does not take images of 96 x 96 px"):
        check_fits(net, "vit_b_32", 96, 5, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"must give logits \[B, 4\] .* got \(2, 5\) for a batch"):
        check_fits(net, "vit_b_32", 64, 4, torch.device("cpu"))
