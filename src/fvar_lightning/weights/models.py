"""from_pretrained(): a model to generate with, from wherever its files lie and in whatever form."""

from pathlib import Path
from typing import NamedTuple

from fvar_lightning.checks import check_choice
from fvar_lightning.transformer.var import VAR
from fvar_lightning.weights.averages import Weights
from fvar_lightning.weights.checkpoints import load_fvar_checkpoint
from fvar_lightning.weights.files import read_checkpoint
from fvar_lightning.weights.hub import download, is_repository
from fvar_lightning.weights.official import is_official, load_var_checkpoint
from fvar_lightning.weights.pretrained import CONFIG, SAMPLING, WEIGHTS, ModelInfo, Pretrained, load_pretrained

OWN = (CONFIG, WEIGHTS)
SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt")


class ModelFiles(NamedTuple):
    """Where a model lies."""

    paths: list[Path]
    """One file, configuration and weights, or official VAR's tokenizer and transformer."""
    revision: str | None
    """Commit, of a repository of the hub."""


def from_pretrained(
    name: str | Path, *, depth: int | None = None, weights: Weights = "ema", revision: str | None = None
) -> Pretrained:
    """A student, its structure tokenizer, class names and sampling defaults; on the CPU, in evaluation mode.

    Args:
        name: what `save_pretrained` or `save_safetensors` wrote, a folder that holds official VAR's files, a checkpoint
            of a `FVARTask`, or a repository of the Hugging Face hub (``owner/name``) that holds either kind of folder.
        depth: of official VAR, whose repository (``FoundationVision/var``) holds several; a local folder with one
            ``var_d*.pth`` needs none.
        weights: of a training checkpoint: ``ema``: averaged ones where training kept them; ``raw``: those of the last
            step.
        revision: branch, tag or commit of a repository.

    Raises:
        ValueError: if there is no such folder, file or repository, or it holds something else; the message says what.
        ImportError: if safetensors, or for a repository huggingface_hub, is not installed.
    """
    return load_model(find_model(name, depth=depth, revision=revision), weights)


def find_model(name: str | Path, *, depth: int | None = None, revision: str | None = None) -> ModelFiles:
    """The files `from_pretrained` reads, downloaded if need be; its arguments and errors."""
    path = Path(name)
    if revision is not None and path.exists():
        raise ValueError(f"revision is of a repository of the hub, and {str(name)!r} is here: got {revision!r}")
    if path.is_file() or path.suffix in SUFFIXES:
        if depth is not None:
            raise ValueError(f"depth chooses among official VAR's files in a folder, and {str(name)!r} is a file")
        return ModelFiles([path], None)
    if path.is_dir():
        own = _own_files(path) if depth is None else []
        return ModelFiles(own or _official_files(path, depth, f"folder {str(name)!r}"), None)
    if not is_repository(str(name)):
        raise ValueError(f"{str(name)!r} is neither a local folder nor a repository of the hub, 'owner/name'")
    folder = download(str(name), OWN if depth is None else official(depth), revision)
    if depth is not None:
        return ModelFiles(_official_files(folder, depth, f"repository {str(name)!r}"), folder.name)
    # whatever else of official VAR's files earlier calls brought into the cache
    if own := _own_files(folder):
        return ModelFiles(own, folder.name)
    raise ValueError(
        f"repository {str(name)!r} must hold {' and '.join(OWN)}, as save_pretrained writes them; to read "
        "official VAR's files from it, give a depth"
    )


def load_model(files: ModelFiles, weights: Weights = "ema") -> Pretrained:
    """The model in the files of `find_model`; arguments and errors of `from_pretrained`."""
    check_choice("weights", weights, Weights)
    first, *others = files.paths
    if first.suffix == ".safetensors":
        return load_pretrained(first)
    if first.name == CONFIG:
        return load_pretrained(first.parent)
    if others:
        vae, var = load_var_checkpoint(first, *others)
        assert isinstance(var, VAR)
        return Pretrained(var, vae, ModelInfo(_class_names(var.num_classes), dict(SAMPLING)))
    if is_official(read_checkpoint(first)):
        raise ValueError(
            f"{str(first)!r} is one of official VAR's two files: give the folder that holds both, named like "
            f"{' and '.join(official(None))}"
        )
    return load_fvar_checkpoint(first, weights)


def official(depth: int | None) -> tuple[str, str]:
    """Patterns of the names of official VAR's files: ``vae_ch160v4096z32.pth``, ``var_d16.pth``; None: of any depth."""
    return "vae*.pth", f"var_d{'*' if depth is None else depth}.pth"


def _own_files(folder: Path) -> list[Path]:
    files = [folder / name for name in OWN]
    return files if all(file.is_file() for file in files) else []


def _official_files(folder: Path, depth: int | None, what: str) -> list[Path]:
    patterns = official(depth)
    found = [sorted(folder.glob(pattern)) for pattern in patterns]
    if [len(files) for files in found] == [1, 1]:
        return [files[0] for files in found]
    either = f"{' and '.join(OWN)}, as save_pretrained writes them, or " if depth is None else ""
    held = ", ".join(file.name for files in found for file in files)
    raise ValueError(
        f"{what} must hold {either}{' and '.join(patterns)} of official VAR, one each"
        f"{' (give a depth to choose one)' if depth is None else ''}, got {held or 'none of these'}"
    )


def _class_names(num_classes: int) -> list[str]:
    """ImageNet's for a thousand classes, which official VAR was trained on; else numbers."""
    if num_classes != 1000:
        return [str(label) for label in range(num_classes)]
    from torchvision.models import ResNet50_Weights  # brings all of its networks along

    return list(ResNet50_Weights.DEFAULT.meta["categories"])
