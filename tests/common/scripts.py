"""train.py in this process or in others, where it can be killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from forks import Script, run_forked

import train

ROOT = Path(__file__).parents[2]
# Behind the interpreter: what follows it runs in two processes.
TWO_PROCESSES = (
    *("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"),
    *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
)


# Sends itself a signal at the n-th call of a method.
KILLER = """
import os, signal, sys
import {module} as module
owner, name, calls = {owner}, {name!r}, {calls}
original = getattr(owner, name)
def counting(*arguments, **keywords):
    global calls
    calls -= 1
    if calls == -1:
        os.kill(os.getpid(), signal.{signal})
    return original(*arguments, **keywords)
setattr(owner, name, counting)
import train
sys.argv = ["train.py", *sys.argv[1:]]
train.main()
"""


def run_here(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    train.main()


def run_code(code, *argv):
    """Runs code that finds train.py imported already."""
    done, *_ = run_forked(Script(code, argv, {"CUDA_VISIBLE_DEVICES": ""}))
    return done


def run_there(*argv):
    """Runs an interpreter with these arguments."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *argv],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def rows(out):
    """metrics.jsonl without what a clock gave."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "img_per_s", "overhead_percent")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def check_same_weights(out, other):
    mine, theirs = (torch.load(o / "weights.pt", weights_only=True) for o in (out, other))
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=0, atol=0)


def arguments(data, out, **more):
    """Of four epochs on small images in files."""
    settings = {
        "data.root": data,
        "out": out,
        "model": "cifar_resnet20",
        "epochs": 4,
        "batch_size": 8,
        "threads": 2,
        "device": "cpu",
        "image.size": 32,
        "image.val_resize": 32,
        "saliency.size": 64,
        "saliency.layer": "layer3",
        "scae.refresh_every": 2,
        "optim.lr": 0.02,
        "optim.ema": 0.9,
        "optim.decay_norms": "false",
        "checkpoint_every": 2,
    } | more
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def long_tailed(data, out, **more):
    """Of two epochs on small images in memory, by the recipe of CIFAR-100-LT."""
    settings = {
        "config": ROOT / "pipelines" / "cifar100_lt.yaml",
        "data.root": data,
        "data.format": "folder",
        "data.val_dir": "test",
        "data.in_memory": "true",
        "data.imbalance": "null",
        "out": out,
        "model": "cifar_resnet20",
        "epochs": 2,
        "batch_size": 8,
        "device": "cpu",
        "amp": "none",
        "scae.refresh_every": 1,
        "scae.mix_prob": 0.9,
        "optim.lr": 0.02,
        "checkpoint_every": 2,
    } | more
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]
