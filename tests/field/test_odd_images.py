"""Images of unusual formats, names that are no images, and lists that lead nowhere.

PGM files were left out of a data set without a word, since torchvision lists them and we did not:
https://github.com/pytorch/vision/blob/main/torchvision/datasets/folder.py. The others were found by
trying.
"""

import os
import re
import shutil

import numpy as np
import pytest
from conftest import write_images
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from pipelines.data import DataConfig, open_data
from scae_dali.commands import build_cache, check_images
from scae_dali.commands.images import open_images
from scae_dali.data.broken import fault, look
from scae_dali.data.index import DatasetError, ImageIndex
from scae_dali.data.pixels import ArrayImages
from scae_dali.data.scan import EXTENSIONS
from scae_dali.saliency.whole import whole_loader
from scae_dali.training.ranks import Ranks


def test_all_that_torchvision_lists_and_dali_decodes_is_listed_and_sound(tmp_path, capsys):
    assert {*IMG_EXTENSIONS} <= {*EXTENSIONS}
    (tmp_path / "train" / "a").mkdir(parents=True)
    grey = Image.fromarray(np.arange(0, 192, 8, dtype=np.uint8).reshape(4, 6))
    ways = {"jpe": "JPEG", "jfif": "JPEG", "pnm": "PPM", "j2k": "JPEG2000"}
    for extension in EXTENSIONS:
        name = extension.removeprefix(".")
        one = grey.convert("1") if name == "pbm" else grey.convert("L" if name == "pgm" else "RGB")
        one.save(tmp_path / "train" / "a" / f"{name}.{name}", format=ways.get(name))
    index = ImageIndex(tmp_path / "train")
    assert sorted(index.files) == sorted(f"a/{e[1:]}{e}" for e in EXTENSIONS)
    batches = whole_loader(index, size=4, batch_size=len(index), mean=(0, 0, 0), std=(1, 1, 1))
    (batch,) = batches
    for name, image in zip(index.files, batch.images, strict=True):
        assert 60 < image.mean() < (150 if name.endswith("pbm") else 120), name
        assert image.isfinite().all()
    assert check_images.main(["--data", str(tmp_path), "--decode"]) == 0
    assert f"0 of {len(EXTENSIONS)} images are broken" in capsys.readouterr().out


def test_no_images_names_what_was_found(tmp_path):
    for name in ("a/1.gif", "a/2.gif", "b/readme"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with pytest.raises(DatasetError, match=r"other files there: 2 of \.gif, 1 of no extension\. I"):
        ImageIndex(tmp_path)


def test_a_pipe_with_the_name_of_an_image_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "1.png")
    assert fault(str(tmp_path / "1.png")) == "is no file"
    (tmp_path / "data" / "a").mkdir(parents=True)
    os.mkfifo(tmp_path / "data" / "a" / "1.jpeg")
    with pytest.raises(DatasetError, match=r"a/1\.jpeg' is named as an image, and is no file"):
        ImageIndex(tmp_path / "data")


@pytest.fixture
def piped(tmp_path):
    """A data set whose lists, train.txt and val.txt, name two images, a pipe and a folder."""
    for split in ("train", "val"):
        write_images(tmp_path / split, {"a": 1, "b": 1})
        names = sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / split).rglob("*.jpg"))
        os.mkfifo(tmp_path / split / "p.webp")
        names += [f"{split}/p.webp", f"{split}/a"]
        lines = [f"{name} {i % 2}\n" for i, name in enumerate(names)]
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    return tmp_path


