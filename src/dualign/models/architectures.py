"""A model's shape without its weights; of some models that recipes name, also where their hub is out of reach."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import yaml

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
