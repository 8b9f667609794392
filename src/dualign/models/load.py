"""Models as they are named: a folder, an embedded default, a hub's name."""

from __future__ import annotations

import logging
from typing import Any

import torch

from dualign.errors import UserError
from dualign.models.tokenizer import Tokenizer, load_tokenizer, source_of
from dualign.schema import ModelConfig

log = logging.getLogger(__name__)


def load_model(config: ModelConfig) -> tuple[Any, Tokenizer]:
    """The causal LM in fp32 and its tokenizer. Raises UserError when there is no such model."""
    from transformers import AutoModelForCausalLM

    name, common = source_of(config)
    if config.trust_remote_code:
        log.warning("trust_remote_code is on: code that comes with %s will run", config.name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, attn_implementation=config.attention, use_safetensors=True, **common
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"model.name: {config.name} cannot be loaded: {first}") from None
    model.config.use_cache = True
    return model, load_tokenizer(config, model)
