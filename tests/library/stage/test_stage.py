"""The stage inside pipelines: purity, epochs in spite of prefetch, resume, pixels."""

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types
from scipy import stats
from timm.data.random_erasing import RandomErasing as TimmErasing
from torch.utils import dlpack

from pipelines import files
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.checks import IMAGENET_MEAN, IMAGENET_STD
from scae_dali.methods import BUILT_IN
from scae_dali.plan import crop
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.random import Stream, uniforms
from scae_dali.stage import lookup
from scae_dali.stage.loader import Loader
from scae_dali.stage.stage import Stage

IMAGE = ImageConfig(size=48, val_resize=48)
EPOCHS = 4
CIFAR100 = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)  # mean and std of the training images


def stage(index, cache, batch_size, name="scae", **keywords):
    keywords = {"epochs": EPOCHS, "seed": 11, "cache": cache} | keywords
    return Stage(index, name, batch_size=batch_size, **keywords)


def loader(one, index, *, shard=0, num_shards=1, state=None, position=0, image=IMAGE):
    run = ExecConfig(batch_size=one.batch_size, threads=2, shard=shard, num_shards=num_shards)
    pipeline = files.train_pipeline(one, image, run, seed=11, checkpoint=state)
    return Loader(pipeline, files.OUTPUTS, index, drop_last=False, position=position)


def records(batches):
    """id -> everything that was decided for it, and a sum over its pixels."""
    out = {}
    for batch in batches:
        rows = zip(
            batch.ids.tolist(),
            batch.boxes.tolist(),
            batch.status.tolist(),
            batch.labels.tolist(),
            batch.images.sum((1, 2, 3)).tolist(),
            strict=True,
        )
        out |= {row[0]: row[1:] for row in rows}
    return out


def epochs(one, index, n=EPOCHS, **keywords):
    batches = loader(one, index, **keywords)
    return [records(batches) for _ in range(n)]


@pytest.fixture(scope="module")
def reference(index, cache):
    return epochs(stage(index, cache, 16), index)


def test_a_sample_is_augmented_alike_whatever_the_batch_size(index, cache, reference):
    """50 samples in batches of 16 and of 20: other batches, other prefetching, same pictures."""
    assert [sorted(e) for e in reference] == [list(range(50))] * EPOCHS
    assert epochs(stage(index, cache, 20), index) == reference


def test_and_whatever_the_number_of_shards(index, cache, reference):
    shards = [
        epochs(stage(index, cache, 16, num_shards=2), index, shard=shard, num_shards=2)
        for shard in (0, 1)
    ]
    assert [a | b for a, b in zip(*shards, strict=True)] == reference
    assert not any(set(a) & set(b) for a, b in zip(*shards, strict=True))


@pytest.mark.parametrize(
    "how", [{"backend": "torch"}, {"backend": "numpy"}, {"resident": False}, {"resident": True}]
)
def test_and_by_any_backend_and_wherever_the_maps_are(index, cache, reference, how):
    assert epochs(stage(index, cache, 16, **how), index) == reference


@pytest.mark.parametrize("name", [*BUILT_IN, "rand_augment+scae", "scae+mixup"])
def test_both_operators_give_the_same_rows(index, cache, name):
    ids = np.random.default_rng(0).permutation(50)
    settings = {"scae": {"mix_prob": 0.0}} if "scae+" in name else {}
    if name == "cmo":
        settings = {"skip_first": 0, "skip_last": 0}
    given = []
    for backend in ("python", "torch"):
        one = stage(index, cache, 10, name, backend=backend, **settings)
        given.append(one.operator(one.planner(CropConfig()), frames=1, size=(48, 48)))
    by_python, by_torch = given
    told = set()
    for step, batch in enumerate(ids.reshape(5, 10)):
        arrays = (
            [np.array([i], np.int32) for i in batch],
            [np.array([15 + step])] * 10,  # of the last epoch
            [np.array([60 + i, 70, 3]) for i in batch],
        )
        wanted = by_python.python(*arrays)
        capsules = ([dlpack.to_dlpack(torch.from_numpy(a)) for a in part] for part in arrays)
        for mine, other in zip(wanted, by_torch.torch(*capsules), strict=True):
            other = [dlpack.from_dlpack(row).numpy() for row in other]
            assert {row.dtype for row in mine} == {row.dtype for row in other}
            np.testing.assert_array_equal(np.stack(mine), np.stack(other))
        status = by_python.planner.columns["status"].start
        told |= {row[status] for row in wanted[0]}
    assert any(told) or name in ("none", "rand_augment", "auto_augment", "trivial_augment")


