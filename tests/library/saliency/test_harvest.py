"""Harvest: class activation maps of training crops, put back into the full frame."""

import copy
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torchvision
from conftest import batch_of
from pairs import in_two
from passes import GRID, SIZE, Net, harvest_of, loaders, pictures, see

from pipelines import files, memory
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.data.index import ImageIndex
from scae_dali.data.pixels import ArrayImages
from scae_dali.methods import Status
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.order import Order
from scae_dali.saliency.gradcam import GradCAM
from scae_dali.saliency.harvest import crop_to_frame, min_max
from scae_dali.saliency.refresh import agreement, refresh_cache
from scae_dali.stage.loader import Loader
from scae_dali.stage.stage import Stage


@pytest.fixture
def net():
    """In evaluation mode, so that a map does not depend on the batch."""
    return Net().eval()


def bilinear(values, y, x):
    """values: [h, w]; y, x: in shares of it. align_corners=False, the border goes on."""
    h, w = values.shape
    y, x = np.clip(y * h - 0.5, 0, h - 1), np.clip(x * w - 0.5, 0, w - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
    above = values[top, left] * (1 - x + left) + values[top, right] * (x - left)
    below = values[bottom, left] * (1 - x + left) + values[bottom, right] * (x - left)
    return above * (1 - y + top) + below * (y - top)


def test_a_map_of_a_crop_lies_where_the_crop_was():
    rng = np.random.default_rng(0)
    n, grid = 40, (6, 9)
    maps = rng.normal(size=(n, 5, 4)).astype(np.float32)
    windows = np.concatenate([rng.uniform(-0.2, 0.6, (n, 2)), rng.uniform(0.2, 0.9, (n, 2))], 1)
    boxes = np.concatenate([rng.uniform(0, 0.5, (n, 2)), rng.uniform(0, 0.5, (n, 2))], 1)
    flips = rng.random(n) < 0.5
    values, seen = (
        part.numpy()
        for part in crop_to_frame(*map(torch.from_numpy, (maps, windows, boxes, flips)), grid)
    )
    for k, i, j in np.ndindex(n, *grid):
        y = ((i + 0.5) / grid[0] - windows[k, 0]) / windows[k, 2]
        x = ((j + 0.5) / grid[1] - windows[k, 1]) / windows[k, 3]
        top, left, height, width = boxes[k]
        erased = top <= y < top + height and left <= x < left + width
        assert seen[k, i, j] == (0 <= y < 1 and 0 <= x < 1 and not erased)
        if seen[k, i, j]:
            wanted = bilinear(maps[k], y, 1 - x if flips[k] else x)
            assert values[k, i, j] == pytest.approx(wanted, abs=1e-5)
    assert 0.1 < seen.mean() < 0.9


def test_whole_images_give_the_maps_of_a_pass(net):
    images, labels = pictures(50)
    harvest = harvest_of(net)
    see(net, harvest, batch_of(images, labels))
    maps, counts = harvest.maps(np.arange(50))
    np.testing.assert_allclose(maps, GradCAM(net, "features")(images, labels).numpy(), atol=2e-3)
    assert (counts == 1).all()
    np.testing.assert_array_equal(harvest.seen(), np.arange(50))


def test_flipped_images_give_the_same_maps(net):
    images, labels = pictures(20)
    flips = torch.arange(20) % 2 == 1
    turned = torch.where(flips[:, None, None, None], images.flip(3), images)
    one, other = harvest_of(net), harvest_of(net)
    # The network is not symmetric: a map of the turned image, turned back.
    see(net, one, batch_of(turned, labels, flips=flips))
    wanted = GradCAM(net, "features")(turned, labels)
    wanted = torch.where(flips[:, None, None], wanted.flip(2), wanted).numpy()
    np.testing.assert_allclose(one.maps(np.arange(20))[0], wanted, atol=2e-3)
    see(net, other, batch_of(turned, labels))
    assert np.abs(other.maps(np.arange(20))[0] - wanted).max() > 0.1


def test_four_quarters_make_a_whole(net):
    """Cells of a quarter of the image, seen in a crop of it that the network gets in its size."""
    images, labels = pictures(12)
    harvest = harvest_of(net, grid=(14, 14))
    corners = [(y, x) for y in (0.0, 0.5) for x in (0.0, 0.5)]
    wanted = np.zeros((12, 14, 14), np.float32)
    cam = {}
    hook = net.features.register_forward_hook(lambda *call: cam.update(features=call[2].detach()))
    for k, (y, x) in enumerate(corners):
        crops = images.roll(k, 0)  # the network sees something else in every quarter
        windows = torch.tensor([[y, x, 0.5, 0.5]]).repeat(12, 1)
        see(net, harvest, batch_of(crops, labels, windows=windows))
        part = torch.einsum("bc,bchw->bhw", net.head.weight[labels], cam["features"])
        top, left = int(14 * y), int(14 * x)
        wanted[:, top : top + 7, left : left + 7] = part.detach().numpy()
    hook.remove()
    maps, counts = harvest.maps(np.arange(12))
    assert (counts == 1).all()
    wanted = min_max(np.maximum(wanted, 0), np.ones_like(wanted, bool))
    np.testing.assert_allclose(maps, wanted, atol=2e-3)


def test_what_was_erased_is_not_seen_and_what_was_mixed_not_at_all(net):
    images, labels = pictures(5)
    status = torch.tensor([0, Status.ERASED, Status.ERASED, Status.MIXED, Status.MIXED_IN_BATCH])
    boxes = torch.zeros(5, 4)
    boxes[1] = torch.tensor([0.0, 8.0, 28.0, 8.0])  # columns 2 and 3 of 7; sample 2: a grid
    harvest = harvest_of(net)
    see(net, harvest, batch_of(images, labels, status=status, boxes=boxes))
    _, counts = harvest.maps(np.arange(5))
    assert counts[:, 0].tolist() == [[1] * 7, [1, 1, 0, 0, 1, 1, 1], [0] * 7, [0] * 7, [0] * 7]
    np.testing.assert_array_equal(harvest.seen(), [0, 1])


def test_crops_of_a_sample_are_averaged_with_the_older_map(net):
    images, labels = pictures(6)
    harvest = harvest_of(net)
    ids = np.array([4, 7, 9])
    for rows in (slice(0, 3), slice(3, 6)):
        see(net, harvest, batch_of(images[rows], labels[:3], ids))
    cam = {}
    net.features.register_forward_hook(lambda *call: cam.update(features=call[2].detach()))
    net(images)
    raw = torch.einsum("bc,bchw->bhw", net.head.weight[labels], cam["features"]).detach().numpy()
    whole = np.ones((3, *GRID), bool)
    mean = min_max(np.maximum((raw[:3] + raw[3:]) / 2, 0), whole)
    maps, counts = harvest.maps(ids)
    np.testing.assert_allclose(maps, mean, atol=2e-3)
    assert (counts == 2).all()
    old = np.random.default_rng(0).integers(0, 256, (3, *GRID), np.uint8)
    found = np.array([True, False, True])
    weight = found[:, None, None] * 1.0
    wanted = 255 * min_max((2 * maps + weight * old / 255) / (2 + weight), whole)
    np.testing.assert_allclose(harvest.blended(ids, old, found), wanted, atol=0.51)


def test_cells_that_no_crop_showed_keep_the_older_map(net):
    images, labels = pictures(2)
    harvest = harvest_of(net)
    windows = torch.tensor([[0.0, 0.0, 1.0, 0.5]]).repeat(2, 1)
    see(net, harvest, batch_of(images, labels, windows=windows))
    old = np.full((2, *GRID), 255, np.uint8)
    old[:, 0, 0] = 0
    new = harvest.blended(np.arange(2), old, np.array([True, False]))
    assert (new[0, :, 4:] == 255).all()
    assert (new[1, :, 4:] == 0).all()
    assert new[:, :, :3].max() > 0


def test_it_is_told_what_was_seen_last(net):
    harvest = harvest_of(net)
    images, labels = pictures(4)
    with torch.no_grad():
        net(images)
    with pytest.raises(
        RuntimeError, match="'features' has not run, with gradients, since the last"
    ):
        harvest.add(batch_of(images, labels))
    see(net, harvest, batch_of(images, labels))
    with pytest.raises(RuntimeError, match=r"add\(batch\) once after every model"):
        harvest.add(batch_of(images, labels))


def test_its_state_can_be_saved(net):
    images, labels = pictures(9)
    one, other = harvest_of(net), harvest_of(Net().eval())
    see(net, one, batch_of(images, labels))
    other.load_state_dict(one.state_dict())
    np.testing.assert_array_equal(other.maps(np.arange(9))[0], one.maps(np.arange(9))[0])
    assert len(other.seen()) == 9
    other.clear()
    assert (len(other.seen()), len(one.seen())) == (0, 9)
    one.clear()
    assert len(one.seen()) == 0


def test_how_many_crops_are_put_back_at_once_changes_nothing(net, monkeypatch):
    """Of two sizes, in batches of four; images are not kept until then."""
    wide = torch.randn(4, 3, 2 * SIZE, 2 * SIZE)
    batches = [
        batch_of(images, torch.arange(4) % 3, torch.arange(4) + 4 * (k % 3))
        for k, images in enumerate([*pictures(16)[0].split(4), wide, pictures(4, seed=1)[0]])
    ]
    found = []
    for at_once in (1, 8, 2048):
        monkeypatch.setattr("scae_dali.saliency.harvest.AT_ONCE", at_once)
        harvest = harvest_of(net)
        for batch in batches:
            see(net, harvest, batch)
        found.append(harvest.state_dict())
    assert found[0]["counts"].sum() == 24 * np.prod(GRID)
    for other in found[1:]:
        assert torch.equal(found[0]["sums"], other["sums"])
        assert torch.equal(found[0]["counts"], other["counts"])
    images = pictures(4)[0]
    see(net, harvest, batch_of(images, torch.arange(4) % 3))
    kept = weakref.ref(images)
    del images
    assert kept() is None
    state = copy.deepcopy(harvest.state_dict())
    see(net, harvest, batches[0])
    harvest.load_state_dict(state)  # what waited is forgotten
    assert torch.equal(harvest.state_dict()["counts"], state["counts"])


def test_many_crops_are_counted_without_overflow(net):
    harvest = harvest_of(net, samples=1)
    images, labels = pictures(1)
    with torch.no_grad():
        net.head.weight.mul_(1000)
    for _ in range(300):
        see(net, harvest, batch_of(images, labels))
    maps, counts = harvest.maps(np.arange(1))
    assert (counts == 300).all()
    assert np.isfinite(maps).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_network_in_mixed_precision_or_compiled(net, compiled):
    images, labels = pictures(16)
    harvest = harvest_of(net)
    model = torch.compile(net, backend="eager") if compiled else net
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            model(images)
        harvest.add(batch_of(images, labels))
    wanted = GradCAM(net, "features")(images, labels).numpy()
    assert np.abs(harvest.maps(np.arange(16))[0] - wanted).mean() < 0.01


@pytest.mark.parametrize("guarded", [False, True])
def test_of_two_compiled_networks_one_is_harvested(net, guarded):
    torch.compiler.reset()
    images, labels = pictures(2)
    other, harvest = torch.compile(copy.deepcopy(net), backend="eager"), harvest_of(net)
    model = torch.compile(net, backend="eager")
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=not guarded):
        model(images)
        harvest.add(batch_of(images, labels))
        other(images)
        model(images)
        if guarded:
            harvest.add(batch_of(images, labels))
            assert (harvest.maps(np.arange(2))[1] == 2).all()
        else:
            with pytest.raises(RuntimeError, match="skip_nnmodule_hook_guards = False before"):
                harvest.add(batch_of(images, labels))
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("name", "layer"), [("vgg11", None), ("vit_b_32", None), ("resnet18", "layer3")]
)
def test_a_head_that_is_no_pooling_and_linear_layer_is_refused(name, layer):
    model = torchvision.models.get_model(name, num_classes=3)
    with pytest.raises(ValueError, match=r"does not classify the mean of layer .*source to pass"):
        harvest_of(model, layer=layer, size=224)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0"])
