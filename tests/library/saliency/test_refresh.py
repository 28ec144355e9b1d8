"""The saliency pass: what it writes, how it resumes, what it leaves alone."""

from functools import partial

import numpy as np
import pytest
import torch
from passes import Net, loaders
from torch import nn

from scae_dali.cache import SaliencyCache
from scae_dali.saliency import weights
from scae_dali.saliency.gradcam import GradCAM
from scae_dali.saliency.refresh import METHODS, refresh_cache
from scae_dali.saliency.scorecam import ScoreCAM
from scae_dali.saliency.weights import nearest_classes, weights_digest
from scae_dali.training.second_stage import ScaledLinear


def run(model, cache, index, asked, *, epoch=3, **keywords):
    return refresh_cache(
        model, cache, index, loaders(index, asked), epoch=epoch, layer="features", **keywords
    )


def test_every_sample_gets_the_map_of_its_own_label(fresh, index):
    model, asked, done = Net(), [], []
    before = weights_digest(model)
    report = run(model, fresh, index, asked, name="net", input_size=28, progress=done.append)
    assert report.images == sum(done) == len(index)
    assert asked == [list(range(50))]
    maps, found = fresh.read(np.arange(50))
    assert found.all()
    cam = GradCAM(model, "features")
    for batch in loaders(index, [])(range(50)):
        wanted = (cam(batch.images, batch.labels) * 255).round().numpy()
        assert np.abs(maps[batch.ids.numpy()] - wanted).max() <= 1
    meta = fresh.meta
    assert (meta.epoch, meta.model, meta.layer, meta.input_size) == (3, "net", "features", 28)
    assert meta.under_way is None
    assert weights_digest(model) == before
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_complete_pass_is_not_made_twice_and_other_weights_make_a_new_one(fresh, index):
    model, asked = Net(), []
    run(model, fresh, index, asked)
    assert run(model, fresh, index, asked).images == 0
    with torch.no_grad():
        model.head.weight.mul_(-1)
    assert run(model, fresh, index, asked).images == 50
    assert run(model, fresh, index, asked, epoch=4).images == 50
    assert len(asked) == 3


def test_a_pass_that_breaks_goes_on_where_it_was(fresh, index):
    model, asked = Net(), []

    def breaking(ids):
        for k, batch in enumerate(loaders(index, asked)(ids)):
            if k == 2:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        refresh_cache(model, fresh, index, breaking, epoch=3, layer="features", commit_every=16)
    assert fresh.meta.under_way is not None
    assert fresh.meta.epoch is None
    assert run(model, fresh, index, asked).images == 50 - 32
    assert asked[1] == list(range(32, 50))
    assert (fresh.stamps() == 3).all()


def test_a_batch_is_handed_on_when_the_next_is_queued(fresh, index):
    happened = []

    class Blank:
        method, layer = "blank", "features"

        def __init__(self, model, layer):
            self.model = model

        def __call__(self, images, labels):
            happened.append(labels.tolist())
            return torch.eye(7).repeat(len(images), 1, 1)

    run(Net(), fresh, index, [], method=Blank, progress=happened.append)
    labels = [index.labels[i : i + 16].tolist() for i in range(0, 50, 16)]
    assert happened == [labels[0], labels[1], 16, labels[2], 16, labels[3], 16, 2]


def test_the_pass_is_of_the_method_it_is_told(fresh, index):
    model = Net()
    for epoch, method in enumerate(["scorecam", partial(ScoreCAM, chunk=5)]):
        assert run(model, fresh, index, [], epoch=epoch, method=method).images == 50
        assert fresh.meta.method == "scorecam"
        maps, found = fresh.read(np.arange(50))
        assert found.all()
        for batch in loaders(index, [])(range(50)):
            wanted = (ScoreCAM(model, "features")(batch.images, batch.labels) * 255).round().numpy()
            assert np.abs(maps[batch.ids.numpy()] - wanted).max() <= 1
    assert run(model, fresh, index, [], epoch=2).images == 50
    assert fresh.meta.method == "gradcam"
    assert (fresh.read(np.arange(50))[0] != maps).any()
    assert {name: cam.method for name, cam in METHODS.items()} == {name: name for name in METHODS}


