"""Layers of timm's families: the default ones give Grad-CAM maps as by hand and as grad-cam's, and
where none is known the error names layers that were tried."""

import warnings

import pytest
import timm
import torch
from cams import CLASSES, minmax, pictures, settle
from torch import nn

from scae_dali.saliency.gradcam import GradCAM, default_layer
from scae_dali.saliency.layers import find_layer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of grad-cam's own imports
    from pytorch_grad_cam import GradCAM as ReferenceCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget


def channels_first(output):
    return output


def channels_last(output):
    return output.permute(0, 3, 1, 2)


def tokens_behind(leading, side=4):
    def to_maps(output):
        kept = output[:, leading:]
        assert kept.shape[1] == side * side
        return kept.reshape(len(output), side, side, -1).permute(0, 3, 1, 2)

    return to_maps


VIT = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 3}
CASES = {
    "resnet10t": ({}, "layer4", channels_first),
    "convnext_atto": ({}, "stages", channels_first),
    "efficientnet_lite0": ({}, "bn2", channels_first),
    "tf_efficientnetv2_b0": ({}, "bn2", channels_first),
    "regnetx_002": ({}, "final_conv", channels_first),
    "regnety_002": ({}, "final_conv", channels_first),
    "mobilenetv3_small_050": ({}, "blocks", channels_first),
    "repvgg_a0": ({}, "final_conv", channels_first),
    "vit_tiny_patch16_224": (VIT, "blocks.2.norm1", tokens_behind(1)),
    "vit_small_patch16_dinov3": (VIT, "blocks.2.norm1", tokens_behind(5)),
    "vit_betwixt_patch16_reg4_gap_256": (VIT, "blocks.2.norm1", tokens_behind(4)),
    "vit_base_patch16_reg4_gap_256": (VIT | {"class_token": True, "global_pool": "token"},
                                      "blocks.2.norm1", tokens_behind(5)),
    "deit_tiny_patch16_224": (VIT, "blocks.2.norm1", tokens_behind(1)),
    "deit_tiny_distilled_patch16_224": (VIT, "blocks.2.norm1", tokens_behind(2)),
    "deit3_small_patch16_224": (VIT, "blocks.2.norm1", tokens_behind(1)),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 2, 2)},
        "norm", channels_last),
    "swinv2_tiny_window8_256": (
        {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 2, 2)},
        "norm", channels_last),
    "swinv2_cr_tiny_224": (
        {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (1, 1, 2, 2)},
        "stages", channels_first),
}  # fmt: skip


def make(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **CASES[name][0])


@pytest.mark.parametrize("name", CASES)
def test_maps_of_the_default_layer_are_grad_cams(name):
    _, layer, to_maps = CASES[name]
    model = settle(make(name), 64)
    assert default_layer(model) == layer
    images, labels = pictures(model, 64, batch=2)
    found = GradCAM(model)(images, labels)

    # By hand: the gradient of each label's logit at the layer's output, in a plain forward pass.
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda module, args, output: kept.append(output)
    )
    score = model(images).gather(1, labels[:, None]).sum()
    handle.remove()
    (slopes,) = torch.autograd.grad(score, kept)
    features, slopes = to_maps(kept[0].detach()), to_maps(slopes)
    by_hand = minmax((slopes.double().mean((2, 3), keepdim=True) * features.double()).sum(1))
    assert (by_hand.amax((1, 2)) == 1).all(), "the case shows nothing"
    torch.testing.assert_close(found.double(), by_hand, atol=2e-4, rtol=0)
    assert GradCAM(model).grid(64) == tuple(by_hand.shape[1:])

    # grad-cam's, told which tokens to leave out.
    targets = [ClassifierOutputTarget(int(label)) for label in labels]
    module = model.get_submodule(layer)
    with ReferenceCAM(model, [module], reshape_transform=to_maps) as cam:
        cam(images, targets)
        features = cam.activations_and_grads.activations[0].numpy()
        slopes = cam.activations_and_grads.gradients[0].numpy()
        raw = cam.get_cam_image(images, module, targets, features, slopes)
    torch.testing.assert_close(found.double(), minmax(torch.from_numpy(raw)), atol=2e-4, rtol=0)


class Deceptive(nn.Module):
    """Behind `body` come layers with a gradient whose Grad-CAM map is flat: `spread` is the same at
    every place, and the head sees `centred` only by squares around their mean, so that slopes
    cancel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.centred = nn.Identity()
        self.spread = nn.Upsample(size=(8, 8))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.body(self.stem(x).relu())
        y = self.centred(x)
        squares = (y - y.mean((2, 3), keepdim=True)).square().mean((2, 3), keepdim=True)
        return self.head(self.spread(squares + x.amax((2, 3), keepdim=True)).mean((2, 3)))


def test_a_layer_is_proposed_only_if_its_map_is_not_flat():
    model = Deceptive().eval()
    with pytest.raises(ValueError, match="no default layer is known for Deceptive") as caught:
        default_layer(model)
    assert str(caught.value).endswith("such as body or stem")
    with pytest.raises(ValueError, match=r"'layer4' is no module of Deceptive; did you mean body"):
        find_layer(model, "layer4")
    maps = GradCAM(model, "body")(*pictures(model, 32))
    assert (maps.amax((1, 2)) == 1).any()


@pytest.mark.parametrize("name", ["ghostnet_050", "mixer_s32_224", "efficientvit_b0"])
def test_what_is_proposed_for_other_families_gives_maps(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES).eval()
    nn.init.normal_(model.get_classifier().weight)  # timm's Mixer starts from zeros
    side = model.default_cfg["input_size"][1]
    with pytest.raises(ValueError, match="no default layer is known for") as caught:
        default_layer(model)
    images, labels = pictures(model, side, batch=4)
    proposed = str(caught.value).rpartition("such as ")[2].split(" or ")
    assert proposed
    for layer in proposed:
        maps = GradCAM(model, layer)(images, labels)
        assert maps.shape[1:] == GradCAM(model, layer).grid(side)
        assert maps.any()
