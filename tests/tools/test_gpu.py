"""Everything on the GPU against the CPU, by the tool that says so."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.gpu
def test_every_check_of_the_gpu_passes():
    done = subprocess.run(
        [sys.executable, "tools/gpu_check.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
