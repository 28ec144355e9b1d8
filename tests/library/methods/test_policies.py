"""RandAugment, TrivialAugment and AutoAugment: the laws of their plans, and the pixels of DALI's
own operations."""

import itertools
import warnings
from collections import Counter

import numpy as np
import pytest
from crops import (
    H,
    N,
    W,
    smooth,
    transformed,
)
from nvidia.dali import fn, pipeline_def
from nvidia.dali.auto_aug import augmentations as a
from nvidia.dali.auto_aug import auto_augment as policies
from PIL import Image, ImageEnhance, ImageOps
from plans import check_pure, method, samples
from scipy import stats
from torchvision.transforms import autoaugment as torchvisions

from pipelines import files, memory
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.data.pixels import ArrayImages
from scae_dali.methods import load
from scae_dali.methods.auto_augment import cifar10_policy
from scae_dali.methods.policy import deprecations_hidden
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.order import Order
from scae_dali.stage.loader import Loader
from scae_dali.stage.stage import Stage

LEARNED = ("image_net", "reduced_image_net", "reduced_cifar10", "svhn", "cifar10")
EVERY = [
    ("rand_augment", {}),
    ("rand_augment", {"n": 3, "m": 20, "max_translate_rel": None, "fill_value": 7}),
    ("trivial_augment", {}),
    ("trivial_augment", {"max_translate_rel": 0.8, "bins": 5}),
    *(("auto_augment", {"policy": policy}) for policy in LEARNED),
]
# Of the papers and of DALI, in its order.
SUITE = [
    *("translate_x", "translate_y", "shear_x", "shear_y", "rotate", "brightness", "contrast"),
    *("color", "sharpness", "posterize", "solarize", "equalize", "auto_contrast", "identity"),
]


def whole(column, values):
    """A column of a plan as whole numbers in [0, values)."""
    assert column.dtype == np.float64
    assert set(column) <= set(range(values))
    return column.astype(int)


def test_rand_augment_draws_operations_and_signs_uniformly_and_on_their_own():
    one, n = method("rand_augment"), 80_000
    assert [[op.name for op in level] for level in one.levels] == [SUITE, SUITE]
    plan = one.plan(samples(n))
    op0, op1 = (whole(plan[f"op{k}"], 14) for k in (0, 1))
    sign0, sign1 = (whole(plan[f"sign{k}"], 2) for k in (0, 1))
    joint = np.zeros((14, 2, 14, 2))
    np.add.at(joint, (op0, sign0, op1, sign1), 1)
    assert stats.chisquare(joint.ravel()).pvalue > 1e-3
    assert (joint.sum((1, 3)) > 0).all()
    assert set(plan["status"]) == {0}
    assert one.fields.keys() == plan.keys() - {"status"}  # the magnitude is the same for all


def test_trivial_augment_reaches_every_operation_at_every_magnitude():
    one, n = method("trivial_augment"), 80_000
    assert [[op.name for op in level] for level in one.levels] == [SUITE]
    plan = one.plan(samples(n))
    joint = np.zeros((14, 31, 2))
    np.add.at(joint, (whole(plan["op0"], 14), whole(plan["bin0"], 31), whole(plan["sign0"], 2)), 1)
    assert (joint > 0).all()
    assert stats.chisquare(joint.ravel()).pvalue > 1e-3


def test_operations_of_neighbouring_samples_and_epochs_hang_on_nothing():
    one = method("trivial_augment")
    ops = np.stack([one.plan(samples(8000, epoch=t))["op0"] for t in range(3)]).astype(int)
    for x, y in ((ops[:, 1:], ops[:, :-1]), (ops[1:], ops[:-1])):
        joint = np.zeros((14, 14))
        np.add.at(joint, (x, y), 1)
        assert stats.chisquare(joint.ravel()).pvalue > 1e-3


def outcomes(sub_policy):
    """What a sub-policy may do, and how likely: ((name, bin) or None for each level) -> float."""
    what = Counter()
    for applied in itertools.product((True, False), repeat=len(sub_policy)):
        prob, done = 1.0, []
        for yes, (op, p, magnitude) in zip(applied, sub_policy, strict=True):
            prob *= p if yes else 1 - p
            done.append((op.name, magnitude or 0) if yes else None)
        what[tuple([*done, None][:2])] += prob
    return what