def test_maps_are_kept_in_memory_where_they_are_small(index, cache, monkeypatch):
    def lookups(**how):
        """Samples that are looked up in LMDB."""
        seen = []

        def read(ids):
            seen.extend(ids)
            return type(cache).read(cache, ids)

        monkeypatch.setattr(cache, "read", read)
        one = stage(index, cache, 50, p_min=1.0, p_max=1.0, **how)
        one.planner()(np.arange(50), np.full(50, 3), np.full((50, 2), 48))
        return len(seen)

    assert lookups() == 0 < lookups(resident=False)
    monkeypatch.setattr(lookup, "RESIDENT_BYTES", 50 * 49)
    assert lookups() == 0
    monkeypatch.setattr(lookup, "RESIDENT_BYTES", 50 * 49 - 1)
    assert lookups() == 50
    assert lookups(resident=True) == 0


def test_and_with_a_full_decode(index, cache, reference):
    """Decoding all of an image before its crop: the same boxes, nearly the same pixels."""
    image = ImageConfig(size=48, val_resize=48, decode="full")
    full = epochs(stage(index, cache, 16), index, image=image)
    for mine, other in zip(full, reference, strict=True):
        assert {k: v[:3] for k, v in mine.items()} == {k: v[:3] for k, v in other.items()}
        sums = np.array([[mine[k][3], other[k][3]] for k in mine]) / (3 * 48 * 48)
        assert np.abs(sums[:, 0] - sums[:, 1]).max() < 0.02


def test_another_seed_gives_other_boxes(index, cache, reference):
    other = epochs(stage(index, cache, 16, seed=12), index)
    assert all(a != b for a, b in zip(other, reference, strict=True))


