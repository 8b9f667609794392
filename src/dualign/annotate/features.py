"""Frozen sentence features of (prompt, answer): mean-pooled, normalised MiniLM embeddings, as sentence-transformers
computes them (Reimers & Gurevych 2019, arXiv 1908.10084); or, without a model, a random vector for each word."""

from __future__ import annotations

import functools
import re
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from dualign.assets import resolve

Array = npt.NDArray[np.float32]
ENCODER = "all-minilm-l6-v2"
WORDS = "words"
DIM = 384
MAX_TOKENS = 256  # word pieces, the encoder's own limit
ROWS, STEP = 8, 32  # every forward pass has so many rows, of a multiple of so many word pieces
CACHED = 20_000  # texts, 30 MB


class Encoder:
    """Texts -> unit vectors, on the CPU. Remembers what it encoded: a batch repeats each prompt K times, and several
    heads read the same answers."""

    def __init__(self, model: str = ENCODER) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        folder = resolve(model)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._model: Any = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        self._cache: dict[tuple[str, str], Array] = {}
        self._lock = threading.Lock()

    def encode(
        self, texts: Sequence[str], keep: Literal["start", "end"], progress: Callable[[int], None] = lambda n: None
    ) -> Array:
        """One row per text, (len(texts), DIM). Of a text longer than MAX_TOKENS the start or the end is kept;
        `progress` hears how many texts are done since it was last called."""
        with self._lock:
            new = list(dict.fromkeys(t for t in texts if (t, keep) not in self._cache))
            progress(len(texts) - len(new))
            found = {text: self._cache[text, keep] for text in texts if (text, keep) in self._cache}
            for batch in self._batches(new, keep):
                found |= zip(batch, self._forward(list(batch.values())), strict=True)
                progress(len(batch))
            if len(self._cache) > CACHED:
                self._cache.clear()
            self._cache |= {(text, keep): found[text] for text in new}
        return np.stack([found[text] for text in texts])

    def _batches(self, texts: Sequence[str], keep: Literal["start", "end"]) -> Iterator[dict[str, list[int]]]:
        """At most ROWS texts of like length with their word pieces."""
        self._tokenizer.truncation_side = "right" if keep == "start" else "left"
        by_length: dict[int, dict[str, list[int]]] = {}
        for start in range(0, len(texts), 1000):
            chunk = texts[start : start + 1000]
            for text, ids in zip(
                chunk, self._tokenizer(chunk, truncation=True, max_length=MAX_TOKENS).input_ids, strict=True
            ):
                by_length.setdefault(-(-len(ids) // STEP), {})[text] = ids
        for _, alike in sorted(by_length.items()):
            items = list(alike.items())
            for start in range(0, len(items), ROWS):
                yield dict(items[start : start + ROWS])

    def _forward(self, ids: list[list[int]]) -> Array:
        """A text's features must not depend on the texts beside it, not even in their last digit: rewards that encode
        side by side come in any order. So every pass has the same shape, filled up with empty rows."""
        import torch

        filled = [*ids, *[[self._tokenizer.pad_token_id]] * (ROWS - len(ids))]
        tokens = self._tokenizer.pad({"input_ids": filled}, pad_to_multiple_of=STEP, return_tensors="pt")
        with torch.inference_mode():
            hidden_NTD = self._model(**tokens).last_hidden_state
            mask_NT1 = tokens["attention_mask"][..., None]
            mean_ND = (hidden_NTD * mask_NT1).sum(1) / mask_NT1.sum(1)
            unit: Array = torch.nn.functional.normalize(mean_ND, dim=-1).numpy()
        return unit[: len(ids)]


class WordEncoder:
    """Texts -> unit vectors: the mean over a text's words of a random vector of each, fixed by the word alone. A linear
    head on `features` is then a random projection of one on counts of words and of pairs (word of the prompt, word of
    the answer): Rahimi & Recht 2007's idea. It knows no order and no meaning, needs no model, and takes microseconds."""

    def __init__(self) -> None:
        self._vectors: dict[str, Array] = {}

    def encode(
        self, texts: Sequence[str], keep: Literal["start", "end"], progress: Callable[[int], None] = lambda n: None
    ) -> Array:
        """As Encoder's; of long texts, so many words."""
        found = np.zeros((len(texts), DIM), np.float32)
        for i, text in enumerate(texts):
            words = re.findall(r"\w+", text.casefold())
            for word in words[:MAX_TOKENS] if keep == "start" else words[-MAX_TOKENS:]:
                found[i] += self._vector(word)
        progress(len(texts))
        return found / np.linalg.norm(found, axis=1, keepdims=True).clip(min=1e-9)

    def _vector(self, word: str) -> Array:
        if word not in self._vectors:
            rng = np.random.default_rng(zlib.crc32(word.encode()))
            self._vectors[word] = rng.normal(size=DIM).astype(np.float32)
        return self._vectors[word]


class Encodes(Protocol):
    def encode(
        self, texts: Sequence[str], keep: Literal["start", "end"], progress: Callable[[int], None] = ...
    ) -> Array: ...


def encoder(name: str = ENCODER) -> Encodes:
    """The process's one encoder of this name."""
    return _words() if name == WORDS else _sentences()


_words, _sentences = functools.cache(WordEncoder), functools.cache(Encoder)


def features(prompt_ND: Array, answer_ND: Array) -> Array:
    """[a, √D·q∘a], (N, 2·D). The factor gives both halves the same size: the entries of q∘a are about 1/D, those of a
    about 1/√D, and a ridge would otherwise never look at the prompt."""
    return np.concatenate([answer_ND, np.sqrt(np.float32(DIM)) * prompt_ND * answer_ND], axis=1)
