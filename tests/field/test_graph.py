"""A stage at the wrong place of a pipeline.

A decoder that crops by itself shows a part of the image, and the map of the whole lay over it;
behind crop_mirror_normalize the images are CHW, where nothing was erased, or normalised, where the
rectangle was filled with grey levels. Sources: https://github.com/NVIDIA/DALI/issues/2126 (a layout
that fn.erase did not have), https://github.com/NVIDIA/DALI/issues/4994 (what
crop_mirror_normalize does, and in which order).
"""

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def, types

from scae_dali.ops import SCAE, Stage

S = (24, 24)
MEAN, STD = [124.0, 116.0, 104.0], [58.0, 57.0, 57.0]


def define(index, body, *, cache=None, method="scae", conditionals=False, **settings):
    """A pipeline whose images and keywords of the stage are body(encoded)."""
    keywords = {"epochs": 2, "batch_size": 5, "seed": 1} | settings
    if method == "scae":
        keywords = {"mix_prob": 0} | keywords
    one = Stage(index, method, cache=cache, **keywords)

    @pipeline_def(batch_size=5, num_threads=1, device_id=None, enable_conditionals=conditionals)
    def pipeline():
        encoded, ids = fn.readers.file(
            files=list(index.files), file_root=index.root, pad_last_batch=True
        )
        images, call = body(encoded)
        return one(images, ids, **call)[0]

    return pipeline()


def resized(images, **keywords):
    return fn.resize(images, size=keywords.pop("size", S), **keywords)


def drawn(encoded, seed=1, **keywords):
    """A random crop, and its frame."""
    shapes = fn.peek_image_shape(encoded)
    start, size = fn.random_crop_generator(shapes, seed=seed, **keywords)
    return start, size, shapes


def sliced(encoded, frame):
    return resized(
        fn.decoders.image_slice(encoded, start=frame[0], shape=frame[1], axis_names="HW")
    )


def fused(encoded):
    return resized(fn.decoders.image_random_crop(encoded, seed=3)), {}


def resized_crop(encoded):
    return fn.random_resized_crop(fn.decoders.image(encoded), size=S, seed=3), {}


def central(encoded):
    images = fn.resize(fn.decoders.image(encoded), resize_shorter=30)
    return fn.crop(images, crop=S), {"size": S}


def by_slice(encoded):
    start, size, _ = drawn(encoded)
    return resized(fn.slice(fn.decoders.image(encoded), start, size, axis_names="HW")), {}


def by_region(encoded):
    start, size, _ = (fn.cast(one, dtype=types.FLOAT) for one in drawn(encoded))
    return fn.resize(fn.decoders.image(encoded), size=S, roi_start=start, roi_end=start + size), {}


def by_subscript(encoded):
    return resized(fn.decoders.image(encoded)[4:30, 4:30]), {}


def flipped_later(encoded):
    images, _ = fused(encoded)
    return fn.hsv(fn.brightness(images, brightness=1.1), hue=3.0), {"size": S}


@pytest.mark.parametrize(
    "body",
    [fused, resized_crop, central, by_slice, by_region, by_subscript, flipped_later],
    ids=lambda one: one.__name__,
)
def test_a_crop_without_its_window_is_refused(index, cache, body):
    with pytest.raises(ValueError, match=r"window must be given where images are cropped, here by "
                       r"fn\.\S+: .* pass window=\(start, size, shapes\)"):  # fmt: skip
        define(index, body, cache=cache)
    define(index, body).run()  # there is no map to lie wrongly


def test_and_in_a_branch(index, cache):
    def body(encoded):
        images = resized(fn.decoders.image(encoded))
        if fn.random.coin_flip(seed=1):
            images = fn.resize(images[2:20, 2:20], size=S)
        return images, {}

    with pytest.raises(ValueError, match="window must be given where images are cropped"):
        define(index, body, cache=cache, conditionals=True)


def other_generator(encoded):
    return sliced(encoded, drawn(encoded)), {"window": drawn(encoded, seed=2)}


def swapped(encoded):
    start, size, shapes = drawn(encoded)
    return sliced(encoded, (start, size, shapes)), {"window": (size, start, shapes)}


def fused_and_window(encoded):
    return fused(encoded)[0], {"window": drawn(encoded, seed=1)}


