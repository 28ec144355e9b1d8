"""A damaged line in the middle of metrics.jsonl was passed over: its epoch was gone, and best and
median were wrong. Bytes that are no UTF-8 and lines that are no object have broken readers of such
files elsewhere: https://github.com/splunk/token-meter/issues/6
"""

import json
import shutil

import pytest
import tiny_run
import torch
from tiny_run import arguments, rows, start

from scae_dali.training.log import Log, LogError, read_rows
from tools import compare_runs

images, tiny, whole = tiny_run.images, tiny_run.tiny, tiny_run.whole  # fixtures


def line(epoch, **more):
    seconds = dict.fromkeys(("train", "data", "step", "saliency", "val"), 1.0)
    known = {"epoch": epoch, "val_top1": 50.0 + int(epoch), "val_top5": 90.0, "img_per_s": 9.0}
    return json.dumps({**known, "overhead_percent": 0.0, "seconds": seconds, **more}).encode()


WHOLE = [line(epoch) for epoch in range(4)]
DAMAGES = {
    "no JSON": (1, b'{"epoch": 1, "val_t', "line 2 is no JSON"),
    "no UTF-8": (0, b'{"epoch": 0, "name": "\xff\xfe"}', "line 1 is no JSON"),
    "zeros": (2, bytes(40), "line 3 is no JSON"),
    "a list": (1, b"[1, 2]", r"line 2 is no JSON object, got \[1, 2\]"),
    "a number": (1, b"42", "line 2 is no JSON object, got 42"),
    "no epoch": (1, b'{"val_top1": 51}', "line 2 must be of epoch 1, .* got None"),
    "epoch as text": (1, line("1"), "line 2 must be of epoch 1, .* got '1'"),
    "epoch as truth": (1, line(True), "line 2 must be of epoch 1, .* got True"),
    "epoch twice": (2, WHOLE[1], "line 3 must be of epoch 2, .* got 1"),
    "epoch left out": (1, b"", "line 3 must be of epoch 1, .* got 2"),
    "two lines in one": (1, WHOLE[1] + WHOLE[2], "line 2 is no JSON"),
    "top-1 as text": (1, line(1, val_top1="51"), "line 2 must have a number as val_top1, got '51'"),
    "top-1 of null": (1, line(1, val_top1=None), "line 2 must have a number as val_top1, got None"),
    "top-1 of NaN": (1, line(1, val_top1=float("nan")), "line 2 must have a number as val_top1"),
    "few as a list": (1, line(1, val_few=[]), r"line 2 must have a number as val_few, got \[\]"),
    "seconds as a number": (1, line(1, seconds=3), "line 2 must have an object of numbers as seco"),
    "no top-1": (1, b'{"epoch": 1}', "line 2 lacks val_top1"),
    "top-1 above 100": (1, line(1, val_top1=151.0), "line 2 must have percent, .* got 151.0"),
    "top-5 below 0": (3, line(3, val_top5=-90.0), "line 4 must have percent, .* as val_top5, got"),
    "top-5 below top-1": (3, line(3, val_top5=9.0), "line 4 has val_top5 9.0, below its val_top1"),
    "another best": (
        3,
        line(3, best_top1=63.0),
        r"line 4 has best_top1 63.0, but by .* it is 53.0",
    ),
    "another best epoch": (2, line(2, best_epoch=1), "line 3 has best_epoch 1, but by"),
    "another median": (3, line(3, median10_top1=57.5), "line 4 has median10_top1 57.5, .* is 51.5"),
    "a field twice": (3, line(3)[:-1] + b', "val_top1": 53.0}', "line 4 has 'val_top1' twice"),
    "deep": (3, b"[" * 9999 + b"]" * 9999, "line 4 is nested too deeply"),
    "rather deep": (1, line(1, x=[[[[[[[[[[1]]]]]]]]]]), "line 2 is nested too deeply"),
    "infinite": (3, line(3)[:-1] + b', "x": [1e999]}', "line 4 must have finite numbers"),
    "digits": (
        3,
        line(3)[:-1] + b', "x": ' + b"9" * 5000 + b"}",
        "line 4 must have finite numbers",
    ),
    "digits in top-1": (3, line(3, val_top1=10**400), "line 4 must have percent"),
    "the last of another epoch": (3, line(7), "line 4 must be of epoch 3, .* got 7"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_with_its_line_and_the_remedy(tmp_path, damage):
    number, text, said = DAMAGES[damage]
    lines = [*WHOLE[:number], text, *WHOLE[number + 1 :]]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(
        LogError, match=rf"metrics.jsonl', ({said}).*; restore the file from a copy"
    ):
        read_rows(path)
    with pytest.raises(LogError, match=r"metrics.jsonl', line .* --resume"):
        Log(tmp_path, 4)
    assert path.read_bytes() == b"\n".join(lines) + b"\n"


@pytest.mark.parametrize(
    "end", [line(3)[:-30], line(3)[:-30] + b"\n", bytes(100), b'{"epoch": 3, "a": "\xff\n', b"\n\n"]
)
def test_a_last_line_that_is_cut_off_is_left_out(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(WHOLE[:3]) + b"\n" + end)
    assert [row["epoch"] for row in read_rows(path)] == [0, 1, 2]
    path.write_bytes(
        b"\n".join(WHOLE[:3])
    )  # an editor's file without a newline at its end is whole
    assert [row["epoch"] for row in read_rows(path)] == [0, 1, 2]


def test_what_is_no_finite_number_is_null(tmp_path):
    log = Log(tmp_path, 0)
    log.write({**json.loads(WHOLE[0]), "val_ece": float("nan"), "deep": {"x": [1.0, float("inf")]}})
    log.close()
    (text,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert (row["val_ece"], row["deep"]) == (None, {"x": [1.0, None]})
    assert log.text() == text + "\n"
    (tmp_path / "metrics.jsonl").write_bytes(line(0, val_ece=float("nan")))  # of an older version
    assert read_rows(tmp_path / "metrics.jsonl")[0]["val_ece"] is None


def test_the_checkpoint_brings_lost_rows_back_and_tells_of_changed_ones(images, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    path = out / "metrics.jsonl"
    argv = [*arguments(images, out, epochs=3), "--resume"]
    first, last = path.read_text().splitlines(keepends=True)
    changed = first.replace('"train_loss": ', '"train_loss": 1')
    path.write_text(changed + last)
    with pytest.raises(SystemExit, match="epoch 0 has other figures than in the checkpoint"):
        start(*argv)
    assert path.read_text() == changed + last
    path.write_text(first[:20] + "\n" + last)
    with pytest.raises(SystemExit, match=r"line 1 is no JSON; .* move it away and resume the run"):
        start(*argv)
    path.rename(out / "damaged.jsonl")
    start(*argv)
    assert [row["epoch"] for row in rows(out)] == [0, 1, 2]
    assert rows(out)[:2] == [*map(json_of, (first, last))]
    assert rows(out)[2]["best_top1"] == max(row["val_top1"] for row in rows(out))


def json_of(text):
    timed = ("seconds", "img_per_s", "overhead_percent")
    return {key: value for key, value in json.loads(text).items() if key not in timed}


def test_rows_without_a_checkpoint_are_not_overwritten(images, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    before = (out / "metrics.jsonl").read_bytes()
    (out / "checkpoint.pt").unlink()
    with pytest.raises(SystemExit, match=r"has 2 epochs, and there is no checkpoint.pt beside it"):
        start(*arguments(images, out, epochs=2), "--resume")
    assert (out / "metrics.jsonl").read_bytes() == before
    (out / "config.json").unlink()
    with pytest.raises(SystemExit, match=r"out must be a new folder, .*it has metrics.jsonl, w"):
        start(*arguments(images, out, epochs=2))


def test_tools_say_what_is_damaged(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_bytes(WHOLE[0] + b"\nx\n" + WHOLE[2] + b"\n")
    (out / "config.json").write_text('{"epochs": 3, "method": "none", "seed": 0}')
    with pytest.raises(SystemExit, match=r"metrics.jsonl', line 2 is no JSON; restore"):
        compare_runs.main([str(out)])


def finished(out, *lines):
    out.mkdir()
    (out / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (out / "config.json").write_text('{"epochs": 4, "method": "none", "seed": 0}')
    return out


def test_runs_are_compared_with_their_checkpoints_and_once(tmp_path):
    run = finished(tmp_path / "run", *WHOLE)
    log = b"".join(text + b"\n" for text in WHOLE[:3]).decode()
    torch.save({"log": log, "net": {}}, run / "checkpoint.pt")
    assert compare_runs.table([run])[0]["seeds"] == [0]
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(ValueError, match=r"link' and '.*run' are one run, which would count twice"):
        compare_runs.table([run, tmp_path / "link"])
    changed = finished(tmp_path / "changed", line(0, train_loss=9.0), *WHOLE[1:])
    shutil.copy(run / "checkpoint.pt", changed)
    with pytest.raises(LogError, match="epoch 0 has other figures than in the checkpoint"):
        compare_runs.table([changed])
    for text, said in {
        "[]": r"must hold an object, got \[\]",
        "{": "cannot be read",
        "{}": "must have method as str, it has none",
        '{"method": "none", "seed": 0, "epochs": "4"}': "must have epochs as int, got '4'",
    }.items():
        (run / "config.json").write_text(text)
        with pytest.raises(LogError, match=rf"run/config.json' {said}.*; restore the file"):
            compare_runs.table([run])
