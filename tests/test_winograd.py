"""Conv3x3 against torch's own convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fvar_lightning.tokenizer import winograd
from fvar_lightning.tokenizer.winograd import Conv3x3


def make(channels: int, out: int, height: int, width: int) -> tuple[Conv3x3, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, channels, height, width).contiguous(memory_format=torch.channels_last)
    return Conv3x3(channels, out), x


def exact(conv: Conv3x3, x: Tensor) -> Tensor:
    """In float64, by the plain algorithm."""
    assert conv.bias is not None
    return F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)


@torch.no_grad()
@pytest.mark.parametrize("strip", [1, 2**12, 2**20])
@pytest.mark.parametrize("shape", [(3, 5, 12, 8), (8, 2, 2, 2), (4, 4, 18, 30)])
def test_equals_the_plain_convolution(shape: tuple[int, ...], strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "STRIP", strip)
    conv, x = make(*shape)
    assert conv.bias is not None
    torch.testing.assert_close(
        winograd.winograd(x.double(), conv.weight.double(), conv.bias.double()), exact(conv, x), rtol=0, atol=1e-12
    )


@torch.no_grad()
def test_rounds_no_worse_than_the_plain_convolution() -> None:
    conv, x = make(64, 64, 32, 32)
    assert conv.bias is not None
    plain = F.conv2d(x, conv.weight, conv.bias, padding=1)
    errors = [(y - exact(conv, x)).square().mean() for y in (winograd.winograd(x, conv.weight, conv.bias), plain)]
    assert errors[0] < 2 * errors[1]


def test_serves_large_maps_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else: small or odd maps, few channels, other layouts and precisions, autocast, training."""
    calls = []
    monkeypatch.setattr(winograd, "CHANNELS", 4)
    monkeypatch.setattr(winograd, "winograd", lambda x, *_: calls.append(x.shape) or x)
    conv, x = make(4, 4, 16, 16)
    conv(x)
    with torch.no_grad():
        conv(x[..., :6, :6].contiguous(memory_format=torch.channels_last))
        conv(x[..., :15].contiguous(memory_format=torch.channels_last))
        conv(x.contiguous())
        Conv3x3(4, 3)(x)
        Conv3x3(4, 4).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            conv(x)
        assert not calls
        conv(x)
    assert calls == [x.shape]
