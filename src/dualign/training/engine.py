"""Processes, devices, precision, gradient steps: the only file that knows accelerate.

Every process holds the whole online batch (it is small: ids and numbers); only the compute is dealt out. So baselines,
μ, σ and denominators are global without a word about processes anywhere else, and one process or several do the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dualign import assets
from dualign.algos import Algorithm, Batch
from dualign.common import cpu, launch
from dualign.common.errors import StopRun, UserError, out_of_memory
from dualign.config import Config
from dualign.models.adapters import own_base, with_lora, without_adapters
from dualign.models.compile import compile_layers
from dualign.models.critic import Critic
from dualign.models.finite import first_gradient, first_not_finite
from dualign.models.load import context_of, load_reference
from dualign.models.master import Masters, gradient_of
from dualign.models.packing import Tokens, deal, plan, size_of
from dualign.models.policy import Policy, load_model
from dualign.models.recompute import keep_less
from dualign.rollout.base import Sampler
from dualign.training.adafactor import Adafactor
from dualign.training.checkpoint import load_state, save_model, save_state

log = logging.getLogger(__name__)
X = TypeVar("X")
Sums = dict[str, float]  # of the loss and of numbers worth logging, over the rows of one process
Rows = Batch | Callable[[Tensor, Tensor], Batch]  # or what makes some of them: row numbers (n,), their log π_θ (n, T)
PATIENCE = timedelta(days=1)  # processes wait for one another's labels: a launcher ends them all where one dies
SCORED = 4  # times the tokens of an update's micro-batch are scored at once on a CPU: nothing is kept for backward
TOGETHER = 2**27  # entries of weights of one shape that a GPU steps on at once


class Engine:
    """Holds π_θ, π_0, the critic and the optimizer. π_t is π_θ before the first update."""

    def __init__(self, config: Config) -> None:
        from accelerate import Accelerator
        from accelerate.tracking import get_available_trackers
        from accelerate.utils import InitProcessGroupKwargs, set_seed

        self.config, self.train = config, config.train
        for name in config.run.trackers:  # accelerate leaves out in silence what is not installed
            if name not in {str(t.value) for t in get_available_trackers()}:
                raise UserError(f"run.trackers: {name} is not installed: pip install {name}")
        if note := launch.settle():
            log.warning("note: %s", note)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            log_with=list(config.run.trackers) or None,
            project_dir=str(Path(config.run.dir) / "trackers"),
        )
        set_seed(config.run.seed)
        if self.device.type == "cpu":
            cpu.keep_memory()
        model, self.tokenizer = load_model(config.model)
        if config.model.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.to(self.accelerator.device)
        policy = Policy(model, config.model.precision, self.train.prefix_sharing)
        algo: Algorithm = config.algo
        if algo.source == "online":
            self._try_decoding(policy)
        self.lora = config.model.lora is not None
        # for held-out KL, too
        needs_ref = algo.needs_ref or config.data.eval is not None
        self.reference = self._reference(policy) if needs_ref else None
        if self.reference is not None and self.device.type == "cpu":
            self.reference.move_to_file(assets.cache_dir())
        if config.model.lora is not None:
            policy.take_adapters(with_lora(policy.model, config.model, own_base(config.model, config.run.dir)))
        policy.train()
        self.policy, self.drops = policy, _drops(policy.model)
        self.critic = Critic(policy).to(self.device) if algo.critic else None
        self.modules: list[Policy] = [m for m in (policy, self.critic) if m is not None]
        exact: dict[Any, Tensor] = {}
        for module in self.modules:
            exact |= module.round()
        halved = self.device.type == "cpu" and self.train.optimizer == "adafactor"  # which steps on one at a time
        self.masters = Masters(list(self.modules), exact, halved)
        if self.device.type == "cpu":
            for module in self.modules:
                keep_less(module.base)
        elif self.train.compile:
            for module in [*self.modules, *([self.reference] if self.reference else [])]:
                compile_layers(module.base)
        self.optimizer = self._optimizer()
        self.micro_batch_tokens = self.train.micro_batch_tokens

    def _try_decoding(self, policy: Policy) -> None:
        """Finds out how the model is decoded, while its weights are exact. Raises UserError where it cannot be, or where
        the log-probs that were to be recorded are not the model's."""
        from dualign.rollout.hf.sampler import decoding_of

        if not decoding_of(policy).agrees and self.config.rollout.log_probs == "recorded":
            raise UserError(
                f"rollout.log_probs: recorded: {policy.name}: the log-probs of decoding were not shown to be the model's; "
                "set rollout.log_probs=recomputed"
            )

    # --- processes ---

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def mine(self, items: Sequence[X]) -> Sequence[X]:
        """The share of `items` that this process works on."""
        return items[self.rank :: self.world]

    def _my_parts(self, tokens: Tokens, rows: Sequence[int], times: int = 1) -> list[list[int]]:
        """The micro-batches of `rows` that this process works on: of `times` the tokens of an update's, but no more than
        an even share, so that there is work for everyone."""
        shared = self.policy.share
        even = math.ceil(size_of(tokens, rows, shared) / self.world)
        budget = max(1, min(times * self.micro_batch_tokens, even))
        return deal(tokens, plan(tokens, rows, budget, shared), self.world, shared)[self.rank]

    def gather(self, items: list[X]) -> list[X]:
        """The items of all processes, on all of them."""
        if self.world == 1:
            return items
        parts: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    # --- scoring and training ---

    def score(self, model: Policy, tokens: Tokens, but: Collection[int] = ()) -> Tensor:
        """(N, T) fp32 on the CPU: log-probs (or values) of every row, without gradient; 0 for the rows of `but`."""
        out_NT = torch.zeros(len(tokens), tokens.width, device=self.device)

        def work() -> None:
            rows, scored = [row for row in range(len(tokens)) if row not in but], []
            # a GPU packs the next micro-batch while it works on one
            for part in self._my_parts(tokens, rows, SCORED if self.device.type == "cpu" else 1):
                micro = model.pack(tokens, part, self.tokenizer.pad_id)
                scored.append((micro.rows, model(micro).float()))
            for chosen, value_nT in scored:  # once all is under way: this waits for a GPU
                out_NT[chosen.to(self.device)] = value_nT

        training = model.training
        model.eval()  # no dropout: log π_t is what was sampled from
        with torch.inference_mode():
            self._fitting(work)
        model.train(training)
        if self.world > 1:
            torch.distributed.all_reduce(out_NT)
        return out_NT.cpu()

    def score_reference(self, tokens: Tokens) -> Tensor:
        """(N, T) log π_0."""
        if self.reference is not None:
            logp_NT = self.score(self.reference, tokens)
            self.reference.rest()
            return logp_NT
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
        if self.world > 1:
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
        self._exchange_gradients()
        sums = self._sum(sums)
        loss = sums.pop("loss") / denominator
        try:
            norm = self._step(loss)
        except StopRun as stop:
            raise StopRun(
                f"{stop}; {where}" if (where := self.not_finite(self.policy, tokens)) else str(stop)
            ) from None
        return {"loss": loss, "grad_norm": norm, "lr": lr} | {k: v / len(rows) for k, v in sums.items()}

    def left_out(self) -> dict[str, float]:
        """What is logged of an update without a step."""
        return {"loss": 0.0, "grad_norm": 0.0, "lr": float(self.optimizer.param_groups[0]["lr"]), "skipped": 1.0}

    def _gradients(self, algo: Algorithm, tokens: Tokens, rows: Sequence[int], batch: Rows, denominator: float) -> Sums:
        """Adds up the gradient of the loss of `rows`, a micro-batch at a time; returns sums over this process's rows."""
        if self.device.type == "cpu":
            for p in self.masters.named.values():  # what stays is allocated before what comes and goes
                gradient_of(p)

        def work() -> Sums:
            sums: dict[str, Tensor] = {"loss": torch.zeros((), dtype=torch.float64, device=self.device)}
            for part in self._my_parts(tokens, rows):
                for name, value in self._backward(algo, tokens, batch, part, 1 / denominator).items():
                    sums[name] = sums[name] + value if name in sums else value
            return {name: float(value) for name, value in sums.items()}  # read once: a GPU is not waited for before

        return self._fitting(work)

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
        loss, stats = algo.loss(logp_NT, rows, value_NT)
        (loss * scale).backward()
        return {"loss": loss.detach().double()} | {k: v.detach().double().sum() for k, v in stats.items()}

    def _exchange_gradients(self) -> None:
        """The sum over processes, in fp32. A process that had no rows contributes zeros."""
        if self.world == 1:
            return
        for p in self.masters.named.values():
            torch.distributed.all_reduce(gradient_of(p))

    def not_finite(self, model: Policy | None, tokens: Tokens) -> str:
        """In words, where in a forward pass over `tokens` a number first is NaN or infinite; empty where all are finite,
        and for π_0 without weights of its own."""
        model = model or self.policy

        def forward() -> None:
            for row in range(len(tokens)):
                model(model.pack(tokens, [row], self.tokenizer.pad_id))

        return first_not_finite(model, forward)

    def _step(self, loss: float) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.masters.named.values()), self.train.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            where = first_gradient(self.masters.named.items())
            self._clear_gradients()
            found = f"the loss ({loss}) or its gradient (norm {norm}) is not finite; no step was taken"
            raise StopRun(f"{found}; {where}" if where else found)
        # Adafactor opens the masters that it steps on
        with nullcontext() if isinstance(self.optimizer, Adafactor) else self.masters.whole():
            self.optimizer.step()
        self._clear_gradients()
        self._stepped()
        return norm

    def _stepped(self) -> None:
        for module in self.modules:
            module.stepped()

    def _clear_gradients(self) -> None:
        # On a CPU the buffers stay for the next update: first touches of new memory cost more than the arithmetic on it.
        self.optimizer.zero_grad(set_to_none=self.device.type != "cpu")

    def make_room(self) -> None:
        """Gives back what only updates need, and what the allocator keeps of it, before completions are sampled."""
        if self.device.type == "cpu":
            self.optimizer.zero_grad(set_to_none=True)
            cpu.give_back_memory()

    def _fitting(self, work: Callable[[], X]) -> X:
        """What `work` returns. Where the memory of any process does not suffice, all begin it anew, without the
        gradients made so far, and with half as many tokens at a time."""
        while True:
            result: list[X] = []
            try:
                result.append(work())
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            if all(self.gather([bool(result)])):
                return result[0]
            del result
            for module in self.modules:
                module.zero_grad(set_to_none=True)
            self.optimizer.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.micro_batch_tokens < 32:
                raise StopRun("out of memory, even for one prompt at a time; resume on a machine with more of it")
            self.micro_batch_tokens //= 2
            log.warning("out of memory: going on with %d tokens in a micro-batch", self.micro_batch_tokens)

    def begin_update(self, step: int, update: int) -> None:
        """Makes an update's learning rate, and what is random in it (dropout), functions of its place in the run."""
        at = step * self.config.updates_per_batch + update
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self._share_of_rate(at)
        place = [self.config.run.seed, step, update, self.rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    # --- state ---

    def save(self, folder: Path, progress: dict[str, Any]) -> None:
        """The policy as Hugging Face opens it (in bf16 where it computes in bf16), and all that training needs to go
        on, in safetensors and JSON."""
        self.make_room()
        model = self.policy.model
        save_model(folder, model, model.state_dict(), self.policy.dtype)
        self.tokenizer.hf.save_pretrained(folder)
        with self.masters.whole():
            save_state(folder, self.masters.named, self.optimizer, progress)

    def save_base(self, folder: Path) -> None:
        """The model under the adapters, as `save` writes whole ones."""
        save_model(folder, *without_adapters(self.policy.model), self.policy.dtype)
        self.tokenizer.hf.save_pretrained(folder)

    def load(self, folder: Path) -> dict[str, Any]:
        with self.masters.whole():
            progress = load_state(folder, self.masters.named, self.optimizer)
        self._stepped()
        return progress

    def sampler(self) -> Sampler:
        """What draws completions from π_t."""
        from dualign.rollout.hf.sampler import HFSampler

        return HFSampler(self.policy, self.tokenizer, self.config.rollout.rows, self.config.rollout.cuda_graphs)

    @property
    def context(self) -> int:
        """Tokens that the model can see."""
        return context_of(self.policy.model.config)

    def start_trackers(self) -> None:
        """Opens the trackers that run.trackers names, which may write into the run's folder."""
        if self.config.run.trackers:
            tree = self.config.model_dump(exclude={"reward"})
            settings = {k: v for k, v in _flat(tree, ".").items() if isinstance(v, int | float | str)}
            self.accelerator.init_trackers(self.config.run.project, settings)

    def track(self, step: int, record: dict[str, Any]) -> None:
        """The numbers of `record` to the trackers; those of a section, as section/name."""
        if self.config.run.trackers:
            flat = {k: v for k, v in _flat(record, "/").items() if isinstance(v, int | float)}
            self.accelerator.log(flat, step=step)

    def stop_trackers(self) -> None:
        if self.config.run.trackers:
            for tracker in self.accelerator.trackers:  # end_training would take the process group with it
                tracker.finish()

    # --- construction ---

    @property
    def device(self) -> torch.device:
        return torch.device(self.accelerator.device)

    def _reference(self, policy: Policy) -> Policy | None:
        """π_0: the model that model.reference names, or `policy` as it is loaded. None where that is the policy without
        its adapters."""
        m = self.config.model
        if m.reference is None:
            return None if self.lora else policy.frozen_copy()
        model = load_reference(m, self.tokenizer).to(self.device)
        return Policy(model, m.precision, self.train.prefix_sharing, "model.reference").freeze()

    def _optimizer(self) -> torch.optim.Optimizer:
        t = self.train
        rates = [t.lr, t.critic_lr or t.lr]
        groups = [{"params": parameters, "lr": lr} for parameters, lr in zip(self.masters.groups, rates, strict=False)]
        if t.optimizer == "adamw":
            optimizer: Any = torch.optim.AdamW(groups, lr=t.lr, weight_decay=t.weight_decay, fused=True)
        else:
            together = 1 if self.device.type == "cpu" else TOGETHER
            optimizer = Adafactor(groups, t.lr, t.weight_decay, self.masters.opened, together)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        return optimizer

    def _share_of_rate(self, at: int) -> float:
        """Of the learning rate, in update `at` of the run: a linear rise, constant, a linear fall to 0."""
        t = self.train
        updates = t.online_batches * self.config.updates_per_batch
        falling = t.decay * updates
        return min(1.0, (at + 1) / max(1, t.warmup), (updates - at) / falling if falling else 1.0)

    def _sum(self, sums: dict[str, float]) -> dict[str, float]:
        if self.world == 1:
            return sums
        total: dict[str, float] = {}
        for part in self.gather([sums]):
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        return total


def _drops(model: Any) -> bool:
    """Whether a forward pass in training is random."""
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    settings = model.config.get_text_config().to_dict()
    rates += [v for name, v in settings.items() if ("drop" in name or "jitter" in name) and isinstance(v, float | int)]
    return any(rate > 0 for rate in rates)


def _flat(tree: dict[str, Any], between: str) -> dict[str, Any]:
    """The leaves of nested mappings, each under its path."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{key}{between}{k}": v for k, v in _flat(value, between).items()}
        else:
            flat[key] = value
    return flat


def _to(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on `device`."""
    if device.type == "cpu":
        return batch
    from dataclasses import fields, replace

    moved = {f.name: v.to(device) for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)}
    return replace(batch, **moved, columns={k: v.to(device) for k, v in batch.columns.items()})
