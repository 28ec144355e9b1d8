"""`train.py --help`: every setting has a text that says what it does."""

import argparse
import dataclasses

import jsonargparse

import train

# Groups of settings whose configs' docstrings have no `Args:` yet.
EXEMPT = (
    *("scae", "semantic_grid_mask", "random_erasing", "cutout", "grid_mask", "mixup", "cutmix"),
    *("saliency_mix", "keep_augment", "rand_augment", "auto_augment", "trivial_augment"),
    "image.crop",
)


def silent(parser: argparse.ArgumentParser) -> list[str]:
    """The options without a help text, by their dotted names."""
    return [action.dest for action in parser._actions if not (action.help or "").strip()]


def test_every_setting_has_a_help_text():
    found = silent(train.make_parser())
    found = [dest for dest in found if not dest.startswith(tuple(f"{name}." for name in EXEMPT))]
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
