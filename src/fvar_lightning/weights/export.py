"""`fvar export`: a trained model out of a training checkpoint, in a form to use or to publish."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.var import VAR
from fvar_lightning.weights.averages import Weights, has_averages
from fvar_lightning.weights.card import CARD, ModelCard, read_report
from fvar_lightning.weights.checkpoints import load_fvar_checkpoint
from fvar_lightning.weights.describe import describe, differences
from fvar_lightning.weights.files import read_checkpoint
from fvar_lightning.weights.hub import check_push
from fvar_lightning.weights.hub import push as push_files
from fvar_lightning.weights.identity import file_sha256
from fvar_lightning.weights.official import export_var_checkpoint
from fvar_lightning.weights.pretrained import CONFIG, WEIGHTS, save_pretrained, save_safetensors

Format = Literal["pretrained", "safetensors", "var"]

SIZES = ("depth", "width", "heads", "shared_aln", "attn_l2_norm")
"""Arguments of FVARTask a configuration may name and a checkpoint cannot change."""


def export(
    ckpt_path: str,
    output: str,
    format: Format = "pretrained",
    weights: Weights = "ema",
    overwrite: bool = False,
    config: Sequence[str] = (),
    push: str | None = None,
    license: str | None = None,
    data: str | None = None,
    figures: str | None = None,
) -> None:
    """Write the student and its structure tokenizer from a checkpoint of stage 2.

    Args:
        ckpt_path: checkpoint of a FVARTask.
        output: folder to write into (pretrained, var), or file to write (safetensors).
        format: 'pretrained': a folder with config.json, model.safetensors and a model card, as on the Hugging Face hub;
            'safetensors': one file with the configuration inside; 'var': two files for official VAR's code.
        weights: 'ema': averaged weights where training kept them; 'raw': those of the last step.
        overwrite: replace files that exist.
        config: configurations the checkpoint was trained with, later ones overriding. The checkpoint needs none; where
            they are given, the sizes they name must be its own.
        push: repository of the Hugging Face hub ('owner/name') that gets the written folder too; it is made if there is
            none. The environment variable HF_TOKEN must hold a token that may write.
        license: of the weights, for the model card: the hub's short name, like apache-2.0 or cc-by-nc-4.0.
        data: what the model was trained on, for the model card.
        figures: for the model card, report of `fvar test` (generation_*.json) on this checkpoint and these weights.

    Raises:
        ValueError: if the checkpoint is not of a FVARTask or not of this configuration, an argument is none of the
            above, the output exists, or the hub does not take it.
    """
    averaged = has_averages(read_checkpoint(ckpt_path))
    card = ModelCard(license, data, *_measured(figures, ckpt_path, weights if averaged else None))
    if format != "pretrained" and (push is not None or card != ModelCard()):
        raise ValueError(f"push, license, data and figures go with format 'pretrained', got format {format!r}")
    if push is not None:
        check_push(push)
    var, vae, info = load_fvar_checkpoint(ckpt_path, weights)
    if differing := differences(describe(var), configured_sizes(config)):
        raise ValueError(
            f"checkpoint {ckpt_path!r} is not of the given configuration: {differing}; "
            "where that was overridden on the command line, leave the configuration out"
        )
    files = output_files(output, format, var, vae)
    existing = [str(file) for file in files if file.exists()]
    if existing and not overwrite:
        raise ValueError(f"output exists: {', '.join(existing)}; choose another, or --overwrite true")
    if format == "pretrained":
        save_pretrained(output, var, vae, **info._asdict(), card=card)
    elif format == "safetensors":
        save_safetensors(output, var, vae, **info._asdict())
    else:
        export_var_checkpoint(vae, var, *files)
    which = "averaged" if averaged and weights == "ema" else "last step's"
    print(f"wrote {' and '.join(map(str, files))} ({which} weights)")
    if push is not None:
        print(f"pushed to {push_files(output, push, [file.name for file in files])}")


def _measured(report: str | None, ckpt_path: str, weights: Weights | None) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures and protocol of a report, which must be on these weights; None: the checkpoint's only ones."""
    if report is None:
        return {}, {}
    found = read_report(report)
    own = {"sha256": file_sha256(ckpt_path)}
    of = {"sha256": found["checkpoint"].get("sha256")}
    if weights is not None:
        own["weights"], of["weights"] = weights, found["settings"].get("weights")
    if differing := differences(of, own):
        raise ValueError(f"figures {report!r} are of other weights than {ckpt_path!r}: {differing}")
    return found["values"], found["settings"] | {"warnings": "; ".join(found["warnings"]) or "none"}


def output_files(output: str, format: Format, var: VAR, vae: VQVAE) -> list[Path]:
    """The files of a format.

    Raises:
        ValueError: if there is no such format, or `output` is not what it takes.
    """
    path = Path(output)
    if format == "safetensors":
        if path.suffix != ".safetensors" or path.is_dir():
            raise ValueError(f"output must be a file that ends in .safetensors in this format, got {output!r}")
        return [path]
    names = {
        "pretrained": (WEIGHTS, CONFIG, CARD),
        "var": (
            f"vae_ch{vae.encoder.conv_in.out_channels}v{vae.vocab_size}z{vae.z_channels}.pth",
            f"var_d{var.depth}.pth",
        ),
    }
    if format not in names:
        raise ValueError(f"format must be 'pretrained', 'safetensors' or 'var', got {format!r}")
    if path.is_file() or path.suffix in (".safetensors", ".pth", ".pt", ".ckpt", ".bin"):
        raise ValueError(f"output must be a folder in format {format!r}, got the name of a file, {output!r}")
    return [path / name for name in names[format]]


def configured_sizes(configs: Sequence[str]) -> dict[str, Any]:
    """The sizes of the student that configurations of stage 2 name, later ones overriding.

    Raises:
        ValueError: if one does not exist, is no configuration, or is of another task.
    """
    sizes: dict[str, Any] = {}
    for config in configs:
        model = _read(Path(config)).get("model") or {}
        if isinstance(model, str):
            model = _read(Path(config).parent / model)
        task = str(model.get("class_path", "FVARTask"))
        if task.split(".")[-1] != "FVARTask":
            raise ValueError(f"config {config!r} must be of a FVARTask, got one of {task}")
        arguments = model.get("init_args") or {}
        sizes |= {name: arguments[name] for name in SIZES if arguments.get(name) is not None}
    return sizes


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"config {str(path)!r} does not exist")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {str(path)!r} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config {str(path)!r} holds no configuration")
    return content


def export_command(args: list[str]) -> None:
    """`fvar export` with the given arguments.

    Raises:
        SystemExit: with status 2 if an argument is refused; the message names it.
    """
    parser = ArgumentParser(prog="fvar export", description=(export.__doc__ or "").split("\n")[0])
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        default=[],
        help="configuration the checkpoint was trained with, which its sizes must be those of; may be repeated",
    )
    parser.add_function_arguments(export, as_positional=False, skip={"config"})
    chosen = parser.parse_args(args).as_dict()
    try:
        export(**chosen)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
