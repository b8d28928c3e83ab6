"""What studies/speed.py measures: networks with random weights, official VAR's and ours, and their steps."""

import copy
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fvar_lightning.activations import saved_bytes
from fvar_lightning.data.batches import TokenBatch
from fvar_lightning.schedule import VAR_PATCH_NUMS, FocusSchedule
from fvar_lightning.tasks.fvar import FVARTask
from fvar_lightning.tokenizer.losses import build_discriminator, discriminator_loss, generator_loss, perceptual_loss
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.var import VAR

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from golden.official import build_official
from golden.recipe import Config

OFFICIAL = os.environ.get("VAR_REPO", "")
"""A checkout of the official code, if there is one."""

SIDES = {
    256: VAR_PATCH_NUMS,
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
CONFIG = Config(VAR_PATCH_NUMS, 4096, 32, 160, 4, 1000, 8, 512, 8, False, True)
SMALL = Config((1, 2, 4), 1024, 8, 32, 4, 10, 2, 64, 1, False, True)


def config(tiny: bool) -> Config:
    return SMALL if tiny else CONFIG


class Models(NamedTuple):
    """Networks with the same weights."""

    size: int
    """Side of the images in pixels."""
    var: VAR
    vae: VQVAE
    """For `feature` targets."""
    views: VQVAE
    """For `view` targets."""
    official_vae: Any
    official_var: Any

    def official_generate(self, batch: int, labels: Tensor, guidance: float) -> Tensor:
        """As the official code does."""
        return self.official_var.autoregressive_infer_cfg(batch, labels, 0, guidance, 900, 0.96)


@cache
def models(tiny: bool) -> Models:
    """Networks of the official sizes, depth 8."""
    c = config(tiny)
    torch.manual_seed(0)
    schedule = FocusSchedule(c.patch_nums, focus_states=min(4, len(c.patch_nums)))
    vae, views = (
        VQVAE(schedule, targets=targets, vocab_size=c.vocab_size, z_channels=c.z_channels, ch=c.ch).eval()  # type: ignore[arg-type]
        for targets in ("feature", "view")
    )
    views.load_state_dict(vae.state_dict())
    var = VAR(
        c.patch_nums,
        vocab_size=c.vocab_size,
        z_channels=c.z_channels,
        num_classes=c.num_classes,
        depth=c.depth,
        width=c.width,
        heads=c.heads,
    ).eval()
    # logits that differ, as those of a trained model
    nn.init.normal_(var.head.weight, std=0.1)
    official_vae, official_var = build_official(OFFICIAL, c) if OFFICIAL else (None, None)
    for theirs, ours in ((official_vae, vae), (official_var, var)):
        if theirs is not None:
            copy_weights(theirs, ours)
    return Models(schedule.image_size, var.requires_grad_(False), vae, views, official_vae, official_var)


def copy_weights(theirs: nn.Module, ours: nn.Module) -> None:
    """Into the official network; its names differ for the quantiser only."""
    state = {name: x for name, x in ours.state_dict().items() if "codebook." not in name}
    state = {name.replace("quantizer.phi.", "quantize.quant_resi.qresi_ls."): x for name, x in state.items()}
    if isinstance(ours, VQVAE):
        state["quantize.embedding.weight"] = ours.codebook.embedding.weight
    theirs.load_state_dict(theirs.state_dict() | state)


def bfloat16(of: Models) -> Models:
    """With weights in half precision; quantiser and sampling stay in float32."""
    return of._replace(**{name: copy.deepcopy(getattr(of, name)).bfloat16() for name in ("var", "vae", "views")})


def stepped(parameters: Any, loss: Callable[[], Tensor], half: bool) -> Callable[[], None]:
    """A step of training: the loss, its gradients, AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def official_step(tiny: bool, batch: int, half: bool) -> Callable[[], None]:
    """What the official trainer does: tokenise in float32, teacher-forced logits, cross-entropy."""
    c = config(tiny)
    vae, var = build_official(OFFICIAL, c)
    var.train().requires_grad_(True)
    side = c.patch_nums[-1] * 16
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def loss() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            maps = vae.img_to_idxBl(images)
            inputs = vae.quantize.idxBl_to_var_input(maps)
        logits = var(torch.zeros(batch, dtype=torch.long), inputs)
        return F.cross_entropy(logits.flatten(0, 1), torch.cat(maps, dim=1).flatten())

    return stepped(var.parameters(), loss, half)


def student_of(pixels: int, depth: int) -> FVARTask:
    """A task without a teacher, width 256."""
    return make_task(SIDES[pixels], "plain", Config(SIDES[pixels], 4096, 32, 8, 4, 1000, depth, 256, 4, False, True))


def make_task(sides: tuple[int, ...], network: str, c: Config) -> FVARTask:
    """Of stage 2; the tokenizers are small, as a step from tokens uses no more of them than their codes."""
    schedule = {"patch_nums": sides, "focus_states": min(4, len(sides))}
    common = {"schedule": schedule, "z_channels": c.z_channels, "ch": 8}
    structure = {"kind": "structure", "vocab_size": c.vocab_size, **common}
    alias = {"kind": "alias", "vocab_size": 512, **common}
    weight = float(network != "plain")
    return FVARTask(
        structure,
        alias,
        num_classes=c.num_classes,
        depth=c.depth,
        width=c.width,
        heads=c.heads,
        trunk="separate" if network == "separate" else "shared",
        teacher_loss_weight=weight,
        feature_weight=weight,
        logit_weight=weight / 2,
    ).train()


def stage2_step(
    tiny: bool, batch: int, network: str, half: bool, grown: tuple[int, int] | None = None
) -> Callable[[], None]:
    """Ours from cached tokens; `grown`: pixels and depth of a plain one instead."""
    task = make_task(config(tiny).patch_nums, network, config(tiny)) if grown is None else student_of(*grown)
    trained = [p for p in task.parameters() if p.requires_grad]
    return stepped(trained, stage2_loss(task, batch), half)


def stage2_loss(task: FVARTask, batch: int) -> Callable[[], Tensor]:
    """Of random tokens."""
    draw = torch.Generator().manual_seed(0)

    def maps(vocab: int) -> list[Tensor]:
        return [torch.randint(vocab, (batch, n * n), generator=draw) for n in task.vae.schedule.patch_nums]

    tokens = TokenBatch(maps(task.vae.vocab_size), maps(512), torch.zeros(batch, dtype=torch.long))
    return lambda: task.losses(tokens, torch.Generator().manual_seed(0))["loss"]


def stage2_kept(pixels: int, depth: int) -> int:
    """Bytes that a plain step of one image keeps for its backward pass."""
    task = student_of(pixels, depth)
    return saved_bytes(stage2_loss(task, 1), task)


def feature_vae(c: Config) -> VQVAE:
    """A structure tokenizer with VAR's targets."""
    schedule = FocusSchedule(c.patch_nums, focus_states=1)
    return VQVAE(schedule, targets="feature", vocab_size=c.vocab_size, z_channels=c.z_channels, ch=c.ch)


def stage1_layouts(tiny: bool) -> dict[str, dict[str, Callable[[], object]]]:
    """Forward and backward of structure tokenizers, of the official width and those of `structure_small` and the
    quickstart, by layout of their maps."""
    small = VQVAE(FocusSchedule(), vocab_size=1024, ch=64, num_res_blocks=1, norm_groups=8)
    schedule = FocusSchedule((1, 2, 3, 4, 6, 8), patch_size=8, max_radius=5.0)
    quickstart = VQVAE(
        schedule, vocab_size=512, z_channels=16, ch=16, ch_mult=(1, 1, 2, 4), num_res_blocks=1, norm_groups=4
    )
    networks = {"width 160, `feature`": (feature_vae(config(tiny)), 1), "quickstart, `view`": (quickstart, 16)}
    networks |= {} if tiny else {"`structure_small`, `view`": (small, 2)}
    cases = {}
    for name, (vae, batch) in networks.items():
        side = vae.schedule.image_size
        images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
        inputs, runs = vae.inputs(images), {}
        for half in (False, True):
            for title, layout in (("contiguous", torch.contiguous_format), ("channels last", torch.channels_last)):
                laid_out = copy.deepcopy(vae).to(memory_format=layout)

                def run(vae: VQVAE = laid_out, inputs: Any = inputs, half: bool = half) -> None:
                    with torch.autocast("cpu", torch.bfloat16, enabled=half):
                        quantized = vae(inputs)
                        image = vae.decode_features(quantized.stages[-1])
                    (image.float().square().mean() + quantized.loss).backward()

                runs[f"{'bf16' if half else 'float32'}, {title}"] = run
        cases[f"{name}, {side} px, batch {batch}"] = runs
    return cases


def stage1_parts(tiny: bool) -> tuple[dict[str, Callable[[], Tensor]], list[nn.Module]]:
    """Forward passes, each to a loss, of every part of a structure tokenizer's step (`feature`); and the networks."""
    c = config(tiny)
    vae = feature_vae(c).to(memory_format=torch.channels_last)
    vae.codebook.step()
    perceptual, discriminator = perceptual_loss("efficientnet_lite1"), build_discriminator("patch", 64)
    side = c.patch_nums[-1] * 16
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, side, side, generator=draw) * 2 - 1
    fake = (torch.rand(1, 3, side, side, generator=draw) * 2 - 1).requires_grad_()
    cells = torch.randn(1, c.z_channels, c.patch_nums[-1], c.patch_nums[-1], generator=draw).requires_grad_()

    def quantise() -> Tensor:
        loss = vae.quantizer([vae.quantizer.down(cells, s) for s in range(len(c.patch_nums))]).loss
        vae.codebook.step()
        return loss

    parts: dict[str, Callable[[], Tensor]] = {
        "encoder": lambda: vae.quant_conv(vae.encoder(images)).sum(),
        "quantiser and codebook": quantise,
        "decoder": lambda: vae.decode_features(cells).sum(),
        "perceptual loss": lambda: perceptual(fake, images),
        "adversarial losses": lambda: (
            generator_loss(discriminator, fake) + discriminator_loss(discriminator, images, fake)
        ),
    }
    return parts, [vae, perceptual, discriminator]