def test_a_pipe_in_a_list_does_not_hang(piped, capsys):
    listed = {split: str(piped / f"{split}.txt") for split in ("train", "val")}
    pipe = r"2 of the 4 images are no files \(.*train/p\.webp': take such names out of the list"
    config = DataConfig(root=str(piped), train_list=listed["train"], val_list=listed["val"])
    with pytest.raises(ValueError, match=pipe):
        open_data(config, 1, Ranks("cpu"))
    with pytest.raises(DatasetError, match=pipe):
        ArrayImages.from_index(ImageIndex.from_list(listed["train"], piped))
    with pytest.raises(ValueError, match=r"p\.webp' is no file\n.*a' cannot be read \(Is a"):
        look(ImageIndex.from_list(listed["val"], piped), 5.0)
    with pytest.raises(OSError, match="obtaining file position failed"):
        ImageIndex.from_list(listed["val"], piped).read([2])
    for deep in ([], ["--decode"]):
        arguments = ["--data", str(piped), "--list", listed["val"], *deep]
        assert check_images.main(arguments) == 1
        assert "val/p.webp is no file\n" in capsys.readouterr().out


def test_a_pipe_in_the_list_of_a_command_does_not_hang(piped):
    given = {"data": piped, "list": piped / "train.txt", "out": piped / "c", "model": "resnet18"}
    arguments = build_cache.parse([f"--{name}={value}" for name, value in given.items()])
    with pytest.raises(DatasetError, match=r"are no files .*p\.webp"):
        open_images(arguments)


def test_links_that_lead_nowhere_are_told(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "data" / "a").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "data" / "a" / f"{i}.jpg").symlink_to(tmp_path / "disk" / f"{i}.jpg")
    index = ImageIndex(tmp_path / "data")
    told = (
        r"None of the files is there, .*a/0\.jpg' \(3 of 3 .*a/0\.jpg' is a link to .*disk/0\.jpg'"
    )
    with pytest.raises(ValueError, match=told) as error:
        look(index, 5.0)
    assert "list" not in str(error.value).partition("looked for")[2]
    with pytest.raises(RuntimeError, match=told) as error:
        list(whole_loader(index, size=4, batch_size=2))
    assert "remove" not in str(error.value)
    assert "exclude" not in str(error.value)
    (tmp_path / "linked").symlink_to(tmp_path / "gone")
    listed = ImageIndex.from_arrays(["linked/x/1.jpg"], np.array([0]), tmp_path)
    with pytest.raises(ValueError, match=r"linked' is a link to .*gone', which is not there"):
        look(listed, 5.0)


@pytest.mark.parametrize(("files", "step"), [(20, 2), (34, 17), (40, 3), (5000, 2), (4321, 6)])
def test_some_missing_files_are_not_all(tmp_path, files, step):
    """Every file is missing but each `step`-th one, the first of which is not the first file."""
    write_images(tmp_path, {"a": 1})
    (sound,) = (tmp_path / "a").iterdir()
    names = [f"{i}.jpg" for i in range(files)]
    for name in names[1::step]:
        os.link(sound, tmp_path / name)
    index = ImageIndex.from_arrays(names, np.zeros(files, int), tmp_path)
    with pytest.raises(ValueError, match=r"validation images are broken") as error:
        look(index, 5.0)
    assert "None of the files" not in str(error.value)
    for name in names[1::step]:
        os.remove(tmp_path / name)
    with pytest.raises(ValueError, match=rf"\({min(files, 1000)} of {files} looked for\)"):
        look(index, 5.0)


def test_a_name_with_a_nul_is_refused(tmp_path):
    (tmp_path / "list.txt").write_text("a/1.jpg 0\na/2\0.jpg 1\n")
    with pytest.raises(DatasetError, match=r"sample 1: the name .* has a NUL character"):
        ImageIndex.from_list(tmp_path / "list.txt")


def test_names_that_a_list_cannot_hold_are_told(tmp_path, capsys):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "1.jpg").write_bytes(b"no image")
    (tmp_path / "train" / "a" / "2\n3.jpg").write_bytes(b"no image")
    out = tmp_path / "broken.txt"
    assert check_images.main(["--data", str(tmp_path), "--out", str(out)]) == 2
    assert "1 broken images have names of several lines" in capsys.readouterr().err
    assert out.read_text() == "a/1.jpg\n"


