"""`fvar generate`: images of classes, a file each, and a contact sheet."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor

from fvar_lightning.atomic import file_name
from fvar_lightning.commands.classes import find_label, spelled
from fvar_lightning.commands.images import about, check_absent, contact_sheet, save_png, write_png
from fvar_lightning.commands.model import ModelOptions, ReadyModel, SamplingOptions, scale_bar, take, words
from fvar_lightning.generation.focus import between
from fvar_lightning.generation.sampling import generate

COMMAND = ("fvar", "generate", "--classes")
SHEET_IMAGES = 100
"""The contact sheet shows the first ones of every class, so many in all."""

TOKENS_AT_ONCE = 8 * 680
"""Batches are of so many tokens unless told otherwise: eight images at 256 px."""


def generate_images(
    model: ModelOptions,
    sampling: SamplingOptions,
    classes: Sequence[str],
    count: PositiveInt = 4,
    seed: NonNegativeInt = 0,
    focus: float = 0.0,
    output: str = "generated",
    batch_size: PositiveInt | None = None,
    overwrite: bool = False,
) -> None:
    """Generate images of classes.

    Every PNG holds, as text, the settings it was made with and the command that makes it again (to the last pixel on
    the same machine, up to rounding, which differs with the batch size).

    Args:
        model: which.
        sampling: how.
        classes: names, or numbers, of the classes.
        count: images of every class.
        seed: of the first image; every image has a seed of its own, the next one.
        focus: blur of the images as a radius in pixels, from 0 (sharp) to the largest the model was trained with.
        output: folder for the images, <label>_<class>_<seed>.png, and contact_sheet.png.
        batch_size: images made at once; by default as many as have 5440 tokens together, eight at 256 px.
        overwrite: replace files that exist.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """
    ready = model.load()
    names = ready.info.class_names
    found = [find_label(wanted, names) for wanted in classes]
    labels = [label for label in found for _ in range(count)]
    folder = Path(output)
    files = [folder / f"{label:04d}_{file_name(names[label])}_{seed + i:06d}.png" for i, label in enumerate(labels)]
    sheet = folder / "contact_sheet.png"
    check_absent([*files, sheet], overwrite)

    drawing = sampling.over(ready.info.sampling)
    settings = ready.settings | drawing | {"focus": focus, "seed": seed}
    rows: list[list[Tensor]] = [[] for _ in found[:SHEET_IMAGES]]
    row = max(SHEET_IMAGES // len(found), 1)
    size = batch_size or max(TOKENS_AT_ONCE // ready.var.layout.length, 1)
    for i, image in enumerate(_made(ready, labels, seed, size, focus=focus, **drawing)):
        write_png(image, files[i], about_one(ready, labels[i], settings | {"seed": seed + i}))
        if i // count < len(rows) and i % count < row:
            rows[i // count].append(image)
    command = [*COMMAND, *(spelled(label, names) for label in found), "--count", str(count), *words(settings)]
    picture = contact_sheet(rows, [names[label] for label in found[: len(rows)]])
    save_png(picture, sheet, about({"weights_sha256": ready.weights_sha256} | settings, command))
    print(f"wrote {len(files)} image{'s' * (len(files) > 1)} and {sheet}")


def _made(
    ready: ReadyModel, labels: Sequence[int], seed: int, batch_size: int, focus: float, **drawing: Any
) -> Iterator[Tensor]:
    """An image (3, H, W) on the CPU of every label, with seeds from `seed` on; a bar steps with every scale."""
    starts = range(0, len(labels), batch_size)
    scales = between(ready.vae.schedule, focus).sharper + 1
    with scale_bar(len(starts) * scales) as progress:
        for start in starts:
            part = torch.tensor(labels[start : start + batch_size], device=ready.device)
            seeds = range(seed + start, seed + start + len(part))
            yield from generate(
                ready.var, ready.vae, part, seeds=seeds, focus=focus, progress=progress, **drawing
            ).cpu()


def about_one(ready: ReadyModel, label: int, settings: dict[str, Any]) -> dict[str, str]:
    """Text for the file of one image.

    Args:
        ready: the model.
        label: class of the image.
        settings: the model's, the sampling's, focus and seed.
    """
    names = ready.info.class_names
    command = [*COMMAND, spelled(label, names), "--count", "1", *words(settings)]
    made_of = {"class": names[label], "label": label, "weights_sha256": ready.weights_sha256}
    return about(made_of | settings, command)


def generate_command(args: list[str]) -> None:
    """`fvar generate` with the given arguments.

    Raises:
        SystemExit: with status 2 if an argument is refused; the message names it.
    """
    parser = ArgumentParser(prog="fvar generate", description=(generate_images.__doc__ or "").split("\n")[0])
    parser.add_argument("--classes", nargs="+", required=True, help="names, or numbers, of the classes")
    parser.add_class_arguments(ModelOptions)
    parser.add_class_arguments(SamplingOptions)
    parser.add_function_arguments(generate_images, as_positional=False, skip={"model", "sampling", "classes"})
    chosen = parser.parse_args(args).as_dict()
    try:
        generate_images(take(ModelOptions, chosen), take(SamplingOptions, chosen), **chosen)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
