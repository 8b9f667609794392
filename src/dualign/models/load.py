"""Models as they are named: a folder, an embedded default, a hub's name."""

from __future__ import annotations

import logging
from typing import Any

import torch

from dualign.errors import UserError, first_line
from dualign.models.tokenizer import Tokenizer, load_tokenizer, source_of
from dualign.schema import ModelConfig

log = logging.getLogger(__name__)


def load_model(config: ModelConfig) -> tuple[Any, Tokenizer]:
    """The causal LM in fp32 and its tokenizer. Raises UserError when there is no such model."""
    from transformers import AutoModelForCausalLM

    name, common = source_of(config)
    if config.trust_remote_code:
        log.warning("trust_remote_code is on: code that comes with %s will run", config.name)
    common |= {"dtype": torch.float32, "use_safetensors": True}
    try:
        try:
            model = AutoModelForCausalLM.from_pretrained(name, attn_implementation=config.attention, **common)
        except ValueError as error:
            if config.attention != "sdpa" or "scaled_dot_product_attention" not in str(error):
                raise
            log.warning("model.name: %s has no sdpa attention: eager attention is used", config.name)
            model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager", **common)
    except (OSError, ValueError) as error:
        raise UserError(f"model.name: {config.name} cannot be loaded: {first_line(error)}") from None
    model.config.use_cache = True
    return model, load_tokenizer(config, model)
