"""The tables of the paper run again: what is planned, run, resumed, refused and reported."""

import errno
import fcntl
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_images, write_pngs

from scae_dali.data.longtail import profile
from scae_dali.methods import Run, compose
from scae_dali.plan import schedule
from tools import reproduce
from tools.common import runs
from tools.common.about import hardware
from tools.paper import jobs as making
from tools.paper.tables import LONG_TAIL_INDEPENDENT, LONG_TAIL_PAPER, TABLES, folder
from tools.paper.times import Times

CELLS = [
    pytest.param(number, section, model, cell, id=f"{number}-{section.name}-{model}-{cell.name}")
    for number, table in TABLES.items()
    for section in table.sections
    if number != "lt" or section.name.startswith("rho100")  # those of 50 are made of the same
    for model in table.models
    for cell in section.cells
]
# In the place of train.py: top-1 grows by 1 an epoch, from 10 x seed + the method's length. It
# notes when it ran, and lasts LAST_S and until MEET runs have begun.
FAKE = """
import json, os, signal, sys, time, yaml
from pathlib import Path
began = time.monotonic()
given, words = {}, iter(sys.argv[1:])
for word in words:
    name, equals, value = word[2:].partition("=")
    if name == "config":
        for group, content in yaml.safe_load(Path(value).read_text()).items():
            content = content if isinstance(content, dict) else {"": content}
            given |= {f"{group}.{key}".strip("."): one for key, one in content.items()}
    elif name != "resume":
        given[name] = value if equals else next(words)
out, epochs = Path(given["out"]), int(given["epochs"])
assert "--resume" in sys.argv
weights = given.get("second_stage.weights")
if weights and not Path(weights).exists():
    sys.exit("there are no weights")
settings = {"seed": int(given["seed"]), "epochs": epochs}
for name, value in given.items():
    group, _, key = name.rpartition(".")
    inner = settings
    for part in group.split(".") if group else ():
        inner = inner.setdefault(part, {})
    inner.setdefault(key, yaml.safe_load(value) if isinstance(value, str) else value)
(out / "config.json").write_text(json.dumps(settings))
rows = out / "metrics.jsonl"
for epoch in range(len(rows.read_text().splitlines()) if rows.exists() else 0, epochs):
    top1 = 10 * settings["seed"] + len(settings["method"]) + epoch
    row = {"epoch": epoch, "val_top1": top1, "best_top1": top1, "median10_top1": top1 - epoch / 2}
    row |= {"img_per_s": 100, "seconds": {"train": 2, "saliency": 1, "val": 1}}
    with open(rows, "a") as file:
        file.write(json.dumps(row) + "\\n")
    (out / "checkpoint.pt").touch()
    time.sleep(float(os.environ.get("EPOCH_S", 0)))
    if given["method"] == os.environ.get("FAIL"):
        sys.exit("Traceback: of a run that fails")
    if given["method"] == os.environ.get("INTERRUPT"):
        (out / "pid").write_text(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
(out / "weights.pt").write_text("")
(out / "begun").touch()
time.sleep(float(os.environ.get("LAST_S", 0)))
while len([*out.parent.glob("*/begun")]) < int(os.environ.get("MEET", 1)):
    assert time.monotonic() < began + 30
    time.sleep(0.01)
(out / "times.json").write_text(json.dumps([began, time.monotonic()]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders as of CIFAR, of which imbalance 50 leaves 50, 7 and 1 images."""
    root = tmp_path_factory.mktemp("data")
    write_pngs(root / "train", dict.fromkeys("abc", 50), (32, 32))
    write_pngs(root / "test", dict.fromkeys("abc", 4), (32, 32), seed=1)
    return root


@pytest.fixture
def fake(tmp_path, monkeypatch):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(reproduce, "TRAIN", script)
    monkeypatch.setattr(reproduce, "POLL_S", 0.01)


def command(data, out, *more, table="3", options=()):
    """Of three epochs, on the tiny data, of which only imbalance 50 can be made."""
    own = ["--sections", {"3": "rho50", "4": "balanced"}[table]] if table in ("3", "4") else []
    given = ["--table", table, "--data", data, "--out", out, "--epochs", 3, *own, *more]
    folders = ["--data.format", "folder", "--data.val_dir", "test", "--data.in_memory", "true"]
    return [*map(str, given), "--", *folders, *options]


