"""The tools as they are run: in a process of their own, on a few drawn images."""

import json

import numpy as np
import pytest
import torch
from conftest import TOOLS, run
from PIL import Image

from pipelines.recipe import make_network
from scae_dali.cache import SaliencyCache
from scae_dali.dataset import ImageIndex
from scae_dali.methods import BUILT_IN

PLOTTED = ("pipeline_native", "scale")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Six images of two classes, one of them stored rotated and one grey."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(6):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        image = coarse.resize((96, 64 + 8 * i)).convert("L" if i == 1 else "RGB")
        exif = image.getexif()
        exif[0x0112] = 6 if i == 0 else 1
        path = root / "data" / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, exif=exif)
    return root / "data"


@pytest.fixture(scope="module")
def maps(images):
    index = ImageIndex(images)
    cache = SaliencyCache.create(images.parent / "maps.lmdb", index, grid=(7, 7))
    saliency = np.random.default_rng(0).integers(0, 256, (len(index) - 1, 7, 7), dtype=np.uint8)
    cache.begin_pass(0)
    cache.write(np.arange(len(index) - 1), saliency, epoch=0)  # the last image has none
    cache.close()
    return images.parent / "maps.lmdb"


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
        ("train/scae/roi/fp16-NHWC", ["numpy cpu: 24 images", "torch cpu: 24 images"]),
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
    run("gpu_check", "--device-id", "cpu", "--only", name, "--json", out)
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
def test_gpu_check_reports_what_fails(tmp_path, images, name, expected):
    out = tmp_path / "checks.json"
    arguments = ["--device-id", "cpu", "--only", name, "--data", images, "--json", out]
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


def test_bench_mixing(tmp_path, images):
    out = tmp_path / "bench.json"
    size = ["--size", 32, "--batch-size", 4, "--repeat", 8, "--tail-share", "0.05,0.1"]
    run("bench_mixing", "--data", images, "--rounds", 2, "--json", out, *size)
    result = json.loads(out.read_text())
    ratios = {row["name"]: row["ratio"] for row in result["rows"]}
    assert set(ratios) == {
        *("unmixed 5%", "mixed 5%", "unmixed 5% (again)", "none"),
        *("unmixed 10%", "mixed 10%"),
    }
    assert ratios["unmixed 5%"] == ratios["unmixed 10%"] == 1
    share = result["mixed_share"]
    assert 0 < share["mixed 5%"] < 0.15
    assert share["mixed 5%"] < share["mixed 10%"] < 0.25
    assert share["unmixed 10%"] == share["none"] == 0


def test_bench_mixing_wants_a_tail(images):
    size = ["--size", 32, "--batch-size", 4, "--rounds", 1]
    assert "pass a larger --repeat" in run("bench_mixing", "--data", images, *size, status=1)
    options = ["--data", images, "--tail-share", "0.01,1"]
    assert "--tail-share must be" in run("bench_mixing", *options, status=2)


def test_bench_arrays(tmp_path, images):
    out = tmp_path / "bench.json"
    run("bench_arrays", "--images", 640, "--size", 16, "--rounds", 1, "--json", out)
    result = json.loads(out.read_text())
    assert [row["name"] for row in result["rows"]] == [
        "none",
        "random_erasing",
        "scae",
        "scae, long tail",
        "none (again)",
    ]
    share = result["mixed_share"]
    assert 0 < share.pop("scae, long tail") < 0.1
    assert set(share.values()) == {0}
    assert result["settings"]["batches_per_round"] == 5
    message = run("bench_arrays", "--images", 64, "--size", 16, status=1)
    assert "there are 64 images, fewer than --batch-size 128" in message


@pytest.mark.parametrize("source", ["arrays", "files"])
def test_bench_train(tmp_path, images, source):
    out = tmp_path / "bench.json"
    data = ["--arrays"] if source == "arrays" else ["--data", images, "--repeat", 4]
    size = ["--model", "cifar_resnet20", "--size", 16, "--batch-size", 4, "--quick"]
    passes = ["--pass-every", 2, "--pass-size", 24, "--pass-share", 0.5]
    run("bench_train", *data, *size, *passes, "--json", out)
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert set(rows) == {"synthetic", "none", "scae", "harvest", "saliency pass"}
    assert min(row["img_per_s"] for row in rows.values()) > 0
    assert set(result["overhead"]) == {"steps", "harvest", "passes", "total"}
    assert result["overhead"]["passes"] == pytest.approx(
        0.25 / rows["saliency pass"]["ratio"], rel=0.01
    )
    message = run("bench_train", *data, *size, *passes, "--pass-steps", 1, status=1)
    assert "a pass needs at least two batches of 4, got 4 images; pass a larger" in message


