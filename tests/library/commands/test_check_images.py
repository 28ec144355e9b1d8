"""scae-dali check-images: which files it names, what it writes, how it ends."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TOOLS, write_images
from packs import pack_tars

from scae_dali.commands import check_images
from scae_dali.data.index import ImageIndex


@pytest.fixture
def run(monkeypatch, capsys):
    """Its status, and the lines that it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["check_images.py", *map(str, arguments)])
        status = check_images.main()
        said = capsys.readouterr()
        return status, [*said.out.splitlines(), *(said.err.splitlines() if status == 2 else [])]

    return run


@pytest.fixture
def data(tmp_path) -> Path:
    """80 images, of which one is cut off and two have damaged tables: only a decoder finds them."""
    root = tmp_path / "train"
    write_images(root, {"a": 70, "b": 10})
    for name, start, junk in [("a/69", 5, b"\xff"), ("b/00", 5, b"\xff"), ("b/09", 0, b"")]:
        path = root / f"{name}.jpg"
        whole = path.read_bytes()
        if junk:
            place = whole.find(b"\xff\xc4") + start
            path.write_bytes(whole[:place] + junk * 16 + whole[place + 16 :])
        else:
            path.write_bytes(whole[:-40])
    return root


def test_the_bytes_alone(run, data, tmp_path):
    status, lines = run("--data", data, "--out", tmp_path / "broken.txt")
    assert lines == [
        "b/09.jpg is cut off (a JPEG without an end marker)",
        f"1 of 80 images are broken; listed in {tmp_path}/broken.txt",
    ]
    assert status == 1
    assert (tmp_path / "broken.txt").read_text() == "b/09.jpg\n"


def test_decoding_finds_the_rest_and_the_list_is_what_exclude_takes(run, data, tmp_path):
    status, lines = run("--data", data, "--decode", "--out", tmp_path / "broken.txt")
    assert lines[:-1] == [
        "b/09.jpg is cut off (a JPEG without an end marker)",
        "a/69.jpg does not decode",
        "b/00.jpg does not decode",
    ]
    assert status == 1
    assert (tmp_path / "broken.txt").read_text() == "a/69.jpg\nb/00.jpg\nb/09.jpg\n"
    index = ImageIndex(data, exclude=tmp_path / "broken.txt")
    assert index.class_counts.tolist() == [69, 8]
    (tmp_path / "sound.txt").write_text("".join(f"{name} 0\n" for name in index.files))
    status, lines = run("--data", data, "--list", tmp_path / "sound.txt", "--decode")
    assert (status, lines) == (0, ["0 of 77 images are broken"])


def test_a_failing_batch_is_halved_down_to_its_files(monkeypatch):
    """Against a decoder that fails at given images; every image is settled once."""
    bad, calls = {0, 1, 40, 127, 128, 255, 299}, []

    def decoded(index, ids, threads):
        calls.append(len(ids))
        wrong = [place for place, i in enumerate(ids) if i in bad]
        batch = min(check_images.BATCH, len(ids))
        return wrong[0] // batch * batch if wrong else len(ids)

    monkeypatch.setattr(check_images, "decoded", decoded)
    monkeypatch.setattr(check_images, "CHUNK", 128)
    settled: list[int] = []
    found = list(check_images.undecodable(None, range(300), 1, settled.append))
    assert found == sorted(bad)
    assert sum(settled) == 300
    assert len(calls) < 100


def test_the_count_of_decoded_images_is_of_whole_batches(data):
    index = ImageIndex(data)
    ids = np.arange(80)
    assert check_images.decoded(index, ids, 2) == 64  # the third batch fails, at image 69
    assert check_images.decoded(index, ids[:40], 2) == 40
    assert check_images.decoded(index, ids[69:70], 2) == 0


def test_errors_that_are_no_images_fault(run, tmp_path):
    status, lines = run("--data", tmp_path / "nowhere")
    assert status == 2
    assert lines[-1].startswith(f"error: root='{tmp_path}/nowhere' does not exist; give the folder")


def test_the_root_of_train_and_val(run, data):
    (data / "a" / "69.jpg").rename(data.parent / "cut.jpg")
    write_images(data.parent / "val", {"a": 2, "b": 1})
    status, lines = run("--data", data.parent)
    assert (status, lines[-1]) == (1, "1 of 79 images are broken")
    assert run("--data", data.parent, "--split", "val") == (0, ["0 of 3 images are broken"])
    status, lines = run("--data", data.parent, "--split", "test")
    assert status == 2
    assert f"root='{data.parent}/test' does not exist" in lines[-1]


def test_from_the_command_line(data):
    command = [sys.executable, "-W", "error", TOOLS / "check_images.py", "--data", data]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert done.stdout.endswith("\n1 of 80 images are broken\n")
    assert "bytes: 100%" in done.stderr


def test_images_in_tars(run, data, tmp_path):
    """Those that are cut off are seen by their bytes, the others by decoding."""
    index = ImageIndex(data)
    pattern = pack_tars(index, tmp_path / "tars", archives=2)
    options = ("--data", tmp_path / "tars", "--format", "webdataset")
    status, lines = run(*options, "--archives", pattern, "--decode", "--out", tmp_path / "bad.txt")
    assert lines[:-1] == [
        "train-0001.tar/b/09.jpg is cut off (a JPEG without an end marker)",
        "train-0001.tar/a/69.jpg does not decode",
        "train-0001.tar/b/00.jpg does not decode",
    ]
    assert status == 1
    tars = ImageIndex.from_webdataset(pattern, tmp_path / "tars", exclude=tmp_path / "bad.txt")
    assert tars.class_counts.tolist() == [69, 8]
    status, lines = run(*options)
    assert (status, lines[0][:40]) == (2, "error: --archives must name the archives")
    status, lines = run(*options, "--archives", pattern, "--split", "val")
    assert (status, lines[0][:37]) == (2, "error: --split is for --format folder")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--archives", "b-*.tar"],
            "--archives is for --format webdataset or tfrecord, got 'b-",
        ),
        (
            ["--first-label", "0"],
            "--first-label is for --format webdataset or tfrecord, got 0",
        ),
        (["--index-cache", "kept"], "--index-cache is for --format webdataset or tfrecord, got"),
        (
            ["--format", "webdataset", "--archives", "x", "--image-field", "image/encoded"],
            "--image-field is for --format tfrecord, got 'image/encoded' with --format webdataset; "
            "leave it out, or give another --format",
        ),
        (
            ["--format", "tfrecord", "--archives", "x", "--list", "l"],
            "--list is for --format fold",
        ),
    ],
)
def test_options_of_another_format_are_refused(run, data, options, message):
    status, lines = run("--data", data, *options)
    assert status == 2
    assert lines[-1].startswith(f"error: {message}")


def test_a_list_and_a_split_exclude_each_other(run, data, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--data", data, "--list", "l.txt", "--split", "val")
    assert "argument --split: not allowed with argument --list" in capsys.readouterr().err
