"""A Hugging Face sequence classifier with one output as the reward, in process.

A completion's score is that of the model reading it alone. Rows of a batch are padded on the right, whatever side the
tokenizer pads for sampling: what causal models read comes before the padding, and absolute positions stay what they
are. On loading a batch is tried against one row at a time; a model to which that makes a difference reads one row at a
time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualign.annotate.base import BatchSession, Item, Session
from dualign.annotate.settings import ClassifierReward
from dualign.assets import resolve
from dualign.common.errors import UserError
from dualign.common.types import Label, text_of

log = logging.getLogger(__name__)
PROBES = (1, 8, 150)  # words: past the windows of encoders that have some
ROUNDING = {"torch.float32": 1e-4, "torch.bfloat16": 2**-5}  # relative; a mask that is not heeded moves far more


class ClassifierAnnotator:
    """Labels a batch with the classifier's scalar, in batches of like length.

    A model with a chat template reads the whole conversation through it, one without reads (prompt, completion) as a
    text pair. Inputs longer than `max_tokens`, or than the model's positions, are absent, and so are conversations that
    the template refuses.
    """

    def __init__(self, settings: ClassifierReward) -> None:
        import torch

        self.name = settings.name or Path(settings.model).name
        self._tokenizer, self._model, self._device = _load(settings)
        self._limit = min(settings.max_tokens, _positions(self._model), self._tokenizer.model_max_length)
        self._pad = _padding(self._model)
        # on a CPU a batch gains little, and in bf16 its shape decides how sums are rounded
        exact = self._device.type != "cpu" or self._model.dtype == torch.float32
        self._batch_size = settings.batch_size if exact else 1
        if (why := self._why_alone()) and self._batch_size > 1:
            self._batch_size = 1
            log.warning("reward model %s: one row at a time, because %s", settings.model, why)

    def open(self) -> Session:
        return BatchSession(self.label)

    def close(self) -> None:
        """Nothing is held open."""

    def label(self, items: Sequence[Item]) -> list[Label]:
        """One label per item, in order."""
        labels: list[Label] = []
        tokens: dict[int, dict[str, list[int]]] = {}
        for n, item in enumerate(items):
            row = self._tokens(item)
            if isinstance(row, Label):
                labels.append(row)
                continue
            length = len(row["input_ids"])
            labels.append(Label.absent(f"{self.name}: {length} tokens, more than its limit of {self._limit}"))
            if length <= self._limit:
                tokens[n] = row
        fits = sorted(tokens, key=lambda n: len(tokens[n]["input_ids"]))
        for start in range(0, len(fits), self._batch_size):
            rows = fits[start : start + self._batch_size]
            for n, reward in zip(rows, self._forward([tokens[n] for n in rows]), strict=True):
                finite = abs(reward) < float("inf")  # false for NaN too
                labels[n] = Label(reward) if finite else Label.absent(f"{self.name} gave {reward}")
        return labels

    def _tokens(self, item: Item) -> dict[str, list[int]] | Label:
        """A row as the model reads it; an absent label where the chat template does not take the conversation."""
        from jinja2 import TemplateError

        if self._tokenizer.chat_template:
            messages = [*item.prompt.messages, {"role": "assistant", "content": item.completion}]
            try:
                encoded = self._tokenizer.apply_chat_template(messages, tools=item.prompt.tools, return_dict=True)
            except (TemplateError, TypeError) as error:  # what it raises itself; what it does not foresee
                return Label.absent(f"{self.name}: its chat template refuses the conversation: {_line(error)}")
        else:
            encoded = self._tokenizer(_plain(item), item.completion)
        return self._encoded(encoded)

    def _encoded(self, encoded: Any) -> dict[str, list[int]]:
        """What the model reads of a row; which of its tokens are padding is always said."""
        row = {key: list(encoded[key]) for key in self._tokenizer.model_input_names if key in encoded}
        known = self._model.get_input_embeddings().num_embeddings
        if (highest := max(row["input_ids"], default=0)) >= known:
            token = self._tokenizer.convert_ids_to_tokens(highest)
            raise UserError(f"reward model {self.name}: token {highest} ({token}) is beyond its embedding of {known}")
        return row | {"attention_mask": [1] * len(row["input_ids"])}

    def _forward(self, tokens: list[dict[str, list[int]]]) -> list[float]:
        import torch

        width = max(len(row["input_ids"]) for row in tokens)
        batch = {}
        for key in tokens[0]:
            fill = self._pad if key == "input_ids" else 0
            batch[key] = torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in tokens])
        batch = {key: value.to(self._device) for key, value in batch.items()}
        with torch.inference_mode():
            return [float(x) for x in self._model(**batch).logits[:, 0].float().tolist()]

    def _why_alone(self) -> str | None:
        """Why rows cannot share a forward pass; None where they can: several lengths in one batch score as alone. Raises
        UserError where not even one row can be read."""
        if self._model.config.is_encoder_decoder:
            return "it reads every row at an end of its own"
        texts = ("word " * n for n in PROBES)
        rows = [self._encoded(self._tokenizer(text, truncation=True, max_length=self._limit)) for text in texts]
        try:
            alone = [self._forward([row])[0] for row in rows]
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise UserError(
                f"reward model {self.name}: cannot be run in {self._model.dtype}: {_line(error)}"
            ) from error
        if self._pad is None:
            return "it has no padding token"
        try:
            together = self._forward(rows)
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            return f"a batch fails ({_line(error)})"
        off = max(abs(a - b) for a, b in zip(alone, together, strict=True))
        if off <= ROUNDING[str(self._model.dtype)] * max(1.0, *map(abs, alone)):  # false for NaN
            return None
        return f"in a batch its scores move by {off:.2g}"


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _plain(item: Item) -> str:
    """A prompt for models without a chat template: the text itself, or the turns of a conversation."""
    if isinstance(item.prompt.content, str):
        return item.prompt.content
    return "\n\n".join(text_of(message) for message in item.prompt.content)


def _load(settings: ClassifierReward) -> tuple[Any, Any, Any]:
    """Tokenizer, model, in evaluation mode, and the device that it computes on: the GPU where there is one. Raises
    UserError where the model cannot be loaded, is no classifier or has more than one output."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name = resolve(settings.model)
    source = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, **source)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=getattr(torch, settings.dtype), output_loading_info=True, use_safetensors=True, **source
        )
    except (OSError, ValueError, KeyError, ImportError, AssertionError, RuntimeError) as error:
        raise UserError(f"reward model {settings.model}: cannot be loaded: {error}") from error
    if model.config.num_labels != 1:
        raise UserError(f"reward model {settings.model}: has {model.config.num_labels} outputs; a reward has one")
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"reward model {settings.model}: not a trained classifier; its files lack {missing}")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if settings.offload:
        from accelerate import cpu_offload

        return tokenizer, cpu_offload(model.eval(), device), device
    return tokenizer, model.eval().to(device), device


def _padding(model: Any) -> int | None:
    """The id that fills up a batch: the configuration's, by which decoder classifiers find the last token of a row. None
    where there is none, or none that can be embedded: such a model reads the last token, whatever that is."""
    pad = model.config.get_text_config().pad_token_id
    known = model.get_input_embeddings().num_embeddings
    return pad if isinstance(pad, int) and 0 <= pad < known else None


def _positions(model: Any) -> int:
    """Tokens that a row can have."""
    config = model.config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None)
    found = [stated if isinstance(stated, int) and stated > 0 else 1 << 30]
    for name, module in model.named_modules():  # RoBERTa's positions begin after its padding id
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            found.append(module.num_embeddings - module.padding_idx - 1)
    return min(found)