def test_usual_networks_are_harvested_as_a_pass_sees_them(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=3).eval()
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])
    harvest = harvest_of(model, layer=None, size=64, grid=(2, 2))
    see(model, harvest, batch_of(images, labels))
    wanted = GradCAM(model)(images, labels).numpy()
    np.testing.assert_allclose(harvest.maps(np.arange(2))[0], wanted, atol=5e-3)


def harvested(net, index, part=slice(None)):
    """Of whole images of the index, as the pass sees them."""
    harvest = harvest_of(net, samples=len(index))
    for batch in loaders(index, [])(np.arange(len(index))[part].tolist()):
        net(batch.images)
        harvest.add(batch)
    return harvest


def test_the_cache_takes_the_harvest_without_a_pass(net, fresh, index):
    harvest, asked = harvested(net, index, slice(0, 40)), []
    report = refresh_cache(
        net,
        fresh,
        index,
        loaders(index, asked),
        epoch=3,
        layer="features",
        share=0.0,
        harvest=harvest,
    )
    assert (report.images, report.harvested, report.agreement, asked) == (0, 40, None, [])
    maps, found = fresh.read(np.arange(50))
    assert np.flatnonzero(found).tolist() == list(range(40))
    wanted = harvest.maps(np.arange(40))[0]
    np.testing.assert_array_equal(maps[:40], np.rint(255 * wanted).astype(np.uint8))
    assert (fresh.meta.method, fresh.meta.epoch, fresh.meta.part) == ("harvest", 3, 40)


