"""Samples from vLLM servers: weights go there by a folder, and are checked there before anything is sampled."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Container, Iterable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TypeVar

import torch

from dualign.common.child import Child, free_port, vllm_command
from dualign.common.errors import StopRun, UserError
from dualign.common.paths import cache_dir, path_of
from dualign.common.processes import Processes
from dualign.common.types import Rollout
from dualign.models.load import context_of
from dualign.models.policy import Policy
from dualign.models.tokenizer import Tokenizer
from dualign.rollout.base import Request, Sampling, Weights, finished, seed_of
from dualign.rollout.settings import VLLMSettings
from dualign.rollout.vllm.check import Check
from dualign.rollout.vllm.client import Server, ServerFault
from dualign.rollout.vllm.weights import Folders, is_tied

X = TypeVar("X")
Row = tuple[Request, int]  # one completion to be drawn: its prompt, and its number in the online batch
CONTEXT = 8192  # tokens that a server of our own sees, at most, unless told
TRIES = 3  # of a completion whose connection was cut by a server that lives
RESTARTS = 2  # of a server of our own while a batch is drawn


class VLLMSampler:
    """Of several processes each draws its share. Where servers were given (`url`), the first process hands weights to
    all of them; a server of our own (`serve`) belongs to the first process of its machine. What one finds wrong, all
    raise: each call here is made by all processes together."""

    def __init__(self, settings: VLLMSettings, policy: Policy, tokenizer: Tokenizer) -> None:
        self.settings, self.policy, self.tokenizer = settings, policy, tokenizer
        self.processes = Processes.current()
        self.child: Child | None = None  # the server that this process has started
        self.used: list[Server] = []  # what this process draws from
        self.owned: list[Server] = []  # what it hands weights to
        self.drawn = self.asleep = False
        self.context = 0  # tokens of a prompt and its completion
        self.base: Path | None = None  # the model under adapters that our own server begins with
        self.folder: Path | None = None  # the weights that servers have now
        self.check = Check(policy, tokenizer, rough=settings.dtype in ("bfloat16", "float16"))
        if settings.serve:
            self._serve()
        else:
            self._find()
        self.check.ids = self.check.ids[: self.context - 1]
        untie = is_tied(policy) and policy.device.type == "cpu" and settings.serve  # see docs/vllm.md
        place = path_of(settings.weights_dir) if settings.weights_dir else cache_dir() / "weights"
        self.folders = Folders(place, policy, tokenizer, untie, writer=bool(self.owned))
        self.processes.everyones(lambda: self.folders.make() if self.owned else ())

    def _serve(self) -> None:
        """A place for a server on each machine: it is started with the first weights."""
        machine, first = self.processes.machine
        ports = dict(self.processes.gather([(machine, free_port())] if first else []))
        self.context = min(self.settings.max_model_len or CONTEXT, context_of(self.policy.model.config))
        self.used = [Server(f"http://127.0.0.1:{ports[machine]}", "", self.settings.timeout)]
        self.owned = self.used if first else []

    def _find(self) -> None:
        """The servers that were given. Raises UserError for one that cannot be reached, lacks routes, or has another
        tokenizer."""
        key = os.environ.get(self.settings.api_key_env, "").strip()
        servers = [Server(url, key, self.settings.timeout) for url in self.settings.urls]
        rank, world = self.processes.rank, self.processes.world
        self.used = servers[rank::world] or [servers[rank % len(servers)]]
        self.owned = servers if rank == 0 else []

        async def look(server: Server) -> None:
            await server.look()
            await self.check.tokenizer(server)

        self.processes.everyones(lambda: self._each(look))
        told = self.processes.gather([(server.model, server.context) for server in self.owned])
        for server, (model, context) in zip(servers, told, strict=True):
            server.model, server.context = model, context
        self.context = min(server.context for server in servers)

    # --- weights ---

    def sync(self, weights: Weights) -> None:
        """Raises UserError where a server does not take the weights and nothing was sampled yet, StopRun later."""
        self.check.ask_policy()
        if self.folder is None:
            self.processes.everyones(lambda: self._begin(weights))
        folder = self.processes.everyones(lambda: [self._write(weights)])[0]
        names = dict(self.processes.everyones(lambda: self._hand_over(folder)))
        for server in self.used:  # an adapter has a name of its own, which all processes must ask for
            server.model = names[server.url]

    @property
    def adapted(self) -> bool:
        return hasattr(self.policy.model, "peft_config")

    def _begin(self, weights: Weights) -> Sequence[None]:
        """Starts our own server, and tries out whether a server really takes what it is given: first it gets weights by
        which every token means its neighbour."""
        if self.adapted:
            self.base = self.folders.base() if self.settings.serve else None
            return ()
        folder = self.folders.whole(weights, turned=True)
        if self.owned:
            self._load(folder)
            self._each(self.check.turned)
        return ()

    def _write(self, weights: Weights) -> Path:
        return self.folders.adapter() if self.adapted else self.folders.whole(weights)

    def _hand_over(self, folder: Path) -> Sequence[tuple[str, str]]:
        """Loads weights into the servers of this process, and checks that they have them; by URL, the names of what they
        serve."""
        self.folder = folder
        if self.owned:
            self._wake()
            self._load(folder)
            self._each(self.check.weights)
        return [(server.url, server.model) for server in self.owned]

    def _load(self, folder: Path) -> None:
        if self.child is None and self.settings.serve:
            self.child = self._new_child()
        if self.child is not None and not self.child.alive:
            self._start(self.child, folder)
            if not self.adapted:
                return
        adapted = self.adapted
        self._each(lambda server: server.load_adapter(folder) if adapted else server.load(folder))

    def _new_child(self) -> Child:
        more = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_NO_USAGE_STATS": "1"}
        log = self.folders.place.with_name(f"{self.folders.place.name}.log")
        return Child("the vLLM server", log, int(self.used[0].url.rpartition(":")[2]), more)

    def _options(self) -> list[str]:
        s, lora = self.settings, self.policy.model.peft_config["default"] if self.adapted else None
        dtype = {torch.bfloat16: "bfloat16", torch.float32: "float32"}[self.policy.dtype]
        options = ["--served-model-name", "base", "--dtype", dtype if s.dtype == "auto" else s.dtype]
        options += ["--max-model-len", str(self.context), "--generation-config", "vllm", "--seed", "0"]
        options += ["--tensor-parallel-size", str(s.tensor_parallel), "--gpu-memory-utilization", str(s.gpu_memory)]
        if self.policy.device.type == "cuda":
            options += ["--enable-sleep-mode"]
        else:  # vLLM's CPU build dies of a prompt in chunks whose row has a seed (0.32)
            options += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(4096, self.context))]
        if lora is not None:
            rank = next(r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= lora.r)
            options += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank)]
        return options + s.args

    def _start(self, child: Child, folder: Path) -> None:
        def answers() -> bool:
            return asyncio.run(_within(self.used[:1], lambda server: server.alive()))[0]

        model, options = str(self.base or folder), self._options()
        command = vllm_command(self.settings.interpreter, model, child.port, options)
        child.start(command, answers, self.settings.timeout)
        self._each(lambda server: server.look())

    # --- sampling ---

    def sample(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        seed: tuple[int, int],
        done: Callable[[Rollout], None],
        held: Container[int] = (),
    ) -> None:
        """Calls `done` once per completion, as it finishes. A row's random numbers are the server's, by a seed of the row's
        own; the last bits of its log-probs, and with them now and then a token, also depend on what else the server
        computes at that time. Raises StopRun for a server that fails."""
        rows = [(r, r.group * sampling.k + k) for r in requests for k in range(sampling.k)]
        left = {row[1]: row for row in rows if row[1] not in held}
        self.processes.everyones(self._ready)
        self.processes.everyones(lambda: self._draw(left, sampling, seed, done))
        self.processes.everyones(self._rest)

    def _ready(self) -> Sequence[None]:
        """Whoever started a server anew since gave it other weights."""
        if self.owned:
            if self.child is not None and not self.child.alive:
                self._restart()
            self._wake()
            self._each(self.check.weights)
        return ()

    def _draw(
        self, left: dict[int, Row], sampling: Sampling, seed: tuple[int, int], done: Callable[[Rollout], None]
    ) -> Sequence[None]:
        for attempt in range(RESTARTS + 1):
            try:
                asyncio.run(self._complete(left, sampling, seed, done))
                return ()
            except ServerFault as fault:
                if not (fault.gone and self.child is not None and attempt < RESTARTS):
                    raise self._ended(fault) from None
            self._restart()
        return ()

    async def _complete(
        self, left: dict[int, Row], sampling: Sampling, seed: tuple[int, int], done: Callable[[Rollout], None]
    ) -> None:
        """Draws the rows that are `left`, and takes out those that are done."""
        waiting, open_ = list(reversed(left.values())), dict[asyncio.Task[Rollout], Row]()
        at_once = self.settings.concurrency * len(self.used)
        async with AsyncExitStack() as stack:
            for server in self.used:
                await stack.enter_async_context(server)
            try:
                while waiting or open_:
                    while waiting and len(open_) < at_once:
                        row = waiting.pop()
                        open_[asyncio.create_task(self._one(row, sampling, seed))] = row
                        await asyncio.sleep(0)  # so that the server with the fewest is known
                    within = self.settings.timeout
                    ended, _ = await asyncio.wait(open_, timeout=within, return_when=asyncio.FIRST_COMPLETED)
                    if not ended:
                        where = ", ".join(server.url for server in self.used)
                        raise ServerFault(
                            f"{where}: none of {len(open_)} completions ended within {within:g} s", gone=True
                        )
                    for task in ended:
                        rollout = task.result()
                        del open_[task]
                        done(rollout)
                        self.drawn = True
                        del left[rollout.index]
            finally:
                for task in open_:
                    task.cancel()
                await asyncio.gather(*open_, return_exceptions=True)

    async def _one(self, row: Row, sampling: Sampling, seed: tuple[int, int]) -> Rollout:
        server = min(self.used, key=lambda s: s.in_flight)
        for attempt in range(TRIES):
            try:
                ids, logp = await server.complete(
                    row[0].prompt_ids, sampling, seed_of(seed, row[1]), self.tokenizer.eos_ids
                )
                return finished(row, self.tokenizer, ids, logp)
            except ServerFault as fault:
                if not (fault.gone or fault.status >= 500):
                    raise
                if not await server.alive():
                    fault.gone = True
                    raise
                if attempt == TRIES - 1:
                    raise
        raise AssertionError

    def _restart(self) -> None:
        """Our own server anew, with the weights that it had."""
        assert self.child is not None and self.folder is not None
        self.child.stop()
        self.asleep = False
        self._load(self.folder)
        self._each(self.check.weights)

    def _rest(self) -> Sequence[None]:
        """A server that was started anew behind our back has sampled from other weights. Our own leaves its GPU to the
        training that follows."""
        if self.owned:
            self._each(self.check.weights)
            if self.child is not None and self.policy.device.type == "cuda":
                self._each(lambda server: server.sleep())
                self.asleep = True
        return ()

    def _wake(self) -> None:
        if self.asleep:
            self._each(lambda server: server.wake())
            self.asleep = False

    def _each(self, work: Callable[[Server], Awaitable[object]]) -> Sequence[None]:
        """`work` with every server of this process at once. Raises UserError or StopRun for what goes wrong."""
        try:
            asyncio.run(_within(self.owned, work))
        except ServerFault as fault:
            raise self._ended(fault) from None
        return ()

    def _ended(self, fault: ServerFault) -> UserError | StopRun:
        log = f"; {self.child.said()}" if self.child is not None and fault.gone else ""
        if not self.drawn:
            return UserError(f"rollout.engine vllm: {fault}{log}")
        return StopRun(
            f"rollout.engine vllm: {fault}. Every completion and label so far is kept; a resume draws those that are "
            f"missing{log}"
        )

    def close(self) -> None:
        """Ends our own server, and takes the weights away."""
        if self.child is not None:
            self.child.stop()
        if self.owned:
            self.folders.remove()


async def _within(servers: Iterable[Server], work: Callable[[Server], Awaitable[X]]) -> list[X]:
    async def one(server: Server) -> X:
        async with server:
            return await work(server)

    return list(await asyncio.gather(*(one(server) for server in servers)))
