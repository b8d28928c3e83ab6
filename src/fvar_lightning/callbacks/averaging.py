"""DeviceWeightAveraging: averaged weights on the device that trains."""

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging


class DeviceWeightAveraging(EMAWeightAveraging):
    """Lightning's `EMAWeightAveraging`, with the average on the device that trains, and without buffers.

    Lightning's own copies the model before the strategy has moved it: the average then lies on the CPU, and every step
    brings all weights there. (Where a GPU has no memory for it, that is what to use: `EMAWeightAveraging` with
    ``use_buffers: false``.) Codes are averaged with the encoder that they belong to; buffers, such as the sums and
    counts that codes are made of in training, are taken as they are. Checkpoints of either callback can be resumed with
    the other.

    Args:
        decay: what is kept of the average in a step; it reaches back 1 / (1 - decay) steps.
        update_starting_at_step: optimiser steps before the average begins.
    """

    def __init__(self, decay: float = 0.9999, update_starting_at_step: int = 0) -> None:
        super().__init__(use_buffers=False, decay=decay, update_starting_at_step=update_starting_at_step)

    @property
    def state_key(self) -> str:
        """Under which checkpoints keep the state of Lightning's own."""
        return EMAWeightAveraging.__qualname__

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move the model, as the strategy will, and copy it there."""
        if stage == "fit":
            pl_module.to(trainer.strategy.root_device)
        super().setup(trainer, pl_module, stage)
