"""The demo's page, served: what a visitor may send, and what may leave this machine."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from fvar_lightning.commands.demo.page import STYLE, make_page
from fvar_lightning.commands.model import ReadyModel

LARGEST_FILE = "20mb"
WAITING = 32
"""Requests in the queue; further ones are refused."""
VISITORS = 200
"""Whose last image and photographs are kept at once."""

POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
"""The page loads nothing from other hosts."""


class OwnHost:
    """ASGI middleware: pages are told to load nothing from other hosts, and none is fetched for a visitor."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


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
                app_kwargs={"middleware": [Middleware(OwnHost)], "docs_url": None, "redoc_url": None},
            )
        except OSError as error:
            raise ValueError(f"port {port} of host {host!r} cannot be listened on: {error}") from error
        try:
            yield page
        finally:
            page.close(verbose=False)
