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

from scae_dali.saliency.stage import SCAE, Stage

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
                       r".+: .* pass window=\(start, size, shapes\)"):  # fmt: skip
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


def by_resized_crop(encoded):
    images = fn.random_resized_crop(fn.decoders.image(encoded), size=S, seed=3)
    return images, {"window": drawn(encoded, seed=1)}


def by_other_area(encoded):
    """The same seed, and another law."""
    images = fn.decoders.image_random_crop(encoded, seed=3, random_area=[0.1, 0.3])
    return resized(images), {"window": drawn(encoded, seed=3)}


def by_centre(encoded):
    return fn.crop(fn.decoders.image(encoded), crop=S), {"window": drawn(encoded)}


def after_resize(encoded):
    start, size, shapes = drawn(encoded)
    images = fn.resize(fn.decoders.image(encoded), resize_shorter=60)
    return resized(fn.slice(images, start, size, axis_names="HW")), {
        "window": (start, size, shapes)
    }


def twice(encoded):
    frame = drawn(encoded)
    return fn.crop(sliced(encoded, frame), crop=(20, 20)), {"window": frame}


def whole(encoded):
    return resized(fn.decoders.image(encoded)), {"window": drawn(encoded)}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (other_generator, "but fn.decoders.image_slice cuts another than this fn.random_crop_gen"),
        (swapped, r"window must be \(start, size, shapes\), got size and start the other way"),
        (fused_and_window, "but fn.decoders.image_random_crop cuts another than this fn.random"),
        (by_resized_crop, "but fn.random_resized_crop cuts another than this fn.random_crop_gen"),
        (by_other_area, "but fn.decoders.image_random_crop cuts another than this fn.random_crop"),
        (by_centre, "but fn.crop cuts another than this fn.random_crop_generator draws"),
        (after_resize, "but fn.slice crops one that was resized before; crop first, by start"),
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


def equal_seed_after_decoding(encoded):
    images = fn.random_resized_crop(fn.decoders.image(encoded), size=S, seed=3)
    return images, {"window": drawn(encoded, seed=3), "size": S}


def drawn_for_what_is_resized(encoded):
    images = fn.resize(fn.decoders.image(encoded), resize_shorter=60)
    shapes = images.shape()
    start, size = fn.random_crop_generator(shapes, seed=1)
    images = resized(fn.slice(images, start, size, axis_names="HW"))
    return images, {"window": (start, size, shapes), "size": S}


def of_channels_by_operators(encoded):
    images = resized(fn.decoders.image(encoded))
    twice_as_deep = fn.cat(images, images, axis=2)
    return fn.slice(twice_as_deep, 0, 3, axis_names="C", normalized_anchor=False,
                    normalized_shape=False), {"size": S}  # fmt: skip


def reshaped(encoded):
    """What a Python function gave without a layout, which comes later."""
    images = fn.python_function(
        resized(fn.decoders.image(encoded)), function=lambda one: one, batch_processing=False
    )
    return fn.reshape(fn.reshape(images, shape=[24, 24, 3]), layout="HWC"), {"size": S}


def reshaped_alone(encoded):
    return fn.reshape(resized(fn.decoders.image(encoded)), shape=[24, 24, 3]), {"size": S}


def by_constants_of_dali(encoded):
    """Arguments as DALI's own augmentations have them."""
    images = fn.brightness(resized(fn.decoders.image(encoded)), brightness=types.Constant(1))
    return fn.rotate(images, angle=types.Constant(3), keep_size=True), {"size": S}


def mixed_within_the_batch(encoded):
    """By another stage: what was permuted is mixed into images that were not."""
    images = resized(fn.decoders.image(encoded))
    other = fn.permute_batch(images, indices=fn.batch_permutation(seed=1))
    return fn.cast_like(images * 0.5 + other * 0.5, images), {"size": S}


def whole_as_window(encoded):
    """As code that training and validation share may have it."""
    shapes = fn.peek_image_shape(encoded)
    start = fn.constant(idata=[0, 0], shape=[2])
    return resized(fn.decoders.image(encoded)), {"window": (start, shapes[:2], shapes), "size": S}


def by_positions(encoded):
    """A crop whose place is drawn otherwise, with the frame that goes with it."""
    images = fn.resize(fn.decoders.image(encoded), size=(30, 30))
    y, x = (fn.random.uniform(range=[0, 1], seed=seed) for seed in (1, 2))
    images = fn.crop_mirror_normalize(
        images, crop=S, crop_pos_y=y, crop_pos_x=x, output_layout="HWC", dtype=types.UINT8
    )
    start = fn.stack(y, x) * 6.0
    frame = fn.constant(fdata=S, shape=[2]), fn.constant(fdata=(30, 30, 3), shape=[3])
    return images, {"window": (start, *frame), "size": S}


def all_of_it(encoded):
    """A crop that cuts nothing off."""
    return fn.crop(resized(fn.decoders.image(encoded)), crop=S), {"size": S}


