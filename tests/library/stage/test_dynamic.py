"""Dynamic mode does what a pipeline does."""

import numpy as np
import nvidia.dali.experimental.dynamic as ndd
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types

from scae_dali import Stage

SIZE = (32, 32)


def make(index, cache, method="scae", **keywords):
    settings = {"epochs": 4, "seed": 5, "batch_size": 1, "p_min": 1.0, "p_max": 1.0, "cache": cache}
    if method != "scae":
        settings = {"epochs": 4, "seed": 5, "batch_size": 1}
    return Stage(index, method, **settings | keywords)


def by_pipeline(one, index, epoch, window):
    """Images, ids and targets of all samples, with their crops."""

    @pipeline_def(batch_size=len(index), num_threads=1, device_id=None)
    def define():
        encoded, ids = fn.readers.file(
            files=list(index.files), file_root=index.root, name="Reader", pad_last_batch=True
        )
        images, frame = fn.decoders.image(encoded), None
        if window:
            shapes = fn.peek_image_shape(encoded)
            start, shape = fn.random_crop_generator(shapes, seed=3)
            images = fn.decoders.image_slice(encoded, start=start, shape=shape, axis_names="HW")
            frame = (start, shape, shapes)
        images = fn.resize(images, size=SIZE)
        erased, targets = one(images, ids, window=frame, epoch=epoch)
        return images, erased, fn.cast(ids, dtype=types.INT64), *targets, *(frame or ())

    pipeline = define()
    return [[np.asarray(one) for one in out.as_cpu()] for out in pipeline.run()]


@pytest.mark.parametrize(
    ("method", "keywords"),
    [
        ("scae", {}),
        ("scae", {"fill": "color"}),
        ("random_erasing", {"fill": "zero", "prob": 1.0}),
        ("cutout", {"fill": "above_mean"}),
    ],
)
@pytest.mark.parametrize("window", [True, False])
def test_a_batch_is_erased_as_a_pipeline_erases_it(index, cache, method, keywords, window):
    one = make(index, cache, method, **keywords)
    images, erased, ids, *rest = by_pipeline(one, index, 3, window)
    targets, frame = rest[:3], rest[3:]
    changed = 0
    for some in ([0, 1, 2], [7], list(range(40, 50))):  # batches of any size and order
        batch = ndd.as_batch([images[i] for i in some], layout="HWC")
        crop = tuple([part[i] for i in some] for part in frame) or None
        given, found = one.dynamic(batch, ndd.as_batch([ids[i] for i in some]), 3, crop)
        for i, image in zip(some, given.tensors, strict=True):
            np.testing.assert_array_equal(np.asarray(image), erased[i])
            changed += not np.array_equal(erased[i], images[i])
        for batch_of, wanted in zip(found, targets, strict=True):
            values = [np.asarray(value) for value in batch_of.tensors]
            np.testing.assert_array_equal(values, [wanted[i] for i in some])
            assert values[0].dtype == wanted[0].dtype
    assert changed > 5


def test_a_reader_of_dynamic_mode_gives_ids_or_names(index, cache):
    one = make(index, cache)
    reader = ndd.readers.File(files=[f"{index.root}/{name}" for name in index.files])
    seen = []
    for jpegs, ids in reader.next_epoch(batch_size=16):
        images = ndd.resize(ndd.decoders.image(jpegs), size=SIZE)
        erased, targets = one.dynamic(images, ids, 2)
        names = ndd.get_property(jpegs, key="source_info")
        by_name, _ = one.dynamic(images, names, 2)
        assert erased.layout == "HWC"
        for first, second in zip(erased.tensors, by_name.tensors, strict=True):
            np.testing.assert_array_equal(first, second)
        seen += [int(np.asarray(label)[0]) for label in targets.label.tensors]
    assert seen[:50] == index.labels.tolist()  # the reader fills up its last batch


def test_what_dynamic_mode_cannot_do_is_refused(index, cache, tailed):
    batch = ndd.as_batch(np.zeros((2, 32, 32, 3), np.uint8), layout="HWC")
    for method in ("mixup", "grid_mask", "random_erasing+cutmix", "rand_augment"):
        with pytest.raises(ValueError, match="method must fill one rectangle in dynamic mode"):
            make(index, None, method).dynamic(batch, [0, 1], 0)
    with pytest.raises(ValueError, match="pass mix_prob=0 where samples of rare classes are mixed"):
        Stage(tailed, "scae", epochs=4, seed=5, batch_size=1).dynamic(batch, [0, 1], 0)
    with pytest.raises(ValueError, match='fill must not be "noise" in dynamic mode'):
        make(index, None, "cutout", fill="noise").dynamic(batch, [0, 1], 0)
    one = make(index, cache)
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        one.dynamic(batch, [0, 1], -1)
    chw = ndd.as_batch(np.zeros((2, 3, 32, 32), np.uint8), layout="CHW")
    with pytest.raises(ValueError, match="images must be HWC, got CHW"):
        one.dynamic(chw, [0, 1], 0)
    with pytest.raises(IndexError, match="50"):
        one.dynamic(batch, [0, 50], 0)


