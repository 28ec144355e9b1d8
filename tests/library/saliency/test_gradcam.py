"""gradcam: eqs. 2-3 by hand, against the closed form and against grad-cam; the model untouched."""

import contextlib
import copy
import types
import warnings

import numpy as np
import pytest
import torch
import torchvision.models as tv
from cams import (
    CLASSES,
    Net,
    assert_same,
    compiled,
    minmax,
    mixed_modes,
    network,
    pictures,
    settle,
    snapshot,
)
from torch import nn

from scae_dali.plan.region import saliency_at
from scae_dali.saliency.gradcam import GradCAM, default_layer, gradcam

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of grad-cam's own imports
    from pytorch_grad_cam import GradCAM as ReferenceCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget


def reference(model, layer, images, labels, reshape=None):
    """grad-cam's map at the layer's own resolution, min-maxed: f64[B,h,w]."""
    module = model.get_submodule(layer)
    targets = [ClassifierOutputTarget(int(label)) for label in labels]
    # One trainable parameter in the layer is all grad-cam needs; the rest would only take time.
    model.requires_grad_(False)
    list(module.parameters())[-1].requires_grad_(True)
    with ReferenceCAM(model, [module], reshape_transform=reshape) as cam:
        cam(images, targets)
        features = cam.activations_and_grads.activations[0].numpy()
        gradients = cam.activations_and_grads.gradients[0].numpy()
        raw = cam.get_cam_image(images, module, targets, features, gradients)
    model.requires_grad_(True).zero_grad()
    return minmax(torch.from_numpy(raw))


@pytest.fixture
def mixed():
    return mixed_modes()


@pytest.fixture
def net():
    torch.manual_seed(3)
    return settle(Net(), 16)


# ---- eqs. 2-3


