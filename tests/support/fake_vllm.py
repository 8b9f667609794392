"""A vLLM server on transformers: the routes that the sampler uses, with a real (small) model behind them, so that what is
sampled and scored is what the weights say that were handed over. It can be told to be wrong in the ways that servers are.

As `vllm.entrypoints.openai.api_server`, it is what `serve: true` starts: see `interpreter`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Broken(Exception):
    """The connection is cut."""


class FakeVLLM:
    """`faults`, any of: no_dev (no dev routes), stale (weights are not taken over), old_head (all but the head's are),
    other_tokens, caps (completions end after 3 tokens), hangs, no_ids. `dies_after` so many completions."""

    def __init__(
        self, folder: Path | str, *faults: str, key: str = "", context: int = 256, port: int = 0, slow: float = 0.0
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.folder, self.faults, self.key, self.context, self.slow = Path(folder), set(faults), key, context, slow
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if "old_head" in self.faults:
            self.model.lm_head.weight = torch.nn.Parameter(self.model.lm_head.weight.detach().clone())
        self.adapted: Any = None
        self.dies_after: int | None = None
        self.asked: list[dict[str, Any]] = []  # bodies of completions
        self.calls: Counter[str] = Counter()
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None: ...

            def do_GET(self) -> None:
                outer._answer(self, None)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                outer._answer(self, json.loads(body or b"{}"))

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.gone = threading.Event()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> FakeVLLM:
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.die()

    def die(self) -> None:
        """From here on, nobody is here."""
        self.faults.add("dead")
        self.gone.set()
        self.http.shutdown()
        self.http.server_close()

    # --- HTTP ---

    def _answer(self, handler: Any, body: dict[str, Any] | None) -> None:
        path = handler.path.strip("/").partition("?")[0]
        try:
            if self.key and path.startswith("v1/") and handler.headers.get("authorization") != f"Bearer {self.key}":
                raise Refused(401, f"wrong key {handler.headers.get('authorization')}")
            said, status = self._do(path, body or {}), 200
        except Refused as refused:
            said, status = {"error": {"message": str(refused), "code": refused.status}}, refused.status
        except Broken:
            handler.close_connection = True
            handler.connection.close()
            return
        text = json.dumps(said).encode() if said is not None else b""
        try:
            handler.send_response(status)
            handler.send_header("content-type", "application/json")
            handler.send_header("content-length", str(len(text)))
            handler.end_headers()
            handler.wfile.write(text)
        except OSError:  # the client is gone
            handler.close_connection = True

    def _do(self, path: str, body: dict[str, Any]) -> Any:
        if "dead" in self.faults:
            raise Broken
        self.calls[path] += 1
        if path in ("collective_rpc", "reset_prefix_cache", "sleep", "wake_up") and "no_dev" in self.faults:
            raise Refused(404, "Not Found")
        if path == "v1/models":
            return {"data": [{"id": "base", "max_model_len": self.context, "root": str(self.folder)}]}
        if path == "tokenize":
            ids = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            return {"tokens": ids[::-1] if "other_tokens" in self.faults else ids}
        if path == "v1/completions":
            return {"choices": [self._complete(body)]}
        if path == "collective_rpc":
            assert body["method"] == "reload_weights"
            with self.lock:
                self._load(Path(body["kwargs"]["weights_path"]))
        elif path == "v1/load_lora_adapter":
            assert body["load_inplace"] is True
            with self.lock:
                self._adapt(body["lora_path"])
        elif path not in ("health", "reset_prefix_cache", "sleep", "wake_up"):
            raise Refused(404, "Not Found")
        return None

    # --- the model ---

    def _load(self, folder: Path) -> None:
        from safetensors.torch import load_file

        state: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            state |= load_file(file)
        if not state:
            raise Refused(500, f"no weights in {folder}")
        if "stale" in self.faults:
            return
        if "old_head" in self.faults:
            state.pop("lm_head.weight", None)
        try:
            self.model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
        except RuntimeError as error:
            raise Refused(500, str(error)) from None

    def _adapt(self, folder: str) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        if "stale" not in self.faults or self.adapted is None:
            self.adapted = PeftModel.from_pretrained(base, folder).merge_and_unload().eval()

    @torch.no_grad()
    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        if "prompt_logprobs" not in body:
            self.asked.append(body)
            if self.dies_after is not None and len(self.asked) > self.dies_after:
                self.faults.add("dead")
                threading.Thread(target=self.die, daemon=True).start()
                raise Broken
            if "hangs" in self.faults:
                self.gone.wait(30)
                raise Broken  # a model at work in a thread would abort an interpreter that ends
            time.sleep(self.slow)
        prompt, new = body["prompt"], body["max_tokens"]
        if len(prompt) + new > self.context:
            raise Refused(400, f"This model's maximum context length is {self.context} tokens")
        with self.lock:
            model = self.adapted if body["model"] == "policy" else self.model
            ids, logp = self._sample(model, body, min(new, 3) if "caps" in self.faults else new)
            given = self._of_prompt(model, prompt) if body.get("prompt_logprobs") is not None else None
        choice = {"finish_reason": "stop" if ids[-1] in body.get("stop_token_ids", ()) else "length"}
        choice |= {"logprobs": {"token_logprobs": logp}, "prompt_token_ids": prompt, "prompt_logprobs": given}
        return choice if "no_ids" in self.faults else choice | {"token_ids": ids}

    def _sample(self, model: Any, body: dict[str, Any], count: int) -> tuple[list[int], list[float]]:
        ids, logp = list(body["prompt"]), []
        draw = torch.Generator().manual_seed(body.get("seed") or 0)
        for _ in range(count):
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
            heat = body["temperature"]
            share = (
                torch.softmax(logits / heat, -1) if heat else torch.nn.functional.one_hot(logits.argmax(), len(logits))
            )
            token = int(torch.multinomial(share.float(), 1, generator=draw))
            ids.append(token)
            logp.append(float(torch.log_softmax(logits, -1)[token]))
            if token in body.get("stop_token_ids", ()):
                break
        return ids[len(body["prompt"]) :], logp

    def _of_prompt(self, model: Any, prompt: list[int]) -> list[dict[str, Any] | None]:
        logp = torch.log_softmax(model(input_ids=torch.tensor([prompt])).logits[0, :-1].float(), -1)
        return [None, *({str(i): {"logprob": float(row[i])}} for i, row in zip(prompt[1:], logp, strict=True))]


def interpreter(folder: Path, server: str = "fake_vllm", **environment: str) -> Path:
    """A Python whose `vllm.entrypoints.openai.api_server` is this file, or another `server`. `environment`:
    FAKE_DIES_ONCE=FILE makes it end at its fifth completion, once."""
    package = folder / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for part in (package, package.parent, package.parent.parent):
        (part / "__init__.py").touch()
    (package / "api_server.py").write_text(f"import {server}\n{server}.main()\n")
    path = os.pathsep.join(map(str, (folder / "site", Path(__file__).parent)))
    lines = [f"export {name}='{value}'" for name, value in {**environment, "PYTHONPATH": path}.items()]
    script = folder / "python"
    script.write_text("\n".join(["#!/bin/sh", *lines, f'exec {sys.executable} "$@"', ""]))
    script.chmod(0o755)
    return script


def main() -> None:
    given = dict(pairwise(sys.argv[1:]))
    print(f"fake vLLM in process {os.getpid()}", flush=True)
    server = FakeVLLM(given["--model"], context=int(given["--max-model-len"]), port=int(given["--port"]))
    once = os.environ.get("FAKE_DIES_ONCE")
    with server:
        while True:
            time.sleep(0.02)
            if once and len(server.asked) >= 5 and not Path(once).exists():
                Path(once).touch()
                os._exit(1)


if __name__ == "__main__":
    main()
