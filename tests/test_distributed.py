"""Two gloo processes reach what one process reaches on the joined batch."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import distributed_worker
from fvar_lightning.tokenizer.codebook import Codebook


def two_processes(name: str, strategy: str, precision: str, output: Path, tokenizers: list[str]) -> None:
    """Lightning's own launcher starts the second process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    worker = str(Path(distributed_worker.__file__))
    command = [sys.executable, worker, name, strategy, precision, str(output), *tokenizers]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("tokenizers")
    paths = [root / f"{kind}.ckpt" for kind in ("structure", "alias")]
    for path in paths:
        distributed_worker.run(path.stem, "single", "32-true", path, [])
    return [str(path) for path in paths]


@pytest.mark.parametrize(
    ("name", "strategy", "precision", "tolerance"),
    [
        ("structure", "ddp", "64-true", 1e-9),
        ("alias", "ddp", "64-true", 1e-9),
        ("fvar", "ddp", "64-true", 1e-9),
        # FSDP2 does not take float64
        ("fvar", "fsdp", "32-true", 2e-5),
    ],
)
def test_two_processes_equal_one(
    name: str,
    strategy: str,
    precision: str,
    tolerance: float,
    tmp_path: Path,
    tokenizers: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = tokenizers if name == "fvar" else []
    unused: list[bool] = []
    update = Codebook.update

    def watched(codebook: Codebook, pool: Sequence[torch.Tensor], indices: Sequence[torch.Tensor]) -> None:
        unused.append(len(torch.cat(list(indices)).unique()) < codebook.vocab_size)
        update(codebook, pool, indices)

    monkeypatch.setattr(Codebook, "update", watched)
    distributed_worker.run(name, "single", precision, tmp_path / "one.ckpt", given)
    assert any(unused) or name != "structure"  # revived at once
    two_processes(name, strategy, precision, tmp_path / "two.ckpt", given)
    one, two = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True)["state_dict"] for n in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=tolerance, rtol=0, msg=lambda m, key=key: f"{key}: {m}")