@pytest.mark.parametrize("name", LEARNED)
def test_auto_augment_draws_sub_policies_and_applies_each_operation_at_its_rate(name):
    sub_policies = getattr(policies, f"get_{name}_policy", cifar10_policy)().sub_policies
    assert len(sub_policies) == 25
    expected = Counter()
    for sub_policy in sub_policies:
        for what, prob in outcomes(sub_policy).items():
            expected[what] += prob / 25
    one, n = method("auto_augment", policy=name), 80_000
    assert [level[-1] for level in one.levels] == [a.identity] * 2
    plan, done = one.plan(samples(n)), []
    for k, level in enumerate(one.levels):
        op, magnitude = whole(plan[f"op{k}"], len(level)), whole(plan[f"bin{k}"], 11)
        names = [operation.name for operation in level[:-1]]
        done.append(
            [
                None if o == len(names) else (names[o], m)
                for o, m in zip(op.tolist(), magnitude.tolist(), strict=True)
            ]
        )
    seen = Counter(zip(*done, strict=True))
    assert seen.keys() == {what for what, prob in expected.items() if prob > 0}
    both = np.array([[seen[what], n * expected[what]] for what in seen])
    assert both[:, 1].min() > 5
    assert stats.chisquare(*both.T).pvalue > 1e-3
    signs = np.stack([whole(plan[f"sign{k}"], 2) for k in (0, 1)])
    assert stats.chisquare(np.bincount(signs[0] * 2 + signs[1])).pvalue > 1e-3
    rotated = signs[0][np.array([o is not None for o in done[0]])]
    assert rotated.mean() == pytest.approx(0.5, abs=0.02)


# Of the paper's appendix: what the images of CIFAR-10 are transformed by.
CIFAR10_SUBS = """
invert .1 contrast .2 6          rotate .7 2 translate_x .3 9     sharpness .8 1 sharpness .9 3
shear_y .5 8 translate_y .7 9    auto_contrast .5 equalize .9     shear_y .2 7 posterize .3 7
color .4 3 brightness .6 7       sharpness .3 9 brightness .7 9   equalize .6 equalize .5
contrast .6 7 sharpness .6 5     color .7 7 translate_x .5 8      equalize .3 auto_contrast .4
translate_y .4 3 sharpness .2 6  brightness .9 6 color .2 8       solarize .5 2
equalize .2 auto_contrast .6     equalize .2 equalize .6          color .9 9 equalize .6
auto_contrast .8 solarize .2 8   brightness .1 3 color .7 0       solarize .4 5 auto_contrast .9
translate_y .9 9 translate_y .7 9  auto_contrast .9 solarize .8 3  equalize .8 invert .1
translate_y .7 9 auto_contrast .9
"""


def written(sub_policy):
    """A sub-policy as above."""
    words = []
    for op, prob, magnitude in sub_policy:
        words += [op.name, f"{prob:g}".lstrip("0"), *([] if magnitude is None else [magnitude])]
    return " ".join(map(str, words))


@pytest.mark.parametrize("make", [policies.get_reduced_cifar10_policy, cifar10_policy])
def test_the_policies_of_cifar10_have_the_papers_sub_policies(make):
    listed = [one for line in CIFAR10_SUBS.splitlines() for one in line.split("  ") if one.strip()]
    assert [written(sub) for sub in make().sub_policies] == [one.strip() for one in listed]


def test_as_many_images_are_moved_as_the_page_of_the_library_says():
    def moves(operation):
        return operation.name.startswith(("shear", "translate", "rotate"))

    stay = [
        np.prod([1 - prob for operation, prob, _ in sub if moves(operation)])
        for sub in cifar10_policy().sub_policies
    ]
    assert 1 - np.mean(stay) == pytest.approx(0.18, abs=0.005)
    levels = method("rand_augment").levels
    stay = [np.mean([not moves(operation) for operation in level]) for level in levels]
    assert 1 - np.prod(stay) == pytest.approx(0.59, abs=0.005)


def test_cifar10s_magnitudes_are_torchvisions():
    theirs = torchvisions.AutoAugment(torchvisions.AutoAugmentPolicy.CIFAR10)
    space = theirs._augmentation_space(10, (1, 1))
    ours = cifar10_policy(use_shape=True, max_translate_rel=150 / 331)
    assert ours.num_magnitude_bins == 10
    for op in {op for sub in ours.sub_policies for op, _, _ in sub}:
        values, either_sign = space["".join(map(str.title, op.name.split("_")))]
        assert op.randomly_negate in (either_sign, None)
        if op.mag_range is not None:
            mine = np.linspace(*op.mag_range, 10)
            mine = np.round(mine) if op.name == "posterize" else mine
            np.testing.assert_allclose(mine, values, atol=1.01 if op.name == "solarize" else 1e-6)


