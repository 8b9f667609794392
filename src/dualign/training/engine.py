"""Scoring, gradients and optimizer steps of one policy.

Every process holds the whole online batch (it is small: ids and numbers); only the compute is dealt out. So baselines,
μ, σ and denominators are global without a word about processes anywhere else, and one process or several do the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dualign.algos import Algorithm, Batch
from dualign.common import cpu
from dualign.common.errors import StopRun, out_of_memory
from dualign.config import Config
from dualign.models.adapters import merged_weights, own_base, with_lora, without_adapters
from dualign.models.divergence import Divergence
from dualign.models.finite import first_gradient, first_not_finite
from dualign.models.load import context_of, has_dropout
from dualign.models.packing import Tokens, deal, plan, size_of
from dualign.models.policy import Policy
from dualign.models.share import clip_gradients, gathered
from dualign.models.tokenizer import Tokenizer
from dualign.training.adafactor import Adafactor
from dualign.training.checkpoint import load_state, save_model, save_state
from dualign.training.machine import Machine
from dualign.training.optimizer import Schedule, make_optimizer
from dualign.training.parallelize import Layout, load_policy

log = logging.getLogger(__name__)
X = TypeVar("X")
Sums = dict[str, float]  # of the loss and of numbers worth logging, over the rows of one process
Rows = Batch | Callable[[Tensor, Tensor], Batch]  # or what makes some of them: row numbers (n,), their log π_θ (n, T)
MASSES = ("positive_mass", "negative_mass")
SCORED = 4  # times the tokens of an update's micro-batch are scored at once on a CPU: nothing is kept for backward


class Engine:
    """Holds π_θ, π_0, the critic and the optimizer. π_t is π_θ before the first update."""

    def __init__(self, config: Config, machine: Machine, policy: Policy, tokenizer: Tokenizer) -> None:
        self.config, self.train, self.tokenizer = config, config.train, tokenizer
        self.processes, self.device = machine.processes, machine.device
        algo: Algorithm = config.algo
        # for held-out KL, too
        needs_ref = algo.needs_ref or config.data.eval is not None
        layout = Layout(config, self.processes, self.device)
        self.reference = layout.reference(policy, tokenizer) if needs_ref else None
        if config.model.lora is not None:
            policy.take_adapters(with_lora(policy.model, config.model, own_base(config.model, config.run.dir)))
        policy.train()
        self.has_dropout = has_dropout(policy.model)
        self.critic = layout.value_model(policy) if algo.critic else None
        self.policy, self.masters = layout.ready(policy, self.critic)
        self.modules: list[Policy] = [m for m in (self.policy, self.critic) if m is not None]
        self.divided = config.train.shard != "none"
        self.optimizer = make_optimizer(config, self.masters, self.device)
        self.schedule = Schedule(config, self.optimizer)
        self.micro_batch_tokens = self.train.micro_batch_tokens

    @classmethod
    def load(cls, config: Config) -> Engine:
        """With the policy that `config` names, on a machine of its own."""
        machine = Machine(config)
        return cls(config, machine, *load_policy(config, machine.device))

    def _my_parts(self, tokens: Tokens, rows: Sequence[int], times: int = 1) -> list[list[int]]:
        """The micro-batches of `rows` that this process works on: of `times` the tokens of an update's, but no more than
        an even share, so that there is work for everyone. Processes with shares of one policy make equally many passes;
        an empty one is for the others' sake."""
        shared = self.policy.share
        even = math.ceil(size_of(tokens, rows, shared) / self.processes.world)
        budget = max(1, min(times * self.micro_batch_tokens, even))
        hands = deal(tokens, plan(tokens, rows, budget, shared), self.processes.world, shared)
        mine = hands[self.processes.rank]
        return mine + [[]] * (max(map(len, hands)) - len(mine)) if self.divided else mine

    # --- scoring and training ---

    def score(self, model: Policy | Divergence, tokens: Tokens, but: Collection[int] = ()) -> Tensor:
        """(N, T) fp32 on the CPU: log-probs (values, KL) of every row, without gradient; 0 for the rows of `but`."""
        out_NT = torch.zeros(len(tokens), tokens.width, device=self.device)

        def work() -> None:
            rows, scored = [row for row in range(len(tokens)) if row not in but], []
            # a GPU packs the next micro-batch while it works on one
            for part in self._my_parts(tokens, rows, SCORED if self.device.type == "cpu" else 1):
                micro = model.pack(tokens, part or rows[:1], self.tokenizer.pad_id)
                value_nT = model(micro).float()
                if part:
                    scored.append((micro.rows, value_nT))
            for chosen, value_nT in scored:  # once all is under way: this waits for a GPU
                out_NT[chosen.to(self.device)] = value_nT

        training = model.training
        model.eval()  # no dropout: log π_t is what was sampled from
        with torch.no_grad() if self.divided else torch.inference_mode():
            self._retry_on_oom(work)
        model.train(training)
        if self.processes.world > 1:
            torch.distributed.all_reduce(out_NT)
        return out_NT.cpu()

    def score_reference(self, tokens: Tokens) -> Tensor:
        """(N, T) log π_0."""
        if self.reference is not None:
            with self.reference.whole():
                return self.score(self.reference, tokens)
        with self.policy.model.disable_adapter():
            return self.score(self.policy, tokens)

    def begin(self, algo: Algorithm, tokens: Tokens, batch_of: Callable[[Tensor], Batch]) -> tuple[Tensor, Sums]:
        """The gradient of an update whose rows are weighted by log π_t that its own forward pass gives, before any step:
        log π_t (N, T), and the sums that `update` wants. `batch_of` makes the update's batch of log π_t as far as it is
        known, of whole prompts; the rest is 0."""
        known_NT = torch.zeros(len(tokens), tokens.width)

        def rows_of(chosen: Tensor, logp_NT: Tensor) -> Batch:
            known_NT[chosen] = logp_NT
            return batch_of(known_NT).select(chosen)

        denominator = float(algo.denominator(batch_of(known_NT)))
        sums = self._gradients(algo, tokens, range(len(tokens)), rows_of, denominator)
        if self.processes.world > 1:
            shared_NT = known_NT.to(self.device)
            torch.distributed.all_reduce(shared_NT)
            known_NT = shared_NT.cpu()
        return known_NT, sums

    def update(self, algo: Algorithm, tokens: Tokens, batch: Batch, begun: Sums | None = None) -> dict[str, float]:
        """One optimizer step on the rows given, whose gradient is there already where it was `begun`. Raises StopRun,
        before stepping, if a loss or gradient is not finite."""
        if algo.recompute:
            logp_NT = self.score(self.policy, tokens)
            value_NT = self.score(self.critic, tokens) if self.critic else None
            batch = batch.having(algo.refresh(batch, logp_NT, value_NT))
        lr = float(self.optimizer.param_groups[0]["lr"])
        denominator = float(algo.denominator(batch))
        keep = batch.columns.get("keep")
        rows = list(range(len(tokens))) if keep is None else keep.nonzero()[:, 0].tolist()
        if denominator == 0 or not rows:
            return self.left_out()
        sums = begun or self._gradients(algo, tokens, rows, batch, denominator)
        self.masters.exchange_gradients(self.processes.world)
        sums = self._sum(sums)
        loss = sums.pop("loss") / denominator
        masses = {name: sums.pop(name) for name in MASSES}
        try:
            norm = self._step(loss)
        except StopRun as stop:
            raise StopRun(
                f"{stop}; {where}" if (where := self.not_finite(self.policy, tokens)) else str(stop)
            ) from None
        return {"loss": loss, "grad_norm": norm, "lr": lr} | masses | {k: v / len(rows) for k, v in sums.items()}

    def left_out(self) -> dict[str, float]:
        """What is logged of an update without a step."""
        lr = float(self.optimizer.param_groups[0]["lr"])
        return {"loss": 0.0, "grad_norm": 0.0, "lr": lr, **dict.fromkeys(MASSES, 0.0), "skipped": 1.0}

    def _gradients(self, algo: Algorithm, tokens: Tokens, rows: Sequence[int], batch: Rows, denominator: float) -> Sums:
        """Adds up the gradient of the loss of `rows`, a micro-batch at a time; returns sums over this process's rows."""
        if self.device.type == "cpu" and not self.divided:
            self.masters.make_gradients()  # what stays is allocated before what comes and goes

        def work() -> Sums:
            sums: dict[str, Tensor] = {"loss": torch.zeros((), dtype=torch.float64, device=self.device)}
            for part in self._my_parts(tokens, rows):
                if not part:
                    self._idle(tokens, rows[:1])
                    continue
                for name, value in self._backward(algo, tokens, batch, part, 1 / denominator).items():
                    sums[name] = sums[name] + value if name in sums else value
            return {name: float(value) for name, value in sums.items()}  # read once: a GPU is not waited for before

        return self._retry_on_oom(work)

    def _backward(
        self, algo: Algorithm, tokens: Tokens, batch: Rows, part: list[int], scale: float
    ) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch; returns sums over its rows, in double precision."""
        micro = self.policy.pack(tokens, part, self.tokenizer.pad_id)
        if isinstance(batch, Batch):  # on its way before the forward pass: a GPU need not wait for it
            rows = _to(batch.select(micro.rows), self.device)
            logp_NT = self.policy(micro)
        else:
            logp_NT = self.policy(micro)
            rows = _to(batch(micro.rows, logp_NT.detach().cpu()), self.device)
        value_NT = self.critic(micro) if self.critic else None
        logp_NT.retain_grad()
        loss, stats = algo.loss(logp_NT, rows, value_NT)
        (loss * scale).backward()
        sums = {k: v.detach().double().sum() for k, v in stats.items()}
        return sums | {"loss": loss.detach().double()} | _masses(logp_NT)

    def _idle(self, tokens: Tokens, rows: Sequence[int]) -> None:
        """Forward and backward of no weight, for processes that still have rows."""
        made = [module(module.pack(tokens, rows, self.tokenizer.pad_id)).sum() for module in self.modules]
        (torch.stack(made).sum() * 0).backward()

    def not_finite(self, model: Policy | None, tokens: Tokens) -> str:
        """In words, where in a forward pass over `tokens` a number first is NaN or infinite; empty where all are finite,
        and for π_0 without weights of its own."""
        model = model or self.policy

        def forward() -> None:
            for row in range(len(tokens)):
                model(model.pack(tokens, [row], self.tokenizer.pad_id))

        with model.whole():
            return first_not_finite(model, forward)

    def _step(self, loss: float) -> float:
        norm = clip_gradients(list(self.masters.named.values()), self.masters.shares, self.train.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            where = first_gradient(self.masters.named.items())
            self._clear_gradients()
            found = f"the loss ({loss}) or its gradient (norm {norm}) is not finite; no step was taken"
            raise StopRun(f"{found}; {where}" if where else found)
        # Adafactor opens the masters that it steps on
        with nullcontext() if isinstance(self.optimizer, Adafactor) else self.masters.whole():
            self.optimizer.step()
        self._clear_gradients()
        self._weights_changed()
        return norm

    def _weights_changed(self) -> None:
        for module in self.modules:
            module.weights_changed()

    def _clear_gradients(self) -> None:
        # On a CPU the buffers stay for the next update: first touches of new memory cost more than the arithmetic on it.
        self.masters.clear_gradients(keep=self.device.type == "cpu")

    def free_memory(self) -> None:
        """Gives back what only updates need, and what the allocator keeps of it, before completions are sampled."""
        self.masters.clear_gradients(keep=False)
        if self.device.type == "cpu":
            cpu.give_back_memory()
        else:
            torch.cuda.empty_cache()

    def _retry_on_oom(self, work: Callable[[], X]) -> X:
        """What `work` returns. Where the memory of any process does not suffice, all begin it anew, without the
        gradients made so far, and with half as many tokens at a time."""
        while True:
            result: list[X] = []
            try:
                result.append(work())
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if self.divided:  # the others wait in the middle of a pass
                    raise StopRun(
                        f"out of memory with {self.micro_batch_tokens} tokens in a micro-batch; resume with a smaller "
                        "train.micro_batch_tokens"
                    ) from None
            if all(self.processes.gather([bool(result)])):
                return result[0]
            del result
            for module in self.modules:
                module.zero_grad(set_to_none=True)
            self.masters.clear_gradients(keep=False)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.micro_batch_tokens < 32:
                raise StopRun("out of memory, even for one prompt at a time; resume on a machine with more of it")
            self.micro_batch_tokens //= 2
            log.warning("out of memory: continuing with %d tokens in a micro-batch", self.micro_batch_tokens)

    def begin_update(self, step: int, update: int) -> None:
        """Makes an update's learning rate, and what is random in it (dropout), functions of its place in the run."""
        self.schedule.set(step, update)
        place = [self.config.run.seed, step, update, self.processes.rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    # --- state ---

    def save(self, folder: Path | None, progress: dict[str, Any]) -> None:
        """The policy as Hugging Face opens it (in bf16 where it computes in bf16), and all that training needs to
        resume, in safetensors and JSON. Processes with shares come here together; those without a folder only help."""
        self.free_memory()
        model = self.policy.model
        if folder is not None or self.divided:
            save_model(folder, model, model.state_dict(keep_vars=True), self.policy.dtype)
            with self.masters.whole():
                save_state(folder, self.masters.named, self.optimizer, progress, self.masters.shares)
        if folder is not None:
            self.tokenizer.hf.save_pretrained(folder)

    def save_base(self, folder: Path | None) -> None:
        """The model under the adapters, as `save` writes whole ones."""
        save_model(folder, *without_adapters(self.policy.model), self.policy.dtype)
        if folder is not None:
            self.tokenizer.hf.save_pretrained(folder)

    def restore(self, folder: Path) -> dict[str, Any]:
        with self.masters.whole():
            progress = load_state(folder, self.masters.named, self.optimizer, self.masters.shares)
        self._weights_changed()
        return progress

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """π_θ for a sampler that has weights of its own: every tensor under the name that Hugging Face gives it, in the
        dtype that the policy computes in, adapters merged; one at a time."""
        for name, value in merged_weights(self.policy.model):
            yield name, gathered(value.to(self.policy.dtype) if value.is_floating_point() else value)

    @property
    def context(self) -> int:
        """Tokens that the model can see."""
        return context_of(self.policy.model.config)

    def _sum(self, sums: dict[str, float]) -> dict[str, float]:
        if self.processes.world == 1:
            return sums
        total: dict[str, float] = {}
        for part in self.processes.gather([sums]):
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        return total


def _masses(logp_NT: Tensor) -> dict[str, Tensor]:
    """How much of the loss's gradient with respect to log π_θ makes tokens more likely, and how much less."""
    grad_NT = torch.zeros(()) if logp_NT.grad is None else logp_NT.grad.double()
    return dict(zip(MASSES, (grad_NT.clamp(max=0).sum().neg(), grad_NT.clamp(min=0).sum()), strict=True))


def _to(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on `device`."""
    if device.type == "cpu":
        return batch
    moved: dict[str, Any] = {
        f.name: v.to(device) for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)
    }
    return replace(batch, **moved, columns={k: v.to(device) for k, v in batch.columns.items()})
