"""Pixel, texture, perceptual and adversarial losses."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from fvar_lightning.cli import main
from fvar_lightning.tokenizer.losses import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    perceptual_loss,
    pixel_loss,
    texture_loss,
)

CONF = Path(__file__).parent / "conf"


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_pixel_loss_by_hand() -> None:
    assert pixel_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]), 0.5, 2.0).item() == 0.5 * 2 + 2 * 5


def test_texture_loss_of_checkerboards() -> None:
    """Of a checkerboard the 3x3 mean leaves 8/9 (5 cells of one sign, 4 of the other), up to its border."""
    rows = torch.arange(24, dtype=torch.float64)
    board = (-1.0) ** (rows[:, None] + rows).expand(2, 3, 24, 24)
    assert texture_loss(0.5 * board, 0.2 * board).item() == pytest.approx(8 / 9 * 0.3, rel=1e-3)
    assert texture_loss(0.5 * board, -0.5 * board).item() == 0
    assert texture_loss(0.5 * board + rows / 24, 0.5 * board).item() == pytest.approx(0, abs=1e-3)


def test_texture_loss_has_a_gradient_on_flat_images(images: torch.Tensor) -> None:
    flat = torch.zeros_like(images).requires_grad_()
    texture_loss(flat, images).backward()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()
    noise = (0.01 * images).requires_grad_()
    texture_loss(noise, images).backward()
    assert noise.grad is not None
    assert (noise.grad * noise).sum() < 0


def test_feature_loss_sees_blur_and_is_zero_on_itself(images: torch.Tensor) -> None:
    loss = perceptual_loss("efficientnet_lite1")
    assert loss is not None
    assert loss(images, images).item() == 0
    slight = loss(images + 0.02 * torch.sign(images), images)
    blurred = loss(nn.functional.avg_pool2d(images, 5, 1, 2), images)
    assert 0 < slight < blurred
    x = images.clone().requires_grad_()
    loss(x, images.roll(1, 0)).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in loss.parameters())


def test_each_side_of_the_game_trains_its_own_weights(images: torch.Tensor) -> None:
    discriminator = PatchDiscriminator(ch=8)
    scale = torch.ones((), requires_grad=True)
    generator_loss(discriminator, scale * images).backward()
    assert scale.grad is not None
    assert all(p.grad is None for p in discriminator.parameters())
    scale.grad = None
    discriminator_loss(discriminator, images, scale * images).backward()
    assert scale.grad is None
    assert all(p.grad is not None for p in discriminator.parameters())


def test_discriminator_learns_to_tell(images: torch.Tensor) -> None:
    discriminator = PatchDiscriminator(ch=8)
    fake = nn.functional.avg_pool2d(images, 3, 1, 1)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        discriminator_loss(discriminator, images, fake).backward()
        optimizer.step()
    assert discriminator(images).mean() > discriminator(fake).mean() + 1


def test_adaptive_weight_balances_gradients() -> None:
    last = torch.tensor([1.0, 2.0], requires_grad=True)
    reconstruction, adversarial = 0.3 * last.sum(), 5 * last.sum()
    assert adaptive_weight(reconstruction, adversarial, last).item() == pytest.approx(0.06, rel=1e-5)
    assert adaptive_weight(adversarial, reconstruction, last).item() == 1


def test_training_with_everything_counts_steps_once(tmp_path: Path, image_folder: Path) -> None:
    args = [f"--config={CONF / 'tokenizer.yaml'}", f"--data.source={image_folder}", "--trainer.logger=false",
            f"--trainer.default_root_dir={tmp_path}", "--model.perceptual=efficientnet_lite1",
            "--model.texture_weight=2", "--model.adversarial_weight=0.5",
            "--model.adversarial_start=0.4", "--model.discriminator_ch=8",
            "--trainer.gradient_clip_val=1.0"]  # fmt: skip
    cli = main(["fit", *args])
    assert cli is not None
    assert cli.trainer.global_step == 5
    before = copy.deepcopy(cli.model.discriminator).state_dict()
    metrics = cli.trainer.logged_metrics
    assert math.isfinite(metrics["train/texture"])
    assert math.isfinite(metrics["train/generator"])
    assert math.isfinite(metrics["train/discriminator"])
    checkpoint = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    assert not any("network" in key for key in checkpoint["state_dict"])
    assert all(torch.equal(checkpoint["state_dict"][f"discriminator.{k}"], v) for k, v in before.items())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.perceptual=vgg"], "vgg"),
        (
            ["--model.kind=alias", "--model.perceptual=efficientnet_lite1"],
            "perceptual, texture_weight and adversarial_weight",
        ),
        (["--model.kind=alias", "--model.texture_weight=1"], "perceptual, texture_weight and adversarial_weight"),
        (["--model.adversarial_start=2"], "adversarial_start must lie in"),
    ],
)
def test_refused(args: list[str], message: str, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", f"--config={CONF / 'tokenizer.yaml'}", f"--data.source={image_folder}", *args])
    assert message in capsys.readouterr().err


def test_missing_lpips_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match=r"lpips.* needs torchvision's VGG16 weights: put vgg16-397923af.pth into"):
        perceptual_loss("lpips")


def test_truncated_lpips_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    path.parent.mkdir(parents=True)
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"perceptual 'lpips' needs torchvision's VGG16 weights"):
        perceptual_loss("lpips")
