"""DeviceWeightAveraging: averaged weights on the device that trains."""

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy


class DeviceWeightAveraging(EMAWeightAveraging):
    """Lightning's `EMAWeightAveraging`, with the average on the device that trains, and without buffers.

    Lightning's own copies the model before the strategy has moved it: the average then lies on the CPU, and every step
    brings all weights there. (Where a GPU has no memory for it, that is what to use: `EMAWeightAveraging` with
    ``use_buffers: false``.) Codes are averaged with the encoder that they belong to; buffers, such as the sums and
    counts that codes are made of in training, are taken as they are. Checkpoints of either callback can be resumed with
    the other.

    Args:
        decay: what is kept of the average in a step; it reaches back 1 / (1 - decay) steps.
        update_starting_at_step: optimiser steps before the average begins; until then validations, and the end of a
            shorter run, are of the weights as they are.
    """

    def __init__(self, decay: float = 0.9999, update_starting_at_step: int = 0) -> None:
        super().__init__(use_buffers=False, decay=decay, update_starting_at_step=update_starting_at_step)

    @property
    def state_key(self) -> str:
        """Under which checkpoints keep the state of Lightning's own."""
        return EMAWeightAveraging.__qualname__

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move the model, as the strategy will, and copy it there.

        Raises:
            ValueError: if the strategy shards the weights, of which there is then no whole copy.
        """
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "trainer.strategy must not be ModelParallelStrategy: DeviceWeightAveraging averages no sharded weights"
            )
        if stage == "fit":
            pl_module.to(trainer.strategy.root_device)
        super().setup(trainer, pl_module, stage)

    @property
    def begun(self) -> bool:
        """Whether there is an average yet: until then its place is held by the weights that training began with."""
        return self._average_model is not None and bool(self._average_model.n_averaged)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in place, if there is one yet."""
        if self.begun:
            super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take it away again."""
        if self.begun:
            super().on_validation_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the task, if there is one."""
        if self.begun:
            super().on_train_end(trainer, pl_module)
