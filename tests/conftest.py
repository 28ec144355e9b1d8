"""Small data that the tests make themselves, and tools as users run them."""

import contextlib
import importlib
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from scae_dali.cache import SaliencyCache
from scae_dali.data.index import ImageIndex
from scae_dali.stage.loader import Batch

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
# Tests share what they need with others, wherever these lie.
sys.path[:0] = sorted({str(path.parent) for path in (ROOT / "tests").rglob("*.py")})
pytest.register_assert_rewrite(*(path.stem for path in (ROOT / "tests" / "common").glob("*.py")))


def run(tool, *arguments, status=0):
    """What a tool printed, run in this process; fails unless it ended with this status."""
    module = importlib.import_module(f"tools.{tool}")
    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        patch.setattr(sys, "argv", [str(TOOLS / f"{tool}.py"), *map(str, arguments)])
        try:
            ended = module.main()
        except SystemExit as stop:
            ended = stop.code
    if isinstance(ended, str):  # as the interpreter does
        said.write(ended)
        ended = 1
    assert (ended or 0) == status, said.getvalue()
    return said.getvalue()


def run_script(tool, *arguments, status=0):
    """The same in a process of its own, as users run it."""
    strict = ["-W", "error", "-W", "ignore::DeprecationWarning:gast.astn"]  # as in pyproject.toml
    command = [sys.executable, *strict, str(TOOLS / f"{tool}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


# Small networks gain nothing by more, and what tests compare exactly hangs on their number.
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device here")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def write_images(root: Path, counts: dict[str, int], seed: int = 0) -> None:
    """Smooth random JPEGs of several sizes: root/<class>/<k>.jpg."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            height, width = rng.integers(40, 90, 2).tolist()
            coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
            image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            image.save(root / name / f"{k:02d}.jpg", quality=95)


def write_pngs(root: Path, counts: dict[str, int], size: tuple[int, int], seed: int = 0) -> None:
    """Noise of (h, w), which every decoder gives alike: root/<class>/<k>.png."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{k:02d}.png")


def write_cifar(root: Path, train: int = 12, test: int = 4) -> None:
    """Files of random pixels in the format of CIFAR-10 and CIFAR-100, of 2 and 3 classes."""
    rng = np.random.default_rng(0)

    def write(name: str, content: dict) -> None:
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content, protocol=2))

    def part(name: str, n: int, classes: int, key: str) -> None:
        labels = (np.arange(n) * 7 % classes).tolist()
        data = rng.integers(0, 256, (n, 3072), np.uint8)
        write(name, {"data": data, key: labels, "coarse_labels": [0] * n})

    for batch in range(1, 6):
        part(f"cifar-10-batches-py/data_batch_{batch}", train, 2, "labels")
    part("cifar-10-batches-py/test_batch", test, 2, "labels")
    write("cifar-10-batches-py/batches.meta", {"label_names": ["plane", "car"]})
    part("cifar-100-python/train", train, 3, "fine_labels")
    part("cifar-100-python/test", test, 3, "fine_labels")
    names = {"fine_label_names": ["apple", "bear", "clock"], "coarse_label_names": ["all"]}
    write("cifar-100-python/meta", names)


@pytest.fixture
def cifar(tmp_path, monkeypatch) -> Path:
    """A root with both, whose sums are not checked."""
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5: Path(path).is_file())
    write_cifar(tmp_path)
    return tmp_path


def fill_cache(path: Path, index: ImageIndex, *, naming: str = "index", seed: int = 0):
    """A complete cache of random maps, each with a minimum of 0 and a maximum of 255."""
    cache = SaliencyCache.create(path, index, grid=(7, 7), naming=naming)
    maps = np.random.default_rng(seed).random((len(index), 7, 7)) ** 2
    maps -= maps.min((1, 2), keepdims=True)
    maps /= maps.max((1, 2), keepdims=True)
    cache.begin_pass(1)
    cache.write(np.arange(len(index)), maps, epoch=1)
    cache.end_pass(1)
    return cache


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """50 images of 3 classes with 30, 15 and 5: a tail."""
    root = tmp_path_factory.mktemp("images")
    write_images(root, {"a": 30, "b": 15, "c": 5})
    return root


@pytest.fixture(scope="session")
def index(folder) -> ImageIndex:
    return ImageIndex(folder)


@pytest.fixture(scope="session")
def cache(index, tmp_path_factory) -> SaliencyCache:
    return fill_cache(tmp_path_factory.mktemp("cache") / "maps.lmdb", index)


@pytest.fixture
def fresh(index, tmp_path) -> SaliencyCache:
    """An empty cache of the same images."""
    return SaliencyCache.create(tmp_path / "maps.lmdb", index, grid=(7, 7))


@pytest.fixture(scope="session")
def tailed(tmp_path_factory) -> ImageIndex:
    """63 PNGs of 24 x 24; below f_k = 0.1 are the last three of 5 classes, below 0.5 four."""
    root = tmp_path_factory.mktemp("tailed")
    write_pngs(root, {"a": 40, "b": 16, "c": 3, "d": 3, "e": 1}, (24, 24))
    return ImageIndex(root)


@pytest.fixture(scope="session")
def tailed_cache(tailed, tmp_path_factory) -> SaliencyCache:
    """Maps of `tailed`, and two neighbours of every class."""
    cache = fill_cache(tmp_path_factory.mktemp("cache") / "tailed.lmdb", tailed)
    table = [[1, 2], [2, 4], [1, 3], [4, 0], [3, 1]]
    cache.write_neighbors(np.array(table, np.uint16))
    return cache


def weights_of(name, classes, path):
    """Weights of a random network, in a file; the network."""
    from scae_dali.training.networks import make_network

    torch.manual_seed(1)
    net = make_network(name, classes).eval()
    torch.save(net.state_dict(), path)
    return net


@pytest.fixture
def build():
    """scae-dali build-cache with these options."""
    from scae_dali.commands import build_cache

    def main(**options):
        argv = ["--device=cpu", "--size=32"]
        for name, value in options.items():
            values = value if isinstance(value, tuple) else (value,)
            argv += [f"--{name.replace('_', '-')}", *map(str, values)]
        build_cache.main(argv)

    return main


def batch_of(images, labels, ids=None, **more):
    """Whole images that nothing was done to, but for what `more` says."""
    n = len(images)
    known = {
        "images": images,
        "labels": labels,
        "partners": labels,
        "mu": torch.ones(n),
        "ids": torch.arange(n) if ids is None else torch.as_tensor(ids),
        "status": torch.zeros(n, dtype=torch.int64),
        "boxes": torch.zeros(n, 4),
        "windows": torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(n, 1),
        "flips": torch.zeros(n, dtype=torch.bool),
    }
    return Batch(**known | more)
