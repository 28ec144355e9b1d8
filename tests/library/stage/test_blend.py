"""The blend of images and their partners on the CPU, against NumPy and DALI's arithmetic."""

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def

from scae_dali.stage.blend import blend, blended

RANDOM = np.random.default_rng(0)
MU = np.array([0, 1, 0.5, 0.3, 0.999999, 1e-7], np.float32)


def pictures(dtype=np.uint8):
    return RANDOM.integers(0, 256, (6, 9, 7, 3)).astype(dtype)


def oracle(images, partners, mu):
    mu = mu[:, None, None, None].astype(np.float64)
    return mu * images + (1 - mu) * partners


def test_grey_levels_are_rounded_to_the_nearest():
    images, partners = pictures(), pictures()
    got = np.stack(blended(list(images), list(partners), list(MU)))
    assert got.dtype == np.uint8
    assert np.abs(got - oracle(images, partners, MU)).max() <= 0.5 + 1e-4
    np.testing.assert_array_equal(got[0], partners[0])
    np.testing.assert_array_equal(got[1], images[1])


def test_the_images_that_are_given_are_left_as_they_are():
    images, partners = pictures(), pictures()
    before = images.copy(), partners.copy()
    blended(list(images), list(partners), list(MU))
    np.testing.assert_array_equal(images, before[0])
    np.testing.assert_array_equal(partners, before[1])


def test_some_images_in_place():
    images, partners = pictures(), pictures()[:3]
    which, mu = np.array([4, 0, 2]), np.array([0.25, 0.6, 1.0])
    expected = images.copy()
    expected[which] = blended(list(images[which]), list(partners), list(mu))
    blend(images, which, partners, mu)
    np.testing.assert_array_equal(images, expected)
    blend(images, which[:0], partners[:0], mu[:0])
    np.testing.assert_array_equal(images, expected)
    with pytest.raises(ValueError, match=r"must have one length, got \(3, 2, 3\)"):
        blend(images, which, partners[:2], mu)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"which": np.array([4, 0, 6])}, r"positions of \d images, got 0 … 6"),
        ({"which": np.array([4, -1, 2])}, r"got -1 … 4"),
        ({"partners": pictures()[:3, :2]}, "partners must have the shape of images"),
        ({"partners": pictures(np.float32)[:3]}, "must be uint8"),
        ({"images": pictures()[:, ::-1]}, "images C-contiguous"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_and_nothing_is_changed(change, message):
    given = {"images": pictures(), "which": np.array([4, 0, 2]), "partners": pictures()[:3]}
    given |= change
    before = given["images"].copy()
    with pytest.raises(ValueError, match=message):
        blend(**given, mu=np.array([0.25, 0.6, 1.0]))
    np.testing.assert_array_equal(given["images"], before)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int16, np.int32, np.uint16])
def test_other_types(dtype):
    images, partners = pictures(dtype), pictures(dtype)
    got = np.stack(blended(list(images), list(partners), list(MU)))
    assert got.dtype == dtype
    near = 0.5 if np.issubdtype(dtype, np.integer) else 0.1 if dtype == np.float16 else 0
    assert np.abs(got - oracle(images, partners, MU)).max() <= near + 1e-3


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_it_is_what_dali_computes(dtype):
    images, partners = pictures(dtype), pictures(dtype)

    @pipeline_def(batch_size=6, num_threads=1, device_id=None)
    def define():
        one, other, mu = (
            fn.external_source(source=[list(values)] * 9, layout=layout)
            for values, layout in ((images, "HWC"), (partners, "HWC"), (MU, ""))
        )
        return fn.cast_like(one * mu + other * (1.0 - mu), one)

    theirs = define().run()[0].as_array()
    ours = np.stack(blended(list(images), list(partners), list(MU)))
    assert np.abs(ours.astype(np.float64) - theirs).max() <= (1e-4 if dtype == np.float32 else 0)


@pytest.mark.parametrize("shape", [(20, 20, 3), (9, 7, 1), (7, 9, 3)])
def test_images_of_other_shapes_are_refused(shape):
    images = pictures()[:1]
    with pytest.raises(ValueError, match=r"must be of one size where they are mixed.*resize them"):
        blended(list(images), [np.zeros(shape, np.uint8)], [MU[2]])
