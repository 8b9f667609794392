"""A model's shape and sizes without its weights; of some models that recipes name, also where their hub is out of reach."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml
from torch import nn

from dualign.assets import adapter_of, resolve
from dualign.common.errors import UserError, first_line


def on_meta(kind: Any, name: str, revision: str | None = None, trust: bool = False) -> tuple[Any, str]:
    """The model of a folder or a hub's name (of an adapter its base) as the class `kind` of transformers makes it, on the
    meta device; and what a person should know of where its sizes are from. Raises UserError where they are nowhere."""
    import torch
    from transformers import AutoConfig

    place, note = name, ""
    try:
        place = resolve(name)
        if (adapter := adapter_of(place, revision)) is not None:
            place, revision = adapter.base, adapter.base_revision
        config: Any = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=trust)
    except (OSError, ValueError, UserError) as error:
        known, shape = _shape(place)
        if shape is None:
            raise UserError(f"{name} cannot be found: {first_line(error)}") from None
        config, note = AutoConfig.for_model(**shape), f"not at hand; its shape is that of {known}, as its name says"
    with torch.device("meta"):
        return kind.from_config(config, trust_remote_code=trust), note


def _shape(name: str) -> tuple[str, dict[str, Any] | None]:
    """The longest known name within `name`, and its shape."""
    shapes = yaml.safe_load(files("dualign.models").joinpath("architectures.yaml").read_text(encoding="utf-8"))
    known = max((key for key in shapes if key in name.lower()), key=len, default="")
    return known, shapes.get(known)


@dataclass(frozen=True)
class Sizes:
    """A causal language model in numbers of entries."""

    parameters: int
    linear: int  # of linear layers, biases too, but not of the head
    head: int  # of the head's weight
    tied: bool
    largest: int  # of the largest linear layer
    rows: int  # what Adafactor keeps: rows and columns of its matrices, all of its vectors
    reach: int  # inputs and outputs of the layers that LoRA adapts: entries for each rank
    layers: int
    hidden: int
    inner: int
    queries: int  # heads × head size
    keys: int  # key heads × head size
    heads: int
    vocabulary: int

    @classmethod
    def of(cls, model: Any, targets: list[str] | str = "all-linear") -> Sizes:
        """Of a model on the meta device, or any other."""
        text, head = model.config.get_text_config(), model.get_output_embeddings()
        weight, embedding = getattr(head, "weight", None), model.get_input_embeddings().weight
        linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight is not weight}
        adapted = [m for n, m in linear.items() if targets == "all-linear" or n.rpartition(".")[2] in targets]
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            linear=sum(p.numel() for m in linear.values() for p in m.parameters(recurse=False)),
            head=0 if weight is None else weight.numel(),
            tied=weight is embedding,
            largest=max((m.weight.numel() for m in linear.values()), default=0),
            rows=sum(sum(p.shape[-2:]) if p.dim() > 1 else p.numel() for p in model.parameters()),
            reach=sum(m.in_features + m.out_features for m in adapted),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            queries=heads * size,
            keys=(getattr(text, "num_key_value_heads", None) or heads) * size,
            heads=heads,
            vocabulary=text.vocab_size,
        )

    @property
    def rest(self) -> int:
        return self.parameters - self.linear

    @property
    def without_head(self) -> Sizes:
        """The decoder alone, of which a value model is made."""
        own = 0 if self.tied else self.head
        return Sizes(**{**vars(self), "parameters": self.parameters - own, "head": 0})
