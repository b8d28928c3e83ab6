"""studies/speed.py, which prints the table of docs/speed.md, still runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


@pytest.mark.benchmark
def test_every_part_prints_its_rows() -> None:
    script = Path(__file__).parents[2] / "studies" / "speed.py"
    environment = os.environ | {"FVAR_BENCHMARK": "tiny"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True)
    print(run.stdout)
    titles = [line for line in run.stdout.splitlines() if line.startswith("### ")]
    assert len(titles) == 9
    assert run.stdout.count("| batch 1") >= 3 * 2 + 5 + 5 + 6
    assert run.stdout.count("channels last | ") == 2 * 2


@pytest.mark.benchmark
def test_growth_is_drawn(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "studies" / "growth.py"
    command = [sys.executable, str(script), "--plot", str(tmp_path / "growth.png")]
    subprocess.run(command, env=os.environ | {"FVAR_BENCHMARK": "tiny"}, capture_output=True, check=True)
    assert Image.open(tmp_path / "growth.png").size == (990, 660)
