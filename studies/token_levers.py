"""Tasks of stage 1 that the ablation tries: other ties between the features of the views, and less of the token grid.

Legend: S scales, z_s features of view s, f_hat_s the map after scale s.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fvar_lightning.tasks.tokenizer import TokenizerTask
from fvar_lightning.tokenizer.autoencoder import Upsample2x
from fvar_lightning.tokenizer.quantizer import Quantized

COMMITMENT = 0.25
"""VAR's, and the quantiser's own."""


class Tied(TokenizerTask):
    """One more term over z_s and f_hat_s, both of which are formed as ever."""

    def quantize(self, inputs: Tensor | list[Tensor]) -> Quantized:
        features = self.tokenizer.features(inputs)
        quantized = self.tokenizer.quantizer(features, features)
        if self.tokenizer.codebook.warming_up:
            return quantized
        stages = [f_hat.detach() for f_hat in quantized.stages]
        return quantized._replace(loss=quantized.loss + self.tie(features, stages) / len(features))

    def tie(self, features: Sequence[Tensor], stages: Sequence[Tensor]) -> Tensor:
        """The term, summed over scales.

        Args:
            features: z_s.
            stages: f_hat_s, without gradients.
        """
        raise NotImplementedError


class Committed(Tied):
    """Every z_s commits to its codes four times as firmly."""

    def tie(self, features: Sequence[Tensor], stages: Sequence[Tensor]) -> Tensor:
        down = self.tokenizer.quantizer.down
        errors = [F.mse_loss(z, down(f_hat, s)) for s, (z, f_hat) in enumerate(zip(features, stages, strict=True))]
        return 3 * COMMITMENT * torch.stack(errors).sum()


class Drawn(Tied):
    """Features of blurred views are drawn to the averages of the sharp image's."""

    weight = 0.1

    def tie(self, features: Sequence[Tensor], stages: Sequence[Tensor]) -> Tensor:
        sharp, down = features[-1].detach(), self.tokenizer.quantizer.down
        return self.weight * torch.stack([F.mse_loss(z, down(sharp, s)) for s, z in enumerate(features[:-1])]).sum()


class Passing(TokenizerTask):
    """The encoder learns from the sharp image alone, as VAR's does; the views pass through it without gradients. For
    `sharp_commitment`, without which nothing ties their features together."""

    def quantize(self, inputs: Tensor | list[Tensor]) -> Quantized:
        with torch.no_grad():
            blurred = self.tokenizer.features(inputs)[:-1]
        features = [*blurred, self.tokenizer.features(inputs)[-1]]
        return self.tokenizer.quantizer(features, features)


class Smooth(TokenizerTask):
    """Every up-sampling of the decoder begins as bilinear interpolation: the same network, other initial weights."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        row = torch.tensor([0.25, 0.5, 0.25])  # what linear interpolation is behind a doubling of cells
        for module in self.tokenizer.decoder.modules():
            if isinstance(module, Upsample2x):
                torch.nn.init.dirac_(module.conv.weight)
                with torch.no_grad():
                    module.conv.weight.copy_(module.conv.weight.sum((2, 3), keepdim=True) * torch.outer(row, row))


class GridLoss(TokenizerTask):
    """A loss on the harmonics of the token grid: the mean of an image's patches is to be the original's."""

    weight = 10.0

    def further_losses(self, passed: Any, loss: Tensor, terms: Any) -> Tensor:
        error, side = passed.decoded[0] - passed.targets[0], self.schedule.patch_size
        periodic = rearrange(error, "b c (h p) (w q) -> b c p q (h w)", p=side, q=side).mean(-1)
        periodic = periodic - periodic.mean((-1, -2), keepdim=True)
        return super().further_losses(passed, loss, terms) + self.weight * periodic.square().mean()
