"""Methods of pytorch-grad-cam by their names: its own maps at the layer's resolution, from any
layout, and the model left as it was."""

import importlib.util
import warnings

import pytest
import timm
import torch
from cams import CLASSES, Net, assert_same, minmax, mixed_modes, pictures, settle, snapshot
from torch import nn

from scae_dali.saliency.gradcam import GradCAM
from scae_dali.saliency.package import PackageCAM
from scae_dali.saliency.refresh import factory_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of grad-cam's own imports
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

SIDE = 64


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(3)
    return settle(Net(), SIDE)


def vit():
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_distilled_patch16_224", num_classes=CLASSES, img_size=SIDE,
                             embed_dim=24, depth=2, num_heads=2).eval()  # fmt: skip


def swin():
    torch.manual_seed(0)
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=CLASSES, img_size=SIDE,
                             window_size=2, embed_dim=24, depths=(1, 1, 1, 1)).eval()  # fmt: skip


def of_layer(model, layer, images, labels):
    """Features and gradients of the labels' logits, in a plain forward pass."""
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda module, args, output: kept.append(output)
    )
    score = model(images).gather(1, labels[:, None]).sum()
    handle.remove()
    (slopes,) = torch.autograd.grad(score, kept)
    return kept[0].detach(), slopes


def own(name, model, layer, images, labels, reshape=None, **more):
    """What the package gives at the layer's resolution, min-maxed."""
    module = model.get_submodule(layer)
    targets = [ClassifierOutputTarget(int(label)) for label in labels]
    cam = getattr(pytorch_grad_cam, name)(model, [module], reshape_transform=reshape, **more)
    raw = []
    inner = cam.get_cam_image
    cam.get_cam_image = lambda *args: raw.append(inner(*args)) or raw[0]
    with cam:
        cam(images, targets)
    return minmax(torch.as_tensor(raw[0]))


def behind_two(output):
    return output[:, 2:].reshape(len(output), 4, 4, -1).permute(0, 3, 1, 2)


def channels_last(output):
    return output.permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("make", "layer", "to_maps"),
    [(None, "body", lambda output: output), (vit, "blocks.1.norm1", behind_two),
     (swin, "norm", channels_last)],
)  # fmt: skip
def test_layercam_and_hirescam_by_hand(net, make, layer, to_maps):
    model = net if make is None else make()
    images, labels = pictures(model, SIDE, batch=2)
    features, slopes = map(to_maps, of_layer(model, layer, images, labels))
    for name, weights in (("LayerCAM", slopes.relu()), ("HiResCAM", slopes)):
        expected = minmax((weights * features).sum(1))
        assert (expected.amax((1, 2)) == 1).any(), "the case shows nothing"
        cam = PackageCAM(name, model, layer)
        found = cam(images, labels)
        assert (found.dtype, cam.method) == (torch.float32, f"pytorch_grad_cam:{name}")
        torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=0)
        assert found.shape[1:] == cam.grid(SIDE)


def test_its_gradcam_is_ours(net):
    images, labels = pictures(net, SIDE)
    found = PackageCAM("GradCAM", net, "body")(images, labels)
    torch.testing.assert_close(found, GradCAM(net, "body")(images, labels), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name", ["GradCAMPlusPlus", "XGradCAM", "EigenCAM", "AblationCAM", "ScoreCAM", "ShapleyCAM"]
)
def test_other_methods_are_the_packages_own(net, name):
    images, labels = pictures(net, SIDE, batch=2)
    found = PackageCAM(name, net, "body")(images, labels)
    expected = own(name, net, "body", images, labels)
    assert expected.any()
    torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=0)
    # As for every CAM, an image's map does not depend on the batch.
    alone = PackageCAM(name, net, "body")(images[:1], labels[:1])
    torch.testing.assert_close(found[:1], alone, atol=2e-4, rtol=0)


def test_ablation_of_channels_and_not_of_tokens():
    model = vit()
    images, labels = pictures(model, SIDE, batch=2)
    layer = "blocks.1.norm1"
    found = PackageCAM("AblationCAM", model, layer)(images, labels)
    vit_layer = pytorch_grad_cam.AblationLayerVit()
    expected = own(
        "AblationCAM", model, layer, images, labels, behind_two, ablation_layer=vit_layer
    )
    torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=0)
    assert isinstance(model.get_submodule(layer), nn.LayerNorm)


@pytest.mark.parametrize("name", ["LayerCAM", "EigenCAM", "ShapleyCAM"])
def test_the_model_is_left_as_found(name):
    model = mixed_modes()
    before = snapshot(model)
    PackageCAM(name, model)(torch.randn(2, 3, SIDE, SIDE), torch.tensor([1, 2]))
    assert_same(snapshot(model), before)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("name", "runs"), [("LayerCAM", 1), ("AblationCAM", 2), ("AblationCAM", 3)]
)
def test_the_model_is_left_as_found_after_an_error(net, name, runs):
    class BoomError(RuntimeError):
        pass

    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) > runs:  # the first shows the layout, the third has a layer ablated
            raise BoomError

    handle = net.pool.register_forward_hook(fail)
    before = snapshot(net)
    try:
        with pytest.raises(BoomError):
            PackageCAM(name, net, "body")(torch.randn(2, 3, SIDE, SIDE), torch.tensor([1, 2]))
        assert_same(snapshot(net), before)
        assert isinstance(net.body, nn.Conv2d)
    finally:
        handle.remove()


def test_no_images_and_labels_out_of_range(net):
    cam = PackageCAM("LayerCAM", net, "body")
    empty = cam(torch.ones(0, 3, SIDE, SIDE), torch.ones(0, dtype=torch.int64))
    assert empty.shape == (0, SIDE // 2, SIDE // 2)
    with pytest.raises(ValueError, match=r"labels must be 0 <= label < 10, .* got 10"):
        cam(torch.ones(2, 3, SIDE, SIDE), torch.tensor([0, CLASSES]))


def test_a_layer_that_gives_no_map_is_refused_as_by_gradcam():
    model = vit()
    images, labels = pictures(model, SIDE, batch=2)
    with pytest.raises(ValueError, match=r"no gradient|do not depend on layer 'norm'"):
        PackageCAM("LayerCAM", model, "norm")(images, labels)
    assert PackageCAM("EigenCAM", model, "norm")(images, labels).any()
    with pytest.raises(ValueError, match=r"ShapleyCAM' needs a layer that gives \[B,C,h,w\], and"):
        PackageCAM("ShapleyCAM", model)(images, labels)


@pytest.mark.parametrize("name", ["FullGrad", "FinerCAM", "LayerCam", "BaseCAM", ""])
def test_names_that_are_no_method_of_one_layer(net, name):
    with pytest.raises(ValueError, match=rf"pytorch_grad_cam:{name}' must name .*, LayerCAM,"):
        factory_of(f"pytorch_grad_cam:{name}")(net, "body")


def test_without_the_package(net, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package pytorch-grad-cam.*pip install grad-c"):
        factory_of("pytorch_grad_cam:LayerCAM")(net, "body")
