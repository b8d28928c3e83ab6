"""A stand-in of the Hugging Face hub on 127.0.0.1: as much of it as huggingface_hub asks for."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_that_may_write"
Repositories = dict[str, dict[str, bytes]]
"""Contents by file by repository."""


class Handler(BaseHTTPRequestHandler):
    repositories: Repositories
    tokens: list[str | None]

    def answer(self, body: bytes, kind: str = "application/json", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if api else parts
        what, _revision, *file = rest or ["revision", "main"]
        files = self.repositories.get(f"{owner}/{name}")
        if files is None:
            self.answer(b"{}", status=404, X_Error_Code="RepoNotFound")
        elif what == "revision":
            siblings = [{"rfilename": file} for file in files]
            about = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
            about |= {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
            self.answer(json.dumps(about).encode())
        elif what == "tree":
            tree = [{"type": "file", "path": file, "size": len(x), "oid": "0"} for file, x in files.items()]
            self.answer(json.dumps(tree).encode())
        else:
            body = files["/".join(file)]
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            self.answer(body, "application/octet-stream", X_Repo_Commit=COMMIT, ETag=etag)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.tokens.append(self.headers["Authorization"])
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.tokens[-1] != f"Bearer {TOKEN}":
            self.answer(b"{}", status=403)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            self.repositories.setdefault(f"{asked['organization']}/{asked['name']}", {})
            self.answer(json.dumps({"url": f"https://huggingface.co/{asked['organization']}/{asked['name']}"}).encode())
        elif self.path == "/api/validate-yaml":
            self.answer(b'{"errors": [], "warnings": []}')
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(json.dumps({"files": files}).encode())
        else:
            repository = "/".join(self.path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repositories[repository][line["value"]["path"]] = content
            url = f"https://huggingface.co/{repository}/commit/{COMMIT}"
            self.answer(json.dumps({"commitUrl": url, "commitOid": COMMIT, "success": True}).encode())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(repositories: Repositories, port: int) -> Iterator[list[str | None]]:
    """On a port of this machine; the authorisations of the writes it got."""
    handler = type("Hub", (Handler,), {"repositories": repositories, "tokens": []})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield handler.tokens
    finally:
        server.shutdown()
        server.server_close()