def test_bench_pass(tmp_path, images):
    out = tmp_path / "bench.json"
    torch.manual_seed(0)
    torch.save(make_network("cifar_resnet20", 2).state_dict(), tmp_path / "weights.pt")
    options = ["--data", images, "--model", "cifar_resnet20", "--weights", tmp_path / "weights.pt"]
    options += ["--sizes", "32,16", "--quick", "--batch-size", 2]
    run("bench_pass", *options, "--json", out)
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
    message = run("bench_pass", *options, "--batch-size", 8, "--repeat", 4, "--images", 8, status=1)
    assert "at least two batches, got 8 images and --batch-size 8" in message


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [
        ("operator", ["--batch-size", 16, "--size", 32, "--samples", 2000], 21),
        ("cache", ["--batch", 64], 7),
        ("arrays", ["--size", 16], 5),
    ],
)
def test_a_benchmark_in_a_minute_with_a_plot(tmp_path, name, options, rows):
    out, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    text = run(f"bench_{name}", *options, "--quick", "--json", out, "--plot", plot)
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
    """The README's plot, from the results that it names."""
    pipeline, scale = (TOOLS / "results" / f"{name}_cpu.json" for name in PLOTTED)
    out = tmp_path / "plots" / "performance.png"
    run("plot_performance", "--pipeline", pipeline, "--scale", scale, "--out", out)
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.width > 1000
    readme = (TOOLS.parent / "README.md").read_text()
    for name in PLOTTED:
        assert f"tools/results/{name}_cpu.json" in readme


def test_bench_gradcam(tmp_path):
    out = tmp_path / "bench.json"
    run("bench_gradcam", "--model", "resnet18", "--size", 64, "--quick", "--json", out)
    result = json.loads(out.read_text())
    rows = {row["name"]: row["ratio"] for row in result["rows"]}
    assert rows["forward"] == 1
    assert result["cost"] == round(1 / rows["gradcam"], 3)
    assert result["settings"]["batch_size"] == 4


def test_pointing_game(tmp_path, images, maps):
    """All of the frame is the object: every usable map hits, and so would chance."""
    index = ImageIndex(images)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(images)
    objects = {f"train/{name}": [0.0, 0.0, 1.0, 1.0] for name in index.files}
    known, out = tmp_path / "data" / "objects.json", tmp_path / "new" / "game.json"
    known.write_text(json.dumps(objects))
    run("pointing_game", "--data", tmp_path / "data", "--cache", maps, "--json", out)
    figures = json.loads(out.read_text())
    assert (figures["hit_rate"], figures["chance"]) == (1, 1)
    assert (figures["images"], figures["usable_maps"] > 0.5) == (len(index), True)
    known.write_text("{}")
    said = run("pointing_game", "--data", tmp_path / "data", "--cache", maps, status=1)
    assert "objects.json in" in said
    assert "none of 'train/class0/0.jpg'" in said


def test_a_benchmark_without_rounds_is_refused():
    assert "--rounds: must be a whole number, at least 1, got 0" in run(
        "bench_operator", "--rounds", 0, status=2
    )


def test_show_erasing(tmp_path, images, maps):
    sheet = tmp_path / "sheet.png"
    out = run(
        "show_erasing",
        *("--data", images, "--cache", maps, "--ids", "0,5", "--lam", "0,3", "--out", sheet),
    )
    rotated, unmapped = out.splitlines()[:2]
    assert rotated.startswith("0 class0/0.jpg 96x64 ")  # upright
    assert "λ=3" in rotated
    assert "no map" in unmapped
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        assert image.size == (1100, 440)


def test_show_erasing_erases_images_of_the_tail_too(tmp_path, tailed, tailed_cache):
    options = ["--data", tailed.root, "--cache", tailed_cache.path, "--size", 24, "--lam", "0,3"]
    out = run("show_erasing", *options, "--images", 63, "--out", tmp_path / "sheet.png")
    lines = [line for line in out.splitlines() if "λ=" in line]
    assert len(lines) == 63
    assert not any(", 0, 0)" in line for line in lines)


def test_show_erasing_without_a_cache(tmp_path, images):
    out = run(
        "show_erasing",
        *("--data", images, "--cache", tmp_path / "none.lmdb", "--out", tmp_path / "sheet.png"),
        status=1,
    )
    assert f"build_cache.py --data {images} --model" in out
