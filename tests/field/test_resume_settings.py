"""A run that was resumed with other settings took some, kept others, and overwrote its config.json.
That the optimiser's state brings its own learning rate back is known:
https://github.com/pytorch/examples/issues/816; so is a scheduler that takes half of it:
https://github.com/NVIDIA/Megatron-LM/pull/7468
"""

import json
import shlex
import shutil
import sys

import pytest
import tiny_run
import torch
from tiny_run import arguments, rows, start

import train
from pipelines import resume
from pipelines.data import DataConfig
from pipelines.recipe import Config
from scae_dali.training import checkpoint
from scae_dali.training.optim import OptimConfig
from scae_dali.training.ranks import Ranks

images, tiny, whole = tiny_run.images, tiny_run.tiny, tiny_run.whole  # fixtures


@pytest.fixture
def out(whole, tmp_path):
    """Two epochs, which are done."""
    return shutil.copytree(whole, tmp_path / "run")


def content(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "run.lock"}


MAY_CHANGE = {
    *("out", "data.root", "data.index_cache", "data.val_exclude", "threads", "hw_decoder_load"),
    *("checkpoint_every", "compile", "device", "saliency.batch_size", "saliency.cache"),
}
IF_BOTH_ARE_GIVEN = {"data.train_list", "data.val_list", "data.exclude"}
IF_BOTH_ARE_GIVEN |= {"weights", "second_stage.weights"}


def test_every_setting_but_a_few_is_refused():
    was = resume.flat(config())
    assert was.keys() > MAY_CHANGE | IF_BOTH_ARE_GIVEN
    for name in was.keys() - MAY_CHANGE - IF_BOTH_ARE_GIVEN - {"epochs"}:
        with pytest.raises(
            ValueError, match=rf"^run was made with {name}=.*, not 'x': resume it .*"
        ):
            resume.compare("run", was, was | {name: "x"}, 1, lambda: None)
    for name in MAY_CHANGE:
        assert resume.compare("run", was, was | {name: "x"}, 1, lambda: None) == [
            f"{name} was {was[name]!r}, now 'x'"
        ]
    for name in IF_BOTH_ARE_GIVEN:
        given = was | {name: "here"}
        assert resume.compare("run", given, was | {name: "there"}, 1, lambda: None)
        for one, other in ((given, was), (was, given)):
            with pytest.raises(ValueError, match=name):
                resume.compare("run", one, other, 1, lambda: None)


@pytest.mark.parametrize(
    ("name", "now", "was"),
    [
        ("optim.weight_decay", 0.01, 0.0001),
        ("image.mean", "[1,2,3]", [123.675, 116.28, 103.53]),
        ("data.val_dir", "train", "val"),
        ("channels_last", "true", False),
        ("saliency.layer", "features", None),
    ],
)
def test_what_may_not_change_is_refused_and_nothing_touched(images, out, name, now, was):
    before = content(out)
    with pytest.raises(SystemExit) as error:
        start(*arguments(images, out, **{"epochs": 3, name: now}), "--resume")
    said = str(error.value)
    assert f"checkpoint.pt' was made with {name}={was!r}, not " in said
    value = was if isinstance(was, str) else json.dumps(was)
    assert shlex.quote(f"--{name}={value}") in said
    assert content(out) == before


def test_all_differences_come_at_once_and_their_flags_are_the_remedy(images, out):
    wrong = {"optim.lr": 0.1, "optim.milestones": "[5]", "seed": 4, "threads": 2, "epochs": 1}
    with pytest.raises(SystemExit) as error:
        start(*arguments(images, out, **wrong), "--resume")
    said = str(error.value)
    for part in ("optim.lr=0.05, not 0.1", "milestones=[30, 60, 90], not [5]", "seed=0, not 4"):
        assert part in said
    assert "epochs=2, not 1 (2 are done)" in said
    assert "threads" not in said
    flags = shlex.split(said.partition("config.json beside it; ")[2].partition("), or start")[0])
    assert len(flags) == 4
    before = rows(out)
    start(*arguments(images, out, **wrong), *flags, "--resume")
    assert rows(out) == before


def test_what_may_change_is_said_and_the_old_config_kept(images, out, capsys):
    start(*arguments(images, out), "--resume")
    assert f"now {str(out)!r}" in capsys.readouterr().err  # it was copied there
    (out / "config.until-epoch-2.json").unlink()
    text = (out / "config.json").read_text()
    start(*arguments(images, out), "--resume")
    assert (out / "config.json").read_text() == text
    assert not list(out.glob("config.until*"))
    assert "now" not in capsys.readouterr().err.replace(f"now {str(out)!r}", "")
    old = json.loads(text)
    more = {"epochs": 3, "threads": 2, "checkpoint_every": 0, "hw_decoder_load": 0.5}
    start(*arguments(images, out, **more), "--resume")
    said = capsys.readouterr().err
    assert "note: epochs was 2, now 3: the schedules of learning rate and λ go by the new" in said
    assert "note: threads was 1, now 2" in said
    assert json.loads((out / "config.until-epoch-2.json").read_text()) == old
    assert json.loads((out / "config.json").read_text())["epochs"] == 3
    assert [row["epoch"] for row in rows(out)] == [0, 1, 2]
    with pytest.raises(SystemExit, match=r"epochs=3, not 2 \(3 are done\)"):
        start(*arguments(images, out, epochs=2), "--resume")