def write_run(
    out, cell, seed, top1, *, method=None, epochs=2, done=2, place="table3/rho50", **figures
):
    """A run of a table as train.py would have left it."""
    path = out / f"{place}-cifar_resnet32-{cell}-s{seed}"
    path.mkdir(parents=True)
    config = {"method": method or cell, "model": "cifar_resnet32", "seed": seed, "epochs": epochs}
    (path / "config.json").write_text(json.dumps(config | {"data": {"root": "/data/here"}}))
    first = top1 - done + 1
    rows = [
        {"epoch": e, "val_top1": first + e, "best_top1": first + e, "median10_top1": first + e / 2}
        | figures
        for e in range(done)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def report(out, *more, table="3"):
    """What --report writes."""
    assert reproduce.main(["--table", table, "--out", str(out), "--report", *more]) == 0
    return json.loads((out / f"{folder(table)}.json").read_text())


def arguments(number, tmp_path, *more):
    given = ["--table", number, "--data", str(tmp_path / "none"), "--out", str(tmp_path)]
    return reproduce.parse([*given, "--dry-run", *more])


@pytest.mark.parametrize(("number", "section", "model", "cell"), CELLS)
def test_train_py_takes_every_cell(tmp_path, number, section, model, cell):
    job = making.make_job(arguments(number, tmp_path), section, model, cell, seed=2)
    config = job.config
    assert (config.method, config.model, config.seed) == (cell.method, model, 2)
    counts = profile(500, 100, config.data.imbalance or 1)
    labels = np.repeat(np.arange(100), counts)
    run = Run(seed=2, epochs=config.epochs, labels=labels, class_counts=counts)
    compose.make(config.method_configs(), run)
    assert config.out == str(job.path)
    assert config.second_stage.weights == (str(job.first / "weights.pt") if job.first else None)
    for text in (*section.overrides, *cell.overrides):
        assert f"--{text}" in job.options


def test_tables_are_consistent():
    for table in TABLES.values():
        assert len({section.name for section in table.sections}) == len(table.sections)
        for section in table.sections:
            names = [cell.name for cell in section.cells]
            assert len({*names}) == len(names)
            assert names[0] == "none"
            assert all(re.fullmatch(r"\w+", name) for name in (section.name, *names))
            assert len({cell.title for cell in section.cells}) == len(names)
            settings = {(c.method, c.overrides, c.recipes, c.first) for c in section.cells}
            assert len(settings) == len(names)
            assert {*sum(section.contrasts, ())} <= {*names}
            for i, cell in enumerate(section.cells):
                assert cell.first is None or cell.first in names[:i]
                assert cell.first is None or cell.rank >= section.cell(cell.first).rank
                assert cell.paper.keys() <= {"last", "top-5"}
                assert cell.independent.keys() <= {*table.models}
                figures = [*cell.paper.values(), *sum(cell.independent.values(), ())]
                assert all(0 < figure < 100 for figure in figures)


@pytest.mark.parametrize("imbalance", [100, 50])
def test_every_published_figure_of_the_long_tail_has_its_cell(imbalance):
    section = TABLES["3"].sections[0 if imbalance == 100 else 1]
    paper = {cell.name: cell.paper["last"] for cell in section.cells if cell.paper}
    assert paper == LONG_TAIL_PAPER[imbalance]
    others = {cell.name for cell in section.cells if cell.independent}
    assert others == LONG_TAIL_INDEPENDENT[imbalance].keys()


@pytest.mark.parametrize(("imbalance", "exactly"), [(100, 0.372), (50, 0.374)])
def test_the_control_of_random_erasing_has_the_mean_probability_of_scae(imbalance, exactly):
    counts = profile(500, 100, imbalance)
    prob = schedule.erase_prob(schedule.frequency(counts), 0.1, 0.5, 0.5)
    mean = np.average(prob, weights=counts)
    assert mean == pytest.approx(exactly, abs=5e-4)
    (control,) = (c for c in TABLES["3"].sections[0].cells if c.name == "random_erasing_p37")
    assert control.overrides == ("random_erasing.prob=0.37",)
    assert round(mean, 2) == 0.37


def test_the_grid_is_trained_in_the_order_of_its_worth(tmp_path):
    sections = {section.name: section for section in TABLES["lt"].sections}
    assert [*sections] == ["rho100_bs", "rho100_ce", "rho50_bs", "rho50_ce"]
    ranks = {name: [cell.rank for cell in one.cells] for name, one in sections.items()}
    balanced, plain, *_ = sections.values()
    assert [cell.name for cell in balanced.cells] == [cell.name for cell in plain.cells[:11]]
    assert ranks["rho100_ce"] == [rank + 3 for rank in ranks["rho100_bs"]] + [6] * 5
    for loss in ("bs", "ce"):
        assert ranks[f"rho50_{loss}"] == [rank + 7 for rank in ranks[f"rho100_{loss}"]]
    args = arguments("lt", tmp_path, "--sections", "rho100_bs", "--seeds", "2")
    jobs = making.plan(args)
    automatic = [f"auto_augment_{name}" for name in ("cutout", "random_erasing", "scae")]
    first = ["none", *automatic]
    assert [(job.cell.name, job.seed) for job in jobs[:8]] == [
        (name, seed) for seed in (0, 1) for name in first
    ]
    second = {"random_erasing_p37", "scae", "unguided", "cmo", "scae_cmo", "saliency_cmo"}
    assert {job.cell.name for job in jobs[8:14]} == second
    assert [job.seed for job in jobs[8:]] == [0] * 6 + [1] * 6 + [0, 1]
    assert all(job.config.loss.logit_adjust == 1 for job in jobs)
    assert {job.config.optim.weight_decay for job in jobs} == {5e-4}  # of CMO too
    cutout, erasing, _ = (job.config for job in jobs[1:4])
    assert cutout.method_configs()["auto_augment"].policy == "cifar10"
    assert cutout.method_configs()["cutout"].length == 16
    assert erasing.method_configs()["random_erasing"].prob == 0.37
    assert jobs[0].config.out == str(tmp_path / "table_lt" / "rho100_bs-cifar_resnet32-none-s0")


def test_fewer_epochs_shrink_the_schedules(tmp_path):
    def config(number, name, *more, section=0):
        args = arguments(number, tmp_path, *more)
        chosen = TABLES[number].sections[section]
        model = TABLES[number].models[0]
        return making.make_job(args, chosen, model, chosen.cell(name), 0).config

    whole = config("3", "mislas_stage1").optim
    assert (whole.milestones, whole.warmup_epochs) == ((160, 180), 5)
    assert config("3", "ldam_baseline", "--epochs", "60").optim.milestones == (48, 54)
    first = config("3", "mislas_stage1", "--epochs", "60")
    assert (first.epochs, first.optim.milestones, first.optim.warmup_epochs) == (60, (48, 54), 1.5)
    assert config("3", "mislas", "--epochs", "60").epochs == 10
    assert config("3", "mislas", "--epochs", "4").epochs == 4
    cmo = config("lt", "cmo", "--epochs", "2").method_configs()["cmo"]
    assert (cmo.skip_first, cmo.skip_last) == (0, 0)
    given = config("2", "none", "--epochs", "10", "--", "--optim.milestones", "[5]")
    assert given.optim.milestones == (5,)
    assert config("2", "none", "--epochs", "10").optim.milestones == (3, 6, 9)
    tuned = config("3", "mislas", section=1)
    assert (tuned.loss.smoothing_head, tuned.loss.smoothing_tail) == (0.3, 0.0)
    assert tuned.second_stage.classifier_lr == 0.1


def test_the_masks_of_gridmask_grow_over_the_same_share_of_a_shorter_run(tmp_path):
    args = arguments("3", tmp_path, "--epochs", "50")
    section = TABLES["3"].sections[0]
    job = making.make_job(args, section, "cifar_resnet32", section.cell("grid_mask"), 0)
    assert job.config.method_configs()["grid_mask"].ramp_epochs == 40


def test_a_dry_run_tells_what_would_be_done_and_does_nothing(data, tmp_path, capsys):
    out = tmp_path / "runs"
    more = ["--methods", "mislas", "--seeds", "2", "--jobs", "2", "--dry-run"]
    assert reproduce.main(command(data, out, *more, "--rate", "1")) == 0
    text = capsys.readouterr().out
    assert not out.exists()
    # 58 images, 3 epochs; the second stage's have as many
    assert "left: 4 runs, 12 epochs, 696 image-steps; about 0 h 06 min at --rate 1, 2" in text
    lines = [line.strip() for line in text.splitlines()]
    names = [line.partition(":")[0] for line in lines if "images; to do" in line]
    start = "rho50-cifar_resnet32-mislas"
    assert names == [f"{start}{cell}-s{seed}" for seed in (0, 1) for cell in ("_stage1", "")]
    commands = [shlex.split(line) for line in lines if line.startswith("python train.py")]
    assert commands[1][2:4] == [
        "--config=pipelines/cifar100_lt.yaml",
        "--config=pipelines/mislas_stage2.yaml",
    ]
    weights = out / "table3" / names[0] / "weights.pt"
    assert f"--second_stage.weights={weights}" in commands[1]
    assert reproduce.main(command(data, out, *more)) == 0
    told = r"696 image-steps; about .* at the rate of a few steps of cifar_resnet32, .* img/s"
    assert re.search(told, capsys.readouterr().out)
    assert reproduce.main(command(tmp_path / "no", out, *more)) == 0
    assert "--data cannot be read" in capsys.readouterr().out


def test_runs_are_made_once_and_reported(data, tmp_path, fake, capsys):
    more = ["--methods", "none,random_erasing,mislas", "--seeds", "2", "--jobs", "3"]
    argv = command(data, tmp_path / "runs", *more)
    assert reproduce.main(argv) == 0
    text = capsys.readouterr().out
    assert text.count("start ") == text.count("done ") == 8  # mislas brings its first stage
    assert "8 of 8" in text
    assert "image-steps; time unknown: give --rate" in text  # nothing is tried before a real run
    first = text.index("done   rho50-cifar_resnet32-mislas_stage1-s1")
    assert text.index("start  rho50-cifar_resnet32-mislas-s1") > first
    found = json.loads((tmp_path / "runs" / "table3.json").read_text())
    rows = {row["cell"]: row for row in found["rows"]}
    assert [*rows] == ["none", "random_erasing", "mislas_stage1", "mislas"]
    assert rows["random_erasing"]["gain"] == {
        "mean": 10,
        "std": 0,
        "values": [10, 10],
        "seeds": [0, 1],
    }
    assert found["train_options"][:2] == ["--data.format", "folder"]
    assert found["unfinished"] == []
    assert reproduce.main(argv) == 0
    assert "start " not in capsys.readouterr().out
    # 300 images took 12 s, whatever the method: 3 x 58 images of one method more
    more[1] += ",mixup"
    assert reproduce.main(command(data, tmp_path / "runs", *more, "--dry-run")) == 0
    text = capsys.readouterr().out
    assert text.count("images; done") == 8
    assert "left: 2 runs, 6 epochs, 348 image-steps; about 2 s at the rate of the runs" in text


@pytest.mark.parametrize("jobs", [1, 2])
def test_as_many_runs_as_there_are_jobs_go_at_once(data, tmp_path, fake, monkeypatch, jobs):
    """What three runs of one cell say of when they ran."""
    monkeypatch.setenv("LAST_S", "0.3")
    monkeypatch.setenv("MEET", str(jobs))
    more = ["--methods", "none", "--seeds", "3", "--jobs", str(jobs)]
    assert reproduce.main(command(data, tmp_path, *more)) == 0
    times = [json.loads(path.read_text()) for path in tmp_path.glob("table3/*/times.json")]
    assert len(times) == 3
    at_once = [sum(a <= begun < b for a, b in times) for begun, _ in times]
    assert max(at_once) == jobs


def test_a_failure_is_told_and_the_rest_goes_on(data, tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "mixup")
    argv = command(data, tmp_path, "--methods", "none,mislas", "--seeds", "1")
    assert reproduce.main(argv) == 1
    text, errors = capsys.readouterr()
    assert "failed rho50-cifar_resnet32-mislas_stage1-s0: status 1" in text
    assert "| Traceback: of a run that fails" in text
    assert "leave  rho50-cifar_resnet32-mislas-s0: it goes on from" in text
    assert "done   rho50-cifar_resnet32-none-s0" in text
    assert "not done: rho50-cifar_resnet32-mislas_stage1-s0, rho50-cifar_resnet32-mislas-" in errors
    assert "Not finished, left out: rho50-cifar_resnet32-mislas_stage1-s0" in text
    monkeypatch.delenv("FAIL")
    assert reproduce.main(argv) == 0
    text = capsys.readouterr().out
    assert "start  rho50-cifar_resnet32-mislas_stage1-s0: 2 epochs" in text  # one was done
    assert "start  rho50-cifar_resnet32-none" not in text


def test_a_first_stage_without_weights_is_made_again(data, tmp_path, fake):
    argv = command(data, tmp_path, "--methods", "mislas_stage1", "--seeds", "1")
    assert reproduce.main(argv) == 0
    (weights,) = tmp_path.glob("table3/*/weights.pt")
    weights.unlink()
    assert reproduce.main(argv) == 0
    assert not weights.exists()  # nobody needs them
    assert reproduce.main(command(data, tmp_path, "--methods", "mislas", "--seeds", "1")) == 0
    assert weights.exists()


@pytest.fixture
def heeds_ctrl_c():
    """A shell's background jobs, and what they start, ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_stops_the_runs_and_the_same_command_goes_on(
    data, tmp_path, fake, monkeypatch, capsys
):
    monkeypatch.setenv("INTERRUPT", "mixup")
    argv = command(data, tmp_path, "--methods", "none,mixup", "--seeds", "1", "--jobs", "2")
    assert reproduce.main(argv) == 130
    assert "stopped; the same command goes on" in capsys.readouterr().err
    (pid,) = tmp_path.glob("table3/*/pid")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    monkeypatch.delenv("INTERRUPT")
    assert reproduce.main(argv) == 0
    assert len((pid.parent / "metrics.jsonl").read_text().splitlines()) == 3
    assert len(json.loads((pid.parent / "starts.json").read_text())) >= 2


def test_a_run_of_another_process_is_left_alone(data, tmp_path, fake, capsys):
    folder = tmp_path / "table3" / "rho50-cifar_resnet32-none-s0"
    folder.mkdir(parents=True)
    with open(folder / "train.log", "ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert reproduce.main(command(data, tmp_path, "--methods", "none", "--seeds", "2")) == 1
    text = capsys.readouterr().out
    assert "leave  rho50-cifar_resnet32-none-s0: another process is at it" in text
    assert "done   rho50-cifar_resnet32-none-s1" in text


def test_runs_of_other_settings_or_images_are_refused(data, tmp_path, fake, capsys):
    argv = command(data, tmp_path, "--methods", "mixup", "--seeds", "1")
    section = TABLES["3"].sections[1]
    job = making.make_job(reproduce.parse(argv), section, "cifar_resnet32", section.cell("none"), 0)
    config = write_run(tmp_path, "none", 0, 40.0, epochs=3, done=1) / "config.json"
    config.write_text(json.dumps(job.settings))
    argv[argv.index("--epochs") + 1] = "4"
    assert reproduce.main(argv) == 2
    told = capsys.readouterr().err
    assert "none-s0' was made with epochs=3, not 4: give the options that it was made with" in told
    assert not (tmp_path / "table3" / "rho50-cifar_resnet32-mixup-s0").exists()
    made = job.settings | {"threads": 7, "device": "cuda"}
    config.write_text(json.dumps(made))
    argv = command(data, tmp_path, "--dry-run", options=["--batch_size", "64"])
    assert reproduce.main(argv) == 2
    assert "was made with batch_size=128, not 64" in capsys.readouterr().err
    (config.parent / "starts.json").write_text(json.dumps([{"data": "of others"}]))
    assert reproduce.main(command(data, tmp_path, "--methods", "mixup", "--dry-run")) == 2
    assert "was made from other images than those of --data" in capsys.readouterr().err


def test_a_run_that_another_table_has_is_taken_over(data, tmp_path, fake, capsys):
    assert reproduce.main(command(data, tmp_path, "--methods", "none", "--seeds", "1",
                                  table="1")) == 0  # fmt: skip
    again = command(data, tmp_path, "--methods", "none", "--seeds", "2", table="4")
    assert reproduce.main([*again[:2], "--dry-run", *again[2:]]) == 0
    assert "done, as table1/cifar100-cifar_resnet32-none-s0" in capsys.readouterr().out
    assert reproduce.main(again) == 0
    text = capsys.readouterr().out
    assert "have   balanced-cifar_resnet32-none-s0" in text
    assert text.count("start ") == 1
    link = tmp_path / "table4" / "balanced-cifar_resnet32-none-s0"
    assert link.readlink() == Path("../table1/cifar100-cifar_resnet32-none-s0")
    (row,) = json.loads((tmp_path / "table4.json").read_text())["rows"]
    assert row["seeds"] == [0, 1]


def test_a_run_whose_weights_were_left_behind_is_not_taken_over_for_a_second_stage(
    data, tmp_path, fake, capsys
):
    assert reproduce.main(command(data, tmp_path, "--methods", "none", "--seeds", "1",
                                  "--sections", "rho50_ce", table="lt")) == 0  # fmt: skip
    first = tmp_path / "table_lt" / "rho50_ce-cifar_resnet32-none-s0"
    again = command(data, tmp_path, "--methods", "none_mislas", "--seeds", "1", "--dry-run")
    assert reproduce.main(again) == 0
    assert "; done, as table_lt/rho50_ce-" in capsys.readouterr().out
    (first / "weights.pt").unlink()
    assert reproduce.main(again) == 0
    assert "done, as" not in capsys.readouterr().out
    assert reproduce.main([arg for arg in again if arg != "--dry-run"]) == 0


def test_cells_that_options_make_the_same_are_refused(data, tmp_path, capsys):
    """A contrast of the two would compare a thing with itself."""
    argv = command(data, tmp_path, "--sections", "rho50_ce", "--methods", "cmo,saliency_cmo",
                   table="lt", options=["--cmo.skip_first=0", "--cmo.skip_last=0"])  # fmt: skip
    argv.insert(2, "--dry-run")
    assert reproduce.main(argv) == 0
    capsys.readouterr()
    assert reproduce.main([*argv, "--cmo.saliency=true"]) == 2
    assert "make cmo of rho50_ce and saliency_cmo of rho50_ce the same" in capsys.readouterr().err


def test_options_that_change_what_a_recipe_sets_are_told(data, tmp_path, capsys):
    methods = ["--methods", "none,ldam_baseline", "--seeds", "2", "--dry-run"]
    options = ["--optim.weight_decay=5e-4", "--optim.nesterov=false", "--threads=1"]
    argv = command(data, tmp_path, *methods, options=options)
    assert reproduce.main(argv) == 0
    told = "note: options after -- change settings of ldam_baseline.yaml in the cell ldam_baseline"
    assert capsys.readouterr().err == f"{told}: optim.weight_decay is 0.0005, not 0.0002\n"
    methods = ["--methods", "none_mislas", "--seeds", "1", "--dry-run"]
    options = ["--loss.smoothing_head=0.2", "--loss.smoothing_tail=0.1"]  # the cell has its own
    assert reproduce.main(command(data, tmp_path, *methods, options=options)) == 0
    assert capsys.readouterr().err == ""


def test_options_leave_the_loss_of_the_sections_alone(data, tmp_path):
    argv = command(data, tmp_path, "--sections", "rho50_bs,rho50_ce", "--methods", "none",
                   "--seeds", "1", table="lt", options=["--loss.logit_adjust=0.5"])  # fmt: skip
    found = [job.config.loss.logit_adjust for job in reproduce.plan(reproduce.parse(argv))]
    assert found == [1, 0]


def test_a_section_without_the_method_is_told(data, tmp_path, capsys):
    argv = command(data, tmp_path, "--sections", "rho50_bs", "--methods", "mislas", table="lt")
    assert reproduce.main(argv) == 2
    assert "got mislas with --sections rho50_bs, which have none of them" in capsys.readouterr().err


def test_a_run_of_another_loss_is_not_taken_over_for_one_of_today(data, tmp_path, fake, capsys):
    """Runs of older versions have no setting of what came later."""
    argv = command(data, tmp_path, "--methods", "none", "--seeds", "1")
    assert reproduce.main(argv) == 0
    config = tmp_path / "table3" / "rho50-cifar_resnet32-none-s0" / "config.json"
    made = json.loads(config.read_text())
    assert "logit_adjust" not in made.get("loss", {})
    args = ["--table", "lt", *argv[2:]]
    for section, taken in (("rho50_bs", False), ("rho50_ce", True)):
        args[args.index("--sections") + 1] = section
        assert reproduce.main([*args[:2], "--dry-run", *args[2:]]) == 0
        assert ("done, as table3/rho50-" in capsys.readouterr().out) == taken


def test_a_run_that_would_not_end_in_time_is_not_begun(data, tmp_path, fake, monkeypatch, capsys):
    """The second seed is thought to take all the time, of which the first has used some."""
    monkeypatch.setattr(
        reproduce.Times, "left", lambda self, job: job.seed * getattr(self._args, "time_s", 1)
    )
    monkeypatch.setattr(reproduce, "END_S", 0)
    archive = tmp_path / "runs.tar.gz"
    more = ["--methods", "none", "--seeds", "2", "--rate", "1", "--archive", str(archive)]
    argv = command(data, tmp_path, *more)
    assert reproduce.main([*argv[:2], "--budget", "10", *argv[2:]]) == reproduce.TIME_IS_UP
    text, errors = capsys.readouterr()
    assert "done   rho50-cifar_resnet32-none-s0" in text
    assert "none-s1" not in text
    assert "time is up, left: 1 runs, 3 epochs, 174 image-steps; about " in errors
    assert "packed 1 runs into" in text
    assert json.loads((tmp_path / "table3.json").read_text())["rows"][0]["seeds"] == [0]


def test_what_is_running_when_time_is_up_is_stopped(data, tmp_path, fake, monkeypatch, capsys):
    """Though it takes longer than any call has, it is begun, and goes on in the next."""
    monkeypatch.setattr(reproduce.Times, "left", lambda self, job: 60.0)
    monkeypatch.setattr(reproduce, "END_S", 0)
    monkeypatch.setenv("EPOCH_S", "60")
    more = ["--methods", "none", "--seeds", "2", "--jobs", "2", "--rate", "1"]
    argv = command(data, tmp_path, *more)
    assert reproduce.main([*argv[:2], "--budget", "5", *argv[2:]]) == reproduce.TIME_IS_UP
    text, errors = capsys.readouterr()
    assert text.count("start ") == text.count("stop ") == 2
    assert "none-s1: 1 epochs done, for time is up" in text
    assert "left: 2 runs, 4 epochs" in errors
    assert not (tmp_path / "table3.json").exists()  # no run has ended
    monkeypatch.delenv("EPOCH_S")
    assert reproduce.main(argv) == 0
    rows = (tmp_path / "table3" / "rho50-cifar_resnet32-none-s1" / "metrics.jsonl").read_text()
    assert [json.loads(row)["epoch"] for row in rows.splitlines()] == [0, 1, 2]


@pytest.mark.parametrize(
    ("rest", "budget", "begun"), [(51, 100, True), (49, 100, False), (61, 200, True)]
)
def test_a_run_longer_than_the_budget_is_not_begun_in_its_last_seconds(
    rest, budget, begun, tmp_path, monkeypatch
):
    """The start and an epoch take 60 s, and the run takes 300 s."""
    found = []
    monkeypatch.setattr(reproduce, "launch", lambda args, job, slot: found.append(job))
    times = SimpleNamespace(left=lambda job: 300.0, first=lambda job: 60.0)
    args = SimpleNamespace(jobs=1, deadline=reproduce.time.monotonic() + rest, time_s=budget)
    reproduce.begin(args, [], times, [SimpleNamespace(path=tmp_path, first=None)], {}, [])
    assert bool(found) == begun


def test_all_that_ignore_the_end_are_stopped_after_one_wait():
    children = [
        subprocess.Popen(
            ["bash", "-c", "trap '' TERM; echo; sleep 30"],
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        for _ in range(3)
    ]
    for child in children:
        child.stdout.read(1)  # the trap is set
    waits = []
    with pytest.MonkeyPatch.context() as patch:
        for child in children:
            wait = child.wait
            patch.setattr(child, "wait", lambda s=None, wait=wait: (waits.append(s), wait(s))[1])
        runs.stop(children, 0.2)
    patience = [seconds for seconds in waits if seconds is not None]
    assert patience[0] > 0.1
    assert max(patience[1:]) < 0.1
    assert [child.returncode for child in children] == [-9] * 3
    for child in children:
        child.stdout.close()


def test_a_run_is_stopped_right_after_its_last_checkpoint_in_time(tmp_path, monkeypatch):
    job = SimpleNamespace(path=tmp_path, epochs_left=5)
    now = 0.0
    monkeypatch.setattr(reproduce.time, "monotonic", lambda: now)

    def at(seconds, saves, deadline):
        nonlocal now
        now = seconds
        if saves:
            (tmp_path / "checkpoint.pt").touch()
            os.utime(tmp_path / "checkpoint.pt", ns=(0, int(1e9 * (1 + seconds))))
        return run.is_to_stop(deadline)

    run = reproduce.Running(job, None, epoch_s=10.0)
    assert not at(5, False, 100)
    assert at(20, True, 29)  # another is thought to take 10 s
    run = reproduce.Running(job, None, epoch_s=10.0)
    assert not at(25, True, 36)
    assert not at(29, True, 34)  # by now there is one every 4 s
    assert not at(32, False, 34)
    assert at(33, True, 34)
    job.epochs_left = 1
    assert not at(37, True, 38)  # it ends by itself
    assert at(38.1, False, 38)


def test_times_are_of_runs_on_this_machine_with_as_many_at_once(data, tmp_path, fake):
    path = write_run(tmp_path, "mixup", 0, 40.0, epochs=9, done=4, img_per_s=50,
                     seconds={"train": 2, "saliency": 1, "val": 1})  # fmt: skip
    argv = command(data, tmp_path, "--methods", "none", "--seeds", "1", "--jobs", "2")
    args = reproduce.parse(argv)
    (job,) = making.plan(args)
    start = {"jobs": 2, "hardware": hardware(), "epochs": 1, "time": 1000.0}
    (path / "starts.json").write_text(json.dumps([{"data": "d"}, start]))
    os.utime(path / "metrics.jsonl", (1017, 1017))  # 3 epochs of 4 s, and 5 s besides
    times = Times(args, probe=False)
    assert times.image(job) == pytest.approx(4 / 100)
    assert times.left(job) == pytest.approx(5 + 3 * 58 * 4 / 100)
    for odd in ({"jobs": 3}, {"hardware": "another"}, {"epochs": 4}):
        (path / "starts.json").write_text(json.dumps([start | odd]))
        assert math.isnan(Times(args, probe=False).left(job))
    assert Times(args, probe=True).left(job) > 0  # by a few steps


def test_an_archive_holds_what_runs_need_to_go_on_elsewhere(tmp_path, capsys):
    out, other, file = tmp_path / "out", tmp_path / "other", tmp_path / "new" / "runs.tar.gz"
    place = "table_lt/rho100_ce"
    ended, first, cut = (
        write_run(out, cell, 0, 40.0, method="none", place=place, done=done)
        for cell, done in (("none", 2), ("mislas_stage1", 2), ("scae", 1))
    )
    for path in (ended, first, cut):
        (path / "saliency.lmdb").mkdir()
        for name in ("checkpoint.pt", "weights.pt", "starts.json", "saliency.lmdb/data.mdb"):
            (path / name).write_text("[]")
        (path / "saliency.lmdb" / "lock.mdb").touch()
        (path / "train.log").touch()
    report(out, "--archive", str(file), table="lt")
    with tarfile.open(file) as archive:
        names = archive.getnames()
        archive.extractall(other, filter="data")
    small = ["config.json", "metrics.jsonl", "starts.json"]
    assert {path.name: sorted(names_of(other, path)) for path in (ended, first, cut)} == {
        ended.name: small,
        first.name: sorted([*small, "weights.pt"]),
        cut.name: sorted([*small, "checkpoint.pt", "saliency.lmdb/data.mdb"]),
    }
    assert len(names) == 3 + 4 + 5
    assert report(other, table="lt")["rows"] == report(out, table="lt")["rows"]
    (other / "table_lt" / cut.name / "metrics.jsonl").write_text("")
    lacking = ["--table", "lt", "--out", str(other), "--report", "--archive", str(file)]
    assert reproduce.main(lacking) == 2
    assert f"has epochs of {cut.name} that --out lacks: unpack it first" in capsys.readouterr().err
    write_run(out, "mislas", 0, 45.0, method="none", place=place)
    report(out, "--archive", str(file), table="lt")
    with tarfile.open(file) as archive:
        assert not [name for name in archive.getnames() if name.endswith("weights.pt")]
    whole = file.read_bytes()
    write_run(out, "none", 0, 40.0)
    lost = ["--table", "3", "--out", str(out), "--report", "--archive", str(file)]
    assert reproduce.main(lost) == 2
    assert "holds runs of table_lt, and those of table3 would take" in capsys.readouterr().err
    for broken in (whole[:-200], b"no tar", b""):
        file.write_bytes(broken)
        assert reproduce.main(["--table", "lt", "--out", str(out), *lost[4:]]) == 2
        assert "cannot be read" in capsys.readouterr().err
        assert file.read_bytes() == broken


def test_a_full_disk_costs_the_archive_alone(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, "none", 0, 40.0)
    argv = ["--table", "3", "--out", str(tmp_path), "--report", "--archive"]

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "add", full)
        assert reproduce.main([*argv, str(tmp_path / "runs.tar.gz")]) == 1
    said = capsys.readouterr().err
    assert "runs.tar.gz' cannot be written ([Errno 28] No space left on device): the run" in said
    assert (tmp_path / "table3.json").exists()
    assert not [path for path in tmp_path.iterdir() if "tar" in path.name]
    assert reproduce.main([*argv, "/dev/null"]) == 2
    assert "--archive must be a file, got '/dev/null'" in capsys.readouterr().err


def test_a_link_to_a_run_that_is_gone_is_replaced(data, tmp_path, fake):
    path = tmp_path / "table3" / "rho50-cifar_resnet32-none-s0"
    path.parent.mkdir()
    path.symlink_to("../table1/gone")
    assert reproduce.main(command(data, tmp_path, "--methods", "none", "--seeds", "1")) == 0
    assert path.is_dir()
    assert not path.is_symlink()


def names_of(other, path):
    """The files of a run's folder in another --out."""
    there = other / path.parent.name / path.name
    return [str(one.relative_to(there)) for one in there.rglob("*") if one.is_file()]


def test_contrasts_are_paired_by_seed(tmp_path, capsys):
    ours = {"none": (36.0, 39.0), "scae": (40.0, 42.0), "unguided": (39.5, 42.5)}
    for cell, figures in ours.items():
        for seed, top1 in enumerate(figures):
            write_run(tmp_path, cell, seed, top1, method="scae", place="table_lt/rho100_ce",
                      val_top1_adjusted=top1 + seed)  # fmt: skip
    found = report(tmp_path, table="lt")
    assert found["rows"][1]["adjusted_gain"]["values"] == [4.0, 3.0]
    assert found["rows"][1]["figures"]["adjusted"]["values"] == [40.0, 43.0]
    (contrast,) = found["contrasts"]
    assert contrast["cells"] == ["scae", "unguided"]
    assert contrast["gain"]["values"] == [0.5, -0.5]
    text = capsys.readouterr().out
    assert "SCAE − SCAE without guidance: +0.00 ± 0.71 (seeds 0, 1)" in text
    assert report(tmp_path, table="lt")["rows"][0]["independent"] == [37.7, 38.3]


def test_gains_are_paired_by_seed(tmp_path, capsys):
    ours = {"none": (36.0, 39.0, 41.0), "scae": (40.0, 42.0, None), "mixup": (None, None, 40.5)}
    for cell, figures in ours.items():
        for seed, top1 in enumerate(figures):
            if top1 is not None:
                write_run(tmp_path, cell, seed, top1, val_few=5.0 + seed, val_ece=20.0)
    write_run(tmp_path, "cutmix", 0, 50.0, done=1)
    found = report(tmp_path)
    none, mixup, scae = found["rows"]
    last = none["figures"]["last"]
    assert last["values"] == [36.0, 39.0, 41.0]
    assert last["mean"] == pytest.approx(116 / 3)
    assert last["std"] == pytest.approx(statistics.stdev([36.0, 39.0, 41.0]))
    assert (none["gain"], none["paper_gain"], none["paper"]) == (None, None, {"last": 43.87})
    assert scae["gain"]["mean"] == pytest.approx(3.5)
    assert scae["gain"]["std"] == pytest.approx(statistics.stdev([4.0, 3.0]))
    assert scae["gain"]["seeds"] == [0, 1]
    assert scae["paper_gain"] == pytest.approx(48.91 - 43.87)
    assert scae["figures"]["few"]["mean"] == 5.5
    assert "many" not in scae["figures"]
    assert mixup["gain"] == {"mean": -0.5, "std": None, "values": [-0.5], "seeds": [2]}
    assert (mixup["paper"], mixup["paper_gain"], mixup["independent"]) == ({}, None, [45.4])
    assert found["unfinished"] == ["rho50-cifar_resnet32-cutmix-s0"]
    text = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert " ".join(lines["SCAE"][1:]) == (
        "2 41.00 ± 1.41 +3.50 ± 0.71 48.91 +5.04 41.00 ± 1.41 40.50 ± 1.41 5.50 ± 0.71 20.00 ± 0.00"
    )
    assert lines["MixUp"][1:6] == ["1", "40.50", "-0.50", "45.4", "40.50"]
    assert "CIFAR-100-LT, imbalance 50, cifar_resnet32, 2 epochs (paper: 200)\n" in text
    assert (tmp_path / "table3.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_has_the_form_of_the_benchmarks_and_no_folders_of_this_machine(tmp_path):
    path = write_run(tmp_path, "none", 0, 40.0)
    start = {"hardware": {"gpu": "G"}, "versions": {"torch": "1"}, "data": "f"}
    start["options"] = ["--data.index_cache=/data/cache", "--threads", "1"]
    (path / "starts.json").write_text(json.dumps([start, start]))
    found = report(tmp_path)
    assert found["command"] == (
        f"python tools/reproduce.py --table 3 --out {tmp_path.name} --report"
    )
    assert (found["hardware"], found["versions"]) == ({"gpu": "G"}, {"torch": "1"})
    assert found["train_options"] == ["--data.index_cache=cache", "--threads", "1"]
    assert "/data" not in json.dumps(found)
    assert not (tmp_path / "table3.png").exists()  # there is no gain to draw
    other = write_run(tmp_path, "none", 1, 40.0)
    (other / "starts.json").write_text(json.dumps([start | {"hardware": {"gpu": None}}]))
    assert report(tmp_path, "--json", str(tmp_path / "table3.json"))["hardware"] == [
        {"gpu": "G"},
        {"gpu": None},
    ]


def test_runs_that_do_not_belong_together_are_not_reported(tmp_path, capsys):
    argv = ["--table", "3", "--out", str(tmp_path), "--report"]
    assert reproduce.main(argv) == 2
    assert "must hold a finished run for a report, it has none" in capsys.readouterr().err
    write_run(tmp_path, "none", 0, 40.0)
    write_run(tmp_path, "mislas", 0, 40.0, method="none", epochs=1, done=1)  # a second stage
    assert reproduce.main(argv) == 0
    write_run(tmp_path, "mixup", 0, 40.0, epochs=3, done=3)
    assert reproduce.main(argv) == 2
    assert "mixup and none must have the same epochs, they have 2 and 3" in capsys.readouterr().err
    config = write_run(tmp_path, "mixup", 1, 40.0, epochs=4, done=4) / "config.json"
    assert json.loads(config.read_text())["epochs"] == 4
    assert reproduce.main(argv) == 2
    assert "rho50, mixup: its seeds were made with different epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods", "mixupp"], "--methods must be of none, ldam_baseline"),
        (["--sections", "rho10"], "--sections must be of rho100, rho50; got rho10"),
        (["--jobs", "0"], "--jobs must be positive, got 0"),
        (["--budget", "0"], "--budget must be positive, got 0.0"),
        (["--budget", "9.5"], "--budget must be above 10 seconds, which the command itself takes"),
        (["--", "--epochs", "3"], "--epochs cannot be passed on to train.py"),
        (["--", "--out=x"], "--out cannot be passed on to train.py"),
        (["--", "--config", "x.yaml"], "--config cannot be passed on to train.py"),
        (["--", "--evaluate=true"], "--evaluate cannot be passed on to train.py"),
    ],
)
def test_wrong_arguments_are_explained(tmp_path, capsys, argv, message):
    with pytest.raises(SystemExit):
        reproduce.parse(["--table", "3", "--data", "d", "--out", str(tmp_path), *argv])
    assert message in capsys.readouterr().err


