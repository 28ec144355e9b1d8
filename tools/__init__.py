"""The commands of the checkout, and in folders what they are made of."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the checkout
