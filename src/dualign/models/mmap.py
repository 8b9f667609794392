"""Weights that are only read, in a file while nobody reads them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dualign.common import cpu

ALIGNED = 64  # bytes, as torch allocates


def move_to_file(weights: Sequence[Tensor], folder: Path) -> Callable[[], None]:
    """Moves tensors on a CPU that nobody will change to a file in `folder`, mapped into memory: the kernel reads what is
    used, and the file goes with the process. Returns what lets go of that memory until the next use.
    Where the file cannot be made (no room, a read-only folder, not Linux) they stay in memory, and that does nothing."""
    places: list[int] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            for t in weights:
                places.append(file.seek(-file.tell() % ALIGNED, 1))
                # not through the mapping: on a full disk that would kill the process
                file.write(t.detach().contiguous().flatten().view(torch.uint8).numpy().data)
            file.flush()
            name = f"/proc/self/fd/{file.fileno()}"  # it has no other, so a kill leaves nothing behind
            flat = torch.from_file(name, shared=False, size=file.tell(), dtype=torch.uint8)
    except (OSError, RuntimeError):
        return lambda: None
    for t, at in zip(weights, places, strict=True):
        t.data = flat[at : at + t.nbytes].view(t.dtype).view(t.shape)
    return lambda: cpu.forget(flat.data_ptr(), flat.nbytes)
