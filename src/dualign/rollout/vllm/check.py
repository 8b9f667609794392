"""Whether servers have the policy's weights: by what they say of a text that is always the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dualign.models.packing import Tokens
from dualign.models.policy import Policy
from dualign.models.tokenizer import Tokenizer
from dualign.rollout.vllm.client import Server, ServerFault

TEXT = (
    "In 1847 the harbour of Valparaíso saw 312 ships; by noon, a clerk wrote “wind from the north-west” and closed his "
    "book. def area(r): return 3.14159 * r ** 2  # square metres. Why do leaves fall? 叶子为什么会落下? 🙂"
)
TOKENS = 96  # of it, at most
ROUNDING = {"bf16": 0.1, "fp32": 0.01}  # nats a token, on average, by which a server may differ from the policy
MOVED = 1e-4  # the same, by which new weights show


class Check:
    """`rough`: whether servers compute in 16 bits whatever the policy does. All but `ask_policy` raise ServerFault."""

    def __init__(self, policy: Policy, tokenizer: Tokenizer, rough: bool) -> None:
        self.policy, self.rounding = policy, ROUNDING["bf16" if rough else policy.precision]
        self.text = tuple(tokenizer.hf(TEXT, add_special_tokens=False)["input_ids"])
        self.ids = self.text[:TOKENS]
        self.pad_id = tokenizer.pad_id
        self.expected: list[float] = []  # what the policy says
        self.said: dict[tuple[str, tuple[float, ...]], list[float]] = {}  # what servers said, and the policy said then

    def ask_policy(self) -> None:
        """log π_θ of every token but the first, by the trainer's own forward pass, which all processes make together where
        the policy is divided."""
        policy: Policy = self.policy.divided() if self.policy.divided else self.policy
        training, text = policy.training, Tokens((self.ids[:1],), (self.ids[1:],), (0,))
        policy.eval()
        with torch.no_grad():
            self.expected = policy(policy.pack(text, [0], self.pad_id))[0].tolist()
        policy.train(training)

    async def tokenizer(self, server: Server) -> None:
        """The same as the policy's, as far as the server tells."""
        found = await server.tokens(TEXT)
        if found is not None and tuple(found) != self.text:
            raise ServerFault(f"{server.url}: {server.model} has another tokenizer than {self.policy.name}")

    async def turned(self, server: Server) -> None:
        """It has weights by which every token means the one before it, as it was told to."""
        rows = self.policy.model.get_input_embeddings().num_embeddings
        said = await server.log_probs([(i + 1) % rows for i in self.ids])
        self._hold(
            server,
            said,
            "it does not take the weights that it is sent: it serves another model, or leaves its embedding or head as they "
            "were (as vLLM's CPU build does where they are tied; serve: true goes round it)",
        )

    async def weights(self, server: Server) -> None:
        """It says what the policy says; and not, to the last bit, what it said when the policy said something else."""
        said = await server.log_probs(self.ids)
        self._hold(server, said, "it does not have the policy's weights")
        then = self.said.setdefault((server.url, tuple(said)), self.expected)
        if (moved := distance(then, self.expected)) > MOVED:
            raise ServerFault(
                f"{server.url}: it has old weights: of a known text it says what it said before, to the last bit, though the "
                f"policy has moved by {moved:.2g} nats a token"
            )

    def _hold(self, server: Server, said: Sequence[float], wrong: str) -> None:
        gap = distance(said, self.expected)
        if not gap <= self.rounding:
            raise ServerFault(
                f"{server.url}: {wrong}: its log-probs of a known text are {gap:.2g} nats a token from the policy's, where "
                f"rounding explains {self.rounding:g}"
            )


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Nats a token, on average."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / max(1, len(one))
