"""`fvar demo`: a page in the browser to generate, refocus and edit with a trained model."""

import signal
from collections.abc import Sequence
from dataclasses import replace

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from fvar_lightning.commands.model import ModelOptions, take

QUICKSTART = "quickstart/fvar/last.ckpt"


def demo(model: ModelOptions, models: Sequence[str], host: str = "127.0.0.1", port: PositiveInt = 7860) -> None:
    """A page in the browser: classes, focus, scales, in-painting, out-painting, the optics of a photograph.

    Runs until it is interrupted (Ctrl-C).

    Args:
        model: how the models compute, and which of their weights.
        models: those that visitors choose from, each as `fvar generate` takes it.
        host: address to listen on; 0.0.0.0 is every one of this machine, so that others can come, too.
        port: to listen on.

    Raises:
        ImportError: without Gradio.
        ValueError: if there is no such model or device, or the port is taken.
    """
    try:
        from fvar_lightning.commands.demo.server import served
    except ImportError as error:
        raise ImportError("the demo needs the extra `app`: pip install 'fvar-lightning[app]'") from error
    with served({name: replace(model, model=name).load() for name in models}, host, port) as page:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, and leaves no file
        print(f"the demo is at {page.local_url}; Ctrl-C ends it", flush=True)
        page.block_thread()


def demo_command(args: list[str]) -> None:
    """`fvar demo` with the given arguments.

    Raises:
        SystemExit: with status 2 if an argument is refused; the message names it.
    """
    parser = ArgumentParser(prog="fvar demo", description=(demo.__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--model",
        nargs="+",
        default=[QUICKSTART],
        help="models to choose from, each as 'fvar generate' takes it; by default the quickstart's",
    )
    parser.add_class_arguments(ModelOptions, skip={"model"})
    parser.add_function_arguments(demo, as_positional=False, skip={"model", "models"})
    chosen = parser.parse_args(args).as_dict()
    models, chosen["model"] = chosen["model"], QUICKSTART
    try:
        demo(take(ModelOptions, chosen), models, **chosen)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
