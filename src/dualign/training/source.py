"""Where the rows of an online batch come from: sampled and labelled, or read from a fixed data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from dualign import data
from dualign.algos.advantages import tied_rows
from dualign.common.errors import UserError
from dualign.common.processes import Processes
from dualign.common.types import Example, Label, Prompt, Rollout
from dualign.config import Config
from dualign.data.settings import DataConfig
from dualign.models.policy import Tokenizer
from dualign.rollout.base import Request, Sampling
from dualign.rollout.requests import Refused, requests_of
from dualign.run.batch import PENALTY, Row
from dualign.training.clock import Clock
from dualign.training.labeller import Asked, Labeller

X = TypeVar("X")
FURTHER = 0x5EED_0F7E  # their order is another than that of the batches' own prompts


class Stream(Generic[X]):
    """An endless pass over `items`, reshuffled in every epoch; what batch t gets is a function of seed and t alone."""

    def __init__(self, items: Sequence[X], per_batch: int, seed: int, shuffle: bool) -> None:
        self.items, self.per_batch, self.seed, self.shuffle = items, per_batch, seed, shuffle

    def at(self, step: int) -> list[X]:
        return [self._item(step * self.per_batch + i) for i in range(self.per_batch)]

    def _item(self, position: int) -> X:
        epoch, at = divmod(position, len(self.items))
        if not self.shuffle:
            return self.items[at]
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.items))
        return self.items[int(order[at])]


Known = tuple[tuple[int, ...], list[tuple[int, ...]]]  # a prompt's tokens, and those of its completions in a fixed set


class Source(Protocol):
    def ask(self, step: int, clock: Clock) -> Asked:
        """Begins online batch `step`: its completions, whose labels come while other things are done."""
        ...

    def known(self, step: int) -> list[Known]:
        """What is known of the batch before it is made, by group."""
        ...


class OnlineSource:
    """Samples K completions per prompt from π_t; each is sent to be labelled the moment it is finished."""

    def __init__(self, config: Config, processes: Processes, labeller: Labeller, requests: Sequence[Request]) -> None:
        self.processes, self.labeller = processes, labeller
        r = config.rollout
        self.sampling = Sampling(r.k, r.max_new_tokens, r.temperature, r.top_p)
        self.seed, self.penalty, self.tie = config.run.seed, r.missing_eos_penalty, config.algo.tie
        self.stream = Stream(requests, config.prompts_per_batch, self.seed, config.data.shuffle)
        self.further = Stream(requests, r.resample, self.seed + FURTHER, config.data.shuffle)

    def ask(self, step: int, clock: Clock) -> Asked:
        prompts, own = self._numbered(step), self.stream.per_batch
        asked = self._ask(self.processes.mine(prompts[:own]), step, clock)

        def rows(clock: Clock) -> list[Row]:
            found: list[Row] = []

            def labelled() -> list[int]:
                found.extend(penalised(row, self.penalty) for row in asked.rows(clock))
                return [tied_groups(found, self.tie)]

            if not self.further.per_batch:
                labelled()
                return found
            tied = sum(self.processes.everyones(labelled))  # of all processes, so that their number decides nothing
            begun = self.labeller.begun(prompts[own:], self.sampling.k)  # before labels that were absent came
            more = self._ask(self.processes.mine(prompts[own:][: max(tied, begun)]), step, clock).rows(clock)
            return found + [penalised(row, self.penalty) for row in more]

        return replace(asked, rows=rows)

    def _ask(self, requests: Sequence[Request], step: int, clock: Clock) -> Asked:
        return self.labeller.ask(requests, self.sampling, (self.seed, step), clock)

    def _numbered(self, step: int) -> list[Request]:
        """The batch's prompts, then those that may take the place of tied ones."""
        prompts = [*self.stream.at(step), *self.further.at(step)]
        return [Request(g, r.prompt, r.prompt_ids) for g, r in enumerate(prompts)]

    def known(self, step: int) -> list[Known]:
        return [(request.prompt_ids, []) for request in self._numbered(step)]