@pytest.mark.parametrize("complete", [False, True])
def test_a_pass_is_not_taken_for_that_of_another_method(fresh, index, complete):
    model, asked = Net(), []

    def breaking(ids):
        for k, batch in enumerate(loaders(index, [])(ids)):
            if k == 2:
                raise KeyboardInterrupt
            yield batch

    if complete:
        run(model, fresh, index, [])
    else:
        with pytest.raises(KeyboardInterrupt):
            refresh_cache(model, fresh, index, breaking, epoch=3, layer="features")
    assert (fresh.stamps() == 3).sum() == (50 if complete else 32)
    assert run(model, fresh, index, asked, method="scorecam").images == 50
    assert asked == [list(range(50))]
    assert run(model, fresh, index, asked, method="scorecam").images == 0
    assert run(model, fresh, index, asked).images == 50


def test_an_unknown_method_is_named_before_anything_is_touched(fresh, index):
    with pytest.raises(
        ValueError,
        match=r"method must be one of gradcam, scorecam, or pytorch_grad_cam:NA.*; got 'gradcan'",
    ):
        run(Net(), fresh, index, [], method="gradcan")
    assert fresh.meta.under_way is None


def test_path_named_caches_are_filled_in_key_order(index, tmp_path):
    cache = SaliencyCache.create(tmp_path / "maps.lmdb", index, grid=(7, 7), naming="path")
    asked = []
    run(Net(), cache, index, asked)
    assert asked == [np.argsort(index.keys("path")).tolist()]
    assert cache.read(np.arange(50))[1].all()


# Weights of five classes by direction and length, and of one that has none.
ANGLES, LENGTHS = np.radians([0, 10, 180, 25, 80, 0]), np.array([1, 50, 3, 0.1, 2, 0])
WEIGHT = torch.from_numpy(np.stack([LENGTHS * np.cos(ANGLES), LENGTHS * np.sin(ANGLES)], axis=1))


def test_the_nearest_classes_are_those_of_the_smallest_angle():
    counts = np.full(6, 7)
    table = nearest_classes(WEIGHT[:5], counts[:5], 2)
    assert table.dtype == np.uint16
    assert table.tolist() == [[1, 3], [0, 3], [4, 3], [1, 0], [3, 1]]
    whole = nearest_classes(WEIGHT[:5], counts[:5], 4)
    assert whole.tolist() == [[1, 3, 4, 2], [0, 3, 4, 2], [4, 3, 1, 0], [1, 0, 4, 2], [3, 1, 0, 2]]
    assert nearest_classes(WEIGHT[:5], counts[:5], 9).tolist() == whole.tolist()
    # The cosine of nothing with anything is 0, which is between.
    assert nearest_classes(WEIGHT, counts, 4)[0].tolist()[:2] == [1, 3]
    assert nearest_classes(WEIGHT, counts, 5)[0].tolist()[-1] == 2


@pytest.mark.parametrize("at_once", [1, 23, 46, 10**6])
def test_neighbours_are_found_in_blocks(monkeypatch, at_once):
    monkeypatch.setattr(weights, "_BLOCK", at_once)
    random = np.random.default_rng(0)
    vectors, counts = random.normal(size=(23, 7)), random.integers(0, 2, 23)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = np.where(counts == 0, -2, unit @ unit.T)
    np.fill_diagonal(cosine, -3)
    filled = np.count_nonzero(counts) - 1  # order among empty classes does not matter
    near = nearest_classes(torch.from_numpy(vectors), counts, 22)
    np.testing.assert_array_equal(near[:, :filled], np.argsort(-cosine, axis=1)[:, :filled])


def test_a_class_without_samples_is_the_last_neighbour():
    counts = np.array([5, 0, 5, 5, 0, 0])
    near = nearest_classes(WEIGHT, counts, 2).tolist()
    assert near[:5] == [[3, 2], [0, 3], [3, 0], [0, 2], [3, 0]]
    for row in nearest_classes(WEIGHT, counts, 5).tolist():
        present = [bool(counts[k]) for k in row]
        assert present == sorted(present, reverse=True)
        assert len(set(row)) == 5


def test_there_are_never_more_neighbours_than_other_classes():
    counts = np.full(6, 7)
    for m in (5, 6, 99):
        table = nearest_classes(WEIGHT.half(), counts, m).tolist()
        assert [sorted([k, *row]) for k, row in enumerate(table)] == [list(range(6))] * 6
    assert nearest_classes(WEIGHT[:1], counts[:1], 3).shape == (1, 0)


