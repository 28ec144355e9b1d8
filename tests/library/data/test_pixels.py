"""Images in memory: from CIFAR's own files, from folders, and the real CIFAR-100 where it is.

SCAE_CIFAR100 names a zip of CIFAR-100's images, `train/<class>/*.png`; the default is
shared/data/cifar100.zip beside the checkout.
"""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from crops import write_pngs
from PIL import Image

from scae_dali.data.index import DatasetError, ImageIndex
from scae_dali.data.longtail import imbalanced
from scae_dali.data.pixels import ArrayImages, _allocate

DEFAULT = Path(__file__).parents[4] / "shared" / "data" / "cifar100.zip"
ZIP = Path(os.environ.get("SCAE_CIFAR100", DEFAULT))
MEAN_OF_CIFAR100 = (129.3, 124.1, 112.4)  # of the training images, RGB


def test_cifar_100_in_its_native_order(cifar):
    images = ArrayImages.from_cifar(cifar, "cifar100", train=True)
    assert images.index.files[:2] == ("train/00000", "train/00001")
    assert images.index.labels.tolist() == [0, 1, 2] * 4
    assert images.index.classes == ("apple", "bear", "clock")
    assert (len(images), images.index.root) == (12, "")
    assert repr(images) == "ArrayImages(12 samples of 32 x 32, 3 classes)"
    stored = pickle.loads((cifar / "cifar-100-python" / "train").read_bytes())["data"]
    assert (images.pixels == stored.reshape(12, 3, 32, 32).transpose(0, 2, 3, 1)).all()
    test = ArrayImages.from_cifar(cifar, "cifar100", train=False)
    assert (len(test), test.index.files[3]) == (4, "test/00003")


def test_cifar_10_is_read_from_all_its_batches(cifar):
    images = ArrayImages.from_cifar(cifar, "cifar10", train=True)
    assert (len(images), images.index.classes) == (60, ("plane", "car"))
    assert images.index.files[59] == "train/00059"


def test_pixels_are_read_only_and_contiguous(cifar):
    pixels = ArrayImages.from_cifar(cifar, "cifar100", train=True).pixels
    assert (pixels.dtype, pixels.shape) == (np.uint8, (12, 32, 32, 3))
    assert pixels.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        pixels[0] = 0


def test_a_subset_keeps_names_and_pixels_together(cifar):
    images = ArrayImages.from_cifar(cifar, "cifar100", train=True)
    part = images.subset([7, 2])
    assert part.index.files == ("train/00007", "train/00002")
    assert part.index.labels.tolist() == [1, 2]
    assert (part.pixels == images.pixels[[7, 2]]).all()
    assert part.index.classes == images.index.classes
    with pytest.raises(DatasetError, match="ids must lie in 0 … 11, got 12 … 12"):
        images.subset([12])


def test_cifar_that_is_missing_or_damaged_names_the_remedy(cifar, tmp_path, monkeypatch):
    message = (
        r"root='.*' lacks cifar-100-python/, or its files are not those published .*; download "
        r"them with torchvision.datasets.CIFAR100\('.*', download=True\), or name the folder"
    )
    with pytest.raises(DatasetError, match=message):
        ArrayImages.from_cifar(tmp_path / "nowhere", "cifar100", train=True)
    monkeypatch.undo()  # these files have other sums
    with pytest.raises(DatasetError, match=message):
        ArrayImages.from_cifar(cifar, "cifar100", train=True)
    with pytest.raises(DatasetError, match="name must be one of cifar10, cifar100; got 'mnist'"):
        ArrayImages.from_cifar(cifar, "mnist", train=True)


def test_what_is_given_is_checked():
    index = ImageIndex.from_arrays(["a", "b"], [0, 1])
    good = np.zeros((2, 4, 5, 3), np.uint8)
    assert ArrayImages(index, good).pixels.shape == (2, 4, 5, 3)
    assert good.flags.writeable
    for pixels, message in (
        (good.astype(np.float32), "must be a NumPy array of uint8, got float32; scale"),
        (good.tolist(), "must be a NumPy array of uint8, got list"),
        (good[0], r"shape \[N, H, W, 3\], got \(4, 5, 3\); transpose"),
        (np.zeros((2, 3, 4, 5), np.uint8), r"shape \[N, H, W, 3\], got \(2, 3, 4, 5\)"),
        (np.zeros((2, 0, 5, 3), np.uint8), r"shape \[N, H, W, 3\], got \(2, 0, 5, 3\)"),
        (good[:1], "pixels holds 1 images, index 2 samples"),
        (good[:, ::-1], r"must be C-contiguous, got strides .*; np.ascontiguousarray"),
    ):
        with pytest.raises(DatasetError, match=message):
            ArrayImages(index, pixels)


