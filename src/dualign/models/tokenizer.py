"""Tokens: what a model reads of a prompt, what a given completion is in its ids, and the text of what it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualign.errors import UserError
from dualign.schema import ModelConfig
from dualign.types import Finish, Prompt


class Tokenizer:
    """A Hugging Face tokenizer with what alignment needs to be sure of: EOS ids, a pad that is not EOS, a template."""

    def __init__(self, hf: Any, eos_ids: Sequence[int]) -> None:
        self.hf = hf
        self.eos_ids = frozenset(eos_ids)
        self.eos_id = hf.eos_token_id if hf.eos_token_id is not None else min(self.eos_ids)
        # Padding is masked by length, never by id, so a model whose pad equals its EOS is no danger here.
        self.pad_id = hf.pad_token_id if hf.pad_token_id is not None else self.eos_id

    def prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, ready to be answered. Raises UserError for a conversation without a chat template."""
        if isinstance(prompt.content, str):
            ids = self.hf(prompt.content)["input_ids"]
        else:
            if self.hf.chat_template is None:
                raise UserError(
                    f"prompt {prompt.id}: it is a conversation, but the model has no chat template; "
                    "give one with model.chat_template=FILE.jinja, or use plain-text prompts"
                )
            ids = self.hf.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        if not ids:
            raise UserError(f"prompt {prompt.id}: it is empty once tokenized")
        return tuple(ids)

    def completion(self, text: str, finish: Finish = "eos") -> tuple[int, ...]:
        """Token ids of a given completion, closed with EOS unless it was cut off."""
        ids = tuple(self.hf(text, add_special_tokens=False)["input_ids"])
        return (*ids, self.eos_id) if finish == "eos" else ids

    def text(self, completion_ids: Sequence[int]) -> str:
        return str(self.hf.decode(list(completion_ids), skip_special_tokens=True))


def source_of(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Where transformers finds the model and its tokenizer, and what both are loaded with."""
    from dualign import assets

    source = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    return assets.resolve(config.name), source


def load_tokenizer(config: ModelConfig, model: Any) -> Tokenizer:
    """The tokenizer of a model that is loaded. Raises UserError when it has none, or no end-of-sequence token."""
    from transformers import AutoTokenizer

    name, source = source_of(config)
    try:
        hf: Any = AutoTokenizer.from_pretrained(name, **source)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"model.name: the tokenizer of {config.name} cannot be loaded: {first}") from None
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
    return Tokenizer(hf, sorted(ids))
