"""Layers whose output is not [B,C,h,w] of a square image.

Swin gives [B,h,w,C], and a vision transformer tokens: people reshape them by hand, for one grid and
one class token, and get the wrong axes or an error for another shape of image
(https://github.com/jacobgil/pytorch-grad-cam/issues/452, /84 and /426). Here [1,7,14,768] of a
224x448 image was read as 768 columns, and 8x18 patches as a square of 12. What has the shape of a
map need not be one: attention matrices, and tokens in the order of Hiera's mask units
(https://github.com/facebookresearch/hiera/issues/43), were taken for maps; found by trying.
"""

import pytest
import torch
import torchvision.models as tv
from conftest import batch_of
from timm.models.deit import VisionTransformerDistilled
from timm.models.hiera import Hiera
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from scae_dali.saliency.gradcam import GradCAM, default_layer
from scae_dali.saliency.harvest import Harvest
from scae_dali.saliency.layout import readings
from scae_dali.saliency.scorecam import ScoreCAM

CLASSES = 5


def pictures(size, batch=3):
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(5))
    return images, torch.arange(batch)


def by_hand(model, layer, images, labels, to_map):
    """Grad-CAM by autograd alone; to_map: the layer's output -> [B,C,h,w]. f32[B,h,w]."""
    kept = []
    handle = model.get_submodule(layer).register_forward_hook(lambda *call: kept.append(call[2]))
    logits = model(images)
    handle.remove()
    scores = logits.gather(1, labels[:, None]).sum()
    (gradient,) = torch.autograd.grad(scores, kept)
    features, gradient = to_map(kept[0]).detach(), to_map(gradient)
    a = (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu()
    low, high = a.amin((1, 2), keepdim=True), a.amax((1, 2), keepdim=True)
    return torch.where(high > low, (a - low) / (high - low), 0.0)


def assert_by_hand(model, layer, size, to_map, grid):
    images, labels = pictures(size)
    found = GradCAM(model, layer)(images, labels)
    expected = by_hand(model, layer, images, labels, to_map)
    assert found.shape == (len(images), *grid)
    assert (found.amax((1, 2)) == 1).any()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert GradCAM(model, layer).grid(size) == grid
    if size[0] == size[1]:
        assert GradCAM(model, layer).grid(size[0]) == grid


@pytest.fixture(scope="module")
def swin():
    """Stride 4 with 16 channels, then 8 with 32."""
    torch.manual_seed(0)
    return tv.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=CLASSES).eval()


# ---- [B,h,w,C]


@pytest.mark.parametrize("size", [(64, 64), (32, 64), (96, 40), (64, 72), (32, 256)])
@pytest.mark.parametrize(("layer", "stride"), [("features", 8), ("features.1", 4), ("norm", 8)])
def test_channels_last_at_any_aspect(swin, size, layer, stride):
    grid = (size[0] // stride, size[1] // stride)
    assert_by_hand(swin, layer, size, lambda output: output.permute(0, 3, 1, 2), grid)


def test_channels_first_of_the_same_network_are_left_as_they_are(swin):
    assert default_layer(swin) == "permute"
    assert_by_hand(swin, "permute", (32, 64), lambda output: output, (4, 8))


def test_score_cam_reads_them_alike(swin):
    images, labels = pictures((32, 64), 2)
    first = ScoreCAM(swin, "permute")(images, labels)
    torch.testing.assert_close(ScoreCAM(swin, "norm")(images, labels), first)
    assert first.shape == (2, 4, 8)
    assert ScoreCAM(swin, "norm").grid((32, 64)) == (4, 8)


class Cube(nn.Module):
    """As many channels as rows and columns: [B,8,8,8] of 16 px, which the shape does not settle."""

    def __init__(self, last, only=None):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 8, 3, 2, 1)
        self.body = nn.Identity()
        self.fc = nn.Linear(8, CLASSES)
        self.last, self.only = last, only

    def forward(self, x):
        assert self.only is None or x.shape[2:] == self.only
        x = self.convolution(x)
        x = self.body(x.permute(0, 2, 3, 1) if self.last else x)
        return self.fc(x.relu().mean((1, 2) if self.last else (2, 3)))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (16, 32)])
