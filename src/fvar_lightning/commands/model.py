"""What the commands that generate share: which model, where and how precisely it computes, with which sampling."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from fvar_lightning.checks import check_choice
from fvar_lightning.generation.sampling import Progress
from fvar_lightning.precision import lacks_bfloat16
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.var import VAR
from fvar_lightning.weights.averages import Weights
from fvar_lightning.weights.identity import weights_sha256
from fvar_lightning.weights.models import find_model, load_model
from fvar_lightning.weights.pretrained import SAMPLING, ModelInfo

Precision = Literal["auto", "float32", "bfloat16"]


class ReadyModel(NamedTuple):
    """A model where it is to compute."""

    var: VAR
    vae: VQVAE
    info: ModelInfo
    device: torch.device
    settings: dict[str, Any]
    """Options of `ModelOptions` that lead to it again."""
    weights_sha256: str
    """Of both networks, as they were read."""


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it computes.

    Args:
        model: folder of 'fvar export' or save_pretrained, safetensors file, training checkpoint of stage 2, folder with
            official VAR's files, or repository of the Hugging Face hub ('owner/name') that holds either kind of folder.
        depth: which transformer of official VAR, where folder or repository hold several: 16, 20, 24, 30 or 36.
        weights: of a training checkpoint, 'ema': averaged weights where training kept them; 'raw': the last step's.
        revision: branch, tag or commit of a repository of the hub.
        device: 'auto': a CUDA GPU where there is one, else the CPU; or a device of torch, like cpu or cuda:1.
        precision: what the networks compute in, 'auto': bfloat16 on a CUDA GPU that supports it, else float32. On a
            CPU bfloat16 helps where there are units for it (AVX512_BF16, AMX), as docs/speed.md measures; quantiser,
            sampling and the sums of norms stay in float32.
    """

    model: str
    depth: int | None = None
    weights: Weights = "ema"
    revision: str | None = None
    device: str = "auto"
    precision: Precision = "auto"

    def load(self) -> ReadyModel:
        """The model, on its device.

        Raises:
            ValueError: if there is no such model or device.
        """
        device = choose_device(self.device)
        precision = choose_precision(self.precision, device)
        files = find_model(self.model, depth=self.depth, revision=self.revision)
        var, vae, info = load_model(files, self.weights)
        sha256 = weights_sha256(torch.nn.ModuleDict({"var": var, "vae": vae}).state_dict())
        settings = asdict(self) | {"revision": files.revision, "device": device.type, "precision": precision}
        dtype = getattr(torch, precision)
        return ReadyModel(var.to(device, dtype), vae.to(device, dtype), info, device, settings, sha256)


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn; what is not given is the model's own default.

    Args:
        guidance: strength of classifier-free guidance, which grows from 0 at the first scale to this; 0: none; or a
            list with its strength at every scale.
        top_k: draw from so many of the likeliest tokens only; 0: from all.
        top_p: and of these from the likeliest that hold this probability only; 0: from all.
        more_smooth: mix codes instead of drawing one: smoother pictures, not for evaluation.
    """

    guidance: float | list[float] | None = None
    top_k: int | None = None
    top_p: float | None = None
    more_smooth: bool | None = None

    def over(self, defaults: dict[str, Any]) -> dict[str, Any]:
        """All arguments of `generate` that these options are."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return SAMPLING | defaults | given


Options = TypeVar("Options", ModelOptions, SamplingOptions)


def take(kind: type[Options], chosen: dict[str, Any]) -> Options:
    """Options out of those of a command line, which then has the others left."""
    return kind(**{part.name: chosen.pop(part.name) for part in fields(kind)})


def choose_device(name: str) -> torch.device:
    """Of `ModelOptions.device`.

    Raises:
        ValueError: if torch has no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first, *_ = str(error).splitlines()
        raise ValueError(f"device must be 'auto' or one that torch has here, got {name!r}: {first}") from error


def choose_precision(name: str, device: torch.device) -> str:
    """Of `ModelOptions.precision`."""
    check_choice("precision", name, Precision)
    if name == "bfloat16" and device.type == "cpu" and lacks_bfloat16():
        warnings.warn("precision bfloat16 will not help: this processor has no units for it", stacklevel=2)
    if name != "auto":
        return name
    # without emulation: on older GPUs it is slower than float32
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


@contextmanager
def scale_bar(scales: int) -> Iterator[Progress]:
    """A bar that steps with every scale that `generate` or `edit` finishes."""
    with tqdm(total=scales, desc="Generating", unit="scale") as bar:

        def watch(stages: Iterable[Tensor]) -> Iterator[Tensor]:
            for stage in stages:
                bar.update()
                yield stage

        yield watch


def words(settings: dict[str, Any]) -> list[str]:
    """Settings as options of a command line; those that are None are none."""
    given = {name: value for name, value in settings.items() if value is not None}
    return [word for name, value in given.items() for word in (f"--{name}", _word(value))]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
