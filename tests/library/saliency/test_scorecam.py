"""Score-CAM by hand, against a plain loop and against grad-cam; the model untouched."""

import copy
import math
import types
import warnings

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

from scae_dali.saliency.scorecam import ScoreCAM

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of grad-cam's own imports
    import pytorch_grad_cam.score_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget


@pytest.fixture
def mixed():
    return mixed_modes()


@pytest.fixture
def net():
    """Channels differ in their scores by several units, so that some weigh much."""
    torch.manual_seed(3)
    model = settle(Net(), 16)
    with torch.no_grad():
        model.head.weight.mul_(20)
    return model


def sharp(name, size):
    """`network`, with logits as far apart as a trained one's."""
    model = copy.deepcopy(network(name, size))
    last = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    with torch.no_grad():
        last.weight.mul_(30)
    return model


def upsampled(channel, size):
    """f64[h,w] -> f64[size,size]: bilinear from the centres of cells to those of pixels."""

    def weights(cells):
        at = ((torch.arange(size) + 0.5) * cells / size - 0.5).clamp(0, cells - 1)
        return (1 - (at[:, None] - torch.arange(cells)).abs()).clamp_min(0).double()

    return weights(channel.shape[0]) @ channel @ weights(channel.shape[1]).T


def oracle(model, layer, images, labels):
    """Algorithm 1, an image and a channel at a time, with its baseline: f64[B,h,w]."""
    model, maps = copy.deepcopy(model).double().eval(), []
    for image, label in zip(images.double(), labels, strict=True):
        kept = []
        handle = model.get_submodule(layer).register_forward_hook(lambda *a, k=kept: k.append(a[2]))
        with torch.no_grad():
            model(image[None])
            handle.remove()
            (features,) = kept[0]  # [C,h,w]
            baseline = model(torch.zeros_like(image)[None])[0, label]
            scores = torch.full((len(features),), -torch.inf, dtype=torch.float64)
            for k, channel in enumerate(features):
                if channel.max() > channel.min():
                    mask = upsampled(channel, image.shape[1])
                    mask = (mask - mask.min()) / (mask.max() - mask.min())
                    scores[k] = model((image * mask)[None])[0, label] - baseline
        maps.append((scores.softmax(0)[:, None, None] * features).sum(0))
    return minmax(torch.stack(maps))


def reference(monkeypatch, model, layer, images, labels, reshape=None):
    """grad-cam's map at the layer's own resolution, min-maxed: f64[B,h,w]."""
    module = model.get_submodule(layer)
    targets = [ClassifierOutputTarget(int(label)) for label in labels]
    reference_cam = pytorch_grad_cam.score_cam.ScoreCAM
    # It aligns the corners, as the authors' own code does not.
    upsample = lambda size: nn.Upsample(size=size, mode="bilinear", align_corners=False)  # noqa: E731
    monkeypatch.setattr(nn, "UpsamplingBilinear2d", upsample)
    monkeypatch.setattr(pytorch_grad_cam.score_cam.tqdm, "tqdm", lambda steps: steps)
    with reference_cam(model, [module], reshape_transform=reshape) as cam, torch.no_grad():
        cam.activations_and_grads(images)
        features = cam.activations_and_grads.activations[0].numpy()
        raw = cam.get_cam_image(images, module, targets, features, None)
    return minmax(torch.from_numpy(raw))


def watch(model, stem="stem"):
    """-> the list of the inputs that the network's first module gets from now on."""
    inputs = []
    model.get_submodule(stem).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    return inputs


# ---- the numbers