def of_a_mix(encoded):
    """Another image, which was flipped, mixed in."""
    images = resized(fn.decoders.image(encoded))
    return fn.cast_like(images * 0.7 + fn.flip(images) * 0.3, images), {"size": S}


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
    [
        *(right, equal_seed, equal_seed_after_decoding, drawn_for_what_is_resized),
        *(
            of_channels_by_operators,
            reshaped,
            reshaped_alone,
            by_constants_of_dali,
            mixed_within_the_batch,
            whole_as_window,
            by_positions,
            all_of_it,
            of_a_mix,
            converted,
            rotated,
            unknown,
        ),
        *(back_to_hwc, of_channels, cropped_by_cmn),
    ],
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


def shifted(encoded):
    return fn.cast(resized(fn.decoders.image(encoded)), dtype=types.FLOAT) - 128.0, {}


def by_decoder(encoded):
    return resized(fn.decoders.image(encoded, dtype=types.FLOAT)), {}


def by_small_constants(encoded):
    images = resized(fn.decoders.image(encoded))
    return images * types.Constant(np.float32([1 / 58, 1 / 57, 1 / 57])), {}


def by_brightness(encoded):
    images = resized(fn.decoders.image(encoded))
    return fn.brightness(images, brightness=1 / 255, dtype=types.FLOAT), {}


def behind_a_function(encoded):
    images = fn.python_function(
        resized(fn.decoders.image(encoded)),
        function=lambda one: one, batch_processing=False, output_layouts="HWC",
    )  # fmt: skip
    return fn.crop_mirror_normalize(images, mean=MEAN, std=STD, output_layout="HWC"), {}


def by_operator(encoded):
    return fn.normalize(resized(fn.decoders.image(encoded))), {}


@pytest.mark.parametrize("body", [normalised, transposed], ids=lambda one: one.__name__)
@pytest.mark.parametrize("method", ["scae", "cutout", "none"])
def test_images_with_channels_first_are_refused(index, body, method):
    with pytest.raises(ValueError, match="images must be HWC, got CHW; call the stage before"):
        define(index, body, method=method)


@pytest.mark.parametrize(
    "body",
    [
        *(hwc, in_unit_range, multiplied, by_constants, by_operator, shifted, by_decoder),
        *(by_small_constants, by_brightness, behind_a_function),
    ],
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


def to_and_fro(encoded):
    return fn.cast(resized(fn.decoders.image(encoded)) / 255.0 * 255.0, dtype=types.UINT8), {}


def halves(encoded):
    images = resized(fn.decoders.image(encoded))
    return fn.cast(images / 2 + images / 2, dtype=types.UINT8), {}


def inverted(encoded):
    return fn.cast(255 - resized(fn.decoders.image(encoded)), dtype=types.UINT8), {}


@pytest.mark.parametrize("body", [to_and_fro, halves, inverted], ids=lambda one: one.__name__)
def test_grey_levels_that_stay_grey_levels_are_taken(index, body):
    define(index, body, method="random_erasing").run()


def test_what_follows_something_unknown_is_looked_at(index, cache):
    def behind(encoded):
        images, _ = unknown(encoded)
        return fn.crop(images, crop=(20, 20)), {}

    with pytest.raises(
        ValueError, match="window must be given where images are cropped, here by f"
    ):
        define(index, behind, cache=cache)


def test_a_layout_that_nobody_gives_is_unknown(index):
    """Not one called None."""

    def body(encoded):
        images = resized(fn.decoders.image(encoded))
        images = fn.python_function(images, function=lambda one: one, batch_processing=False)
        return fn.reshape(images, shape=[24, 24, 3]), {"size": S}

    define(index, body, method="none").run()


@pytest.mark.parametrize("size", [(12, 12), (24, 23)])
def test_a_size_that_the_graph_cannot_tell_is_compared_with_the_images(index, size):
    def body(encoded):
        return unknown(encoded)[0], {"size": size}

    with pytest.raises(
        RuntimeError, match=r"size must be \(h, w\) of the images, got .*\(24, 24\)"
    ):
        define(index, body, method="cutout").run()


@pytest.mark.parametrize(
    "frame",
    [
        lambda start, size, shapes: (start / shapes[:2], size / shapes[:2], shapes),
        lambda start, size, shapes: (start, size * 0, shapes),
        lambda start, size, shapes: (start - 1000, size, shapes),
        lambda start, size, shapes: (start, size, fn.stack(*(shapes[k] for k in (2, 0, 1)))),
    ],
    ids=["relative", "empty", "outside", "CHW"],
)
def test_a_window_that_shows_nothing_of_the_image_is_refused(index, cache, frame):
    def body(encoded):
        start, size, shapes = drawn(encoded)
        return sliced(encoded, (start, size)), {"window": frame(start, size, shapes), "size": S}

    with pytest.raises(
        RuntimeError, match=r"window must be \(start, size, shapes\) in pixels of th"
    ):
        define(index, body, cache=cache).run()


def turned(encoded):
    return resized(fn.decoders.image(encoded, adjust_orientation=False)), {}


def backwards(encoded):
    return fn.resize(fn.decoders.image(encoded), size=[24, -24]), {}


def upside_down(encoded):
    return fn.rotate(resized(fn.decoders.image(encoded)), angle=180.0), {"size": S}


@pytest.mark.parametrize("body", [turned, backwards, upside_down], ids=lambda one: one.__name__)
def test_images_that_do_not_lie_as_their_map_are_refused(index, cache, body):
    with pytest.raises(
        ValueError, match="the map of the upright image would lie another way round"
    ):
        define(index, body, cache=cache)


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