def test_as_many_channels_as_columns(last, size):
    model = Cube(last)
    if size[1] > size[0]:  # [B,4,8,16] may be maps of 4x8, and [B,8,16,4] of 16x4 is none
        model.convolution = nn.Conv2d(3, 4, 3, 2, 1)
        model.fc = nn.Linear(4, CLASSES)
    to_map = (lambda output: output.permute(0, 3, 1, 2)) if last else (lambda output: output)
    assert_by_hand(model, "body", size, to_map, (size[0] // 2, size[1] // 2))


@pytest.mark.parametrize("last", [False, True])
def test_a_tie_that_nothing_settles_is_refused_by_both_names(last):
    model = Cube(last, only=(16, 16))
    with pytest.raises(
        ValueError,
        match=r"'body' gives \[3, 8, 8, 8\] .* \[B,C,h,w\] with maps of 8x8 or \[B,h,w,C\] with",
    ):
        GradCAM(model, "body")(*pictures((16, 16)))


def test_borders_without_padding_and_poolings_to_a_square():
    torch.manual_seed(0)
    trunk = nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 9, 5), nn.MaxPool2d(2))
    )
    head = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(81, CLASSES))
    model = nn.Sequential(trunk, head).eval()
    assert_by_hand(model, "0", (28, 56), lambda output: output, (4, 11))
    assert_by_hand(model, "0", (56, 28), lambda output: output, (11, 4))
    assert_by_hand(model, "0", (28, 112), lambda output: output, (4, 25))
    assert_by_hand(model, "1.0", (28, 56), lambda output: output, (3, 3))


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((1, 768, 7, 14), (224, 448), ["[B,C,h,w] with maps of 7x14"]),
        ((1, 7, 14, 768), (224, 448), ["[B,h,w,C] with maps of 7x14"]),
        ((1, 14, 7, 96), (448, 224), ["[B,h,w,C] with maps of 14x7"]),
        ((1, 2048, 5, 12), (224, 448), ["[B,C,h,w] with maps of 5x12"]),
        ((1, 512, 1, 32), (32, 1024), ["[B,C,h,w] with maps of 1x32"]),
        ((1, 12, 197, 64), (224, 224), []),  # heads, tokens, channels
        ((1, 16, 8, 9), (64, 64), []),
        ((1, 7, 7, 7), (224, 224), ["[B,C,h,w] with maps of 7x7", "[B,h,w,C] with maps of 7x7"]),
    ],
)
def test_readings_of_a_shape(shape, size, expected):
    assert [str(layout) for layout in readings(shape, size, [0, 1])] == expected


# ---- tokens


