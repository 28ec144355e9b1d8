"""Numba keeps machine code on disk, and what happens to files on disk happens to it.

Damaged files are https://github.com/numba/numba/issues/10434 and
https://github.com/numba/numba/issues/9348, of which a later Numba may take care itself.
"""

import errno
import importlib.util
import warnings

import numba
import pytest
from numba.core.caching import FunctionCache

from scae_dali.plan.compiled import compiled

SOURCE = """
from scae_dali.plan.compiled import compiled

@compiled
def inner(x):
    return 3 * x

@compiled
def outer(x):
    return inner(x) + 1
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Runs two functions as a new process does; -> the result and how often kept machine code was
    used, the warnings, the kept files."""
    source, folder = tmp_path / "program.py", tmp_path / "kept"
    source.write_text(SOURCE)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder))

    def run(x):
        spec = importlib.util.spec_from_file_location("program", source)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = module.outer(x), sum(module.outer.stats.cache_hits.values())
        said = [str(one.message) for one in caught if one.category is RuntimeWarning]
        return result, "".join(said), sorted(folder.rglob("*.nb?"))

    return run


DAMAGE = {
    "empty": lambda data: b"",
    "cut off": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "another file": lambda data: b"<html>quota exceeded</html>",
    "its end missing": lambda data: data[:-20],
    # Machine code that unpickles all the same, and ends the process.
    "a sector of zeros": lambda data: (
        data[: len(data) // 2] + bytes(99) + data[99 + len(data) // 2 :]
    ),
    "a bit": lambda data: data[:-200] + bytes([data[-200] ^ 4]) + data[-199:],
}


def test_every_sector_of_machine_code_counts(program):
    program(5)
    file = max(program(5)[2], key=lambda one: one.stat().st_size)
    sound = file.read_bytes()
    for start in range(0, len(sound), max(512, len(sound) // 8)):
        file.write_bytes(sound[:start] + bytes(512) + sound[start + 512 :])
        assert program(7)[0][0] == 22


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_machine_code_is_made_anew(program, damage, kind):
    printed, warned, files = program(5)
    assert (printed, warned) == ((16, 0), "")
    assert program(5)[0] == (16, 1)
    for file in files:
        if file.suffix == f".{kind}":
            file.write_bytes(DAMAGE[damage](file.read_bytes()))
    printed, warned, _ = program(7)
    assert printed == (22, 0)
    assert str(files[0].parent) in warned
    assert program(7)[:2] == ((22, 1), "")


@pytest.fixture
def twice():
    @compiled
    def twice(x):
        return 2 * x

    return twice


def test_a_full_disk(twice, monkeypatch):
    def full(*anything):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile._save_data", full)
    with pytest.warns(RuntimeWarning, match=r"machine code in /.* cannot be kept \(No space left"):
        assert twice(21) == 42
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert twice(21.0) == 42.0  # and it is not tried again


def test_damaged_machine_code_on_a_full_disk(twice, monkeypatch):
    def full(*anything):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile._load_index", lambda self: 1 / 0)
    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile._save_index", full)
    with pytest.warns(RuntimeWarning, match=r"cannot be kept \(Disk quota.*NUMBA_CACHE_DIR"):
        assert twice(21) == 42


def test_no_folder_is_writable(monkeypatch):
    def refuse(self, function):
        raise RuntimeError("cannot cache function 'twice': no locator available")

    monkeypatch.setattr(FunctionCache, "__init__", refuse)
    assert compiled(lambda x: 2 * x)(21) == 42


def test_without_compilation(monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    assert compiled(lambda x: 2 * x)(21) == 42
