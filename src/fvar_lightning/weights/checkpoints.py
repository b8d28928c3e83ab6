"""Networks out of files of any kind: training checkpoints of this library, official VAR's files, pretrained folders."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvar_lightning.checks import check_choice
from fvar_lightning.schedule import FocusSchedule
from fvar_lightning.tokenizer.build import Tokenizer
from fvar_lightning.tokenizer.vqvae import VQVAE, Targets
from fvar_lightning.transformer.var import VAR
from fvar_lightning.weights.averages import Weights, state_of
from fvar_lightning.weights.describe import at_schedule, check_weights, describe, differences, rebuild
from fvar_lightning.weights.files import read_checkpoint
from fvar_lightning.weights.official import is_official, load_vae, read_var
from fvar_lightning.weights.pretrained import SAMPLING, ModelInfo, Pretrained, is_pretrained, part_of, read_pretrained


def load_tokenizer(
    path: str | Path, *, schedule: FocusSchedule | None = None, targets: Targets = "feature"
) -> Tokenizer:
    """A trained tokenizer, frozen, in evaluation mode, with averaged weights where training kept them.

    Args:
        path: checkpoint of a `TokenizerTask` or of a `FVARTask` (its structure tokenizer), file of official VAR, or
            what `save_pretrained` wrote.
        schedule: to serve another than it was trained for, see `at_schedule`; None: its own, or for a file of official
            VAR, which knows no focus, what `load_var_checkpoint` tells.
        targets: for a file of official VAR: what its tokens are to stand for.

    Raises:
        ValueError: if the file holds no tokenizer, one that stopped before its codes were set, or one of another patch
            size.
    """
    source = repr(str(path))
    if is_pretrained(path):
        config, weights = read_pretrained(path)
        description, weights = config.get("vae"), part_of(weights, "vae")
    else:
        contents = read_checkpoint(path)
        if is_official(contents):
            return load_vae(contents, str(path), schedule=schedule, targets=targets)
        description, name = contents.get("tokenizer"), "tokenizer"
        if description is None and "networks" in contents:
            description, name = contents["networks"].get("vae"), "vae"
        weights = part_of(state_of(contents, "ema"), name)
    if description is None:
        raise ValueError(f"checkpoint {source} holds no tokenizer")
    tokenizer = rebuild(description, weights, source)
    if isinstance(tokenizer, VAR):
        raise ValueError(f"checkpoint {source} describes a transformer as its tokenizer")
    codebook = tokenizer.codebook
    if codebook.warming_up:
        raise ValueError(
            f"the tokenizer in {source} has no codes yet: they are set after warmup_steps {codebook.warmup_steps}, "
            f"and it stopped after {int(codebook.updates)}"
        )
    if schedule is not None and schedule != tokenizer.schedule:
        return at_schedule(tokenizer, schedule)
    return tokenizer.requires_grad_(False)


def load_initial_weights(var: VAR, path: str | Path) -> None:
    """Start `var` from trained weights, to go on with other classes or other tokens.

    Where the number of classes differs, the class embeddings keep their initialisation, but for the null class,
    which is no class; all else is taken over.

    Args:
        var: is changed in place.
        path: transformer of official VAR, checkpoint of a `FVARTask` (averaged weights where training kept them), or
            what `save_pretrained` wrote.

    Raises:
        ValueError: if the file holds no transformer, or one of other sizes; the message names them.
    """
    description, weights = _read_transformer(path, var)
    fixed = {name: x for name, x in describe(var).items() if name not in ("num_classes", "drop_path_rate")}
    if differing := differences(description, fixed):
        raise ValueError(f"the transformer in {str(path)!r} is another: {differing}")
    own = var.state_dict()
    classes = "class_emb.weight"
    if description["num_classes"] != var.num_classes:
        weights[classes] = torch.cat((own[classes][:-1], weights[classes][-1:].to(own[classes])))
    check_weights({name: tensor.shape for name, tensor in own.items()}, weights, repr(str(path)))
    var.load_state_dict(weights)


def _read_transformer(path: str | Path, var: VAR) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and weights of the transformer in a file of any kind."""
    if is_pretrained(path):
        config, weights = read_pretrained(path)
        description, weights = config.get("var"), part_of(weights, "var")
    else:
        contents = read_checkpoint(path)
        if "networks" not in contents:
            return read_var(contents, str(path), var.layout.patch_nums)
        description, weights = contents["networks"].get("student"), part_of(state_of(contents, "ema"), "student")
    if description is None:
        raise ValueError(f"{str(path)!r} holds no transformer")
    return description, weights


def load_fvar_checkpoint(path: str | Path, weights: Weights = "ema") -> Pretrained:
    """Student, structure tokenizer, class names and sampling defaults of a `FVARTask` checkpoint, without its teacher.

    Args:
        path: of the checkpoint.
        weights: ``ema``: averaged weights where training kept them (`EMAWeightAveraging`); ``raw``: those of the last
            step.

    Raises:
        ValueError: if the file is no such checkpoint, or `weights` is neither.
    """
    check_choice("weights", weights, Weights)
    checkpoint = read_checkpoint(path)
    networks = checkpoint.get("networks", {})
    if not {"student", "vae"} <= set(networks):
        held = f"it holds {sorted(map(str, checkpoint))[:8]}"
        found = "but of a TokenizerTask" if "tokenizer" in checkpoint else held
        raise ValueError(f"checkpoint {str(path)!r} is not of a FVARTask, {found}")
    state = state_of(checkpoint, weights)
    var = rebuild(networks["student"], part_of(state, "student"), f"the student in {str(path)!r}")
    vae = rebuild(networks["vae"], part_of(state, "vae"), f"the structure tokenizer in {str(path)!r}")
    if not isinstance(var, VAR) or not isinstance(vae, VQVAE):
        raise ValueError(f"checkpoint {str(path)!r} describes other networks than a student and a structure tokenizer")
    arguments = checkpoint.get("hyper_parameters", {})
    names = arguments.get("class_names") or [str(label) for label in range(var.num_classes)]
    sampling = {name: arguments[name] for name in SAMPLING if name in arguments}
    return Pretrained(var, vae.requires_grad_(False), ModelInfo(list(names), sampling))