def test_other_validation_images_are_refused_and_fewer_are_said(
    images,
    out,
    tmp_path,
    capsys,
):
    copy = shutil.copytree(images, tmp_path / "data")
    (copy / "val" / "a" / "00.png").rename(copy / "val" / "a" / "new.png")
    argv = [*arguments(copy, out, epochs=3), "--resume"]
    with pytest.raises(SystemExit, match=r"was made with val='\w{32}', not '\w{32}': resume it"):
        start(*argv)
    (copy / "val" / "a" / "new.png").unlink()
    start(*argv)
    assert "note: 1 validation images are left out from here on" in capsys.readouterr().err


def test_a_checkpoint_of_an_older_version_is_compared_by_its_config(images, out):
    path = out / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["of"] = {name: state["of"][name] for name in ("model", "seed", "data", "batch_size")}
    del state["log"], state["val_files"]
    torch.save(state, path)
    config = json.loads((out / "config.json").read_text())
    del config["saliency"], config["optim"]["ema"]  # settings that it did not have yet
    del config["epoch_length"], config["samples_per_turn"]
    del config["optim"]["nesterov"], config["optim"]["lr_by_epoch"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=r"optim.momentum=0.9, not 0.5: resume"):
        start(*arguments(images, out, epochs=3, **{"optim.momentum": 0.5}), "--resume")
    with pytest.raises(SystemExit, match=r"optim.ema=0.0, not 0.5: resume"):
        start(*arguments(images, out, epochs=3, **{"optim.ema": 0.5}), "--resume")
    with pytest.raises(SystemExit, match=r"optim.nesterov=True, not False: resume"):
        start(*arguments(images, out, epochs=3, **{"optim.nesterov": "false"}), "--resume")
    start(*arguments(images, out, epochs=3), "--resume")
    assert [row["epoch"] for row in rows(out)] == [0, 1, 2]


@pytest.mark.parametrize("given", [{}, {"backend": "numpy"}])
def test_a_run_whose_backend_has_its_older_name_goes_on(images, out, capsys, given):
    path = out / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    assert state["of"]["backend"] == "python"
    state["of"]["backend"] = "numpy"
    torch.save(state, path)
    config = json.loads((out / "config.json").read_text()) | {"backend": "numpy", "out": str(out)}
    (out / "config.json").write_text(json.dumps(config))
    start(*arguments(images, out, **given), "--resume")
    assert "backend was" not in capsys.readouterr().err
    assert not list(out.glob("config.until*"))
    for name in ("checkpoint.pt", "metrics.jsonl", "weights.pt"):  # before the first checkpoint
        (out / name).unlink()
    start(*arguments(images, out, **given), "--resume")
    assert [row["epoch"] for row in rows(out)] == [0, 1]
    with pytest.raises(SystemExit, match="backend='python', not 'torch'"):
        start(*arguments(images, out, backend="torch"), "--resume")


def test_before_the_first_checkpoint_the_config_is_compared(images, out):
    for name in ("checkpoint.pt", "metrics.jsonl", "weights.pt"):
        (out / name).unlink()
    argv = arguments(images, out, **{"optim.lr": 0.5})
    with pytest.raises(
        SystemExit, match=r"run '.*config.json' was made with optim.lr=0.05, not 0.5"
    ):
        start(*argv, "--resume")
    (out / "config.json").write_text("{")
    with pytest.raises(SystemExit, match=r"config.json' cannot be read .*restore it from a copy"):
        start(*argv, "--resume")


def config(**more):
    return Config(data=DataConfig(root="/data"), out="run", **more)


class Three(Ranks):
    """Three processes, of which the last was given other settings."""

    def __init__(self, other):
        super().__init__("cpu")
        self._other = other

    def gather(self, value):
        return [value, value, value | self._other if isinstance(value, dict) else value]


def test_processes_with_other_settings_are_told_in_every_one():
    settings = resume.flat(config()) | {"resume": False}
    resume.agree(Three({"data.root": "/mnt/data", "threads": 9}), settings)
    with pytest.raises(
        ValueError,
        match=r"but epochs is 100 in rank 0, 100 in rank 1, 9 in rank 2; optim.lr is 0.1 ",
    ):
        resume.agree(Three({"optim.lr": 0.2, "epochs": 9}), settings)
    with pytest.raises(ValueError, match="resume is False in rank 0"):
        resume.agree(Three({"resume": True}), settings)


