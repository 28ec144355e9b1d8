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
