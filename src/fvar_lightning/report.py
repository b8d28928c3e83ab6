"""The report of a quickstart: pictures, curves, and in words what they say and what to try next."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fvar_lightning.callbacks.loggers import read_metrics
from fvar_lightning.data.batches import ImageBatch
from fvar_lightning.data.modules import ImageDataModule
from fvar_lightning.generation.sampling import generate_stages
from fvar_lightning.metrics.pictures import line_chart, pyramid, tile
from fvar_lightning.tasks.fvar import FVARTask

STAGES = {"structure": "structure tokenizer", "alias": "alias tokenizer", "fvar": "teacher and student"}
DISTILLATION = ("feature", "logit")
MAX_CLASSES = 8
SAMPLES = 6

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""Name of a figure -> (step, value)."""


@torch.no_grad()
def write_report(folder: Path, task: FVARTask, data: ImageDataModule, longer: Sequence[str]) -> None:
    """Pictures and figures of a finished run.

    Args:
        folder: of the run; the report is written into it.
        task: of the last stage.
        data: that it was trained on.
        longer: command that trains on.
    """
    task.eval()
    batch = one_of_each_class(data)
    vae, schedule = task.vae, task.vae.schedule
    pyramid(batch.views, schedule.radii).save(folder / "pyramid.png")

    tokens = task.tokens(batch)
    stages = vae.decode_stages(tokens.structure)
    names = [data.class_names[label] for label in batch.labels]
    rows = [list(batch.images), list(stages[-1])]
    tile(rows, ["photograph", "reconstruction"], names, side=112).save(folder / "reconstructions.png")

    labels = batch.labels.repeat_interleave(SAMPLES)
    made = generate_stages(task.student, vae, labels, seeds=range(len(labels)), **task.sampling)
    rows = [
        [*made[-1][i * SAMPLES : (i + 1) * SAMPLES], *(stage[i * SAMPLES] for stage in made)]
        for i in range(len(batch.labels))
    ]
    heads = [f"sample {i + 1}" for i in range(SAMPLES)] + [f"1: {n}x{n}" for n in schedule.patch_nums]
    tile(rows, names, heads, side=80).save(folder / "samples.png")

    curves = {stage: read_metrics(folder / stage) for stage in STAGES}
    line_chart(loss_panels(curves), "step").save(folder / "losses.png")
    line_chart(tokenizer_panels(curves), "step").save(folder / "tokenizers.png")
    seconds = json.loads((folder / "seconds.json").read_text())
    reading = [*what_it_says(curves, vae.vocab_size), *what_next(folder, names[0], longer)]
    (folder / "report.md").write_text("\n".join([*PICTURES, *reading, *tables(curves, seconds)]))


def one_of_each_class(data: ImageDataModule) -> ImageBatch:
    """The first validation image of up to `MAX_CLASSES` classes, with its views."""
    images: dict[int, Tensor] = {}
    for pixels, labels in data.val_dataloader():
        for image, label in zip(pixels, labels.tolist(), strict=True):
            images.setdefault(label, image)
        if len(images) == data.num_classes:
            break
    chosen = sorted(images)[:MAX_CLASSES]
    return data.on_after_batch_transfer([torch.stack([images[c] for c in chosen]), torch.tensor(chosen)], 0)


def loss_panels(curves: Mapping[str, Curves]) -> dict[str, Curves]:
    """The losses of every stage; the terms of the distillation, which are a hundred times smaller, by themselves."""
    losses = {STAGES[stage]: loss_curves(found) for stage, found in curves.items()}
    both = losses[STAGES["fvar"]]
    losses[STAGES["fvar"]] = {name: x for name, x in both.items() if name.split("/")[1] not in DISTILLATION}
    distillation = {name: x for name, x in both.items() if name.split("/")[1] in DISTILLATION}
    return losses | ({"distillation": distillation} if distillation else {})


def loss_curves(found: Curves) -> Curves:
    """The terms of the loss in training, and those of them that validation has too."""
    terms = {name.removeprefix("train/") for name in found if name.startswith("train/")}
    return {name: points for name, points in found.items() if name.split("/", 1)[1] in terms}


def tokenizer_panels(curves: Mapping[str, Curves]) -> dict[str, Curves]:
    """What the tokenizers are judged by in validation: usage of the codes, and how near the decoded pixels come."""
    kinds = {"structure": ("usage", "psnr"), "alias": ("usage", "snr")}
    titles = {"usage": "codes in use", "psnr": "PSNR, dB", "snr": "signal-to-noise ratio, dB"}
    return {
        f"{STAGES[stage]}: {titles[figure]}": {
            name.removeprefix(f"val/{figure}").strip("/") or "all": points
            for name, points in curves[stage].items()
            if name == f"val/{figure}" or name.startswith(f"val/{figure}/")
        }
        for stage, figures in kinds.items()
        for figure in figures
    }


