"""Weights as people have them: in checkpoints, behind wrappers, damaged, and of other things.

PyTorch's own forum and trackers are full of `Missing key(s) in state_dict: … Unexpected key(s)`, as
in https://discuss.pytorch.org/t/13853 for DataParallel. The others were found by trying.
"""

import argparse
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from scae_dali.training.networks import check_fits, make_network
from scae_dali.training.second_stage import ScaledLinear
from scae_dali.training.weights import check_extra_state, load_weights, weights_content


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


def plus(state, add):
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
        (
            lambda one, two: {"model": one, "schema": two},
            0,
            "another state_dict, 'schema': 'model'",
        ),
        (lambda one, two: {"net": one, "teacher": {"module": two}}, 0, "state_dict, 'teacher'"),
        (lambda one, two: {"model": one, "criterion": {"weight": torch.ones(3)}}, 0, None),
        (lambda one, two: {"weights": one, "weights_ema": two}, 1, "mean the other, .*'weights'"),
        (lambda one, two: {**OURS, "net": one}, 0, None),
        (lambda one, two: {**OURS, "net": one, "ema": two}, 1, "the average is taken, which the r"),
    ],
)
def test_weights_and_their_average_in_one_file(trained, tmp_path, wrap, taken, told):
    states = trained.state_dict(), plus(trained.state_dict(), 1)
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


class Versioned(nn.Module):
    """A network with extra state of its own, and of one of its layers."""

    def __init__(self, extra, inner=None):
        super().__init__()
        self.fc, self.extra, self.inner = nn.Linear(4, 3), extra, inner

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        if state == "odd":
            raise KeyError("scale")
        self.extra = state


EXTRA = [{"version": 2, "names": ["a", "b"]}, [1.5, None], "text", torch.tensor([3, 4, 5])]


@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("wrapped", [False, True])
def test_extra_state_is_loaded_and_belongs_to_the_content(tmp_path, extra, wrapped):
    def content(extra):
        state = dict(Versioned(0, Versioned(extra)).state_dict())
        state |= {"fc.weight": torch.ones(3, 4), "fc.bias": torch.ones(3)}
        state |= {"inner.fc.weight": torch.ones(3, 4), "inner.fc.bias": torch.ones(3)}
        if wrapped:
            state = {"epoch": 2, "model": {f"module.{name}": one for name, one in state.items()}}
        torch.save(state, tmp_path / "w.pt")
        return weights_content(str(tmp_path / "w.pt"))

    assert content([*extra, 1] if isinstance(extra, list) else [extra]) != content(extra)
    assert content(extra) == content(extra)
    net = Versioned(1, Versioned(torch.zeros(2)))
    load_weights(net, str(tmp_path / "w.pt"))
    assert net.extra == 0
    assert str(net.inner.extra) == str(extra)
    assert net.inner.fc.bias.sum() == 3


def test_extra_state_that_a_network_does_not_take_is_told(tmp_path):
    torch.save(Versioned("odd").state_dict(), tmp_path / "w.pt")
    with pytest.raises(
        ValueError, match=r"w.pt' does not go into the net.*KeyError: 'scale'\); se"
    ):
        load_weights(Versioned(0), str(tmp_path / "w.pt"))


@pytest.mark.parametrize("extra", [np.ones(2), argparse.Namespace(a=1), {"f": lambda: None}])
def test_extra_state_that_no_checkpoint_could_give_back_is_told(extra):
    with pytest.raises(ValueError, match=f"'mine' has a {type(extra).__name__} as inner._extra_st"):
        check_extra_state(Versioned(1, Versioned(extra)), "mine")
    for kept in EXTRA:
        check_extra_state(Versioned(kept), "mine")


