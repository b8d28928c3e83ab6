"""What the backward pass keeps: the same gradients whether it is kept or computed again, and how many bytes it is."""

import pytest
import torch
from torch import Tensor, nn

from fvar_lightning.activations import recomputed, saved_bytes
from fvar_lightning.tokenizer import autoencoder
from fvar_lightning.tokenizer.autoencoder import Decoder, Encoder, ResnetBlock
from fvar_lightning.transformer.losses import feature_loss, token_losses
from fvar_lightning.transformer.teacher import HighFrequencyTeacher
from fvar_lightning.transformer.var import VAR

BATCH, WIDTH = 3, 32


def make_networks(depth: int = 3, trunk: str = "shared", **options: object) -> tuple[VAR, HighFrequencyTeacher]:
    torch.manual_seed(0)
    student = VAR((1, 2, 3), vocab_size=12, z_channels=4, num_classes=5, depth=depth, width=WIDTH, heads=2, **options)
    teacher = HighFrequencyTeacher(student, alias_channels=6, alias_blocks=1, trunk=trunk)
    for parameter in (*student.parameters(), *teacher.parameters()):  # branches and cross-attention start closed
        nn.init.normal_(parameter, std=0.2)
    return student, teacher


def step(student: VAR, teacher: HighFrequencyTeacher, dtype: torch.dtype = torch.float32) -> Tensor:
    """The losses of a step as `FVARTask` adds them."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(BATCH)
    inputs = torch.randn(BATCH, 13, 4, generator=generator, dtype=dtype)
    alias = torch.randn(BATCH, 14, 6, generator=generator, dtype=dtype)
    targets = torch.randint(12, (BATCH, 14), generator=generator)
    keep = student.keep_masks(BATCH, generator)
    trace = student.trace(labels, inputs, keep)
    taught = teacher(student, trace, labels, inputs, alias, keep)
    readout = student.readout(trace.hidden[-1], trace.condition)
    return token_losses(targets, readout, taught.readout).sum() + feature_loss(trace.hidden[-1:], taught.hidden)


@pytest.mark.parametrize("trunk", ["shared", "separate"])
@pytest.mark.parametrize("shared_aln", [False, True])
def test_recomputed_blocks_give_the_same_gradients(trunk: str, shared_aln: bool) -> None:
    kept = make_networks(trunk=trunk, shared_aln=shared_aln, drop_path_rate=0.5)
    again = make_networks(trunk=trunk, shared_aln=shared_aln, drop_path_rate=0.5, recompute=True)
    gradients = []
    for networks in (kept, again):
        for network, source in zip(networks, kept, strict=True):
            network.load_state_dict(source.state_dict())
            network.double()
        loss = step(*networks, torch.float64)
        parameters = [p for network in networks for p in network.parameters()]
        gradients.append(torch.autograd.grad(loss, parameters, materialize_grads=True))
    assert sum(g.abs().sum() > 0 for g in gradients[0]) > 0.8 * len(gradients[0])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)


def test_a_recomputed_block_keeps_its_output_alone() -> None:
    kept = []
    for depth in (3, 4):
        networks = make_networks(depth, recompute=True)
        kept.append(saved_bytes(lambda networks=networks: step(*networks), *networks))
    masks = BATCH * 2 * 4
    assert kept[1] - kept[0] == 4 * BATCH * 14 * WIDTH + masks


def test_storages_count_once_and_parameters_not_at_all() -> None:
    layer = nn.Linear(5, 7)
    x = torch.randn(3, 5, requires_grad=True)
    # the input, for the weight; exp keeps its result, which the square takes again
    assert saved_bytes(lambda: layer(x).exp().square(), layer) == 4 * (3 * 5 + 3 * 7)
    assert saved_bytes(lambda: layer(x[:2])[:, :3].exp(), layer) == 4 * (3 * 5 + 2 * 3)
    assert saved_bytes(lambda: layer(x).exp().square()) == 4 * (3 * 5 + 3 * 7 + 5 * 7)
    assert saved_bytes(lambda: recomputed(lambda y: layer(y).exp().sin(), x), layer) == 4 * 3 * 5


@pytest.mark.parametrize("grown", [False, True])
def test_a_residual_block_keeps_two_maps(grown: bool) -> None:
    block = ResnetBlock(8, 16 if grown else 8, groups=4)
    x = torch.randn(2, 8, 4, 4)
    # the block's input and the first convolution's output; norms and activations are computed again
    assert saved_bytes(lambda: block(x), block) == 4 * 2 * 16 * (8 + block.conv1.out_channels)


def test_recomputed_convolutions_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(Encoder(8, (1, 2), 1, 4), Decoder(8, (1, 2), 1, 4)).double()
    for parameter in network.parameters():  # residual branches start closed
        nn.init.normal_(parameter, std=0.2)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(network(images).square().mean(), list(network.parameters()))

    found = gradients()
    monkeypatch.setattr(autoencoder, "recomputed", lambda function, *args: function(*args))
    for ours, theirs in zip(found, gradients(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)