PICTURES = """# Quickstart report

![pyramid](pyramid.png)

*What the tokenizers see: a column for every scale. Top: downsampled. Middle: focused, for the structure tokens. Bottom:
their difference, for the alias tokens, which only the teacher reads.*

![reconstructions](reconstructions.png)

*Validation images, and the same through their structure tokens. No generated image can be better than these.*

![samples](samples.png)

*Generated by the student, not chosen. Right: the first of every row after each scale, coarse to sharp.*

![losses](losses.png)

*A tokenizer's first steps are un-quantised; its losses jump where its codes come in.*

![tokenizers](tokenizers.png)
""".splitlines()


def what_it_says(curves: Mapping[str, Curves], vocab_size: int) -> list[str]:
    """A sentence or two for every figure there is.

    Args:
        curves: of every stage.
        vocab_size: codes of the structure tokenizer.
    """
    last = {
        (stage, name): points[-1][1]
        for stage, found in curves.items()
        for name, points in found.items()
        if not math.isnan(points[-1][1])
    }
    said = []
    if (psnr := last.get(("structure", "val/psnr"))) is not None:
        said.append(
            f"Reconstructions are {psnr:.1f} dB from the originals (PSNR). At this size 17 to 23 dB is what to expect, "
            "and below 15 dB more steps help; a larger tokenizer (`configs/tokenizer/`) reaches more."
        )
    if (usage := last.get(("structure", "val/usage/all"))) is not None:
        said.append(
            f"The structure tokenizer uses {usage:.0%} of its codes (perplexity). Above 50 % is good; a figure that "
            "falls towards 0 is a codebook that collapses."
        )
    snr = [x for (stage, name), x in last.items() if stage == "alias" and name.startswith("val/snr/")]
    alias_usage = last.get(("alias", "val/usage/all"))
    if snr and alias_usage is not None:
        mean = sum(snr) / len(snr)
        said.append(
            f"The alias tokenizer uses {alias_usage:.0%} of its codes and reaches {mean:.1f} dB: "
            f"its tokens hold {max(1 - 10 ** (-mean / 10), 0):.0%} of the residual's power. A few decibels are what to "
            "expect, since a residual is nearly noise."
        )
    student = curves["fvar"].get("val/student")
    if student:
        chance, (step, loss) = math.log(vocab_size), student[-1]
        said.append(
            f"The student's validation loss is {loss:.2f} nats a token; guessing among {vocab_size} codes would be "
            f"ln {vocab_size} = {chance:.2f}. It hesitates as if among {math.exp(loss):.0f} codes. Losses near chance "
            "are no failure: many tokens decode to nearly the same picture, so look at the samples."
        )
        best_step, best = min(student, key=lambda point: point[1])
        if loss > best + 0.05:
            said.append(
                f"It was lower at step {best_step} ({best:.2f}) than at step {step}: the model learns its images by "
                "heart. More images help, more steps do not."
            )
        if (teacher := last.get(("fvar", "val/teacher"))) is not None:
            said.append(
                f"The teacher, which reads the alias tokens too, is at {teacher:.2f}: "
                f"{loss - teacher:+.3f} nats of advantage to distil. Some hundredths are what to expect."
            )
    return ["## What it says", "", *(f"- {sentence}" for sentence in said), ""] if said else []


def what_next(folder: Path, name: str, longer: Sequence[str]) -> list[str]:
    """Commands to go on with.

    Args:
        folder: of the run.
        name: of a class.
        longer: command that trains on.
    """
    model, name = shlex.quote(str(folder / "fvar" / "last.ckpt")), shlex.quote(name)
    return f"""## What to try next

```bash
# more images of a class, then new content in a picture of yours, where a mask is white
fvar generate --model {model} --classes {name} --count 8
fvar edit --model {model} --image photo.png --mask mask.png --class {name} --output edited.png
# the same run, longer: it goes on where it is
{shlex.join(longer)}
# your own images: a folder of class folders, or of images
fvar quickstart --source path/to/images --output my_run
# a folder with the model alone, to load with `from_pretrained` or to publish
fvar export --ckpt_path {model} --output model
```
""".splitlines()


def tables(curves: Mapping[str, Curves], seconds: Mapping[str, float]) -> list[str]:
    """First and last value of every figure."""
    lines = [""]
    for stage, found in curves.items():
        lines += [
            f"## {stage} ({seconds.get(stage, 0):.0f} s)",
            "",
            "| figure | first | last | at step |",
            "|---|---|---|---|",
        ]
        for name, points in sorted(found.items()):
            lines.append(f"| {name} | {points[0][1]:.4g} | {points[-1][1]:.4g} | {points[-1][0]} |")
        lines.append("")
    return lines
