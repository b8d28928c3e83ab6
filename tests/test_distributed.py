"""Two gloo processes reach what one process reaches on the joined batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parent / "distributed_worker.py"


def run(name: str, strategy: str, output: Path, tokenizers: list[str]) -> dict[str, torch.Tensor]:
    """Weights after three steps; Lightning's own launcher starts the second process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(WORKER), name, strategy, str(output), *tokenizers]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("tokenizers")
    paths = [root / f"{kind}.ckpt" for kind in ("structure", "alias")]
    for path in paths:
        run(path.stem, "single", path, [])
    return [str(path) for path in paths]


@pytest.mark.parametrize(
    ("name", "strategy"), [("structure", "ddp"), ("alias", "ddp"), ("fvar", "ddp"), ("fvar", "fsdp")]
)
def test_two_processes_equal_one(name: str, strategy: str, tmp_path: Path, tokenizers: list[str]) -> None:
    given = tokenizers if name == "fvar" else []
    one = run(name, "single", tmp_path / "one.ckpt", given)
    two = run(name, strategy, tmp_path / "two.ckpt", given)
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=2e-5, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
