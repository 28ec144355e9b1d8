"""Every command in the READMEs, taken apart by its own parser and not run: its options exist."""

import argparse
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

import train

PAGES = ("README.md", "scae_dali/README.md", "pipelines/README.md", "tools/README.md")
PAGES += ("tools/results/README.md", "tests/field/README.md")
SCRIPT = re.compile(r"(?:python|torchrun(?: --[\w-]+ \d+)*) (train\.py|tools/\w+\.py)(?= |$)")


def commands(page: Path) -> list[str]:
    """The commands of a page's indented code and code spans, each on one line."""
    text = page.read_text()
    code = re.findall(r"^    (.*(?:\\\n.*)*)", text, flags=re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", text)
    joined = (re.sub(r"\s*\\\n\s*", " ", one) for one in code)
    return [line for line in (*joined, *spans) if SCRIPT.match(line)]


FOUND = [(name, line) for name in PAGES if (ROOT / name).is_file() for line in commands(ROOT / name)]


class Parsed(Exception):  # noqa: N818 - no error
    """The parser has taken a command's options."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of data, for options that ask for one that exists. GPUs are there, as it seems."""
    (tmp_path / "train" / "class").mkdir(parents=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.chdir(ROOT)
    return str(tmp_path)


def words(line: str, folder: str) -> list[str]:
    """The options of a command, with `folder` as its data; `…` stands for what is left out."""
    options = shlex.split(line[SCRIPT.match(line).end() :], comments=True)
    data = re.compile(r"DIR|demo/data|data/\w+|/data/\w+")
    return [data.sub(folder, word) for word in options if word != "…"]


def parse_train(options: list[str]) -> None:
    """Options of train.py, those that every run needs added where the page leaves them out."""
    for needed in ("--data.root", "--out"):
        if needed not in options:
            options = [*options, needed, "x"]
    train.make_parser().parse_args(options)


def parse_tool(name: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of a tool: its function `parse`, or its `main` until the parser is through."""
    module = importlib.import_module(f"tools.{name}")
    if name == "benchmark" and options[0] in module.NAMES:
        module = importlib.import_module(f"tools.benchmarks.{options.pop(0)}")
    if hasattr(module, "parse"):
        module.parse(options)
        return
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *arguments):
        original(self, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [name, *options])
    with pytest.raises(Parsed):
        module.main()


def check(line: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script, options = SCRIPT.match(line)[1], words(line, folder)
    if script == "train.py":
        parse_train([one for one in options if one != "--help"])
    else:
        parse_tool(Path(script).stem, [one for one in options if one != "--help"], monkeypatch)


@pytest.mark.parametrize(("page", "line"), FOUND, ids=lambda value: value[:60])
def test_a_command_is_understood(page, line, folder, monkeypatch):
    try:
        check(line, folder, monkeypatch)
    except SystemExit as end:
        pytest.fail(f"{page}: {line} ends with status {end.code}")


@pytest.mark.parametrize(
    "line",
    [
        "python train.py --config pipelines/demo.yaml --no.such 1",
        "python train.py --config pipelines/demo.yaml --epochs many",
        "python tools/compare_runs.py run --no-such",
        "python tools/pointing_game.py --data DIR",
    ],
)
def test_a_command_that_is_not_is_found(line, folder, monkeypatch):
    with pytest.raises(SystemExit):
        check(line, folder, monkeypatch)


def test_the_settings_that_the_page_on_training_lists_are_the_defaults():
    text = (ROOT / "pipelines" / "README.md").read_text()
    listed = re.findall(r"^\| `--([\w.]+) (\S+)` \|", text, flags=re.MULTILINE)
    defaults = {action.dest: action.default for action in train.make_parser()._actions}
    assert len(listed) > 20
    for name, value in listed:
        if name in defaults:
            assert defaults[name] == yaml.safe_load(value), name
    named = set(re.findall(r"`--([\w.]+)[ `]", text)) - {"nproc"}
    assert not {name for name in named if name.replace("-", "_") not in defaults} - NOT_OF_TRAIN


# Options of other commands that the page names.
NOT_OF_TRAIN = {"decode"}