def test_options_that_train_py_does_not_take_stop_before_anything_runs(data, tmp_path, capsys):
    argv = command(data, tmp_path / "runs", "--methods", "none", options=["--optim.lrr", "1"])
    assert reproduce.main(argv) == 2
    error = capsys.readouterr().err
    assert "rho50-cifar_resnet32-none-s0: train.py does not take its options" in error
    assert "lrr" in error
    assert not (tmp_path / "runs").exists()


def test_what_a_cell_is_cannot_be_changed_by_options(tmp_path):
    section = TABLES["3"].sections[0]
    args = arguments("3", tmp_path, "--", "--scae.class_aware=true", "--batch_size=64")
    job = making.make_job(args, section, "cifar_resnet32", section.cell("guided"), 0)
    assert not job.config.scae.class_aware
    assert job.config.batch_size == 64


def test_threads_are_shared_out_on_the_cpu(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    threads = [runs.environment(0, n, "cpu")["OMP_NUM_THREADS"] for n in (1, 3, 20)]
    assert threads == ["8", "2", "1"]


def test_gpus_are_taken_in_turn(monkeypatch):
    monkeypatch.setattr(runs.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    seen = [runs.environment(n, 4, "auto")["CUDA_VISIBLE_DEVICES"] for n in range(3)]
    assert seen == ["3", "5", "3"]


def test_two_cells_the_second_on_the_firsts_weights_end_to_end(data, tmp_path):
    tiny = ["--device", "cpu", "--amp", "none", "--batch_size", "8", "--threads", "1"]
    more = ["--methods", "mislas", "--seeds", "1", "--models", "cifar_resnet20", "--jobs", "2"]
    argv = command(data, tmp_path, *more, options=tiny)
    argv[argv.index("--epochs") + 1] = "1"
    status = reproduce.main(argv)
    logs = [path.read_text()[-2000:] for path in tmp_path.glob("table3/*/train.log")]
    assert status == 0, logs
    found = json.loads((tmp_path / "table3.json").read_text())
    assert [row["cell"] for row in found["rows"]] == ["mislas_stage1", "mislas"]
    assert [row["paper"] for row in found["rows"]] == [{}, {}]  # another network
    assert {"last", "top-5", "few", "ECE", "overhead"} <= found["rows"][1]["figures"].keys()
    assert str(tmp_path) not in json.dumps(found)
    args = reproduce.parse(argv)
    making.refuse_others(args)
    jobs = making.plan(args)
    assert all(making.finished(job, jobs) for job in jobs)
    written = json.loads((jobs[1].path / "config.json").read_text())
    assert written == jobs[1].settings
    assert written["second_stage"]["classifier"] == "tune"


def test_cells_of_imagenet_end_to_end(tmp_path):
    """Its recipe, but for the size, on folders as ImageNet has them."""
    counts = dict.fromkeys(("n01440764", "n01443537", "n01484850"), 8)
    for seed, split in enumerate(("train", "val")):
        write_images(tmp_path / "data" / split, counts, seed=seed)
    for path in tmp_path.glob("data/*/*/*.jpg"):
        path.rename(path.with_suffix(".JPEG"))
    tiny = {"device": "cpu", "threads": 1, "batch_size": 8}
    tiny |= {"image.size": 32, "image.val_resize": 36, "saliency.size": 64}
    given = {"table": 2, "data": tmp_path / "data", "out": tmp_path, "models": "resnet18"}
    given |= {"methods": "none,scae", "seeds": 1, "epochs": 1, "jobs": 2}
    argv, options = ([f"--{name}={value}" for name, value in d.items()] for d in (given, tiny))
    status = reproduce.main([*argv, "--", *options])
    logs = [path.read_text()[-2000:] for path in tmp_path.glob("table2/*/train.log")]
    assert status == 0, logs
    found = json.loads((tmp_path / "table2.json").read_text())
    assert found["title"] == "ImageNet"
    assert [row["cell"] for row in found["rows"]] == ["none", "scae"]
    none, scae = (row["figures"] for row in found["rows"])
    assert {"last", "top-5", "ECE", "overhead"} <= scae.keys()
    assert none["top-5"]["values"] == [100]  # of three classes
    assert found["rows"][1]["gain"]["seeds"] == [0]
    run = tmp_path / "table2" / "imagenet-resnet18-scae-s0"
    made = json.loads((run / "config.json").read_text())
    assert made["amp"] == "bf16"
    assert (made["image"]["dtype"], made["image"]["layout"]) == ("fp16", "NHWC")
