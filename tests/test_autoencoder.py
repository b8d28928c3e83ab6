"""The fast ways of the autoencoder on a CPU are the plain ones, and how it begins."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fvar_lightning.tokenizer.autoencoder import Decoder, Encoder, GroupNorm, Upsample2x


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(9, 9), (5, 12)])
@torch.no_grad()
def test_one_transposed_convolution_is_upsampling_and_convolution(
    layout: torch.memory_format, size: tuple[int, int]
) -> None:
    up = Upsample2x(4).double()
    x = random(2, 4, *size).contiguous(memory_format=layout)
    expected = up.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(up.at_once(x), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(up(x), expected, rtol=0, atol=1e-14)


def test_upsampling_has_the_same_gradients_as_the_plain_way() -> None:
    up = Upsample2x(2).double()
    x = random(1, 2, 8, 8).requires_grad_()
    torch.testing.assert_close(up(x), up.at_once(x), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(up, x)


@pytest.mark.parametrize("groups", [6, 3, 1])
@torch.no_grad()
def test_norm_of_channels_last_maps_is_exact(groups: int) -> None:
    norm = GroupNorm(6, groups)
    norm.weight.copy_(random(6, seed=1))
    norm.bias.copy_(random(6, seed=2))
    x = random(2, 6, 256, 256) + 5 * random(2, 6, 1, 1, seed=3)
    expected = F.group_norm(x, groups, norm.weight.double(), norm.bias.double(), 1e-6)
    maps = x.float().contiguous(memory_format=torch.channels_last)
    before = maps.clone()
    found = norm(maps)
    assert torch.equal(maps, before)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert norm(maps, inplace=True) is maps
    assert torch.equal(maps, found)


def test_norm_never_overwrites_what_gradients_need() -> None:
    norm = GroupNorm(4, 2)
    x = random(1, 4, 3, 3, dtype=torch.float32).contiguous(memory_format=torch.channels_last).requires_grad_()
    before = x.detach().clone()
    norm(x, inplace=True).square().sum().backward()
    assert torch.equal(x.detach(), before)


@torch.no_grad()
def test_decoding_without_gradients_is_decoding() -> None:
    decoder = Decoder(ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=4, norm_groups=4)
    for i, parameter in enumerate(decoder.parameters()):  # residual branches are initialised to zero
        parameter.add_(0.1 * random(*parameter.shape, seed=i, dtype=torch.float32))
    exact = copy.deepcopy(decoder).double()
    z = random(2, 4, 12, 12)
    with torch.enable_grad():
        plain, expected = decoder(z.float()), exact(z)
    fast = decoder(z.float())
    assert fast.is_contiguous()
    for found in (plain, fast):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(exact(z), expected, rtol=0, atol=1e-13)


@torch.no_grad()
def test_residual_branches_begin_at_zero_and_convolutions_keep_the_variance() -> None:
    torch.manual_seed(0)
    encoder = Encoder(16, (1, 2), 1, 8, norm_groups=4)
    x = random(4, 16, 12, 12, dtype=torch.float32)
    first, second = (level.block[0] for level in encoder.down)
    assert torch.equal(first(x), x)
    assert torch.equal(second(x), second.nin_shortcut(x))
    assert torch.equal(encoder.mid.attn_1(y := second(x)), y)
    assert second(x).std() == pytest.approx(1, abs=0.2)
    assert first.conv1(x)[..., 1:-1, 1:-1].std() == pytest.approx(1, abs=0.2)