def test_a_pass_over_a_share_and_the_harvest_of_the_rest(net, fresh, index):
    harvest, asked = harvested(net, index), []
    settings = {"epoch": 3, "layer": "features", "share": 0.2, "harvest": harvest}
    report = refresh_cache(net, fresh, index, loaders(index, asked), **settings)
    assert (report.images, report.harvested) == (10, 40)
    assert report.agreement == pytest.approx(1, abs=0.01)
    assert fresh.read(np.arange(50))[1].all()
    assert fresh.meta.method == "gradcam+harvest"
    # Other samples are seen in the next pass.
    refresh_cache(net, fresh, index, loaders(index, asked), **settings | {"epoch": 4})
    assert len(asked) == 2
    assert len({*asked[0]} & {*asked[1]}) < 10


def test_a_pass_with_a_harvest_that_breaks_goes_on_where_it_was(net, fresh, index):
    harvest, asked = harvested(net, index), []

    def breaking(ids):
        for k, batch in enumerate(loaders(index, asked, batch_size=4)(ids)):
            if k == 1:
                raise KeyboardInterrupt
            yield batch

    settings = {"epoch": 3, "layer": "features", "share": 0.2, "harvest": harvest}
    with pytest.raises(KeyboardInterrupt):
        refresh_cache(net, fresh, index, breaking, **settings)
    done = np.flatnonzero(fresh.stamps() == 3)
    assert done.tolist() == asked[0][:4]
    before = fresh.read(done)[0]
    report = refresh_cache(net, fresh, index, loaders(index, asked), **settings)
    assert (report.images, report.harvested) == (6, 40)
    assert asked[1] == asked[0][4:]
    np.testing.assert_array_equal(fresh.read(done)[0], before)
    assert refresh_cache(net, fresh, index, loaders(index, asked), **settings).images == 0