def twice(encoded):
    frame = drawn(encoded)
    return fn.crop(sliced(encoded, frame), crop=(20, 20)), {"window": frame}


def whole(encoded):
    return resized(fn.decoders.image(encoded)), {"window": drawn(encoded)}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (other_generator, "but fn.decoders.image_slice cuts that of another fn.random_crop_gen"),
        (swapped, r"window must be \(start, size, shapes\), got size and start the other way"),
        (fused_and_window, "but fn.decoders.image_random_crop draws one of its own; draw it by"),
        (twice, "window must be the crop that is seen, but fn.crop crops once more; crop once"),
        (whole, "window must be left out .* nothing crops these images"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_window_of_another_crop_is_refused(index, cache, body, message):
    with pytest.raises(ValueError, match=message):
        define(index, body, cache=cache)


def right(encoded):
    frame = drawn(encoded)
    return sliced(encoded, frame), {"window": frame, "size": S}


def equal_seed(encoded):
    """The generator draws what the decoder draws."""
    return fused(encoded)[0], {"window": drawn(encoded, seed=3)}


def converted(encoded):
    """The frame as float32, and the crop out of the whole image."""
    start, size, shapes = drawn(encoded)
    start, size = (fn.cast(one, dtype=types.FLOAT) for one in (start, size))
    images = fn.slice(
        fn.decoders.image(encoded), start, size, axis_names="HW",
        normalized_anchor=False, normalized_shape=False,
    )  # fmt: skip
    return resized(images), {"window": (start, size, shapes)}


def rotated(encoded):
    images = fn.rotate(resized(fn.decoders.image(encoded)), angle=5.0, keep_size=True)
    return images, {"size": S}


def unknown(encoded):
    """Python may do anything to images: what came before says nothing."""
    images = fn.python_function(
        fused(encoded)[0], function=lambda one: one, batch_processing=False, output_layouts="HWC"
    )
    return images, {"size": S}


def back_to_hwc(encoded):
    images = fn.transpose(resized(fn.decoders.image(encoded)), perm=[2, 0, 1])
    return fn.transpose(images, perm=[1, 2, 0]), {"size": S}


def of_channels(encoded):
    """The alpha channel cut off, and a branch by a mean that is divided."""
    images = resized(fn.decoders.image(encoded))[:, :, :3]
    if fn.reductions.mean(images) / 2.0 > 60.0:
        images = fn.brightness(images, brightness=0.9)
    return images, {"size": S}


def cropped_by_cmn(encoded):
    """crop_mirror_normalize as a mere crop."""
    start, size, shapes = drawn(encoded)
    images = sliced(encoded, (start, size, shapes))
    images = fn.crop_mirror_normalize(images, output_layout="HWC", dtype=types.UINT8)
    return images, {"window": (start, size, shapes), "size": S}


@pytest.mark.parametrize(
    "body",
    [right, equal_seed, converted, rotated, unknown, back_to_hwc, of_channels, cropped_by_cmn],
    ids=lambda one: one.__name__,
)
def test_what_is_right_or_unknown_runs(index, cache, body):
    define(index, body, cache=cache, conditionals=body is of_channels).run()


def normalised(encoded, layout="CHW", **keywords):
    images = resized(fn.decoders.image(encoded))
    return fn.crop_mirror_normalize(images, mean=MEAN, std=STD, output_layout=layout, **keywords), {
        "size": S
    }


def hwc(encoded):
    return normalised(encoded, "HWC")


def transposed(encoded):
    return fn.transpose(resized(fn.decoders.image(encoded)), perm=[2, 0, 1]), {}


def in_unit_range(encoded):
    return fn.cast(resized(fn.decoders.image(encoded)), dtype=types.FLOAT) / 255.0, {}


def multiplied(encoded):
    return resized(fn.decoders.image(encoded)) * (1 / 255), {}


def by_constants(encoded):
    images = fn.cast(resized(fn.decoders.image(encoded)), dtype=types.FLOAT)
    return (images - types.Constant(np.float32(MEAN))) / types.Constant(np.float32(STD)), {}


def by_operator(encoded):
    return fn.normalize(resized(fn.decoders.image(encoded))), {}


@pytest.mark.parametrize("body", [normalised, transposed], ids=lambda one: one.__name__)
@pytest.mark.parametrize("method", ["scae", "cutout", "none"])
def test_images_with_channels_first_are_refused(index, body, method):
    with pytest.raises(ValueError, match="images must be HWC, got CHW; call the stage before"):
        define(index, body, method=method)


@pytest.mark.parametrize(
    "body",
    [hwc, in_unit_range, multiplied, by_constants, by_operator],
    ids=lambda one: one.__name__,
)
def test_images_that_are_no_grey_levels_any_more_are_refused(index, body):
    with pytest.raises(ValueError, match=r"images must be in grey levels 0 … 255 where mean is"):
        define(index, body, method="random_erasing")
    define(index, body, method="none").run()


def test_mean_of_the_unit_range_for_grey_levels_is_refused(index):
    """It would be rounded to black."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def body(encoded):
        return resized(fn.decoders.image(encoded)), {"size": S}

    with pytest.raises(ValueError, match=r"mean and std must be in grey levels .* multiply both"):
        define(index, body, method="random_erasing", mean=mean, std=std)
    define(index, in_unit_range, method="random_erasing", mean=mean, std=std).run()


def test_normalised_images_are_filled_with_what_their_mean_is(index):
    pipeline = define(index, hwc, method="random_erasing", mean=(0, 0, 0), std=(1, 1, 1), prob=1.0)
    (images,) = pipeline.run()
    for image in images:
        assert (np.asarray(image) == 0).all(axis=2).mean() > 0.01


def flipped(encoded):
    images = resized(fn.decoders.image(encoded))
    return fn.flip(images, horizontal=fn.random.coin_flip(seed=1)), {}


def mirrored(encoded):
    images = resized(fn.decoders.image(encoded))
    mirror = fn.random.coin_flip(seed=1)
    return fn.crop_mirror_normalize(images, mirror=mirror, output_layout="HWC"), {}


@pytest.mark.parametrize("body", [flipped, mirrored], ids=lambda one: one.__name__)
def test_a_flip_before_the_stage_is_refused(index, cache, body):
    with pytest.raises(ValueError, match="images must not be flipped before the stage, got those"):
        define(index, body, cache=cache)
    define(index, body).run()


@pytest.mark.parametrize(
    ("resize", "size"),
    [
        ({"size": (24, 32)}, (32, 24)),
        ({"size": [24, 24]}, (224, 224)),
        ({"size": 24}, (24, 25)),
        ({"resize_x": 32, "resize_y": 24}, (32, 24)),
    ],
)
def test_a_size_that_is_not_that_of_the_images_is_refused(index, cache, resize, size):
    def body(encoded):
        return fn.resize(fn.decoders.image(encoded), **resize), {"size": size}

    with pytest.raises(ValueError, match=r"size must be \(h, w\) of the images, \(24, \d+\) by"):
        define(index, body, cache=cache)


@pytest.mark.parametrize(
    "resize",
    [
        {"size": (24, 32)},
        {"resize_x": 32, "resize_y": 24},
        {"resize_shorter": 40},
        {"size": (30, 30), "mode": "not_smaller"},
        {"size": [24, 32]},
    ],
)
def test_a_size_that_is_right_or_unknown_is_taken(index, cache, resize):
    def body(encoded):
        return fn.resize(fn.decoders.image(encoded), **resize), {"size": (24, 32)}

    define(index, body, cache=cache)


@pytest.mark.parametrize("size", [24, (24,), (24.0, 24.0), (0, 24), (24, 24, 3)])
def test_a_size_that_is_none_is_refused(index, size):
    with pytest.raises(ValueError, match=r"size must be \(h, w\) of the images in whole pixels"):
        define(index, lambda encoded: (fn.decoders.image(encoded), {"size": size}))


def test_scae_takes_what_the_readme_says(index, cache):
    """SCAE by its own class, in a pipeline with conditionals and tail classes."""
    scae = SCAE(index, cache, epochs=2, batch_size=5, seed=1, tail=0.5)

    @pipeline_def(batch_size=5, num_threads=1, device_id=None, enable_conditionals=True)
    def pipeline():
        encoded, ids = fn.readers.file(
            files=list(index.files), file_root=index.root, pad_last_batch=True
        )
        images, call = right(encoded)
        images, targets = scae(images, ids, **call)
        return fn.crop_mirror_normalize(images, mean=MEAN, std=STD), *targets

    pipeline().run()
