"""gpu_check.py: what it lists, runs and reports; and, on a GPU, all of it."""

import json

import pytest
import torch
from conftest import run, write_images

from scae_dali.methods import BUILT_IN


def test_gpu_check_lists_every_method():
    listed = run("gpu_check", "--dry-run").split()
    methods = {name.split("/")[1] for name in listed if name.startswith("train/")}
    assert methods == set(BUILT_IN)
    kinds = {name.split("/")[0] for name in listed}
    assert kinds >= {"val", "saliency", "user", "gradcam", "arrays", "saliency-arrays", "mix"}
    assert "compile/reduce-overhead" in listed
    assert not [name for name in listed if name.startswith("_")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train/scae/roi/fp16-NHWC", ["python: 24 images", "torch: 24 images"]),
        ("mix/roi/fp16-NHWC", ["72 images", "mixed", "batches had none"]),
        ("user-mix", ["72 images", "mixed"]),
        ("arrays/scae/fp16-NHWC", ["45 images", "mixed"]),
        ("saliency-arrays/fp32-NCHW", ["45 images", "maps: mean |difference| 0.0000"]),
        ("harvest/plain", ["maps, mean |difference| 0.0000"]),
        ("erase/noise", ["roughness of the noise"]),
        ("compile/reduce-overhead", ["skipped"]),
    ],
)
def test_gpu_check_passes_on_the_cpu(tmp_path, name, expected):
    out = tmp_path / "checks.json"
    run("gpu_check", "--device", "cpu", "--only", name, "--json", out)
    result = json.loads(out.read_text())
    assert {"command", "commit", "hardware", "versions", "complete", "checks"} == set(result)
    assert result["complete"]
    (check,) = result["checks"]
    assert check["ok"]
    assert check["name"] == name
    assert all(part in check["detail"] for part in expected), check["detail"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_crash", "killed by SIGABRT"),
        ("_hang", "no end after 2.0 s"),
        ("_differ/images", "allowed are 3.0"),
        ("_differ/boxes", "AssertionError: boxes differ"),
    ],
)
def test_gpu_check_reports_what_fails(tmp_path, name, expected):
    images = tmp_path / "data"
    write_images(images, {"a": 3, "b": 3})
    out = tmp_path / "checks.json"
    arguments = ["--device", "cpu", "--only", name, "--data", images, "--json", out]
    if name == "_hang":
        arguments += ["--timeout", 2]
    run("gpu_check", *arguments, status=1)
    (check,) = json.loads(out.read_text())["checks"]
    assert not check["ok"]
    assert expected in check["detail"]


def test_gpu_check_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert "--dry-run lists the checks" in run("gpu_check", status=2)


@pytest.mark.gpu
def test_every_check_of_the_gpu_passes():
    run("gpu_check", timeout=None)
