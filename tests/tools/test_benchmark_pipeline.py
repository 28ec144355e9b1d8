"""The benchmarks `pipeline` and `processes`: their rows, on a few drawn images."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import run, write_images
from PIL import Image

from pipelines.config import ExecConfig, ImageConfig
from scae_dali.data.index import ImageIndex
from scae_dali.plan.crop import CropConfig
from tools.benchmarks import native, peers, pipeline, pipeline_rows, processes
from tools.common import live, made_up


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images") / "data"
    write_images(root, {"a": 3, "b": 3})
    return root


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Rows are not compared here, so that nobody waits until the process rests."""
    monkeypatch.setattr(live.settle, "__defaults__", (0.01, 0.1))


def test_rows_of_tars_stand_beside_those_of_files(tmp_path, images):
    out = tmp_path / "bench.json"
    size = ["--size", 32, "--batch-size", 4, "--repeat", 2, "--threads", 1, "--tars", 2]
    common = ["--methods", "none,scae", "--peers", "none", "--rounds", 1, "--json", out]
    run("benchmark", "pipeline", "--data", images, *common, *size)
    result = json.loads(out.read_text())
    rows = {row["name"]: row["img_per_s"] for row in result["rows"]}
    assert set(rows) == {"none", "scae", "none (again)", "none, tars", "scae, tars"}
    for method in ("none", "scae"):
        wanted = rows[f"{method}, tars"] / rows[method]
        assert result["tars_versus_files"][method] == pytest.approx(wanted, abs=6e-4)
    run("benchmark", "pipeline", "--source", "memory", "--tars", 2, status=2)


def test_rows_of_methods_and_of_all_peers(tmp_path, images):
    out = tmp_path / "bench.json"
    size = ["--size", 32, "--batch-size", 4, "--repeat", 2, "--threads", 1]
    methods = ["none", "random_erasing", "scae", "cutmix", "trivial_augment", "rand_augment+scae"]
    size += ["--methods", ",".join(methods)]
    run("benchmark", "pipeline", "--data", images, "--rounds", 1, "--json", out, *size)
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    native = [f"native {name}" for name in ("none", "random_erasing", "trivial_augment")]
    torchvision = [f"torchvision {name}" for name in ("none", "random_erasing", "cutmix")]
    torchvision += ["torchvision trivial_augment"]
    timm = ["timm none", "timm random_erasing"]
    found = [name for name in rows if name != "torchvision (decode_image)"]
    alone = ["decode alone", "undecoded none", "undecoded scae"]
    assert found == [*methods, "none (again)", *native, *alone, *torchvision, *timm]
    assert rows["none"]["ratio"] == 1
    assert min(row["img_per_s"] for row in rows.values()) > 0
    both = {"none", "random_erasing", "scae"}
    assert set(result["versus_native"]) == both | {"trivial_augment"}
    assert set(result["versus_torchvision"]) == both | {"trivial_augment", "cutmix"}
    assert set(result["versus_timm"]) == both
    for peer in ("native", "torchvision", "timm"):
        other = rows[f"{peer} random_erasing"]["img_per_s"]
        assert result[f"versus_{peer}"]["scae"] == pytest.approx(
            rows["scae"]["img_per_s"] / other, abs=6e-4
        )
    planned = {*methods, "none (again)", "native random_erasing", "native trivial_augment"}
    planned |= {"undecoded none", "undecoded scae"}
    assert set(result["plan_ms_per_batch"]) == planned
    assert set(result["cpu_ms_per_image"]) == set(rows)
    assert result["settings"]["images"] == 12
    assert result["settings"]["threads"] == 1
    assert result["settings"]["decode_resolved"] == "roi"


