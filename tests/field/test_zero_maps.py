"""Maps that are zero for every image, without a word.

Behind a transformer's last attention only the class token goes on to the head, so the patches'
gradient is exactly zero: people who chose the last block got empty heat maps and no error
(https://github.com/jacobgil/pytorch-grad-cam/issues/363 and /513). Weights of NaN, a classifier
that starts from zero and dead layers do the same; these were found by trying. A trunk that runs
under no_grad is suspected in https://github.com/jacobgil/pytorch-grad-cam/issues/511.
"""

import re

import numpy as np
import pytest
import torch
import torchvision.models as tv
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from scae_dali.saliency.gradcam import GradCAM, default_layer
from scae_dali.saliency.harvest import Harvest
from scae_dali.saliency.scorecam import ScoreCAM

CLASSES, SIDE = 5, 32


def images(batch=3, side=SIDE):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(7))


LABELS = torch.tensor([1, 2, 4])


def torchvision_vit():
    """4x4 patches; its head is zero as built."""
    torch.manual_seed(0)
    model = tv.VisionTransformer(SIDE, 8, 3, 2, 16, 32, num_classes=CLASSES).eval()
    nn.init.normal_(model.heads.head.weight)
    return model


def timm_vit(cls=VisionTransformer, **more):
    torch.manual_seed(0)
    settings = {"img_size": SIDE, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return cls(**settings, num_classes=CLASSES, **more).eval()


class Mine(nn.Module):
    """A transformer that the table of families does not know, with a class token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.inner = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.last = nn.LayerNorm(16)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for block in self.inner:
            x = block(x)
        return self.out(self.last(x)[:, 0])


class Net(nn.Module):
    """Two convolutions with ReLU behind each, a pooling and a linear classifier."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, 2, 1)
        self.fc = nn.Linear(8, CLASSES)
        self.register_buffer("allowed", torch.zeros(CLASSES))

    def forward(self, x):
        x = self.body(self.norm(self.stem(x)).relu())
        return self.fc(x.relu().mean((2, 3))) + self.allowed


@pytest.fixture
def net():
    return Net().eval()


def has_maps(model, layer):
    return bool((GradCAM(model, layer)(images(), LABELS).amax((1, 2)) == 1).any())


def refusal(call):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers look at it
        call()
    return str(caught.value)


# ---- a layer that the logits do not depend on


@pytest.mark.parametrize(
    ("make", "layers", "serves"),
    [
        (
            torchvision_vit,
            ("encoder", "encoder.ln", "encoder.layers", "encoder.layers.encoder_layer_2"),
            "encoder.layers.encoder_layer_2.ln_1",
        ),
        (torchvision_vit, ("encoder.layers.encoder_layer_2.mlp",), default_layer),
        (timm_vit, ("blocks", "blocks.2", "norm", "blocks.2.attn"), "blocks.2.norm1"),
        (lambda: timm_vit(reg_tokens=4), ("blocks.2.mlp", "norm"), "blocks.2.norm1"),
        (lambda: timm_vit(VisionTransformerDistilled), ("norm",), "blocks.2.norm1"),
        (Mine, ("inner.1", "last", "inner.1.linear2"), "inner.1.norm1"),
    ],
)
def test_a_layer_that_only_the_class_token_leaves_is_refused(make, layers, serves):
    model = make()
    serves = serves if isinstance(serves, str) else serves(model)
    for layer in layers:
        for call in (
            lambda layer=layer: GradCAM(model, layer)(images(), LABELS),
            lambda layer=layer: GradCAM(model, layer).grid(SIDE),
        ):
            message = refusal(call)
            assert f"the logits do not depend on layer {layer!r} but for its" in message
            assert message.endswith(f"pass layer={serves!r}")
    assert has_maps(model, serves)
    assert GradCAM(model, serves).grid(SIDE) == (4, 4)


def test_layers_before_the_last_attention_and_pooled_tokens_serve():
    for layer in ("encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_2.ln_1"):
        assert has_maps(torchvision_vit(), layer)
    pooled = timm_vit(global_pool="avg", class_token=False)
    for layer in ("blocks.2", "norm"):
        assert has_maps(pooled, layer)


def test_the_default_and_what_is_suggested_without_one_serve():
    for model in (timm_vit(), timm_vit(VisionTransformerDistilled), timm_vit(reg_tokens=4)):
        assert default_layer(model) == "blocks.2.norm1"
        assert has_maps(model, None)
    message = refusal(lambda: default_layer(Mine()))
    assert "no default layer is known for Mine; pass layer=NAME" in message
    for layer in message.rsplit("such as ")[-1].split(" or "):
        assert has_maps(Mine(), layer)
    with torch.device("meta"):  # which can't be tried
        assert "such as patches, inner" in refusal(lambda: default_layer(Mine()))


def test_a_detached_head_is_told_which_layer_serves(net):
    net.forward = lambda x: net.fc(net.body(net.norm(net.stem(x)).detach()).mean((2, 3)))
    message = refusal(lambda: GradCAM(net, "norm")(images(), LABELS))
    assert "the logits do not depend on layer 'norm', or not differentiably" in message
    assert message.endswith("pass layer='body'")
    assert has_maps(net, "body")


@pytest.mark.parametrize(
    ("mode", "layer"),
    [*((torch.no_grad, name) for name in ("stem", "norm", "body")), (torch.inference_mode, "body")],
)
def test_a_trunk_that_runs_without_a_graph_serves(net, mode, layer):
    expected = GradCAM(net, layer)(images(), LABELS)

    def probe(x):
        with mode():
            x = net.body(net.norm(net.stem(x)).relu())
        return net.fc(x.relu().mean((2, 3))) + net.allowed

    net.forward = probe
    cam = GradCAM(net, layer)
    for _ in range(2):
        torch.testing.assert_close(cam(images(), LABELS), expected)
    assert GradCAM(net, layer).grid(SIDE) == tuple(expected.shape[1:])
    assert all(p.grad is None for p in net.parameters())


def test_a_layer_within_a_part_in_inference_mode_is_refused(net):
    pooled = torch.inference_mode()(lambda x: net.body(net.stem(x).relu()).relu().mean((2, 3)))
    net.forward = lambda x: net.fc(pooled(x))
    for call in (
        lambda: GradCAM(net, "stem")(images(), LABELS),
        lambda: GradCAM(net, "stem").grid(SIDE),
    ):
        message = refusal(call)
        assert message.startswith("a part of Net runs under torch.inference_mode")
        assert message.endswith("or pass the layer whose output leaves the part")


def test_what_a_normalisation_makes_of_large_values_is_no_dead_end(net):
    net.forward = lambda x: net.fc(net.norm(net.stem(x)).relu().mean((2, 3)))
    with torch.no_grad():
        net.stem.bias.fill_(30)
        net.norm.running_mean.fill_(30)
    assert has_maps(net, "stem")
    assert GradCAM(net, "stem").grid(SIDE) == (16, 16)


@pytest.mark.parametrize("channels", [1, 2, 13])
def test_images_of_other_channels(net, channels):
    net.stem = nn.Conv2d(channels, 8, 3, 2, 1)
    for make in (GradCAM, ScoreCAM):
        assert make(net, "body").grid((SIDE, 2 * SIDE)) == (8, 16)
    assert refusal(lambda: default_layer(net)).endswith("such as body")


@pytest.mark.parametrize("wrap", [lambda x: (x, x), lambda x: {"logits": x}])
def test_a_network_that_gives_more_than_logits_is_told_what_to_do(net, wrap):
    whole = net.forward
    net.forward = lambda x: wrap(whole(x))
    for call in (
        lambda: GradCAM(net, "body")(images(), LABELS),
        lambda: GradCAM(net, "body").grid(SIDE),
    ):
        message = refusal(call)
        assert message.endswith("wrap it in a module whose forward returns the logits alone")


# ---- weights that are zero, and units that are dead


def test_a_network_whose_head_starts_from_zero_is_told_from_a_wrong_layer():
    model = torchvision_vit()
    nn.init.zeros_(model.heads.head.weight)
    assert GradCAM(model).grid(SIDE) == (4, 4)  # a run begins so
    message = refusal(lambda: GradCAM(model)(images(), LABELS))
    assert message.startswith("'heads.head.weight' of VisionTransformer is zero throughout")
    assert "encoder.layers.encoder_layer_2.ln_1" in refusal(
        lambda: GradCAM(model, "encoder").grid(SIDE)
    )
    nn.init.normal_(model.heads.head.weight)
    assert has_maps(model, None)


@pytest.mark.parametrize("make", [GradCAM, ScoreCAM])
def test_a_head_of_zero_is_refused_by_its_name(net, make):
    nn.init.zeros_(net.fc.weight)
    assert make(net, "body").grid(SIDE) == (8, 8)
    message = refusal(lambda: make(net, "body")(images(), LABELS))
    assert message.startswith("'fc.weight' of Net is zero throughout")


def test_logits_that_are_the_same_whatever_the_images_are_refused_without_gradients(net):
    with torch.no_grad():
        net.body.bias.fill_(-1e4)
    message = refusal(lambda: ScoreCAM(net, "body")(images(), LABELS))
    assert "the logits of Net are the same whatever the images" in message


def test_images_and_classes_without_a_map_are_no_fault(net):
    blank = GradCAM(net, "body")(torch.zeros(3, 3, SIDE, SIDE), LABELS)
    assert blank.shape == (3, 8, 8)
    with torch.no_grad():
        net.fc.weight[1] = 0
        net.stem.bias.fill_(-0.1)
        net.norm.bias.fill_(-0.1)  # what is blank is dead
        net.body.bias.fill_(-1e-3)
    cam = GradCAM(net, "body")
    assert cam(images(), torch.tensor([1, 1, 1])).abs().max() == 0
    assert GradCAM(net, "body")(torch.zeros(3, 3, SIDE, SIDE), LABELS).abs().max() == 0
    assert GradCAM(net, "body").grid(SIDE) == (8, 8)
    assert cam(images(), LABELS).max() == 1


def test_a_layer_that_is_dead_is_refused(net):
    net.forward = lambda x: net.fc(net.body(net.norm(net.stem(x)).relu()).mean((2, 3)))
    with torch.no_grad():
        net.norm.bias.fill_(-1e4)
    for make in (GradCAM, ScoreCAM):
        message = refusal(lambda make=make: make(net, "body")(images(), LABELS))
        assert "layer 'body' gives the same values at every place, whatever the images" in message


def test_units_behind_the_layer_that_are_dead_are_refused(net):
    with torch.no_grad():
        net.body.bias.fill_(-1e4)
    message = refusal(lambda: GradCAM(net, "body")(images(), LABELS))
    assert "no gradient of the logits comes back to layer 'body', whatever the images" in message
    assert "the units behind it are dead" in message


# ---- values that are not finite


@pytest.mark.parametrize("make", [GradCAM, ScoreCAM])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stem.weight", torch.nan),
        ("norm.running_mean", torch.nan),
        ("norm.running_var", torch.nan),
        ("body.bias", -torch.inf),
        ("fc.weight", torch.nan),  # of one class, and not that of a label
    ],
)
def test_a_network_that_diverged_is_refused_by_the_name_of_its_weights(net, make, name, value):
    net.state_dict()[name].view(-1)[0] = value
    message = refusal(lambda: make(net, "body")(images(), LABELS))
    assert message.startswith(f"{name!r} of Net holds values that are not finite")
    assert refusal(lambda: make(net, "body").grid(SIDE)) == message