def test_gradcam_by_hand():
    features = torch.tensor([[[[1.0, 0.0], [2.0, 1.0]], [[0.0, 3.0], [1.0, 0.0]]]])
    gradients = torch.tensor([[[[2.0, 2.0], [2.0, 2.0]], [[-4.0, 0.0], [0.0, 0.0]]]])
    # alpha = (2, -1): A = ReLU([[2, -3], [3, 2]]) = [[2, 0], [3, 2]]
    expected = torch.tensor([[[2 / 3, 0.0], [1.0, 2 / 3]]])
    torch.testing.assert_close(gradcam(features, gradients), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradcam_accumulates_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(2, 512, 7, 7, generator=generator).to(dtype)
    gradients = torch.randn(2, 512, 7, 7, generator=generator).to(dtype)
    expected = minmax((gradients.double().mean((2, 3), keepdim=True) * features.double()).sum(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = gradcam(features, gradients)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_gradcam_degenerate_maps_are_zero_and_leave_the_others_alone():
    generator = torch.Generator().manual_seed(0)
    good = torch.rand(1, 64, 5, 5, generator=generator)
    # Constant up to rounding: the same channel values, summed in whatever order.
    constant = torch.randn(1, 64, 1, 1, generator=generator).expand(1, 64, 5, 5)
    nan, infinite = good.clone(), good.clone()
    nan[0, 3, 2, 2] = float("nan")
    infinite[0, 3, 2, 2] = -float("inf")
    features = torch.cat([good, constant, nan, -good, infinite, good * 0, good])
    gradients = torch.ones_like(features)
    gradients[1] = torch.randn(64, 1, 1, generator=generator)
    gradients[1] *= torch.sign((gradients[1] * constant[0]).sum(0).mean())  # A > 0
    maps = gradcam(features, gradients)
    assert maps[1:6].abs().max() == 0
    assert torch.equal(maps[0], maps[6])
    assert (maps[0].min(), maps[0].max()) == (0, 1)


def test_gradcam_rejects_other_shapes():
    with pytest.raises(ValueError, match=r"same shape \[B,C,h,w\], got \[1, 2, 3, 3\] and \[1, 2"):
        gradcam(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 4))
    with pytest.raises(ValueError, match="same shape"):
        gradcam(torch.ones(2, 3, 3), torch.ones(2, 3, 3))


# ---- against the closed form and against grad-cam


def test_closed_form_for_pooling_and_linear_heads():
    model = network("resnet18")
    images, labels = pictures(model)
    kept = []
    handle = model.layer4.register_forward_hook(lambda *args: kept.append(args[2]))
    with torch.no_grad():
        model(images)
    handle.remove()
    alpha = model.fc.weight[labels].double() / (3 * 3)  # w_yk / (h*w)
    expected = minmax(torch.einsum("bc,bchw->bhw", alpha, kept[0].double()))
    found = GradCAM(model)(images, labels)
    assert found.shape == (4, 3, 3)
    assert (found.amax((1, 2)) == 1).all()
    assert (found.double() - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("name", "layer", "size"),
    [
        ("resnet18", None, 96),
        ("resnet50", None, 96),
        ("resnet50", "layer3", 96),
        ("resnet50", "layer4.2.conv3", 96),
        ("densenet121", None, 96),
        ("densenet121", "features.norm5", 96),
        ("densenet121", "features.denseblock3", 96),
        ("efficientnet_b0", None, 96),
        ("efficientnet_b0", "features.5", 96),
        ("efficientnet_b0", "features.8.1", 96),  # BatchNorm, then an in-place SiLU
        ("convnext_tiny", None, 96),
        ("mobilenet_v3_large", None, 96),
        ("mobilenet_v3_large", "features.16.1", 96),  # BatchNorm, then an in-place Hardswish
        ("mobilenet_v3_large", "features.12.block.0.1", 96),  # the same inside a block
        ("vgg16", None, 96),
        ("vgg16", "features.28", 96),  # convolution, then an in-place ReLU
    ],
)
def test_equals_grad_cam(name, layer, size):
    model = network(name, size)
    images, labels = pictures(model, size)
    cam = GradCAM(model, layer)
    found = cam(images, labels)
    expected = reference(model, cam.layer, images, labels)
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() < 1e-4
    assert (found.amax((1, 2)) > 0).sum() >= 3, "too few maps to compare"


def test_equals_grad_cam_on_a_vision_transformer():
    torch.manual_seed(0)
    model = tv.VisionTransformer(64, 16, 3, 4, 64, 128, num_classes=CLASSES).eval()
    nn.init.normal_(model.heads.head.weight)  # zero as built
    images, labels = pictures(model, 64)
    cam = GradCAM(model)
    assert cam.layer == "encoder.layers.encoder_layer_2.ln_1"

    def reshape(tokens):
        return tokens[:, 1:].reshape(4, 4, 4, -1).permute(0, 3, 1, 2)

    expected = reference(model, cam.layer, images, labels, reshape)
    assert (cam(images, labels).double() - expected).abs().max() < 1e-4
    assert (expected.amax((1, 2)) > 0).sum() >= 3


def upscaled(maps, size_px):
    """As eq. 4 reads a map: f[B,h,w] -> f64[B,H,W] at every pixel of the whole image."""
    pixels = np.stack(np.meshgrid(*map(np.arange, size_px), indexing="ij"), axis=-1)
    pixels = np.tile(pixels.reshape(1, -1, 2), (len(maps), 1, 1))
    whole = np.tile([[0.0, 1 / n] for n in size_px], (len(maps), 1, 1))
    return saliency_at(maps.double().numpy(), pixels, whole).reshape(-1, *size_px)


def stretched(maps, eps):
    """Each map less its minimum, over its span and eps. f64[B,H,W]."""
    maps = maps - maps.min((1, 2), keepdims=True)
    return maps / (maps.max((1, 2), keepdims=True) + eps)


@pytest.mark.parametrize("size_px", [(40, 40), (40, 64)])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_equals_what_grad_cam_gives_out(net, size_px, scale):
    """The layer's map over its span and 1e-7, upscaled bilinearly; and min-maxed once more.

    scale: of the logits; at 1e-6 the span is of the order of that 1e-7, so the map shrinks.
    """
    net.body.stride = (8, 8)
    images = torch.randn(4, 3, *size_px, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        labels = net(images).argmax(1)
        net.head.weight.mul_(scale)
    found = GradCAM(net, "body")(images, labels)
    assert found.shape == (4, size_px[0] // 8, size_px[1] // 8)
    assert (found.amax((1, 2)) == 1).all()
    targets = [ClassifierOutputTarget(int(label)) for label in labels]
    with ReferenceCAM(net, [net.body]) as cam:
        finished = cam(images, targets)
        (of_layer,) = cam.compute_cam_per_layer(images, targets, False)
        features, gradients = (
            getattr(cam.activations_and_grads, name)[0].numpy()
            for name in ("activations", "gradients")
        )
        raw = cam.get_cam_image(images, net.body, targets, features, gradients).clip(min=0)
    span = np.ptp(raw.astype(np.float64), axis=(1, 2))[:, None, None]
    assert (span > 1e-8).all()
    ours = upscaled(found, size_px)
    expected = ours * span / (span + 1e-7)
    assert np.abs(of_layer[:, 0] - expected).max() < 1e-5
    assert np.abs(finished - stretched(expected, 1e-7)).max() < 1e-5
    # Any other of these steps is told apart.
    assert np.abs(finished - expected).max() > 1e-2
    assert np.abs(of_layer[:, 0] - stretched(expected, 1e-7)).max() > 1e-2
    assert (np.abs(of_layer[:, 0] - ours).max() > 1e-2) == (scale < 1)
    corners = {"size": size_px, "mode": "bilinear", "align_corners": True}
    other = nn.functional.interpolate(found[:, None].double(), **corners)[:, 0].numpy()
    assert np.abs(finished - stretched(other, 1e-7)).max() > 1e-2


# ---- layers


@pytest.mark.parametrize(
    ("name", "layer", "grid"),
    [
        ("alexnet", "features", 2),
        ("googlenet", "inception5b", 3),
        ("inception_v3", "Mixed_7c", 1),
        ("mnasnet0_5", "layers", 3),
        ("mobilenet_v2", "features", 3),
        ("mobilenet_v3_small", "features", 3),
        ("regnet_y_400mf", "trunk_output", 3),
        ("shufflenet_v2_x0_5", "conv5", 3),
        ("squeezenet1_1", "features", 5),
        ("swin_t", "permute", 3),
    ],
)
def test_default_layer_of_every_family(name, layer, grid):
    torch.manual_seed(0)
    plain = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = getattr(tv, name)(num_classes=CLASSES, **plain)
    size = 128 if name == "inception_v3" else 96
    assert default_layer(model) == layer
    maps = GradCAM(model)(torch.randn(2, 3, size, size), torch.tensor([0, 1]))
    if name == "inception_v3":
        grid = 2
    assert maps.shape == (2, grid, grid)


def test_default_layer_of_maxvit_is_its_last_block():
    with torch.device("meta"):
        assert default_layer(tv.maxvit_t()) == "blocks.3"


def test_default_layer_follows_the_class_hierarchy_and_not_the_name_alone(net):
    class Mine(tv.ResNet):
        pass

    class ResNet(Net):
        pass

    assert default_layer(Mine(tv.resnet.BasicBlock, [1, 1, 1, 1])) == "layer4"
    with pytest.raises(ValueError, match=r"known for ResNet; pass layer=NAME.*body"):
        default_layer(ResNet())
    with pytest.raises(ValueError, match=r"known for Net; pass layer=NAME, the module .*body"):
        GradCAM(net)
    with pytest.raises(ValueError, match=r"known for Linear; .*\(it has none\)"):
        default_layer(nn.Linear(1, 1))


def test_unknown_layer_names_close_matches():
    model = network("resnet18")
    with pytest.raises(ValueError, match=r"layer 'layr4' is no module of ResNet; .*layer4"):
        GradCAM(model, "layr4")
    with pytest.raises(ValueError, match="layer '' is no module of ResNet"):
        GradCAM(model, "")


def forward_of(net, forward):
    net.forward = types.MethodType(forward, net)
    return net


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("unused", "layer 'unused' does not run in the forward pass of Net; pass another"),
        ("act", "layer 'act' runs more than once in a forward pass; pass a layer that runs once"),
        ("pool", r"layer 'pool' gives \[2, 6, 1, 1\] .* one value says nothing; pass an earlier"),
        ("head", r"layer 'head' gives torch.float32 \[2, 10\] .* no feature map; pass a layer"),
    ],
)
def test_layers_that_give_no_map(net, layer, message):
    with pytest.raises(ValueError, match=message):
        GradCAM(net, layer)(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))


def test_layers_that_give_something_else():
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    vit = tv.VisionTransformer(64, 16, 1, 2, 16, 16, num_classes=CLASSES)
    with pytest.raises(ValueError, match="self_attention' gives a tuple; pass a layer"):
        GradCAM(vit, "encoder.layers.encoder_layer_0.self_attention")(images, labels)


def test_logits_that_do_not_depend_on_the_layer(net):
    def detached(self, x):
        return self.head(self.pool(self.body(self.stem(x)).detach()).flatten(1))

    def beside(self, x):
        self.body(self.stem(x))
        return self.head(self.pool(self.unused(self.stem(x))).flatten(1))

    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    for forward in (detached, beside):
        with pytest.raises(ValueError, match="logits do not depend on layer 'body'"):
            GradCAM(forward_of(net, forward), "body")(images, labels)


def test_outputs_with_logits(net):
    class Wrapped(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.net, self.wrap = net, wrap

        def forward(self, x):
            return self.wrap(self.net(x))

    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    named = Wrapped(lambda logits: types.SimpleNamespace(logits=logits))
    expected = GradCAM(net, "body")(images, labels)
    torch.testing.assert_close(GradCAM(named, "net.body")(images, labels), expected)
    pair = Wrapped(lambda logits: (logits, None))
    with pytest.raises(ValueError, match=r"must give logits \[2,classes\].*; Wrapped gave tuple"):
        GradCAM(pair, "net.body")(images, labels)


# ---- the model is left as it was found


def test_model_is_left_as_found(mixed):
    before = snapshot(mixed)
    random = torch.get_rng_state()
    GradCAM(mixed)(torch.ones(2, 3, 64, 64), torch.tensor([1, 2]))
    assert_same(snapshot(mixed), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("where", ["layer1", "layer4", "avgpool", "label"])
def test_model_is_left_as_found_after_an_error(mixed, where):
    def fail(*args):
        raise RuntimeError("boom")

    labels = torch.tensor([1, 2])
    if where == "label":
        labels[1] = CLASSES
    else:
        mixed.get_submodule(where).forward = fail
    before = snapshot(mixed)
    with pytest.raises((RuntimeError, ValueError), match=r"boom|got 10"):
        GradCAM(mixed)(torch.ones(2, 3, 64, 64), labels)
    assert_same(snapshot(mixed), before)
    assert torch.is_grad_enabled()


def test_snapshot_sees_a_trace(mixed):
    """grad-cam itself leaves eval mode behind: the check above can fail."""
    before = snapshot(mixed)
    with ReferenceCAM(mixed, [mixed.layer4]) as cam:
        cam(torch.ones(2, 3, 64, 64), [ClassifierOutputTarget(1)] * 2)
    with pytest.raises(AssertionError):
        assert_same(snapshot(mixed), before)


def test_only_the_head_is_in_the_graph(monkeypatch):
    model = network("resnet18")
    reached = set()

    def walk(node):
        if node is not None and node not in reached:
            reached.add(node)
            for following, _ in node.next_functions:
                walk(following)

    differentiate = torch.autograd.grad

    def spy(outputs, *args, **kwargs):
        walk(outputs.grad_fn)
        return differentiate(outputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    images, labels = pictures(model, batch=2)
    GradCAM(model)(images, labels)
    leaves = [node.variable for node in reached if hasattr(node, "variable")]
    head = {id(parameter) for parameter in model.fc.parameters()}
    (features,) = [leaf for leaf in leaves if id(leaf) not in head]
    assert features.shape == (2, 512, 3, 3)
    assert len(reached) < 12


# ---- what surrounds the call


def test_memory_format_makes_no_difference():
    model = network("resnet18")
    images, labels = pictures(model)
    expected = GradCAM(model)(images, labels)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    found = GradCAM(last)(images.to(memory_format=torch.channels_last), labels)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_bfloat16_autocast_is_close():
    model = network("resnet18")
    images, labels = pictures(model)
    expected = GradCAM(model)(images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = GradCAM(model)(images, labels)
    assert found.dtype == torch.float32
    for a, b in zip(found.flatten(1), expected.flatten(1), strict=True):
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.98


def test_float16_gradients_do_not_underflow():
    """w/(h*w) = 2e-8 is zero in float16; the score is scaled, and the maps do not depend on it."""
    torch.manual_seed(0)
    net = settle(Net(), 64)
    with torch.no_grad():
        net.head.weight.mul_(1e-5 / net.head.weight.abs().mean())
        net.head.bias.zero_()
    images, labels = pictures(net, 64)
    expected = GradCAM(net, "body")(images, labels)
    half = copy.deepcopy(net).half()
    found = GradCAM(half, "body")(images.half(), labels)
    assert (expected.amax((1, 2)) > 0).sum() >= 2
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_grad_mode_of_the_caller(net, mode):
    images, labels = pictures(net, 16)
    expected = GradCAM(net, "body")(images, labels)
    with mode():
        enabled = torch.is_grad_enabled()
        found = GradCAM(net, "body")(images + 0, labels + 0)  # inference tensors
        assert torch.is_grad_enabled() == enabled
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


def test_autocast_serves_a_training_step_after_it(net):
    images, labels = pictures(net, 16)
    with torch.autocast("cpu", torch.bfloat16):
        GradCAM(net, "body")(images, labels)
        net(images).float().sum().backward()
    trained = {name for name, p in net.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in net.named_parameters() if "unused" not in name}


def test_frozen_models(net):
    images, labels = pictures(net, 16)
    expected = GradCAM(net, "body")(images, labels)
    torch.testing.assert_close(GradCAM(net.requires_grad_(False), "body")(images, labels), expected)


def test_an_image_does_not_depend_on_its_batch():
    model = network("resnet18")
    images, labels = pictures(model)
    images[1, 0, 5, 5] = float("nan")
    together = GradCAM(model)(images, labels)
    assert together[1].abs().max() == 0
    assert together.isfinite().all()
    for i in (0, 2, 3):
        alone = GradCAM(model)(images[i : i + 1], labels[i : i + 1])[0]
        assert alone.max() == 1
        torch.testing.assert_close(together[i], alone, atol=1e-4, rtol=0)


def test_empty_batch(net):
    maps = GradCAM(net, "body")(torch.zeros(0, 3, 16, 16), torch.zeros(0, dtype=torch.int64))
    assert maps.shape == (0, 8, 8)


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_out_of_range(net, label):
    labels = torch.tensor([0, label])
    with pytest.raises(ValueError, match=rf"labels must be 0 <= label < 10, .* got {label};"):
        GradCAM(net, "body")(torch.randn(2, 3, 16, 16), labels)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), "images must be float"),
        (torch.zeros(3, 8, 8), torch.tensor([0, 1, 2]), r"images must be .* \[3, 8, 8\]"),
        (torch.zeros(2, 3, 8, 8), torch.tensor([0.0, 1.0]), r"int64\[2\].* got torch.float32 \[2"),
        (torch.zeros(2, 3, 8, 8), torch.tensor([0]), r"labels must be int64\[2\].* \[1\]"),
    ],
)
def test_inputs_of_another_kind(net, images, labels, message):
    with pytest.raises(ValueError, match=message):
        GradCAM(net, "body")(images, labels)


def test_wrapped_models(net):
    images, labels = pictures(net, 16)
    expected = GradCAM(net, "body")(images, labels)
    averaged = torch.optim.swa_utils.AveragedModel(net)
    wrapped = [nn.DataParallel(net), averaged, compiled(net), compiled(nn.DataParallel(net))]
    for model in wrapped:
        torch.testing.assert_close(GradCAM(model, "body")(images, labels), expected)
    assert GradCAM(compiled(network("resnet18"))).layer == "layer4"
    in_place = copy.deepcopy(net)
    in_place.compile(backend="eager")
    torch.testing.assert_close(GradCAM(in_place, "body")(images, labels), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_cuda_agrees_with_the_cpu(dtype):
    model = network("resnet18")
    images, labels = pictures(model)
    expected = GradCAM(model)(images, labels)
    model = copy.deepcopy(model).cuda().to(memory_format=torch.channels_last)
    images = images.cuda().to(memory_format=torch.channels_last)
    context = torch.autocast("cuda", dtype) if dtype else contextlib.nullcontext()
    with context:
        found = GradCAM(model)(images, labels)  # labels may stay on the CPU
    assert found.device == images.device
    torch.testing.assert_close(found.cpu(), expected, atol=0.1 if dtype else 0.02, rtol=0)