class Sum(nn.Module):
    """Logits: the sum of the image's first channel, and 0; its features are the image."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(2, 2, 1, bias=False)
        with torch.no_grad():
            self.features.weight.copy_(torch.eye(2)[:, :, None, None])

    def forward(self, x):
        score = self.features(x)[:, 0].sum((1, 2))
        return torch.stack([score, 0 * score], 1)


def test_by_hand():
    image = torch.tensor([[[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]]]])
    # Masked by itself the first channel scores 2, by the second 0: alpha = softmax(2, 0) ~ (e^2, 1)
    expected = torch.tensor([[1.0, 0.0], [0.0, 3 / (2 * math.e**2)]])
    maps = ScoreCAM(Sum(), "features")(image.repeat(2, 1, 1, 1), torch.tensor([0, 1]))
    torch.testing.assert_close(maps[0], expected)
    # Of the other class both score 0.
    torch.testing.assert_close(maps[1], torch.tensor([[2 / 3, 0.0], [0.0, 1.0]]))


@pytest.mark.parametrize("layer", ["body", "norm", "stem"])
def test_equals_a_plain_loop(net, layer):
    images, labels = pictures(net, 16, batch=5)
    found = ScoreCAM(net, layer)(images, labels)
    expected = oracle(net, layer, images, labels)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() < 1e-4
    assert (found.amax((1, 2)) == 1).sum() >= 3, "too few maps to compare"


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet18", "layer2"),
        ("mobilenet_v3_small", "features.11"),
        ("mobilenet_v3_small", "features.4.block.0.1"),  # BatchNorm, then an in-place Hardswish
        ("squeezenet1_1", "features.7"),
    ],
)
def test_equals_grad_cam(monkeypatch, name, layer):
    model = sharp(name, 64)
    images, labels = pictures(model, 64, batch=1)
    expected = reference(monkeypatch, model, layer, images, labels)
    found = ScoreCAM(model, layer)(images, labels)
    assert found.shape == expected.shape
    assert found.max() == 1
    assert (found.double() - expected).abs().max() < 1e-4


def test_equals_grad_cam_on_a_vision_transformer(monkeypatch):
    torch.manual_seed(0)
    model = tv.VisionTransformer(64, 16, 2, 4, 32, 64, num_classes=CLASSES).eval()
    nn.init.normal_(model.heads.head.weight)  # zero as built
    images, labels = pictures(model, 64)
    cam = ScoreCAM(model)

    def reshape(tokens):
        return tokens[:, 1:].reshape(-1, 4, 4, 32).permute(0, 3, 1, 2)

    expected = reference(monkeypatch, model, cam.layer, images, labels, reshape)
    assert (cam(images, labels).double() - expected).abs().max() < 1e-4
    assert (expected.amax((1, 2)) > 0).sum() >= 3


# ---- channels and images that give nothing


def test_a_constant_channel_weighs_nothing_and_costs_nothing(net):
    images, labels = pictures(net, 16, batch=2)
    with torch.no_grad():
        net.body.weight[2] = 0
        net.body.bias[2] = 100.0
    expected = oracle(net, "body", images, labels)
    inputs = watch(net)
    found = ScoreCAM(net, "body")(images, labels)
    assert [len(x) for x in inputs] == [2, 2 * 5]
    assert (found.double() - expected).abs().max() < 1e-4
    assert expected.max() == 1


def test_maps_without_content_are_zero_and_leave_the_others_alone(net):
    images, labels = pictures(net, 16, batch=5)
    cam = ScoreCAM(net, "body")
    expected = cam(images, labels)
    images[1, 0, 5, 5] = float("nan")
    images[3, 2, 0, 0] = float("inf")
    found = cam(images, labels)
    assert found[[1, 3]].abs().max() == 0
    torch.testing.assert_close(found[[0, 2, 4]], expected[[0, 2, 4]], atol=1e-5, rtol=0)
    with torch.no_grad():
        net.body.weight.zero_()
    inputs = watch(net)
    assert cam(images, labels).abs().max() == 0
    assert len(inputs) == 1  # there is nothing to mask with


def test_masks_that_overflow_give_no_map(net):
    """Where a masked image's logit is not finite, neither are the weights."""
    images, labels = pictures(net, 16, batch=2)
    forward = net.forward

    def overflowing(self, x):
        logits = forward(x)
        return logits if len(x) == 2 else torch.full_like(logits, torch.inf)

    net.forward = types.MethodType(overflowing, net)
    assert ScoreCAM(net, "body", chunk=12)(images, labels).abs().max() == 0


def test_empty_batch(net):
    maps = ScoreCAM(net, "body")(torch.zeros(0, 3, 16, 16), torch.zeros(0, dtype=torch.int64))
    assert maps.shape == (0, 8, 8)


# ---- chunks and batches


@pytest.mark.parametrize("chunk", [1, 5, 18, 1000])
def test_the_chunk_changes_nothing_but_the_memory(net, chunk):
    images, labels = pictures(net, 16, batch=3)
    expected = ScoreCAM(net, "body")(images, labels)
    inputs = watch(net)
    found = ScoreCAM(net, "body", chunk=chunk)(images, labels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    sizes = [len(x) for x in inputs[1:]]
    assert sum(sizes) == 3 * 6
    assert set(sizes[:-1]) <= {chunk}
    assert sizes[-1] <= chunk


def test_an_image_does_not_depend_on_its_batch(net):
    images, labels = pictures(net, 16, batch=4)
    cam = ScoreCAM(net, "body", chunk=7)
    together = cam(images, labels)
    for i in range(4):
        alone = cam(images[i : i + 1], labels[i : i + 1])[0]
        torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [0, -1])
