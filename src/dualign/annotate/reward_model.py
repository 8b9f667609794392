"""A Hugging Face sequence classifier with one output as the reward, in process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualign.annotate.base import BatchSession, Item, Session
from dualign.annotate.settings import ClassifierReward
from dualign.assets import resolve
from dualign.errors import UserError
from dualign.types import Label, text_of


class ClassifierAnnotator:
    """Labels a batch with the classifier's scalar, in batches of like length.

    A model with a chat template reads the whole conversation through it, one without reads (prompt, completion) as a
    text pair. Inputs longer than `max_tokens`, or than the model's positions, are absent.
    """

    def __init__(self, settings: ClassifierReward) -> None:
        self.name = settings.name or Path(settings.model).name
        self._tokenizer, self._model = _load(settings)
        positions = getattr(self._model.config, "max_position_embeddings", None) or settings.max_tokens
        self._limit = min(settings.max_tokens, positions, self._tokenizer.model_max_length)
        # a model without a padding id reads its last token, whatever that is: it must not be padded
        padded = self._model.config.get_text_config().pad_token_id is not None
        self._batch_size = settings.batch_size if padded else 1

    def open(self) -> Session:
        return BatchSession(self.label)

    def close(self) -> None:
        """Nothing is held open."""

    def label(self, items: Sequence[Item]) -> list[Label]:
        """One label per item, in order."""
        tokens = [self._tokens(item) for item in items]
        fits = [n for n, t in enumerate(tokens) if len(t["input_ids"]) <= self._limit]
        fits.sort(key=lambda n: len(tokens[n]["input_ids"]))
        labels = [
            Label.absent(f"{self.name}: {len(t['input_ids'])} tokens, more than its limit of {self._limit}")
            for t in tokens
        ]
        for start in range(0, len(fits), self._batch_size):
            rows = fits[start : start + self._batch_size]
            for n, reward in zip(rows, self._forward([tokens[n] for n in rows]), strict=True):
                finite = abs(reward) < float("inf")  # false for NaN too
                labels[n] = Label(reward) if finite else Label.absent(f"{self.name} gave {reward}")
        return labels

    def _tokens(self, item: Item) -> dict[str, list[int]]:
        if self._tokenizer.chat_template:
            messages = [*item.prompt.messages, {"role": "assistant", "content": item.completion}]
            encoded = self._tokenizer.apply_chat_template(messages, tools=item.prompt.tools, return_dict=True)
        else:
            encoded = self._tokenizer(_plain(item), item.completion)
        return {key: list(encoded[key]) for key in self._tokenizer.model_input_names if key in encoded}

    def _forward(self, tokens: list[dict[str, list[int]]]) -> list[float]:
        import torch

        batch = self._tokenizer.pad(tokens, padding=len(tokens) > 1, return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            return [float(x) for x in self._model(**batch).logits[:, 0].float().tolist()]


def _plain(item: Item) -> str:
    """A prompt for models without a chat template: the text itself, or the turns of a conversation."""
    if isinstance(item.prompt.content, str):
        return item.prompt.content
    return "\n\n".join(text_of(message) for message in item.prompt.content)


def _load(settings: ClassifierReward) -> tuple[Any, Any]:
    """Tokenizer and model, in evaluation mode, on the GPU where there is one. Raises UserError where the model cannot
    be loaded, is no classifier or has more than one output."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name = resolve(settings.model)
    source = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, **source)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=getattr(torch, settings.dtype), output_loading_info=True, use_safetensors=True, **source
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"reward model {settings.model}: cannot be loaded: {error}") from error
    if model.config.num_labels != 1:
        raise UserError(f"reward model {settings.model}: has {model.config.num_labels} outputs; a reward has one")
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"reward model {settings.model}: not a trained classifier; its files lack {missing}")
    # decoder classifiers read the last token that is not padding, and look for it by the configuration's id
    pad = model.config.get_text_config().pad_token_id
    if pad is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return tokenizer, model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
