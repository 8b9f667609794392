"""Training state in safetensors and JSON: what a resume needs beyond the weights. Nothing here is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dualign.models.share import Share, divided, gathered


def save_model(folder: Path | None, model: Any, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """A model, or its adapters, as transformers opens it, with these `weights` in `dtype`. Without a folder, only gathers
    with the processes that have shares of them."""
    adapters = hasattr(model, "get_base_model")
    rounded: dict[str, Tensor] = {}
    known: dict[int, Tensor] = {}  # a tied weight is gathered once
    for name, value in weights.items():
        if not divided(value):
            rounded[name] = value.detach().to(dtype) if value.is_floating_point() else value
        elif "lora_" in name or not adapters:
            if id(value) not in known:
                known[id(value)] = _kept(folder, gathered(value.detach().to(dtype)))
            rounded[name] = known[id(value)]
    if folder is None:
        return
    more = {"save_embedding_layers": False} if adapters else {}  # embeddings under adapters are the base's still
    kept, model.config.dtype = model.config.dtype, dtype
    model.save_pretrained(folder, state_dict=rounded, **more)
    model.config.dtype = kept


def save_state(
    folder: Path | None,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Any,
    progress: dict[str, Any],
    shares: Mapping[nn.Parameter, Share] = MappingProxyType({}),
) -> None:
    """Trained parameters in full precision as `train.safetensors`, optimizer tensors as `optimizer.safetensors`,
    and the plain numbers as `state.json` (last: where it is, all is). What is divided is gathered: files do not depend on
    the number of processes. Those without a folder only gather."""
    trained = {
        n: _kept(folder, shares[p].whole(p.detach())) if p in shares else p.detach() for n, p in parameters.items()
    }
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            if not isinstance(value, Tensor):
                numbers.setdefault(str(index), {})[key] = value
            elif share := _share_of(stepped[index], key, value, shares):
                tensors[f"{index}.{key}"] = _kept(folder, share.whole(value))
            else:
                tensors[f"{index}.{key}"] = value.contiguous()
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in trained.items()}, folder / "train.safetensors")
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps({"progress": progress, "optimizer": numbers}))


def load_state(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Any,
    shares: Mapping[nn.Parameter, Share] = MappingProxyType({}),
) -> dict[str, Any]:
    """The inverse of save_state, bit for bit; returns `progress`."""
    with torch.no_grad(), safe_open(folder / "train.safetensors", "pt") as stored:
        for name, parameter in parameters.items():
            value = stored.get_tensor(name)
            parameter.copy_(shares[parameter].mine(value) if parameter in shares else value)
    plain = json.loads((folder / "state.json").read_text())
    state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in plain["optimizer"].items()}
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    with safe_open(folder / "optimizer.safetensors", "pt") as stored:
        for key in stored.keys():  # noqa: SIM118 (a file, not a mapping)
            index, _, name = key.partition(".")
            value = stored.get_tensor(key)
            share = _share_of(stepped[int(index)], name, value, shares)
            state.setdefault(int(index), {})[name] = share.mine(value) if share else value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return plain["progress"]


def _share_of(p: nn.Parameter, key: str, value: Tensor, shares: Mapping[nn.Parameter, Share]) -> Share | None:
    """The share that an optimizer's `value` belongs to: all that has the parameter's rows is divided as they are."""
    columns = key == "col" and p.dim() == 2  # Adafactor's means over rows
    return None if columns or value.dim() == 0 else shares.get(p)


def _kept(folder: Path | None, whole: Tensor) -> Tensor:
    """In the host's memory, where it will be written."""
    return whole.cpu() if folder is not None else whole.new_empty(0)