@contextmanager
def second_chunk_breaks(harvest):
    """Killed when the second chunk of its maps is about to be written."""
    calls = []

    def blended(ids, *old):
        calls.append(ids)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return type(harvest).blended(harvest, ids, *old)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harvest, "blended", blended)
        yield


def test_a_harvest_that_breaks_goes_on_with_what_is_not_written(net, fresh, index):
    harvest, asked = harvested(net, index), []
    whole = harvest.blended(np.arange(50), *fresh.read(np.arange(50)))
    settings = {"epoch": 3, "layer": "features", "share": 0.2, "harvest": harvest}
    settings["commit_every"] = 16
    with second_chunk_breaks(harvest), pytest.raises(KeyboardInterrupt):
        refresh_cache(net, fresh, index, loaders(index, asked), **settings)
    report = refresh_cache(net, fresh, index, loaders(index, asked), **settings)
    assert (report.images, report.harvested, len(asked)) == (0, 24, 1)
    rest = np.setdiff1d(np.arange(50), asked[0])
    np.testing.assert_array_equal(fresh.read(rest)[0], whole[rest])


def test_a_pass_whose_harvest_was_half_written_keeps_to_its_samples(net, fresh, index):
    """By then more maps are of this epoch than its share has, some of samples that were chosen and
    never harvested."""
    refresh_cache(net, fresh, index, loaders(index, []), epoch=1, layer="features")
    harvest, asked = harvested(net, index, slice(0, 25)), []
    settings = {"epoch": 3, "layer": "features", "share": 0.3, "harvest": harvest}
    settings["commit_every"] = 8
    with second_chunk_breaks(harvest), pytest.raises(KeyboardInterrupt):
        refresh_cache(net, fresh, index, loaders(index, asked), **settings)
    assert max(asked[0]) >= 25
    stamps = fresh.stamps()
    assert (stamps == 3).sum() > 15
    report = refresh_cache(net, fresh, index, loaders(index, asked), **settings)
    assert (report.images, len(asked)) == (0, 1)
    seen = np.union1d(asked[0], np.arange(25))
    np.testing.assert_array_equal(np.flatnonzero(fresh.stamps() == 3), seen)
    assert (fresh.stamps() >= 1).all()
    again = refresh_cache(net, fresh, index, loaders(index, asked), **settings)
    assert (again.images, again.harvested, len(asked)) == (0, 0, 1)