def test_images_that_are_not_finite_are_no_fault_of_the_network(net):
    some = images()
    some[1, 0, 0, 0] = torch.nan
    for cam in (GradCAM(net, "body"), ScoreCAM(net, "body")):
        assert cam(some[[1, 1]], LABELS[[1, 1]]).abs().max() == 0
        maps = cam(some, LABELS)
        assert maps[1].abs().max() == 0
        assert maps.max() == 1
    # A later batch tells.
    with torch.no_grad():
        net.stem.weight[0, 0, 0, 0] = torch.nan
    cam = GradCAM(net, "body")
    assert "'stem.weight'" in refusal(lambda: cam(some[[0, 1]], LABELS[[0, 1]]))


def test_classes_that_are_kept_out_and_unused_weights_are_no_fault(net):
    net.allowed[0] = -torch.inf
    net.unused = nn.Parameter(torch.full((2,), torch.nan))
    assert "'unused' of Net holds values" in refusal(lambda: GradCAM(net, "body")(images(), LABELS))
    del net.unused
    expected = GradCAM(Net().eval(), "body")(images(), LABELS)
    torch.testing.assert_close(GradCAM(net, "body")(images(), LABELS), expected)
    assert GradCAM(net, "body").grid(SIDE) == (8, 8)


def test_logits_that_overflow_are_refused(net):
    with torch.no_grad():
        net.fc.weight.fill_(6e4)
        net.body.bias.fill_(3)
    message = refusal(lambda: GradCAM(net.half(), "body")(images().half(), LABELS))
    assert re.search(
        r"logits of Net are not finite for any of 3 images, .*float16; use float32", message
    )


