"""gpu/all.sh: its commands, taken apart by their own parsers, and how it keeps to its time."""

import os
import re
import shlex
import subprocess

import pytest
import torch
from conftest import ROOT
from test_readmes import parse_tool

# In the place of Python: a command fails if its first option is in FAIL, or lasts as long as SLOW
# says, and writes its JSON, also if it fails.
STUB = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
for word in "$@"; do
  [[ " $FAIL " == *" $word "* ]] && fails=1
  [[ " $SLOW " == *" $word "* ]] && exec sleep 60
  [[ $last == --json ]] && echo '{}' > "$word"
  last=$word
done
[[ $fails ]] && echo "it broke"
exit ${fails:-0}
"""


def all_sh(seconds, out, **variables):
    """Its lines. status: what it must end with."""
    status = variables.pop("status", 0)
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "gpu" / "all.sh"), str(seconds), str(out)],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / "python"
    path.write_text(STUB)
    path.chmod(0o755)
    (tmp_path / "data").mkdir()
    return {"PYTHON": path, "CALLS": tmp_path / "calls", "FAIL": "", "SLOW": "", "DEVICE": "cpu",
            "DATA": tmp_path / "data", "PHOTOGRAPHS": tmp_path / "data"}  # fmt: skip


@pytest.mark.parametrize("device", ["0", "cpu"])
def test_its_commands_are_understood(tmp_path, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.chdir(ROOT)
    (tmp_path / "test").mkdir()
    variables = {
        "DRY_RUN": 1,
        "PYTHON": "python",
        "DEVICE": device,
        "DATA": tmp_path,
        "PHOTOGRAPHS": tmp_path,
    }
    lines = all_sh(600, tmp_path / "out", **variables)
    commands = [shlex.split(line) for line in lines if line.startswith("'python'")]
    assert len(commands) == 11 + (device != "cpu")
    for _, script, *options in commands:
        if script != "-m":
            with monkeypatch.context() as patch:
                parse_tool(script.removeprefix("tools/").removesuffix(".py"), options, patch)
    tables = [command[3] for command in commands if "reproduce.py" in command[1]]
    assert tables == ["lt", "1", "4", "lt"]
    assert ("skip  pytest: its tests need a GPU" in lines) == (device == "cpu")


def test_it_goes_on_after_a_failure_and_names_it(tmp_path, stub):
    out = tmp_path / "out"
    lines = all_sh(600, out, status=1, **stub | {"FAIL": "pipeline"})
    assert [line for line in lines if line.startswith("FAIL")] == [
        f"FAIL  pipeline: status 1, 0 s; {out}/pipeline.log ends with"
    ]
    assert "      | it broke" in lines
    assert lines[-1].startswith("failed: pipeline; not through: nothing; ")
    done = {path.stem for path in out.glob("*.done")}
    assert done == {"table_lt", "check_new", "check_all", "train_small", "train_load_0.65",
                    "train_load_0.9", "pass", "table_1", "table_4"}  # fmt: skip
    again = all_sh(600, out, **stub)
    assert "have  check_new" in again
    assert again[-1].startswith("failed: nothing; not through: nothing; ")
    assert [line.split(",")[0] for line in again if line.startswith("done")] == [
        "done  table_lt", "done  pipeline", "done  table_1", "done  table_4", "done  table_lt"
    ]  # fmt: skip


def test_a_time_that_is_no_number_is_told(tmp_path, stub):
    for seconds in ("5m", "1e3", "abc", "-5", "0"):
        assert all_sh(seconds, tmp_path / "out", status=2, **stub) == []


def test_paths_are_of_where_it_is_called(tmp_path, stub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    all_sh(600, "here", **stub | {"DATA": "data", "PHOTOGRAPHS": "data"})
    assert (tmp_path / "here" / "pass.json").exists()
    assert f"--data {tmp_path / 'data'} " in stub["CALLS"].read_text()


def test_it_keeps_to_its_time(tmp_path, stub):
    lines = all_sh(26, tmp_path / "out", **stub | {"SLOW": "erase/clip"})
    assert "left  table_lt: no time" in lines  # it has six tenths of the time at first
    assert "left  check_new: not through after 11 s" in lines
    assert "left  pass: no time" in lines
    assert not (tmp_path / "out" / "table_1.json").exists()
    assert int(re.search(r"; (\d+) of 26 s$", lines[-1])[1]) < 15


def test_it_goes_on_with_the_runs_of_its_archives(tmp_path, stub):
    out, run = tmp_path / "out", tmp_path / "table_lt" / "rho100_bs-cifar_resnet32-none-s0"
    run.mkdir(parents=True)
    out.mkdir()
    (run / "config.json").write_text("{}")
    archive = out / "runs_lt.tar.gz"
    subprocess.run(["tar", "-czf", archive, "-C", tmp_path, "table_lt"], check=True)
    all_sh(600, out, **stub | {"RUNS": tmp_path / "runs"})
    assert (tmp_path / "runs" / "table_lt" / run.name / "config.json").read_text() == "{}"
    assert f"--out {tmp_path / 'runs'} " in stub["CALLS"].read_text()