def by_pil(name, k, sign, image):
    """What the usual code for CIFAR makes of an image with magnitude k."""
    part = (-1 if sign else 1) * k / 9
    if name in ("brightness", "color", "contrast", "sharpness"):
        return getattr(ImageEnhance, name.title())(image).enhance(1 + 0.9 * part)
    if name == "posterize":
        return ImageOps.posterize(image, round(8 - 4 * k / 9))
    if name == "solarize":
        return ImageOps.solarize(image, 256 * (1 - k / 9))
    if name in ("invert", "auto_contrast"):
        return getattr(ImageOps, name.replace("_", ""))(image)
    if name == "rotate":
        return image.rotate(30 * part, fillcolor=(128, 128, 128))
    matrix = {
        "translate_x": (1, 0, -150 / 331 * W * part, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -150 / 331 * H * part),
        "shear_y": (1, 0, 0, -0.3 * part, 1, 0),
    }[name]
    return image.transform(image.size, Image.AFFINE, matrix, fillcolor=(128, 128, 128))


def off_pil(policy, pixels):
    """Mean absolute difference in grey levels, of each operation, magnitude and sign."""
    one, off = method("auto_augment", policy=policy, max_translate_rel=150 / 331), {}
    make = getattr(policies, f"get_{policy}_policy", cifar10_policy)
    known = {op.name: op for level in one.levels for op in level}
    for name, k in {(op.name, k or 0) for sub in make().sub_policies for op, _, k in sub}:
        if name == "equalize":  # OpenCV's
            continue
        for sign in (0, 1):
            both = np.full(N, k), np.full(N, sign)
            out = direct(known[name], pixels, one.bins, *both, {"fill_value": 128})
            wanted = [np.asarray(by_pil(name, k, sign, Image.fromarray(rgb))) for rgb in pixels]
            off[name, k, sign] = np.abs(out.astype(int) - np.stack(wanted)).mean()
    return off


def test_cifar10s_operations_are_those_of_pil(pixels):
    moves = ("rotate", "translate_x", "translate_y", "shear_y")  # interpolated
    for (name, *how), off in off_pil("cifar10", pixels).items():
        assert off < (3 if name in moves else 0.6), (name, how, off)


def test_dalis_own_are_of_other_strengths(pixels):
    off = off_pil("reduced_cifar10", pixels)
    for name in ("brightness", "color", "contrast", "solarize", "posterize", "translate_y"):
        assert max(value for (one, *_), value in off.items() if one == name) > 5


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_a_plan_hangs_on_the_sample_alone(name, settings):
    one, batch = method(name, **settings), samples(500)
    rows = np.random.default_rng(0).permutation(500)
    check_pure(one, batch, [*np.array_split(rows, 7), *rows[:20, None]])


def test_defaults_are_those_of_the_papers():
    rand, trivial = method("rand_augment"), method("trivial_augment")
    assert (rand.config.n, rand.magnitude, rand.bins) == (2, 9, 31)
    assert (trivial.magnitude, trivial.bins) == (None, 31)
    assert method("auto_augment").config.policy == "image_net"
    assert rand.config.fill_value == 128
    for level, op, mag_range in (
        (rand.levels[0], a.translate_x.op, (0, 100 / 224)),
        (trivial.levels[0], a.translate_x_no_shape.op, (0, 32)),
    ):
        assert level[0].op is op
        assert level[0].mag_range == mag_range


@pytest.fixture(scope="module")
def pixels():
    return smooth()


def direct(operation, pixels, bins, magnitude, negated, settings):
    """The operation itself on images with parameters of their own, worked out by NumPy.

    magnitude, negated: int [n].
    """
    if operation.mag_range is not None:
        steps = np.linspace(*operation.mag_range, bins, dtype=np.float32)[magnitude]
        if operation.randomly_negate:
            steps = np.where(negated == 1, -steps, steps)
        parameters = np.stack([np.asarray(operation.mag_to_param(step)) for step in steps])
        if parameters.dtype != np.uint8:
            parameters = parameters.astype(np.float32)

    @pipeline_def(batch_size=len(pixels), num_threads=1, device_id=None)
    def define():
        images = fn.external_source(source=[pixels], layout="HWC")
        parameter = None
        if operation.mag_range is not None:
            parameter = fn.external_source(source=[parameters])
        names = operation.op.__code__.co_varnames
        if "shape" in names:
            return operation.op(images, parameter, shape=(H, W), **settings)
        return operation.op(images, parameter, **(settings if "fill_value" in names else {}))

    with deprecations_hidden():
        pipeline = define()
    return pipeline.run()[0].as_array()


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_pixels_are_those_of_the_planned_operations(pixels, name, settings):
    out, plan = transformed(name, pixels, **settings)
    one = load(name).Method(load(name).Config(**settings), None)
    settings = {"fill_value": one.config.fill_value}
    expected, changed = pixels.copy(), 0
    for k, level in enumerate(one.levels):
        op, sign = (plan[f"{field}{k}"][:, 0].astype(int) for field in ("op", "sign"))
        magnitude = np.full(N, one.magnitude)
        if one.magnitude is None:
            magnitude = plan[f"bin{k}"][:, 0].astype(int)
        assert len(set(op)) > min(len(level), 8) / 2
        for number in set(op):
            mine = np.flatnonzero(op == number)
            expected[mine] = direct(
                level[number], expected[mine], one.bins, magnitude[mine], sign[mine], settings
            )
    np.testing.assert_array_equal(out, expected)
    changed = (out != pixels).any((1, 2, 3)).mean()
    assert changed > 0.5


