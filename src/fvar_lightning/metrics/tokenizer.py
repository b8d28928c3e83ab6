"""What a tokenizer is judged by over a fixed evaluation set: effective code usage and signal-to-noise ratio."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of code frequencies (..., V) -> (...): the number of codes in effective use, 1..V."""
    p = counts.double() / counts.sum(-1, keepdim=True).clamp_min(1)
    return torch.exp(-torch.special.xlogy(p, p).sum(-1))


class CodebookUsage(Metric):
    """Perplexity over min(V, tokens seen), for each scale and for all scales together; in (0, 1], NaN without tokens.

    Args:
        num_scales: S.
        vocab_size: V.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_scales: int, vocab_size: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(num_scales, vocab_size, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, indices: Sequence[Tensor]) -> None:
        """Count token maps of the first scales, (B, pn_s^2) each."""
        for s, tokens in enumerate(indices):
            self.counts[s] += torch.bincount(tokens.flatten(), minlength=self.counts.shape[1])

    def compute(self) -> Tensor:
        """(S + 1,): every scale, then all together."""
        counts = torch.cat((self.counts, self.counts.sum(0, keepdim=True)))
        seen = counts.sum(-1)
        return torch.where(seen > 0, perplexity(counts) / seen.clamp(1, counts.shape[1]), torch.nan)


class SignalToNoise(Metric):
    """10 log10 (sum of target^2 / sum of error^2) in dB, one figure for each of n signals.

    Args:
        signals: n.
    """

    full_state_update = False
    signal: Tensor
    noise: Tensor

    def __init__(self, signals: int) -> None:
        super().__init__()
        self.add_state("signal", torch.zeros(signals, dtype=torch.double), dist_reduce_fx="sum")
        self.add_state("noise", torch.zeros(signals, dtype=torch.double), dist_reduce_fx="sum")

    def update(self, reconstructions: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Add n tensors and what they should be."""
        for i, (x, y) in enumerate(zip(reconstructions, targets, strict=True)):
            self.signal[i] += y.double().square().sum()
            self.noise[i] += (x.double() - y.double()).square().sum()

    def compute(self) -> Tensor:
        """(n,) in dB."""
        return 10 * torch.log10(self.signal / self.noise)