def test_neighbouring_classes_alone_take_no_pass(net, fresh, index):
    asked = []
    report = refresh_cache(
        net, fresh, index, loaders(index, asked), epoch=3, layer="features", share=0.0, neighbors=1
    )
    assert (report.images, report.harvested, asked) == (0, 0, [])
    assert (fresh.stamps() == -1).all()
    assert fresh.read_neighbors().shape == (index.num_classes, 1)
    assert (fresh.meta.epoch, fresh.meta.part, fresh.meta.method) == (3, 0, "gradcam")


def test_crops_are_counted_beyond_what_half_precision_holds(net):
    harvest = harvest_of(net, samples=1)
    state = harvest.state_dict()
    harvest.load_state_dict(state | {"counts": torch.full((1, *GRID), 5000.0)})
    see(net, harvest, batch_of(*pictures(1)))
    assert (harvest.state_dict()["counts"] == 5001).all()


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_a_share_without_a_harvest_is_of_some_samples(net, fresh, index, share):
    with pytest.raises(ValueError, match=rf"share must be in \(0, 1\], .* got {share}"):
        refresh_cache(net, fresh, index, loaders(index, []), epoch=3, layer="features", share=share)


def test_agreement_is_spearmans_over_the_cells_that_were_seen():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 20, (2, 30, 5, 5)).astype(float)
    counts = (rng.random((30, 5, 5)) < 0.7).astype(float)
    one[3] = 7  # constant
    found = agreement(one, other, counts)
    for k in range(30):
        known = counts[k] > 0
        if k != 3:
            wanted = spearmanr(one[k][known], other[k][known]).statistic
            assert found[k] == pytest.approx(wanted, abs=1e-12)
    assert np.isnan(found[3])


