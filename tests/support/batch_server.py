"""A batch API as OpenAI's: files, batches, their outputs, and its refusals. True answers are those of fault_server.

Strict: a file must have the purpose "batch", a batch the one window and endpoint; lines need a unique custom_id, the
method, the batch's endpoint and one model. A file that is not so makes the batch fail in validation, with its errors.
Output lines come in another order than they were asked; what was turned away is in the error file.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections import Counter
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from fault_server import true_choice, true_score

ENDPOINT = "/v1/chat/completions"
STEPS = ("validating", "in_progress", "finalizing")  # a look at a batch takes it one further


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Broken(Exception):
    """The connection is cut."""


class BatchServer:
    """`rejected`: the share of lines that the model turns away (error file); `silent`: that have no line at all;
    `expires`: share of lines that are not asked before the batch expires; `enqueued`: most lines in batches at once;
    `refuses`: a field that no request may have. `cut`: paths (as "POST batches") whose next answer is lost after its
    work is done; `broken`: whose next answers are these statuses. While `held`, no batch gets beyond in_progress."""

    def __init__(
        self, *, rejected: float = 0.0, silent: float = 0.0, expires: float = 0.0, ends: str = "completed",
        enqueued: int | None = None, model: str = "gpt-x", key: str = "", refuses: str | None = None,
    ) -> None:  # fmt: skip
        self.rejected, self.silent, self.expires, self.ends = rejected, silent, expires, ends
        self.enqueued, self.model, self.key, self.refuses = enqueued, model, key, refuses
        self.files: dict[str, dict[str, Any]] = {}
        self.contents: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}  # oldest first
        self.asked: Counter[str] = Counter()  # by custom_id: how often the model was asked
        self.online = 0  # requests to the model outside of batches
        self.cut: list[str] = []
        self.broken: dict[str, list[int]] = {}
        self.held = False
        self.lock = threading.RLock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None: ...

            def do_GET(self) -> None:
                outer._answer(self, b"")

            def do_POST(self) -> None:
                outer._answer(self, self.rfile.read(int(self.headers.get("content-length", 0))))

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def __enter__(self) -> BatchServer:
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def _answer(self, handler: Any, content: bytes) -> None:
        split = urlsplit(handler.path)
        path, query = split.path.removeprefix("/v1/"), dict(parse_qsl(split.query))
        what = f"{handler.command} {path.split('/')[0]}"
        try:
            if self.key and handler.headers.get("authorization") != f"Bearer {self.key}":
                raise Refused(401, f"Incorrect API key provided: {handler.headers.get('authorization')}")
            if self.broken.get(what):
                raise Refused(self.broken[what].pop(0), "try again")
            with self.lock:
                said, status = self._do(handler, path, query, content), 200
            if what in self.cut:
                self.cut.remove(what)
                raise Broken
        except Refused as refused:
            said, status = {"error": {"message": str(refused), "code": refused.code}}, refused.status
        except Broken:
            handler.close_connection = True
            handler.connection.close()
            return
        body = said if isinstance(said, bytes) else json.dumps(said).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def _do(self, handler: Any, path: str, query: dict[str, str], content: bytes) -> Any:
        parts = path.split("/")
        if handler.command == "POST" and parts == ["files"]:
            return self._upload(handler.headers["content-type"], content)
        if handler.command == "GET" and parts == ["files"]:
            return self._page([f for f in self.files.values() if f["purpose"] == query.get("purpose")], query)
        if parts[0] == "files" and parts[-1] == "content":
            return self._known(self.contents, parts[1])
        if handler.command == "POST" and parts == ["batches"]:
            return self._make(json.loads(content))
        if handler.command == "GET" and parts == ["batches"]:
            return self._page(list(self.batches.values()), query)
        if parts[0] == "batches" and handler.command == "GET":
            return self._step(self._known(self.batches, parts[1]))
        self.online += path == "chat/completions"
        raise Refused(404, f"Invalid URL ({handler.command} {path})")

    def _known(self, of: dict[str, Any], name: str) -> Any:
        if name not in of:
            raise Refused(404, f"No such object: {name}")
        return of[name]

    def _page(self, items: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
        """Newest first, two at a time at most, so that a reader must turn pages."""
        items = items[::-1]
        if "after" in query:
            items = items[[item["id"] for item in items].index(query["after"]) + 1 :]
        page = items[: min(2, int(query.get("limit", 20)))]
        return {"object": "list", "data": page, "has_more": len(items) > len(page),
                "first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}  # fmt: skip

    def _upload(self, kind: str, content: bytes) -> dict[str, Any]:
        form = BytesParser(policy=HTTP).parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + content)
        fields = {part.get_param("name", header="content-disposition"): part for part in form.iter_parts()}
        file = fields["file"]
        return self._keep(file.get_filename(), fields["purpose"].get_payload().strip(), file.get_payload(decode=True))

    def _keep(self, name: str, purpose: str, content: bytes) -> dict[str, Any]:
        made = {"id": f"file-{len(self.files)}", "object": "file", "bytes": len(content), "created_at": int(time.time()),
                "filename": name, "purpose": purpose, "status": "processed"}  # fmt: skip
        self.files[made["id"]], self.contents[made["id"]] = made, content
        return made

    def _make(self, asked: dict[str, Any]) -> dict[str, Any]:
        file = self._known(self.files, asked["input_file_id"])
        if file["purpose"] != "batch":
            raise Refused(400, f"Invalid file purpose: expected 'batch', got '{file['purpose']}'.")
        if asked.get("completion_window") != "24h":
            raise Refused(400, "Invalid value: 'completion_window' must be '24h'.")
        if asked.get("endpoint") != ENDPOINT:
            raise Refused(400, f"Invalid value: {asked.get('endpoint')!r}.")
        made = {"id": f"batch_{len(self.batches)}", "object": "batch", "endpoint": ENDPOINT, "errors": None,
                "input_file_id": file["id"], "completion_window": "24h", "status": "validating",
                "created_at": int(time.time()), "metadata": asked.get("metadata"), "output_file_id": None,
                "error_file_id": None, "request_counts": {"total": 0, "completed": 0, "failed": 0}}  # fmt: skip
        self.batches[made["id"]] = made
        return dict(made)

    # --- a batch's life ---

    def _step(self, batch: dict[str, Any]) -> dict[str, Any]:
        seen = dict(batch)
        if batch["status"] == "validating":
            rows, errors = self._validated(self.contents[batch["input_file_id"]].decode())
            batch["request_counts"]["total"] = len(rows)
            if errors:
                batch |= {"status": "failed", "errors": {"object": "list", "data": errors}}
            else:
                batch["status"] = "in_progress"
        elif batch["status"] == "in_progress" and not self.held:
            batch["status"] = "finalizing"
        elif batch["status"] == "finalizing":
            self._run(batch)
        return seen

    def _validated(self, text: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        rows: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []

        def wrong(line: int | None, code: str, message: str, param: str | None = None) -> None:
            errors.append({"code": code, "line": line, "message": message, "param": param})

        for number, row in enumerate(text.splitlines(), 1):
            try:
                rows.append(json.loads(row))
            except ValueError:
                wrong(number, "invalid_json_line", "This line is not parseable as valid JSON.")
        ids = Counter(row.get("custom_id") for row in rows)
        models = [row.get("body", {}).get("model") for row in rows]
        for number, row in enumerate(rows, 1):
            if not re.fullmatch(r".{1,64}", str(row.get("custom_id") or "")):
                wrong(number, "invalid_custom_id", "custom_id: a string of at most 64 characters", "custom_id")
            elif ids[row["custom_id"]] > 1:
                wrong(number, "duplicate_custom_id", f"The custom_id '{row['custom_id']}' is not unique.", "custom_id")
            if row.get("method") != "POST":
                wrong(number, "invalid_method", "Invalid method: must be POST.", "method")
            if row.get("url") != ENDPOINT:
                wrong(number, "mismatched_url", f"The URL {row.get('url')!r} is not the batch's endpoint.", "url")
            if models[number - 1] != models[0]:
                wrong(number, "mismatched_model", "All requests of a batch must be to the same model.", "body.model")
        if rows and models[0] != self.model and not errors:
            wrong(None, "model_not_found", f"The provided model '{models[0]}' is not supported by the Batch API.")
        running = [b["request_counts"]["total"] for b in self.batches.values() if b["status"] in STEPS[1:]]
        if self.enqueued is not None and len(rows) + sum(running) > self.enqueued:
            wrong(None, "token_limit_exceeded", f"Enqueued token limit reached for {self.model} in organization org-1.")
        if not rows:
            wrong(None, "empty_file", "The input file is empty.")
        return rows, errors

    def _run(self, batch: dict[str, Any]) -> None:
        rows = [json.loads(row) for row in self.contents[batch["input_file_id"]].decode().splitlines()]
        late = rows[len(rows) - round(self.expires * len(rows)) :]
        out, wrong = [], []
        for number, row in enumerate(rows):
            line = {"id": f"batch_req_{number}", "custom_id": row["custom_id"], "response": None, "error": None}
            if row in late:
                said = "This request could not be executed before the completion window expired."
                wrong.append(line | {"error": {"code": f"batch_{self.ends}", "message": said}})
                continue
            status, body = self._reply(row["body"], number / len(rows))
            if status:
                response = {"status_code": status, "request_id": f"req_{number}", "body": body}
                (out if status == 200 else wrong).append(line | {"response": response})
            if status == 200:
                self.asked[row["custom_id"]] += 1
        random.Random(0).shuffle(out)
        for name, lines in (("output", out), ("error", wrong)):
            if lines:
                content = "".join(json.dumps(line) + "\n" for line in lines).encode()
                batch[f"{name}_file_id"] = self._keep(f"{batch['id']}_{name}.jsonl", "batch_output", content)["id"]
        batch["request_counts"] |= {"completed": len(out), "failed": len(wrong)}
        batch["status"] = self.ends if late or self.ends == "cancelled" else "completed"

    def _reply(self, body: dict[str, Any], at: float) -> tuple[int, Any]:
        """What the model says, by the row's place within the file."""
        if self.refuses in body:
            said = f"Unsupported parameter: '{self.refuses}' is not supported with this model. Use another instead."
            error = {"message": said, "type": "invalid_request_error", "param": self.refuses,
                     "code": "unsupported_parameter"}  # fmt: skip
            return 400, {"error": error}
        if at < self.rejected:
            return 500, {"error": {"message": "The server had an error processing your request.", "code": None}}
        if at < self.rejected + self.silent:
            return 0, None
        text = body["messages"][-1]["content"]
        two = len(re.findall(r"quality-\d+", text)) == 2
        said = "I will not say." if "quality-none" in text else str(true_choice(text) if two else true_score(text))
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        return 200, {"id": "x", "object": "chat.completion", "choices": [choice], "usage": {
            "prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}}  # fmt: skip
