"""The package as one imports it, with DALI and without."""

import importlib
import subprocess
import sys

import pytest
from conftest import ROOT

from scae_dali.checks import check_dali

FIRST_USES = [
    "import scae_dali; scae_dali.SCAE",
    "import scae_dali; scae_dali.whole_loader",
    "import scae_dali.stage.memory",
    "import pipelines.recipe",
]


def without_dali(code: str) -> str:
    """What an interpreter without DALI prints."""
    code = f"import sys\nsys.modules['nvidia.dali'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_use_of_dali_names_the_commands_that_install_it():
    said = without_dali(
        f"for use in {FIRST_USES}:\n"
        "    try:\n        exec(use)\n"
        "    except ModuleNotFoundError as error:\n        print(error)"
    ).splitlines()
    assert len(said) == len(FIRST_USES)
    for line in said:
        assert line.startswith("NVIDIA DALI is not installed")
        assert "pip install 'scae-dali[cuda12]'" in line
        assert "pip install 'scae-dali[cuda13]'" in line


def test_a_cache_is_read_without_dali(cache):
    code = f"import scae_dali\nprint(scae_dali.SaliencyCache({cache.path!r}).meta.samples)"
    assert without_dali(code) == f"{cache.meta.samples}\n"


def test_a_cache_is_inspected_without_dali(cache):
    code = f"from scae_dali.commands.main import main\nmain(['inspect-cache', {cache.path!r}])"
    assert f"{cache.meta.samples} of {cache.meta.samples} (100.00%)" in without_dali(code)


def test_a_cache_is_drawn_and_copied_without_dali(cache, tmp_path):
    drawn = ["inspect-cache", cache.path, "--picture", str(tmp_path / "maps.png")]
    copied = ["copy-cache", cache.path, "--out", str(tmp_path / "copy.lmdb")]
    code = f"from scae_dali.commands.main import main\nmain({drawn})\nmain({copied})"
    assert "copy.lmdb: 50 maps" in without_dali(code)
    assert (tmp_path / "maps.png").is_file()


@pytest.mark.parametrize(
    ("version", "works"), [("2.2.0", True), ("2.10.0.dev1", True), ("2.1.9", False)]
)
def test_an_old_dali_is_refused(monkeypatch, version, works):
    monkeypatch.setattr("nvidia.dali.__version__", version)
    if works:
        check_dali()
        return
    with pytest.raises(
        ImportError, match=rf"2\.2 or newer, got {version}; .*'scae-dali\[cuda12\]'"
    ):
        check_dali()


def test_dali_that_lacks_what_it_needs_itself_is_not_called_missing(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'gast'", name="gast")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="No module named 'gast'"):
        check_dali()
