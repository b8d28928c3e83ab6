"""What the demo's page is put together from.

What takes a model is a component while the page is made; returned by an event, it says what that component becomes.
"""

import secrets
from typing import Any

import gradio as gr

from fvar_lightning.commands.model import ReadyModel, SamplingOptions

NO_CLASS = -1
PSFS = ["disk", "gaussian", "polygon", "lanczos"]
OF_PAPER, OF_MODEL = "the paper's, 256 px", "the model's"
STYLE = """
.shown img {width: 100%; height: 100%; object-fit: contain}
.result img, .file img {image-rendering: pixelated}
.wide img {padding-top: 28px}
"""
QUICK: dict[str, Any] = {"concurrency_id": "showing", "concurrency_limit": 1, "api_visibility": "private"}
"""Of events that do not sample."""


def choices(ready: ReadyModel, classless: bool) -> list[Any]:
    """Class and seed."""
    classes = [(name, label) for label, name in enumerate(ready.info.class_names)]
    if classless:
        classes.insert(0, ("none", NO_CLASS))
    return [
        gr.Dropdown(classes, value=classes[0][1], label="Class", elem_classes="class"),
        gr.Number(0, label="Seed", precision=0, minimum=0, elem_classes="seed"),
    ]


def guidance(ready: ReadyModel) -> gr.Slider:
    """Strength of guidance; of a model whose default differs from scale to scale, the largest of them."""
    default = SamplingOptions().over(ready.info.sampling)["guidance"]
    strength = float(default if isinstance(default, int | float) else max(default))
    return gr.Slider(0, max(5.0, strength), strength, step=0.1, label="Guidance", info="towards the class; 0: none")


def truncation(ready: ReadyModel) -> list[Any]:
    """The other arguments of `SamplingOptions`."""
    defaults = SamplingOptions().over(ready.info.sampling)
    codes = ready.var.vocab_size
    return [
        gr.Slider(
            0,
            codes,
            min(defaults["top_k"], codes),
            step=1,
            label="Top k",
            info="draw from so many of the likeliest tokens; 0: from all",
        ),
        gr.Slider(
            0,
            1,
            defaults["top_p"],
            step=0.01,
            label="Top p",
            info="and of these from the likeliest that hold this probability; 0: from all",
        ),
        gr.Checkbox(defaults["more_smooth"], label="Mix codes instead of drawing one: smoother pictures"),
    ]


def wishes(ready: ReadyModel, classless: bool) -> list[Any]:
    """All of what a visitor wishes of a sample: class, seed, and the arguments of `SamplingOptions`."""
    return [*choices(ready, classless), guidance(ready), *truncation(ready)]


def wish_list(ready: ReadyModel, verb: str, classless: bool) -> tuple[list[Any], gr.Button]:
    """The `wishes` as they are laid out, and the button that fulfils them."""
    with gr.Row():
        with gr.Column(min_width=280):
            with gr.Row():
                label, seed = choices(ready, classless)
            another = gr.Button("Another seed", size="sm", elem_classes="another")
        with gr.Column(min_width=280):
            strength = guidance(ready)
            with gr.Accordion("Which tokens are drawn", open=False):
                others = truncation(ready)
    another.click(lambda: secrets.randbelow(2**31), None, seed, **QUICK)
    return [label, seed, strength, *others], gr.Button(verb, variant="primary", elem_classes="make")


def focus(ready: ReadyModel) -> gr.Slider:
    """Radius of the image's blur; hidden where a model knows none."""
    largest = ready.vae.schedule.state_radii[0]
    return gr.Slider(
        0,
        largest or 1,
        0,
        step=0.05,
        label="Focus: blur radius in pixels",
        info="0 is sharp; the image stays the same one",
        visible=largest > 0,
        elem_id="focus",
    )


def margins(ready: ReadyModel, *sides: str) -> list[Any]:
    """Pixels of new content on sides of a photograph."""
    size = ready.vae.schedule.image_size
    return [gr.Slider(0, size // 2 - 1, size // 8, step=1, label=f"{side}, px", min_width=200) for side in sides]


def which_scales(ready: ReadyModel) -> gr.Radio:
    """Whose schedule shows a photograph; hidden where the model's has no blur."""
    blurs = ready.vae.schedule.state_radii[0] > 0
    return gr.Radio([OF_PAPER, OF_MODEL], value=OF_PAPER, label="Scales", visible=blurs, elem_id="which")


def sources() -> tuple[gr.UploadButton, gr.Button]:
    """Where a photograph comes from: a file, or the image of the first tab."""
    with gr.Row():
        upload = gr.UploadButton("Upload a photograph", file_types=["image"], size="sm", elem_classes="upload")
        take = gr.Button("Take the generated image", size="sm", elem_classes="take")
    return upload, take


def canvas() -> gr.ImageEditor:
    """What is painted on: a picture of the page's own, with a white brush."""
    return gr.ImageEditor(
        label="Paint over what is to be replaced",
        type="pil",
        image_mode="RGBA",
        format="png",
        sources=(),
        transforms=(),
        layers=False,
        buttons=[],
        brush=gr.Brush(32, ["#ffffff"], color_mode="fixed"),
        eraser=gr.Eraser(32),
        canvas_size=(512, 512),
        placeholder="Upload a photograph",
        height=440,
        elem_id="canvas",
    )


def picture(label: str, name: str, height: int) -> gr.Image:
    """A picture to look at and to download, pixel for pixel and with its texts."""
    return gr.Image(
        label=label,
        type="pil",
        format="png",
        interactive=False,
        height=height,
        buttons=["download"],
        elem_classes=["shown", name],
    )


def wide_picture(name: str) -> gr.Image:
    """A picture as wide as the page."""
    return gr.Image(
        show_label=False,
        type="pil",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=name,
        elem_classes=["shown", "wide"],
    )


def command() -> gr.Textbox:
    """What makes a picture again."""
    return gr.Textbox(
        label="Command that makes it again",
        interactive=False,
        lines=1,
        max_lines=4,
        buttons=["copy"],
        elem_classes="command",
    )