def test_class_labels_given_as_ids_are_told(index, cache):
    batch = ndd.as_batch(np.zeros((4, 32, 32, 3), np.uint8), layout="HWC")
    one = make(index, cache)
    with pytest.warns(RuntimeWarning, match="ids have a sample more than once in a batch; if they"):
        one.dynamic(batch, [1, 0, 1, 2], 0)
    one.dynamic(batch, [1, 0, 1, 2], 0)  # once is enough


def test_a_batch_that_a_reader_fills_up_is_not_told(index, cache):
    one = make(index, cache)
    reader = ndd.readers.File(
        files=list(index.files), file_root=index.root, shuffle_after_epoch=True, pad_last_batch=True
    )
    seen = []
    for jpegs, ids in reader.next_epoch(batch_size=16):
        one.dynamic(ndd.resize(ndd.decoders.image(jpegs), size=SIZE), ids, 0)
        seen += [int(np.asarray(one)[0]) for one in ids.tensors]
    assert sorted(seen[:50]) == [*range(50)]
    assert set(seen[50:]) == {seen[49]}


def greys(n=3, dtype=np.uint8, channels=3):
    values = np.random.default_rng(0).integers(0, 256, (n, 32, 32, channels))
    return ndd.as_batch(values.astype(dtype), layout="HWC")


def test_names_may_be_text(index, cache):
    one, ids = make(index, cache), [4, 0, 31]
    by_name, _ = one.dynamic(greys(), [index.files[i] for i in ids], 2)
    by_id, _ = one.dynamic(greys(), ids, 2)
    for first, second in zip(by_name.tensors, by_id.tensors, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("ids", [[], [1], [1, 2], [1, 2, 3, 4], [[1], [2]]])
def test_another_number_of_ids_is_refused(index, cache, ids):
    with pytest.raises(ValueError, match=rf"ids must have .* each of the 3 images, got {len(ids)}"):
        make(index, cache).dynamic(greys(), ids, 2)


def test_other_windows_are_refused(index, cache):
    one, whole = make(index, cache), [[0, 0]] * 3
    with pytest.raises(ValueError, match=r"window must have .* each of the 3 images, got 2"):
        one.dynamic(greys(), [1, 2, 3], 2, (whole, [[32, 32]] * 2, [[32, 32, 3]] * 3))
    with pytest.raises(ValueError, match=r"window must be \(start, size, shapes\), got 2 entries"):
        one.dynamic(greys(), [1, 2, 3], 2, (whole, [[32, 32]] * 3))


def test_what_is_no_batch_of_colour_images(index, cache):
    one = make(index, cache)
    for images in (np.zeros((3, 32, 32, 3), np.uint8), torch.zeros(3, 32, 32, 3), None):
        with pytest.raises(TypeError, match="images must be a Batch of DALI's dynamic mode, got "):
            one.dynamic(images, [1, 2, 3], 2)
    for channels in (1, 4):
        with pytest.raises(ValueError, match=f"must have 3 channels, got {channels}; decode them"):
            one.dynamic(greys(channels=channels), [1, 2, 3], 2)


@pytest.mark.parametrize("scale", [(1 / 127.5, -1), (1 / 255, 0)])
def test_images_that_are_no_grey_levels_are_refused(index, cache, scale):
    images = greys(dtype=np.float32) * scale[0] + scale[1]
    images = ndd.as_batch([np.asarray(one) for one in images.evaluate().tensors], layout="HWC")
    with pytest.raises(ValueError, match="images must be in grey levels 0 … 255 where mean is"):
        make(index, cache).dynamic(images, [1, 2, 3], 2)
    normalised = make(index, cache, mean=(0, 0, 0), std=(1, 1, 1))
    normalised.dynamic(images, [1, 2, 3], 2)
    make(index, cache).dynamic(greys(dtype=np.float32), [1, 2, 3], 2)


def test_ids_of_several_numbers_are_refused(index, cache):
    with pytest.raises(TypeError, match="ids must be one integer a sample, got 2 of int64"):
        make(index, cache).dynamic(greys(), np.array([[0, 1], [30, 2], [40, 3]]), 2)