def timm_vit(cls=VisionTransformer, size=(32, 64), **more):
    torch.manual_seed(0)
    settings = {"img_size": size, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return cls(**settings, num_classes=CLASSES, **more).eval()


def tokens_to(grid, leading):
    def to_map(output):
        h, w = grid
        patches = output[:, leading:].reshape(len(output), h, w, -1)
        return patches.permute(0, 3, 1, 2)

    return to_map


@pytest.mark.parametrize(
    ("size", "leading", "more"),
    [
        ((32, 64), 1, {}),
        ((64, 144), 1, {}),  # 8x18 patches are 12x12
        ((144, 64), 0, {"class_token": False, "global_pool": "avg"}),
        ((64, 144), 4, {"class_token": False, "global_pool": "avg", "reg_tokens": 4}),
        ((32, 64), 5, {"reg_tokens": 4}),  # 32 + 4 are 6x6
        ((40, 40), 5, {"reg_tokens": 4}),
        ((16, 16), 5, {"reg_tokens": 4}),  # 4 + 5 are 3x3
        ((64, 144), 2, {"cls": VisionTransformerDistilled}),
    ],
)
def test_tokens_of_timm_at_any_aspect(size, leading, more):
    model = timm_vit(size=size, **more)
    grid = (size[0] // 8, size[1] // 8)
    for layer in ("blocks.0", "blocks.1.norm1"):
        assert_by_hand(model, layer, size, tokens_to(grid, leading), grid)
    # Before the leading tokens come.
    assert_by_hand(model, "patch_embed.norm", size, tokens_to(grid, 0), grid)


def test_tokens_of_padded_images():
    model = timm_vit(dynamic_img_size=True, dynamic_img_pad=True)
    assert_by_hand(model, "blocks.0", (37, 60), tokens_to((5, 8), 1), (5, 8))


class Cut(nn.Module):
    """Patches cut out and projected, without a convolution, behind `leading` tokens."""

    def __init__(self, leading, cut=True):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Linear(3 * 64, 16) if cut else nn.Conv2d(3, 16, 8, 8)
        self.tokens = nn.Parameter(torch.randn(1, leading, 16))
        self.body = nn.LayerNorm(16)
        self.fc = nn.Linear(16, CLASSES)
        self.cut = cut

    def forward(self, x):
        if self.cut:
            x = self.patches(nn.functional.unfold(x, 8, stride=8).transpose(1, 2))
        else:
            x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.tokens.expand(len(x), -1, -1), x], 1)
        return self.fc(self.body(x).relu().mean(1))


@pytest.mark.parametrize("leading", [0, 1])
@pytest.mark.parametrize("size", [(32, 32), (32, 64), (144, 64)])
def test_patches_that_no_convolution_made(leading, size):
    grid = (size[0] // 8, size[1] // 8)
    assert_by_hand(Cut(leading), "body", size, tokens_to(grid, leading), grid)


@pytest.mark.parametrize(
    ("leading", "size", "cut"),
    [
        (2, (32, 32), True),
        (2, (32, 32), False),
        (4, (32, 64), True),  # 32 + 4 are 4x9, and 6x6
        (4, (32, 64), False),
        (5, (16, 16), False),  # 4 + 5 are 3x3, and more than there are patches
    ],
)
def test_leading_tokens_that_nobody_told_of_are_refused(leading, size, cut):
    model = Cut(leading, cut)
    with pytest.raises(ValueError, match=r"'body' gives .* no feature map; .*num_prefix_tokens$"):
        GradCAM(model, "body")(*pictures(size))
    model.num_prefix_tokens = leading
    grid = (size[0] // 8, size[1] // 8)
    assert_by_hand(model, "body", size, tokens_to(grid, leading), grid)
    inner = nn.Sequential(model)  # a part says so
    assert_by_hand(inner, "0.body", size, tokens_to(grid, leading), grid)


class Flat(nn.Module):
    """A map of 16 channels with its places in one axis, [B,16,32]; 16 might be 4x4 tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 16, 8, 8)
        self.body = nn.Flatten(2)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.fc(self.body(self.convolution(x)).relu().mean(2))


@pytest.mark.parametrize("size", [(32, 64), (64, 64), (40, 96)])
def test_places_in_the_last_axis(size):
    grid = (size[0] // 8, size[1] // 8)
    assert_by_hand(Flat(), "body", size, lambda output: output.unflatten(2, grid), grid)


class Pooled(nn.Module):
    """Convolutions, and then a map of `channels` with its places in one axis; `only`: no other size
    of images."""

    def __init__(self, channels, strides, pool=1, only=None):
        super().__init__()
        torch.manual_seed(0)
        inputs = [3, *[8] * (len(strides) - 1)]
        outputs = [*inputs[1:], channels]
        self.convolutions = nn.Sequential(
            *(nn.Conv2d(a, b, 3, s, 1) for a, b, s in zip(inputs, outputs, strides, strict=True))
        )
        self.norm = nn.BatchNorm1d(channels)
        self.fc = nn.Linear(channels, CLASSES)
        self.pool, self.only = pool, only

    def forward(self, x):
        assert self.only is None or x.shape[2:] == self.only
        x = nn.functional.avg_pool2d(self.convolutions(x), self.pool)
        return self.fc(self.norm(x.flatten(2)).relu().mean(2))


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    ("channels", "size", "strides", "pool"),
    [
        (256, (64, 64), [2, 2, 2], 1),  # a convolution before gave 16x16 cells
        (128, (32, 64), [2, 2, 2], 1),  # 8x16
        (64, (64, 64), [2, 2, 2], 1),  # as many channels as places
        (72, (24, 48), [2, 2], 1),  # 6x12, the same
        (64, (32, 32), [2, 2], 2),  # pooled without a module
    ],
)
def test_places_in_the_last_axis_of_channels_that_would_make_a_map(
    channels, size, strides, pool, fixed
):
    model = Pooled(channels, strides, pool, size if fixed else None).eval()
    h, w = (side // 2 ** len(strides) // pool for side in size)
    assert_by_hand(model, "norm", size, lambda output: output.unflatten(2, (h, w)), (h, w))


@pytest.mark.parametrize("dynamic", [False, True])
def test_as_many_tokens_as_channels(dynamic):
    model = timm_vit(size=(32, 32), class_token=False, global_pool="avg", dynamic_img_size=dynamic)
    for layer in ("blocks.0", "blocks.1.norm1"):
        assert_by_hand(model, layer, (32, 32), tokens_to((4, 4), 0), (4, 4))


class Blind(nn.Module):
    """[B,64,64] of which every place sees the mean of the image alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 64, 8, 8)
        self.body = nn.Flatten(2)
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x):
        assert x.shape[2:] == (64, 64)
        return self.fc(self.body(self.convolution(x.mean((2, 3), True).expand_as(x))).mean(2))


