"""A judge that lies about nothing but fails in every way: an OpenAI-compatible server with injected faults.

True answers are a function of the judged text alone, so a test can say of every label whether it is right:
a text that holds `quality-N` is worth N; the first of two is better when its N is larger; a prompt that ends with
"Ranking:" is answered with the order by N; anything else is worth 1 + sha256(user message) mod 10.
`GET /stats` tells what was asked, bought and how much ran at once.

    python tests/support/fault_server.py --faults 0.3 --latency 0.05     # prints its base URL, then serves
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

KINDS = ("429", "500", "hang", "cut", "malformed", "no_choice", "truncated", "refusal", "slow")
PASSING = ("429", "500", "hang", "cut", "malformed", "no_choice", "slow")  # a later attempt gets the label
REPLIES = ("SCORE: {}", "{}", "The answer is fair.\n\nSCORE: {}", "**{}**", "{}/10", "<think>perhaps a 3?</think>\n{}")
HEAD = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n"


def key_of(text: str) -> str:
    """What a success is counted under: its judged text."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def true_score(text: str) -> int:
    found = re.search(r"quality-(\d+)", text)
    return int(found[1]) if found else 1 + int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10


def true_choice(text: str) -> int:
    first, second = (int(n) for n in re.findall(r"quality-(\d+)", text)[:2])
    return 1 if first > second else 2


def true_ranking(text: str) -> str:
    """As "2 > 1 = 3": the numbers of the responses shown, by their qualities."""
    shown = [int(n) for n in re.findall(r"quality-(\d+)", text)]
    tiers = [[str(i) for i, n in enumerate(shown, 1) if n == quality] for quality in sorted({*shown}, reverse=True)]
    return " > ".join(" = ".join(tier) for tier in tiers)


@dataclass
class Stats:
    calls: int = 0  # requests that arrived
    tokens: int = 0  # prompt and completion tokens of the replies that were served
    at_once: int = 0
    most_at_once: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    bought: Counter[str] = field(default_factory=Counter)  # right answers served, by `key_of` what was judged

    def as_json(self) -> dict[str, Any]:
        twice = sum(n - 1 for n in self.bought.values())
        served = {"successes": sum(self.bought.values()), "distinct": len(self.bought), "bought_twice": twice}
        return {**vars(self), "faults": dict(self.faults), "bought": None, **served}


