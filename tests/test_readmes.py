"""The READMEs: what a command or a link names is there. Commands are taken apart by their own
parsers, and not run."""

import argparse
import dataclasses
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

import train
from pipelines.recipe import Config
from scae_dali.methods import BUILT_IN

FOLDERS = (".", "scae_dali", "pipelines", "pipelines/examples", "tools", "tools/results")
FOLDERS += ("tests/field",)
PAGES = [page for folder in FOLDERS if (page := ROOT / folder / "README.md").is_file()]
PAGES.append(ROOT / "tools" / "package" / "index_page.md")
EXAMPLES = sorted((ROOT / "pipelines" / "examples").glob("*.py"))  # their docstrings have commands
SCRIPT = re.compile(
    r"(?:python|torchrun(?: --[\w-]+ \S+)*) "
    r"(train\.py|(?:tools|pipelines/examples)/\w+\.py)(?= |$)"
    r"|(?:torchrun(?: --[\w-]+ \S+)* --no-python )?scae-dali ([\w-]+)(?= )"
)


def commands(page: Path) -> list[str]:
    """The commands of a page's indented code and code spans, each on one line."""
    text = page.read_text()
    code = re.findall(r"^    ((?:.*\\\n)*.*)", text, flags=re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", text)
    joined = (re.sub(r"\s*\\\n\s*", " ", one) for one in code)
    return [line for line in (*joined, *spans) if SCRIPT.match(line)]


FOUND = [
    (str(page.relative_to(ROOT)), line) for page in (*PAGES, *EXAMPLES) for line in commands(page)
]


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
    return [data.sub(folder, word) for word in options if word not in ("…", "&")]


def parse_train(options: list[str]) -> None:
    """Options of train.py, those that every run needs added where the page leaves them out."""
    for needed in ("--data.root", "--out"):
        if needed not in options:
            options = [*options, needed, "x"]
    parser = train.make_parser()
    settings = parser.instantiate(parser.parse_args(options))
    if settings.method in BUILT_IN or {*"+|"} & {*settings.method}:
        Config(**{field.name: settings[field.name] for field in dataclasses.fields(Config)})


def parse_tool(
    name: str, options: list[str], monkeypatch: pytest.MonkeyPatch, package: str = "tools"
) -> None:
    """Options of a tool: its function `parse`, or its `main` until the parser is through."""
    module = importlib.import_module(f"{package}.{name}")
    if name == "benchmark" and not options:
        return  # lists the benchmarks
    if name == "benchmark" and options[0] in module.NAMES:
        module = importlib.import_module(f"tools.benchmarks.{options.pop(0)}")
    if hasattr(module, "parse"):
        module.parse(options)
        return
    parse_main(module.main, name, options, monkeypatch)


def parse_main(
    main: Callable[[], object], name: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options of a program that is run until its parser is through."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *arguments):
        original(self, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [name, *options])
    with pytest.raises(Parsed):
        main()


def check(line: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (script, command), options = SCRIPT.match(line).groups(), words(line, folder)
    if script == "train.py":
        parse_train([one for one in options if one != "--help"])
    elif script is not None and script.startswith("pipelines/"):
        main = partial(runpy.run_path, str(ROOT / script), run_name="__main__")
        parse_main(main, script, options, monkeypatch)
    elif command is not None:
        parse_tool(command.replace("-", "_"), options, monkeypatch, "scae_dali.commands")
    else:
        parse_tool(Path(script).stem, [one for one in options if one != "--help"], monkeypatch)


@pytest.mark.parametrize(("page", "line"), FOUND, ids=lambda value: value[-40:])
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
        "python pipelines/examples/proxy.py --data DIR --out run",
        "scae-dali inspect-cache maps.lmdb --no-such",
    ],
)
def test_a_command_that_is_not_is_found(line, folder, monkeypatch):
    with pytest.raises(SystemExit):
        check(line, folder, monkeypatch)


def test_the_settings_on_the_page_on_training_exist_with_these_defaults():
    text = (ROOT / "pipelines" / "README.md").read_text()
    defaults = {action.dest: action.default for action in train.make_parser()._actions}
    table = text[text.index("## Settings") : text.index("## Bad images")]
    listed = dict(re.findall(r"^\| `--([\w.]+) (\S+)` \|", table, flags=re.MULTILINE))
    assert len(listed) > 20
    assert {name: defaults[name] for name in listed} == {
        name: yaml.safe_load(value) for name, value in listed.items()
    }
    named = set(re.findall(r"`--([\w.]+)[ `]", text))
    assert named - {*defaults} == {"decode"}  # of scae-dali check-images


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    titles = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.M
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        if anchor:
            there = there / "README.md" if there.is_dir() else there
            assert anchor in anchors(there), target


def test_the_page_of_results_names_every_file_there_and_no_other():
    folder = ROOT / "tools" / "results"
    named = set(re.findall(r"\b[a-z]\w+\.json", (folder / "README.md").read_text()))
    assert named == {path.name for path in folder.glob("*.json")}