def test_places_and_channels_that_nothing_tells_apart_are_both_named():
    cam = GradCAM(Blind(), "body")
    with pytest.raises(
        ValueError, match=r"may be \[B,C,N\] with maps of 8x8 or \[B,N,C\] with maps of 8x8"
    ):
        cam(*pictures((64, 64)))


# ---- strides and poolings that change the aspect


class Squeezed(nn.Module):
    """A convolution that makes rows fewer than columns, or the other way round."""

    def __init__(self, channels, stride, last=False, only=None):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, channels, 3, stride, 1)
        self.body = nn.Identity()
        self.fc = nn.Linear(channels, CLASSES)
        self.last, self.only = last, only

    def forward(self, x):
        assert self.only is None or x.shape[2:] == self.only
        x = self.convolution(x)
        x = self.body(x.permute(0, 2, 3, 1) if self.last else x).relu()
        return self.fc(x.mean((1, 2) if self.last else (2, 3)))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("channels", "stride", "size"),
    [
        (8, (2, 1), (32, 128)),  # [B,8,16,128] has the aspect, but for some cells, as 8x16
        (4, (2, 1), (32, 128)),  # exactly
        (8, (4, 1), (32, 128)),
        (8, (4, 1), (64, 64)),
        (16, (2, 1), (64, 256)),
        (8, (1, 2), (128, 32)),
    ],
)
def test_strides_that_change_the_aspect(channels, stride, size, last):
    grid = (size[0] // stride[0], size[1] // stride[1])
    to_map = (lambda output: output.permute(0, 3, 1, 2)) if last else (lambda output: output)
    assert_by_hand(Squeezed(channels, stride, last), "body", size, to_map, grid)
    if not last:
        assert_by_hand(Squeezed(channels, stride), "convolution", size, to_map, grid)
        fixed = Squeezed(channels, stride, only=size)
        assert_by_hand(fixed, "body", size, to_map, grid)


@pytest.mark.parametrize("grid", [(4, 8), (3, 5), (5, 5)])
@pytest.mark.parametrize("size", [(64, 64), (32, 64)])
def test_poolings_to_any_size(grid, size):
    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool2d(grid)
    head = nn.Linear(8 * grid[0] * grid[1], CLASSES)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), pool, nn.Flatten(), head).eval()
    assert_by_hand(model, "2", size, lambda output: output, grid)


