"""How torch's threads, kernels and memory behave on a CPU, and what a GPU has left."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from typing import Any

SPINS = "5000"  # some 20 microseconds
KERNELS = "64"  # more than the shapes of one step of a model


def tune() -> None:
    """To be called before torch is imported, which is when its threads are made. Unless the environment says otherwise,
    OpenMP's threads spin for a moment before they sleep: woken anew for every small operation they are no help at all,
    and spinning for long makes runs that share a machine crawl. And few of oneDNN's kernels are kept: it prepares one
    for every shape of matrix and by default keeps 1,024, which took 50 MB more with each online batch and saved no time
    (docs/log/)."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, KERNELS)


def keep_memory() -> None:
    """Has glibc's allocator keep freed memory: by default it unmaps every large tensor at once, and faulting the pages
    in again took a third of an update's processor time."""
    for parameter, value in ((-3, 2**30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        _glibc("mallopt", parameter, value)


def return_memory() -> None:
    """Has glibc's allocator give every large tensor back as it is freed: of what each pass gathers of a divided policy
    the heap would keep several times what is alive."""
    _glibc("mallopt", -3, 2**20)


def bf16_units() -> bool:
    """Whether a GPU that is here, or else the processor, multiplies bf16 matrices itself."""
    import torch

    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def free_on_gpu(device: Any) -> int:
    """Bytes of a GPU that no tensor holds."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def give_back_memory() -> None:
    """Returns what the allocator keeps: activations of varying sizes leave its heap full of holes, and a run's memory
    would creep up."""
    _glibc("malloc_trim", 0)


def forget(address: int, size: int) -> None:
    """Takes a private mapping of a file that nobody has written to out of memory; reading it brings it back."""
    start = address - address % mmap.PAGESIZE
    _glibc("madvise", ctypes.c_void_p(start), ctypes.c_size_t(address + size - start), 4)  # MADV_DONTNEED


def _glibc(function: str, *arguments: Any) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library: its allocator is its own affair
            getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)
