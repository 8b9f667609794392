"""A hub as far as an upload asks for one: repositories are made, files come in by LFS or in a commit, and are kept."""

from __future__ import annotations

import base64
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """`files`: what a commit has put into the repository, by path. `token`: the one that is taken."""

    def __init__(self, token: str) -> None:
        self.token, self.made, self.calls = token, dict[str, Any](), Counter[str]()
        self.blobs, self.files = dict[str, bytes](), dict[str, bytes]()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def do_POST(self) -> None:
                hub.answer(self)

            def do_PUT(self) -> None:
                hub.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = request.path.partition("?")[0]
        self.calls[f"{request.command} {path.rpartition('/')[2]}"] += 1
        allowed = request.headers.get("Authorization") == f"Bearer {self.token}" or path.startswith("/blob/")
        status, said = self.said(path, body) if allowed else (401, {"error": f"bad token {self.token}"})
        data = json.dumps(said).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def said(self, path: str, body: bytes) -> tuple[int, Any]:
        if path.startswith("/blob/"):
            self.blobs[path.removeprefix("/blob/")] = body
            return 200, {}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.blobs[value["oid"]]
            return 200, {"commitUrl": f"{self.url}/me/it/commit/1", "commitOid": "1" * 40}
        asked = json.loads(body or b"{}")
        if path == "/api/repos/create":
            self.made = asked
            return 200, {"url": f"{self.url}/{asked.get('organization', 'me')}/{asked['name']}"}
        if path.endswith("/preupload/main"):
            big = (".safetensors",)
            files = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(big) else "regular",
                      "shouldIgnore": False} for f in asked["files"]]  # fmt: skip
            return 200, {"files": files}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [o | {"actions": {"upload": {"href": f"{self.url}/blob/{o['oid']}"}}} for o in asked["objects"]]
            return 200, {"transfer": "basic", "objects": objects}
        return 200, {"sha": "0" * 40, "id": "me/it", "siblings": [{"rfilename": p} for p in self.files]}
