"""The embedded reward: a linear Bradley-Terry head on frozen sentence features. `dualign reward fit` makes heads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from dualign.annotate.base import BatchSession, Item, Session
from dualign.annotate.features import DIM, ENCODER, WORDS, Array, Encodes, encoder, features
from dualign.annotate.settings import HeadReward
from dualign.common.errors import UserError
from dualign.common.paths import path_of
from dualign.common.types import Label

SHAPES = {"weight": (2 * DIM,), "mean": (), "std": (), "gate_weight": (DIM,), "gate_bias": ()}


@dataclass(frozen=True)
class Head:
    """S linear heads, one per preference file it was fitted on, mixed by what the prompt looks like:

        r(q, a) = Σ_s g_s(q) · (w_s·f(q, a) − mean_s) / std_s,    g = softmax over s of (v_s·q + b_s)

    so that 1.0 is one standard deviation over the fit's answers. S = 1 is the plain ridge Bradley-Terry head.
    A mixture of experts (Jordan & Jacobs 1994) whose gate is fitted on which set a prompt came from: what people
    prefer on harmful prompts and on everyday ones are different, partly opposite, things.
    """

    weight: Array  # (S, 2·DIM)
    mean: Array  # (S,)
    std: Array  # (S,)
    gate_weight: Array  # (S, DIM)
    gate_bias: Array  # (S,)
    about: dict[str, Any] = field(default_factory=dict)  # provenance

    def gate(self, prompt_ND: Array) -> Array:
        """Each sub-head's share, (N, S); rows sum to 1."""
        logit_NS = prompt_ND @ self.gate_weight.T + self.gate_bias
        e_NS = np.exp(logit_NS - logit_NS.max(1, keepdims=True))
        return e_NS / e_NS.sum(1, keepdims=True)

    def score(self, prompt_ND: Array, answer_ND: Array) -> Array:
        """Rewards (N,) of encoded prompts and answers."""
        score_NS = (features(prompt_ND, answer_ND) @ self.weight.T - self.mean) / self.std
        reward_N: Array = (self.gate(prompt_ND) * score_NS).sum(1)
        return reward_N

    def score_texts(self, prompts: Sequence[str], answers: Sequence[str]) -> Array:
        """Rewards (N,) of answers to the prompts' last user turns."""
        return self.score(self.encoder.encode(prompts, "end"), self.encoder.encode(answers, "start"))

    @property
    def encoder(self) -> Encodes:
        return encoder(self.about.get("encoder", ENCODER))

    def to_bytes(self) -> bytes:
        """The head as a safetensors file, its provenance as JSON in the header."""
        from safetensors.numpy import save

        return save({name: getattr(self, name) for name in SHAPES}, {"dualign": json.dumps(self.about)})


def load_head(path: str) -> Head:
    """The head in a file, or a shipped one by builtin:NAME. Raises UserError for anything that is not a head."""
    from safetensors import SafetensorError, safe_open

    file = file_of(path)
    try:
        with safe_open(file, "numpy") as opened:
            about = json.loads((opened.metadata() or {}).get("dualign", "null"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file}: not a reward head (`dualign reward fit` makes them): {error}") from error
    sizes = {tuple(t.shape[:1]) for t in tensors.values()}
    good = set(tensors) == set(SHAPES) and all(tensors[k].shape[1:] == v for k, v in SHAPES.items()) and len(sizes) == 1
    if not (isinstance(about, dict) and good):
        raise UserError(f"{file}: not a reward head; `dualign reward fit` makes them")
    if about.get("encoder") not in (ENCODER, WORDS):
        raise UserError(f"{file}: made for the encoder {about.get('encoder')!r}; this version has {ENCODER}, {WORDS}")
    return Head(**tensors, about=about)


def file_of(path: str) -> Path:
    """The file of a head, also of a shipped one. Raises UserError where there is none."""
    if not path.startswith("builtin:"):
        if not path_of(path).is_file():
            raise UserError(f"reward head {path}: no such file; make one with `dualign reward fit`")
        return path_of(path)
    folder = Path(str(files("dualign.annotate"))) / "heads"
    file = folder / f"{path.removeprefix('builtin:')}.safetensors"
    if file.name != f"{path.removeprefix('builtin:')}.safetensors" or not file.is_file():  # no way out of the package
        have = ", ".join(f"builtin:{p.stem}" for p in sorted(folder.glob("*.safetensors")))
        raise UserError(f"reward head {path}: no such head in the package; it has {have}")
    return file


class HeadAnnotator:
    """Labels a batch with a head, in process. Deterministic. Every completion has a label, an empty one too."""

    def __init__(self, settings: HeadReward) -> None:
        self.head = load_head(settings.path)
        self.name = settings.name or Path(settings.path.removeprefix("builtin:")).stem
        self.head.encoder  # noqa: B018  (a model that cannot be had must be known before the first batch is sampled)

    def open(self) -> Session:
        return BatchSession(self.label)

    def close(self) -> None:
        """Nothing is held open."""

    def label(self, items: Sequence[Item]) -> list[Label]:
        reward_N = self.head.score_texts([i.prompt.text for i in items], [i.completion for i in items])
        return [Label(float(r)) for r in reward_N]
