"""How programs end that are interrupted, or whose output nobody reads any more."""

import contextlib
import importlib
import os
import signal
import sys

import pytest
from conftest import TOOLS

from scae_dali.commands import main as console
from scae_dali.commands.program import run_program


@pytest.fixture(autouse=True)
def handler():
    """Python's own, whatever the shell has set."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(*arguments, **keywords):
    os.kill(os.getpid(), signal.SIGINT)


@contextlib.contextmanager
def unread():
    """A stdout whose reader has ended."""
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        yield
        assert sys.stdout is stream
        stream.flush()  # at the end of the interpreter, too


def test_the_status_of_a_program_is_passed_on():
    assert [run_program(lambda: status) for status in (None, 0, 3, "error: x")] == [  # noqa: B023
        *(None, 0, 3, "error: x")
    ]
    with pytest.raises(ValueError, match="its own"):
        run_program(lambda: (_ for _ in ()).throw(ValueError("its own")))


@pytest.mark.parametrize("command", console.COMMANDS)
def test_ctrl_c_ends_every_command_with_a_line(command, monkeypatch, capsys):
    module = importlib.import_module(f"scae_dali.commands.{command.replace('-', '_')}")
    monkeypatch.setattr(module, "main", interrupt)
    assert console.main([command]) == 130
    assert importlib.import_module(f"tools.{command.replace('-', '_')}").main() == 130
    assert capsys.readouterr() == ("", "interrupted\ninterrupted\n")


@pytest.mark.parametrize(
    ("argv", "where"),
    [
        (["inspect-cache", "CACHE"], "scae_dali.commands.inspect_cache.summary"),
        (
            ["export-maps", "CACHE", "--data", "DATA", "--out", "OUT/maps.npy"],
            "scae_dali.commands.export_maps.export_maps",
        ),
        (["copy-cache", "CACHE", "--out", "OUT/copy.lmdb"], "scae_dali.cache.SaliencyCache.copy"),
        (
            ["merge-caches", "CACHE", "CACHE", "--out", "OUT/all.lmdb"],
            "scae_dali.commands.merge_caches.merge_caches",
        ),
        (["check-images", "--data", "DATA"], "scae_dali.commands.check_images.faults"),
    ],
)
def test_ctrl_c_at_work_is_no_error_of_the_command(
    argv, where, cache, folder, tmp_path, monkeypatch, capsys
):
    places = {"CACHE": cache.path, "DATA": str(folder)}
    argv = [places.get(one, one).replace("OUT", str(tmp_path)) for one in argv]
    monkeypatch.setattr(where, interrupt)
    assert console.main(argv) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert not list(tmp_path.iterdir())


def test_of_processes_under_torchrun_one_tells(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert run_program(interrupt) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "argv",
    [["inspect-cache", "CACHE", "--json"], ["build-cache", "--help"], ["check-images", "DATA"]],
    ids=lambda argv: argv[0],
)
def test_a_command_whose_output_nobody_reads_ends_without_a_word(argv, cache, folder, capsys):
    data = ["--data", str(folder)] if "DATA" in argv else []
    argv = [cache.path if one == "CACHE" else one for one in argv if one != "DATA"]
    with unread(), pytest.raises(SystemExit) as ended:
        console.main(argv + data)
    assert ended.value.code == 128 + signal.SIGPIPE
    assert "error" not in capsys.readouterr().err


def test_other_errors_of_the_output_stay_errors(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="No space left"):
            run_program(lambda: print("x" * 100_000))
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


def test_a_closed_stdout_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert run_program(lambda: print("x")) is None


def test_every_script_runs_so():
    for path in (*TOOLS.glob("*.py"), TOOLS / "paper" / "picture.py"):
        source = path.read_text()
        if "__main__" in source:
            same = "return script(" in source and "sys.exit(main())" in source
            assert same or "sys.exit(run_program(main))" in source, path
