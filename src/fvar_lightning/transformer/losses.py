"""The terms of stage 2 (paper section 3.6, eq. 12).

Legend: B batch, L tokens of all scales, C width, V codebook.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of logits (B, L, V) against tokens (B, L), the mean over tokens."""
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared error of pairs of hidden states (B, L, C), averaged over elements; reaches the student only.

    The sum of eq. 12 would weigh more the wider the network is.
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([F.mse_loss(s, t.detach()) for s, t in pairs]).mean()


def logit_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of logits (B, L, V), the mean over tokens; reaches the student only."""
    p = teacher.detach().flatten(0, 1).float().log_softmax(-1)
    q = student.flatten(0, 1).float().log_softmax(-1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True)
