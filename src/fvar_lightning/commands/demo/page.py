"""The page of the demo, in Gradio: what lies where, and which handler answers."""

import secrets
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from fvar_lightning.commands.demo import handlers
from fvar_lightning.commands.demo.handlers import Generation
from fvar_lightning.commands.model import ReadyModel, SamplingOptions
from fvar_lightning.generation.sampling import Progress
from fvar_lightning.schedule import FocusSchedule

INTRODUCTION = """# Next-focus image generation
An image is made scale by scale, and every scale is sharper than the one before."""
STYLE = """
.pixels img {image-rendering: pixelated}
.wide img {width: 100%}
"""
OPTICS = """Plain downsampling (top row) folds fine texture into false coarse detail. Next-focus tokens come from views
that a defocus blur went over first (middle row). What the blur took away is the alias residual (bottom row): only the
teacher sees it, in training."""
KEPT_SECONDS = 3600
"""How long pictures, uploads and what a visitor made are kept."""
NO_CLASS = -1
PSFS = ["disk", "gaussian", "polygon", "lanczos"]
OF_PAPER, OF_MODEL = "the paper's, 256 px", "the model's"

SLOW: dict[str, Any] = {"concurrency_id": "sampling", "concurrency_limit": 1, "api_visibility": "private"}
"""Of events that sample: one at a time, whoever asks."""
QUICK: dict[str, Any] = {"concurrency_id": "showing", "concurrency_limit": 1, "api_visibility": "private"}
"""Of all others."""


class Tab(NamedTuple):
    """What another model changes in a tab."""

    parts: list[Any]
    renewed: Callable[[ReadyModel], list[Any]]
    """What the parts become."""