def test_a_folder_is_decoded_in_the_order_of_its_index(tmp_path):
    names = [f"{'ab'[i % 2]}/{i:03d}.png" for i in range(150)]  # more than two batches
    truth = write_pngs(tmp_path, dict.fromkeys(names, (6, 9)))
    index = ImageIndex(tmp_path)
    images = ArrayImages.from_index(index, threads=2)
    assert images.index is index
    assert (images.pixels == np.stack([truth[name] for name in index.files])).all()
    part = ArrayImages.from_index(index.subset([149, 3]), threads=1)
    assert (part.pixels == images.pixels[[149, 3]]).all()


def test_images_come_upright_and_in_colour(tmp_path):
    truth = write_pngs(tmp_path, {"a/1.png": (6, 9)})["a/1.png"]
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    turned = Image.fromarray(truth).transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "a" / "2.png", exif=exif)
    Image.fromarray(truth[..., 0]).save(tmp_path / "a" / "3.png")
    pixels = ArrayImages.from_index(ImageIndex(tmp_path), threads=1).pixels
    assert (pixels[1] == truth).all()
    assert (pixels[2] == truth[..., :1]).all()


@pytest.mark.parametrize("place", [1, 70])
def test_the_first_image_of_another_size_is_named(tmp_path, place):
    sizes = dict.fromkeys((f"a/{i:02d}.png" for i in range(80)), (6, 9))
    write_pngs(tmp_path, sizes | {f"a/{place:02d}.png": (9, 6), "a/79.png": (5, 5)})
    message = (
        rf"/a/{place:02d}.png' has 9 x 6 pixels \(height x width\), 'a/00.png' 6 x 9: in memory "
        r"all must have one size; resize the files, or read them from disk"
    )
    with pytest.raises(DatasetError, match=message):
        ArrayImages.from_index(ImageIndex(tmp_path), threads=1)


def test_a_broken_or_missing_file_is_named_as_in_training(tmp_path):
    write_images(tmp_path, {"a": 3})
    index = ImageIndex(tmp_path)
    path = tmp_path / "a" / "00.jpg"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DatasetError, match=r"(?s)a/00.jpg' is cut off.*Mend or remove it.*DALI"):
        ArrayImages.from_index(index, threads=1)
    path.unlink()
    with pytest.raises(DatasetError, match=r"a/00.jpg' cannot be read \(No such file"):
        ArrayImages.from_index(index, threads=1)


def test_what_exceeds_the_memory_is_refused():
    message = r"1000000 images of 100000 x 100000 pixels do not fit .*; read them from disk"
    with pytest.raises(DatasetError, match=message):
        _allocate((10**6, 10**5, 10**5, 3))


@pytest.mark.skipif(not ZIP.exists(), reason="no CIFAR-100; set SCAE_CIFAR100")
def test_the_real_cifar_100_long_tailed(tmp_path):
    with zipfile.ZipFile(ZIP) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith("train/") and n[-4:] == ".png")
        classes = sorted({name.split("/")[1] for name in names})
        labels = [classes.index(name.split("/")[1]) for name in names]
        whole = ImageIndex.from_arrays(names, labels, tmp_path, classes=classes)
        assert whole.class_counts.tolist() == [500] * 100
        index = whole.subset(imbalanced(whole.labels, 100, 100))
        archive.extractall(tmp_path, index.files)
    images = ArrayImages.from_index(index, threads=2)
    assert images.pixels.shape == (10847, 32, 32, 3)
    assert (index.class_counts.max(), index.class_counts.min()) == (500, 5)
    assert np.abs(images.pixels.mean((0, 1, 2)) - MEAN_OF_CIFAR100).max() < 5
    for i in range(0, len(index), 997):
        with Image.open(tmp_path / index.files[i]) as file:
            assert (images.pixels[i] == np.asarray(file.convert("RGB"))).all()