# ---- what has a map's shape and is none


@pytest.mark.parametrize(
    ("layer", "more"),
    [
        ("blocks.0.attn.attn_drop", {}),  # [B,heads,17,17]
        ("blocks.0.attn.attn_drop", {"class_token": False, "global_pool": "avg"}),
        ("blocks.0.attn.k_norm", {"embed_dim": 34}),  # [B,2,17,17]
        ("blocks.0.attn.k_norm", {"embed_dim": 32, "class_token": False, "global_pool": "avg"}),
        ("blocks.0.attn.k_norm", {"embed_dim": 64, "num_heads": 16}),  # [B,16,17,4]
        ("blocks.0.attn.attn_drop", {"dynamic_img_size": True}),
        ("blocks.0.attn.k_norm", {"embed_dim": 34, "dynamic_img_size": True}),
    ],
)
def test_attention_matrices_and_the_heads_parts_of_tokens_are_refused(layer, more):
    torch.manual_seed(0)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = VisionTransformer(**{**settings, **more}, num_classes=CLASSES, qk_norm=True).eval()
    model.blocks[0].attn.fused_attn = False
    with pytest.raises(ValueError, match=f"'{layer}' gives .* which is no feature map"):
        GradCAM(model, layer)(*pictures((32, 32)))


class Matrix(nn.Module):
    """A class token that attends to patches, which no convolution made; softmax is a module."""

    def __init__(self):
        super().__init__()
        self.tokens = Cut(1)
        self.query = nn.Linear(16, 16)
        self.softmax = nn.Softmax(-1)

    def forward(self, x):
        x = self.tokens.patches(nn.functional.unfold(x, 8, stride=8).transpose(1, 2))
        x = torch.cat([self.tokens.tokens.expand(len(x), -1, -1), x], 1)
        matrix = (self.query(x) @ x.transpose(1, 2))[:, None].expand(-1, 2, -1, -1)
        return self.tokens.fc((self.softmax(matrix).mean(1) @ x)[:, 0])


def test_an_attention_matrix_is_not_suggested():
    with pytest.raises(ValueError, match="no default layer is known") as caught:
        GradCAM(Matrix())
    assert str(caught.value).endswith("such as tokens.patches")


def test_tokens_in_an_order_of_their_own_are_refused():
    torch.manual_seed(0)
    model = Hiera(
        img_size=(64, 64),
        num_classes=CLASSES,
        embed_dim=16,
        num_heads=1,
        stages=(1, 1, 1),
        q_pool=2,
        mask_unit_size=(4, 4),
        mask_unit_attn=(True, True, False),
    ).eval()
    nn.init.normal_(model.head.fc.weight)
    with pytest.raises(ValueError, match=r"'blocks.0' .* not in the order of the image's rows"):
        GradCAM(model, "blocks.0")(*pictures((64, 64)))
    assert_by_hand(model, "blocks.2", (64, 64), tokens_to((4, 4), 0), (4, 4))
    assert_by_hand(model, "patch_embed", (64, 64), tokens_to((16, 16), 0), (16, 16))


# ---- what is gathered in training


@pytest.mark.parametrize("layer", ["norm", "permute"])
def test_a_harvest_reads_them_alike(swin, layer):
    images, labels = pictures((64, 64))
    harvest = Harvest(swin, layer, samples=3, num_classes=CLASSES, grid=(8, 8), size=64)
    swin(images)
    harvest.add(batch_of(images, labels))
    found = torch.from_numpy(harvest.maps(labels.numpy())[0])
    expected = GradCAM(swin, layer)(images, labels)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
