"""The example of several processes: under torchrun, and by its batch script under a SLURM that is
played by two scripts."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from scripts import TWO_PROCESSES, run_there

import scae_dali
from tools.make_demo_data import make

EXAMPLES = ROOT / "pipelines" / "examples"
EPOCHS, STEPS = 3, 2  # steps an epoch, of 16 images in each of two processes

# Two nodes with a task on each.
SRUN = """
import os, subprocess, sys
tasks = [
    subprocess.Popen(
        sys.argv[1:],
        env=os.environ | dict(
            SLURM_PROCID=task, SLURM_NTASKS="2", SLURM_LOCALID="0", SLURM_NODEID=task
        ),
    )
    for task in "01"
]
sys.exit(max(task.wait() for task in tasks))
"""
# The second task is given notice in its third step, unless the job was started again.
PYTHON = """
import os, runpy, signal, sys
import scae_dali
loss, steps = scae_dali.mixed_cross_entropy, []
def counted(*arguments):
    steps.append(1)
    if len(steps) == 3 and os.environ["RANK"] == "1" and "SLURM_RESTART_COUNT" not in os.environ:
        os.kill(os.getpid(), signal.SIGUSR1)
    return loss(*arguments)
scae_dali.mixed_cross_entropy = counted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SCONTROL = """
import sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("localhost", "elsewhere", sep="\\n")
else:
    print("scontrol", *sys.argv[1:])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """76 images of 2 classes, 38 for each process."""
    root = tmp_path_factory.mktemp("demo") / "data"
    counts = {"classes": 2, "train_max": 40, "imbalance": 1.1, "val_per_class": 1}
    make(root, **counts, seed=0, size_range=(48, 64), report=lambda line: None)
    return root


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a run under torchrun, and what it printed."""
    out = tmp_path_factory.mktemp("whole")
    example = str(EXAMPLES / "distributed.py")
    options = [f"--data={data}", f"--out={out}", f"--epochs={EPOCHS}"]
    done = run_there(*TWO_PROCESSES, example, *options)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def check_maps(out, node, data):
    index = scae_dali.ImageIndex(data / "train")
    with scae_dali.SaliencyCache(out / f"maps-of-node-{node}.lmdb", index=index) as cache:
        assert cache.coverage().found == len(index) == 76
        assert cache.meta.epoch == 2


def test_torchrun(whole, data):
    out, said = whole
    assert said.splitlines()[-1] == f"{STEPS * EPOCHS} steps; finished"
    check_maps(out, 0, data)
    assert not (out / "maps-of-node-1.lmdb").exists()


def submit(data, out, here, **environment):
    """What the batch script prints, run as the scheduler would run it."""
    for name, code in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        (here / f"{name}.py").write_text(code)
        (here / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{here}/{name}.py" "$@"\n')
        (here / name).chmod(0o755)
    environment |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost,elsewhere"}
    environment |= {"PATH": f"{here}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", EXAMPLES / "distributed.sbatch", data, out, f"--epochs={EPOCHS}"],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_job_that_is_given_notice_saves_and_goes_on_bit_for_bit(whole, data, tmp_path):
    out = tmp_path / "out"
    first = submit(data, out, tmp_path)
    assert first[-2:] == ["3 steps; to be started again", f"scontrol requeue {os.getpid()}"]
    assert (out / "checkpoint.pt").exists()
    assert not (out / "weights.pt").exists()
    second = submit(data, out, tmp_path, SLURM_RESTART_COUNT="1")
    assert second[-1] == f"{STEPS * EPOCHS - 3} steps; finished"
    for node in (0, 1):
        check_maps(out, node, data)
    mine, other = (torch.load(run / "weights.pt") for run in (out, whole[0]))
    for name, one in other.items():
        assert torch.equal(mine[name], one)
