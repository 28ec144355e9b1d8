"""The source archive and the wheel, built and used without the network."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT, write_images

import scae_dali

CHECKOUT = ("pipelines", "scae_dali", "tests", "tools", ".ci", "train.py", "README.md", "LICENSE")
CHECKOUT += ("setup.cfg", "pyproject.toml", ".gitignore")
BUILD = "import sys; sys.path.insert(0, 'tools/package'); import backend; backend.build_{}({!r})"
# In an interpreter that knows its packages, but not the checkout, though that is installed there.
INSTALLED = """
import importlib.util, runpy, sys
sys.path[:0], command, *sys.argv[1:] = sys.argv[1].split(":"), *sys.argv[2:]
assert importlib.util.find_spec("pipelines") is None
sys.argv[0] = command
runpy.run_path(command, run_name="__main__")
"""


def built(kind: str, checkout: Path, out: Path) -> Path:
    """The archive that a checkout gives."""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD.format(kind, str(out))],
        cwd=checkout,
        check=True,
        capture_output=True,
    )
    (archive,) = out.iterdir()
    return archive


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A copy of the checkout, and what its source archive unpacks to."""
    place = tmp_path_factory.mktemp("sdist")
    (place / "checkout").mkdir()
    (place / "out").mkdir()
    for name in CHECKOUT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, place / "checkout" / name)
    for compiled in place.rglob("__pycache__"):
        shutil.rmtree(compiled)
    before = files(place / "checkout")
    archive = built("sdist", place / "checkout", place / "out")
    with tarfile.open(archive) as tar:
        tar.extractall(place / "unpacked", filter="data")
    (source,) = (place / "unpacked").iterdir()
    return before, source


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory):
    """The wheel that the source archive gives."""
    return built("wheel", unpacked[1], tmp_path_factory.mktemp("wheel"))


def test_the_source_archive_holds_the_whole_checkout(unpacked):
    before, source = unpacked
    assert before - files(source) == set()


def test_the_wheel_builds_a_cache_without_the_checkout(wheel, tmp_path):
    place = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    offline = ["--no-deps", "--no-index", "--target", place, wheel]
    subprocess.run([*pip, *offline], check=True, capture_output=True)
    write_images(tmp_path / "data", {"a": 3, "b": 2})
    path = ":".join([str(place), *(p for p in sys.path if p.endswith("-packages"))])
    start = [sys.executable, "-S", "-c", INSTALLED, path, place / "bin" / "scae-dali"]

    def run(*options):
        done = subprocess.run(
            [*start, *options], cwd=tmp_path, env={}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    cheap = ["--model", "cifar_resnet20", "--size", "32", "--device", "cpu", "--threads", "2"]
    said = run("build-cache", "--data", "data", "--out", "maps.lmdb", *cheap)
    assert "5 maps of 5" in said
    facts = json.loads(run("inspect-cache", "maps.lmdb", "--json"))
    assert (facts["found"], facts["meta"]["model"]) == (5, "cifar_resnet20")


def test_what_the_wheel_tells_of_itself(wheel, tmp_path):
    shutil.unpack_archive(wheel, tmp_path, "zip")
    (info,) = tmp_path.glob("*.dist-info")
    told = (info / "METADATA").read_text()
    assert f"\nVersion: {scae_dali.__version__}\n" in told
    required = re.findall(r"^Requires-Dist: (.*)$", told, flags=re.MULTILINE)
    of_dali = [line for line in required if "dali" in line]
    assert len(of_dali) == 3  # the third is the library itself, in the extra for tests
    assert all("extra ==" in line for line in of_dali)
    links = re.findall(r"\]\(([^)]+)\)", told)
    assert links
    assert all(link.startswith("https://") for link in links)
    assert (tmp_path / "scae_dali" / "README.md").is_file()
    assert (tmp_path / "scae_dali" / "py.typed").is_file()


def test_a_name_that_python_lists_is_public():
    assert {*dir(scae_dali)} == {*scae_dali.__all__, "__version__"}
    assert all(hasattr(scae_dali, name) for name in dir(scae_dali))
