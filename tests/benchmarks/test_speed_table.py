"""studies/speed.py, which prints the table of docs/speed.md, still runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.benchmark
def test_every_part_prints_its_rows() -> None:
    script = Path(__file__).parents[2] / "studies" / "speed.py"
    environment = os.environ | {"FVAR_BENCHMARK": "tiny"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True)
    print(run.stdout)
    titles = [line for line in run.stdout.splitlines() if line.startswith("### ")]
    assert len(titles) == 6
    assert run.stdout.count("| batch 1") >= 3 * 2 + 5 + 5 + 6
