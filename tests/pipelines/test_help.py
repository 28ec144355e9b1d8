"""`train.py --help`: every setting has a text that says what it does."""

import argparse
import dataclasses

import jsonargparse

import train


def silent(parser: argparse.ArgumentParser) -> list[str]:
    """The options without a help text, by their dotted names."""
    return [action.dest for action in parser._actions if not (action.help or "").strip()]


def test_every_setting_has_a_help_text():
    found = silent(train.make_parser())
    assert not found, "these need a text in the Args of their config's docstring"


def test_a_setting_without_a_text_is_found():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """size: prose gives no text.

        Args:
            width: This one has a text.
        """

        size: int = 1
        width: int = 1

    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(Config)
    assert silent(parser) == ["size"]
