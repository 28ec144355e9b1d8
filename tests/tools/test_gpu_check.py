"""gpu_check.py: what it lists, runs and reports; and, on a GPU, all of it."""

import json

import pytest
import torch
from conftest import run, run_script, write_images

from scae_dali.methods import BUILT_IN


def test_gpu_check_lists_every_method():
    listed = run("gpu_check", "--dry-run").split()
    methods = {name.split("/")[1] for name in listed if name.startswith("train/")}
    assert methods == set(BUILT_IN)
    kinds = {name.split("/")[0] for name in listed}
    assert kinds >= {"val", "saliency", "user", "gradcam", "arrays", "saliency-arrays", "mix"}
    assert "compile/reduce-overhead" in listed
    assert not [name for name in listed if name.startswith("_")]


PASSES = {
    "train/scae/roi/fp16-NHWC": ["python: 24 images", "torch: 24 images"],
    "mix/roi/fp16-NHWC": ["72 images", "mixed", "batches had none"],
    "user-mix": ["72 images", "mixed"],
    "arrays/scae/fp16-NHWC": ["45 images", "mixed"],
    "saliency-arrays/fp32-NCHW": ["45 images", "maps: mean |difference| 0.0000"],
    "harvest/plain": ["maps, mean |difference| 0.0000"],
    "erase/noise": ["roughness of the noise"],
    "compile/reduce-overhead": ["skipped"],
}
FAILS = {
    "_crash": "killed by SIGABRT",
    "_differ/images": "allowed are 3.0",
    "_differ/boxes": "AssertionError: boxes differ",
}


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    """The report of all PASSES, by the script as users run it."""
    out = tmp_path_factory.mktemp("passed") / "checks.json"
    run_script("gpu_check", "--device", "cpu", "--only", ",".join(PASSES), "--json", out)
    return json.loads(out.read_text())


def test_gpu_check_reports_what_it_ran(passed):
    assert {"command", "commit", "hardware", "versions", "complete", "checks"} == set(passed)
    assert passed["complete"]
    assert {check["name"] for check in passed["checks"]} == set(PASSES)
    assert len(passed["checks"]) == len(PASSES)


@pytest.mark.parametrize("name", PASSES)
def test_gpu_check_passes_on_the_cpu(passed, name):
    (check,) = (check for check in passed["checks"] if check["name"] == name)
    assert check["ok"]
    assert all(part in check["detail"] for part in PASSES[name]), check["detail"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images") / "data"
    write_images(root, {"a": 3, "b": 3})
    return root


@pytest.fixture(scope="module")
def failed(images, tmp_path_factory):
    """The rows of FAILS. Each check ends its process, and the next one has a new one."""
    out = tmp_path_factory.mktemp("failed") / "checks.json"
    options = ["--only", ",".join(FAILS), "--data", images, "--json", out]
    said = run_script("gpu_check", "--device", "cpu", *options, status=1)
    assert "\n0 of 3 checks passed\n" in said
    return {check["name"]: check for check in json.loads(out.read_text())["checks"]}


@pytest.mark.parametrize("name", FAILS)
def test_gpu_check_reports_what_fails(failed, name):
    assert not failed[name]["ok"]
    assert FAILS[name] in failed[name]["detail"]


def test_gpu_check_reports_what_hangs(images, tmp_path):
    out = tmp_path / "checks.json"
    options = ["--only", "_hang", "--data", images, "--timeout", 2, "--json", out]
    run_script("gpu_check", "--device", "cpu", *options, status=1)
    (check,) = json.loads(out.read_text())["checks"]
    assert not check["ok"]
    assert "no end after 2.0 s" in check["detail"]


def test_gpu_check_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert "--dry-run lists the checks" in run("gpu_check", status=2)


@pytest.mark.gpu
def test_every_check_of_the_gpu_passes():
    run("gpu_check")
