"""The server of `dualign view` in a thread, and questions to it."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from dualign.eval.view import _listen
from dualign.eval.view.server import application


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return None


@dataclass(frozen=True)
class Served:
    address: str

    def get(self, path: str, headers: dict[str, str] | None = None, method: str = "GET", **params: Any) -> Answer:
        query = urllib.parse.urlencode(params, doseq=True, errors="surrogatepass")
        request = urllib.request.Request(f"{self.address}{path}{'?' + query if query else ''}", method=method)
        for key, value in (headers or {}).items():
            request.add_header(key, value)
        try:
            with urllib.request.build_opener(_Stay).open(request, timeout=30) as reply:
                return Answer(reply.status, dict(reply.headers), reply.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, dict(error.headers), error.read())

    def api(self, name: str, **params: Any) -> Any:
        found = self.get(f"/api/{name}", **params)
        assert found.status == 200, found.body
        return found.json


@contextmanager
def serving(root: Path, token: str | None = None) -> Iterator[Served]:
    listening = _listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    settings = uvicorn.Config(application(root, token, port), log_level="warning", access_log=False, lifespan="off")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Served(f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        thread.join(10)