def test_a_sweep(tmp_path, images):
    out, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    sweep = ["--batch-size", "2,4", "--dtype", "fp32,fp16", "--threads", 1, "--decode", "full"]
    sweep += ["--methods", "none,scae", "--peers", "native", "--size", 32, "--rounds", 2]
    text = run("benchmark", "pipeline", "--data", images, *sweep, "--json", out, "--plot", plot)
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    each = ["none", "scae", "none (again)", "native none", "decode alone"]
    each += ["undecoded none", "undecoded scae"]
    titles = ["batch 2, fp32", "batch 2, fp16", "batch 4, fp32", "batch 4, fp16"]
    assert list(rows) == [f"{row}, {title}" for title in titles for row in each]
    for title in titles:
        assert rows[f"none, {title}"]["ratio"] == 1
        assert f"scae, {title} " in text
    assert rows["scae, batch 4, fp16"]["settings"] == {
        "threads": 1,
        "batch_size": 4,
        "dtype": "fp16",
        "decode": "full",
        "layout": "NCHW",
        "prefetch": 3,
        "hw_decoder_load": 0.65,
        "decode_resolved": "full",
        "images": 4,
        "batches_per_round": 1,
    }
    assert rows["none, batch 2, fp32"]["settings"]["batches_per_round"] == 3
    assert set(result["cpu_ms_per_image"]) == set(rows)
    assert set(result["versus_native"]) == {f"none, {title}" for title in titles}
    assert result["versus_timm"] == {}
    settings = result["settings"]
    assert (settings["threads"], settings["decode"]) == (1, "full")
    assert (settings["batch_size"], settings["dtype"]) == ([2, 4], ["fp32", "fp16"])
    with Image.open(plot) as image:
        assert image.format == "PNG"
        assert image.width > 1500  # panels beside each other


def test_samples_that_are_mixed(tmp_path, images):
    out = tmp_path / "bench.json"
    size = ["--size", 32, "--batch-size", 4, "--repeat", 8, "--rounds", 2, "--methods", "none"]
    size += ["--data", images, "--peers", "none"]
    run("benchmark", "pipeline", *size, "--mixed-share", "0.05,0.1", "--json", out)
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    mixed = ["unmixed 5%", "mixed 5%", "unmixed 10%", "mixed 10%"]
    assert list(rows) == ["none", "none (again)", *mixed]
    assert [rows[name].get("baseline") for name in rows] == [
        *(None, None, "unmixed 5%", "unmixed 5%", "unmixed 10%", "unmixed 10%")
    ]
    assert rows["unmixed 5%"]["ratio"] == rows["unmixed 10%"]["ratio"] == 1
    share = result["mixed_share"]
    assert 0 < share["mixed 5%"] < 0.15
    assert share["mixed 5%"] < share["mixed 10%"] < 0.25
    assert share["unmixed 10%"] == share["none"] == 0
    beside = result["versus_second_decode"]
    assert list(beside) == ["mixed 5%", "mixed 10%"]
    for name, value in beside.items():
        assert value == pytest.approx(rows[name]["ratio"] * (1 + share[name]), abs=1e-3)


def test_mixing_wants_a_tail(images):
    with pytest.raises(SystemExit, match="6 images, too few for a tail; pass a larger --repeat"):
        pipeline_rows.with_tail(ImageIndex(images), 0.2)
    with pytest.raises(SystemExit, match=r"0\.01 of 6 images is less than one .* --repeat"):
        pipeline_rows.with_tail(ImageIndex(images), 0.01)


def test_more_tars_than_images(images, tmp_path):
    with pytest.raises(SystemExit, match="--tars must be at most the number of images, 6, got 7"):
        made_up.packed(ImageIndex(images), str(tmp_path), 7)


def test_images_in_memory(tmp_path, monkeypatch, capsys):
    out = tmp_path / "bench.json"
    options = ["--source", "memory", "--size", 16, "--batch-size", 128, "--rounds", 1]
    options += ["--methods", "none,random_erasing,scae"]
    run("benchmark", "pipeline", *options, "--images", 640, "--json", out)
    result = json.loads(out.read_text())
    assert [row["name"] for row in result["rows"]] == [
        *("none", "random_erasing", "scae", "none (again)", "scae, long tail")
    ]
    share = result["mixed_share"]
    assert 0 < share.pop("scae, long tail") < 0.1
    assert set(share.values()) == {0}
    assert result["settings"]["batches_per_round"] == 5
    with pytest.raises(SystemExit, match="there are 64 images, fewer than --batch-size 128"):
        pipeline.main([*map(str, options), "--images", "64"])
    # Nothing is measured for nothing.
    monkeypatch.setattr(pipeline, "measure", None)
    with pytest.raises(SystemExit, match="there are 64 images, fewer than --batch-size 128"):
        pipeline.main([*map(str, options), "--images", "64", "--batch-size", "8,128"])
    with pytest.raises(SystemExit):
        pipeline.parse([*map(str, options), "--backends", "python,torch"])
    assert "--backends torch is for --source files, got --source memory" in capsys.readouterr().err


