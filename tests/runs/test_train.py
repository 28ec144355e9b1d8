"""train.py end to end: learning to the end, killed and resumed, on two processes."""

import json
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import write_images
from scripts import KILLER, ROOT, arguments, check_same_weights, rows, run_code, run_here

import train
from scae_dali.cache import SaliencyCache
from scae_dali.data.index import ImageIndex


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_images(root / "train", {"a": 30, "b": 15, "c": 5})
    write_images(root / "val", {"a": 5, "b": 5, "c": 5}, seed=1)
    return root


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    monkeypatch = pytest.MonkeyPatch()
    run_here(monkeypatch, *arguments(data, out))
    monkeypatch.undo()
    return out


def test_a_run_leaves_metrics_weights_cache_and_pictures(data, whole):
    lines = rows(whole)
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert [line["lam"] for line in lines] == [0.0, 0.5, 1.0, 1.5]
    assert [line["saliency_images"] for line in lines] == [0, 0, 50, 0]
    assert [line["share"]["no_map"] > 0 for line in lines] == [False, True, False, False]
    assert all(0 < line["share"]["erased"] < 1 for line in lines)
    timed = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    seconds = timed["seconds"]
    assert seconds["train"] == pytest.approx(seconds["data"] + seconds["step"], abs=0.01)
    assert timed["overhead_percent"] > 0
    cache = SaliencyCache(whole / "saliency.lmdb", index=ImageIndex(data / "train"))
    assert (cache.stamps() == 2).all()
    meta = cache.meta
    assert (meta.model, meta.layer, meta.input_size) == ("cifar_resnet20", "layer3", 64)
    weights = torch.load(whole / "weights.pt", weights_only=True)
    assert weights["fc.weight"].shape == (3, 64)
    assert (whole / "erased.png").stat().st_size > 1000
    assert list(whole.glob("events.out.tfevents.*"))
    assert json.loads((whole / "config.json").read_text())["scae"]["refresh_every"] == 2


def test_killed_in_an_epoch_and_in_a_pass_a_run_goes_on_as_if_nothing_happened(
    data, whole, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "killed"
    argv = [*arguments(data, out), "--resume"]
    epoch = KILLER.format(
        signal="SIGKILL", module="train", owner="module.Run", name="train_step", calls=9
    )
    assert run_code(epoch, *argv).returncode == -signal.SIGKILL
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 2)
    passing = KILLER.format(
        signal="SIGKILL",
        module="scae_dali.saliency.refresh",
        owner="module.SaliencyCache",
        name="write",
        calls=2,
    )
    small = "module.refresh_cache.__kwdefaults__['commit_every'] = 16"
    killed = run_code(f"import scae_dali.saliency.refresh as module; {small}{passing}", *argv)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    cache = SaliencyCache(out / "saliency.lmdb", index=ImageIndex(data / "train"))
    assert 0 < (cache.stamps() == 2).sum() < 50
    cache.close()
    run_here(monkeypatch, *argv)
    assert "saliency 2" in capsys.readouterr().err
    resumed = rows(out)
    assert 0 < resumed[2]["saliency_images"] < 50
    resumed[2]["saliency_images"] = 50
    assert resumed == rows(whole)
    check_same_weights(out, whole)
    index = ImageIndex(data / "train")
    maps = []
    for folder in (out, whole):
        with SaliencyCache(folder / "saliency.lmdb", index=index) as cache:
            maps.append(cache.read(np.arange(50))[0])
    np.testing.assert_array_equal(maps[0], maps[1])


def without(lines, name):
    """Rows without a field."""
    return [{key: value for key, value in line.items() if key != name} for line in lines]


def test_asked_to_end_a_run_saves_at_the_next_step_and_goes_on(data, whole, tmp_path, monkeypatch):
    out = tmp_path / "ended"
    argv = [*arguments(data, out), "--resume"]
    code = KILLER.format(
        signal="SIGUSR1", module="train", owner="module.Run", name="train_step", calls=8
    )
    done = run_code(code, *argv)
    assert done.returncode == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1; the same command with --resume goes on" in done.stderr
    assert "Traceback" not in done.stderr
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 3)  # six steps an epoch; after the ninth
    run_here(monkeypatch, *argv)
    # The losses were summed up to another step.
    losses = [[row["train_loss"] for row in rows(path)] for path in (out, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert without(rows(out), "train_loss") == without(rows(whole), "train_loss")
    check_same_weights(out, whole)


def test_asked_to_end_a_run_of_one_step_an_epoch_saves_at_the_epochs_end(data, tmp_path):
    out = tmp_path / "ended"
    code = KILLER.format(
        signal="SIGTERM", module="train", owner="module.Run", name="train_step", calls=1
    )
    done = run_code(code, *arguments(data, out, batch_size=50))
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "stopped by SIGTERM" in done.stderr
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (2, 0)


def test_asked_to_end_in_a_pass_it_ends_at_once(data, whole, tmp_path, monkeypatch):
    out = tmp_path / "ended"
    argv = [*arguments(data, out), "--resume"]
    code = KILLER.format(
        signal="SIGTERM",
        module="scae_dali.saliency.refresh",
        owner="module.SaliencyCache",
        name="write",
        calls=0,
    )
    done = run_code(code, *argv)
    assert done.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; the same command with --resume goes on" in done.stderr
    assert "Traceback" not in done.stderr
    run_here(monkeypatch, *argv)
    resumed = rows(out)
    assert without(resumed, "saliency_images") == without(rows(whole), "saliency_images")
    check_same_weights(out, whole)


def test_killed_after_a_pass_a_run_knows_what_it_took(data, whole, tmp_path, monkeypatch):
    out = tmp_path / "killed"
    argv = [*arguments(data, out), "--resume"]
    code = KILLER.format(
        signal="SIGKILL", module="train", owner="module.Run", name="train_step", calls=12
    )
    assert run_code(code, *argv).returncode == -signal.SIGKILL
    run_here(monkeypatch, *argv)
    assert rows(out) == rows(whole)
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[2])
    assert row["saliency_images"] == 50
    assert row["seconds"]["saliency"] > 0


def test_a_run_outlives_those_who_read_its_output(data, tmp_path):
    out = tmp_path / "run"
    argv = arguments(data, out, epochs=3)
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *argv],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout.readline().startswith("epoch   0")
        child.stdout.close()
        said = child.stderr.read()
    assert child.returncode == 0, said
    assert "note: nobody reads stdout any more; the run goes on" in said
    assert "Traceback" not in said
    assert len(rows(out)) == 3