@pytest.mark.parametrize("name", ["rand_augment", "trivial_augment", "auto_augment"])
def test_pixels_do_not_hang_on_the_batch(pixels, name):
    whole_batch, plan = transformed(name, pixels)
    for batch_size, size in ((1, None), (7, (H, W))):
        out, other = transformed(name, pixels, batch_size, size=size)
        np.testing.assert_array_equal(out, whole_batch)
        assert all((other[key] == plan[key]).all() for key in plan)
    by_torch, _ = transformed(name, pixels, backend="torch")
    np.testing.assert_array_equal(by_torch, whole_batch)


@pytest.mark.parametrize("name", ["rand_augment", "trivial_augment", "auto_augment"])
def test_without_conditionals_the_error_says_what_to_do(pixels, name):
    message = (
        "enable_conditionals must be True where a policy is applied: define the pipeline with "
        r"@pipeline_def\(enable_conditionals=True, ...\), or leave the policy out"
    )
    with pytest.raises(ValueError, match=message):
        transformed(name, pixels, conditionals=False)


def test_deprecations_within_dali_are_hidden(pixels):
    with warnings.catch_warnings(record=True) as caught:
        transformed("rand_augment", pixels)
    assert not caught


def test_other_warnings_are_not():
    def warn():
        with deprecations_hidden():
            warnings.simplefilter("always")
            warnings.warn("of no interest", DeprecationWarning, stacklevel=1)
            warnings.warn("do mind", UserWarning, stacklevel=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn()
    assert [str(one.message) for one in caught] == ["do mind"]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_training_pipelines_of_files_and_of_arrays_give_the_same_samples(tailed, layout):
    """In two epochs, and other ones in each."""
    image = ImageConfig(size=24, val_resize=24, crop=CropConfig(kind="pad"), layout=layout)
    run = ExecConfig(batch_size=16, threads=1)
    images = ArrayImages.from_index(tailed, threads=1)
    order = Order(tailed.labels, batch_size=16, seed=2)

    def stage():
        return Stage(tailed, "rand_augment", epochs=2, batch_size=16, seed=2)

    def records(pipeline):
        loader = Loader(pipeline, files.OUTPUTS, tailed, drop_last=False, order=order)
        return [
            {
                i: pixels.numpy().tobytes()
                for batch in loader
                for i, pixels in zip(batch.ids.tolist(), batch.images, strict=True)
            }
            for _ in range(2)
        ]

    wanted = records(files.train_pipeline(stage(), image, run, seed=2, order=order))
    assert records(memory.train_pipeline(stage(), images, order, image, run)) == wanted
    first, second = wanted
    assert len(first) == len(second) == len(tailed)
    assert sum(first[i] != second[i] for i in first) > 0.9 * len(first)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("rand_augment", {"n": 0}, r"n must be in \[1, 16\] operations, got 0; usual is 2"),
        ("rand_augment", {"m": 31}, r"m must be in \[0, 31\), a magnitude of as many bins, got 31"),
        ("rand_augment", {"m": -1}, r"m must be in \[0, 31\).*got -1; usual is 9"),
        ("rand_augment", {"fill_value": 256}, r"grey level in \[0, 255\], got 256"),
        ("trivial_augment", {"bins": 0}, "bins must be at least 1, got 0; usual is 31"),
        (
            "trivial_augment",
            {"max_translate_rel": 1.5},
            r"max_translate_rel must be in \[0, 1\] or None, got 1.5; 100/224 is usual",
        ),
        ("auto_augment", {"fill_value": -1}, r"fill_value must be a grey level in \[0, 255\]"),
        ("auto_augment", {"policy": "cifar"}, "policy must be one of image_net, .*got 'cifar'"),
    ],
)
def test_settings_are_validated(name, settings, message):
    with pytest.raises(ValueError, match=message):
        load(name).Config(**settings)
