"""The losses of stage 2 against the plain formulas on whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fvar_lightning.transformer import losses
from fvar_lightning.transformer.losses import token_losses
from fvar_lightning.transformer.var import Readout


def make_readouts(number: int, dtype: torch.dtype = torch.float64) -> list[Readout]:
    """Of 3 samples, 7 tokens, width 8 and 11 codes; the classifier is everybody's."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    head = draw(11, 8), draw(11)
    return [Readout(draw(3, 7, 8), draw(3, 1, 8), draw(3, 1, 8), *head) for _ in range(number)]


def make_targets() -> Tensor:
    return torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(1))


def plain(targets: Tensor, *networks: Readout) -> list[Tensor]:
    logits = [network.logits() for network in networks]
    terms = [F.cross_entropy(x.flatten(0, 1), targets.flatten()) for x in logits]
    if len(logits) == 2:
        p, log_q, log_p = logits[1].detach().softmax(-1), logits[0].log_softmax(-1), logits[1].detach().log_softmax(-1)
        terms.append((p * (log_p - log_q)).sum(-1).mean())
    return terms


@pytest.mark.parametrize("networks", [1, 2])
@pytest.mark.parametrize("chunk", [1, 6, 9, 1024])
def test_losses_in_chunks_are_the_plain_formulas(networks: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", chunk)
    readouts = make_readouts(networks)
    leaves = list({id(x): x for readout in readouts for x in readout}.values())
    for found, expected in zip(token_losses(make_targets(), *readouts), plain(make_targets(), *readouts), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        for a, b in zip(
            torch.autograd.grad(found, leaves, retain_graph=True, materialize_grads=True),
            torch.autograd.grad(expected, leaves, retain_graph=True, materialize_grads=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_losses_are_exact_to_float32_whatever_the_logits_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", 9)
    readouts = make_readouts(2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_losses(make_targets(), *readouts)
        logits = [readout.logits() for readout in readouts]
    assert logits[0].dtype == torch.bfloat16
    expected = F.cross_entropy(logits[0].double().flatten(0, 1), make_targets().flatten())
    assert found.dtype == torch.float32
    assert found[0].item() == pytest.approx(expected.item(), rel=1e-6)
    gradient = torch.autograd.grad(found.sum(), readouts[0].weight)[0]
    reference = torch.autograd.grad(sum(plain(make_targets(), *readouts)), readouts[0].weight)[0]
    torch.testing.assert_close(gradient, reference, atol=0.02, rtol=0.02)


def test_no_more_chunks_than_are_worth_their_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(losses, "recomputed", lambda f, tokens, *x: calls.append(tokens.shape) or torch.zeros(1))
    readout = Readout(torch.zeros(2, 9451, 1), *torch.zeros(4, 2, 1, 1))
    token_losses(torch.zeros(2, 9451, dtype=torch.long), readout)
    assert len(calls) == 16
    assert max(calls) == (2, 591)