@pytest.mark.parametrize("position", [0, 1, 3, 4, 6])
def test_a_resume_goes_on_with_the_same_plans(index, cache, reference, position):
    """Saved after some batches (4 to an epoch; 4 is an epoch's end), restored, run to the end."""
    first = loader(stage(index, cache, 16), index)
    for k in range(position // 4):
        assert records(first) == reference[k]
    seen = {}
    epoch, within = divmod(position, 4)
    batches = iter(first)
    for _ in range(within):
        seen |= records([next(batches)])
    state = first.state()
    again = loader(stage(index, cache, 16), index, state=state, position=within)
    rest = records(again)
    assert not set(seen) & set(rest)
    assert seen | rest == reference[epoch]
    assert records(again) == reference[epoch + 1]


def test_the_epoch_of_a_plan_is_right_at_borders_in_spite_of_prefetch(index, cache):
    """Boxes of each epoch equal the plan that is made for that epoch outside any pipeline."""
    one = stage(index, cache, 16)
    ids = np.arange(len(index))
    for epoch, seen in enumerate(epochs(one, index)):
        shapes = upright_shapes(index)
        iteration = np.full(len(ids), epoch * one.batches_per_epoch + one.batches_per_epoch - 1)
        planner = one.planner(CropConfig())
        rows = planner(ids, iteration, np.full((50, 2), 48), shapes)
        assert [seen[i][0] for i in ids] == rows[:, planner.columns["box"]].tolist()
        assert [[seen[i][1]] for i in ids] == rows[:, planner.columns["status"]].tolist()


def test_a_crop_is_drawn_from_its_stream(index):
    config, ids = CropConfig(area=(0.5, 1.0)), np.arange(50)
    shapes = np.tile([[60, 110]], (50, 1))
    planner = stage(index, None, 50, name="none").planner(config)
    rows = planner(ids, np.zeros(50, np.int64), np.full((50, 2), 48), shapes.astype(float))
    u = uniforms(11, Stream.CROP, 0, ids, crop.draws_per_sample(config))
    window, flip = crop.crop_and_flip(u, shapes, config)
    start, shape = (rows[:, planner.columns[name]] for name in ("start", "shape"))
    np.testing.assert_array_equal(np.concatenate([start, shape], axis=1), window)
    np.testing.assert_array_equal(rows[:, planner.columns["flip"].start], flip)


def upright_shapes(index):
    @pipeline_def(batch_size=len(index), num_threads=1, device_id=None)
    def define():
        encoded, _ = fn.readers.file(files=list(index.files), file_root=index.root)
        return fn.peek_image_shape(encoded)

    (shapes,) = define().run()
    return shapes.as_array()[:, :2].astype(np.float64)


def test_labels_partners_and_weights_leave_the_pipeline(index, cache):
    for batch in loader(stage(index, cache, 16), index):
        assert (batch.labels.numpy() == index.labels[batch.ids.numpy()]).all()
        assert (batch.partners == batch.labels).all()
        assert (batch.mu == 1).all()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("scae", {"p_min": 1.0, "p_max": 1.0}),
        ("random_erasing", {"prob": 1.0}),
        ("cutout", {"length": 16}),
    ],
)
@pytest.mark.parametrize("fill", ["mean", "zero", "color", "noise", "above_mean"])
def test_exactly_the_box_is_filled(index, cache, name, settings, fill):
    """Against the pipeline without erasing: pixels differ inside the box and nowhere else."""
    one = stage(index, cache, 50, name, fill=fill, **settings)
    (plain,) = loader(stage(index, cache, 50, "none"), index)
    (erased,) = loader(one, index)
    assert (plain.ids == erased.ids).all()
    assert (erased.boxes[:, 2:] > 0).all()
    std = np.array(IMAGE.std)[:, None, None]
    planner = one.planner(CropConfig())
    shapes = upright_shapes(index)[erased.ids.numpy()]
    rows = planner(erased.ids.numpy(), np.zeros(50, np.int64), np.full((50, 2), 48), shapes)
    flips = rows[:, planner.columns["flip"]]
    for before, after, box, flip in zip(
        plain.images.numpy(), erased.images.numpy(), erased.boxes.numpy(), flips, strict=True
    ):
        y, x, h, w = box.astype(int)
        mask = np.zeros((48, 48), bool)
        mask[y : y + h, x : x + w] = True
        if flip:
            before, after = before[:, :, ::-1], after[:, :, ::-1]
        np.testing.assert_array_equal(before[:, ~mask], after[:, ~mask])
        inside = after[:, mask] * std[:, 0]
        if fill == "mean":
            assert np.abs(inside).max() <= 0.51  # grey levels: the mean is rounded to bytes
        elif fill == "zero":
            np.testing.assert_allclose(
                inside.T, np.tile(-np.array(IMAGENET_MEAN), (h * w, 1)), atol=0.01
            )
        elif fill == "above_mean":  # which the authors write, of these normalised images
            authors = np.tile([0.4914, 0.4822, 0.4465], (h * w, 1))
            np.testing.assert_allclose(after[:, mask].T, authors, atol=0.51 / min(IMAGE.std))
        elif fill == "color":
            assert (inside == inside[:, :1]).all()
        elif h * w > 50:
            # Less than 1 by what is clipped; the standard error of a deviation is σ/√(2n).
            assert abs(after[:, mask].std() - 0.98) < 4 / np.sqrt(2 * 3 * h * w)


