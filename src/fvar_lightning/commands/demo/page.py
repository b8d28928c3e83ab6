"""The page of the demo, in Gradio: what lies where, and which handler answers."""

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, NamedTuple

import gradio as gr
from PIL import Image

from fvar_lightning.commands.demo import handlers, parts
from fvar_lightning.commands.demo.handlers import Generation
from fvar_lightning.commands.demo.parts import QUICK
from fvar_lightning.commands.model import ReadyModel, SamplingOptions
from fvar_lightning.generation.sampling import Progress
from fvar_lightning.schedule import FocusSchedule

INTRODUCTION = """# Next-focus image generation
An image is made scale by scale, from a blurred whole to sharp detail."""
SCALES = "After every scale: its tokens and its blur radius"
OPTICS = """Plain downsampling (top row) folds fine texture into false coarse detail. Next-focus tokens come from views
that a defocus blur went over first (middle row). What the blur took away is the alias residual (bottom row): only the
teacher sees it, in training."""
SIDES = ("Left", "Right", "Top", "Bottom")
KEPT_SECONDS = 3600
"""How long pictures, uploads and what a visitor made are kept."""

SLOW: dict[str, Any] = QUICK | {"concurrency_id": "sampling"}
"""Of events that sample: one at a time, whoever asks."""


class Visit(NamedTuple):
    """What every tab needs."""

    models: Mapping[str, ReadyModel]
    first: ReadyModel
    model: gr.Dropdown
    """Name of the chosen one."""
    made: gr.State
    """The visitor's last `Generation`."""


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
        visit = Visit(models, ready, model, _kept())
        tabs = []
        for title, fill_tab in TABS.items():
            with gr.Tab(title):
                tabs.append(fill_tab(visit))

        def renew(name: str) -> list[Any]:
            return [None, *(part for tab in tabs for part in tab.renewed(models[name]))]

        model.input(renew, model, [visit.made, *(part for tab in tabs for part in tab.parts)], **QUICK)
    return page


def generate_tab(visit: Visit) -> Tab:
    """Class, seed and guidance to an image, its focus, its scales and its settings."""
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            wishes, button = parts.wish_list(visit.first, "Generate", classless=False)
        with gr.Column(scale=3, min_width=320):
            image = parts.picture("Image", "result", 400)
            focus = parts.focus(visit.first)
    gr.Markdown(SCALES)
    scales = parts.wide_picture("scales")
    command = parts.command()

    def sample(name: str, label: int, seed: int | None, *sampling: Any, progress: gr.Progress) -> Generation:
        ready = visit.models[name]
        return handlers.sample_image(ready, name, label, seed, SamplingOptions(*sampling), _watch(progress, ready))

    def show(kept: Generation | None, radius: float) -> tuple[Image.Image, str]:
        picture = _focused(visit, kept, radius)
        return picture, picture.info["command"]

    def show_scales(kept: Generation) -> Image.Image:
        return handlers.strip(visit.models[kept.model], kept)

    shown = {"inputs": [visit.made, focus], "outputs": [image, command], "show_progress": "hidden"} | QUICK
    button.click(_slow(sample), [visit.model, *wishes], visit.made, show_progress_on=image, **SLOW).success(
        _telling(show), **shown
    ).success(_telling(show_scales), visit.made, scales, show_progress="hidden", **QUICK)
    focus.input(_telling(show), trigger_mode="always_last", **shown)

    def renewed(ready: ReadyModel) -> list[Any]:
        return [*parts.wishes(ready, classless=False), parts.focus(ready), None, None, None]

    return Tab([*wishes, focus, image, scales, command], renewed)


def inpaint_tab(visit: Visit) -> Tab:
    """A brush over a photograph, and new content where it went."""
    square = _kept()
    with gr.Row():
        with gr.Column(min_width=320):
            upload, take = parts.sources()
            canvas = parts.canvas()
        with gr.Column(min_width=320):
            image = parts.picture("Result", "result", 480)
    wishes, button = parts.wish_list(visit.first, "Fill in", classless=True)
    command = parts.command()
    with gr.Accordion("The files it names", open=False), gr.Row():
        files = [parts.picture(f"{name}.png", "file", 200) for name in ("photograph", "mask")]

    def prepare(name: str, picture: Image.Image) -> tuple[Image.Image, dict[str, Any]]:
        fitted = handlers.middle(picture, visit.models[name].vae.schedule.image_size)
        return fitted, {"background": handlers.to_paint_on(fitted), "layers": [], "composite": None}

    def fill(
        name: str,
        square: Image.Image | None,
        drawn: dict[str, Any] | None,
        label: int,
        seed: int | None,
        *sampling: Any,
        progress: gr.Progress,
    ) -> tuple[Any, ...]:
        if square is None:
            raise ValueError(handlers.NO_PHOTOGRAPH)
        mask = handlers.mask_of(handlers.painted(drawn["layers"] if drawn else []), square.width)
        ready, margins, options = visit.models[name], (0, 0, 0, 0), SamplingOptions(*sampling)
        picture = handlers.fill(ready, square, mask, margins, _label(label), seed, options, _watch(progress, ready))
        return picture, picture.info["command"], square, mask

    _on_photograph(visit, upload, take, prepare, [square, canvas])
    wanted = [visit.model, square, canvas, *wishes]
    button.click(_slow(fill), wanted, [image, command, *files], show_progress_on=image, **SLOW)

    def renewed(ready: ReadyModel) -> list[Any]:
        return [*parts.wishes(ready, classless=True), *[None] * 6]

    return Tab([*wishes, square, canvas, image, command, *files], renewed)


