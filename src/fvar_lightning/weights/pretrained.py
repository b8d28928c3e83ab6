"""A student with its structure tokenizer in one file (safetensors) or one folder (as on the Hugging Face hub).

The file holds the weights and, as metadata, the configuration: both networks' descriptions, the class names, the
defaults of `generate`. The folder holds the file, the configuration once more, for people (``config.json`` counts), and
a model card.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fvar_lightning.atomic import replacing, write_json
from fvar_lightning.generation.sampling import check_guidance, check_models, check_truncation
from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.var import VAR
from fvar_lightning.weights.card import CARD, ModelCard, card_text
from fvar_lightning.weights.describe import describe, rebuild

WEIGHTS, CONFIG = "model.safetensors", "config.json"
SAMPLING = {"guidance": 1.5, "top_k": 900, "top_p": 0.96, "more_smooth": False}
"""Arguments of `generate` that a model may set, and their values where it does not."""


class ModelInfo(NamedTuple):
    """What a user of a model needs beside the networks."""

    class_names: list[str]
    """Name of every label."""
    sampling: dict[str, Any]
    """Arguments of `generate` that suit the model: guidance, top_k, top_p, more_smooth."""


class Pretrained(NamedTuple):
    """A model to generate with: ``generate(var, vae, labels, **info.sampling)``."""

    var: VAR
    vae: VQVAE
    info: ModelInfo


def save_pretrained(
    folder: str | Path,
    var: VAR,
    vae: VQVAE,
    *,
    class_names: Sequence[str] | None = None,
    sampling: Mapping[str, Any] | None = None,
    card: ModelCard | None = None,
) -> None:
    """Write ``model.safetensors``, ``config.json`` and ``README.md``: everything a user of the model needs.

    Args:
        folder: is made if it does not exist.
        var: the student.
        vae: its structure tokenizer.
        class_names: name of every label; None: its number.
        sampling: arguments for `generate` that suit the model, of guidance, top_k, top_p and more_smooth.
        card: what the model card, ``README.md``, is to say beyond what the networks tell.

    Raises:
        ValueError: if the networks do not fit each other, or the names or arguments do not fit them.
        ImportError: if safetensors is not installed.
    """
    config = _config(var, vae, class_names, sampling)
    _write(Path(folder) / WEIGHTS, var, vae, config)
    write_json(Path(folder) / CONFIG, config)
    with replacing(Path(folder) / CARD) as beside:
        beside.write_text(
            card_text(var, vae, config["class_names"], config["sampling"], card or ModelCard()), encoding="utf-8"
        )


def save_safetensors(
    path: str | Path,
    var: VAR,
    vae: VQVAE,
    *,
    class_names: Sequence[str] | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> None:
    """Write one safetensors file, the configuration inside; arguments and errors of `save_pretrained`."""
    _write(Path(path), var, vae, _config(var, vae, class_names, sampling))


def load_pretrained(name: str | Path) -> Pretrained:
    """Read what `save_pretrained` or `save_safetensors` wrote: on the CPU, in evaluation mode, the tokenizer frozen.

    Args:
        name: the folder, or the file (``*.safetensors``).

    Raises:
        ValueError: if there is no such folder or file, or it holds something else; the message says what.
        ImportError: if safetensors is not installed.
    """
    config, weights = read_pretrained(name)
    try:
        kinds = config["var"]["kind"], config["vae"]["kind"]
        info = ModelInfo(list(config["class_names"]), dict(config["sampling"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"the configuration of {str(name)!r} lacks {error}") from error
    if kinds != ("var", "structure"):
        raise ValueError(f"{str(name)!r} must describe a var and its structure tokenizer, got {kinds}")
    var, vae = (rebuild(config[part], part_of(weights, part), f"{part} in {str(name)!r}") for part in ("var", "vae"))
    assert isinstance(var, VAR)
    assert isinstance(vae, VQVAE)
    _config(var, vae, *info)
    return Pretrained(var, vae.requires_grad_(False), info)


def read_pretrained(name: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights (names begin ``var.`` or ``vae.``); arguments and errors of `load_pretrained`."""
    path = Path(name)
    file, beside = (path / WEIGHTS, path / CONFIG) if path.is_dir() else (path, None)
    for needed in (file, beside):
        if needed is not None and not needed.is_file():
            raise ValueError(f"file {str(needed)!r} does not exist")
    metadata, weights = _read(file)
    text = metadata.get("config", "null") if beside is None else beside.read_text()
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the configuration of {str(name)!r} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{str(name)!r} holds no configuration: it was not written by this library")
    return config, weights


def is_pretrained(name: str | Path) -> bool:
    """Whether `name` is a local folder or file that `load_pretrained` reads."""
    path = Path(name)
    return path.suffix == ".safetensors" or (path / CONFIG).is_file()


def part_of(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin with `prefix` and a dot, without these."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in weights.items() if name.startswith(f"{prefix}.")}


def _config(
    var: VAR, vae: VQVAE, class_names: Sequence[str] | None, sampling: Mapping[str, Any] | None
) -> dict[str, Any]:
    check_models(var, vae)
    names = [str(label) for label in range(var.num_classes)] if class_names is None else list(class_names)
    if len(names) != var.num_classes:
        raise ValueError(f"class_names must name {var.num_classes} classes, got {len(names)}")
    options = check_sampling(sampling)
    return {"vae": describe(vae), "var": describe(var), "sampling": options, "class_names": names}


def check_sampling(sampling: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy of options of `generate`.

    Raises:
        ValueError: naming those that are none of `SAMPLING`, or a value that `generate` would refuse.
    """
    options = dict(sampling or {})
    if unknown := sorted(set(options) - set(SAMPLING)):
        raise ValueError(f"sampling may hold {', '.join(SAMPLING)}, got {', '.join(unknown)}")
    check_truncation(options.get("top_k", 0), options.get("top_p", 0.0))
    check_guidance(options.get("guidance", 0.0))
    if not isinstance(smooth := options.get("more_smooth", False), bool):
        raise ValueError(f"more_smooth must be true or false, got {smooth!r}")
    return options


def _write(path: Path, var: VAR, vae: VQVAE, config: Mapping[str, Any]) -> None:
    from_package = _safetensors()
    weights = {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, network in (("var", var), ("vae", vae))
        for name, tensor in network.state_dict().items()
    }
    with replacing(path) as beside:
        from_package.torch.save_file(weights, beside, {"format": "pt", "config": json.dumps(config)})


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from_package = _safetensors()
    try:
        with from_package.safe_open(path, framework="pt") as file:
            names = file.keys()
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except from_package.SafetensorError as error:
        raise ValueError(f"{str(path)!r} cannot be read as safetensors: {error}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("safetensors files need the extra `hub`: pip install 'fvar-lightning[hub]'") from error
    return safetensors