def test_a_network_in_half_precision_is_told_the_same():
    model = timm_vit().half()
    for layer in ("norm", "blocks"):
        message = refusal(lambda layer=layer: GradCAM(model, layer)(images().half(), LABELS))
        assert message.endswith("pass layer='blocks.2.norm1'")
    assert GradCAM(model).grid(SIDE) == (4, 4)


def test_the_network_is_left_as_it_was_found_by_what_looks_for_a_layer():
    model = timm_vit().train()
    model.blocks[0].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    for layer in ("norm", "blocks.2.mlp"):
        refusal(lambda layer=layer: GradCAM(model, layer)(images(), LABELS))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert all(not module._forward_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_what_is_looked_at_is_the_first_batch_alone(net, monkeypatch):
    """A later one would have to wait for the device."""
    read = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(1) or tolist(self))
    cam = GradCAM(net, "body")
    for reads in (2, 1, 1):  # one of the labels, which come from the host
        cam(images(), LABELS)
        assert len(read) == reads
        read.clear()


# ---- what is gathered in training


def harvest(model, layer, side=SIDE):
    return Harvest(model, layer, samples=3, num_classes=CLASSES, grid=(8, 8), size=side)


def test_a_harvest_of_a_network_that_diverged_is_refused(net):
    net.state_dict()["norm.bias"][0] = torch.nan
    assert refusal(lambda: harvest(net, "body")).startswith("'norm.bias' of Net holds values")


def test_a_harvest_of_a_classifier_that_starts_from_zero_takes_the_pooled_layer_alone():
    torch.manual_seed(0)
    model = tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 2], num_classes=CLASSES)
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    assert "does not classify the mean of layer 'layer4.0'" in refusal(
        lambda: harvest(model, "layer4.0", 64)
    )
    harvest(model, "layer4", 64)
    assert np.all(model.fc.weight.detach().numpy() == 0)
