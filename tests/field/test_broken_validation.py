"""An image of validation that does not decode was found when an epoch had been trained, which
was lost; the advice, --data.exclude, acts on training files. Others asked for checkpoints before
validation, and for the validation that a crash left out:
https://github.com/facebookresearch/fairseq/issues/2140,
https://github.com/open-mmlab/mmengine/issues/1394
"""

import shutil

import numpy as np
import pytest
import tiny_run
import torch
from PIL import Image
from tiny_run import arguments, assert_same_run, rows, start

import train
from pipelines.data import DataConfig
from scae_dali.data import broken
from scae_dali.data.index import ImageIndex
from scae_dali.training import log as metrics

images, tiny, whole = tiny_run.images, tiny_run.tiny, tiny_run.whole  # fixtures


@pytest.fixture
def copy(images, tmp_path):
    return shutil.copytree(images, tmp_path / "data")


def spoil(path):
    """Sound to look at; no decoder takes it."""
    data = path.read_bytes()
    start = data.find(b"IDAT") + 4
    path.write_bytes(data[:start] + b"\xff" * 24 + data[start + 24 :])


@pytest.fixture(scope="module")
def fewer(images, tmp_path_factory):
    """A run that never had the image that others find broken."""
    root = tmp_path_factory.mktemp("fewer")
    (root / "broken.txt").write_text("b/01.png\n")
    with pytest.MonkeyPatch.context() as patch:
        tiny.__wrapped__(patch)
        start(*arguments(images, root / "run", **{"data.val_exclude": root / "broken.txt"}))
    return root


@pytest.mark.parametrize("remedy", ["exclude", "remove", "mend"])
def test_the_epoch_before_a_broken_image_is_kept_and_validated_after_the_remedy(
    copy, whole, fewer, tmp_path, remedy
):
    path, out = copy / "val" / "b" / "01.png", tmp_path / "run"
    sound = path.read_bytes()
    spoil(path)
    argv = arguments(copy, out)
    for flags in [(), ("--resume",)][: 1 + (remedy == "exclude")]:
        with pytest.raises(SystemExit, match=r"val/b/01.png' does not decode") as error:
            start(*argv, *flags)
        assert "--data.val_exclude" in str(error.value)
        assert "--data.exclude" not in str(error.value)
    if remedy == "exclude":
        argv.append(f"--data.val_exclude={fewer / 'broken.txt'}")
    elif remedy == "remove":
        path.unlink()
    else:
        path.write_bytes(sound)
    start(*argv, "--resume")
    assert [row["epoch"] for row in rows(out)] == [0, 1]
    assert_same_run(out, whole if remedy == "mend" else fewer / "run")


def test_a_look_at_the_files_before_the_run_names_all_that_it_finds(copy, tmp_path):
    (copy / "val" / "a" / "00.png").write_bytes(b"")
    (copy / "val" / "c" / "01.png").write_bytes(b"GIF89a")
    out = tmp_path / "run"
    with pytest.raises(SystemExit, match="2 of the 6 validation images are broken") as error:
        start(*arguments(copy, out))
    for said in ("val/a/00.png' is empty", "val/c/01.png' is no image", "--data.val_exclude"):
        assert said in str(error.value)
    assert [path.name for path in out.iterdir()] == ["run.lock"]


def test_leaving_out_acts_on_one_split(copy, tmp_path):
    """Names are the same in both, as cameras number them."""
    listed = tmp_path / "broken.txt"
    listed.write_text("a/01.png\n")
    data = DataConfig(root=str(copy), val_exclude=str(listed)).open()
    assert "a/01.png" in data.train.files
    assert "a/01.png" not in data.val.files
    assert data.val.classes == data.train.classes
    data = DataConfig(root=str(copy), exclude=str(listed)).open()
    assert "a/01.png" in data.val.files
    held = DataConfig(root=str(copy), holdout=2).open()
    listed.write_text(held.val.files[0])
    fewer = DataConfig(root=str(copy), holdout=2, val_exclude=str(listed)).open()
    assert fewer.val.files == held.val.files[1:]
    assert fewer.train.fingerprint == held.train.fingerprint
    listed.write_text("a/77.png\n")
    with pytest.raises(ValueError, match=r"data.val_exclude='.*', of validation: exclude names 1"):
        DataConfig(root=str(copy), val_exclude=str(listed)).open()


def test_in_memory_the_remedy_is_that_of_the_split_too(copy):
    spoil(copy / "val" / "b" / "01.png")
    with pytest.raises(ValueError, match=r"b/01.png' does not decode(?s:.*)--data.val_exclude"):
        DataConfig(root=str(copy), in_memory=True).open()


class KilledError(BaseException):
    pass


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (train.Run, "finish_epoch", 0),
        (train.Run, "finish_epoch", 1),
        (metrics.Log, "write", 1),  # validated, not written
        (train.Run, "saliency_pass", 1),  # written, nothing saved since
        (train.Run, "save", 1),  # trained, not saved
    ],
)
def test_killed_anywhere_around_validation_a_run_ends_as_if_undisturbed(
    images,
    whole,
    tmp_path,
    monkeypatch,
    owner,
    name,
    calls,
):
    out = tmp_path / "killed"
    original, left = getattr(owner, name), iter(range(calls))

    def killing(*given, **named):
        if next(left, None) is None:
            raise KilledError
        return original(*given, **named)

    argv = arguments(images, out)
    monkeypatch.setattr(owner, name, killing)
    with pytest.raises(KilledError):
        start(*argv)
    monkeypatch.setattr(owner, name, original)
    start(*argv, "--resume")
    assert_same_run(out, whole)
    saved = [torch.load(o / "checkpoint.pt", weights_only=True) for o in (out, whole)]
    assert saved[0]["epoch"] == saved[1]["epoch"] == 2


def test_a_broken_image_of_training_tells_what_a_run_under_way_can_do(copy, tmp_path):
    spoil(copy / "train" / "b" / "01.png")
    with pytest.raises(SystemExit, match=r"--data.exclude(?s:.*)put a sound one in the place"):
        start(*arguments(copy, tmp_path / "run"))


def test_what_looks_broken_and_decodes_is_sound(tmp_path, monkeypatch):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (24, 24, 3), np.uint8))
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "0.tiff", big_tiff=True)
    image.save(tmp_path / "a" / "1.jpg")
    whole = (tmp_path / "a" / "1.jpg").read_bytes()
    (tmp_path / "a" / "1.jpg").write_bytes(whole[:-2] + bytes(16))  # no end marker
    index = ImageIndex(tmp_path)
    assert [name for name, _ in broken.faults(index)] == ["a/1.jpg"]
    broken.look(index, 5.0)
    for number in range(3):
        (tmp_path / "a" / f"{number + 2}.jpg").write_bytes(whole[: 100 + number])
    monkeypatch.setattr(broken, "_NAMED_AT_ONCE", 2)
    with pytest.raises(
        ValueError, match=r"^at least 3 of the 5 .*(?s:.*)a/3.jpg' is cut(?s:.*)and"
    ):
        broken.look(ImageIndex(tmp_path), 5.0)
