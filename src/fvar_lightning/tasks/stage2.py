"""Stage2Task: the networks of stage 2, where they come from, how checkpoints hold them, and what they make.

Legend: B batch, S scales.
"""

from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from fvar_lightning.data.batches import ImageBatch, SampleBatch, TokenBatch, in_precision
from fvar_lightning.data.token_module import TokenDataModule
from fvar_lightning.data.tokens import TokenMeta
from fvar_lightning.generation.sampling import generate, generate_stages
from fvar_lightning.optics.psf import check_psf
from fvar_lightning.optics.refocus import Refocus
from fvar_lightning.precision import no_autocast
from fvar_lightning.tasks.finite import FiniteTask
from fvar_lightning.tasks.frozen import Source, at_data_schedule, frozen_tokenizers
from fvar_lightning.tasks.sharding import Networks, blocks, build_sharded, gathered, mixed_precision, shard
from fvar_lightning.tasks.tokens import check_cache, hashes, identity
from fvar_lightning.tasks.training import check_views, compile_each, use_right_weights
from fvar_lightning.tokenizer.alias import AliasTokenizer
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.teacher import HighFrequencyTeacher
from fvar_lightning.transformer.var import VAR
from fvar_lightning.weights.averages import state_of
from fvar_lightning.weights.checkpoints import load_initial_weights
from fvar_lightning.weights.describe import describe, differences


