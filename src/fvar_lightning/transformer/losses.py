"""The terms of stage 2 (paper section 3.6, eq. 12), without ever holding all logits.

Legend: B batch, L tokens of all scales, l tokens of a chunk, C width, V codebook.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fvar_lightning.activations import recomputed
from fvar_lightning.transformer.var import Readout

CHUNK, MOST_CHUNKS = 1024, 16
"""Logits exist of so many tokens at a time, or of more where that would make more chunks. On CPUs 256 to 1024 are
fastest; on GPUs many small ones cost more in launches than they save in memory."""


def token_losses(targets: Tensor, *networks: Readout) -> Tensor:
    """Cross-entropies, and the divergence of two networks, of tokens predicted from hidden states.

    Logits are made chunk by chunk, and once more in the backward pass; nothing of size B L V is ever held.

    Args:
        targets: (B, L) tokens.
        networks: the student, or the student and the teacher.

    Returns:
        Means over tokens, in float32 or better. One of the student's cross-entropy; or three of the student's, the
        teacher's, and KL(teacher || student), which reaches the student only.
    """
    sums = [
        recomputed(_chunk_sums, tokens, *(x for readout in readouts for x in readout))
        for tokens, *readouts in _chunks(targets, *networks)
    ]
    return torch.stack(sums).sum(0) / targets.numel()


@torch.no_grad()
def token_cross_entropy(targets: Tensor, network: Readout) -> Tensor:
    """Cross-entropy of every token in nats, (B, L) in float32 or better; logits are made chunk by chunk.

    Args:
        targets: (B, L) tokens.
        network: which predicts them.
    """
    chunks = _chunks(targets, network)
    return torch.cat([-_log_probs(readout).gather(-1, tokens[..., None])[..., 0] for tokens, readout in chunks], dim=1)


def _chunks(targets: Tensor, *networks: Readout) -> Iterator[tuple[Any, ...]]:
    """Pieces of the targets, with the same pieces of every network."""
    batch, length = targets.shape
    size = max(CHUNK // batch, math.ceil(length / MOST_CHUNKS), 1)
    return zip(targets.split(size, dim=1), *(network.split(size) for network in networks), strict=True)


def _log_probs(readout: Readout) -> Tensor:
    """(B, l, V) in float32 or better."""
    logits = readout.logits()
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _chunk_sums(targets: Tensor, *tensors: Tensor) -> Tensor:
    """The sums over a chunk; the tensors of its readouts one by one, as checkpointing takes them."""
    width = len(Readout._fields)
    tokens, log_probs = targets.flatten(), []
    for i in range(0, len(tensors), width):
        log_probs.append(_log_probs(Readout(*tensors[i : i + width])).flatten(0, 1))
    sums = [F.nll_loss(x, tokens, reduction="sum") for x in log_probs]
    if len(log_probs) == 2:
        student, teacher = log_probs
        sums.append(F.kl_div(student, teacher.detach(), reduction="sum", log_target=True))
    return torch.stack(sums)


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared error of pairs of hidden states (B, L, C), averaged over elements; reaches the student only.

    The sum of eq. 12 would weigh more the wider the network is.
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([F.mse_loss(s, t.detach()) for s, t in pairs]).mean()
