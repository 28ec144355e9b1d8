"""Puts the checkout's root on sys.path: `pipelines` and `train` are not installed."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