@pytest.mark.parametrize("fill", ["mean", "zero", "color", "noise", "above_mean"])
@pytest.mark.parametrize("name", ["scae", "random_erasing", "cutout", "grid_mask"])
def test_a_pipeline_with_conditionals_fills_alike(index, cache, name, fill):
    """As any pipeline with a policy or with CMO is; DALI then rewrites the functions of a graph."""
    settings = {"scae": {"mix_prob": 0.0, "p_min": 0.9, "p_max": 1.0}, "grid_mask": {"d_min": 12,
                "d_max": 24}}.get(name, {})  # fmt: skip
    plain, rewritten = (stage(index, cache, 25, name, fill=fill, **settings) for _ in range(2))
    assert not plain.conditional
    rewritten.conditional = True
    for one, other in zip(loader(plain, index), loader(rewritten, index), strict=True):
        np.testing.assert_array_equal(one.images.numpy(), other.images.numpy())


def follows_the_noise_law(levels, mean, std):
    """Whether grey levels, uint8 [n], are N(mean, std), rounded and clipped to [0, 255]."""
    borders = stats.norm.cdf(np.arange(255) + 0.5, mean, std)
    law, n = np.diff(np.concatenate([[0.0], borders, [1.0]])), len(levels)
    grey, seen = np.arange(256), np.bincount(levels, minlength=256)
    # The law's mean as well: by chi-square, half a grey level would need millions of pixels.
    error = np.sqrt((grey**2 @ law - (grey @ law) ** 2) / n)
    near = abs(levels.mean() - grey @ law) < 3.5 * error
    return near and stats.chisquare(seen, n * law).pvalue > 1e-4


def rounded(values):
    return np.rint(values).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), CIFAR100])
