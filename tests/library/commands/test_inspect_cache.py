"""scae-dali inspect-cache --picture: of files, of CIFAR, and without images."""

import sys

import numpy as np
import pytest
from conftest import fill_cache, run
from PIL import Image

from scae_dali.commands import cache_picture
from scae_dali.data.index import ImageIndex
from scae_dali.data.pixels import ArrayImages


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn: the arrays and the titles of all panels, in their order."""
    seen = []

    def keep(figure, path, **how):
        Image.new("RGB", (1, 1)).save(path)
        for axes in figure.get_axes():
            arrays = [image.get_array() for image in axes.images]
            if arrays or axes.texts:
                seen.append((axes.get_title(), arrays[0] if arrays else axes.texts[0].get_text()))

    monkeypatch.setattr(cache_picture.Figure, "savefig", keep)
    return seen


def test_classes_and_maps_beside_their_images(folder, index, cache, tmp_path, drawn):
    picture = tmp_path / "new" / "maps.png"
    options = ["--data", folder, "--picture", picture, "--classes", 2]
    assert "50 of 50 (100.00%)" in run("inspect_cache", cache.path, *options)
    assert picture.is_file()
    titles = [title for title, _ in drawn]
    assert titles[:3] == ["all maps", "a (30)", "b (15)"]
    maps = cache.snapshot().maps / 255
    for (_, mean), ids in zip(drawn[:3], (range(50), range(30), range(30, 45)), strict=True):
        np.testing.assert_allclose(mean, maps[ids].mean(0))
    assert len(drawn) == 3 + 4 * cache_picture.EXTREMES
    for (name, image), (title, map_) in zip(drawn[3::2], drawn[4::2], strict=True):
        sample = int(title.partition(":")[0])
        assert name == index.classes[index.labels[sample]]
        with Image.open(folder / index.files[sample]) as there:
            np.testing.assert_array_equal(image, there)
        np.testing.assert_array_equal(map_, cache.read([sample])[0][0])
    focus = [float(title.partition(": ")[2]) for title in titles[4::2]]
    most, least = focus[: cache_picture.EXTREMES], focus[cache_picture.EXTREMES :]
    assert most == sorted(most, reverse=True)
    assert least == sorted(least)
    assert most[-1] >= least[-1]


def test_a_picture_is_written(cache, folder, tmp_path):
    run("inspect_cache", cache.path, "--data", folder, "--picture", tmp_path / "maps.png")
    with Image.open(tmp_path / "maps.png") as picture:
        assert picture.width == 1200
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100


def test_without_images_there_are_maps_alone(cache, tmp_path, drawn):
    run("inspect_cache", cache.path, "--picture", tmp_path / "maps.png")
    assert drawn[0][0] == "all maps"
    assert len(drawn) == 1 + 2 * cache_picture.EXTREMES


def test_images_in_memory_and_images_that_are_gone(cifar, tmp_path, drawn):
    images = ArrayImages.from_cifar(cifar, "cifar10", train=True)
    made = fill_cache(tmp_path / "maps.lmdb", images.index, naming="path")
    picture = ["--picture", tmp_path / "maps.png"]
    run("inspect_cache", made.path, "--data", cifar, "--format", "cifar10", *picture)
    for (_, image), (title, _) in zip(drawn[3::2], drawn[4::2], strict=True):
        np.testing.assert_array_equal(image, images.pixels[int(title.partition(":")[0])])
    drawn.clear()
    (tmp_path / "list.txt").write_text("gone.jpg 0\nlost.jpg 1\n")
    index = ImageIndex.from_list(tmp_path / "list.txt", root=tmp_path)
    made = fill_cache(tmp_path / "gone.lmdb", index)
    run("inspect_cache", made.path, "--data", tmp_path, "--list", tmp_path / "list.txt", *picture)
    assert [what for _, what in drawn[3::2]] == ["no image"] * 4


def test_what_a_picture_needs(cache, folder, tmp_path, monkeypatch):
    picture = ["--picture", tmp_path / "maps.png"]
    said = run("inspect_cache", cache.path, "--data", tmp_path / "none", *picture, status=1)
    assert "error: " in said
    said = run("inspect_cache", cache.path, "--picture", tmp_path / "maps.doc", status=2)
    assert "--picture: must be a picture with a suffix such as .png" in said
    said = run("inspect_cache", cache.path, "--picture", "/proc/no/maps.png", status=2)
    assert "--picture: must be a file that can be written, got '/proc/no/maps.png'" in said
    said = run("inspect_cache", cache.path, "--data", folder, status=2)
    assert "--data is for the picture; give --picture FILE.png too" in said
    said = run("inspect_cache", cache.path, "--classes", 5, status=2)
    assert "--classes is for the picture; give --picture FILE.png too" in said
    for option, value in [("--label-field", "y"), ("--format", "cifar10"), ("--list", "l.txt")]:
        said = run("inspect_cache", cache.path, option, value, *picture, status=2)
        assert f"{option} is about the images in --data; give --data DIR too" in said
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    said = run("inspect_cache", cache.path, *picture, status=2)
    assert "--picture: needs matplotlib; pip install 'scae-dali[train]'" in said
