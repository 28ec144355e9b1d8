"""What the tools' options take, and what they say of anything else."""

from argparse import ArgumentTypeError

import pytest
import torch

from tools.common import options


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("count", "5", 5),
        ("whole_numbers", "2,1,2", [2, 1]),
        ("sizes", "1e5,20,1281167,20", [20, 100_000, 1_281_167]),
        ("positive", "0.5", 0.5),
        ("device", "cpu", None),
        ("device", "3", 3),
        ("device", "cuda:1", 1),
        ("device", "cuda", 0),
        ("device", "auto", 0),
        ("usable_device", "cpu", None),
        ("usable_device", "1", 1),
        ("usable_devices", "cpu", [None]),
        ("usable_devices", "1,0", [1, 0]),
        ("existing_folder", ".", "."),
    ],
)
def test_what_an_option_means(monkeypatch, kind, text, value):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert getattr(options, kind)(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("count", "0", "must be a whole number, at least 1, got 0"),
        ("count", "1.5", "must be a whole number, at least 1, got 1.5"),
        ("whole_numbers", "1,-2", "must be whole numbers from 1 on, as in 1,2, got 1,-2"),
        ("whole_numbers", "", "must be whole numbers from 1 on"),
        ("sizes", "", "must be numbers of samples up to 1e12, such as 1e5,1281167, got ''"),
        ("sizes", "1e30", "up to 1e12"),
        ("sizes", "1e5,-3", "must be numbers of samples"),
        ("sizes", "inf", "must be numbers of samples"),
        ("positive", "0", "must be a number above 0, got 0"),
        ("positive", "nan", "must be a number above 0, got nan"),
        ("device", "gpu", "must be cpu, auto, cuda or the number of a GPU, got gpu"),
        ("device", "cuda:", "must be cpu, auto, cuda or the number of a GPU, got cuda:"),
        ("usable_device", "2", "must be cpu or one of the 2 GPUs .* from 0 on, got 2"),
        ("usable_devices", "0,2", "one of the 2 GPUs"),
        ("output_file", "/proc/no/where.json", "must be a file that can be written, .*/proc"),
        ("output_file", "/", "must be a file to write, got the folder '/'"),
        ("output_file", "/etc/passwd/x.json", "must be a file that can be written"),
        ("picture_file", "maps.pgn", "with a suffix such as .png, .pdf or .svg, got 'maps.pgn'"),
        ("existing_folder", "/no/where", "must be a folder, and there is none at '/no/where'"),
        ("existing_file", "/no/where", "must be a file, and there is none at '/no/where'"),
    ],
)
def test_what_an_option_refuses(monkeypatch, kind, text, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ArgumentTypeError, match=message):
        getattr(options, kind)(text)


def test_some_of():
    parse = options.some_of("a", "b")
    assert parse("b,b,a") == ["b", "a"]
    with pytest.raises(ArgumentTypeError, match="must be some of a, b, joined by commas, got c"):
        parse("a,c")


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert options.usable_device("auto") is None


def test_old_spellings_go_on_working_and_are_not_shown(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    parser = options.parser_of("What it does.\n\nAnd how.")
    options.add_data(parser, required=True)
    options.add_batch_size(parser, 64, "of a process")
    options.add_device(parser)
    new = ["--data", str(tmp_path), "--batch-size", "8", "--device", "cpu"]
    old = ["--root", str(tmp_path / "train"), "--batch", "8", "--device-id", "cpu"]
    found = parser.parse_args(new)
    assert (found.data, found.batch_size, found.device_id) == (str(tmp_path / "train"), 8, None)
    assert parser.parse_args(old) == found
    shown = parser.format_help()
    assert "What it does.\n" in shown
    assert "And how" not in shown
    assert "  -h, --help " in shown
    assert "  --batch-size N " in shown
    assert "of a process; default: 64" in shown
    assert not any(f"{name} " in shown for name in ("--root", "--batch", "--device-id"))


def test_the_folder_of_the_training_images(tmp_path):
    (tmp_path / "train").mkdir()  # a class of that name holds images, and no folders
    assert options.training_images(str(tmp_path)) == str(tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    assert options.training_images(str(tmp_path)) == str(tmp_path / "train")
    assert options.training_images(str(tmp_path / "train")) == str(tmp_path / "train")
