"""What stays in float32 whatever the networks compute in, and what training mode changes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fvar_lightning.commands import model
from fvar_lightning.generation.editing import edit
from fvar_lightning.generation.sampling import generate, generate_stages
from fvar_lightning.precision import lacks_bfloat16
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.var import VAR

SCHEDULE = FocusSchedule((1, 2, 4), patch_size=4, focus_states=2)
LABELS, SEEDS = torch.tensor([0, 1, 2]), [4, 5, 6]


def make_models() -> tuple[VAR, VQVAE]:
    torch.manual_seed(0)
    vae = VQVAE(SCHEDULE, vocab_size=32, z_channels=8, ch=32, ch_mult=(1, 1, 2), num_res_blocks=1)
    for phi in vae.quantizer.phi:
        torch.nn.init.normal_(phi.weight, std=0.2)
    var = VAR(SCHEDULE.patch_nums, vocab_size=32, z_channels=8, num_classes=2, depth=3, width=32, drop_path_rate=0.9)
    torch.nn.init.normal_(var.head.weight)
    return var.eval(), vae.eval()


def make_tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(32, (3, n * n), generator=generator) for n in SCHEDULE.patch_nums]


def test_training_mode_changes_no_image() -> None:
    var, vae = make_models()
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.arange(16).expand(16, 16) < 8

    def made() -> list[Tensor]:
        stages = generate_stages(var, vae, LABELS, seeds=SEEDS)
        return [generate(var, vae, LABELS, seeds=SEEDS), edit(var, vae, images, mask, LABELS, seeds=SEEDS), *stages]

    expected = made()
    var.train()
    vae.train()
    for ours, theirs in zip(made(), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert var.training
    assert vae.training


def test_the_quantiser_is_float32_under_autocast() -> None:
    _, vae = make_models()
    tokens = make_tokens()

    def computed() -> list[Tensor]:
        quantizer = vae.quantizer
        stages = quantizer.stages(tokens)
        added = quantizer.add(stages[0], quantizer.code_map(tokens[1]), 1)
        return [quantizer.var_inputs(tokens), added, *stages]

    expected = computed()
    with torch.autocast("cpu", torch.bfloat16):
        found = computed()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("more_smooth", [False, True])
def test_models_with_half_precision_weights_generate(more_smooth: bool) -> None:
    var, vae = make_models()
    exact = generate(var, vae, LABELS, seeds=SEEDS, more_smooth=more_smooth)
    var.bfloat16()
    vae.bfloat16()
    found = generate(var, vae, LABELS, seeds=SEEDS, more_smooth=more_smooth)
    assert found.dtype == torch.float32
    assert found.shape == exact.shape
    assert found.isfinite().all()
    assert found.abs().max() <= 1


def test_half_precision_decodes_nearly_the_same_image() -> None:
    _, vae = make_models()
    tokens = make_tokens()
    exact = vae.double().decode(tokens)
    vae.bfloat16()
    found = vae.decode(tokens)
    assert found.dtype == torch.float32
    assert vae.quantizer.stages(tokens)[-1].dtype == torch.float32
    # bfloat16 keeps eight bits; rounding errors of a few layers add up
    assert (found - exact).abs().mean() < 0.02 * exact.abs().mean()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert [t.shape for t in vae.encode(vae.inputs(images.bfloat16()))] == [(2, 1), (2, 4), (2, 16)]


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 gfni\n", False),
        ("Features\t: fp asimd i8mm bf16\n", False),
        ("flags\t\t: fpu avx2 avx512f\n", True),
        ("processor\t: 0\n", False),
    ],
)
def test_processors_tell_their_units(text: str, lacks: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert lacks_bfloat16(str(tmp_path / "cpuinfo")) == lacks
    assert not lacks_bfloat16(str(tmp_path / "none"))


@pytest.mark.parametrize("lacks", [True, False])
def test_bfloat16_says_where_it_will_not_help(
    lacks: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(model, "lacks_bfloat16", lambda: lacks)
    assert model.choose_precision("bfloat16", torch.device("cpu")) == "bfloat16"
    assert [str(w.message) for w in recwarn] == [
        "precision bfloat16 will not help: this processor has no units for it"
    ] * lacks