def outpaint_tab(visit: Visit) -> Tab:
    """A photograph made smaller, and new content around it."""
    kept = _kept()
    with gr.Row():
        with gr.Column(min_width=320):
            upload, take = parts.sources()
            photograph = parts.picture("Photograph", "photograph", 280)
            with gr.Row():
                margins = parts.margins(visit.first, *SIDES[:2])
            with gr.Row():
                margins += parts.margins(visit.first, *SIDES[2:])
        with gr.Column(min_width=320):
            image = parts.picture("Result", "result", 480)
    wishes, button = parts.wish_list(visit.first, "Extend", classless=True)
    command = parts.command()

    def fill(
        name: str,
        picture: Image.Image | None,
        left: int,
        right: int,
        top: int,
        bottom: int,
        label: int,
        seed: int | None,
        *sampling: Any,
        progress: gr.Progress,
    ) -> tuple[Image.Image, str]:
        ready, around, options = visit.models[name], (left, right, top, bottom), SamplingOptions(*sampling)
        made = handlers.fill(ready, picture, None, around, _label(label), seed, options, _watch(progress, ready))
        return made, made.info["command"]

    _on_photograph(visit, upload, take, lambda _, picture: (picture, picture), [kept, photograph])
    wanted = [visit.model, kept, *margins, *wishes]
    button.click(_slow(fill), wanted, [image, command], show_progress_on=image, **SLOW)

    def renewed(ready: ReadyModel) -> list[Any]:
        return [*parts.wishes(ready, classless=True), *parts.margins(ready, *SIDES), None, None]

    return Tab([*wishes, *margins, image, command], renewed)


def optics_tab(visit: Visit) -> Tab:
    """The views of a photograph at every scale, and the alias residual between them."""
    kept = _kept()
    with gr.Row():
        with gr.Column(scale=1, min_width=240):
            upload, take = parts.sources()
            photograph = parts.picture("Photograph", "photograph", 280)
        with gr.Column(scale=2, min_width=320):
            gr.Markdown(OPTICS)
            which = parts.which_scales(visit.first)
            psf = gr.Radio(parts.PSFS, value=parts.PSFS[0], label="Point-spread function", elem_id="psf")
            gain = gr.Slider(1, 10, 2, step=0.5, label="Alias residual enlarged by")
    pyramid = parts.wide_picture("pyramid")

    def draw(name: str, picture: Image.Image | None, which: str, psf: str, gain: float) -> Image.Image | None:
        if picture is None:
            return None
        schedule = visit.models[name].vae.schedule if which == parts.OF_MODEL else FocusSchedule()
        return handlers.focus_pyramid(picture, schedule, psf, gain)

    drawn = {"inputs": [visit.model, kept, which, psf, gain], "outputs": pyramid} | QUICK
    _on_photograph(visit, upload, take, lambda _, picture: (picture, picture), [kept, photograph], then=(draw, drawn))
    for changed in (which.input, psf.input, gain.release):
        changed(_telling(draw), trigger_mode="always_last", **drawn)

    def renewed(ready: ReadyModel) -> list[Any]:
        return [parts.which_scales(ready), None]

    return Tab([which, pyramid], renewed)


TABS = {
    "Generate": generate_tab,
    "In-paint": inpaint_tab,
    "Out-paint": outpaint_tab,
    "Refocus a photograph": optics_tab,
}


def _kept() -> gr.State:
    """What the page keeps for a visitor."""
    return gr.State(time_to_live=KEPT_SECONDS)


def _on_photograph(
    visit: Visit,
    upload: gr.UploadButton,
    take: gr.Button,
    prepare: Callable[[str, Image.Image], Any],
    outputs: list[Any],
    then: tuple[Callable[..., Any], dict[str, Any]] | None = None,
) -> None:
    """An upload, or the generated image, goes through `prepare` (model's name, picture) to the outputs."""

    def uploaded(name: str, path: str) -> Any:
        return prepare(name, handlers.read_photograph(path))

    def taken(name: str, kept: Generation | None) -> Any:
        return prepare(name, _focused(visit, kept, 0.0))

    for event in (
        upload.upload(_telling(uploaded), [visit.model, upload], outputs, **QUICK),
        take.click(_telling(taken), [visit.model, visit.made], outputs, **QUICK),
    ):
        if then is not None:
            event.success(_telling(then[0]), **then[1])


def _focused(visit: Visit, kept: Generation | None, radius: float) -> Image.Image:
    if kept is None:
        raise ValueError("generate an image first")
    return handlers.focused(visit.models[kept.model], kept, radius)


def _label(chosen: int) -> int | None:
    return None if chosen == parts.NO_CLASS else chosen


def _watch(progress: gr.Progress, ready: ReadyModel) -> Progress:
    return partial(progress.tqdm, total=ready.vae.schedule.num_scales, desc="Sampling", unit="scales")


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