def test_a_list_of_another_root_is_told_as_such(folder, tmp_path):
    index = ImageIndex(folder)
    elsewhere = ImageIndex.from_arrays(index.files, index.labels, tmp_path)
    with pytest.raises(ValueError, match=r"validation: None of the files is there, .* instead of"):
        look(elsewhere, 5.0)
    with pytest.raises(RuntimeError, match=r"None of the files is there, such as"):
        list(whole_loader(elsewhere, size=4, batch_size=2))


def test_an_empty_val_folder_stands_for_a_class_without_images(folder, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    (root / "train").symlink_to(folder)
    names = sorted(path.name for path in folder.iterdir())
    for name in names[:-1]:
        (root / "val").mkdir(exist_ok=True)
        (root / "val" / name).symlink_to(folder / name)
    with pytest.raises(DatasetError, match=r"an empty folder stands for a class without valida"):
        DataConfig(root=str(root)).open()
    (root / "val" / names[-1]).mkdir()
    data = DataConfig(root=str(root)).open()
    assert data.val.classes == data.train.classes
    assert data.val.class_counts[-1] == 0


@pytest.mark.parametrize("odd", ["e", "lost+found", "0"])
def test_a_class_of_one_split_alone_is_no_circle(tmp_path, odd):
    """Each remedy is followed as it is told, until the data set opens."""
    for split in ("train", "val"):
        write_images(tmp_path / split, {"b": 1, "c": 1})
    config = DataConfig(root=str(tmp_path))
    write_images(tmp_path / "val", {odd: 1})
    remedy = rf"train' lacks {re.escape(repr(odd))}: add training .* or remove them from .*val'$"
    with pytest.raises(DatasetError, match=remedy):
        config.open()
    write_images(tmp_path / "train", {odd: 1})
    assert config.open().val.classes == tuple(sorted(("b", "c", odd)))
    shutil.rmtree(tmp_path / "train" / odd)
    (tmp_path / "train" / odd).mkdir()  # the wrong half of the remedy
    with pytest.raises(DatasetError, match=r"without images: .*; remove them$"):
        config.open()
    (tmp_path / "train" / odd).rmdir()
    for image in (tmp_path / "val" / odd).iterdir():
        image.unlink()
    with pytest.raises(DatasetError, match=remedy):  # an empty one too
        config.open()
    (tmp_path / "val" / odd).rmdir()
    assert config.open().val.classes == ("b", "c")


def test_classes_that_both_splits_lack_are_told_of_both(tmp_path):
    for split, names in (("train", "xabcd"), ("val", "xy")):
        write_images(tmp_path / split, dict.fromkeys(names, 1))
    with pytest.raises(
        DatasetError, match=r"val' lacks 'a', 'b', 'c', …: add .*; .*train' lacks 'y': add train"
    ):
        DataConfig(root=str(tmp_path)).open()


@pytest.mark.parametrize("fewer", ["train", "val"])
def test_fewer_images_than_processes_are_told(tmp_path, monkeypatch, fewer):
    for split in ("train", "val"):
        write_images(tmp_path / split, {"a": 1, "b": 1} if split == fewer else {"a": 2, "b": 3})
    ranks = Ranks("cpu")
    monkeypatch.setattr(ranks, "world", 3)
    monkeypatch.setattr(ranks, "gather", lambda value: [value])
    kind = {"train": "training", "val": "validation"}[fewer]
    with pytest.raises(ValueError, match=f"processes must be at most the 2 {kind} images.*got 3"):
        open_data(DataConfig(root=str(tmp_path)), 1, ranks)


def test_a_reader_of_fewer_images_than_shards_is_no_broken_file(index):
    with pytest.raises(RuntimeError, match="at least equal to the requested number of shards") as e:
        whole_loader(
            index, batch_size=1, size=4, num_shards=51, mean=(0, 0, 0), std=(1, 1, 1)
        ).start()
    assert "cannot be read" not in str(e.value)
