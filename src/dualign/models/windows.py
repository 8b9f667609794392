"""Which tokens a model's layers see: all before, the last few (a window), or those of one chunk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"  # transformers' layer types
WINDOWS = {"sliding_window": SLIDING, "attention_chunk_size": CHUNKED}
OTHER_WINDOWS = ("attention_window_size", "sliding_window_size", "window_size", "attention_window")
STEPS = ("chunk_size", "mamba_chunk_size", "chunk_length", "block_size")  # recurrent layers take so many tokens at once
SMALL = 4  # tokens of a window while a model is tried


def kinds_of(config: Any) -> dict[str, int] | None:
    """How attention sees in the layers of a text configuration, each kind with its size in tokens (0: all tokens). None
    where a layer is of a kind that keeps more than keys and values, or sees in a way of its own."""
    sizes = {kind: getattr(config, name, None) or 0 for name, kind in WINDOWS.items()}
    if layers := getattr(config, "layer_types", None):
        kinds = set(layers)
    elif sizes[SLIDING] and getattr(config, "use_sliding_window", True):
        kinds = {SLIDING}
    else:
        kinds = {CHUNKED} if sizes[CHUNKED] else {FULL}
    if not kinds <= {FULL, SLIDING, CHUNKED} or any(not isinstance(size, int) for size in sizes.values()):
        return None
    if any(kind != FULL and not sizes[kind] for kind in kinds):
        return None
    return {kind: sizes.get(kind, 0) for kind in sorted(kinds)}


def windows_of(config: Any) -> dict[str, int]:
    """The settings of a text configuration that say how far attention sees, by name, as far as layers use them."""
    kinds = kinds_of(config)
    used = [name for name, kind in WINDOWS.items() if kinds is None or kind in kinds]
    if kinds is None or FULL in kinds:  # families with settings of their own name no kinds
        used += OTHER_WINDOWS
    found = {name: getattr(config, name, None) for name in used}
    return {name: size for name, size in found.items() if isinstance(size, int) and size > 0}


def longest_step(config: Any) -> int:
    """The most tokens that a recurrent layer takes at once; 0 for models without one."""
    sizes = [getattr(config, name, None) for name in STEPS]
    return max((size for size in sizes if isinstance(size, int)), default=0)


@contextmanager
def small_windows(model: nn.Module) -> Iterator[None]:
    """While active, every window of the model is a few tokens long, so that short texts reach beyond it."""
    config: Any = model.config
    text = config.get_text_config()
    windows = windows_of(text)
    changed: list[tuple[Any, str, Any]] = []
    for holder in {id(x): x for x in (config, text, *model.modules())}.values():
        for name, size in windows.items():
            if getattr(holder, name, None) == size and not isinstance(getattr(type(holder), name, None), property):
                changed.append((holder, name, size))
                setattr(holder, name, SMALL)
    try:
        yield
    finally:
        for holder, name, size in changed:
            setattr(holder, name, size)
