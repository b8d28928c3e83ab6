"""TokenDataModule: cached tokens for stage 2."""

from dataclasses import asdict

from torch.utils.data import DataLoader

from fvar_lightning.data.loaders import SharedLoaders
from fvar_lightning.data.token_dataset import TokenDataset
from fvar_lightning.data.tokens import disagreements, with_deviations


class TokenDataModule(SharedLoaders):
    """Batches of cached tokens (`TokenBatch`), and for prediction images to generate (`SampleBatch`).

    Args:
        path: folder of the cache of training tokens.
        val_path: folder of another one for validation; None for no validation.
        batch_size: rows per device and step.
        num_workers: processes that read; as for `ImageDataModule`.
        seed: of the order of the rows.
        samples_per_class: images to generate of every class.
        base_seed: seed of the first of them; the others count on.

    Raises:
        ValueError: if a cache is missing, incomplete or broken, or the two are not of the same tokens.
        OSError: if a file cannot be opened, be it for want of file descriptors.
    """

    def __init__(
        self,
        path: str,
        val_path: str | None = None,
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
        samples_per_class: int = 8,
        base_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, samples_per_class, base_seed)
        self.train = TokenDataset(path)
        self.val = None if val_path is None else TokenDataset(val_path)
        val = self.train if self.val is None else self.val
        wanted = asdict(self.train.meta)
        if differing := disagreements(with_deviations(asdict(val.meta), wanted), wanted):
            raise ValueError(f"val_path {val_path!r} does not match path {path!r}: it holds tokens of {differing}")

    @property
    def class_names(self) -> list[str]:
        """Name of every label, as the cache tells."""
        return self.train.meta.class_names

    def train_dataloader(self) -> DataLoader:
        return self.train_loader(self.train, self.train.collate)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        return [] if self.val is None else self.eval_loader(self.val, self.val.collate)

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """The validation tokens."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader | list[DataLoader]:
        return self.sample_loader()
