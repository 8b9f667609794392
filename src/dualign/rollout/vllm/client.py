"""One vLLM server over HTTP: what is asked of it, and what went wrong in words."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualign.rollout.base import Sampling

ADAPTER = "policy"  # what the run's adapter is called on a server
PLAIN = {  # whatever a model's own generation_config.json says, these are what a policy is sampled with
    "n": 1, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "add_special_tokens": False, "ignore_eos": True, "logprobs": 0, "return_token_ids": True,
}  # fmt: skip
DEV = "it lacks the routes that weights are handed over by: start it with VLLM_SERVER_DEV_MODE=1"


@dataclass
class ServerFault(Exception):
    """What a server did wrong, for people. `gone`: it cannot be reached, as if it had died."""

    message: str
    status: int = 0  # of HTTP, where it answered
    gone: bool = False

    def __str__(self) -> str:
        return self.message


class Server:
    """Used within `async with`. `key`: what it wants as a key; it is never in a message."""

    def __init__(self, url: str, key: str, timeout: float) -> None:
        self.url, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout
        self._key = key or "none"
        self.model = ""  # its name for what it serves
        self.context = 0  # tokens of a prompt and its completion
        self.in_flight = 0

    async def __aenter__(self) -> Server:
        from openai import AsyncOpenAI, Timeout

        patience = Timeout(None, connect=min(30.0, self.timeout))
        self._client = AsyncOpenAI(base_url=self.url, api_key=self._key, max_retries=0, timeout=patience)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.close()

    async def call(self, path: str, body: Mapping[str, Any] | None = None, within: float | None = None) -> Any:
        """The JSON (or text) that it answers a POST of `body` with, or a GET without one. Raises ServerFault."""
        import openai

        client, within = self._client, within or self.timeout
        try:
            async with asyncio.timeout(None if within == math.inf else within):
                text = await (
                    client.get(path, cast_to=str) if body is None else client.post(path, body=dict(body), cast_to=str)
                )
        except openai.APIStatusError as error:
            said = self._clean(_message(error.body) or str(error.message))
            raise ServerFault(f"{self.url}: HTTP {error.status_code} from {path}: {said}", error.status_code) from None
        except (TimeoutError, openai.APITimeoutError):
            raise ServerFault(f"{self.url}: no answer from {path} within {within:g} s", gone=True) from None
        except openai.APIConnectionError as error:
            cause = type(error.__cause__).__name__
            what = "cannot be reached" if "connect" in cause.lower() else "the connection was cut"
            raise ServerFault(f"{self.url}: {what} ({path})", gone=True) from None
        try:
            return json.loads(text) if text else None
        except ValueError:
            return text

    def _clean(self, text: str) -> str:
        return re.sub(r"\s+", " ", text.replace(self._key, "***"))[:300]

    # --- what it is ---

    async def look(self) -> None:
        """Finds out what it serves and how long a text may be. Raises ServerFault for no vLLM, or one without the routes
        that a run needs."""
        models = await self.call("v1/models", within=60)
        try:
            served = models["data"][0]
            self.model, self.context = str(served["id"]), int(served["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise ServerFault(f"{self.url}: it does not say what it serves (v1/models): is it a vLLM server?") from None
        await self.forget_prompts()

    async def alive(self) -> bool:
        try:
            await self.call("health", within=10)
        except ServerFault:
            return False
        return True

    async def tokens(self, text: str) -> list[int] | None:
        """A text's token ids by its own tokenizer; None where it does not tell."""
        try:
            said = await self.call("tokenize", {"model": self.model, "prompt": text, "add_special_tokens": False})
        except ServerFault as fault:
            if fault.gone:
                raise
            return None
        return said.get("tokens") if isinstance(said, dict) else None

    # --- weights ---

    async def load(self, folder: Path) -> None:
        """Weights of the same shapes, from a folder that the server sees."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        await self._dev("collective_rpc", {**body, "timeout": self.timeout})
        await self.forget_prompts()

    async def load_adapter(self, folder: Path) -> None:
        body = {"lora_name": ADAPTER, "lora_path": str(folder), "load_inplace": True}
        await self._dev(
            "v1/load_lora_adapter", body, "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        )
        self.model = ADAPTER
        await self.forget_prompts()

    async def forget_prompts(self) -> None:
        """Keys and values of prompts, by other weights, are used no more."""
        await self._dev("reset_prefix_cache", {})

    async def sleep(self) -> None:
        """Gives its GPU's memory back; the weights wait in the host's."""
        await self._dev("sleep?level=1", {})

    async def wake(self) -> None:
        await self._dev("wake_up", {})

    async def _dev(self, path: str, body: Mapping[str, Any], remedy: str = DEV) -> None:
        try:
            await self.call(path, body)
        except ServerFault as fault:
            if fault.status in (404, 405):
                raise ServerFault(f"{self.url}: {remedy} (no route {path})", fault.status) from None
            raise

    # --- what it says ---

    async def log_probs(self, ids: Sequence[int]) -> list[float]:
        """log π(token | before), untempered, of all but the first."""
        body = PLAIN | {
            "model": self.model,
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": 0,
        }
        choice = _choice(self, await self.call("v1/completions", body))
        try:
            given = choice["prompt_logprobs"][1:]
            return [float(each[str(i)]["logprob"]) for i, each in zip(ids[1:], given, strict=True)]
        except (KeyError, TypeError, ValueError):
            raise ServerFault(f"{self.url}: no log-probs of a prompt in its reply (prompt_logprobs)") from None

    async def complete(
        self, prompt_ids: Sequence[int], sampling: Sampling, seed: int, ends: Collection[int]
    ) -> tuple[list[int], list[float]]:
        """One completion, up to one of the tokens `ends`, and its tokens' log-probs, untempered. Waits as long as it
        takes."""
        body = PLAIN | {
            "model": self.model, "prompt": list(prompt_ids), "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": seed, "stop_token_ids": sorted(ends),
        }  # fmt: skip
        self.in_flight += 1
        try:
            choice = _choice(self, await self.call("v1/completions", body, within=math.inf))
        finally:
            self.in_flight -= 1
        try:
            ids = [int(i) for i in choice["token_ids"]]
            logp = [float(x) for x in choice["logprobs"]["token_logprobs"]]
            asked = choice.get("prompt_token_ids")
        except (KeyError, TypeError, ValueError):
            raise ServerFault(f"{self.url}: no token ids or log-probs in its reply: its vLLM is too old") from None
        if len(ids) != len(logp) or not ids or (asked is not None and list(asked) != list(prompt_ids)):
            raise ServerFault(f"{self.url}: its reply is of another prompt, or has not one log-prob for each token")
        if ids[-1] not in ends and len(ids) < sampling.max_new_tokens:
            raise ServerFault(
                f"{self.url}: it ended a completion after {len(ids)} of {sampling.max_new_tokens} tokens at none of ours "
                f"({choice.get('finish_reason')}): the model's own settings are at work; start it with "
                "--generation-config vllm and a sufficient --max-model-len"
            )
        return ids, logp


def _choice(server: Server, reply: Any) -> Mapping[str, Any]:
    try:
        choice = reply["choices"][0]
        return choice if isinstance(choice, dict) else {}
    except (KeyError, IndexError, TypeError):
        raise ServerFault(f"{server.url}: its reply holds no completion") from None


def _message(body: Any) -> str:
    """The words of an error's body, in the forms that vLLM gives it."""
    if isinstance(body, dict):
        inner = body.get("error", body)
        return str(inner.get("message") or inner.get("detail") or inner) if isinstance(inner, dict) else str(inner)
    return str(body or "")