def test_what_json_makes_of_values_is_no_difference():
    one = resume.flat(config(optim=OptimConfig(lr=1.0, milestones=(1, 2))))
    again = json.loads(json.dumps(one)) | {"optim.lr": 1, "extra": float("nan")}
    assert resume.compare("run", again, one | {"extra": float("nan")}, 0, lambda: None) == []
    for name, value in {"channels_last": 0, "seed": 2**53, "optim.milestones": [1, 2, 3]}.items():
        changed = one | {name: value}
        with pytest.raises(ValueError, match=name):
            resume.compare("run", one | {"seed": 2**53 + 1}, changed | {"seed": 2**53}, 0, int)
        with pytest.raises(ValueError, match="gone=1, not 'no such setting'"):
            resume.compare("run", one | {"gone": 1}, one, 0, lambda: None)


@pytest.mark.parametrize("setting", ["weights", "second_stage.weights"])
def test_moved_files_are_the_same_and_others_are_not(tmp_path, setting):
    first = tmp_path / "weights.pt"
    first.write_bytes(b"x")
    (tmp_path / "moved.pt").write_bytes(b"x")
    was = {setting: str(first), "weights_content": "0" * 32, "epochs": 1}
    now = was | {setting: str(tmp_path / "moved.pt")}
    assert len(resume.compare("run", was, now, 0, lambda: None)) == 1
    older = was | {"weights_content": resume._digest(str(first))}  # of the file
    assert len(resume.compare("run", older, now, 0, lambda: None)) == 1
    for one, other in ((was, now | {"weights_content": "1" * 32}), (older, now)):
        (tmp_path / "moved.pt").write_bytes(b"y")
        with pytest.raises(
            ValueError,
            match=r"^run was made with other weights than '.*moved.pt' holds: resume it .*; "
            rf"--{setting}=.*weights.pt\), .*; {setting} was '.*weights.pt', now '.*moved.pt'$",
        ):
            resume.compare("run", one, other, 0, lambda: None)
    here = was | {"weights_content": "1" * 32}  # the file has changed where it lies
    with pytest.raises(ValueError, match=r"weights.pt' holds: resume it .*, or start in a ne"):
        resume.compare("run", was, here, 0, lambda: None)
    for one, other in (({setting: None, "weights_content": None}, was), (was, {})):
        one, other = {"epochs": 1} | one, {setting: None, "weights_content": None} | other
        other = {"epochs": 1} | other
        told = rf"^run was made with {setting}=[^;]*, not [^;]*: resume [^;]*; --{setting}=[^;]*$"
        with pytest.raises(ValueError, match=told):
            resume.compare("run", one, other, 0, lambda: None)


def test_lists_that_are_left_out_are_told():
    lost = {"data.val_list": "list.txt", "epochs": 1}
    with pytest.raises(ValueError, match=r"val_list='list.txt', not None: .* --data.val_list=list"):
        resume.compare("run", lost, lost | {"data.val_list": None}, 0, lambda: None)


def test_damaged_files_of_a_run_are_named(images, out):
    argv = [*arguments(images, out, epochs=3), "--resume"]
    path = out / "checkpoint.pt"
    whole = torch.load(path, weights_only=True)
    for change, said in {
        "optimizer": "it lacks optimizer",
        "epoch": "it lacks epoch",
        "step": "step is no int",
        "log": "log is no str",
        "rng": "of process 0, it lacks rng",
        "ranks": "of process 0, it is no dict",
    }.items():
        state = dict(whole)
        if change in ("optimizer", "epoch"):
            del state[change]
        elif change == "rng":
            state["ranks"] = [{k: v for k, v in whole["ranks"][0].items() if k != "rng"}]
        else:
            state[change] = {"step": 1.5, "log": 5, "ranks": [5]}[change]
        torch.save(state, path)
        with pytest.raises(ValueError, match=rf"is no checkpoint .* \({said}\); move it away"):
            checkpoint.load_run(path)
    path.unlink()
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text.replace('"epochs": 2', '"epochs": "2"'))
    with pytest.raises(SystemExit, match=r"made with epochs='2', not 3 \(0 are done\)"):
        start(*argv)
    (out / "config.json").write_text(text)
    (out / "metrics.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"weights.pt of a run that has ended, and no checkpoint"):
        start(*argv)
    path.mkdir()
    with pytest.raises(SystemExit, match=r"checkpoint.pt' must be a file of the run, and is a fo"):
        start(*argv)


def test_weights_of_a_shorter_run_do_not_pass_for_the_longer_ones(images, out, monkeypatch):
    before = (out / "weights.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "train_epoch", lambda run: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            start(*arguments(images, out, epochs=3), "--resume")
    assert not (out / "weights.pt").exists()
    assert (out / "weights.until-epoch-2.pt").read_bytes() == before


def test_what_is_left_out_of_the_data_no_more_is_named():
    was = resume.flat(config()) | {"data": "d", "val": "v", "data.val_exclude": "broken.txt"}
    now = was | {"val": "w", "data.val_exclude": None}
    with pytest.raises(
        ValueError,
        match=r"val='v', not 'w': resume it .*; --data.val_exclude=broken.txt\), or start in a new "
        r"folder; data.val_exclude was 'broken.txt', now None$",
    ):
        resume.compare("run", was, now, 1, lambda: None)
    assert len(resume.compare("run", was, now, 1, lambda: 3)) == 2
