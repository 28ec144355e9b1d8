"""The benchmarks as they are run: in a process of their own, on a few drawn images."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import run, write_images
from PIL import Image

from scae_dali.methods import Status
from scae_dali.training.networks import make_network
from tools import ROOT, benchmark
from tools.common import live

PLOTTED = ("pipeline_native", "scale")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", {"class0": 3, "class1": 3})
    return root


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Rows are not compared here, so that nobody waits until the process rests."""
    monkeypatch.setattr(live.settle, "__defaults__", (0.01, 0.1))


def test_the_runner_lists_what_there_is():
    listed = [line.split(maxsplit=1) for line in run("benchmark").splitlines()[2:]]
    assert tuple(name for name, _ in listed) == (*benchmark.NAMES, "--compare")
    assert all(said.endswith(".") for _, said in listed)
    assert run("benchmark", "--help") == run("benchmark")
    said = run("benchmark", "bandwidth", status=2)
    assert "error: no benchmark 'bandwidth'; there are pipeline, processes, " in said


@pytest.mark.parametrize("name", benchmark.NAMES)
def test_every_benchmark_tells_its_options(name, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main([name, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: benchmark.py {name} ")
    assert ("--batch-size" in said) == (name != "plot_performance")
    assert not re.search(r"--(root|batch|device-id|tail-share|arrays)\b(?!-)", said)


def test_train_compiled(tmp_path, monkeypatch):
    """Two networks of one class are compiled, and only one has the harvest's hook."""
    out, compile_it = tmp_path / "bench.json", torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, mode: compile_it(net, backend="eager"))
    options = ["--source", "memory", "--model", "cifar_resnet20", "--quick", "--compile", "default"]
    torch.compiler.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        benchmark.main(["train", *options, "--json", str(out)])
    torch.compiler.reset()
    names = [row["name"] for row in json.loads(out.read_text())["rows"]]
    assert names == ["synthetic", "none", "scae", "harvest"]


@pytest.mark.parametrize("source", ["memory", "files"])
def test_train(tmp_path, images, source):
    out = tmp_path / "bench.json"
    data = ["--source", "memory"] if source == "memory" else ["--data", images, "--repeat", 4]
    size = ["--model", "cifar_resnet20", "--size", 16, "--batch-size", 4, "--quick"]
    passes = ["--pass-every", 2, "--pass-size", 24, "--pass-share", 0.5]
    run("benchmark", "train", *data, *size, *passes, "--json", out)
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {"synthetic", "none", "scae", "harvest", "saliency pass"}
    assert min(row["img_per_s"] for row in rows.values()) > 0
    assert set(result["overhead"]) == {"steps", "harvest", "passes", "total"}
    assert result["overhead"]["passes"] == pytest.approx(
        0.25 / rows["saliency pass"]["ratio"], rel=0.01
    )
    message = run("benchmark", "train", *data, *size, *passes, "--pass-steps", 1, status=1)
    assert "a pass needs at least two batches of 4, got 4 images; pass a larger" in message


def test_saliency_pass(tmp_path, images):
    out = tmp_path / "bench.json"
    torch.manual_seed(0)
    torch.save(make_network("cifar_resnet20", 2).state_dict(), tmp_path / "weights.pt")
    options = ["--data", images, "--model", "cifar_resnet20", "--weights", tmp_path / "weights.pt"]
    options += ["--sizes", "32,16", "--quick", "--batch-size", 2]
    run("benchmark", "saliency_pass", *options, "--json", out)
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    sizes = [f"{what}, {size}" for size in (32, 16) for what in ("images", "inference", "pass")]
    forwards = [f"forward{what}" for what in ("", ", BatchNorm folded", ", channels-last")]
    assert list(rows) == sizes + forwards
    assert rows["inference, 32"]["ratio"] == 1
    assert set(result["of_inference"]) == {"32", "16"}
    assert result["agreement"]["32"] == 1
    assert -1 < result["agreement"]["16"] < 1
    assert result["settings"]["images"] == 6
    message = run(
        "benchmark",
        "saliency_pass",
        *options,
        "--batch-size",
        8,
        "--repeat",
        4,
        "--images",
        8,
        status=1,
    )
    assert "at least two batches, got 8 images and --batch-size 8" in message


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [
        ("operator", ["--batch-size", 16, "--size", 32, "--samples", 2000], 26),
        ("cache", ["--batch", 64, "--records", "1e4", "--processes", "1", "--seconds", 0.1], 7),
    ],
)
def test_a_benchmark_in_a_minute_with_a_plot(tmp_path, name, options, rows):
    out, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    text = run("benchmark", name, *options, "--quick", "--json", out, "--plot", plot)
    result = json.loads(out.read_text())
    assert set(result) >= {"command", "commit", "hardware", "versions", "rows"}
    assert len(result["rows"]) == rows
    for row in result["rows"]:
        assert set(row) == {"name", "img_per_s", "iqr", "ratio", "ratio_iqr", "rates"}
        assert min(row["rates"]) - 0.1 < row["img_per_s"] < max(row["rates"]) + 0.1
        assert f"{row['ratio']:6.2f}  {row['ratio_iqr']:5.2f}" in text
    with Image.open(plot) as image:
        assert image.format == "PNG"


def test_plot_performance(tmp_path):
    """The plot of the page on results, from the results that it names."""
    pipeline, scale = (ROOT / "tools" / "results" / f"{name}_cpu.json" for name in PLOTTED)
    out = tmp_path / "plots" / "performance.png"
    run("benchmark", "plot_performance", "--pipeline", pipeline, "--scale", scale, "--out", out)
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.width > 1000
    page = (ROOT / "tools" / "results" / "README.md").read_text()
    for name in PLOTTED:
        assert f"{name}_cpu.json" in page


def test_gradcam(tmp_path):
    out = tmp_path / "bench.json"
    run("benchmark", "gradcam", "--model", "resnet18", "--size", 64, "--quick", "--json", out)
    result = json.loads(out.read_text())
    rows = {row["name"]: row["ratio"] for row in result["rows"]}
    assert rows["forward"] == 1
    assert result["cost"] == round(1 / rows["gradcam"], 3)
    assert result["settings"]["batch_size"] == 4


def test_a_benchmark_without_rounds_is_refused():
    assert "--rounds: must be a whole number, at least 1, got 0" in run(
        "benchmark", "operator", "--rounds", 0, status=2
    )


def test_images_that_are_erased_and_mixed_count_as_mixed():
    mixed, erased, unguided = int(Status.MIXED), int(Status.ERASED), int(Status.NO_MAP)
    status = torch.tensor([mixed, mixed | erased, mixed | unguided, erased, 0])
    batch = SimpleNamespace(status=status, ids=range(5), images=torch.zeros(5, 3, 2, 2))
    counter = live.Counter()
    assert [len(images) for images in counter([batch, batch])] == [5, 5]
    assert counter.share == 0.6
