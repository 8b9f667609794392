"""Tokens: what a model reads of a prompt, what a given completion is in its ids, and the text of what it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualign import assets
from dualign.common.errors import FOREIGN, UserError, first_line
from dualign.common.types import Example, Finish, Message, Prompt
from dualign.models.settings import ModelConfig
from dualign.models.template import ChatTemplate

Ids = tuple[int, ...]


class Tokenizer:
    """A Hugging Face tokenizer with what alignment needs to be sure of: the tokens that end a completion, a pad that
    the model has a row for, and completions that are what the model would have said after the prompt.

    `eos_ids`: the tokens that the model's configuration ends with; the token that the chat template closes an answer
    with is one too. `rows`: of the model's embedding, where it is known.
    """

    def __init__(self, hf: Any, eos_ids: Sequence[int], rows: int | None = None) -> None:
        self.hf, self.rows = hf, rows
        self.template = ChatTemplate(hf)
        self.added = frozenset({*hf.added_tokens_decoder, *hf.all_special_ids})
        self._close = self.template.closing()
        closing = self._closing(self._close, self.added)
        self.eos_ids = frozenset(eos_ids) | ({closing} if closing is not None else set())
        self.eos_id = hf.eos_token_id if hf.eos_token_id is not None else min(self.eos_ids)
        if closing is None:  # an answer may end where the next turn begins
            next_turn = self.template.closing([{"role": "user", "content": "?"}])
            closing = self._closing(next_turn, self.eos_ids)
        self.closing_id = self.eos_id if closing is None else closing
        # Padding is masked by length, never by id: any row of the embedding will do, EOS too.
        known = [i for i in (hf.pad_token_id, self.eos_id, *sorted(self.eos_ids), 0) if i is not None]
        self.pad_id = next(i for i in known if rows is None or i < rows)
        self._before = self._surroundings()
        # SentencePiece's ways: a text begins with a space that it has not, and what is decoded loses one that it has
        self._begins = self._ids("\na")[len(self._ids("\n")) :] != self._ids("a")
        self._start = self._ids("a")
        self._strips = not self._decoded(self._ids("a a")[len(self._start) :]).startswith(" ")
        self._started = self._decoded(self._start)

    # ---- ids ----

    def prompt(self, prompt: Prompt) -> Ids:
        """Token ids of a prompt, ready to be answered: with one BOS at most, and no end. Raises UserError, naming the
        prompt, for a conversation that the chat template does not take and for a token that the model has no row for."""
        if isinstance(prompt.content, str):
            return self._checked(prompt, self._plain(prompt.content))
        return self._checked(prompt, self._ids(self.template.prompt(prompt)))

    def encode(self, example: Example, size: int | None = None) -> tuple[Ids, list[Ids]]:
        """Token ids of the prompt, as `prompt` has them, and of the first `size` completions: of a conversation's, what
        the chat template has after the prompt, to its closing token; of plain text, what tokenizing the two together
        has after the prompt, and EOS. One that was cut off (finish "length") has no end. Raises UserError as `prompt`,
        and where the template renders the answer after another text than the prompt's."""
        prompt, finish = example.prompt, example.finish
        if isinstance(prompt.content, str):
            prompt_ids = self.prompt(prompt)
            before_ids = self._ids(prompt.content)
            completions = [self._continued(prompt.content, before_ids, c) for c in example.completions[:size]]
            completions = [self._ended(ids, how) for ids, how in zip(completions, finish, strict=False)]
        else:
            before, completions = self.template.prompt(prompt), []
            prompt_ids = self._checked(prompt, self._ids(before))
            for i in range(len(example.completions[:size])):
                known, answer = self._answer(prompt, before, example.turn(i), finish[i])
                if known != before:  # the template shows a clock, which has moved on
                    before, prompt_ids = known, self._ids(known)
                completions.append(self._closed(before, prompt_ids, answer, example.turn(i), finish[i]))
        return prompt_ids, [self._checked(prompt, ids) for ids in completions]

    def completion(self, text: str, finish: Finish = "eos") -> Ids:
        """Token ids of a plain text that goes on from another, closed with EOS unless it was cut off."""
        return self._ended(self._continued("", (), text), finish)

    def text(self, completion_ids: Sequence[int], chat: bool = False) -> str:
        """What the ids say, without special tokens: in a conversation (`chat`) on its own, else as a text that goes on
        from another, with the space that it may begin with."""
        if chat or not self._strips:
            return self._decoded(completion_ids)
        return self._decoded([*self._start, *completion_ids]).removeprefix(self._started)

    # ---- a conversation's answer ----

    def _answer(self, prompt: Prompt, before: str, turn: Message, finish: Finish) -> tuple[str, str]:
        """The text of the prompt, and what the assistant says after it, with what closes it."""
        content, plain = turn["content"], turn.keys() == {"role", "content"}
        if plain and finish == "length" and content.rfind("<think>") > content.rfind("</think>"):
            return before, content  # templates close what was cut off while it thought
        try:
            return self.template.answer(prompt, before, turn)
        except UserError:
            inside = before.rstrip().endswith("<think>") and "<think>" not in content
            if not (plain and inside and ("</think>" in content or finish == "length")):
                raise
            return before, content  # it goes on in the block that the prompt has opened

    def _closed(self, before: str, before_ids: Ids, answer: str, turn: Message, finish: Finish) -> Ids:
        """An answer's ids up to the first token that ends it. Where the template closes it with no such token, the one
        that does is added, and space of the template's own is left out. One that was cut off goes to the end of what it
        says: the template's close, in tokens or in words, is not its own."""
        ids = self._continued(before, before_ids, answer)
        end, closed = len(ids), None
        while end and self._says_nothing(ids[end - 1]):
            end -= 1
            closed = end if ids[end] in self.eos_ids else closed
        if finish == "eos" and closed is not None:
            return ids[: closed + 1]
        at = _end_of(turn["content"], answer.removesuffix(self._close))
        ends = at is not None and all(map(self._says_nothing, self._ids(answer[at:])))
        if ends or (at is not None and finish == "length" and not turn.get("tool_calls")):
            ids = self._continued(before, before_ids, answer[:at])
        elif finish == "eos":
            ids = self._continued(before, before_ids, answer.rstrip())
        else:
            cut = self._continued(before, before_ids, answer.removesuffix(self._close))
            ids = cut if closed is None else ids[:closed]
        return (*ids, self.closing_id) if finish == "eos" else ids

    # ---- tokens ----

    def _ids(self, text: str) -> Ids:
        return tuple(self.hf(text, add_special_tokens=False)["input_ids"]) if text else ()

    def _plain(self, text: str) -> Ids:
        """With what the tokenizer puts before a text, unless the text begins with it, and never with what it puts after:
        a prompt goes on."""
        if self._before is None:
            return tuple(self.hf(text)["input_ids"])
        ids, before = self._ids(text), self._before
        return ids if ids[: len(before)] == before else (*before, *ids)

    def _surroundings(self) -> Ids | None:
        """The special tokens that the tokenizer puts before a text; None where it does not do so to text as it is."""
        whole, text = tuple(self.hf("a")["input_ids"]), self._ids("a")
        at = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), None)
        return None if at is None else whole[:at]

    def _continued(self, before: str, before_ids: Ids, text: str) -> Ids:
        """Ids of a text that goes on from another: what tokenizing the two together has after the first. Where tokens
        would go across, the text is tokenized on its own, without the space that SentencePiece begins a text with."""
        others = [(start, self._ids(start)) for start in ("\n", "a", "0", ".")] if self._begins else []
        for start, known in [(before, before_ids), *others] if before else others:
            ids = self._ids(start + text)
            if ids[: len(known)] == known:
                return ids[len(known) :]
        return self._ids(text)

    def _closing(self, after: str, among: frozenset[int]) -> int | None:
        """The one of `among` that a text after an answer begins with, space apart."""
        first = next((i for i in self._ids(after) if self._decoded([i], skip=False).strip()), None)
        return first if first in among else None

    def _ended(self, ids: Ids, finish: Finish) -> Ids:
        """A plain text's ids, with EOS where it is whole and does not bring its own."""
        return ids if finish == "length" or (ids and ids[-1] in self.eos_ids) else (*ids, self.eos_id)

    def _says_nothing(self, token: int) -> bool:
        return token in self.added or not self._decoded([token]).strip()

    def _decoded(self, ids: Sequence[int], skip: bool = True) -> str:
        return str(self.hf.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False))

    def _checked(self, prompt: Prompt, ids: Ids) -> Ids:
        """Raises UserError where there are none, or one that the model has no row for."""
        if not ids:
            raise UserError(f"{prompt}: it is empty once tokenized")
        rows = self.rows
        if rows is not None and max(ids) >= rows:
            token = next(i for i in ids if i >= rows)
            raise UserError(
                f"{prompt}: the token {self.hf.convert_ids_to_tokens(token)!r} has the id {token}, but the "
                f"model's embedding has {rows} rows (0 to {rows - 1}): the tokenizer is not this model's, or "
                "got tokens that the model was not resized for"
            )
        return ids


