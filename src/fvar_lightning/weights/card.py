"""The model card: README.md of a pretrained folder, which the Hugging Face hub shows."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from fvar_lightning.tokenizer.vqvae import VQVAE
from fvar_lightning.transformer.var import VAR

CARD = "README.md"
TAGS = ("image-generation", "class-conditional", "visual-autoregressive", "var")
SHOWN_CLASSES = 20


@dataclass(frozen=True)
class ModelCard:
    """What a model card says that the networks do not know.

    Args:
        license: of the weights, by the hub's short name: ``apache-2.0``, ``mit``, ``cc-by-nc-4.0``, ...
        data: what the model was trained on, in a sentence or two.
        figures: of its evaluation, by name.
        protocol: how these were measured: number of images, reference, guidance, ...
    """

    license: str | None = None
    data: str | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)


def read_report(path: str | Path) -> dict[str, Any]:
    """A report of `fvar test` (`GenerationMetrics`): ``values``, ``warnings``, ``settings``, ``checkpoint``.

    Raises:
        ValueError: if the file is none.
    """
    try:
        report = json.loads(Path(path).read_text())
        values, settings = dict(report["values"]), dict(report["settings"])
        checkpoint, warnings = dict(report["checkpoint"]), list(report["warnings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"figures {str(path)!r} must be a report that `fvar test` wrote: {error!r}") from error
    return {"values": values, "settings": settings, "checkpoint": checkpoint, "warnings": warnings}


def card_text(var: VAR, vae: VQVAE, class_names: Sequence[str], sampling: Mapping[str, Any], card: ModelCard) -> str:
    """The card in Markdown, with the hub's metadata on top."""
    schedule = vae.schedule
    size, sides = schedule.image_size, ", ".join(map(str, schedule.patch_nums))
    next_focus = vae.targets != "feature"
    head: dict[str, Any] = {} if card.license is None else {"license": card.license}
    head |= {"library_name": "fvar-lightning", "tags": [*TAGS, *["fvar"] * next_focus]}
    focus = f"views focused to radii of {', '.join(f'{radius:.3g}' for radius in schedule.state_radii)} px, as in FVAR"
    options = ", ".join(f"{name}={value!r}" for name, value in sampling.items())
    shown = ", ".join(class_names[:SHOWN_CLASSES])
    if len(class_names) > SHOWN_CLASSES:
        shown += f" and {len(class_names) - SHOWN_CLASSES} more, listed in `config.json`"
    sections = {
        f"VAR of depth {var.depth}, {size} px": (
            f"Generates {size} x {size} px images of {_classes(len(class_names))}, scale by scale: a "
            "[VAR](https://arxiv.org/abs/2404.02905) transformer with the tokenizer it was trained on"
            f"{', for next-focus prediction ([FVAR](https://arxiv.org/abs/2511.18838))' * next_focus}."
        ),
        "Use": (
            "With `pip install 'fvar-lightning[hub]'`:\n\n"
            "```bash\n"
            f"fvar generate --model owner/name --classes {shlex.quote(class_names[0])}\n"
            "```\n\n"
            "```python\n"
            "import torch\n"
            "from fvar_lightning import from_pretrained, generate\n\n"
            'var, vae, info = from_pretrained("owner/name")  # this repository, or a folder that holds its files\n'
            "labels = torch.tensor([0, 0])\n"
            "images = generate(var, vae, labels, seeds=[1, 2], **info.sampling)  # (2, 3, H, W) in [-1, 1]\n"
            "```\n\n"
            f"Classes, by label: {shown}."
        ),
        "Model": _table(
            {
                "parameters": f"{_parameters(var):,} (transformer), {_parameters(vae):,} (tokenizer)",
                "transformer": f"depth {var.depth}, width {var.width}, {var.heads} heads",
                "tokens": f"{var.layout.length} in {schedule.num_scales} scales of side {sides}",
                "tokens stand for": focus if next_focus else "features of the sharp image, as in VAR",
                "codebook": f"{vae.vocab_size} codes of {vae.z_channels} channels",
            }
        ),
        "Sampling": f"Defaults, in `info.sampling`: `{options or 'those of generate'}`.",
        "Training data": card.data or "Not stated.",
        "Figures": (
            f"{_table(card.figures)}\n\nMeasured with:\n\n{_table(card.protocol)}" if card.figures else "None stated."
        ),
        "Limits": (
            f"Square images of {size} px only; the classes above only, no text prompts. It reproduces what its "
            "training data holds, with its biases, and may repeat training images. Figures depend on how they are "
            "measured: compare them within one protocol only."
        ),
        "Licence": card.license or "None stated: ask the publisher before use.",
    }
    text = "\n\n".join(f"{'##' if i else '#'} {title}\n\n{body}" for i, (title, body) in enumerate(sections.items()))
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n{text}\n"


def _classes(number: int) -> str:
    return "one class" if number == 1 else f"{number} classes"


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _table(rows: Mapping[str, Any]) -> str:
    cells = [(name, f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in rows.items()]
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in cells]
    return "\n".join(["| | |", "|---|---|", *lines])