def tied_groups(rows: Sequence[Row], tie: float) -> int:
    """How many prompts have two rewards or more, all within `tie` of each other: none of their completions is preferred."""
    given = [(row.rollout.group, row.label.value) for row in rows if row.label.value is not None]
    group_N = torch.tensor([group for group, _ in given], dtype=torch.long)
    reward_N = torch.tensor([value for _, value in given], dtype=torch.float64)
    return len(group_N[tied_rows(reward_N, group_N, tie)].unique())


def penalised(row: Row, penalty: float) -> Row:
    """A completion that was cut off is worth `penalty` less; the label's parts keep what it was made of."""
    label = row.label
    if not penalty or row.rollout.finish == "eos" or label.value is None:
        return row
    parts = {**(label.parts or {"reward": label.value}), PENALTY: -penalty}
    return Row(row.rollout, replace(label, value=label.value - penalty, parts=parts))


class DatasetSource:
    """A fixed set in the same form: a pair is a group with rewards 1 (chosen) and 0 (rejected), a demonstration a
    group of one."""

    def __init__(self, config: Config, processes: Processes, tokenizer: Tokenizer, examples: Sequence[Example]) -> None:
        self.processes, self.tokenizer, self.size = processes, tokenizer, config.group
        self.stream = Stream(examples, config.prompts_per_batch, config.run.seed, config.data.shuffle)

    def ask(self, step: int, clock: Clock) -> Asked:
        with clock("read"):
            numbered = list(enumerate(self.stream.at(step)))
            rows = [row for g, example in self.processes.mine(numbered) for row in self.rows_of(g, example)]
        return Asked([row.rollout for row in rows], lambda clock: rows)

    def known(self, step: int) -> list[Known]:
        return [encoded(example, self.size, self.tokenizer) for example in self.stream.at(step)]

    def rows_of(self, group: int, example: Example) -> Iterator[Row]:
        """One row per completion of the example, as the online batch's group `group`."""
        prompt_ids, completions = encoded(example, self.size, self.tokenizer)
        for i, ids in enumerate(completions):
            text, finish = example.completions[i], example.finish[i]
            rollout = Rollout(group * self.size + i, group, example.prompt, prompt_ids, ids, text, finish, ())
            yield Row(rollout, Label(1.0 - i))


def make_source(
    config: Config,
    processes: Processes,
    tokenizer: Tokenizer,
    labeller: Labeller | None,
    stream: Sequence[Request] | Sequence[Example],
) -> Source:
    """Of what `load_stream` gave."""
    if config.algo.source == "online":
        assert labeller is not None
        return OnlineSource(config, processes, labeller, stream)  # type: ignore[arg-type]
    return DatasetSource(config, processes, tokenizer, stream)  # type: ignore[arg-type]


def encoded(example: Example, size: int, tokenizer: Tokenizer) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Token ids of the prompt, and of the first `size` completions."""
    return tokenizer.encode(example, size)


def fits(example: Example, size: int, tokenizer: Tokenizer, context: int, limit: int | None, skip: bool) -> bool:
    """Whether the prompt has at most `limit` tokens (data.max_prompt_tokens) and every completion ends within the
    context. Raises UserError, naming the row, where one does not, unless `skip` leaves such rows out, and where it has
    no tokens (`Tokenizer.encode`)."""
    prompt_ids, completions = encoded(example, size, tokenizer)
    if limit is not None and len(prompt_ids) > limit:
        return False
    longest = max(map(len, completions))
    if len(prompt_ids) + longest > context and not skip:
        raise UserError(
            f"row {example.prompt.id}: its prompt of {len(prompt_ids)} tokens and completion of {longest} exceed the "
            f"model's context of {context}"
        )
    return len(prompt_ids) + longest <= context


def mention_plain_text(prompts: Sequence[Prompt], config: DataConfig, reads: Reads, say: Callable[[str], None]) -> None:
    """Says where a chat template or a system prompt is not used, as prompts are plain text."""
    if data.lost_system_prompt(prompts, config):
        say("note: every prompt is plain text, so data.system_prompt is not used; it needs data.chat=true")
    if reads.tokenizer.hf.chat_template is not None and any(not p.conversational for p in prompts):
        say(
            "note: prompts are plain text and reach the model as they are, though it has a chat template; "
            "data.chat=true makes each a user's message"
        )


class Reads(Protocol):
    """What a model's rows are read with."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def context(self) -> int:
        """Tokens that the model can see."""
        ...