@pytest.mark.parametrize("to", [">&- 2>&-", "> /dev/full"])
def test_a_run_outlives_output_that_cannot_be_written(data, tmp_path, to):
    out = tmp_path / "run"
    argv = shlex.join([sys.executable, str(ROOT / "train.py"), *arguments(data, out, epochs=1)])
    done = subprocess.run(f"{argv} {to}", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(rows(out)) == 1
    if to == "> /dev/full":
        assert "stdout cannot be written any more (No space left on device); the run" in done.stderr


def test_a_compiler_that_is_missing_is_told_with_a_remedy(data, tmp_path, monkeypatch):
    def compile_(*given):
        raise torch._dynamo.exc.TorchDynamoException("No working C++ compiler found\n\nTraceback")

    monkeypatch.setattr(train.Run, "train_step", compile_)
    told = r"torch.compile failed \(No working C\+\+ compiler found\): .* or pass --compile none"
    with pytest.raises(SystemExit, match=told):
        run_here(monkeypatch, *arguments(data, tmp_path / "run", compile="default"))


def test_help_that_nobody_reads_tells_of_no_run():
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--help"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        child.stdout.close()
        said = child.stderr.read()
    assert (child.returncode, said) == (141, "")


def test_a_finished_run_has_nothing_left_to_do(data, whole, monkeypatch):
    before = rows(whole)
    run_here(monkeypatch, *arguments(data, whole), "--resume")
    assert rows(whole) == before


@pytest.mark.parametrize(
    "more",
    [
        {"method": "none"},
        {"method": "random_erasing", "random_erasing.prob": 0.37},
        {"amp": "bf16", "channels_last": "true", "image.layout": "NHWC", "backend": "torch"},
    ],
    ids=["none", "random_erasing", "bf16 channels-last torch"],
)
def test_methods_precision_and_layout(data, tmp_path, monkeypatch, more):
    out = tmp_path / "run"
    run_here(monkeypatch, *arguments(data, out, epochs=2, **{"scae.refresh_every": 1}, **more))
    last = rows(out)[-1]
    assert np.isfinite(last["train_loss"])
    assert (out / "saliency.lmdb").exists() == ("method" not in more)
    assert (last["share"]["erased"] > 0) == (more.get("method") != "none")


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(
    ("more", "seen"),
    [
        pytest.param({"method": "rand_augment+scae", "rand_augment.n": 1}, 50, id="composition"),
        pytest.param({"saliency.source": "both", "saliency.share": 0.2}, 10, id="harvest"),
    ],
)
def test_it_goes_on_within_an_epoch(data, tmp_path, monkeypatch, more, seen):
    """Erased, mixed, with a pass over `seen` images; what is stopped ends as what is not."""
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    more = {"scae.tail": 0.2, "epochs": 2, "scae.refresh_every": 1, "optim.lr": 0.05} | more
    run_here(monkeypatch, *arguments(data, whole, **more))
    lines = rows(whole)
    assert [line["saliency_images"] for line in lines] == [0, seen]
    assert ("saliency_agreement" in lines[1]) == ("saliency.source" in more)
    assert [line["lam"] for line in lines] == [0, 1]
    assert all(line["share"]["erased"] > 0 for line in lines)
    assert any(line["share"]["mixed"] > 0 for line in lines)
    original, steps = train.Run.train_step, iter(range(9))

    def train_step(*given):
        if next(steps, None) is None:
            raise StoppedError
        original(*given)

    monkeypatch.setattr(train.Run, "train_step", train_step)
    with pytest.raises(StoppedError):
        run_here(monkeypatch, *arguments(data, out, **more))
    monkeypatch.setattr(train.Run, "train_step", original)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 2)
    run_here(monkeypatch, *arguments(data, out, **more), "--resume")
    assert rows(out) == lines
    check_same_weights(out, whole)


def test_the_recipes_parse(tmp_path, monkeypatch, capsys):
    for recipe in sorted((ROOT / "pipelines").glob("*.yaml")):
        argv = ["--config", str(recipe), "--data.root", "x", "--out", "y", "--print_config"]
        with pytest.raises(SystemExit) as stop:
            run_here(monkeypatch, *argv)
        assert stop.value.code == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        for key, value in yaml.safe_load(recipe.read_text()).items():
            if isinstance(value, dict):
                assert {**printed[key], **value}.keys() == printed[key].keys()
            else:
                assert printed[key] == value


def test_train_py_reads_top_to_bottom():
    assert len((ROOT / "train.py").read_text().splitlines()) < 350
