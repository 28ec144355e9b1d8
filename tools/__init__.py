"""The commands of the checkout; its folders hold their parts."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the checkout
