"""Adapters: one that a model is loaded from is merged into its base, and those that are trained are put into layers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dualign import assets
from dualign.common.errors import FOREIGN, UserError
from dualign.models.settings import ModelConfig
from dualign.models.share import gathered

log = logging.getLogger(__name__)


def merged(model: Any, adapter: str, revision: str | None, key: str) -> Any:
    """`model` with the adapter of a folder (or hub's name) merged into its weights. Raises UserError, by `key`, where it
    cannot be, or the merged weights would say something else."""
    peft = _peft(f"{key}: {adapter} is an adapter, which")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = peft.PeftModel.from_pretrained(model, adapter, revision=revision, torch_device="cpu").eval()
        held = set(peft.utils.load_peft_weights(adapter, device="cpu", revision=revision))
    except (OSError, SafetensorError, *FOREIGN) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{key}: the adapter {adapter} does not fit its base: {' '.join(said[:2])}") from None
    taken = set(peft.utils.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    odd = sorted(taken - held) + sorted(k for k in held - taken if "lora_" in k)  # peft warns, and uses fresh ones
    if odd:
        raise UserError(f"{key}: the adapter {adapter} does not fit its base: {odd[0]} is on one side alone")
    kind = next(iter(wrapped.peft_config.values())).peft_type
    if not hasattr(wrapped.base_model, "merge_and_unload"):
        raise UserError(
            f"{key}: {adapter} is an adapter of the kind {kind.value}, which cannot be merged into its base"
        )
    ids = torch.arange(8)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        expected = wrapped(input_ids=ids, use_cache=False).logits
    untie(model)
    whole: Any = wrapped.merge_and_unload()
    tell_tied(whole)
    with torch.no_grad():
        found = whole(input_ids=ids, use_cache=False).logits
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise UserError(
            f"{key}: the adapter {adapter} cannot be merged: the merged weights say something else than it does"
        )
    return whole.requires_grad_(True)


def untie(model: Any) -> None:
    """Gives a head whose weight is the embedding's one of its own, where an adapter is on either: it is on that one alone."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not (_has_adapter(head) or _has_adapter(embedding)):
        return
    inner = [m.get_base_layer() if hasattr(m, "get_base_layer") else m for m in (head, embedding)]
    if inner[0].weight is inner[1].weight:
        inner[0].weight = nn.Parameter(inner[1].weight.detach().clone())


def tell_tied(model: Any) -> None:
    """Lets a configuration say whether the head has the embedding's weight: what is saved is tied again where it does."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and getattr(head, "weight", None) is not embedding.weight:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _has_adapter(module: Any) -> bool:
    return type(module).__module__.startswith("peft.")


def own_base(m: ModelConfig, run: str) -> Path | None:
    """Where the run in folder `run` keeps the model that its adapters are of, as no other folder has it: that of
    another adapter, merged. None for adapters of a model that is somewhere, and for whole weights."""
    merged = m.lora is not None and assets.adapter_of(assets.resolve(m.name), m.revision) is not None
    return Path(run).resolve() / "base" if merged else None


def with_lora(model: Any, config: ModelConfig, own: Path | None) -> Any:
    """`model` with fresh adapters in its layers, which say where their base is, from any folder: the model that the
    configuration names, or the run's `own`."""
    peft, c = _peft("model.lora"), config.lora
    assert c is not None
    settings = peft.LoraConfig(
        r=c.r, lora_alpha=c.alpha, lora_dropout=c.dropout, target_modules=c.target_modules, task_type="CAUSAL_LM"
    )
    try:
        with warnings.catch_warnings():  # of tied weights: an adapter is on the one layer that is named
            warnings.simplefilter("ignore")
            wrapped = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"model.lora.target_modules: {str(error).splitlines()[0]}") from None
    kept = wrapped.peft_config["default"]
    named = assets.resolve(config.name)
    place = own or (Path(named).resolve() if Path(named).exists() else named)
    kept.base_model_name_or_path, kept.revision = str(place), None if own else config.revision
    return wrapped


def without_adapters(model: Any) -> tuple[Any, dict[str, Tensor]]:
    """The model under a wrapped one, and its own weights by their own names."""
    inner = model.get_base_model()
    weights = {
        name.replace(".base_layer.", "."): value for name, value in inner.state_dict().items() if "lora_" not in name
    }
    return inner, weights


def merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """A model's weights by the names that transformers gives them, one at a time; with what its adapters add."""
    return base_weights(model, merged=True) if hasattr(model, "get_base_model") else iter(model.state_dict().items())


def base_weights(model: Any, merged: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Those of the model under the adapters, likewise; of 4 bits, as the numbers that these stand for. `merged`: with
    what the adapters add."""
    inner, weights = without_adapters(model)
    layers: dict[str, Any] = dict(inner.named_modules())
    for name, value in weights.items():
        if ".weight." in name:  # what 4-bit weights are read by
            continue
        layer = layers.get(name.rpartition(".")[0])
        if layer is not None and name.endswith(".weight") and hasattr(layer, "get_base_layer"):
            value = gathered(_whole(layer.get_base_layer().weight, value))
            if merged:
                value = value + gathered(layer.get_delta_weight("default").to(value.dtype))
        yield name, gathered(value)


def _whole(parameter: Any, value: Tensor) -> Tensor:
    """A layer's weight, of 4 bits as the numbers that these stand for."""
    if not hasattr(parameter, "quant_state"):
        return value
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state)


def adapter_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """What was put into a model's layers, by the names that peft stores it under."""
    from peft import get_peft_model_state_dict

    for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        yield name, gathered(value)


def bare(model: Any) -> Any:
    """The model under the adapters, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _peft(what: str) -> Any:
    try:
        import peft
    except ImportError:
        raise UserError(f"{what} needs the package peft: pip install 'dualign[lora]'") from None
    return peft
