import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tools import make_demo_data

SMALL = ["--classes=7", "--train-max=24", "--imbalance=12", "--val-per-class=2"]
SMALL += ["--size-range", "64", "90"]


def make(out: Path, *more: str) -> int:
    return make_demo_data.main(["--out", str(out), *SMALL, *more])


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "set"
    assert make(out) == 0
    return out


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_train_is_long_tailed_and_val_balanced(demo):
    def counts(split):
        return [len(list(folder.iterdir())) for folder in sorted((demo / split).iterdir())]

    assert counts("train") == [24, 16, 10, 7, 5, 3, 2]
    assert counts("val") == [2] * 7
    default = make_demo_data.train_counts(10, 200, 20.0)
    assert (default[0], default[-1], sum(default)) == (200, 10, 681)
    assert sum(n < 0.1 * default[0] for n in default) == 3  # tail classes


def test_the_same_seed_gives_the_same_bytes_and_another_others(demo, tmp_path):
    assert make(tmp_path / "again") == 0
    assert contents(tmp_path / "again") == contents(demo)
    assert make(tmp_path / "other", "--seed", "1") == 0
    same = contents(tmp_path / "other").items() & contents(demo).items()
    assert not same


def test_no_shape_or_colour_tells_the_class():
    designs = [make_demo_data.class_design(k) for k in range(10)]
    assert len(set(designs)) == 10
    for part in range(3):
        values = [design[part] for design in designs]
        assert min(values.count(value) for value in values) >= 2
    shapes_and_colours = {
        make_demo_data.class_design(k)[:2] for k in range(make_demo_data.MAX_CLASSES)
    }
    assert len(shapes_and_colours) == make_demo_data.MAX_CLASSES == 25


def test_shapes_fill_their_box_and_survive_a_flip():
    masks = {}
    for shape in make_demo_data.SHAPES:
        mask = np.asarray(make_demo_data.object_mask(shape, 30)).astype(int)
        assert all(edge.max() > 0 for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1])), shape
        assert np.abs(mask - mask[:, ::-1]).max() <= 64, shape  # a quarter of a border pixel
        masks[shape] = mask > 127
    for shape in masks:
        for other in masks:
            assert shape == other or (masks[shape] != masks[other]).mean() > 0.15


def test_boxes_lie_on_the_objects_of_the_upright_images(demo):
    objects = json.loads((demo / "objects.json").read_text())
    assert set(objects) == {name for name in contents(demo) if name.endswith(".jpg")}
    orientations, shapes = set(), set()
    for name, box in objects.items():
        with Image.open(demo / name) as stored:
            orientations.add(stored.getexif().get(0x0112, 1))
            image = np.asarray(ImageOps.exif_transpose(stored).convert("RGB")).astype(int)
        height, width = image.shape[:2]
        shapes.add((height, width))
        y, x, h, w = np.array(box) * (height, width, height, width)
        assert 0 <= y <= y + h <= height + 1e-3
        assert 0 <= x <= x + w <= width + 1e-3
        assert h == pytest.approx(w, abs=1e-3)
        assert 0.25 <= h / min(height, width) <= 0.38
        # Of the solid discs and triangles the lower middle is surely painted.
        _, colour, shape = name.split("/")[1].split("_")
        if int(name.split("/")[1][:2]) < 2:
            pixel = image[round(y + 0.7 * h), round(x + 0.5 * w)]
            assert np.abs(pixel - make_demo_data.COLOURS[colour]).max() < 60, (name, shape)
    assert orientations == {1, 3, 6, 8}
    assert len(shapes) > 20


def test_an_existing_set_is_kept_and_anything_else_refused(demo, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    assert make(demo) == 0
    assert "already there" in capsys.readouterr().out
    assert make(demo, "--seed", "1") == 1
    assert "not the complete data set of these parameters; give" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before
    (tmp_path / "mine.txt").touch()
    assert make(tmp_path) == 1
    assert f"{tmp_path} exists and is not" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_set_with_a_file_missing_is_not_taken_for_whole(tmp_path, capsys):
    assert make(tmp_path) == 0  # an empty folder will do
    assert "00_red_disc    24 1.000    2" in capsys.readouterr().out
    next((tmp_path / "val").rglob("*.jpg")).unlink()
    assert make(tmp_path) == 1
    assert "is not the complete data set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--classes 26", "--classes must be 2 … 25, got 26"),
        ("--imbalance 0.5", "--imbalance must be a finite number of at least 1, got 0.5"),
        ("--train-max 0", "--train-max and --val-per-class must be at least 1"),
        ("--size-range 90 64", r"--size-range must be 32 <= LOW <= HIGH pixels, got (90, 64)"),
    ],
)
def test_parameters_out_of_range_are_refused(tmp_path, capsys, option, message):
    assert make(tmp_path / "new", *option.split()) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
