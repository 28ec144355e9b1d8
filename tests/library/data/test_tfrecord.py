"""What is found in a TFRecord file, and what is wrong with it."""

import gzip

import numpy as np
import pytest
from packs import feature, field, record

from scae_dali.data.scan import DatasetError
from scae_dali.data.tfrecord import scan_tfrecord

JPEG = b"\xff\xd8 an image"


def write(tmp_path, *records):
    path = tmp_path / "r.tfrecord"
    path.write_bytes(b"".join(records))
    return str(path)


def example(label, image=JPEG, **more):
    return record({"image/encoded": feature(image), "image/class/label": label, **more})


def test_images_labels_and_names(tmp_path):
    """Packed or not, large and negative, whatever else is in a record."""
    images = [JPEG * n for n in (1, 20, 3000)]
    records = [
        example(feature(7), images[0]),
        example(feature(1000, packed=False), images[1], other=feature(*range(300))),
        record(
            {
                "float": field(2, field(1, np.float32([1, 2]).tobytes())),
                "single": field(2, b"\x0d" + np.float32(1).tobytes()),
                "empty": b"",
                "image/class/label": feature(-1),
                "image/encoded": feature(images[2]),
            }
        ),
    ]
    path = write(tmp_path, *records)
    found = scan_tfrecord(path)
    begins = np.cumsum([0, *map(len, records)])
    assert found.names == [f"at index {at}" for at in begins[:3]]
    assert found.labels.tolist() == [7, 1000, -1]
    data = b"".join(records)
    assert [data[at : at + size] for at, size in found.where.tolist()] == images


def test_other_features(tmp_path):
    path = write(tmp_path, record({"image": feature(JPEG), "label": feature(5)}))
    assert scan_tfrecord(path, "image", "label").labels.tolist() == [5]
    with pytest.raises(
        DatasetError,
        match=r"r.tfrecord', the record at byte 0: it has no feature 'image/encoded', but 'image', "
        r"'label'; image= names another \(train.py: --data.image_field\)",
    ):
        scan_tfrecord(path)
    with pytest.raises(DatasetError, match=r"no feature 'y', but .* label= names .*label_field\)"):
        scan_tfrecord(path, "image", "y")
    for image, label, name in [("label", "label", "label"), ("image", "image", "image")]:
        with pytest.raises(DatasetError, match=rf"the feature '{name}' must hold "):
            scan_tfrecord(path, image, label)


@pytest.mark.parametrize("values", [(), (1, 2)])
def test_a_label_is_one_number_and_an_image_one_text(tmp_path, values):
    with pytest.raises(DatasetError, match="'image/class/label' must hold one integer, the number"):
        scan_tfrecord(write(tmp_path, example(feature(*values))))
    images = field(1, b"".join(field(1, JPEG) for _ in values))
    path = write(tmp_path, record({"image/encoded": images, "image/class/label": feature(1)}))
    with pytest.raises(DatasetError, match="'image/encoded' must hold the bytes of one image"):
        scan_tfrecord(path)


def test_an_empty_file_has_no_samples(tmp_path):
    found = scan_tfrecord(write(tmp_path))
    assert (found.names, found.labels.shape, found.where.shape) == ([], (0,), (0, 2))


def test_files_that_are_cut_off_or_no_records_are_told(tmp_path):
    whole = example(feature(1)) + example(feature(2))
    first = len(example(feature(1)))
    for kept in (5, first - 1, first + 3, len(whole) - 4):
        at = 0 if kept < first else first
        with pytest.raises(DatasetError, match=rf"is cut off within the record at byte {at}, or"):
            scan_tfrecord(write(tmp_path, whole[:kept]))
    with pytest.raises(DatasetError, match="is cut off within the record at byte 0, or is no TFR"):
        scan_tfrecord(write(tmp_path, JPEG * 100))
    with pytest.raises(DatasetError, match=r"is compressed by gzip, .*; decompress it"):
        scan_tfrecord(write(tmp_path, gzip.compress(whole)))


@pytest.mark.parametrize(
    "buffer",
    [
        b"\x0f",  # of no kind that there is
        b"\x0a\x7f\x00",  # longer than the record
        b"\x0a" + b"\xff" * 11,  # a number that does not end
        b"\x0a\x03\x0a\x05a",  # longer than what it is in
    ],
)
def test_a_record_that_is_no_example_is_named(tmp_path, buffer):
    length = len(buffer).to_bytes(8, "little")
    path = write(tmp_path, example(feature(1)), length + bytes(4) + buffer + bytes(4))
    at = len(example(feature(1)))
    with pytest.raises(DatasetError, match=rf"the record at byte {at}: it is no tf.train.Example"):
        scan_tfrecord(path)
