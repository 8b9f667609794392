"""A judge as `vllm.entrypoints.openai.api_server`: what `serve: MODEL` starts (fake_vllm.interpreter). Its scores are
those of fault_server. It says at the head of its log what it was started with."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fault_server import true_score


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answered = 0
    lock = threading.Lock()

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self._say(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if request["model"] != option("--served-model-name"):
            return self._say(404, {"error": {"message": f"The model {request['model']} does not exist."}})
        with self.lock:
            Handler.answered += 1
            once = os.environ.get("FAKE_DIES_ONCE")
            if once and Handler.answered > 20 and not Path(once).exists():
                Path(once).touch()
                print("CUDA error: an illegal memory access", flush=True)
                os._exit(1)
        with open(os.environ["FAKE_LOG"], "a") as log:
            log.write(json.dumps({"process": os.getpid(), "key": self.headers["authorization"]}) + "\n")
        if self.path == "/classify":
            text = request.get("input") or request["messages"][-1]["content"]
            return self._say(200, {"data": [{"probs": [true_score(text)]}], "usage": {"prompt_tokens": 9}})
        text = f"SCORE: {true_score(request['messages'][-1]['content'])}"
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        self._say(200, {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 3}})

    def _say(self, status: int, body: dict[str, Any]) -> None:
        said = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)


def main() -> None:
    given = {"argv": sys.argv[1:], "names": sorted(os.environ), "devices": os.environ.get("CUDA_VISIBLE_DEVICES")}
    print(json.dumps(given), flush=True)
    if "--dies" in sys.argv:
        print("torch.OutOfMemoryError: no room for 140 GB of weights", flush=True)
        sys.exit(1)
    if "--hangs" in sys.argv:
        time.sleep(600)
    ThreadingHTTPServer(("127.0.0.1", int(option("--port"))), Handler).serve_forever()
