"""What the README says of official VAR, run with small networks in files of the names it uses."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.var import VAR
from fvar_lightning.weights.official import export_var_checkpoint, load_var_checkpoint

README = Path(__file__).parents[1] / "README.md"


def test_official_var(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.read_text().split("## With official VAR")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    vae = VQVAE(FocusSchedule((1, 2, 4), focus_states=1), targets="feature", vocab_size=64, z_channels=8, ch=32)
    var = VAR((1, 2, 4), vocab_size=64, z_channels=8, depth=2, width=64)
    torch.nn.init.normal_(var.head.weight)
    export_var_checkpoint(vae, var, "vae_ch160v4096z32.pth", "var_d16.pth")

    names: dict[str, Any] = {}
    exec(code, names)
    images, mask = names["images"], names["mask"]
    assert images.shape == (2, 3, 64, 64)
    assert torch.equal(names["again"], images)
    assert torch.equal(names["inpainted"][..., ~mask], images[..., ~mask])
    assert not torch.equal(names["inpainted"], images)
    for network, loaded in zip((vae, var), load_var_checkpoint("vae.pth", "var.pth"), strict=True):
        assert loaded is not None
        for name, tensor in loaded.state_dict().items():
            if not name.startswith("quantizer.codebook") or name.endswith("weight"):
                assert torch.equal(tensor, network.state_dict()[name]), name
