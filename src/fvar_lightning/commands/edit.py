"""`fvar edit`: new content in a photograph, where a mask says, or around it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt

from fvar_lightning.commands.canvas import make_canvas
from fvar_lightning.commands.classes import find_label, spelled
from fvar_lightning.commands.images import about, check_absent, write_png
from fvar_lightning.commands.model import ModelOptions, SamplingOptions, scale_bar, take, words
from fvar_lightning.generation.editing import edit
from fvar_lightning.weights.identity import file_sha256


def edit_image(
    model: ModelOptions,
    sampling: SamplingOptions,
    image: str,
    mask: str | None = None,
    name: str | None = None,
    outpaint: Sequence[int] = (0,),
    output: str = "edited.png",
    seed: NonNegativeInt = 0,
    overwrite: bool = False,
) -> None:
    """Fill the masked part of a picture, or a frame around it, with new content.

    The result is a PNG of the model's size; the other pixels are those of the resized picture, bit for bit. As text it
    holds the settings and the command that makes it again.

    Args:
        model: which.
        sampling: how.
        image: picture of any size: its middle is resized to the model's square. Without a mask, its transparent parts
            are filled.
        mask: picture of the same size or proportions, white where new content goes, black or transparent elsewhere.
        name: class of the new content, by name or number; without one it is unconditional.
        outpaint: pixels of new content around the picture, which is shrunk to leave room for them: one number, or four
            for the left, right, top and bottom.
        output: PNG file to write.
        seed: another one gives other content.
        overwrite: replace the file if it exists.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """
    target = Path(output)
    if target.suffix.lower() != ".png":
        raise ValueError(f"output must be a .png file, which keeps pixels as they are, got {output!r}")
    if len(outpaint) not in (1, 4):
        raise ValueError(f"outpaint must be one number of pixels, or four, got {list(outpaint)}")
    check_absent([target], overwrite)
    ready = model.load()
    names = ready.info.class_names
    label = ready.var.num_classes if name is None else find_label(name, names)
    left, right, top, bottom = outpaint if len(outpaint) == 4 else [*outpaint] * 4
    canvas = make_canvas(image, mask, (left, right, top, bottom), ready.vae.schedule.image_size)
    print(f"{image}: {canvas.message}", flush=True)

    drawing = sampling.over(ready.info.sampling)
    with scale_bar(ready.vae.schedule.num_scales) as progress:
        made = edit(
            ready.var,
            ready.vae,
            canvas.image.to(ready.device),
            canvas.hole.to(ready.device),
            torch.tensor([label], device=ready.device),
            seeds=[seed],
            progress=progress,
            **drawing,
        )
    files = {"image": image, "mask": mask}
    settings = ready.settings | drawing | {"seed": seed}
    command = command_again(None if name is None else spelled(label, names), outpaint, files | settings)
    hashes = {f"{kind}_sha256": file_sha256(file) for kind, file in files.items() if file is not None}
    hashes["weights_sha256"] = ready.weights_sha256
    texts = {"class": None if name is None else names[label], **files, **hashes, **settings}
    write_png(made[0], target, about(texts, command))
    print(f"wrote {target}")


def command_again(name: str | None, outpaint: Sequence[int], options: dict[str, Any]) -> list[str]:
    """The command that makes an edited picture again.

    Args:
        name: of the class, as `spelled`; None: without one.
        outpaint: one number, or four.
        options: the others, by name.
    """
    chosen = [] if name is None else ["--class", name]
    return ["fvar", "edit", *chosen, "--outpaint", *map(str, outpaint), *words(options)]


def edit_command(args: list[str]) -> None:
    """`fvar edit` with the given arguments.

    Raises:
        SystemExit: with status 2 if an argument is refused; the message names it.
    """
    parser = ArgumentParser(prog="fvar edit", description=(edit_image.__doc__ or "").split("\n")[0])
    parser.add_class_arguments(ModelOptions)
    parser.add_class_arguments(SamplingOptions)
    # a word of Python, and a list of words: no argument of a function becomes these
    parser.add_argument("--class", help="class of the new content, by name or number; without one it is unconditional")
    parser.add_argument(
        "--outpaint",
        nargs="+",
        type=int,
        default=[0],
        help="pixels of new content around the picture, which is shrunk to leave room: one number, or four for the "
        "left, right, top and bottom",
    )
    parser.add_function_arguments(edit_image, as_positional=False, skip={"model", "sampling", "name", "outpaint"})
    chosen = parser.parse_args(args).as_dict()
    try:
        edit_image(take(ModelOptions, chosen), take(SamplingOptions, chosen), name=chosen.pop("class"), **chosen)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
