"""Models as they are named: a folder, an embedded default, a hub's name; an adapter is merged into its base."""

from __future__ import annotations

import copy
import logging
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dualign import assets
from dualign.common.errors import FOREIGN, UserError, first_line, out_of_memory
from dualign.models.adapters import merged
from dualign.models.settings import ModelConfig
from dualign.models.tokenizer import Tokenizer, load_tokenizer, source_of

log = logging.getLogger(__name__)


def load_model(config: ModelConfig, key: str = "model.name") -> tuple[Any, Tokenizer]:
    """The causal LM in fp32 and its tokenizer. Raises UserError, by `key`, when there is no such model."""
    from transformers import AutoModelForCausalLM

    name, common = source_of(config)
    if config.trust_remote_code:
        log.warning("trust_remote_code is on: code that comes with %s will run", config.name)
    adapter = assets.adapter_of(name, config.revision)
    common |= {"dtype": torch.float32, "use_safetensors": True}
    if config.lora is not None and config.lora.quantize is not None:
        if adapter is not None:
            raise UserError(f"model.lora.quantize: {config.name} is an adapter, which cannot be merged into 4 bits")
        common |= quantized()
    where, what = name, config.name
    if adapter is not None:
        log.warning("%s: %s is an adapter of %s and is merged into it", key, config.name, adapter.base)
        where, what = adapter.base, f"{config.name}: its base {adapter.base}"
        common |= {"revision": adapter.base_revision}
    try:
        open_model = partial(AutoModelForCausalLM.from_pretrained, where, output_loading_info=True, **common)
        try:
            model, info = open_model(attn_implementation=config.attention)
        except ValueError as error:
            if config.attention != "sdpa" or "scaled_dot_product_attention" not in str(error):
                raise
            log.warning("%s: %s has no sdpa attention: eager attention is used", key, config.name)
            model, info = open_model(attn_implementation="eager")
    except (OSError, ImportError, SafetensorError, *FOREIGN) as error:
        if out_of_memory(error):
            raise
        raise UserError(f"{key}: {what} cannot be loaded: {first_line(error)}") from None
    if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers, and warns
        raise UserError(
            f"{key}: {what} does not hold {len(missing)} weights of a {type(model).__name__}, the first {missing[0]}: "
            "it is no whole causal language model"
        )
    if adapter is not None:
        model = merged(model, name, config.revision, key)
    model.config.use_cache = True
    return model, load_tokenizer(config, model)


def quantized() -> dict[str, Any]:
    """What has transformers round linear layers to 4 bits as it loads them (QLoRA, arXiv 2305.14314: NF4, with its
    scales rounded, too). They compute in their input's type: what autocast, or a trial in fp32, says."""
    if find_spec("bitsandbytes") is None:
        raise UserError("model.lora.quantize needs the package bitsandbytes: pip install 'dualign[qlora]'")
    from transformers import BitsAndBytesConfig

    way = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    return {"quantization_config": way, "device_map": {"": device}}


def load_reference(config: ModelConfig, tokenizer: Tokenizer) -> Any:
    """π_0 where `model.reference` names it. Raises UserError where its tokens are not those of `tokenizer`: log-probs of
    other tokens cannot be compared."""
    settings = {"name": config.reference, "revision": config.reference_revision, "chat_template": None, "lora": None}
    model, own = load_model(config.model_copy(update=settings), "model.reference")
    mine, theirs = tokenizer.hf.get_vocab(), own.hf.get_vocab()
    if mine != theirs:
        other = next(token for token in [*mine, *theirs] if mine.get(token) != theirs.get(token))
        raise UserError(
            f"model.reference: {config.reference} has other tokens than {config.name} ({other!r} is "
            f"{theirs.get(other, 'none')} there and {mine.get(other, 'none')} here); π_0 must read the policy's tokens"
        )
    return model


def copied(module: nn.Module, known: dict[int, Any] | None = None, where: torch.device | None = None) -> Any:
    """A copy of its own, but of what is `known` by its id; its weights are `where`, or beside the module's. What a
    recurrent layer kept of its last pass is let go of the graph, which cannot be copied."""
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                setattr(part, name, value.detach())
    elsewhere: dict[int, Any] = {}
    if where is not None:
        elsewhere = {
            id(p): nn.Parameter(p.detach().to(where, copy=True), p.requires_grad)
            for p in module.parameters()
            if id(p) not in (known or {})
        }
    return copy.deepcopy(module, elsewhere | (known or {}))


def has_dropout(model: Any) -> bool:
    """Whether a forward pass in training is random."""
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    settings = model.config.get_text_config().to_dict()
    rates += [v for name, v in settings.items() if ("drop" in name or "jitter" in name) and isinstance(v, float | int)]
    return any(rate > 0 for rate in rates)


def context_of(config: Any) -> int:
    """Tokens that a model can see, by its configuration; of one that reads images, too, its text part's. Of one whose
    rotation changes for longer texts (longrope), those up to there: beyond, what it says of a row would depend on the
    longest row that it is computed with."""
    for part in (config.get_text_config(), config):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if isinstance(found := getattr(part, name, None), int) and found > 0:
                return min([found, *_unchanged(part)])
    return 1 << 30


def _unchanged(config: Any) -> list[int]:
    """The lengths up to which longrope's rotations are the ones of short texts."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [given, *(value for value in given.values() if isinstance(value, dict))]
    own = getattr(config, "original_max_position_embeddings", None)
    found = [k.get("original_max_position_embeddings") or own for k in kinds if k.get("rope_type") == "longrope"]
    return [length for length in found if isinstance(length, int)]
