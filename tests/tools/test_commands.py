"""show_erasing.py and pointing_game.py as they are run, on a few drawn images."""

import json

import numpy as np
import pytest
from conftest import run
from PIL import Image

from scae_dali.cache import SaliencyCache
from scae_dali.data.index import ImageIndex


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Six images of two classes, one of them stored rotated and one grey."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(6):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        image = coarse.resize((96, 64 + 8 * i)).convert("L" if i == 1 else "RGB")
        exif = image.getexif()
        exif[0x0112] = 6 if i == 0 else 1
        path = root / "data" / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, exif=exif)
    return root / "data"


@pytest.fixture(scope="module")
def maps(images):
    index = ImageIndex(images)
    cache = SaliencyCache.create(images.parent / "maps.lmdb", index, grid=(7, 7))
    saliency = np.random.default_rng(0).integers(0, 256, (len(index) - 1, 7, 7), dtype=np.uint8)
    cache.begin_pass(0)
    cache.write(np.arange(len(index) - 1), saliency, epoch=0)  # the last image has none
    cache.close()
    return images.parent / "maps.lmdb"


def test_pointing_game(tmp_path, images, maps):
    """All of the frame is the object: every usable map hits, and so would chance."""
    index = ImageIndex(images)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(images)
    objects = {f"train/{name}": [0.0, 0.0, 1.0, 1.0] for name in index.files}
    known, out = tmp_path / "data" / "objects.json", tmp_path / "new" / "game.json"
    known.write_text(json.dumps(objects))
    run("pointing_game", "--data", tmp_path / "data", "--cache", maps, "--json", out)
    figures = json.loads(out.read_text())
    assert (figures["hit_rate"], figures["chance"]) == (1, 1)
    assert (figures["images"], figures["usable_maps"] > 0.5) == (len(index), True)
    known.write_text("{}")
    said = run("pointing_game", "--data", tmp_path / "data", "--cache", maps, status=1)
    assert "objects.json in" in said
    assert "none of 'train/class0/0.jpg'" in said


def test_pointing_game_with_a_file_of_boxes(tmp_path, images):
    """Four images with boxes, two of them hit; by hand. Peaks lie at (y, x) = (0.25, 0.75)."""
    index = ImageIndex(images)
    cache = SaliencyCache.create(tmp_path / "maps.lmdb", index, grid=(2, 2))
    cache.begin_pass(0)
    one = np.array([[1, 9], [0, 2]], np.uint8)
    cache.write(np.arange(len(index)), np.repeat(one[None], len(index), 0), epoch=0)
    cache.close()
    assert list(index.files[:2]) == ["class0/0.jpg", "class0/2.jpg"]
    boxes, out = tmp_path / "boxes.txt", tmp_path / "game.json"
    # 0.jpg is 64 px wide and 96 high once it is upright, 2.jpg is 96x80, 1.jpg 96x72, 3.jpg 96x88.
    lines = [
        "class0/0.jpg 32 0 64 48",  # a hit, and a quarter
        f"{images.name}/class0/2.jpg 0 0 48 80",  # a miss, and half, from the folder above
        "class1/1.jpg 0 0 24 72",  # a miss, …
        "class1/1.jpg 48 0 96 36",  # and a hit: a quarter and a quarter
        "class1/3.jpg 0 0 48 44",  # a miss: boxes that overlap
        "class1/3.jpg 0 33.0 96 88",
        "class1/none.jpg 0 0 1 1",
    ]
    boxes.write_text("\n".join(lines) + "\n\n")
    argv = ("--data", images, "--cache", tmp_path / "maps.lmdb", "--boxes", boxes)
    said = run("pointing_game", *argv, "--json", out)
    figures = json.loads(out.read_text())
    assert (figures["images"], figures["usable_maps"], figures["hit_rate"]) == (4, 1, 0.5)
    overlap = 0.25 + 0.625 - 0.0625
    assert figures["chance"] == pytest.approx((0.25 + 0.5 + 0.5 + overlap) / 4)
    assert "50.0% of 100.0% usable maps hit" in said


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("class0/2.jpg 1 2 3", "line 1: 'class0/2.jpg 1 2 3' is not `path x0 y0 x1 y1`"),
        ("class0/2.jpg 5 0 2 9", "the box (5, 0, 2, 9) must lie in its image, 96x80 px, with x0"),
        ("class0/0.jpg 0 0 96 64", "must lie in its image, 64x96 px"),
        ("else.jpg 0 0 1 1", "has no box of an image in"),
    ],
)
def test_wrong_boxes_are_refused(tmp_path, images, maps, line, told):
    (tmp_path / "boxes.txt").write_text(line)
    argv = ("--data", images, "--cache", maps, "--boxes", tmp_path / "boxes.txt")
    assert told in run("pointing_game", *argv, status=1)


def test_show_erasing(tmp_path, images, maps):
    sheet = tmp_path / "sheet.png"
    out = run(
        "show_erasing",
        *("--data", images, "--cache", maps, "--ids", "0,5", "--lam", "0,3", "--out", sheet),
    )
    rotated, unmapped = out.splitlines()[:2]
    assert rotated.startswith("0 class0/0.jpg 96x64 ")  # upright
    assert "λ=3" in rotated
    assert "no map" in unmapped
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        assert image.size == (1100, 440)


def test_show_erasing_erases_images_of_the_tail_too(tmp_path, tailed, tailed_cache):
    options = ["--data", tailed.root, "--cache", tailed_cache.path, "--size", 24, "--lam", "0,3"]
    tail = np.flatnonzero(tailed.labels >= 2).tolist()
    ids = [*range(0, 56, 6), *tail]
    some = ["--ids", ",".join(map(str, ids)), "--out", tmp_path / "sheet.png"]
    lines = [line for line in run("show_erasing", *options, *some).splitlines() if "λ=" in line]
    assert len(lines) == len(ids) == 10 + 7
    assert not any(", 0, 0)" in line for line in lines)


@pytest.mark.parametrize("method", ["cmo", "cutmix", "random_erasing"])
def test_show_erasing_shows_other_methods(tmp_path, tailed, tailed_cache, method):
    sheet = tmp_path / "sheet.png"
    options = ["--data", tailed.root, "--cache", tailed_cache.path, "--size", 24, "--ids", "0,9,60"]
    out = run("show_erasing", *options, "--method", method, "--out", sheet)
    assert sum(f" {method} (" in line for line in out.splitlines()) == 3
    with Image.open(sheet) as image:
        assert image.size == (660, 660)
    said = run("show_erasing", *options, "--method", method, "--lam", 3, "--out", sheet, status=2)
    assert f"--lam is for scae alone, got --method {method}: leave it out" in said


def test_show_erasing_without_a_cache(tmp_path, images):
    out = run(
        "show_erasing",
        *("--data", images, "--cache", tmp_path / "none.lmdb", "--out", tmp_path / "sheet.png"),
        status=1,
    )
    assert f"scae-dali build-cache --data {images} --model" in out
