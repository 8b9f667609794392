"""Prompts that a model can be asked, in its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from dualign import data
from dualign.common.errors import UserError
from dualign.common.types import Prompt
from dualign.models.tokenizer import Tokenizer
from dualign.rollout.base import Request

X = TypeVar("X")


class Refused:
    """Rows that have no tokens: a template that does not take them, a token that the model has no row for. The first one
    stops it, or by data.bad_rows=skip they are left out and counted. None: a command that has no such key."""

    def __init__(self, bad_rows: Literal["stop", "skip"] | None) -> None:
        self.bad_rows, self.count = bad_rows, 0
        self.first: UserError | None = None

    def unless(self, encode: Callable[[], X]) -> X | None:
        """What `encode` makes of a row; None where it is left out."""
        try:
            return encode()
        except UserError as error:
            if self.bad_rows is None:
                raise
            if self.bad_rows == "stop":
                raise UserError(f"{error} (data.bad_rows=skip leaves such rows out)") from None
            self.first, self.count = self.first or error, self.count + 1
            return None

    def tell(self, left: int, say: Callable[[str], None]) -> None:
        """Says how many there were; `left`: how many rows there are without them. Raises UserError for none."""
        if self.first and not left:
            raise UserError(f"data: none of {self.count:,} rows can be used; the first: {self.first}")
        if self.first:
            say(f"left out {self.count:,} of {self.count + left:,} rows that cannot be used; the first: {self.first}")


def requests_of(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    context: int,
    new_tokens: int,
    limit: int | None,
    say: Callable[[str], None],
    count: int | None = None,
    seed: int = 0,
    bad_rows: Literal["stop", "skip"] | None = None,
) -> list[Request]:
    """Tokenized prompts that fit, `count` of them drawn by `seed` (None: all). Raises UserError, naming the prompt,
    where one is longer than the context; prompts beyond `limit` tokens (data.max_prompt_tokens) are left out and
    counted, and others drawn for them; so are those without tokens by `bad_rows`."""
    tokenized: dict[int, tuple[int, ...]] = {}
    refused = Refused(bad_rows)

    def keep(i: int) -> bool:
        ids = refused.unless(lambda: tokenizer.prompt(prompts[i]))
        if ids is None:
            return False
        tokenized[i] = ids
        if limit is not None and len(ids) > limit:
            return False
        if len(ids) + new_tokens > context:
            left = context - new_tokens
            remedy = (
                f"set data.max_prompt_tokens={left} to leave such prompts out" if left > 0 else "ask for fewer new ones"
            )
            raise UserError(
                f"prompt {prompts[i].id}: its {len(ids)} tokens and {new_tokens} new ones exceed the model's "
                f"context of {context}; {remedy}"
            )
        return True

    chosen = data.draw(range(len(prompts)), count, seed, keep)
    refused.tell(len(tokenized), say)
    requests = [Request(group, prompts[i], tokenized[i]) for group, i in enumerate(chosen)]
    if len(requests) < len(tokenized):
        say(f"left out {len(tokenized) - len(requests)} of {len(tokenized)} prompts longer than {limit} tokens")
    if not requests:
        raise UserError("data: no prompts are left")
    return requests
