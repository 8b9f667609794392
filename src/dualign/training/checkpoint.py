"""Training state in safetensors and JSON: what a resume needs beyond the weights. Nothing here is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def save_model(folder: Path, model: Any, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """A model, or its adapters, as transformers opens it, with these `weights` in `dtype`."""
    rounded = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
    # embeddings under adapters are the base's still
    more = {"save_embedding_layers": False} if hasattr(model, "get_base_model") else {}
    kept, model.config.dtype = model.config.dtype, dtype
    model.save_pretrained(folder, state_dict=rounded, **more)
    model.config.dtype = kept


def save_state(folder: Path, parameters: Mapping[str, Tensor], optimizer: Any, progress: dict[str, Any]) -> None:
    """Trained parameters in full precision as `train.safetensors`, optimizer tensors as `optimizer.safetensors`,
    and the plain numbers as `state.json` (last: where it is, all is)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_plain(parameters), folder / "train.safetensors")
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value.contiguous()
            else:
                numbers.setdefault(str(index), {})[key] = value
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps({"progress": progress, "optimizer": numbers}))


def load_state(folder: Path, parameters: Mapping[str, Tensor], optimizer: Any) -> dict[str, Any]:
    """The inverse of save_state, bit for bit; returns `progress`."""
    stored = load_file(folder / "train.safetensors")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name])
    plain = json.loads((folder / "state.json").read_text())
    state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in plain["optimizer"].items()}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return plain["progress"]


def _plain(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().contiguous() for name, p in parameters.items()}
