"""Weights that are only read, out of the way while nobody reads them: in a file, or in the host's memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from dualign.common import cpu

ALIGNED = 64  # bytes, as torch allocates


Whole = Callable[[], AbstractContextManager[None]]


def move_to_file(weights: Sequence[Tensor], folder: Path) -> Whole:
    """Moves tensors on a CPU that nobody will change to a file in `folder`, mapped into memory: the kernel reads what is
    used, and the file goes with the process. Returns a context at whose end that memory is let go of.
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
        return nullcontext
    for t, at in zip(weights, places, strict=True):
        t.data = flat[at : at + t.nbytes].view(t.dtype).view(t.shape)

    @contextmanager
    def whole() -> Iterator[None]:
        try:
            yield
        finally:
            cpu.forget(flat.data_ptr(), flat.nbytes)

    return whole


def move_to_host(weights: Sequence[Tensor]) -> Whole:
    """Moves a GPU's tensors that nobody will change to the host's memory. They are on the GPU again within the context
    that it returns."""
    pins = torch.cuda.is_available()
    kept = [(t, t.device, t.detach().cpu().pin_memory() if pins else t.detach().cpu().clone()) for t in weights]

    def let_go() -> None:
        for t, device, host in kept:
            t.data = torch.empty(0, dtype=host.dtype, device=device)

    @contextmanager
    def whole() -> Iterator[None]:
        try:
            for t, device, host in kept:
                t.data = host.to(device, non_blocking=True, copy=True)
            yield
        finally:
            let_go()

    let_go()
    return whole
