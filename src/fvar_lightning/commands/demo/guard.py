"""What a request to the demo may bring along: nothing large but an upload, and no address to fetch."""

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_EVENT = 4 << 20
"""Bytes; what is painted comes to a tenth of it."""
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
"""A page loads nothing from other hosts."""


class Guard:
    """ASGI middleware around Gradio, which limits the size of uploads alone, and fetches a file whose path is a URL."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        if scope["method"] == "POST" and not scope["path"].endswith("/upload"):
            body = b""
            async for part in Request(scope, receive).stream():
                body += part
                if len(body) > LARGEST_EVENT:
                    await PlainTextResponse(f"more than {LARGEST_EVENT} bytes", 413)(scope, receive, send)
                    return
            if names_address(body):
                await PlainTextResponse("a file must be one that was uploaded", 400)(scope, receive, send)
                return
            receive = _again(body, receive)
        await self.app(scope, receive, send_policy)


def names_address(body: bytes) -> bool:
    """Whether a body is JSON and a path in it is a URL."""
    try:
        return _has_address(json.loads(body))
    except RecursionError:
        return True
    except ValueError:  # no JSON
        return False


def _has_address(value: Any) -> bool:
    if isinstance(value, dict):
        path = value.get("path")
        if isinstance(path, str) and path.strip().lower().startswith(("http:", "https:")):
            return True
        value = list(value.values())
    return isinstance(value, list) and any(map(_has_address, value))


def _again(body: bytes, receive: Receive) -> Receive:
    """A body that was read, and then whatever follows."""
    left = [body]

    async def first_body() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return first_body
