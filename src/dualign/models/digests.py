"""What a model is, by sha256: weights, settings, tokenizer and templates."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dualign import assets
from dualign.common.digests import Digests, cached_sha256
from dualign.common.errors import UserError
from dualign.common.paths import path_of

LEFT_OUT = {"state.json", "train.safetensors", "optimizer.safetensors"}  # a checkpoint's training state
OF_MODELS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
)
OF_TOKENIZERS = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
OF_TEMPLATES = ("chat_template.*", "additional_chat_templates/*.jinja", "*.tiktoken", "*.py")


def of_model(name: str, revision: str | None = None) -> Digests:
    """A model's or adapter's weights, settings, tokenizer and templates; of a hub's, its commit. Fetches nothing."""
    embedded = name in assets.EMBEDDED and not Path(name).exists()
    folder = assets.cache_dir() / name if embedded else path_of(name)
    if not folder.is_dir():
        return _of_hub(name, revision)
    found = {str(p.relative_to(folder)): cached_sha256(p) for p in files_of(folder)}
    if "adapter_config.json" in found:
        found |= {f"base/{path}": sha256 for path, sha256 in _of_base(folder).items()}
    return found


def files_of(folder: Path) -> Iterator[Path]:
    """Of a model's folder, what from_pretrained reads."""
    for pattern in (*OF_MODELS, *OF_TOKENIZERS, *OF_TEMPLATES):
        yield from sorted(p for p in folder.glob(pattern) if p.is_file() and p.name not in LEFT_OUT)


def _of_base(folder: Path) -> Digests:
    try:
        adapter = assets.adapter_of(str(folder))
    except UserError:
        return {}
    return of_model(adapter.base, adapter.base_revision) if adapter else {}


def _of_hub(name: str, revision: str | None) -> Digests:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in ("config.json", "adapter_config.json"):
        try:
            path = try_to_load_from_cache(name, file, revision=revision)
        except HFValidationError:
            return {}
        if isinstance(path, str):
            return {"commit": Path(path).parent.name}  # .../snapshots/COMMIT/config.json
    return {}