def test_too_few_images(images):
    message = run("benchmark", "pipeline", "--data", images, "--peers", "none", status=1)
    assert "6 images, fewer than --batch-size 64" in message
    assert "--repeat 11" in message


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--threads", "1,0", "must be whole numbers from 1 on, as in 1,2, got 1,0"),
        ("--peers", "native,ffcv", "must be some of native, torchvision, timm, none"),
        ("--dtype", "bf16", "must be some of fp32, fp16, joined by commas, got bf16"),
        ("--methods", "scae", "--methods must name none"),
        ("--json", "/proc/no/x.json", "--json: must be a file that can be written"),
        ("--plot", "x.nope", "--plot: must be a picture with a suffix such as .png"),
        ("--mixed-share", "0.01,1", "--mixed-share must be shares of the samples, above 0"),
    ],
)
def test_what_a_sweep_refuses(capsys, option, value, message):
    with pytest.raises(SystemExit):
        pipeline.parse(["--data", ".", option, value])
    assert message in capsys.readouterr().err


def test_without_timm_its_rows_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(peers, "has_timm", lambda: False)
    assert pipeline.parse(["--data", "."]).peers == ["native", "torchvision"]
    assert "timm is not installed" in capsys.readouterr().out
    assert pipeline.parse(["--data", ".", "--peers", "none"]).peers == []


def test_what_is_given_wins_over_quick():
    args = pipeline.parse(["--data", ".", "--quick", "--rounds", "4"])
    assert (args.rounds, args.batches, args.peers) == (4, 3, ["native"])


@pytest.fixture
def start_method():
    """timm's rows set that of the process."""
    before = torch.multiprocessing.get_start_method()
    yield
    torch.multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("peer", ["plain", "torchvision", "timm"])
def test_peers_normalise_whole_images_alike(tmp_path, start_method, peer):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8], pixels[8:, :8] = (255, 128, 0), (10, 20, 30)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    index = ImageIndex(tmp_path)
    crop = CropConfig(area=(1.0, 1.0), aspect=(1.0, 1.0), flip=0.0)
    image = ImageConfig(size=16, val_resize=16, crop=crop, dtype="fp16", layout="NHWC")
    if peer == "plain":
        batches = native.plain(index, image, ExecConfig(batch_size=1, threads=1))
    else:
        batches = getattr(peers, peer)(
            index, image, method="none", batch_size=1, workers=1, device="cpu"
        )
    batch = next(batches)
    if peer == "plain":
        batch = batch.permute(0, 3, 1, 2)
    assert batch.dtype == torch.float16
    assert batch.is_contiguous(memory_format=torch.channels_last)
    expected = (pixels - np.array(image.mean)) / np.array(image.std)
    np.testing.assert_allclose(batch[0].permute(1, 2, 0).float(), expected, atol=0.01)


def test_processes(tmp_path, images):
    out = tmp_path / "bench.json"
    size = ["--size", 32, "--batch-size", 2, "--samples", 50, "--plans", 5, "--rounds", 2]
    run("benchmark", "processes", "--data", images, "--repeat", 2, *size, "--json", out)
    result = json.loads(out.read_text())
    rows = {row["name"]: row for row in result["rows"]}
    names = ["none", "scae", "plan", "plan without maps", "lookups"]
    assert list(rows) == [f"{name} × {n}" for name in names for n in (1, 2)]
    assert min(row["img_per_s"] for row in rows.values()) > 0
    assert {rows[f"{name} × 1"]["ratio"] for name in names} == {1}
    assert set(result["scae_to_none"]) == {"1", "2"}
    assert set(result["cpu_ms_per_image"]) == set(rows)
    assert result["settings"]["batches_per_round"] == {
        **dict.fromkeys(("none", "scae"), 3),
        **dict.fromkeys(("plan", "plan without maps", "lookups"), 5),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--processes", "2,4"], "--processes must name 1"),
        (["--device", "0"], "--device must name a GPU for each of 2 processes, got [0]"),
        (["--device", "0,tpu"], "must be cpu, auto, cuda or the number of a GPU, got tpu"),
    ],
)
def test_what_processes_refuse(capsys, monkeypatch, options, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit):
        processes.parse(options)
    assert message in capsys.readouterr().err


def test_a_process_that_fails_does_not_leave_the_others_waiting(monkeypatch):
    barrier = threading.Barrier(2)

    def take_turn(name, count, batches):
        if threading.current_thread().name.startswith("bad"):
            raise ValueError("no such file")
        barrier.wait(60)

    monkeypatch.setattr(processes, "take_turn", take_turn)
    with (
        ThreadPoolExecutor(1, "good") as good,
        ThreadPoolExecutor(1, "bad") as bad,
        pytest.raises(ValueError, match="no such file"),
    ):
        processes.together([good, bad], barrier, "none", 1)
    assert barrier.broken