def test_a_batch_says_what_its_crops_were(index):
    """Of the pipeline of whole images: all of it, unflipped."""
    batch = next(iter(loaders(index, [])(range(8))))
    assert batch.windows.tolist() == [[0, 0, 1, 1]] * 8
    assert not batch.flips.any()


@pytest.mark.parametrize("kind", ["pad", "resized"])
def test_windows_and_flips_say_what_a_pixel_of_a_crop_shows(kind):
    """Of images whose pixels tell their own place, in shares of 255."""
    side, n = 32, 40
    ramp = np.linspace(0, 255, side).astype(np.uint8)
    pixels = np.zeros((n, side, side, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = ramp[:, None], ramp
    index = ImageIndex.from_arrays([str(i) for i in range(n)], np.arange(n) % 2)
    image = ImageConfig(
        size=side, val_resize=side, crop=CropConfig(kind=kind), mean=(0, 0, 0), std=(1, 1, 1)
    )
    stage = Stage(index, "none", epochs=1, batch_size=n, seed=3)
    order = Order(index.labels, batch_size=n, seed=3)
    pipeline = memory.train_pipeline(
        stage, ArrayImages(index, pixels), order, image, ExecConfig(batch_size=n, threads=1)
    )
    (batch,) = Loader(pipeline, files.OUTPUTS, index, drop_last=True, order=order)
    assert 5 < batch.flips.sum() < n - 5
    middle = (np.arange(side) + 0.5) / side
    for picture, (y, x, h, w), flip in zip(
        batch.images.numpy(), batch.windows.numpy(), batch.flips.tolist(), strict=True
    ):
        rows, columns = y + middle * h, x + (1 - middle if flip else middle) * w
        # Off the image's border, and off the crop's, where resizing has nothing to interpolate to.
        inside = np.ix_(
            *(
                (along > 0.1)
                & (along < 0.9)
                & (np.minimum(middle, 1 - middle) * share * side >= 0.5)
                for along, share in ((rows, h), (columns, w))
            )
        )
        wanted = 255 * (np.stack(np.meshgrid(rows, columns, indexing="ij")) * side - 0.5)
        wanted /= side - 1
        for channel in range(2):
            assert np.abs(picture[channel] - wanted[channel])[inside].max() < 3


MERGED = """
import torch
from torch import distributed
from passes import Net, batch_of, harvest_of, pictures, see
distributed.init_process_group("gloo")
rank = distributed.get_rank()
net = Net().eval()
images, labels = pictures(20)
harvest = harvest_of(net)
half = slice(0, 12) if rank == 0 else slice(8, 20)  # some are seen by both
see(net, harvest, batch_of(images[half], labels[half], torch.arange(20)[half]))
harvest.merge()
torch.save(harvest.state_dict(), {out!r} + f"/merged{{rank}}.pt")
if rank:
    harvest.clear()
harvest.merge()
torch.save(harvest.state_dict(), {out!r} + f"/again{{rank}}.pt")
distributed.barrier()
distributed.destroy_process_group()
"""


def test_two_ranks_bring_together_what_each_has_seen(net, tmp_path):
    in_two(MERGED.format(out=str(tmp_path)))
    images, labels = pictures(20)
    whole = harvest_of(net)
    for half in (slice(0, 12), slice(8, 20)):
        see(net, whole, batch_of(images[half], labels[half], torch.arange(20)[half]))
    for name in ("merged0", "merged1", "again0", "again1"):
        state = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        torch.testing.assert_close(state["sums"], whole.state_dict()["sums"])
        assert torch.equal(state["counts"], whole.state_dict()["counts"])