def test_noise_is_timms_rounded_and_clipped_to_bytes(index, mean, std):
    """timm fills normalised images with N(0, 1), of any value; here they are bytes still."""
    size = (200, 200)
    settings = {"fill": "noise", "prob": 1.0, "area": (0.8, 0.8), "aspect": (1.0, 1.0)}
    one = stage(index, None, 20, "random_erasing", mean=mean, std=std, **settings)

    @pipeline_def(batch_size=20, num_threads=1, device_id=None)
    def define():
        encoded, ids = fn.readers.file(
            files=list(index.files), file_root=index.root, pad_last_batch=True
        )
        images = fn.resize(fn.decoders.image(encoded), size=size)
        plan = one.plan(ids, size=size)
        return one.apply(images, plan), plan.part("box", types.INT32)

    images, boxes = (out.as_array() for out in define().run())
    cut = [i[y : y + h, x : x + w] for i, (y, x, h, w) in zip(images, boxes, strict=True)]
    noise = np.stack(cut).reshape(-1, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        erase = TimmErasing(1.0, 0.9, 0.9, min_aspect=1.0, mode="pixel", device="cpu")
        normal = erase(torch.zeros(3, 1000, 1000)).flatten(1).double().numpy()
    normal = normal[:, (normal != 0).all(axis=0)].T * std + mean
    assert min(len(noise), len(normal)) > 600_000
    for c in range(3):
        law = mean[c], std[c]
        assert follows_the_noise_law(noise[:, c], *law)
        assert follows_the_noise_law(rounded(normal[:, c]), *law)
        truncated = normal[:, c].clip(0, 255).astype(np.uint8)
        wrapped = np.rint(normal[:, c]).astype(np.int64).astype(np.uint8)
        narrower = rounded(mean[c] + 0.97 * (normal[:, c] - mean[c]))
        for other in (truncated, wrapped, narrower, noise[:, c - 1]):
            assert not follows_the_noise_law(other, *law)
    assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.01


def test_normalised_images_are_filled_as_by_the_authors(index):
    """Their RandomErasing writes these numbers after the normalisation."""
    settings = {"prob": 1.0, "fill": "above_mean", "mean": (0.0,) * 3, "std": (1.0,) * 3}
    one = stage(index, None, 20, "random_erasing", **settings)

    @pipeline_def(batch_size=20, num_threads=1, device_id=None)
    def define():
        encoded, ids = fn.readers.file(
            files=list(index.files), file_root=index.root, pad_last_batch=True
        )
        images = fn.resize(fn.decoders.image(encoded), size=(40, 40))
        images = fn.crop_mirror_normalize(images, mean=100.0, std=50.0, output_layout="HWC")
        plan = one.plan(ids, size=(40, 40))
        return one.apply(images, plan), plan.part("box", types.INT32)

    for image, (y, x, h, w) in zip(*(out.as_array() for out in define().run()), strict=True):
        wanted = np.broadcast_to(np.float32([0.4914, 0.4822, 0.4465]), (h, w, 3))
        np.testing.assert_array_equal(image[y : y + h, x : x + w], wanted)


def test_colours_differ_between_images(index, cache):
    one = stage(index, cache, 50, fill="color", p_min=1.0, p_max=1.0)
    planner = one.planner()
    rows = planner(np.arange(50), np.zeros(50, np.int64), np.full((50, 2), 48))
    colours = rows[:, planner.columns["color"]]
    assert len(np.unique(colours, axis=0)) == 50
    assert colours.min() < 20
    assert colours.max() > 235


def test_arguments_are_checked(index, cache, tmp_path):
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        Stage(index, "none", epochs=0, batch_size=2, seed=0)
    with pytest.raises(ValueError, match="backend must be python or torch, got 'jax'"):
        Stage(index, "none", epochs=1, batch_size=2, seed=0, backend="jax")
    with pytest.raises(ValueError, match="torch_device must be cpu, got 'cuda:0': the plan runs"):
        Stage(index, "none", epochs=1, batch_size=2, seed=0, backend="torch", torch_device="cuda:0")
    Stage(index, "none", epochs=1, batch_size=2, seed=0, backend="torch", torch_device="cpu")
    with pytest.raises(TypeError, match="seed"):
        Stage(index, "none", epochs=1, batch_size=2)
    for name, settings in (("scae", {"refresh_every": 0}), ("cutmix", {})):
        with pytest.raises(ValueError, match="no saliency cache"):
            stage(index, tmp_path / "absent.lmdb", 2, name, **settings)
    for name, value in (("epoch_size", 0), ("start_epoch", -1)):
        with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
            Stage(index, "none", epochs=1, batch_size=2, seed=0, **{name: value})
    for seed in (-1, 1 << 64):
        with pytest.raises(ValueError, match=rf"seed must be in \[0, 2\*\*64\), got {seed}"):
            Stage(index, "none", epochs=1, batch_size=2, seed=seed)
    normalised = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    with pytest.raises(ValueError, match="mean must be in grey levels where fill is color"):
        stage(index, cache, 16, fill="color", **normalised)
    stage(index, cache, 16, fill="color", mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0))
    one = stage(index, cache, 16)
    with pytest.raises(ValueError, match="batch_size of the stage is 16, of the pipeline 8"):
        files.train_pipeline(one, IMAGE, ExecConfig(batch_size=8), seed=0)
    with pytest.raises(IndexError, match=r"ids must be in \[0, 50\).*got 50"):
        one.planner()(np.array([50]), np.array([0]), np.array([[48, 48]]))

    @pipeline_def(batch_size=16, num_threads=1, device_id=None)
    def define():
        encoded, ids = fn.readers.file(files=list(index.files), file_root=index.root)
        start, size = fn.random_crop_generator(fn.peek_image_shape(encoded), seed=1)
        return one(fn.decoders.image(encoded), ids, window=(start, size))[0]

    with pytest.raises(ValueError, match=r"window must be \(start, size, shapes\), got 2"):
        define()
    with pytest.raises(ValueError, match="window is a crop that was drawn elsewhere"):
        one.plan(None, size=(8, 8), window=(1, 2, 3), shapes=3, random_crop=CropConfig())
