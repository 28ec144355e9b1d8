"""The console command: which command it runs, and what it says of others."""

import re
import sys

import pytest

import scae_dali
from scae_dali.commands import main as console


def test_a_command_gets_its_options_and_its_name(cache, capsys):
    assert console.main(["inspect-cache", cache.path, "--json"]) == 0
    assert '"found": 50' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        console.main(["inspect-cache", "--help"])
    assert capsys.readouterr().out.startswith("usage: scae-dali inspect-cache [-h]")


def test_every_command_tells_its_options(capsys):
    for name in console.COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            console.main([name, "--help"])
        assert f"usage: scae-dali {name} " in capsys.readouterr().out


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        console.main(["--help"])
    said = capsys.readouterr().out
    assert "  build-cache    build a saliency cache from a trained network\n" in said
    with pytest.raises(SystemExit, match="0"):
        console.main(["--version"])
    assert capsys.readouterr().out == f"scae-dali {scae_dali.__version__}\n"


def test_an_unknown_command_is_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit, match="2"):
        console.main(["build"])
    assert "build-cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [("nvidia.dali", r"'scae-dali\[cuda12\]'"), ("matplotlib", r"'scae-dali\[train\]'")],
)
def test_what_is_not_installed_is_named_without_a_traceback(monkeypatch, missing, remedy):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "scae_dali.commands.show_erasing", raising=False)
    said = console.main(["show-erasing", "--help"])
    assert re.search(f"^error: .*{remedy}", said)