class FaultServer:
    """Runs in a thread of its own (`with FaultServer(...) as server`) or as a process (see the module)."""

    def __init__(
        self, *, faults: float = 0.0, kinds: tuple[str, ...] = KINDS, latency: float = 0.0, retry_after: str = "0.05",
        hang: float = 30.0, slow: float = 0.3, seed: int = 0, key: str | None = None, port: int = 0,
        usage: tuple[int, int] | None = None, reply: str | None = None, status: int | None = None,
    ) -> None:  # fmt: skip
        self.faults, self.kinds, self.latency, self.retry_after = faults, kinds, latency, retry_after
        self.hang, self.slow, self.key, self.port = hang, slow, key, port
        self.usage, self.reply, self.status = usage, reply, status
        self.stats, self.random = Stats(), random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> FaultServer:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        self._loop.run_until_complete(self.start())
        self._ready.set()
        self._loop.run_forever()
        self._listening.close()
        connections = asyncio.all_tasks(self._loop)
        for task in connections:
            task.cancel()
        self._loop.run_until_complete(asyncio.wait([*connections, self._loop.create_task(asyncio.sleep(0))]))
        self._loop.close()

    async def start(self) -> asyncio.Server:
        self._listening = server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = re.search(r"(?i)content-length: (\d+)", head)
                body = await reader.readexactly(int(length[1])) if length else b""
                path = head.split(" ", 2)[1]
                if path == "/stats":
                    self._send(writer, 200, json.dumps(self.stats.as_json()).encode())
                else:
                    await self._answer(path, head, json.loads(body), reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            return
        finally:
            writer.close()

    def _send(self, writer: asyncio.StreamWriter, status: int, body: bytes, header: bytes = b"") -> None:
        writer.write(HEAD % (status, len(body), header) + body)

    async def _answer(
        self, path: str, head: str, request: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.stats.calls += 1
        self.stats.at_once += 1
        self.stats.most_at_once = max(self.stats.most_at_once, self.stats.at_once)
        try:
            await asyncio.sleep(self.latency)
            if reader.at_eof():  # the client is gone; as vLLM does, nothing is generated for it
                raise ConnectionError
            if self.key and f"Bearer {self.key}" not in head:
                error = {"error": {"message": f"Incorrect API key provided: {head}"}}
                return self._send(writer, 401, json.dumps(error).encode())
            if self.status:
                return self._send(writer, self.status, b'{"error": {"message": "no such model"}}')
            if self.random.random() < self.faults:
                await self._fault(self.random.choice(self.kinds), request, writer)
            else:
                self._succeed(path, request, writer)
        finally:
            self.stats.at_once -= 1

    async def _fault(self, kind: str, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.stats.faults[kind] += 1
        if kind == "429":
            self._send(
                writer, 429, b'{"error": {"message": "slow down"}}', b"Retry-After: %s\r\n" % self.retry_after.encode()
            )
        elif kind == "500":
            self._send(writer, 500, b'{"error": {"message": "boom"}}')
        elif kind == "hang":
            await asyncio.sleep(self.hang)
            raise ConnectionError
        elif kind == "cut":
            writer.write(HEAD % (200, 500, b"") + b'{"choices": [{"mess')
            raise ConnectionError
        elif kind == "malformed":
            self._send(writer, 200, b'{"choices": [{"message": {"content": "SCORE: 1"')
        elif kind == "no_choice":
            self._send(writer, 200, b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 0}}')
        elif kind == "truncated":
            self._send(writer, 200, self._chat(request, "The response begins well, and", "length"))
        elif kind == "refusal":
            self._send(writer, 200, self._chat(request, "I'm sorry, but I can't help with that.", "stop"))
        else:
            await asyncio.sleep(self.slow)
            self._succeed("/v1/chat/completions", request, writer)

    def _succeed(self, path: str, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        text = request["messages"][-1]["content"] if "messages" in request else request["input"]
        if path.endswith("/classify"):
            body = {"data": [{"index": 0, "label": "LABEL_0", "probs": [float(true_score(text))], "num_classes": 1}]}
        elif path.endswith("/pooling"):
            body = {"data": [{"index": 0, "object": "pooling", "data": [float(true_score(text))]}]}
        else:
            pair = len(re.findall(r"quality-\d+", text)) == 2
            shape = REPLIES[len(text) % len(REPLIES)]
            reply = str(true_choice(text)) if pair else shape.format(true_score(text))
            reply = true_ranking(text) if text.rstrip().endswith("Ranking:") else reply
            body = json.loads(self._chat(request, self.reply or reply, "stop"))
        body.setdefault("usage", {"prompt_tokens": 40, "completion_tokens": 0})
        self.stats.tokens += 0 if "choices" in body else 40
        self._send(writer, 200, json.dumps(body).encode())
        self.stats.bought[key_of(text)] += 1

    def _chat(self, request: dict[str, Any], text: str, finish: str) -> bytes:
        prompt = sum(len(m["content"]) for m in request["messages"]) // 4
        usage = (prompt, 1 + len(text) // 4)
        if self.usage:  # anything up to what the request allows
            usage = (self.random.randint(1, prompt * 4), self.random.randint(1, request["max_tokens"]))
        self.stats.tokens += sum(usage)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
        return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": counts}).encode()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    for option, default in (("faults", 0.0), ("latency", 0.05), ("hang", 30.0), ("slow", 0.3)):
        parser.add_argument(f"--{option}", type=float, default=default)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    options = vars(parser.parse_args())
    server = FaultServer(**{**options, "kinds": tuple(options["kinds"])})
    listening = await server.start()
    print(server.url, flush=True)
    await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