RARE = {
    "float8": lambda value: value.to(torch.float8_e5m2),
    "quantized": lambda value: torch.quantize_per_tensor(value, 0.5, 3, torch.qint8),
    "channels": lambda value: torch.quantize_per_channel(
        value, torch.full((len(value),), 0.5), torch.zeros(len(value)), 0, torch.qint8
    ),
    "sparse": torch.Tensor.to_sparse,
    "rows": lambda value: value.to_sparse_csr() if value.ndim == 2 else value,
    "double": torch.Tensor.double,
    "int": torch.Tensor.int,
}


@pytest.mark.filterwarnings("ignore:.*beta state", "ignore:.*uantize", "ignore:.*Sparse")
@pytest.mark.filterwarnings("ignore:.*TypedStorage")
@pytest.mark.parametrize("kind", RARE)
def test_every_kind_of_real_tensor_is_loaded(tmp_path, kind):
    state = {"weight": torch.tensor([[1.0, 0.0], [2.0, -4.0]]), "bias": torch.tensor([0.0, 8.0])}

    def content(state):
        torch.save({name: RARE[kind](one) for name, one in state.items()}, tmp_path / "w.pt")
        return weights_content(str(tmp_path / "w.pt"))

    other = content({"weight": state["weight"], "bias": torch.tensor([0.0, 4.0])})
    assert content(state) == content(state) != other
    net = nn.Linear(2, 2)
    load_weights(net, str(tmp_path / "w.pt"))
    torch.testing.assert_close(dict(net.state_dict()), state, rtol=0, atol=0)


def test_quantized_values_count_not_their_codes(tmp_path):
    def content(step):
        value = torch.quantize_per_tensor(torch.tensor([step, 3 * step]), step, 0, torch.quint8)
        torch.save({"a": value}, tmp_path / "w.pt")
        return weights_content(str(tmp_path / "w.pt"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert content(0.5) != content(0.25)


@pytest.mark.parametrize("view", [torch.Tensor.conj, torch.Tensor.clone])
def test_complex_weights_serve_a_complex_network_alone(tmp_path, view):
    net, state = nn.Module(), {"w": view(torch.tensor([1 + 2j, 3 - 1j]))}
    net.w = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    torch.save(state, tmp_path / "w.pt")
    content = weights_content(str(tmp_path / "w.pt"))
    load_weights(net, str(tmp_path / "w.pt"))
    torch.testing.assert_close(net.w.detach(), state["w"].resolve_conj())
    torch.save({"w": state["w"].conj()}, tmp_path / "w.pt")
    assert content != weights_content(str(tmp_path / "w.pt"))
    net.w = nn.Parameter(torch.zeros(2))
    with pytest.raises(
        ValueError, match=r"another network \(1 diff.*w is complex there and torch.f"
    ):
        load_weights(net, str(tmp_path / "w.pt"))


@pytest.mark.parametrize("kind", [torch.Tensor.to_sparse, lambda one: one.to(torch.float8_e4m3fn)])
@pytest.mark.filterwarnings("ignore:.*Sparse", "ignore:.*TypedStorage")
def test_values_of_rare_tensors_that_are_not_finite_are_told(tmp_path, kind):
    bad = torch.tensor([0.0, torch.nan])
    torch.save({"weight": torch.zeros(2, 2), "bias": kind(bad)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"values that are not finite \(bias\): its training"):
        load_weights(nn.Linear(2, 2), str(tmp_path / "w.pt"))


@pytest.mark.parametrize(
    "kind",
    [
        lambda value: value.to("meta"),
        lambda value: torch.nested.nested_tensor([value[0], value[1, :1]]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*nested")
def test_tensors_that_cannot_be_read_are_told(tmp_path, kind):
    state = nn.Linear(2, 2).state_dict()
    torch.save({"model": state | {"weight": kind(state["weight"])}}, tmp_path / "w.pt")
    for read in (weights_content, partial(load_weights, nn.Linear(2, 2))):
        with pytest.raises(
            ValueError, match=r"holds weight as a tensor without values, or .*; load it i"
        ):
            read(str(tmp_path / "w.pt"))


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