def load_heldout(
    config: Config, reads: Reads, say: Callable[[str], None], judged: bool = True
) -> list[Request] | list[Example]:
    """eval.prompts of what is held out, drawn from what fits; always the same. Where nobody judges answers, a system that
    learns from a fixed set has rows of such a set held out. Raises UserError where these are prompts alone."""
    d, new_tokens = config.data, config.rollout.max_new_tokens
    assert d.eval is not None
    if not judged and config.algo.source != "online":
        return _heldout_examples(config, reads, say, d.eval)
    prompts = data.load_prompts(d.eval, d, d.eval_split)
    limit, count = d.max_prompt_tokens, config.eval.prompts
    return requests_of(prompts, reads.tokenizer, reads.context, new_tokens, limit, say, count, 0, d.bad_rows)


def load_stream(config: Config, reads: Reads, say: Callable[[str], None]) -> list[Request] | list[Example]:
    """The training data that the algorithm asks for."""
    d, context = config.data, reads.context
    if config.algo.source == "online":
        prompts = data.load_prompts(d.train, d, d.split)
        mention_plain_text(prompts, config.data, reads, say)
        new, limit = config.rollout.max_new_tokens, d.max_prompt_tokens
        return requests_of(prompts, reads.tokenizer, context, new, limit, say, bad_rows=d.bad_rows)
    examples = data.load_examples(d.train, d, d.split)
    mention_plain_text([e.prompt for e in examples], config.data, reads, say)
    return _keep_fitting(config, reads, say, "data.train", d.train, examples)


def _heldout_examples(config: Config, reads: Reads, say: Callable[[str], None], source: str) -> list[Example]:
    d = config.data
    try:
        examples = data.load_examples(source, d, d.eval_split)
    except UserError as error:
        raise UserError(
            f"data.eval: without a reward, {config.algo.name} is evaluated on held-out {config.algo.source}: {error}. "
            "Name some, give a reward that judges answers to prompts, or set data.eval: null"
        ) from None
    return _keep_fitting(config, reads, say, "data.eval", source, examples, config.eval.prompts)


def _keep_fitting(
    config: Config,
    reads: Reads,
    say: Callable[[str], None],
    key: str,
    source: str,
    examples: Sequence[Example],
    count: int | None = None,
) -> list[Example]:
    """`count` (None: all) of the examples that have tokens and are not too long."""
    d = config.data
    if len(examples[0].completions) < config.group:
        raise UserError(f"{key}: {config.algo.name} needs preference pairs (chosen, rejected); {source} has none")
    refused, long = Refused(d.bad_rows), 0

    def keep(example: Example) -> bool:
        nonlocal long
        limit, skip = d.max_prompt_tokens, d.bad_rows == "skip"
        fit = refused.unless(lambda: fits(example, config.group, reads.tokenizer, reads.context, limit, skip))
        long += fit is False
        return bool(fit)

    kept = data.draw(examples, count, keep=keep)
    refused.tell(len(kept) + long, say)
    if long:
        say(f"left out {long} of {len(kept) + long + refused.count} rows that are too long")
    if not kept:
        raise UserError(f"{key}: no rows are left" if count else "data: no rows are left")
    return kept