def make_page(models: Mapping[str, ReadyModel]) -> gr.Blocks:
    """The page.

    Args:
        models: to choose from, by name.
    """
    name, ready = next(iter(models.items()))
    with gr.Blocks(title="fvar demo", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as page:
        gr.Markdown(INTRODUCTION)
        model = gr.Dropdown(list(models), value=name, label="Model", visible=len(models) > 1, elem_id="model")
        made = gr.State(time_to_live=KEPT_SECONDS)
        tabs = []
        for title, fill_tab in TABS.items():
            with gr.Tab(title):
                tabs.append(fill_tab(models, model, made, ready))

        def renew(name: str) -> list[Any]:
            return [None, *(part for tab in tabs for part in tab.renewed(models[name]))]

        model.input(renew, model, [made, *(part for tab in tabs for part in tab.parts)], **QUICK)
    return page


def generate_tab(models: Mapping[str, ReadyModel], model: gr.Dropdown, made: gr.State, ready: ReadyModel) -> Tab:
    """Class, seed and guidance to an image, its focus, its scales and its settings."""
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            wishes, button = _wishes(ready, "Generate", classless=False)
        with gr.Column(scale=3, min_width=320):
            image = _result("Image")
            focus = _focus(ready)
    scales = gr.Image(
        label="After every scale: its tokens, and its blur radius", format="png", interactive=False,
        elem_classes=["pixels", "wide"], elem_id="scales", buttons=["download", "fullscreen"],
    )  # fmt: skip
    command = _command()

    def sample(name: str, label: int, seed: int | None, *sampling: Any, progress: gr.Progress) -> Generation:
        watch = _watch(progress, models[name])
        return handlers.sample_image(models[name], name, label, seed, SamplingOptions(*sampling), watch)

    def show(kept: Generation | None, radius: float) -> tuple[Image.Image, str]:
        picture = _focused(models, kept, radius)
        return picture, picture.info["command"]

    def show_scales(kept: Generation) -> Image.Image:
        return handlers.strip(models[kept.model], kept)

    button.click(_slow(sample), [model, *wishes], made, show_progress_on=image, **SLOW).success(
        _telling(show), [made, focus], [image, command], show_progress="hidden", **QUICK
    ).success(_telling(show_scales), made, scales, show_progress="hidden", **QUICK)
    focus.input(
        _telling(show), [made, focus], [image, command], show_progress="hidden", trigger_mode="always_last", **QUICK
    )

    def renewed(ready: ReadyModel) -> list[Any]:
        return [*_choices(ready, classless=False), *_strengths(ready), _focus(ready), None, None, None]

    return Tab([*wishes, focus, image, scales, command], renewed)


def inpaint_tab(models: Mapping[str, ReadyModel], model: gr.Dropdown, made: gr.State, ready: ReadyModel) -> Tab:
    """A brush over a photograph, and new content where it went."""
    square = gr.State(time_to_live=KEPT_SECONDS)
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            upload, take = _sources()
            canvas = gr.ImageEditor(
                label="Paint over what is to be replaced", type="pil", image_mode="RGBA", format="png", sources=(),
                transforms=(), layers=False, buttons=[], brush=gr.Brush(48, ["#ffffff"], color_mode="fixed"),
                eraser=gr.Eraser(48), elem_id="canvas", elem_classes="pixels",
            )  # fmt: skip
        with gr.Column(scale=3, min_width=320):
            image = _result("Result")
            wishes, button = _wishes(ready, "Fill in", classless=True)
    command = _command()
    with gr.Accordion("The files of this command", open=False), gr.Row():
        files = [_result(f"{name}.png", small=True) for name in ("photograph", "mask")]

    def prepare(name: str, picture: Image.Image) -> tuple[Image.Image, dict[str, Any]]:
        fitted = handlers.middle(picture, models[name].vae.schedule.image_size)
        return fitted, {"background": handlers.to_paint_on(fitted), "layers": [], "composite": None}

    def fill(
        name: str, square: Image.Image | None, drawn: dict[str, Any] | None, label: int, seed: int | None,
        *sampling: Any, progress: gr.Progress,
    ) -> tuple[Image.Image | str, ...]:  # fmt: skip
        ready = models[name]
        if square is None:
            raise ValueError(handlers.NO_PHOTOGRAPH)
        mask = handlers.mask_of(handlers.painted(drawn["layers"] if drawn else []), square.width)
        picture = handlers.fill(
            ready, square, mask, (0, 0, 0, 0), _label(label), seed, SamplingOptions(*sampling), _watch(progress, ready)
        )
        return picture, picture.info["command"], square, mask

    _on_photograph(models, model, made, upload, take, prepare, [square, canvas])
    button.click(
        _slow(fill), [model, square, canvas, *wishes], [image, command, *files], show_progress_on=image, **SLOW
    )

    def renewed(ready: ReadyModel) -> list[Any]:
        return [*_choices(ready, classless=True), *_strengths(ready), *[None] * 6]

    return Tab([*wishes, square, canvas, image, command, *files], renewed)


def outpaint_tab(models: Mapping[str, ReadyModel], model: gr.Dropdown, made: gr.State, ready: ReadyModel) -> Tab:
    """A photograph made smaller, and new content around it."""
    with gr.Row():
        with gr.Column(scale=3, min_width=320):
            upload, take = _sources()
            photograph = _photograph()
            with gr.Row():
                margins = _margins(ready)
        with gr.Column(scale=3, min_width=320):
            image = _result("Result")
            wishes, button = _wishes(ready, "Extend", classless=True)
    command = _command()
    kept = gr.State(time_to_live=KEPT_SECONDS)

    def fill(
        name: str, picture: Image.Image | None, left: int, right: int, top: int, bottom: int, label: int,
        seed: int | None, *sampling: Any, progress: gr.Progress,
    ) -> tuple[Image.Image, str]:  # fmt: skip
        ready = models[name]
        made = handlers.fill(
            ready, picture, None, (left, right, top, bottom), _label(label), seed, SamplingOptions(*sampling),
            _watch(progress, ready),
        )  # fmt: skip
        return made, made.info["command"]

    _on_photograph(models, model, made, upload, take, lambda name, picture: (picture, picture), [kept, photograph])
    button.click(_slow(fill), [model, kept, *margins, *wishes], [image, command], show_progress_on=image, **SLOW)

    def renewed(ready: ReadyModel) -> list[Any]:
        return [*_choices(ready, classless=True), *_strengths(ready), *_margins(ready), None, None, None, None]

    return Tab([*wishes, *margins, kept, photograph, image, command], renewed)


def optics_tab(models: Mapping[str, ReadyModel], model: gr.Dropdown, made: gr.State, ready: ReadyModel) -> Tab:
    """The views of a photograph at every scale, and the alias residual between them."""
    kept = gr.State(time_to_live=KEPT_SECONDS)
    with gr.Row():
        with gr.Column(scale=1, min_width=240):
            upload, take = _sources()
            photograph = _photograph()
        with gr.Column(scale=2, min_width=320):
            gr.Markdown(OPTICS)
            scales = _scales(ready)
            psf = gr.Radio(PSFS, value="disk", label="Point-spread function", elem_id="psf")
            gain = gr.Slider(1, 10, 2, step=0.5, label="Alias residual enlarged by")
    pyramid = gr.Image(
        label="Views", format="png", interactive=False, elem_id="pyramid", elem_classes="wide",
        buttons=["download", "fullscreen"],
    )  # fmt: skip

    def draw(name: str, picture: Image.Image | None, which: str, psf: str, gain: float) -> Image.Image | None:
        if picture is None:
            return None
        schedule = models[name].vae.schedule if which == OF_MODEL else FocusSchedule()
        return handlers.focus_pyramid(picture, schedule, psf, gain)

    wanted = [model, kept, scales, psf, gain]
    _on_photograph(models, model, made, upload, take, lambda name, picture: (picture, picture), [kept, photograph])
    for changed in (photograph.change, scales.input, psf.input, gain.release):
        changed(_telling(draw), wanted, pyramid, trigger_mode="always_last", **QUICK)

    def renewed(ready: ReadyModel) -> list[Any]:
        return [_scales(ready)]

    return Tab([scales], renewed)


TABS = {
    "Generate": generate_tab,
    "In-paint": inpaint_tab,
    "Out-paint": outpaint_tab,
    "Refocus a photograph": optics_tab,
}


# Parts. Those that take a model are components and, returned by an event, what it makes of them.


def _choices(ready: ReadyModel, classless: bool) -> list[Any]:
    """Class and seed."""
    classes = [(name, label) for label, name in enumerate(ready.info.class_names)]
    if classless:
        classes.insert(0, ("none", NO_CLASS))
    return [
        gr.Dropdown(classes, value=classes[0][1], label="Class", elem_classes="class"),
        gr.Number(0, label="Seed", precision=0, minimum=0, elem_classes="seed"),
    ]


def _strengths(ready: ReadyModel) -> list[Any]:
    """Arguments of `SamplingOptions`."""
    defaults = SamplingOptions().over(ready.info.sampling)
    guidance = defaults["guidance"]
    strength = float(guidance if isinstance(guidance, int | float) else max(guidance))
    return [
        gr.Slider(0, max(5.0, strength), strength, step=0.1, label="Guidance", info="towards the class; 0: none"),
        gr.Slider(
            0, ready.var.vocab_size, min(defaults["top_k"], ready.var.vocab_size), step=1, label="Top k",
            info="draw from so many of the likeliest tokens; 0: from all",
        ),
        gr.Slider(
            0, 1, defaults["top_p"], step=0.01, label="Top p",
            info="and of these from the likeliest that hold this probability; 0: from all",
        ),
        gr.Checkbox(defaults["more_smooth"], label="Mix codes instead of drawing one: smoother pictures"),
    ]  # fmt: skip


def _wishes(ready: ReadyModel, verb: str, classless: bool) -> tuple[list[Any], gr.Button]:
    """What to sample and how, and the button that does."""
    label, seed = _choices(ready, classless)
    with gr.Row():
        another = gr.Button("Another seed", size="sm")
    guidance, *finer = _strengths(ready)
    another.click(lambda: secrets.randbelow(2**31), None, seed, **QUICK)
    button = gr.Button(verb, variant="primary", elem_classes="make")
    return [label, seed, guidance, *finer], button


def _focus(ready: ReadyModel) -> gr.Slider:
    largest = ready.vae.schedule.state_radii[0]
    return gr.Slider(
        0, largest or 1, 0, step=(largest or 1) / 60, label="Focus: blur radius in pixels", visible=largest > 0,
        info="0 is sharp; nothing is sampled anew", elem_id="focus",
    )  # fmt: skip


def _margins(ready: ReadyModel) -> list[Any]:
    size = ready.vae.schedule.image_size
    return [
        gr.Slider(0, size // 2 - 1, size // 8, step=1, label=f"{side}, px", min_width=120)
        for side in ("Left", "Right", "Top", "Bottom")
    ]


def _scales(ready: ReadyModel) -> gr.Radio:
    blurs = ready.vae.schedule.state_radii[0] > 0
    return gr.Radio([OF_PAPER, OF_MODEL], value=OF_PAPER, label="Scales", visible=blurs)


def _sources() -> tuple[gr.UploadButton, gr.Button]:
    """Where a photograph comes from."""
    with gr.Row():
        upload = gr.UploadButton("Upload a photograph", file_types=["image"], size="sm", elem_classes="upload")
        take = gr.Button("Take the generated image", size="sm", elem_classes="take")
    return upload, take


def _photograph() -> gr.Image:
    return gr.Image(label="Photograph", format="png", interactive=False, buttons=[], elem_classes="photograph")


def _result(label: str, small: bool = False) -> gr.Image:
    """A picture that keeps its texts."""
    return gr.Image(
        label=label, format="png", type="pil", interactive=False, height=160 if small else 400,
        elem_classes=["pixels", "file" if small else "result"], buttons=["download"],
    )  # fmt: skip


def _command() -> gr.Textbox:
    return gr.Textbox(label="Makes it again", interactive=False, lines=2, buttons=["copy"], elem_classes="command")


# Events


def _on_photograph(
    models: Mapping[str, ReadyModel], model: gr.Dropdown, made: gr.State, upload: gr.UploadButton, take: gr.Button,
    prepare: Callable[[str, Image.Image], Any], outputs: list[Any],
) -> None:  # fmt: skip
    """An upload, or the generated image, goes through `prepare` (model's name, picture) to the outputs."""

    def uploaded(name: str, path: str) -> Any:
        return prepare(name, handlers.read_photograph(path))

    def taken(name: str, kept: Generation | None) -> Any:
        return prepare(name, _focused(models, kept, 0.0))

    upload.upload(_telling(uploaded), [model, upload], outputs, **QUICK)
    take.click(_telling(taken), [model, made], outputs, **QUICK)


def _focused(models: Mapping[str, ReadyModel], kept: Generation | None, radius: float) -> Image.Image:
    if kept is None:
        raise ValueError("generate an image first")
    return handlers.focused(models[kept.model], kept, radius)


def _label(chosen: int) -> int | None:
    return None if chosen == NO_CLASS else chosen


def _watch(progress: gr.Progress, ready: ReadyModel) -> Progress:
    scales = ready.vae.schedule.num_scales
    return partial(progress.tqdm, total=scales, desc="Sampling", unit="scales")


def _telling(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose ValueErrors are messages on the page."""

    @wraps(handler)
    def told(*args: Any) -> Any:
        try:
            return handler(*args)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return told


def _slow(handler: Callable[..., Any]) -> Callable[..., Any]:
    """`_telling` of one that takes `progress`."""

    # first of the arguments, where Gradio finds it before any number of them
    def watched(progress: gr.Progress = gr.Progress(), *args: Any) -> Any:  # noqa: B008
        return _telling(partial(handler, progress=progress))(*args)

    return watched