def _end_of(content: str, answer: str) -> int | None:
    """Where the content ends in the answer, as it is or without the space around it; None where it is not there."""
    found = ((text, answer.rfind(text)) for text in (content, content.strip()) if text)
    return next((at + len(text) for text, at in found if at >= 0), None)


def source_of(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Where transformers finds the model and its tokenizer, and what both are loaded with."""
    source = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    return assets.resolve(config.name), source


def load_tokenizer(config: ModelConfig, model: Any) -> Tokenizer:
    """The tokenizer of a model that is loaded. Raises UserError when it has none, or no end-of-sequence token."""
    from transformers import AutoTokenizer

    name, source = source_of(config)
    adapter = assets.adapter_of(name, config.revision)
    try:
        hf: Any = AutoTokenizer.from_pretrained(name, **source)
    except (OSError, *FOREIGN) as error:
        if adapter is not None:  # one that came without
            base = config.model_copy(update={"name": adapter.base, "revision": adapter.base_revision})
            return load_tokenizer(base, model)
        raise UserError(f"model.name: the tokenizer of {config.name} cannot be loaded: {first_line(error)}") from None
    if config.chat_template:
        path = Path(config.chat_template)
        if not path.is_file():
            raise UserError(f"model.chat_template: {path}: no such file")
        hf.chat_template = path.read_text(encoding="utf-8")
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    ids |= {hf.eos_token_id} if hf.eos_token_id is not None else set()
    if not ids:
        raise UserError(f"model.name: {config.name} names no end-of-sequence token; completions could never end")
    embedding = model.get_input_embeddings()
    return Tokenizer(hf, sorted(ids), len(embedding.weight) if hasattr(embedding, "weight") else None)