class Stage2Task(FiniteTask):
    """Frozen tokenizers, student and teacher: built when they can be, kept in checkpoints that stand alone, sharded
    where the strategy asks for it; tokens of images, and images by the student.

    The arguments of the networks are hyper-parameters of the subclass, which trains them.
    """

    student_class: type[VAR] = VAR
    """What the student is; a subclass of the task may name a subclass of `VAR`."""
    student: VAR
    teacher: HighFrequencyTeacher | None

    teacher_loss_weight: float
    """0: there is no teacher."""
    sampling: dict[str, Any]
    """guidance, top_k and top_p of `generate`."""

    def prepare(
        self, structure: Source, alias: Source | None, initial_weights: str | None, *, compile: bool, deferred: bool
    ) -> None:
        """Load the tokenizers, and build the networks if the classes are known and nobody asked to wait.

        Args:
            structure: checkpoint of the structure tokenizer, or its description.
            alias: the same of the alias tokenizer, if there is one.
            initial_weights: what the student starts from.
            compile: the blocks.
            deferred: leave the networks to `configure_model`.

        Raises:
            ValueError: if nothing can make the teacher's alias tokens, or if there are more or fewer class names than
                classes.
        """
        if self.num_classes is not None:
            self._check_names(self.num_classes)
        self.initial_weights, self.compile_blocks = initial_weights, compile
        self.hparams["initial_weights"] = None  # a checkpoint stands alone: it holds these weights
        vae, alias_tokenizer = frozen_tokenizers(structure, alias)
        if self.teacher_loss_weight > 0 and alias_tokenizer is None and vae.targets != "view":
            raise ValueError(
                f"alias_tokenizer must be given: a structure tokenizer of targets {vae.targets!r} encodes no alias "
                "residuals, those of 'view' alone do"
            )
        # of files, before the trainer changes the precision; those of described tokenizers come with the checkpoint
        described = isinstance(structure, dict) or isinstance(alias, dict)
        self.tokenizers_sha256 = {} if described else hashes({"structure": vae, "alias": alias_tokenizer})
        self._take_tokenizers(vae, alias_tokenizer)
        if self.num_classes is not None and not deferred:
            self.student, self.teacher = self._networks()

    def _take_tokenizers(self, vae: VQVAE, alias: AliasTokenizer | None) -> None:
        """A checkpoint stands alone: their descriptions take the place of their files."""
        self.vae, self.alias_tokenizer = vae, alias
        self.hparams["structure_tokenizer"] = describe(vae)
        self.hparams["alias_tokenizer"] = None if alias is None else describe(alias)

    def _networks(self) -> Networks:
        """Student and teacher, new, for the tokenizers' schedule."""

        def options(*names: str) -> dict[str, Any]:
            return {name: self.hparams[name] for name in names}

        student = self.student_class(
            self.vae.schedule.patch_nums,
            vocab_size=self.vae.vocab_size,
            z_channels=self.vae.z_channels,
            **options("num_classes", "depth", "width", "heads", "drop_path_rate", "shared_aln", "attn_l2_norm"),
            **options("initial_gain", "recompute"),
        )
        if self.initial_weights is not None and not student.pos_start.is_meta:
            load_initial_weights(student, self.initial_weights)
        teacher = None
        if self.teacher_loss_weight > 0:
            optics = Refocus(self.vae.schedule, check_psf(self.alias_source.psf))
            if optics.sharp_scales == self.vae.schedule.num_scales:
                raise ValueError(
                    f"teacher_loss_weight must be 0 where psf {self.alias_source.psf!r} and focus_states "
                    f"{self.vae.schedule.focus_states} blur no view, got {self.teacher_loss_weight}: there is no alias"
                )
            teacher = HighFrequencyTeacher(
                student,
                alias_channels=self.alias_source.z_channels,
                sharp_scales=0 if self.hparams["sharp_alias"] else optics.sharp_scales,
                **options("alias_blocks", "alias_scales", "alias_context", "trunk"),
            )
        if self.compile_blocks:
            compile_each(blocks(student, teacher))
        return student, teacher

    @property
    def alias_source(self) -> AliasTokenizer | VQVAE:
        """What turns alias residuals into tokens."""
        return self.vae if self.alias_tokenizer is None else self.alias_tokenizer

    def configure_model(self) -> None:
        """Build student and teacher where there are none yet; shard them where the strategy is FSDP2
        (`ModelParallelStrategy`)."""
        self.follow_data()
        built = hasattr(self, "student")
        if self.device_mesh is None:
            if not built:
                self.student, self.teacher = self._networks()
            return
        mesh, policy = self.device_mesh["data_parallel"], mixed_precision(self.trainer.precision)
        if built:
            shard(self.student, self.teacher, mesh, policy)
        else:
            self.student, self.teacher = build_sharded(self._networks, mesh, policy)

    def follow_data(self) -> None:
        """Take schedule and classes from the trainer's data module, unless the classes are known.

        Raises:
            ValueError: if there is no data module that knows its classes.
        """
        if self.num_classes is not None:
            return
        trainer = self._trainer
        names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
        if trainer is None or names is None:
            raise ValueError("num_classes must be given where no data module tells the classes, got None")
        self._check_names(len(names))
        self._take_tokenizers(*at_data_schedule(self.vae, self.alias_tokenizer, trainer))
        self.hparams["num_classes"] = len(names)
        self.hparams["class_names"] = self.hparams["class_names"] or list(names)

    @staticmethod
    def _generates(trainer: Trainer) -> bool:
        """Whether it is to make images, which needs none, and so nobody to list them."""
        data = getattr(trainer, "datamodule", None)
        return trainer.predicting and getattr(data, "predict", "samples") == "samples"

    def _check_names(self, num_classes: int) -> None:
        """Refuse names of another number of classes.

        Raises:
            ValueError: naming both numbers.
        """
        names = self.hparams["class_names"]
        if names and len(names) != num_classes:
            raise ValueError(f"class_names must name {num_classes} classes, got {len(names)}")

    def setup(self, stage: str) -> None:
        """Refuse a data module of other views or classes, and FSDP1, which would clip every shard by its own norm."""
        self.follow_data()
        check_views(self, self.vae.schedule, self.alias_source.psf)
        if isinstance(self.trainer.strategy, FSDPStrategy):
            raise ValueError(
                "trainer.strategy must be ModelParallelStrategy (FSDP2) to shard the networks, see "
                "configs/trainer/fsdp2_bf16.yaml, got FSDPStrategy"
            )
        if self._generates(self.trainer):
            return
        data = getattr(self.trainer, "datamodule", None)
        if (classes := getattr(data, "num_classes", None)) not in (None, self.num_classes):
            raise ValueError(f"num_classes must be the data module's {classes}, got {self.num_classes}")
        self.hparams["class_names"] = self.hparams["class_names"] or getattr(data, "class_names", None)
        if str(self.trainer.precision) == "16-true":
            raise ValueError("precision must not be 16-true, in which losses overflow: 16-mixed or bf16-mixed")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say how to build the deployed networks, so that `fvar export` can without the tokenizer files; and which
        tokenizers these are."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["networks"] = {"student": describe(self.student), "vae": describe(self.vae)}
        checkpoint["tokenizers_sha256"] = self.tokenizers_sha256
        checkpoint["data_class_names"] = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        # averaging what never changes moves it by rounding errors, which add up over a run
        frozen = {n: x for n, x in state_of(checkpoint, "raw").items() if n.startswith(("vae.", "alias_tokenizer."))}
        checkpoint["state_dict"].update(frozen)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another student, warn of one whose labels meant other classes; of averaged and last
        weights, load what the run is to use.

        Raises:
            ValueError: naming the sizes that differ.
        """
        sizes = {name: x for name, x in describe(self.student).items() if name != "drop_path_rate"}
        if differing := differences(checkpoint.get("networks", {}).get("student", {}), sizes):
            raise ValueError(f"the checkpoint is of another student: {differing}")
        self.tokenizers_sha256 = checkpoint.get("tokenizers_sha256", {})
        self._compare_names(checkpoint.get("data_class_names"))
        use_right_weights(self._trainer, checkpoint)

    def _compare_names(self, trained: list[str] | None) -> None:
        """Warn where a label stood for a class of another name when the checkpoint was trained."""
        if trained is None or self._trainer is None or self._generates(self._trainer):
            return
        names = getattr(getattr(self._trainer, "datamodule", None), "class_names", None) or trained
        changed = [i for i, (a, b) in enumerate(zip(trained, names, strict=False)) if a != b]
        if changed:
            first = changed[0]
            rank_zero_warn(
                f"{len(changed)} labels of the data module are of classes of other names than when this checkpoint was "
                f"trained: {first} was {trained[first]!r}, and is {names[first]!r}"
            )

    def _check_tokens(self) -> None:
        """Refuse tokenizers without weights, and a cache of another's tokens: once weights are loaded.

        Raises:
            ValueError: saying what is missing, or what differs.
        """
        own = self.token_meta()
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, TokenDataModule):
            check_cache(data.train.cache, own)

    on_train_start = on_validation_start = on_test_start = _check_tokens

    def train(self, mode: bool = True) -> "Stage2Task":
        """Training mode, but never for the frozen tokenizers."""
        super().train(mode)
        self.vae.eval()
        if self.alias_tokenizer is not None:
            self.alias_tokenizer.eval()
        return self

    @torch.no_grad()
    def tokens(self, batch: ImageBatch | TokenBatch) -> TokenBatch:
        """The token maps of a batch; alias tokens only where a teacher reads them."""
        if isinstance(batch, TokenBatch):
            return batch
        with no_autocast(batch.images):
            # of a trainer with bf16-true the frozen weights are in half precision too
            batch = in_precision(batch, self.vae.quant_conv.weight.dtype)
            structure = self.vae.encode(self.vae.inputs(batch.images, batch.views, batch.blurred))
            alias = self.alias_source.encode(batch.views.alias) if self.teacher is not None else []
        return TokenBatch(structure, alias, batch.labels)

    def generate(self, labels: Tensor, **options: Any) -> Tensor:
        """Images of the labels by the student, with the task's guidance, top_k and top_p; see `generate`."""
        with gathered(self.student):
            return generate(self.student, self.vae, labels, **(self.sampling | options))

    def generate_stages(self, labels: Tensor, **options: Any) -> list[Tensor]:
        """The image after every scale, S tensors (B, 3, H, W); takes what `generate` takes."""
        with gathered(self.student):
            return generate_stages(self.student, self.vae, labels, **(self.sampling | options))

    def predict_step(self, batch: SampleBatch | ImageBatch, batch_idx: int) -> Tensor | TokenBatch:
        """Images (B, 3, H, W) for a `SampleBatch`, tokens for an `ImageBatch` (token caches)."""
        if isinstance(batch, SampleBatch):
            return self.generate(batch.labels, seeds=batch.seeds)
        return self.tokens(batch)

    def token_meta(self) -> TokenMeta:
        """What this task's tokens are.

        Raises:
            ValueError: if the tokenizers are described but came with no checkpoint.
        """
        if self.vae.codebook.warming_up:
            raise ValueError("structure_tokenizer is a description without weights: give its checkpoint")
        known = self.tokenizers_sha256 = self.tokenizers_sha256 or hashes(
            {"structure": self.vae, "alias": self.alias_tokenizer}
        )
        kind = "structure" if self.alias_tokenizer is None else "alias"
        return TokenMeta(
            schedule=self.vae.schedule,
            class_names=self.class_names,
            structure=identity(self.vae, known["structure"]),
            alias=None if self.teacher is None else identity(self.alias_source, known[kind]),
            alias_deviations=self.alias_tokenizer.deviations if self.teacher and self.alias_tokenizer else None,
        )

    @property
    def class_names(self) -> list[str]:
        """Name of every label; its number where there is none."""
        return self.hparams["class_names"] or [str(label) for label in range(self.num_classes or 0)]

    @property
    def num_classes(self) -> int | None:
        """Number of labels; None until the data module has told."""
        return self.hparams["num_classes"]
