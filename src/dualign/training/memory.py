"""What a run needs of memory, phase by phase and part by part, from the shapes of its models alone.

P are a model's parameters: L those of linear layers but a head's, E the rest (embedding, head, norms). In bf16, linear
layers compute in 2 bytes an entry beside fp32 masters; all else is fp32. Numbers are bytes of one process, on its GPU
or, where there is none, in the machine's memory. docs/scale.md has the layout in words, and what was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dualign.config import Config
from dualign.models.architectures import Sizes
from dualign.models.logprobs import CHUNK, GPU_CHUNK
from dualign.rollout.hf.cache import WINDOW
from dualign.rollout.hf.sampler import PREFILL, ROOM
from dualign.training.engine import SCORED
from dualign.training.optimizer import TOGETHER

PROMPT = 256  # tokens of a prompt, assumed where none were read
LIBRARIES = {"cpu": 0.6e9, "cuda": 1.5e9}  # Python and torch; CUDA's context, kernels and NCCL's buffers
FOUR_BITS = 0.52  # bytes of a weight in nf4, with its scales rounded, too
Parts = dict[str, float]


@dataclass(frozen=True)
class Place:
    """What a run is started on: processes, each with its GPU, or with its share of a machine without one."""

    processes: int = 1
    nodes: int = 1
    device: str = "cuda"  # or "cpu"
    laid_out: bool = False  # whether a CPU lays weights out for its matrix units while it decodes

    def shards(self, config: Config) -> int:
        """Among how many processes weights are divided."""
        return {"none": 1, "hybrid": self.processes // self.nodes, "full": self.processes}[config.train.shard]


@dataclass(frozen=True)
class Memory:
    """Of one run. `reference`: π_0 where model.reference names another; `reward`: bytes of reward models' weights, on the
    device and in the host's memory; `prompt`: tokens of a long prompt; `limit`: bytes of a GPU, by which rows are decoded
    together."""

    config: Config
    sizes: Sizes
    place: Place
    reference: Sizes | None = None
    reward: tuple[float, float] = (0.0, 0.0)
    prompt: int = PROMPT
    limit: float | None = None

    def phases(self) -> dict[str, Parts]:
        """Bytes by phase and part; only what is there."""
        common = self._at_rest()
        found = {
            "load": {"libraries": LIBRARIES[self.place.device], **self._loading()},
            "sample": {**common, **self._sampling()},
            "label": common,
            "score": {**common, **self._scoring()},
            "update": {**common, **self._updating()},
            "checkpoint": {**common, **self._saving()},
        }
        if self.config.algo.source != "online" and not (self.config.data.eval and self.config.reward):
            del found["sample"], found["label"]
        return {phase: {part: size for part, size in parts.items() if size} for phase, parts in found.items()}

    def host(self) -> float:
        """Bytes of the host's memory that the GPUs' processes of one node need: models on their way to the GPU, or π_0
        between its uses, whichever is more."""
        local = self.place.processes // self.place.nodes
        resting = 0.0 if self.sharded else self._reference_size()
        return local * (3e9 + self.reward[1] + max(4.0 * self.sizes.parameters, resting))

    # --- what stays ---

    @property
    def on_gpu(self) -> bool:
        return self.place.device == "cuda"

    @property
    def rounds(self) -> bool:
        return self.config.model.precision == "bf16"

    @property
    def width(self) -> int:
        """Bytes of a number in products."""
        return 2 if self.rounds else 4

    @property
    def shards(self) -> int:
        return self.place.shards(self.config)

    @property
    def sharded(self) -> bool:
        return self.config.train.shard != "none"

    @property
    def adapters(self) -> int:
        """Entries of all; a value model has as many as the policy."""
        lora, models = self.config.model.lora, 1 + self.config.algo.critic
        return self.sizes.reach * lora.r * models if lora else 0

    @property
    def whole_critic(self) -> bool:
        """Whether all weights of a value model are trained."""
        lora = self.config.model.lora
        return self.config.algo.critic and (lora is None or lora.value_model == "whole")

    @property
    def trained(self) -> list[Sizes]:
        """The models that are trained, whole ones."""
        policy = [] if self.config.model.lora else [self.sizes]
        return policy + ([self.sizes.without_head] if self.whole_critic else [])

    def _at_rest(self) -> Parts:
        """What is there in all phases but the first. A whole π_0 is out of the way."""
        resting = self._share_of(self._reference_size()) if self.sharded else 0.0
        reward = self.reward[0] if self.on_gpu else sum(self.reward)
        return {"libraries": LIBRARIES[self.place.device], **self._weights(), "π_0": resting, "reward model": reward}

    def _weights(self) -> Parts:
        """Weights and optimizer state. Divided, fp32 shares are the masters, and nothing else is there at rest but the
        head's rounding."""
        adafactor = self.config.train.optimizer == "adafactor"
        lower = 2 if adafactor else 4  # bytes of a master beside its rounded weight
        weights = masters = critic = 0.0
        if self.config.model.lora:
            weights = self._share_of(self._frozen(self.sizes)) + (2 + lower if self.rounds else 4) * self.adapters
        for i, model in enumerate(self.trained):
            if self.sharded or not self.rounds:
                own, beside = 4 * model.parameters / self.shards, 0.0
            else:
                own, beside = self._frozen(model), lower * model.linear
            if self.whole_critic and i == len(self.trained) - 1:
                critic = own + beside
            else:
                weights, masters = own, beside
        if (
            self.config.algo.critic and not self.whole_critic and self.sharded
        ):  # else its frozen weights are the policy's
            critic = self._frozen(self.sizes.without_head) / self.shards
        state = sum(4 * m.rows if adafactor else 8 * m.parameters for m in self.trained) + 8 * self.adapters
        return {
            "weights": weights,
            "masters": masters,
            "rounded head": 2.0 * self.sizes.head * self.rounds * self.sharded,
            "value model": critic,
            "optimizer": state / self.shards,
        }

    def _frozen(self, model: Sizes) -> float:
        """A model without masters, rounded where it computes in bf16, its head in both precisions."""
        if not self.rounds:
            return 4.0 * model.parameters
        lora = self.config.model.lora
        linear = FOUR_BITS if lora and lora.quantize and model is self.sizes else 2.0
        return linear * model.linear + 4 * model.rest + 2 * model.head

    def _share_of(self, frozen: float) -> float:
        """Of a model without masters: the rounded head is in every process."""
        head = 2.0 * self.sizes.head * self.rounds * self.sharded
        return (frozen - head) / self.shards + head

    def _reference_size(self) -> float:
        c = self.config
        needed = c.algo.needs_ref or c.data.eval is not None
        return self._frozen(self.reference or self.sizes) if needed and (self.reference or not c.model.lora) else 0.0

    def _whole(self) -> float:
        """What passes over sharded weights hold of them: two layers rounded, and all that is in no layer."""
        if not self.sharded:
            return 0.0
        m = self.sizes
        return 2 * self.width * m.linear / m.layers + 4.0 * m.rest

    # --- phases ---

    def _loading(self) -> Parts:
        """fp32 weights as they are read; π_0 is copied from them as it rounds and laid away, then a value model is. Divided,
        each model is before the next one is made; copies then come to a GPU by way of the host, layer by layer."""
        lora = self.config.model.lora
        policy = self._frozen(self.sizes) if lora and lora.quantize else 4.0 * self.sizes.parameters
        copied = 4.0 * self.reference.parameters if self.reference else self._reference_size()
        copies = self.whole_critic or (self.config.algo.critic and self.sharded)
        critic = 4.0 * self.sizes.without_head.parameters * copies
        beside = (2.0 if self.on_gpu else 4.0) * sum(m.linear for m in self.trained) if self.rounds else 0.0
        resting, steps = 0.0, []
        if self.sharded:
            resting, made = self._share_of(self._reference_size()), critic
            if self.on_gpu:  # of a copy its share, and for a moment the largest group as a whole
                group = 4.0 * max(self.sizes.rest, self.sizes.linear / self.sizes.layers)
                copied = copied if self.reference else resting and resting + group
                made = critic and critic / self.shards + group
            steps = [{"weights": policy, "π_0": resting, "value model": made}]
            critic, beside = critic / self.shards, policy / self.shards
        steps.append({"weights": policy, "π_0": copied})
        steps.append({"weights": policy, "π_0": resting, "value model": critic, "masters": beside})
        return max(steps, key=lambda parts: sum(parts.values()))

    def _sampling(self) -> Parts:
        m, c = self.sizes, self.config
        most = getattr(c.rollout.options, "decode_batch_size", 0)
        copy = self._frozen(m) if self.sharded else 0.0
        if not most:  # another sampler has weights of its own
            options = c.rollout.options
            served = getattr(options, "gpu_memory", 0.0) if getattr(options, "serve", False) else 0.0
            return {"whole layers": self._whole(), "server": served * (self.limit or 0.0)}
        prompts = max(c.prompts_per_batch if c.algo.source == "online" else 0, c.eval.prompts if c.data.eval else 0)
        rows = min(max(most, c.rollout.k), self._share(prompts) * c.rollout.k)
        columns = self.prompt + c.rollout.max_new_tokens
        columns += -columns % WINDOW if self.on_gpu else 0
        prefill = max(self.prompt, min(PREFILL, math.ceil(rows / c.rollout.k) * self.prompt))
        token = 2.0 * self.width * m.keys * m.layers
        parts = {
            "whole copy": copy,
            "laid out": 2.0 * (m.linear + m.head) if self.place.laid_out and self.rounds else 0.0,
            "activations": self._passing(prefill) + token * prefill,
            "logits": 2.0 * self.width * rows * m.vocabulary,
        }
        if self.on_gpu and self.limit:  # as the sampler does
            free = self.limit - sum(self._at_rest().values()) - sum(parts.values())
            room = ROOM * free / (token * columns)
            rows = max(c.rollout.k, min(rows, 2 ** int(math.log2(max(1.0, room)))))
        return {**parts, "key-value cache": token * rows * columns}

    def _share(self, prompts: int) -> int:
        return math.ceil(prompts / self.place.processes)

    def _scoring(self) -> Parts:
        tokens, scored = self._micro_batch(self.config.train.online_batch, 1 if self.on_gpu else SCORED)
        visits = {} if self.sharded else {"π_0": self._reference_size()}
        return {
            **visits,
            "whole layers": self._whole(),
            "activations": self._passing(tokens),
            "logits": self._logits(scored),
        }

    def _updating(self) -> Parts:
        """Activations are at their height; or, later, gradients of what is in no layer are divided, or masters are opened
        a few at a time."""
        tokens, scored = self._micro_batch(self.config.train.update_size)
        models = 1 + self.config.algo.critic
        whole = self._whole() + self._whole_gradients()
        passes = {"whole layers": whole, "activations": models * self._kept(tokens), "logits": self._logits(scored)}
        stepping = max(self._stepping(), whole + 4.0 * self.sizes.rest if self.sharded else 0.0)
        return {
            "gradients": 4.0 * (sum(m.parameters for m in self.trained) + self.adapters) / self.shards,
            **(passes if sum(passes.values()) > stepping else {"stepping": stepping}),
        }

    def _whole_gradients(self) -> float:
        """What is made for one process of weights that are sharded: two layers' in fp32, and that of the rest."""
        return 8.0 * self.sizes.linear / self.sizes.layers + 4.0 * self.sizes.rest if self.sharded else 0.0

    def _stepping(self) -> float:
        """Masters in fp32 as they are opened, with what joining and parting them takes."""
        if self.config.train.optimizer == "adamw":
            return 0.0
        together = min(max(TOGETHER, self.sizes.largest), self.sizes.linear) if self.on_gpu else self.sizes.largest
        return (18.0 if self.on_gpu else 14.0) * together / self.shards

    def _saving(self) -> Parts:
        """Weights in the dtype to be saved, then masters as a whole."""
        if self.sharded:  # gathered one by one
            return {"whole layers": 4.0 * max(self.sizes.largest, self.sizes.head)}
        rounded = (2.0 * self.sizes.rest + (2 * self.sizes.head if self.sizes.tied else 0)) * self.rounds
        halved = self.rounds and self.config.train.optimizer == "adafactor"
        return {"whole masters": max(rounded, sum(4.0 * m.linear for m in self.trained) if halved else 0)}

    # --- passes ---

    def _micro_batch(self, completions: int, times: int = 1) -> tuple[float, float]:
        """Tokens of one forward pass, and those of them that are scored: whole prompts, parts of even sizes."""
        c = self.config
        new = c.rollout.max_new_tokens if c.algo.source == "online" else self.prompt
        prompts = 1 if c.train.prefix_sharing else c.group
        group = prompts * self.prompt + c.group * new
        mine = completions / c.group * group / self.place.processes
        parts = math.ceil(mine / (times * c.train.micro_batch_tokens))
        tokens = max(group, mine / parts)
        return tokens, tokens * c.group * new / group

    def _logits(self, scored: float) -> float:
        m = self.sizes
        one = self.width * m.vocabulary
        return min(max(GPU_CHUNK, CHUNK * one) if self.on_gpu else CHUNK * one, scored * one) + 12.0 * scored * m.hidden

    def _passing(self, tokens: float) -> float:
        """A layer's activations where nothing is kept: the residual stream, and the widest part."""
        m = self.sizes
        return tokens * (8 * m.hidden + self.width * (4 * m.inner + m.hidden))

    def _kept(self, tokens: float) -> float:
        """Activations that wait for the backward pass, and what a layer's own backward pass takes."""
        m = self.sizes
        layer = tokens * self._of_a_token() + self._scores(tokens)
        backward = tokens * (12 * m.hidden + 4 * self.width * m.inner) + self.width * 3 * m.largest
        if self.config.model.gradient_checkpointing:
            return m.layers * tokens * 4 * m.hidden + layer + backward
        return m.layers * layer + backward

    def _of_a_token(self) -> float:
        """Bytes that a layer keeps of each token: the residual stream twice in fp32, and what products need. A CPU makes
        the feed-forward's product again (models/recompute.py); compiled layers keep it."""
        m, b = self.sizes, self.width
        attention = b * (2 * m.hidden + 2 * m.queries + 2 * m.keys)
        return 8 * m.hidden + attention + b * m.inner * (3 if self.on_gpu else 2)

    def _scores(self, tokens: float) -> float:
        """Attention's weights, which a CPU keeps; and keys and values of a prompt once for each of its completions."""
        c, m = self.config, self.sizes
        if self.on_gpu:
            return 0.0
        new = c.rollout.max_new_tokens if c.algo.source == "online" else self.prompt
        prompts = tokens / (self.prompt + c.group * new)
        seen = prompts * (self.prompt**2 + c.group * new * (self.prompt + new))
        return self.width * (m.heads * seen + 2 * m.keys * prompts * c.group * self.prompt)
