"""tools/make_longtail.py: the list it writes, what it prints, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest

from pipelines.data import DataConfig
from scae_dali.data.index import ImageIndex
from tools import make_longtail


@pytest.fixture
def run(capsys):
    """Its status and the lines of what it said."""

    def run(*arguments):
        status = make_longtail.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return status, (said.err if status else said.out).splitlines()

    return run


@pytest.fixture
def data(tmp_path) -> Path:
    """3 classes of 160 empty files, and a folder to validate on."""
    root = tmp_path / "data"
    for name, count in {"train": 160, "test": 1}.items():
        for k in ("a ü", "c", "d"):
            (root / name / k).mkdir(parents=True)
            for i in range(count):
                (root / name / k / f"{i:03d}.png").touch()
    return root


def test_the_list_is_what_the_config_takes_from_the_folder(run, data, tmp_path):
    out = tmp_path / "lt.txt"
    status, _ = run("--data", data, "--split", "train", "--imbalance", 16, "--out", out)
    assert status == 0
    assert out.read_text(encoding="utf-8").startswith("train/a ü/000.png 0\n")
    listed = DataConfig(root=str(data), train_list=str(out), val_dir="test").open().train
    assert listed.class_counts.tolist() == [160, 40, 10]
    taken = DataConfig(root=str(data), val_dir="test", imbalance=16).open().train
    assert sorted(listed.files) == sorted(f"train/{name}" for name in taken.files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "lt.txt"]


def test_a_folder_of_classes_needs_no_split(run, data, tmp_path):
    out = tmp_path / "lt.txt"
    folder = data / "train"
    assert run("--data", folder, "--imbalance", 2, "--out", out, "--seed", 1)[0] == 0
    first = ImageIndex.from_list(out, root=folder)
    assert set(first.files) < set(ImageIndex(folder).files)
    assert run("--data", folder, "--imbalance", 2, "--out", out, "--force")[0] == 0
    assert ImageIndex.from_list(out).fingerprint != first.fingerprint


def test_the_profile_is_printed(run, data, tmp_path):
    _, lines = run("--data", data / "train", "--imbalance", 16, "--out", tmp_path / "lt.txt")
    assert lines == [
        "3 classes, 210 images; a class has 160 … 10",
        "  many, > 100        1 classes,  76.2% of the images",
        "  medium, 20-100     1 classes,  19.0% of the images",
        "  few, < 20          1 classes,   4.8% of the images",
        "     0 - 0       160.0 " + "█" * 50,
        "     1 - 1        40.0 " + "█" * 12,
        "     2 - 2        10.0 " + "█" * 3,
        f"listed in {tmp_path}/lt.txt",
    ]


def test_many_classes_share_a_line():
    lines = list(make_longtail.describe(np.arange(1000, 0, -1)))
    assert len(lines) == 24
    assert lines[4] == "     0 - 49      975.5 " + "█" * 49
    assert lines[-1] == "   950 - 999      25.5 █"


def test_a_file_is_not_overwritten_unasked(run, data, tmp_path):
    out = tmp_path / "lt.txt"
    out.write_text("mine")
    arguments = ("--data", data / "train", "--imbalance", 2, "--out", out)
    assert run(*arguments) == (2, [f"error: --out {out} exists; give --force to overwrite it"])
    assert out.read_text() == "mine"
    assert run(*arguments, "--force")[0] == 0
    assert out.read_text() != "mine"


def test_what_cannot_be_listed_is_refused_and_nothing_is_left(run, data, tmp_path):
    out = tmp_path / "lt.txt"
    for more, message in (
        (("--imbalance", 0.5), "imbalance must be at least 1"),
        (("--imbalance", 1000), "imbalance=1000 leaves no sample of class 2, which has 160"),
        (("--imbalance", 2, "--split", "x"), "/x' does not exist; give the folder"),
        (("--imbalance", 2, "--split", ""), "holds the splits 'test', 'train', not classes"),
        (("--imbalance", 2, "--seed", -1), "seed must be in [0, 2^32), got -1"),
    ):
        status, lines = run("--data", data, "--split", "train", "--out", out, *more)
        assert (status, len(lines)) == (2, 1)
        assert message in lines[0]
    (data / "train" / "c" / "1\n2.png").touch()
    arguments = ("--data", data, "--split", "train", "--imbalance", 1, "--out", out)
    assert "has a line break, which no list can hold; rename it" in run(*arguments)[1][0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