def test_chunks_hold_something(net, chunk):
    with pytest.raises(ValueError, match=f"chunk must be at least 1 masked image, got {chunk}"):
        ScoreCAM(net, "body", chunk=chunk)


# ---- the model is left as it was found


def test_model_is_left_as_found(mixed):
    before = snapshot(mixed)
    random = torch.get_rng_state()
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ScoreCAM(mixed, "layer1")(images, torch.tensor([1]))
    assert_same(snapshot(mixed), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_model_is_left_as_found_after_an_error(net, passes):
    """Of the pass over the images, of the first over masked ones, and of a later one."""
    calls = 0
    pool = net.pool.forward

    def fail(x):
        nonlocal calls
        calls += 1
        if calls > passes:
            raise RuntimeError("boom")
        return pool(x)

    net.pool.forward = fail
    net.train()
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="boom"):
        ScoreCAM(net, "body", chunk=2)(torch.randn(2, 3, 16, 16), torch.tensor([1, 2]))
    assert calls == passes + 1
    assert_same(snapshot(net), before)
    assert torch.is_grad_enabled()


def test_nothing_is_differentiated(net):
    images, labels = pictures(net, 16)
    grad = []
    net.head.register_forward_hook(lambda *args: grad.append(args[2].requires_grad))
    assert not ScoreCAM(net, "body")(images, labels).requires_grad
    assert grad
    assert not any(grad)


# ---- what surrounds the call


def test_the_memory_format_is_kept():
    model = copy.deepcopy(network("squeezenet1_1", 64)).to(memory_format=torch.channels_last)
    images, labels = pictures(model, 64, batch=1)
    expected = ScoreCAM(network("squeezenet1_1", 64), "features.4")(images, labels)
    inputs = watch(model, "features.0")
    found = ScoreCAM(model, "features.4")(images.to(memory_format=torch.channels_last), labels)
    assert len(inputs) > 1
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in inputs)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_mixed_and_half_precision_are_close(net):
    images, labels = pictures(net, 16)
    with torch.no_grad():
        net.head.weight.div_(10)  # 8 bits of a large logit say nothing of its difference
    expected = ScoreCAM(net, "body")(images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = ScoreCAM(net, "body")(images, labels)
        fed_half = ScoreCAM(net, "body")(images.half(), labels)
    half = ScoreCAM(copy.deepcopy(net).half(), "body")(images.half(), labels)
    for maps, tolerance in ((found, 0.05), (fed_half, 0.05), (half, 0.02)):
        assert maps.dtype == torch.float32
        torch.testing.assert_close(maps, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_grad_mode_of_the_caller(net, mode):
    images, labels = pictures(net, 16)
    expected = ScoreCAM(net, "body")(images, labels)
    with mode():
        enabled = torch.is_grad_enabled()
        found = ScoreCAM(net, "body")(images + 0, labels + 0)  # inference tensors
        assert torch.is_grad_enabled() == enabled
    torch.testing.assert_close(found, expected)


def test_wrapped_models(net):
    images, labels = pictures(net, 16, batch=2)
    expected = ScoreCAM(net, "body")(images, labels)
    for model in (nn.DataParallel(net), torch.optim.swa_utils.AveragedModel(net), compiled(net)):
        torch.testing.assert_close(ScoreCAM(model, "body")(images, labels), expected)


def test_the_grid_takes_one_forward_pass(net):
    inputs = watch(net)
    assert ScoreCAM(net, "body").grid(16) == (8, 8)
    assert [list(x.shape) for x in inputs] == [[1, 3, 16, 16]]


@pytest.mark.parametrize(
    ("layer", "label", "message"),
    [
        ("bodi", 0, "layer 'bodi' is no module of Net; did you mean body"),
        ("unused", 0, "layer 'unused' does not run in the forward pass of Net"),
        ("act", 0, "layer 'act' runs more than once in a forward pass"),
        ("pool", 0, "a map of one value says nothing"),
        ("body", CLASSES, "labels must be 0 <= label < 10, .* got 10;"),
    ],
)
def test_errors_are_those_of_any_cam(net, layer, label, message):
    with pytest.raises(ValueError, match=message):
        ScoreCAM(net, layer)(torch.randn(2, 3, 16, 16), torch.tensor([0, label]))


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu():
    model = network("squeezenet1_1", 64)
    images, labels = pictures(model, 64, batch=2)
    expected = ScoreCAM(model)(images, labels)
    model = copy.deepcopy(model).cuda().to(memory_format=torch.channels_last)
    found = ScoreCAM(model)(images.cuda().to(memory_format=torch.channels_last), labels)
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), expected, atol=0.02, rtol=0)
