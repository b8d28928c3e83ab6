"""The demo's page, served to visitors within limits."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import gradio as gr
from PIL import Image
from starlette.middleware import Middleware

from fvar_lightning.commands.demo.guard import Guard
from fvar_lightning.commands.demo.handlers import LARGEST_PIXELS
from fvar_lightning.commands.demo.page import make_page
from fvar_lightning.commands.demo.parts import STYLE
from fvar_lightning.commands.model import ReadyModel

LARGEST_FILE = "20mb"
WAITING = 32
"""Requests in the queue; further ones are refused."""
VISITORS = 200
"""Whose last image and photographs are kept at once."""


@contextmanager
def served(models: Mapping[str, ReadyModel], host: str, port: int) -> Iterator[gr.Blocks]:
    """The page of `make_page`, served by a thread until the context ends.

    Uploads and pictures lie in a folder of their own, each for an hour, and no other file is served.

    Args:
        models: to choose from, by name.
        host: address to listen on.
        port: to listen on.

    Raises:
        ValueError: if the port is taken.
    """
    with TemporaryDirectory(prefix="fvar-demo-") as folder:
        # read by Gradio when it makes a page
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        Image.MAX_IMAGE_PIXELS = LARGEST_PIXELS  # of what Gradio decodes, too
        page = make_page(models)
        page.queue(max_size=WAITING, api_open=False)
        try:
            page.launch(
                server_name=host,
                server_port=port,
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                footer_links=[],
                max_file_size=LARGEST_FILE,
                state_session_capacity=VISITORS,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                css=STYLE,
                app_kwargs={"middleware": [Middleware(Guard)], "openapi_url": None},
            )
        except OSError as error:
            raise ValueError(f"port {port} of host {host!r} cannot be listened on: {error}") from error
        try:
            yield page
        finally:
            page.close(verbose=False)