def test_a_pass_writes_the_neighbours_before_it_counts_as_complete(fresh, index, monkeypatch):
    model, written = Net(), []
    end_pass = fresh.end_pass

    def end(epoch):
        written.append((fresh.read_neighbors(), fresh.meta.epoch))
        end_pass(epoch)

    monkeypatch.setattr(fresh, "end_pass", end)
    run(model, fresh, index, [], neighbors=2)
    ((table, epoch),) = written
    assert epoch is None
    unit = nn.functional.normalize(model.head.weight.detach(), dim=1)
    similarity = (unit @ unit.T - 9 * torch.eye(3)).numpy()
    assert table.tolist() == np.argsort(-similarity, axis=1)[:, :2].tolist()
    assert fresh.read_neighbors().tolist() == table.tolist()


def test_neighbours_follow_the_weights_and_are_not_written_unless_wanted(fresh, index):
    model = Net()
    run(model, fresh, index, [])
    assert fresh.read_neighbors() is None
    weights = [[[1, 0], [1, 0.1], [0, 1]], [[1, 0], [0, 1], [1, 0.1]]]
    for epoch, (weight, nearest) in enumerate(zip(weights, ([1, 0, 1], [2, 2, 0]), strict=True), 4):
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.weight[:, :2] = torch.tensor(weight)
        run(model, fresh, index, [], epoch=epoch, neighbors=1)
        assert fresh.read_neighbors().tolist() == [[k] for k in nearest]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_classifier_that_diverged_has_no_neighbours(fresh, index, value):
    model = Net()
    with torch.no_grad():
        model.head.weight[1, 0] = value
    with pytest.raises(ValueError, match="model must have finite weights in its classifier"):
        run(model, fresh, index, [], neighbors=1)
    assert fresh.meta.under_way is None


def test_neighbours_alone_leave_the_maps(fresh, index):
    model = Net()
    run(model, fresh, index, [])
    maps, _ = fresh.read(np.arange(50))
    for wanted in (model, Net().double()):  # other weights too
        assert run(wanted, fresh, index, [], share=0.0, neighbors=1).images == 0
        np.testing.assert_array_equal(fresh.read(np.arange(50))[0], maps)
    assert fresh.read_neighbors().shape == (3, 1)


@pytest.mark.parametrize("wrapped", [nn.DataParallel, torch.compile])
def test_a_wrapper_changes_neither_the_weights_nor_the_name(fresh, index, wrapped):
    model, asked = Net(), []
    run(model, fresh, index, [])
    assert run(wrapped(model), fresh, index, asked).images == 0
    assert fresh.meta.model == "Net"


def test_neighbours_of_a_second_stages_classifier(fresh, index):
    """LWS and MiSLAS: a factor a class does not turn the weights."""
    plain = Net()
    scaled = Net()
    scaled.head = ScaledLinear(scaled.head)
    with torch.no_grad():
        scaled.head.scale.copy_(torch.tensor([0.1, 3.0, 7.0]))
    tables = []
    for epoch, model in enumerate((plain, scaled), 1):
        run(model, fresh, index, [], epoch=epoch, neighbors=2)
        tables.append(fresh.read_neighbors().tolist())
    assert tables[0] == tables[1]


def test_a_network_without_a_linear_classifier_has_no_neighbours(fresh, index):
    class Convolutional(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Conv2d(3, 8, 3, 4, 1)
            self.head = nn.Conv2d(8, 3, 1)

        def forward(self, images):
            return self.head(self.features(images)).mean((2, 3))

    asked = []
    with pytest.raises(
        ValueError, match=r"must have a linear classifier of 3 outputs; .* of Convolutional, .*none"
    ):
        run(Convolutional(), fresh, index, asked, neighbors=1)
    assert asked == []  # told before the pass, not after it
    assert fresh.meta.under_way is None
    assert run(Convolutional(), fresh, index, asked).images == 50


def test_the_digest_sees_parameters_and_buffers():
    model = Net()
    first = weights_digest(model)
    model.features[1].running_mean += 1
    second = weights_digest(model)
    model.half()
    assert len({first, second, weights_digest(model)}) == 3
    assert weights_digest(Net()) == first
